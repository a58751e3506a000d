// Hard mid-ranks of one row: F_j = (sum_k w_k [v_k < v_j] + sum_k w_k [v_k = v_j] / 2) / W.
#pragma once

#include "sort.h"

namespace pcoherence::PCOH_ISA {

// The row's candidates: n is padded to the lane count with weights 0.
template <class T>
struct Candidates {
  int n;
  const T* weights;    // [n], this anchor's own candidate excluded by weight 0
  double total;        // W = sum of the weights, > 0
  int count;           // how many weights are > 0
  bool uniform;        // all weights > 0 are equal
};

// Any weights: sort, then running sums over groups of equal values.
// Returns sum_jk w_j w_k [v_j = v_k].
template <class T>
double hard_ranks_sorted(const T* values, const Candidates<T>& c, T* out, Workspace& ws) {
  const SortItem<T>* items = argsort(values, c.n, ws);
  double below = 0, ties = 0;
  for (int i = 0; i < c.n;) {
    double group = 0;
    int end = i;
    for (; end < c.n && items[end].key == items[i].key; ++end) group += double(c.weights[items[end].index]);
    const T f = static_cast<T>((below + group / 2) / c.total);
    for (; i < end; ++i) out[items[i].index] = f;
    below += group;
    ties += group * group;
  }
  return ties;
}

// Buckets more crowded than this are left to the sort: comparing within a bucket costs its size per element.
inline constexpr int kCrowded = 16;

// Exclusive running sums of counts[0..n), n a multiple of 16, in place; returns the largest count.
inline std::int32_t exclusive_sums(std::int32_t* counts, int n) {
  using I = index_t<float>;
  std::int32_t start = 0;
  I fullest{};
  const I zero{};
  for (int b = 0; b < n; b += 16) {
    const I size = load_as<I>(counts + b);
    fullest = vmax(size, fullest);
    I sum = size;  // inclusive, by doubling: add what lies 1, 2, 4, 8 lanes below
    sum += __builtin_shufflevector(zero, sum, 0, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30);
    sum += __builtin_shufflevector(zero, sum, 0, 1, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29);
    sum += __builtin_shufflevector(zero, sum, 0, 1, 2, 3, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27);
    sum += __builtin_shufflevector(zero, sum, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    store(counts + b, sum - size + start);
    start += sum[15];
  }
  return max_lane(fullest);
}

// sorted[p .. p + lanes) against its neighbours up to `window` places away, which hold every value of its bucket:
// doubled = 2 #{less} + #{equal, itself included}, given that p counts all that lie before; equal without itself.
template <bool count_equal, class T>
inline void compare_with_neighbours(const T* sorted, int window, ivec_t<T>& doubled, ivec_t<T>& equal) {
  const vec_t<T> own = load(sorted);
  for (int d = 1; d <= window; ++d) {
    const vec_t<T> before = load(sorted - d), after = load(sorted + d);
    const auto ge = before >= own, gt = before > own, lt = after < own, le = after <= own;  // 0 or -1
    doubled += (ge + gt) - (lt + le);
    if constexpr (count_equal) equal += (gt - ge) + (lt - le);
  }
}

// Equal weights: one pass into buckets of equal width, about one value each, then every value is compared with
// its neighbours in bucket order as far as the fullest bucket reaches. No branch depends on the data.
// False where a bucket is too crowded; with `want_ties`, `ties` receives sum_jk w_j w_k [v_j = v_k].
template <bool want_ties, class T>
bool hard_ranks_bucketed(const T* values, const Candidates<T>& c, T low, T high, T* out, double& ties, Workspace& ws) {
  using V = vec_t<T>;
  constexpr int lanes = lanes_v<T>;
  const int n = c.n, buckets = n;
  const T per_unit = T(buckets) / (high - low);
  if (!(per_unit <= std::numeric_limits<T>::max())) return false;

  auto* bucket = ws.bucket.need<std::int32_t>(n);
  const V zero{}, top = splat<T>(T(buckets - 1)), beyond = splat<T>(T(buckets));
  for (int k = 0; k < n; k += lanes) {
    const V b = vmin(vmax((load(values + k) - low) * per_unit, zero), top);
    store(bucket + k, __builtin_convertvector(select(load(c.weights + k) > zero, b, beyond), index_t<T>));
  }

  // The last bucket, of those without weight, stands for itself: it starts where all others end.
  auto* counts = ws.counts.need<std::int32_t>(buckets + 1);
  auto* position = ws.arrival.need<std::int32_t>(n);
  std::memset(counts, 0, sizeof(*counts) * (buckets + 1));
  for (int k = 0; k < n; ++k) position[k] = counts[bucket[k]]++;
  const std::int32_t fullest = exclusive_sums(counts, buckets);
  counts[buckets] = c.count;
  if (fullest > kCrowded) return false;

  // Sentinels on both sides stand for "nothing there": they compare as below before, as above after.
  constexpr int margin = kCrowded + lanes;
  T* sorted = ws.sorted.need<T>(n + 2 * margin) + margin;
  for (int i = 1; i <= margin; ++i) sorted[-i] = -std::numeric_limits<T>::infinity();
  for (int k = 0; k < n; ++k) sorted[position[k] += counts[bucket[k]]] = values[k];
  for (int i = c.count; i < n + margin; ++i) sorted[i] = std::numeric_limits<T>::infinity();

  T* rank = ws.sorted_ranks.need<T>(n);
  const int window = fullest - 1, whole = c.count / lanes * lanes;
  const T scale = T(0.5) / T(c.count);
  ivec_t<T> iota{}, equal{};
  for (int i = 0; i < lanes; ++i) iota[i] = 2 * i + 1;
  for (int p = 0; p < n; p += lanes) {
    ivec_t<T> doubled = iota + 2 * p, here{};
    compare_with_neighbours<want_ties>(sorted + p, window, doubled, here);
    store(rank + p, __builtin_convertvector(doubled, V) * scale);
    if (want_ties && p < whole) equal += here;
    if (want_ties && p == whole)
      for (int i = 0; i < c.count - whole; ++i) equal[i] += here[i];
  }
  if (want_ties) {
    double pairs = c.count;
    for (int i = 0; i < lanes; ++i) pairs += double(equal[i]);
    const double weight = c.total / c.count;
    ties = pairs * weight * weight;
  }
  for (int k = 0; k < n; ++k) out[k] = rank[position[k]];
  return true;
}

// Returns sum_jk w_j w_k [v_j = v_k] if want_ties, otherwise 0 or that. low, high: range of the values of weight > 0.
template <bool want_ties, class T>
double hard_ranks(const T* values, const Candidates<T>& c, T low, T high, T* out, Workspace& ws) {
  double ties = 0;
  if (c.uniform && high > low && hard_ranks_bucketed<want_ties>(values, c, low, high, out, ties, ws)) return ties;
  return hard_ranks_sorted(values, c, out, ws);
}

}  // namespace pcoherence::PCOH_ISA
