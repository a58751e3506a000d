// One row of distances: its statistics, and its kernel sums by one of the methods. Written once, over who does the work
// and where.
//
// A group G is the vectors of one core (cpu/core.h) or the threads of a thread block (cuda/group.h). It has
//   all(x)                         x for every element that is treated at a time: a vector, or x
//   get(p, k)  put(p, k, v)        these elements of an array
//   sync()                         memory written before is seen after
//   add(p, v)                      *p += v, at once
//   Sum                            add(v), add_product(v, w): sums in float64, where no product of floats overflows
// and beside it
//   each(g, n, f)                  f(k) for every k < n at which such elements begin
//   each_candidate(g, row, f)      f(k, w), w the weights
//   each_value(g, row, from, f)    f(k, v, w), v the values `from` [n], which go to row.values if those lie elsewhere
//   each_element(g, n, f)          f(k) for every single element
//   each_indexed(g, n, index, f)   f(k, index(k)) for every single element; int index(k) looks at no other
//   sum_each(g, n, f)              sum of f(k) over single elements, in float64
//   running_sums(g, n, load, store)  store(k, sum of load(j) over j < k), in float64
//   by_memory(g, p, f)             f(p), compiled for the memory that p points to
//   total(g, sum)  total(g, a, b, c)  extremes(g, low, high, sum)  of all elements
//   weigh(g, row)                  the weights' statistics
//   count_near(g, row, weighed, table, plain, weights, out, ties, work)
//                                  of equal weights, whose hard ranks are plain [n], which may be `out`: weights in a
//                                  neighbourhood into weights [n], ranks under them into out [n], by counting who is at
//                                  each place of a NearTable. Returns what the weights are. ties: sum_jk w_j w_k of
//                                  those that tie, under the row's weights (where the workplace wants_ties), then under
//                                  the new ones
//   hard_ranks(g, row, stats, want_ties, out, work)
//                                  F_j into out [n]; returns sum_jk w_j w_k [v_j = v_k], or without want_ties anything
//
// A Row has values, weights, n, and once the sums are there: place(k), get()'s positions in row.unit() temperatures.
//
// Sums of a row, s = its positions in temperatures, W = the sum of its weights, have
//   ranks(out)                     R_j = sum_k w_k sigmoid(s_j - s_k)
//   pullback(r, out)               r_l sum_k w_k slope(s_l - s_k) - w_l sum_j r_j slope(s_l - s_j)
//   cross_total(F, W)              the cross entropy of comparisons that add up to the ranks F [n], double:
//                                    sum_jk w_j w_k softplus(s_j - s_k) - W sum_j w_j s_j (2 F_j - 1).
//                                  With H_j = sum_k w_k step(s_j - s_k) that is
//                                    sum_jk w_j w_k log(1 + exp(-|s_j - s_k|)) + 2 sum_j w_j s_j (H_j - W F_j):
//                                  ranks are subtracted as ranks, and no logarithm is more than log 2.
//
// A Workplace has memory for the stages of a row, and the methods (method, most_laid, Grid, Scan, Pairs):
//   take<V>(n, others)             memory [n], of T unless said otherwise; fast where that many others, which need
//                                  it more, would be fast, too. A copy of a workplace takes the same memory again.
//   values(given, n)               where stats() puts the row's values; ranked_values(given, n): of those that hard
//                                  ranks order
//   pullback(sums, residuals, n)   of the sums, in place or not
//   near_table(count, divisor)     see NearTable in near.h
//   wants_ties                     whether count_near() has to know how many tie
//   bins(g, row, low, high, scale)  that a grid of the row costs, whose range is less than most_laid of them; run()
//                                  of the same row may use what was found on the way
//   run<Sums>(g, row, low, high, scale, f)   f(sums) by one of the methods
#pragma once

#include <cmath>
#include <limits>

#include "anchor_row.h"
#include "options.h"
#include "soft_ranks.h"

namespace pcoherence {

// What extremes() and total() return.
template <class T>
struct Extremes {
  double sum;
  T low, high;
};
struct Triple {
  double a, b, c;
};

// ---------------------------------------------------------------- statistics

template <class T>
struct Stats : Weighed {
  double mean;  // sum_k w_k v_k / W
  T low, high;  // over weights > 0
  bool finite;
};

// Of the row's candidates with values `from` [n].
template <class T, class G, class Row>
PCOH_APART Stats<T> stats(G& g, const Row& row, const T* from, const Weighed& weighed) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  const auto above = G::all(inf), below = G::all(-inf), zero = G::all(T(0));
  auto low = above, high = below;
  typename G::Sum product;
  each_value(g, row, from, [&](int, auto v, auto w) {
    const auto least = w > zero ? v : above, most = w > zero ? v : below;
    low = least < low ? least : low;  // a comparison with NaN is false: `product` shows it
    high = most > high ? most : high;
    product.add_product(w, v);  // 0 * NaN shows, as it does in the reference
  });
  const Extremes<T> found = extremes(g, low, high, product);
  return {weighed, weighed.total > 0 ? found.sum / weighed.total : 0, found.low, found.high,
          std::isfinite(found.sum) && (weighed.count == 0 || std::isfinite(double(found.high) - double(found.low)))};
}

// ---------------------------------------------------------------- kernel sums

// As the grid of a GPU rounds it.
template <class T, class Workplace>
PCOH_DEVICE bool fits_grid(const Workplace& work, const Scaling& scale) {
  return static_cast<T>(scale.range / kBinWidth) < T(work.most_laid);
}

template <class T, class G, class Row, class Workplace>
PCOH_DEVICE Method choose(G& g, Workplace& work, const Row& row, T low, T high, const Scaling& scale) {
  if (work.method != Method::automatic) return work.method;
  if (fits_grid<T>(work, scale) && work.bins(g, row, low, high, scale) * Workplace::elements_per_bin <= row.n)
    return Method::grid;
  return row.n <= Workplace::few_pairs ? Method::pairs : Method::scan;
}

// Calls f(sums) with the kernel sums of a row, whose positions are there then. low, high: of the values that count.
template <class T, class G, class Row, class Workplace, class F>
PCOH_DEVICE Status with_sums(G& g, Row& row, T low, T high, const Scaling& scale, Workplace& work, F f) {
  switch (choose(g, work, row, low, high, scale)) {
    case Method::grid:
      if (!fits_grid<T>(work, scale)) return Status::too_many_bins;
      work.template run<typename Workplace::Grid>(g, row, low, high, scale, f);
      break;
    case Method::scan:
      work.template run<typename Workplace::Scan>(g, row, low, high, scale, f);
      break;
    case Method::pairs:
      work.template run<typename Workplace::Pairs>(g, row, low, high, scale, f);
      break;
    case Method::automatic:
      PCOH_TRAP();  // choose() has chosen
  }
  return Status::ok;
}

}  // namespace pcoherence
