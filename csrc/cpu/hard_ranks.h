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

// Equal weights: one pass into buckets of equal width, about one value each, then every value is compared with
// its neighbours in bucket order as far as the fullest bucket reaches. No branch depends on the data.
// False where a bucket is too crowded; `ties` receives sum_jk w_j w_k [v_j = v_k].
template <class T>
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

  auto* counts = ws.counts.need<std::int32_t>(buckets + 1);
  auto* position = ws.arrival.need<std::int32_t>(n);
  std::memset(counts, 0, sizeof(*counts) * (buckets + 1));
  for (int k = 0; k < n; ++k) position[k] = counts[bucket[k]]++;
  std::int32_t start = 0, fullest = 0;
  for (int b = 0; b < buckets; ++b) {
    const std::int32_t size = counts[b];
    fullest = size > fullest ? size : fullest;
    counts[b] = start;
    start += size;
  }
  counts[buckets] = start;
  if (fullest > kCrowded) return false;

  // Sentinels on both sides stand for "nothing there": they compare as below before, as above after.
  T* sorted = ws.sorted.need<T>(n + 2 * (kCrowded + lanes)) + kCrowded + lanes;
  for (int i = 1; i <= kCrowded; ++i) sorted[-i] = -std::numeric_limits<T>::infinity();
  for (int k = 0; k < n; ++k) sorted[position[k] += counts[bucket[k]]] = values[k];
  for (int i = c.count; i < n + kCrowded + lanes; ++i) sorted[i] = std::numeric_limits<T>::infinity();

  T* rank = ws.sorted_ranks.need<T>(n);
  const int window = fullest - 1;
  const T scale = T(0.5) / T(c.count);
  ivec_t<T> iota{};
  for (int i = 0; i < lanes; ++i) iota[i] = 2 * i + 1;
  double equal_pairs = 0;
  for (int p = 0; p < c.count; p += lanes) {
    const V own = load(sorted + p);
    ivec_t<T> doubled = iota + 2 * p, equal{};  // 2 #{less} + #{equal}: starts from 2 p + 1, comparisons are 0 or -1
    for (int d = 1; d <= window; ++d) {
      const V before = load(sorted + p - d), after = load(sorted + p + d);
      const auto ge = before >= own, gt = before > own, lt = after < own, le = after <= own;
      doubled += (ge + gt) - (lt + le);
      equal += (gt - ge) + (lt - le);
    }
    store(rank + p, __builtin_convertvector(doubled, V) * scale);
    const int valid = c.count - p < lanes ? c.count - p : lanes;
    if (window > 0)
      for (int i = 0; i < valid; ++i) equal_pairs += double(equal[i]);
  }
  const double weight = c.total / c.count;
  ties = (equal_pairs + c.count) * weight * weight;
  for (int i = c.count; i < n; ++i) rank[i] = 0;
  for (int k = 0; k < n; ++k) out[k] = rank[position[k]];
  return true;
}

// Returns sum_jk w_j w_k [v_j = v_k]. low, high: range of the values of positive weight.
template <class T>
double hard_ranks(const T* values, const Candidates<T>& c, T low, T high, T* out, Workspace& ws) {
  double ties = 0;
  if (c.uniform && high > low && hard_ranks_bucketed(values, c, low, high, out, ties, ws)) return ties;
  return hard_ranks_sorted(values, c, out, ws);
}

}  // namespace pcoherence::PCOH_ISA
