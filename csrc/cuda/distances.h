// Distances of a block of anchors: by finishing matrix products, or by differences of points; and the gradients of
// pairs w.r.t. points. A warp or a thread block at a time; nothing is kept in shared memory.
#pragma once

#include "../distances.h"
#include "group.h"

namespace pcoherence::cuda {

// Pairs are marked by bits: bit k % 32 of word k / 32 of an anchor's row.
PCOH_DEVICE constexpr std::int64_t words_of(std::int64_t n) { return (n + kWarp - 1) / kWarp; }

template <class T>
struct ProductTask {
  std::int64_t rows;
  int n, width;
  const T* products;  // [rows, n]: a_i . c_k of prepared points
  T* out;             // [rows, n]: distances; may not be `products`
  unsigned* near;     // [rows, words_of(n)]: pairs whose gradient leaves the products; or null
  const double *anchor_norms, *candidate_norms;  // [rows], [n]: squared lengths of prepared points
  const T *anchors, *candidates;  // [rows, width], [n, width]: points whose differences are exact, same units
  const std::int64_t* first;      // [n]: the first candidate that is identical
  std::int64_t begin;             // of the block's anchors
  bool same;                      // candidate begin + i is anchor i
  bool root;                      // distances; otherwise squares times `factor`
  T factor;
};

// out_i += sum_j v_ij (points_i - others_j) over the pairs of `near`.
template <class T>
struct PullTask {
  std::int64_t rows;
  int n, width;
  const T *points, *others;  // [rows, width], [n, width]
  const T* v;                // element (i, j) at i * row_stride + j * column_stride
  std::int64_t row_stride, column_stride;
  const unsigned* near;  // [rows, words_of(n)], or with `transposed` [n, words_of(rows)]
  bool transposed;       // points are columns of what `near` was made for
  T* out;                // [rows, width]
};

template <class T>
struct RowSumsTask {
  std::int64_t rows;
  int n;
  const T* matrix;  // [rows, n]
  double* sums;     // [rows]
};

template <class T>
struct ClearTask {
  std::int64_t rows;
  int n;
  const unsigned* near;  // [rows, words_of(n)]
  T* v;                  // [rows, n]
};

// Position of the lowest bit that is set.
PCOH_DEVICE int lowest_bit(unsigned bits) {
#if defined(__CUDACC__)
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

template <class G>
PCOH_DEVICE double total_of_warp(G& g, double sum) {
  PCOH_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += g.shuffle_xor(sum, mask);
  return sum;
}

// sum_f term(f) in float64 by one warp; every lane gets it.
template <class G, class F>
PCOH_DEVICE double sum_over_features(G& g, int width, F term) {
  double sum = 0;
  for (std::int64_t f = g.lane(); f < width; f += kWarp) sum += term(f);
  return total_of_warp(g, sum);
}

template <class T, class G>
PCOH_DEVICE double squared_length(G& g, const T* x, int width) {
  return sum_over_features(g, width, [=](std::int64_t f) { return double(x[f]) * double(x[f]); });
}

// What turns a point into its direction. A zero vector has none, stays zero, and gets no gradient.
struct Length {
  double length, inverse;  // 1 / |x| as the gradient sees it

  PCOH_DEVICE explicit Length(double square) : length(std::sqrt(square)), inverse(square == 0 ? 0 : 1 / length) {
    if (inverse == 0) length = 1;  // quotient() makes 0 of what is finite
  }
};

// x / length, correctly rounded from the rounded 1 / length (Markstein 1990), in a third of a division's time. Equal
// directions of different lengths tie as they do in the reference.
PCOH_DEVICE double quotient(double x, double length, double inverse) {
  const double q = x * inverse;
  return std::fma(std::fma(-q, length, x), inverse, q);
}
PCOH_DEVICE double quotient(double x, const Length& by) { return quotient(x, by.length, by.inverse); }

// |a - c|^2 from differences in T, each of which errs by half a unit of its own last place, summed in float64.
template <class T, class G>
PCOH_DEVICE double squared_difference(G& g, const T* a, const T* c, int width) {
  return sum_over_features(g, width, [=](std::int64_t f) {
    const double difference = double(a[f] - c[f]);
    return difference * difference;
  });
}

// Anchors that a group treats together: what a column needs, 16 bytes, is read once for all of them.
inline constexpr int kProductRows = 4;
// Columns of a group, so that a short block of long rows also makes groups enough to fill a GPU.
inline constexpr int kProductColumns = 2048;

// The pairs of anchor r and a warp's columns from `base` on; `from`, `norm`: of the candidate that lane's column takes.
template <class T, class G>
PCOH_DEVICE void finish_product(G& g, const ProductTask<T>& task, std::int64_t r, std::int64_t base, std::int64_t from,
                                double norm, T product) {
  const std::int64_t k = base + g.lane();
  T value = 0, norms = 0;
  bool near = false, leaves = false;
  if (k < task.n) norms = static_cast<T>(task.anchor_norms[r] + norm);
  if (k < task.n && task.same && from == task.first[task.begin + r]) {
    leaves = k != task.begin + r;  // identical, but not itself
  } else if (k < task.n) {
    const double sum = task.anchor_norms[r] + norm;
    const T raw = static_cast<T>(sum - 2.0 * double(product));
    value = raw < 0 ? T(0) : raw;  // keeps NaN
    near = value < norms * Nearness<T>::distance;
  }
  for (unsigned todo = g.ballot(near); todo != 0; todo &= todo - 1) {
    const int lane = lowest_bit(todo);
    const T* candidate = task.candidates + g.shuffle(from, lane) * task.width;
    const double square = squared_difference(g, task.anchors + r * task.width, candidate, task.width);
    if (g.lane() == lane) value = static_cast<T>(square);
  }
  // Of roots the gradient at 0 is 0.
  leaves = (near || leaves) && (value > 0 || !task.root) && value < norms * Nearness<T>::gradient;
  const unsigned leaving = g.ballot(leaves);
  if (task.near != nullptr && g.lane() == 0) task.near[r * words_of(task.n) + base / kWarp] = leaving;
  if (k < task.n) task.out[r * task.n + k] = task.root ? std::sqrt(value) : value * task.factor;
}

// kProductRows rows from r and kProductColumns columns of a ProductTask: 12 bytes and 20 operations an element where
// few pairs are near.
template <class T, class G>
PCOH_DEVICE void finish_products(G& g, const ProductTask<T>& task, std::int64_t r, std::int64_t first_column) {
  const int count = task.rows - r < kProductRows ? static_cast<int>(task.rows - r) : kProductRows;
  const std::int64_t end = task.n - first_column < kProductColumns ? task.n : first_column + kProductColumns;
  for (std::int64_t base = first_column + g.warp() * kWarp; base < end; base += g.threads()) {
    const std::int64_t k = base + g.lane();
    // A duplicate takes the product of the first of its kind: they tie, although products may round differently.
    const std::int64_t from = k < task.n ? task.first[k] : -1;
    const double norm = k < task.n ? task.candidate_norms[from] : 0;
    T products[kProductRows];
    unrolled<kProductRows>(
        [&](auto i) { products[i] = i < count && k < task.n ? task.products[(r + i) * task.n + from] : T(0); });
    unrolled<kProductRows>([&](auto i) {
      if (i < count) finish_product(g, task, r + i, base, from, norm, products[i]);
    });
  }
}

// f(i, bit) for every bit that is set in load(0), ..., load(count - 1), in order, by each warp alike. A lane loads a
// word: nearly all are 0, and one after another they would be waited for.
template <class G, class Load, class F>
PCOH_DEVICE void each_bit(G& g, std::int64_t count, Load load, F f) {
  for (std::int64_t base = 0; base < count; base += kWarp) {
    const unsigned own = base + g.lane() < count ? load(base + g.lane()) : 0;
    for (unsigned lanes = g.ballot(own != 0); lanes != 0; lanes &= lanes - 1) {
      const int lane = lowest_bit(lanes);
      for (unsigned todo = g.shuffle(own, lane); todo != 0; todo &= todo - 1) f(base + lane, lowest_bit(todo));
    }
  }
}

// out_r += v_rj (points_r - others_j); every thread has features of its own.
template <class T, class G>
PCOH_DEVICE void pull_pair(G& g, const PullTask<T>& task, std::int64_t r, std::int64_t j) {
  const double v = double(task.v[r * task.row_stride + j * task.column_stride]);
  for (int f = g.thread(); f < task.width; f += g.threads())
    task.out[r * task.width + f] +=
        static_cast<T>(v * (double(task.points[r * task.width + f]) - double(task.others[j * task.width + f])));
}

// Row r of a PullTask for marked pairs, in the order of their columns.
template <class T, class G>
PCOH_DEVICE void pull_near(G& g, const PullTask<T>& task, std::int64_t r) {
  const std::int64_t words = words_of(task.n);
  each_bit(
      g, words, [&](std::int64_t w) { return task.near[r * words + w]; },
      [&](std::int64_t w, int bit) { pull_pair(g, task, r, w * kWarp + bit); });
}

// The same for the 32 points of one word, which the marks are columns of: one group goes through all others.
template <class T, class G>
PCOH_DEVICE void pull_near_columns(G& g, const PullTask<T>& task, std::int64_t word) {
  const std::int64_t words = words_of(task.rows);
  each_bit(
      g, task.n, [&](std::int64_t j) { return task.near[j * words + word]; },
      [&](std::int64_t j, int bit) { pull_pair(g, task, word * kWarp + bit, j); });
}

template <class T, class G>
PCOH_DEVICE void clear_near(G& g, const ClearTask<T>& task, std::int64_t r) {
  const std::int64_t words = words_of(task.n);
  for (std::int64_t w = g.thread(); w < words; w += g.threads())
    for (unsigned todo = task.near[r * words + w]; todo != 0; todo &= todo - 1)
      task.v[r * task.n + w * kWarp + lowest_bit(todo)] = 0;
}

template <class T, class G>
PCOH_DEVICE void row_sums(G& g, const RowSumsTask<T>& task, std::int64_t r) {
  double sum = 0;
  each(g, task.n, [&](int k) { sum += double(task.matrix[r * task.n + k]); });
  sum = total(g, sum);
  if (g.thread() == 0) task.sums[r] = sum;
}

}  // namespace pcoherence::cuda
