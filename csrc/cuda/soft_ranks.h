// Where a group of threads computes the sums of a row; soft ranks on their own.
#pragma once

#include "../options.h"
#include "../row.h"
#include "buckets.h"
#include "grid.h"
#include "near.h"
#include "pairs.h"
#include "places.h"
#include "scan.h"

namespace pcoherence::cuda {

// How the sums of a row are computed.
template <class T>
struct Summation {
  Method method;
  int most_held;         // bins that hold somebody, for which a group has memory
  std::int64_t reserve;  // bytes of fast memory that rows leave to the grid
  DeviceTables<T> tables;
  int* status;  // [1] set to 1 where an explicit grid would need more bins
};

template <class T>
struct SoftRankTask {
  Summation<T> sums;
  std::int64_t rows;
  int n;
  const T* values;   // [rows, n]
  const T* weights;  // [n], or [rows, n] with `weights_per_row`, or null
  bool weights_per_row;
  const T* upstream;  // [rows, n], then `out` is its pullback; null: `out` is the ranks
  T* out;             // [rows, n]
  double temperature;
};

// ---------------------------------------------------------------- positions

// What a row is in the units of some sums.
template <class T>
struct Positions {
  T base, factor, bottom, top;

  // Only candidates of weight 0 can lie outside of [bottom, top], or be NaN.
  PCOH_DEVICE T operator()(T value) const { return std::fmin(std::fmax((value - base) * factor, bottom), top); }
};

template <class T>
PCOH_DEVICE T bounded(double position) {
  constexpr double most = std::numeric_limits<T>::max();
  return static_cast<T>(std::fmin(std::fmax(position, -most), most));
}
// Of values from low to high. They begin at the value nearest to 0: taken from the lowest value, positions would lose
// the digits that tell apart what lies close together far away.
template <class Sums, class T>
PCOH_DEVICE Positions<T> positions(T low, T high, const Scaling& scale) {
  const T base = low > 0 ? low : high < 0 ? high : T(0);
  const double factor = scale.per_distance / Sums::unit;
  return {base, static_cast<T>(factor), bounded<T>((double(low) - double(base)) * factor),
          bounded<T>((double(high) - double(base)) * factor)};
}

// ---------------------------------------------------------------- soft ranks

// Of a row in an arena.
template <class T>
constexpr std::int64_t row_bytes(std::int64_t n) {
  return n * sizeof(T) + 16;
}

// Memory and methods for one row (see ../row.h).
template <class T, class G>
struct Workplace {
  using Grid = cuda::Grid<T, G>;
  using Scan = cuda::Scan<T, G>;
  using Pairs = cuda::Pairs<T, G>;
  // Where "auto" leaves the grid: a bin costs about 4,000 instructions, most of them its convolutions with all bins in
  // reach. At one for every 8 elements that is 500 an element; the scan's sort alone takes 700 of a row of 1,024
  // (64-bit: twice the coefficients, each of twice the terms, in slower arithmetic).
  static constexpr int elements_per_bin = sizeof(T) == 4 ? 8 : 32;
  // Up to this many elements all pairs take less time than the barriers of the scan's sort: 50 of them against 25
  // operations for each of two elements a thread.
  static constexpr int few_pairs = 512;
  // Up to so many elements, bins that are too many are not looked at for empty ones.
  static constexpr int few_to_hold = 96;
  static constexpr bool wants_ties = true;

  Method method;
  int most_laid;  // bins, empty ones among them
  const Summation<T>& how;
  Arena arena;
  bool sorts_weights = false;  // hard ranks under weights that differ: see kSortedShare
  Layout<T> layout = {};       // of the row whose sums are wanted, once bins have been left out

  PCOH_DEVICE Workplace(const Summation<T>& sums, const Arena& memory)
      : method(sums.method), most_laid(method == Method::automatic ? kMostLaid : kMaxBins), how(sums), arena(memory) {}

  template <class V = T>
  PCOH_DEVICE V* take(int n, int others = 0) {
    return arena.take<V>(n, others * row_bytes<T>(n) + how.reserve);
  }
  PCOH_DEVICE T* values(const T*, int n) { return take(n); }
  // Those read in order leave fast memory before what is accessed at random.
  PCOH_DEVICE T* ranked_values(const T*, int n) {
    const std::int64_t ranking = bucket_bytes<T>(n);
    return arena.take<T>(n, ranking > how.reserve ? ranking : how.reserve);
  }
  template <class Sums>
  PCOH_DEVICE const T* pullback(Sums& sums, T* residuals, int) {
    sums.pullback(residuals, residuals);
    return residuals;
  }

  template <class Near>
  PCOH_DEVICE NearSums<T> near_table(int count, const Near& near) const {
    return NearSums<T>(count, double(near.offset), double(near.slope));
  }

