// Where a core computes the sums of a row; soft ranks on their own.
#pragma once

#include "grid.h"
#include "hard_ranks.h"
#include "near.h"
#include "pairs.h"
#include "scan.h"

namespace pcoherence::PCOH_ISA {
namespace {

template <class T>
void fill_row(T* row, T value, std::int64_t n) {
  for (std::int64_t k = 0; k < n; ++k) row[k] = value;
}

// ---------------------------------------------------------------- soft ranks

// Memory and methods for one row at a time (see ../row.h).
template <class T>
struct Workplace {
  using Grid = PCOH_ISA::Grid<T>;
  using Scan = PCOH_ISA::Scan<T>;
  using Pairs = PCOH_ISA::Pairs<T>;
  // Where "auto" leaves the grid: a bin costs as much as this many elements' share of the scan (measured from n = 8 to
  // 1,024, see docs/speed.rst).
  static constexpr int elements_per_bin = sizeof(T) == 4 ? 6 : 32;
  // Comparing all pairs is a third quicker for 8 elements, no quicker for 32, and then soon several times slower.
  static constexpr int few_pairs = 0;
  // Up to so many elements, bins that are too many are not looked at for empty ones.
  static constexpr int few_to_hold = 96;
  static constexpr int most_laid = kMaxBins;
  static constexpr bool wants_ties = false;

  Method method;
  Workspace& ws;

  int taken = 0;                    // of the workspace's rows
  std::optional<Layout<T>> layout;  // of the row whose sums are wanted, once it is known

  template <class V = T>
  V* take(int n, int = 0) {
    if (taken == Workspace::kRows) std::abort();
    return ws.rows[taken++].template need<V>(n);
  }
  const T* values(const T* given, int) { return given; }  // they are read where they are
  const T* ranked_values(const T* given, int) { return given; }
  template <class Sums>
  const T* pullback(Sums& sums, const T* residuals, int n) {
    T* out = take(n);
    sums.pullback(residuals, out);
    return out;
  }

  // Rows of a call have one count, or two: made again where it is another.
  template <class Near>
  NearTable<T> near_table(int count, const Near& near) {
    if (ws.near_count != count || ws.near_offset != double(near.offset)) {
      T* weights = ws.near.template need<T>(std::size_t(4) * count);
      T* ranks = weights + 2 * count;
      const auto weight = [&](double rank) { return 1 / near(rank); };
      ws.near_total = 0;
      for (int i = 0; i < count; ++i) ws.near_total += weight((i + 0.5) / count);
      double before = 0;
      const auto put = [&](int place, double w, double up_to) {
        weights[place] = static_cast<T>(w);
        ranks[place] = static_cast<T>(up_to / ws.near_total);
      };
      for (int i = 0; i < count; ++i) {
        const double own = weight((i + 0.5) / count), shared = weight((i + 1.0) / count);
        put(2 * i, own, before + own / 2);
        put(2 * i + 1, shared, before + shared);  // of two
        before += own;
      }
      put(2 * count - 1, 0, 0);
      ws.near_table = weights;
      ws.near_count = count;
      ws.near_offset = double(near.offset);
    }
    const T* weights = static_cast<const T*>(ws.near_table);
    return {weights, weights + 2 * count, ws.near_total};
  }

  // Those that hold somebody, where all of them would be too many; but few elements that lie so far apart are for the
  // scan, which is exact where all that there is are small slopes.
  double bins(Core<T>&, const Row<T>& row, T low, T, const Scaling& scale) {
    const double laid = scale.range / kBinWidth;
    if (laid * elements_per_bin <= row.n || row.n <= few_to_hold) return laid;
    layout.emplace(placed(row, low, scale), ws);
    return layout->bins;
  }

  template <class Sums, class F>
  void run(Core<T>&, Row<T>& row, T low, T, const Scaling& scale, F& f) {
    row = placed(row, low, scale);
    Sums sums(ws);
    if constexpr (std::is_same_v<Sums, Grid>) {
      if (!layout) layout.emplace(row, ws);
      sums.load(row, *layout);
    } else {
      sums.load(row);
    }
    f(sums);
    layout.reset();  // another row of this workplace has another
  }

