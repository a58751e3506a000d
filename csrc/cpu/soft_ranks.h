// Statistics of a row, and its kernel sums by one of the methods; soft ranks on their own.
#pragma once

#include "grid.h"
#include "hard_ranks.h"
#include "pairs.h"
#include "scan.h"
#include "simd.h"
#include "sums.h"

namespace pcoherence::PCOH_ISA {
namespace {

template <class T>
void fill_row(T* row, T value, std::int64_t n) {
  for (std::int64_t k = 0; k < n; ++k) row[k] = value;
}

// ---------------------------------------------------------------- row statistics

template <class T>
Weighed weigh(const T* weights, int n) {
  ivec_t<T> count{};
  Sum total;
  for (int k = 0; k < n; k += lanes_v<T>) {
    const auto w = load(weights + k);
    count -= w > vec_t<T>{};
    total.add(w);
  }
  Weighed result{total.total()};
  for (int i = 0; i < lanes_v<T>; ++i) result.count += static_cast<int>(count[i]);
  return result;
}

template <class T>
struct Stats {
  double weight = 0, mean = 0;
  T low = 0, high = 0;  // over weights > 0
  int count = 0;        // of weights > 0
  bool finite = false;
};

template <class T>
Stats<T> stats(const T* values, const T* weights, int n, const Weighed& weighed) {
  using V = vec_t<T>;
  constexpr T inf = std::numeric_limits<T>::infinity();
  V low = splat<T>(inf), high = splat<T>(-inf);
  Sum product;
  for (int k = 0; k < n; k += lanes_v<T>) {
    const V v = load(values + k), w = load(weights + k);
    const auto used = w > V{};
    low = vmin(select(used, v, splat<T>(inf)), low);
    high = vmax(select(used, v, splat<T>(-inf)), high);
    product.add(w * v);
  }
  Stats<T> s;
  s.weight = weighed.total;
  s.count = weighed.count;
  s.low = min_lane(low);
  s.high = max_lane(high);
  const double total = product.total();
  s.mean = s.weight > 0 ? total / s.weight : 0;
  s.finite = std::isfinite(total) && std::isfinite(double(s.high) - double(s.low));
  return s;
}

// ---------------------------------------------------------------- soft ranks

// Where "auto" leaves the grid: a bin costs as much as this many elements' share of the scan; and up to this many
// elements all pairs cost less than the scan's sort (measured from n = 16 to 4,096, see docs/speed.rst).
template <class T>
constexpr int kElementsPerBin = sizeof(T) == 4 ? 8 : 32;
constexpr int kFewPairs = 96;

template <class T>
Method choose(Method method, double range, int n) {
  if (method != Method::automatic) return method;
  if (range / kBinWidth * kElementsPerBin<T> <= n) return Method::grid;
  return n <= kFewPairs ? Method::pairs : Method::scan;
}

// Calls f(sums) with the kernel sums of one row.
template <class T, class F>
Status with_sums(Method method, const SumsRow<T>& row, Workspace& ws, F&& f) {
  const auto run = [&](auto sums) {
    sums.load(row);
    f(sums);
  };
  switch (choose<T>(method, row.scale.range, row.n)) {
    case Method::grid:
      if (!(row.scale.range / kBinWidth < kMaxBins)) return Status::too_many_bins;
      run(Grid<T>(ws));
      break;
    case Method::scan:
      run(Scan<T>(ws));
      break;
    case Method::pairs:
      run(Pairs<T>(ws));
      break;
    case Method::automatic:
      std::abort();  // choose() has chosen
  }
  return Status::ok;
}

template <class T>
double hard_ranks_of_row(const T* values, const CandidateWeights<T>& c, T* out, Workspace& ws) {
  const int n = static_cast<int>(padded(c.n));
  const Stats<T> s = stats(values, c.weights, n, c.weighed);
  return hard_ranks<true>(values, Candidates<T>{n, c.weights, s.weight, s.count, c.uniform}, s.low, s.high, out, ws);
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
  T* values = ws.ranks.need<T>(n);
  T* weights = ws.weights.need<T>(n);
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
  return with_sums(a.method, SumsRow<T>{values, weights, n, range.low, scale}, ws, [&](auto& sums) {
    T* result = ws.pulled.need<T>(n);
    if (a.upstream == nullptr) {
      sums.ranks(result);
      for (std::int64_t k = 0; k < a.n; ++k)
        a.out[k] = (range.infinite ? static_cast<T>(ends.rank(a.values[k], result[k])) : result[k]) + T(0.5);
    } else {
      T* upstream = ws.residuals.need<T>(n);
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