  // Those that hold somebody, where all of them would be too many; but few elements that lie so far apart are for all
  // pairs, or the scan.
  PCOH_APART double bins(G& g, const Row<T>& row, T low, T high, const Scaling& scale) {
    const double laid = scale.range / kBinWidth;
    if (row.n <= few_to_hold || (laid <= kDenseBins && laid * elements_per_bin <= row.n)) return laid;
    layout = Layout<T>(low, high, scale);
    const bool held = layout.leave_out_empty(g, row, how.most_held, arena);
    return held ? layout.bins : std::numeric_limits<double>::infinity();
  }

  // Apart, so that what the caller holds does not take registers from the loops.
  template <class Sums, class F>
  PCOH_APART void run(G& g, Row<T>& row, T low, T high, const Scaling& scale, F& f) {
    row.sums_unit = Sums::unit;
    if constexpr (std::is_same_v<Sums, Grid>) {
      if (layout.laid == 0) {
        layout = Layout<T>(low, high, scale);
        if (layout.laid > kDenseBins && !layout.leave_out_empty(g, row, how.most_held, arena)) PCOH_TRAP();
      }
      layout.locate(g, row);
      Sums sums(g, row, layout, how.tables, arena);
      f(sums);
    } else {
      const Positions<T> position = positions<Sums>(low, high, scale);
      by_memory(g, row.values, [&](T* values) { each(g, row.n, [=](int k) { values[k] = position(values[k]); }); });
      row.cells = {};
      g.sync();
      Sums sums(g, row, how.tables, arena);
      f(sums);
    }
    layout = {};  // another row of this workplace has another
  }
};

// ---------------------------------------------------------------- soft ranks on their own

template <class T, class G>
PCOH_DEVICE void report(G& g, Status status, const Summation<T>& sums) {
  if (status != Status::ok && g.thread() == 0) *sums.status = 1;
}

template <class T, class G>
PCOH_DEVICE void fill(G& g, T* row, T value, int n) {
  each(g, n, [=](int k) { row[k] = value; });
}

// What the values of a row span, whatever their weights, since all of them are ranked.
template <class T>
struct Span {
  Ends ends;
  T low, high;  // of the finite values; low > high: there are none
  int nans;

  static PCOH_DEVICE Span none() {
    constexpr T inf = std::numeric_limits<T>::infinity();
    return {{}, inf, -inf, 0};
  }
  PCOH_DEVICE void add(T v, T w) {
    nans += v != v;
    ends.add(double(v), double(w));
    if (!std::isfinite(v)) return;
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
};
struct MergeSpans {
  template <class T>
  PCOH_DEVICE Span<T> operator()(const Span<T>& a, const Span<T>& b) const {
    return {{a.ends.below + b.ends.below, a.ends.between + b.ends.between, a.ends.above + b.ends.above},
            b.low < a.low ? b.low : a.low,
            b.high > a.high ? b.high : a.high,
            a.nans + b.nans};
  }
};

template <class T, class G>
PCOH_DEVICE void soft_rank_row(G& g, const SoftRankTask<T>& task, std::int64_t r, Arena arena) {
  const int n = task.n;
  const T* given = task.values + r * n;
  const T* given_weights = task.weights ? task.weights + (task.weights_per_row ? r * n : 0) : nullptr;
  const auto weight = [=](int k) { return given_weights ? given_weights[k] : T(1); };
  Workplace<T, G> work(task.sums, arena);
  T* result = work.take(n);
  T* values = work.take(n);
  T* weights = work.take(n);
  T* out = task.out + r * n;
  Span<T> span = Span<T>::none();
  each(g, n, [&](int k) { span.add(given[k], weight(k)); });
  span = reduce(g, span, MergeSpans{});
  if (span.nans > 0) return fill(g, out, std::numeric_limits<T>::quiet_NaN(), n);
  // Infinite values rank at the ends and have no slope: they leave the row, weight 0 and any place.
  const bool some = span.low <= span.high;
  const T low = some ? span.low : T(0), high = some ? span.high : T(0);
  each(g, n, [=](int k) {
    const bool finite = std::isfinite(given[k]);
    values[k] = finite ? given[k] : low;
    weights[k] = finite ? weight(k) : T(0);
    if (task.upstream != nullptr) result[k] = finite ? task.upstream[r * n + k] : T(0);
  });
  g.sync();
  // No bound on the range, which scaling() has: values that mask others may be as low as T goes.
  const double per_value = 1 / task.temperature;
  const Scaling scale{per_value, (double(high) - double(low)) * per_value};
  Row<T> row{weights, n, -1, values};
  const Status status = with_sums(g, row, low, high, scale, work, [&](auto& sums) {
    if (task.upstream == nullptr)
      sums.ranks(result);
    else
      sums.pullback(result, result);
  });
  if (status != Status::ok) {
    report(g, status, task.sums);
    return fill(g, out, std::numeric_limits<T>::quiet_NaN(), n);
  }
  g.sync();
  const T factor = static_cast<T>(per_value);
  const bool pulled = task.upstream != nullptr;
  each(g, n, [=](int k) {
    out[k] = pulled ? result[k] * factor : static_cast<T>(span.ends.rank(given[k], result[k])) + T(0.5);
  });
}

}  // namespace pcoherence::cuda
