// Distances of a block of anchors: by finishing matrix products, or by differences of points; and the gradients of
// pairs w.r.t. points. A warp or a thread block at a time; nothing is kept in shared memory.
// Near pairs are few, or, of data in clusters, many: what they cost is loads that wait, so that a warp has several in
// flight, and then the 64-bit conversions of their differences.
#pragma once

#include <type_traits>

#include "../distances.h"
#include "group.h"

namespace pcoherence::cuda {

// Pairs are marked by bits: bit k % 32 of word k / 32 of an anchor's row.
PCOH_DEVICE constexpr std::int64_t words_of(std::int64_t n) { return (n + kWarp - 1) / kWarp; }

template <class T>
struct ProductTask {
  std::int64_t rows;
  int n, width;
  const T* products;  // [rows, n]: a_i . c_k of prepared points; with `upper` those of i <= k, and nothing else is read
  T* out;             // [rows, n]: distances; may not be `products`
  unsigned* near;     // [rows, words_of(n)]: pairs whose gradient leaves the products
  const double *anchor_norms, *candidate_norms;  // [rows], [n]: squared lengths of prepared points
  const T *anchors, *candidates;  // [rows, width], [n, width]: points whose differences are exact, same units
  const std::int64_t* first;      // [n]: the first candidate that is identical
  std::int64_t begin;             // of the block's anchors
  bool same;                      // candidate begin + i is anchor i
  bool upper;                     // all anchors at a time: a pair is treated once, for two places of `out`
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

// Pairs that a warp goes through together: their loads wait at the same time.
inline constexpr int kTogether = 4;

// Collects items one by one, all lanes the same, and hands out kTogether of them: f(items, how many); what is missing
// is the first one again.
class Together {
 public:
  template <class F>
  PCOH_DEVICE void push(int item, F f) {
    unrolled<kTogether>([&](auto i) { items_[i] = i == count_ ? item : items_[i]; });
    if (++count_ == kTogether) flush(f);
  }
  template <class F>
  PCOH_DEVICE void flush(F f) {
    if (count_ == 0) return;
    unrolled<kTogether>([&](auto i) { items_[i] = i < count_ ? items_[i] : items_[0]; });
    f(items_, count_);
    count_ = 0;
  }

