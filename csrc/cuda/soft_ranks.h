// Statistics of a row by one group of threads, and its kernel sums by one of the methods; soft ranks on their own.
#pragma once

#include "../options.h"
#include "grid.h"
#include "hard_ranks.h"
#include "pairs.h"
#include "scan.h"

namespace pcoherence::cuda {

// How the sums of a row are computed.
template <class T>
struct Summation {
  Method method;
  int most_bins;         // that a group has memory for
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

// The range of a row's values, and where its positions begin. The base is the value nearest to 0: taken from the lowest
// value, positions would lose the digits that tell apart what lies close together far away. A grid begins at the
// lowest: there are at most most_bins, so that no value is far from it.
template <class T>
struct Range {
  T low, high;

  template <bool from_low>
  PCOH_DEVICE T base() const {
    return from_low || low > 0 ? low : high < 0 ? high : T(0);
  }
  template <class Sums>
  PCOH_DEVICE Positions<T> positions(const Scaling& scale) const {
    const T from = base<Sums::from_low>();
    const double factor = scale.per_distance / Sums::unit;
    return {from, static_cast<T>(factor), bounded((double(low) - double(from)) * factor),
            bounded((double(high) - double(from)) * factor)};
  }

 private:
  static PCOH_DEVICE T bounded(double position) {
    constexpr double most = std::numeric_limits<T>::max();
    return static_cast<T>(std::fmin(std::fmax(position, -most), most));
  }
};

// ---------------------------------------------------------------- row statistics

template <class T>
struct Stats {
  double weight, product;  // sum_k w_k, sum_k w_k v_k
  T low, high;             // over weights > 0
  T least, most;           // weights > 0
  int count;               // of weights > 0

  PCOH_DEVICE double mean() const { return weight > 0 ? product / weight : 0; }
  PCOH_DEVICE bool uniform() const { return least == most; }
  PCOH_DEVICE Range<T> range() const { return {low, high}; }
  PCOH_DEVICE bool finite() const { return std::isfinite(product) && std::isfinite(double(high) - double(low)); }

