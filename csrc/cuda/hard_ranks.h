// Hard mid-ranks of one row: F_j = (sum_k w_k [v_k < v_j] + sum_k w_k [v_k = v_j] / 2) / W.
#pragma once

#include "soft_ranks.h"
#include "sort.h"

namespace pcoherence::cuda {

// Buckets more crowded than this are left to the sort: comparing within a bucket costs its size per element. Distances
// of a Gaussian cloud put at most about a dozen into the fullest bucket.
inline constexpr int kCrowded = 32;

inline constexpr std::int64_t hard_rank_bytes(std::int64_t n, std::int64_t element) {
  return n * (element + 4 + 8) + 3 * 16 + 8;
}

// counts [n] -> running sums before each, in place; returns the largest count. Every warp runs along its own part.
template <class G>
PCOH_DEVICE int start_buckets(G& g, int* counts, int n) {
  const int share = (n + g.warps() * kWarp - 1) / (g.warps() * kWarp) * kWarp;
  const int begin = share * g.warp(), end = begin + share < n ? begin + share : n;
  int before = 0, fullest = 0;
  for (int b = begin + g.lane(); b - g.lane() < end; b += kWarp) {
    const int count = b < end ? counts[b] : 0;
    fullest = count > fullest ? count : fullest;
    const int start = exclusive_in_warp(g, count);
    if (b < end) counts[b] = before + start;
    before += g.shuffle(start + count, kWarp - 1);
  }
  int* of_warp = reinterpret_cast<int*>(g.scratch());
  if (g.lane() == 0) of_warp[g.warp()] = before;
  g.sync();
  int offset = 0;
  for (int w = 0; w < g.warp(); ++w) offset += of_warp[w];
  for (int b = begin + g.lane(); b < end; b += kWarp) counts[b] += offset;
  g.sync();
  return reduce(g, fullest, Larger{});
}

// Equal weights: buckets of equal width, one a value, then every value is compared with those of its bucket. Values
// arrive in a bucket in any order, but what is counted does not depend on it. False where a bucket is too crowded.
// values, counts, sorted: [n] each, the last two to work in.
template <class T, class Out, class G>
PCOH_DEVICE bool hard_ranks_bucketed(G& g, const Row<T>& row, const Stats<T>& s, const T* values, int* counts,
                                     T* sorted, Out* out, double& ties) {
  const int n = row.n;
  const T per_unit = T(n) / (s.high - s.low);
  // 0 where high - low overflows.
  if (!(per_unit > 0) || !(per_unit <= std::numeric_limits<T>::max()) || !(T(n) < Rounded<T>::limit)) return false;
  const T low = s.low;
  const auto bucket = [=](T v) {
    const int b = Rounded<T>(v - low, per_unit).index();
    return b < n ? b : n - 1;
  };
  each(g, n, [=](int b) { counts[b] = 0; });
  g.sync();
  with_weights(row, [&](auto weight) {
    each(g, n, [&](int k) {
      if (weight(k) > 0) g.add(&counts[bucket(values[k])], 1);
    });
  });
  g.sync();
  if (start_buckets(g, counts, n) > kCrowded) return false;
  with_weights(row, [&](auto weight) {
    each(g, n, [&](int k) {  // afterwards counts[b] is where bucket b ends
      if (weight(k) > 0) sorted[g.add(&counts[bucket(values[k])], 1)] = values[k];
    });
  });
  g.sync();
  const Out scale = Out(0.5) / Out(s.count);
  int pairs = 0;  // at most kCrowded a value
  with_weights(row, [&](auto weight) {
    each(g, n, [&](int k) {
      if (!(weight(k) > 0)) {
        out[k] = 0;  // has no rank
        return;
      }
      const T v = values[k];
      const int b = bucket(v), begin = b > 0 ? counts[b - 1] : 0, end = counts[b];
      int less = 0, equal = 0;
      for (int i = begin; i < end; ++i) {
        less += sorted[i] < v;
        equal += sorted[i] == v;
      }
      out[k] = Out(2 * (begin + less) + equal) * scale;
      pairs += equal;
    });
  });
  const double weight = s.total / s.count;
  ties = total(g, double(pairs)) * weight * weight;
  return true;
}

template <class T, class Out, class G>
PCOH_DEVICE bool hard_ranks_bucketed(G& g, const Row<T>& row, const Stats<T>& s, Out* out, double& ties, Arena arena) {
  int* counts = arena.take<int>(row.n);
  T* sorted = arena.take<T>(row.n);
  if (g.in_fast(row.values) && g.in_fast(counts) && g.in_fast(sorted))
    return hard_ranks_bucketed(g, row, s, g.fast(row.values), g.fast(counts), g.fast(sorted), out, ties);
  return hard_ranks_bucketed(g, row, s, row.values, counts, sorted, out, ties);
}

// Any weights: sort, running sums of weights, and each value's place among them by bisection.
template <class T, class Out, class G>
PCOH_DEVICE double hard_ranks_sorted(G& g, const Row<T>& row, const Stats<T>& s, Out* out, Arena arena) {
  const int n = row.n;
  T* keys = arena.take<T>(n);
  std::int32_t* items = arena.take<std::int32_t>(n);
  double* before = arena.take<double>(n + 1);  // sum of the weights of the sorted values before each
  each(g, n, [&](int k) {
    keys[k] = row.values[k];
    items[k] = k;
  });
  sort(g, keys, items, n);
  running_sums(g, n, [&](int i) { return double(row.weight(items[i])); }, [&](int i, double sum) { before[i] = sum; });
  if (g.thread() == 0) before[n] = s.total;
  g.sync();
  // The number of sorted values that come before v, or not after it.
  const auto place = [&](T v, bool or_equal) {
    int low = 0, high = n;
    while (low < high) {
      const int middle = (low + high) / 2;
      const bool comes_before = keys[middle] < v || (or_equal && keys[middle] == v);
      low = comes_before ? middle + 1 : low;
      high = comes_before ? high : middle;
    }
    return low;
  };
  double ties = 0;
  each(g, n, [&](int i) {
    const T v = keys[i];
    const double below = before[place(v, false)], group = before[place(v, true)] - below;
    out[items[i]] = static_cast<Out>((below + group / 2) / s.total);
    ties += double(row.weight(items[i])) * group;
  });
  return total(g, ties);
}

// F_j into out [n]; returns sum_jk w_j w_k [v_j = v_k].
template <class T, class Out, class G>
PCOH_APART double hard_ranks(G& g, const Row<T>& row, const Stats<T>& s, bool, Out* out, Workplace<T, G>& work) {
  double ties = 0;
  if (s.uniform && s.high > s.low && hard_ranks_bucketed(g, row, s, out, ties, work.arena)) return ties;
  g.sync();  // the buckets' memory is used again
  return hard_ranks_sorted(g, row, s, out, work.arena);
}

}  // namespace pcoherence::cuda