  static Row<T> placed(Row<T> row, T low, const Scaling& scale) {
    row.low = low;
    row.scale = scale;
    return row;
  }
};

template <class T>
double hard_ranks_of_row(const T* values, const CandidateWeights<T>& c, T* out, Workspace& ws) {
  Core<T> core;
  Row<T> row{c.weights, static_cast<int>(padded(c.n)), values};
  Workplace<T> work{Method::automatic, ws};
  return hard_ranks(core, row, stats(core, row, values, c.weighed), true, out, work);
}

// ---------------------------------------------------------------- soft ranks on their own

template <class T>
void copy_padded(const T* from, T* to, std::int64_t n, T padding) {
  for (std::int64_t k = 0; k < n; ++k) to[k] = from[k];
  for (std::int64_t k = n; k < padded(n); ++k) to[k] = padding;
}

// What the values of a row span, whatever their weights: all of them are ranked.
template <class T>
struct Span {
  T low = 0, high = 0;  // of the finite values; 0 where there are none
  bool infinite = false, nan = false;
};

template <class T>
Span<T> span(const T* values, std::int64_t n) {
  using V = vec_t<T>;
  constexpr T inf = std::numeric_limits<T>::infinity();
  V low = splat<T>(inf), high = splat<T>(-inf);
  ivec_t<T> other{}, nan{};
  const auto look = [&](V v) {
    const auto finite = v - v == V{};
    other |= ~finite;
    nan |= v != v;
    low = vmin(select(finite, v, splat<T>(inf)), low);
    high = vmax(select(finite, v, splat<T>(-inf)), high);
  };
  std::int64_t k = 0;
  for (; k + lanes_v<T> <= n; k += lanes_v<T>) look(load(values + k));
  for (; k < n; ++k) look(splat<T>(values[k]));
  Span<T> result;
  if (min_lane(low) <= max_lane(high)) {
    result.low = min_lane(low);
    result.high = max_lane(high);
  }
  result.infinite = min_lane(other) != 0;  // masks are 0 or -1
  result.nan = min_lane(nan) != 0;
  return result;
}

// Infinite values of a row leave it, with weight 0 and `anywhere` for a value; what they weigh remains.
template <class T>
Ends take_out_ends(const T* given, T* values, T* weights, std::int64_t n, T anywhere) {
  Ends ends;
  for (std::int64_t k = 0; k < n; ++k) {
    ends.add(double(given[k]), double(weights[k]));
    if (std::isfinite(given[k])) continue;
    values[k] = anywhere;
    weights[k] = 0;
  }
  return ends;
}

template <class T>
Status soft_rank(const SoftRankRow<T>& a, Workspace& ws) {
  const int n = static_cast<int>(padded(a.n));
  const Span<T> range = span(a.values, a.n);
  if (range.nan) {
    fill_row(a.out, std::numeric_limits<T>::quiet_NaN(), a.n);
    return Status::ok;
  }
  Workplace<T> work{a.method, ws};
  T* values = work.take(n);
  T* weights = work.take(n);
  copy_padded(a.values, values, a.n, range.low);
  if (a.weights != nullptr) {
    copy_padded(a.weights, weights, a.n, T(0));
  } else {
    fill_row(weights, T(1), a.n);
    fill_row(weights + a.n, T(0), n - a.n);
  }
  Ends ends;
  if (range.infinite) ends = take_out_ends(a.values, values, weights, a.n, range.low);
  // No bound on the range, which scaling() has: values that mask others may be as low as T goes.
  const double per_value = 1 / a.temperature;
  const Scaling scale{per_value, (double(range.high) - double(range.low)) * per_value};
  Core<T> core;
  Row<T> row{weights, n, values};
  return with_sums(core, row, range.low, range.high, scale, work, [&](auto& sums) {
    T* result = work.take(n);
    if (a.upstream == nullptr) {
      sums.ranks(result);
      for (std::int64_t k = 0; k < a.n; ++k)
        a.out[k] = (range.infinite ? static_cast<T>(ends.rank(a.values[k], result[k])) : result[k]) + T(0.5);
    } else {
      T* upstream = work.take(n);
      copy_padded(a.upstream, upstream, a.n, T(0));
      if (range.infinite)
        for (std::int64_t k = 0; k < a.n; ++k)
          if (!std::isfinite(a.values[k])) upstream[k] = 0;
      sums.pullback(upstream, result);
      for (std::int64_t k = 0; k < a.n; ++k) a.out[k] = result[k] * static_cast<T>(per_value);
    }
  });
}

}  // namespace
}  // namespace pcoherence::PCOH_ISA