  static PCOH_DEVICE Stats none() {
    constexpr T inf = std::numeric_limits<T>::infinity();
    return {0, 0, inf, -inf, inf, -inf, 0};
  }
  PCOH_DEVICE void add(T v, T w) {
    weight += double(w);
    product += double(w) * double(v);  // 0 * NaN shows, as it does in the reference
    if (!(w > 0)) return;
    low = v < low ? v : low;
    high = v > high ? v : high;
    least = w < least ? w : least;
    most = w > most ? w : most;
    ++count;
  }
  // The same for weights of 1 and 0, up to finish_unweighted().
  PCOH_DEVICE void add_unweighted(T v, bool counts) {
    product += double(counts ? v : v * 0);
    low = counts && v < low ? v : low;
    high = counts && v > high ? v : high;
    count += counts;
  }
  PCOH_DEVICE void finish_unweighted() {
    weight = count;
    if (count > 0) least = most = 1;
  }
};
struct Merge {
  template <class T>
  PCOH_DEVICE Stats<T> operator()(const Stats<T>& a, const Stats<T>& b) const {
    return {a.weight + b.weight,
            a.product + b.product,
            b.low < a.low ? b.low : a.low,
            b.high > a.high ? b.high : a.high,
            b.least < a.least ? b.least : a.least,
            b.most > a.most ? b.most : a.most,
            a.count + b.count};
  }
};

// Statistics of the row's candidates with values `from` [n], which become row.values unless that is null.
template <class T, class G>
PCOH_APART Stats<T> stats(G& g, const RowView<T>& row, const T* from) {
  Stats<T> s = Stats<T>::none();
  by_memory(g, row.values, [&](T* copy) {
    const auto keep = [=](int k, T v) {
      if (copy != nullptr) copy[k] = v;
      return v;
    };
    if (row.weights != nullptr) {
      each(g, row.n, [&](int k) { s.add(keep(k, from[k]), row.weight(k)); });
    } else {
      each(g, row.n, [&, self = row.self](int k) { s.add_unweighted(keep(k, from[k]), k != self); });
      s.finish_unweighted();
    }
  });
  return reduce(g, s, Merge{});
}

// ---------------------------------------------------------------- soft ranks

// Where "auto" leaves the grid: its convolution costs an element 29 * 3 * order operations a bin over n, about what
// the scan's sort and recurrences cost at one bin for every 8 elements (64-bit: twice the order, slower arithmetic).
template <class T>
inline constexpr int kElementsPerBin = sizeof(T) == 4 ? 8 : 32;
// Up to this many elements all pairs take less time than the barriers of the scan's sort: 50 of them against 25
// operations for each of two elements a thread.
inline constexpr int kFewPairs = 512;

template <class T>
PCOH_DEVICE Method choose(const Summation<T>& sums, double range, int n) {
  if (sums.method != Method::automatic) return sums.method;
  const double bins = range / kBinWidth;
  if (bins * kElementsPerBin<T> <= n && bins < sums.most_bins) return Method::grid;
  return n <= kFewPairs ? Method::pairs : Method::scan;
}

// One way to sum. Apart, so that what the caller holds does not take registers from the loops.
template <class Sums, class T, class G, class F>
PCOH_APART void run_sums(G& g, const Summation<T>& how, const RowView<T>& row, const Range<T>& range,
                         const Scaling& scale, Arena arena, F& f) {
  const Positions<T> position = range.template positions<Sums>(scale);
  by_memory(g, row.values, [&](T* values) { each(g, row.n, [=](int k) { values[k] = position(values[k]); }); });
  g.sync();
  Sums sums(g, row, position.top, how.tables, arena);
  f(sums);
}

// Calls f(sums) with the kernel sums of a row, whose values become positions in their units. False: too many bins.
template <class T, class G, class F>
PCOH_DEVICE bool with_sums(G& g, const Summation<T>& how, const RowView<T>& row, const Range<T>& range,
                           const Scaling& scale, Arena arena, F f) {
  switch (choose(how, scale.range, row.n)) {
    case Method::grid:
      if (!(static_cast<T>(scale.range / kBinWidth) < T(how.most_bins))) {  // as the grid will round it
        if (g.thread() == 0) *how.status = 1;
        return false;
      }
      run_sums<Grid<T, G>>(g, how, row, range, scale, arena, f);
      break;
    case Method::scan:
      run_sums<Scan<T, G>>(g, how, row, range, scale, arena, f);
      break;
    case Method::pairs:
      run_sums<Pairs<T, G>>(g, how, row, range, scale, arena, f);
      break;
    case Method::automatic:
      PCOH_TRAP();  // choose() has chosen
  }
  return true;
}

// ---------------------------------------------------------------- soft ranks on their own

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
  PCOH_DEVICE Range<T> range() const { return low <= high ? Range<T>{low, high} : Range<T>{0, 0}; }
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
  T* result = arena.take<T>(n, task.sums.reserve);
  T* values = arena.take<T>(n, task.sums.reserve);
  T* weights = arena.take<T>(n, task.sums.reserve);
  T* out = task.out + r * n;
  Span<T> span = Span<T>::none();
  each(g, n, [&](int k) { span.add(given[k], weight(k)); });
  span = reduce(g, span, MergeSpans{});
  if (span.nans > 0) return fill(g, out, std::numeric_limits<T>::quiet_NaN(), n);
  // Infinite values rank at the ends and have no slope: they leave the row, weight 0 and any place.
  const Range<T> range = span.range();
  each(g, n, [=](int k) {
    const bool finite = std::isfinite(given[k]);
    values[k] = finite ? given[k] : range.low;
    weights[k] = finite ? weight(k) : T(0);
    if (task.upstream != nullptr) result[k] = finite ? task.upstream[r * n + k] : T(0);
  });
  g.sync();
  // No bound on the range, which scaling() has: values that mask others may be as low as T goes.
  const double per_value = 1 / task.temperature;
  const Scaling scale{per_value, (double(range.high) - double(range.low)) * per_value};
  const RowView<T> row{values, weights, n, -1};
  const bool done = with_sums(g, task.sums, row, range, scale, arena, [&](auto& sums) {
    if (task.upstream == nullptr)
      sums.ranks(result);
    else
      sums.pullback(result, result);
  });
  if (!done) return fill(g, out, std::numeric_limits<T>::quiet_NaN(), n);
  g.sync();
  const T factor = static_cast<T>(per_value);
  const bool pulled = task.upstream != nullptr;
  each(g, n, [=](int k) {
    out[k] = pulled ? result[k] * factor : static_cast<T>(span.ends.rank(given[k], result[k])) + T(0.5);
  });
}

}  // namespace pcoherence::cuda