 private:
  int items_[kTogether] = {}, count_ = 0;
};

// Loads of 16 bytes, where rows of `width` elements allow it: f(constant), the elements of a load.
template <class T, class F>
PCOH_DEVICE void by_width(const T* a, const T* b, int width, F f) {
  constexpr int most = 16 / sizeof(T);
  const auto aligned = [](const T* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  if (width % most == 0 && aligned(a) && aligned(b))
    f(std::integral_constant<int, most>{});
  else
    f(std::integral_constant<int, 1>{});
}

// |a_i - c_i|^2 for i = 0, ..., kTogether - 1 by one warp: for lane l that of i = l % kTogether. From differences in T,
// each of which errs by half a unit of its own last place, summed in float64, in the same order for every i.
template <int count, class T, class G>
PCOH_DEVICE double squared_differences(G& g, const T* const (&a)[kTogether], const T* const (&c)[kTogether],
                                       int width) {
  double sum[kTogether] = {};
  PCOH_ROLLED
  for (std::int64_t f = count * g.lane(); f < width; f += count * kWarp)
    unrolled<kTogether>([&](auto i) {
      const Pack<T, count> x = load<count>(a[i] + f), y = load<count>(c[i] + f);
      unrolled<count>([&](auto j) {
        const double difference = double(x.value[j] - y.value[j]);
        sum[i] += difference * difference;
      });
    });
  total_by_lane(g, sum);
  return sum[0];
}

// ---------------------------------------------------------------- distances

// Products that a lane waits for together: 32 bytes of a mirrored row, the least that memory is written by.
template <class T>
inline constexpr int kRowsTogether = 32 / sizeof(T);
// Tiles of a group, side by side: each is a warp's. Three groups fit into a multiprocessor's registers, and the points
// of their rows into its cache: 96 of 2 KiB.
inline constexpr int kTilesOfGroup = 8;

// 32 rows by 32 columns of a ProductTask by one warp, where near pairs of a column are bits of its lane, and their
// marks words of a row. What a column needs, 16 bytes, is read once for all rows.
template <class T, class G>
class ProductTile {
 public:
  PCOH_DEVICE ProductTile(G& g, const ProductTask<T>& task, std::int64_t top, std::int64_t left)
      : g_(g),
        task_(task),
        top_(top),
        left_(left),
        rows_(task.rows - top < kWarp ? static_cast<int>(task.rows - top) : kWarp),
        mirrored_(task.upper && top != left) {
    inside_ = left_ + g.lane() < task.n;
    // A duplicate takes the product of the first of its kind: they tie, although products may round differently.
    from_ = inside_ ? static_cast<int>(task.first[left_ + g.lane()]) : 0;
    norm_ = inside_ ? task.candidate_norms[from_] : 0;
  }

  PCOH_DEVICE void finish() {
    for (int i = 0; i < rows_; i += kRowsTogether<T>) finish_rows(i);
    g_.sync_warp();  // the distances of near pairs are in the way of better ones
    by_width(task_.anchors, task_.candidates, task_.width, [this](auto count) { measure_near<count>(); });
    mark();
  }

 private:
  PCOH_DEVICE T distance(T square) const { return task_.root ? std::sqrt(square) : square * task_.factor; }
  // Of roots the gradient at 0 is 0.
  PCOH_DEVICE bool leaves(T square, T norms) const {
    return (square > 0 || !task_.root) && square < norms * Nearness<T>::gradient;
  }
  // Of anchor `row`; the same of a pair in either order, where products are.
  PCOH_DEVICE T product(std::int64_t row, int twin) const {
    const bool turned = task_.upper && twin > from_;
    const std::int64_t line = turned ? from_ : task_.upper ? twin : row;
    return task_.products[line * task_.n + (turned ? twin : from_)];
  }

  PCOH_DEVICE void finish_rows(int begin) {
    const int last = rows_ - 1;
    const std::int64_t k = left_ + g_.lane();
    T products[kRowsTogether<T>];
    unsigned twins = 0;  // anchors that are identical to the candidate
    unrolled<kRowsTogether<T>>([&](auto i) {
      const std::int64_t row = top_ + (begin + i < last ? begin + i : last);
      const int first = task_.same ? static_cast<int>(task_.first[task_.begin + row]) : -1;
      twins |= unsigned(first == from_) << i;
      products[i] = inside_ ? product(row, first) : T(0);
    });
    Pack<T, kRowsTogether<T>> mirror;
    unrolled<kRowsTogether<T>>([&](auto i) {
      const std::int64_t row = top_ + begin + i;
      if (!inside_ || begin + i > last) return;
      const double sum = task_.anchor_norms[row] + norm_;
      const T norms = static_cast<T>(sum);
      const bool twin = twins >> i & 1;
      const T raw = static_cast<T>(sum - 2.0 * double(products[i]));
      const T square = twin || raw < 0 ? T(0) : raw;  // keeps NaN
      const bool near = !twin && square < norms * Nearness<T>::distance;
      const bool other = twin && k != task_.begin + row;  // identical, but not itself
      near_ |= unsigned(near) << (begin + i);
      leaving_ |= unsigned(other && leaves(square, norms)) << (begin + i);
      mirror.value[i] = distance(square);
      task_.out[row * task_.n + k] = mirror.value[i];
    });
    if (mirrored_ && inside_) store_mirrored(begin, mirror);
  }

  // Above the diagonal no row is missing.
  PCOH_DEVICE void store_mirrored(int begin, const Pack<T, kRowsTogether<T>>& values) {
    T* out = task_.out + (left_ + g_.lane()) * task_.n + top_ + begin;
    by_width(out, out, task_.n, [&](auto count) {
      unrolled<kRowsTogether<T> / count>([&](auto i) {
        Pack<T, count> part;
        unrolled<count>([&](auto j) { part.value[j] = values.value[count * i + j]; });
        *reinterpret_cast<Pack<T, count>*>(out + count * i) = part;
      });
    });
  }

  // The near pairs column by column, so that those of a column find its point in the cache.
  template <int count>
  PCOH_DEVICE void measure_near() {
    const auto measured = [this](const int (&pairs)[kTogether], int taken) { measure<count>(pairs, taken); };
    Together together;
    for (unsigned columns = g_.ballot(near_ != 0); columns != 0; columns &= columns - 1) {
      const int column = lowest_bit(columns);
      for (unsigned rows = g_.shuffle(near_, column); rows != 0; rows &= rows - 1)
        together.push(column * kWarp + lowest_bit(rows), measured);
    }
    together.flush(measured);
  }

  template <int count>
  PCOH_DEVICE void measure(const int (&pairs)[kTogether], int taken) {
    const T *a[kTogether], *c[kTogether];
    int own = pairs[0];  // the pair that this lane finishes
    unrolled<kTogether>([&](auto i) {
      a[i] = task_.anchors + (top_ + pairs[i] % kWarp) * task_.width;
      c[i] = task_.candidates + std::int64_t(g_.shuffle(from_, pairs[i] / kWarp)) * task_.width;
      if (g_.lane() == i) own = pairs[i];
    });
    const T square = static_cast<T>(squared_differences<count>(g_, a, c, task_.width));
    const std::int64_t row = top_ + own % kWarp, k = left_ + own / kWarp;
    const T norms = static_cast<T>(task_.anchor_norms[row] + g_.shuffle(norm_, own / kWarp));
    const bool finishes = g_.lane() < taken;
    if (finishes) {
      task_.out[row * task_.n + k] = distance(square);
      if (mirrored_) task_.out[k * task_.n + row] = distance(square);
    }
    const unsigned leaving = g_.ballot(finishes && leaves(square, norms));
    unrolled<kTogether>([&](auto i) {
      if (g_.lane() == pairs[i] / kWarp) leaving_ |= (leaving >> i & 1) << pairs[i] % kWarp;
    });
  }

  // A lane has a column's marks, which are a word of its mirror image, and takes a row's.
  PCOH_DEVICE void mark() {
    const std::int64_t words = words_of(task_.n);
    unsigned word = 0;
    if (g_.ballot(leaving_ != 0) != 0)
      for (int i = 0; i < rows_; ++i) {
        const unsigned found = g_.ballot(leaving_ >> i & 1);
        if (g_.lane() == i) word = found;
      }
    if (g_.lane() < rows_) task_.near[(top_ + g_.lane()) * words + left_ / kWarp] = word;
    if (mirrored_ && inside_) task_.near[(left_ + g_.lane()) * words + top_ / kWarp] = leaving_;
  }

  G& g_;
  const ProductTask<T>& task_;
  const std::int64_t top_, left_;
  const int rows_;
  const bool mirrored_;              // this tile is also that of its columns as rows
  bool inside_;                      // this lane has a column
  int from_;                         // whose points and product it takes
  double norm_;                      // squared length of those points
  unsigned near_ = 0, leaving_ = 0;  // its rows: to be measured by differences; whose gradient leaves the products
};

// Tiles x * kTilesOfGroup, ... of row y of tiles.
template <class T, class G>
PCOH_DEVICE void finish_products(G& g, const ProductTask<T>& task, std::int64_t x, std::int64_t y) {
  const std::int64_t top = y * kWarp, left = (x * kTilesOfGroup + g.warp()) * kWarp;
  if (left >= task.n || (task.upper && left < top)) return;
  ProductTile<T, G>(g, task, top, left).finish();
}

// ---------------------------------------------------------------- gradients

// f(j) for the columns j of marked pairs of a row, in order, by each warp alike. A lane loads a word: nearly all are 0,
// and one after another they would be waited for.
template <class G, class F>
PCOH_DEVICE void each_marked(G& g, const unsigned* row, std::int64_t words, F f) {
  for (std::int64_t base = 0; base < words; base += kWarp) {
    const unsigned own = base + g.lane() < words ? row[base + g.lane()] : 0;
    for (unsigned lanes = g.ballot(own != 0); lanes != 0; lanes &= lanes - 1) {
      const int lane = lowest_bit(lanes);
      for (unsigned todo = g.shuffle(own, lane); todo != 0; todo &= todo - 1)
        f(static_cast<int>((base + lane) * kWarp) + lowest_bit(todo));
    }
  }
}

// The same for the rows j in which a column, a bit of a word, is marked. marks: the first row's word.
template <class G, class F>
PCOH_DEVICE void each_marking(G& g, const unsigned* marks, std::int64_t words, int rows, int bit, F f) {
  for (int base = 0; base < rows; base += kWarp) {
    const int j = base + g.lane();
    const bool marked = j < rows && (marks[j * words] >> bit & 1);
    for (unsigned todo = g.ballot(marked); todo != 0; todo &= todo - 1) f(base + lowest_bit(todo));
  }
}

// out_r += sum of v_rj (points_r - others_j) over the pairs (r, j) of each_pair(f); every thread has features of its
// own. The sum is in float64, of differences in T.
template <class T, class G, class Each>
PCOH_DEVICE void pull_point(G& g, const PullTask<T>& task, std::int64_t r, Each each_pair) {
  const T* point = task.points + r * task.width;
  for (int first = 0; first < task.width; first += g.threads()) {
    const int f = first + g.thread() < task.width ? first + g.thread() : task.width - 1;
    const T own = point[f];
    double sum = 0;
    const auto pull = [&](const int (&others)[kTogether], int taken) {
      T v[kTogether], difference[kTogether];
      unrolled<kTogether>([&](auto i) {
        v[i] = task.v[r * task.row_stride + others[i] * task.column_stride];
        difference[i] = own - task.others[std::int64_t(others[i]) * task.width + f];
      });
      unrolled<kTogether>([&](auto i) { sum += i < taken ? double(v[i]) * double(difference[i]) : 0; });
    };
    Together together;
    each_pair([&](int j) { together.push(j, pull); });
    together.flush(pull);
    if (first + g.thread() < task.width) task.out[r * task.width + f] += static_cast<T>(sum);
  }
}

// Row r of a PullTask for marked pairs, in the order of their columns.
template <class T, class G>
PCOH_DEVICE void pull_near(G& g, const PullTask<T>& task, std::int64_t r) {
  const std::int64_t words = words_of(task.n);
  const unsigned* row = task.near + r * words;
  pull_point(g, task, r, [&](auto f) { each_marked(g, row, words, f); });
}

// The same for the 32 points of one word, which the marks are columns of: those that no row marks take one look at it.
template <class T, class G>
PCOH_DEVICE void pull_near_columns(G& g, const PullTask<T>& task, std::int64_t word) {
  const std::int64_t words = words_of(task.rows);
  const unsigned* marks = task.near + word;
  unsigned marked = 0;
  for (std::int64_t j = g.lane(); j < task.n; j += kWarp) marked |= marks[j * words];
  PCOH_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) marked |= g.shuffle_xor(marked, mask);
  for (; marked != 0; marked &= marked - 1) {
    const int bit = lowest_bit(marked);
    pull_point(g, task, word * kWarp + bit, [&](auto f) { each_marking(g, marks, words, task.n, bit, f); });
  }
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
