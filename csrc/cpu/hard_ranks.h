// Hard mid-ranks of one row: F_j = (sum_k w_k [v_k < v_j] + sum_k w_k [v_k = v_j] / 2) / W.
#pragma once

#include "bucket_ranks.h"
#include "buckets.h"
#include "sort.h"

namespace pcoherence::PCOH_ISA {

// Any weights: sort, then running sums over groups of equal values.
// Returns sum_jk w_j w_k [v_j = v_k].
template <class T, class Out>
double hard_ranks_sorted(const Row<T>& row, const Stats<T>& s, Out* out, Workspace& ws) {
  const SortItem<T>* items = argsort(row.values, row.n, ws);
  double below = 0, ties = 0;
  for (int i = 0; i < row.n;) {
    double group = 0;
    int end = i;
    for (; end < row.n && items[end].key == items[i].key; ++end) group += double(row.weights[items[end].index]);
    const Out f = static_cast<Out>((below + group / 2) / s.total);
    for (; i < end; ++i) out[items[i].index] = f;
    below += group;
    ties += group * group;
  }
  return ties;
}

// So many vectors of comparisons, for each value of the row, take as long as the sort of all (by their instructions).
inline constexpr int kComparisons = 4;

template <class I>
struct CountVector;
template <>
struct CountVector<std::uint16_t> {
  typedef std::uint16_t type __attribute__((vector_size(64)));
};
template <>
struct CountVector<std::uint32_t> {
  typedef std::uint32_t type __attribute__((vector_size(64)));
};

// Exclusive running sums of counts[0..n), n a multiple of the 64-byte vector's lanes, in place. crowded(first, lanes):
// some of the counts from `first` on are larger than `limit`.
template <class I, class F>
void exclusive_sums(I* counts, int n, int limit, F&& crowded) {
  typedef typename CountVector<I>::type V;
  constexpr int lanes = 64 / sizeof(I);
  constexpr auto all = std::make_index_sequence<lanes>{};
  const V most = V{} + static_cast<I>(limit);
  I start = 0;
  for (int b = 0; b < n; b += lanes) {
    const V size = load_as<V>(counts + b);
    if (any(size > most)) crowded(b, lanes);
    V sum = size;  // inclusive, by doubling: add what lies 1, 2, 4, ... lanes below
    sum += lanes_below<1>(sum, all);
    sum += lanes_below<2>(sum, all);
    sum += lanes_below<4>(sum, all);
    sum += lanes_below<8>(sum, all);
    if constexpr (lanes > 16) sum += lanes_below<16>(sum, all);
    store(counts + b, sum - size + start);
    start += sum[lanes - 1];
  }
}

// One pass into buckets, then every value is compared with those of its bucket. No branch depends on the data, unless
// buckets are crowded. I: holds every bucket's number. False where too many are crowded.
template <class I, class Buckets, class Ranks, class T, class Out>
bool hard_ranks_bucketed(const Row<T>& row, int weighing, Out* out, Workspace& ws, const Buckets& number, int buckets,
                         Ranks& ranks) {
  using V = vec_t<T>;
  constexpr int lanes = lanes_v<T>;
  typedef I Index __attribute__((vector_size(lanes_v<T> * sizeof(I))));
  const T* values = row.values;
  const int n = row.n;
  auto* bucket = ws.bucket.need<I>(n);
  const V zero{}, top = splat<T>(T(buckets - 1)), beyond = splat<T>(T(buckets));
  for (int k = 0; k < n; k += lanes) {
    const V b = vmin(vmax(number(load(values + k)), zero), top);
    // By way of 32 bits: there is no direct conversion to 16, and the compiler would go lane by lane.
    const auto wide = __builtin_convertvector(select(load(row.weights + k) > zero, b, beyond), index_t<T>);
    store(bucket + k, __builtin_convertvector(wide, Index));
  }

  // The last bucket, of those without weight, stands for itself: it starts where all others end.
  auto* counts = ws.counts.need<I>(buckets + 1);
  auto* position = ws.arrival.need<I>(n);
  std::memset(counts, 0, sizeof(*counts) * (buckets + 1));
#pragma GCC unroll 8
  for (int k = 0; k < n; ++k) position[k] = counts[bucket[k]]++;
  auto* crowded = ws.crowded.need<std::int32_t>(n / kWindow + 1);
  int found = 0;
  std::int64_t comparisons = 0;
  exclusive_sums(counts, buckets, kWindow + 1, [&](int first, int size) {
    for (int b = first; b < first + size; ++b) {
      if (counts[b] <= kWindow + 1) continue;
      crowded[found++] = b;
      comparisons += std::int64_t(counts[b]) * ((counts[b] + lanes - 1) / lanes);
    }
  });
  if (comparisons > std::int64_t(kComparisons) * n) return false;
  counts[buckets] = static_cast<I>(weighing);

  // Sentinels on both sides stand for "nothing there": they compare as below before, as above after.
  constexpr int margin = (kWindow + lanes + lanes - 1) / lanes * lanes;
  T* sorted = ws.sorted.need<T>(n + 2 * margin) + margin;
  for (int i = 1; i <= margin; ++i) sorted[-i] = -std::numeric_limits<T>::infinity();
#pragma GCC unroll 8
  for (int k = 0; k < n; ++k) sorted[position[k] += counts[bucket[k]]] = values[k];
  for (int i = weighing; i < n + margin; ++i) sorted[i] = std::numeric_limits<T>::infinity();

  ranks.arrange(position);
  const Sorted<T> view{sorted, n, weighing};
  ranks.by_window(view);
  for (int i = 0; i < found; ++i) ranks.by_all(view, counts[crowded[i]], counts[crowded[i] + 1]);
#pragma GCC unroll 8
  for (int k = 0; k < n; ++k) out[k] = ranks.at(position[k]);
  return true;
}

// By buckets, if that is possible. `ties` as hard_ranks() returns it.
template <class Ranks, class T, class Out>
bool hard_ranks_by_buckets(const Row<T>& row, const Stats<T>& s, Out* out, double& ties, Workspace& ws) {
  const int buckets = (kBucketsPerValue * row.n + 31) / 32 * 32;
  const bool narrow = kBucketsPerValue * row.n + 32 < std::numeric_limits<std::uint16_t>::max();
  const auto bucketed = [&](const auto& number) {
    Ranks ranks(row, s, ws);
    const bool done = narrow ? hard_ranks_bucketed<std::uint16_t>(row, s.count, out, ws, number, buckets, ranks)
                             : hard_ranks_bucketed<std::uint32_t>(row, s.count, out, ws, number, buckets, ranks);
    if (done) ties = ranks.ties();
    return done;
  };
  const EqualWidths<T> widths(s, buckets);
  if (!widths.possible() || !Ranks::possible(s)) return false;
  const RowSample<T> sample(row);
  if (row.n < kSampled || !sample.crowds(s)) return bucketed(widths);
  if constexpr (EqualShares<T>::available) return bucketed(EqualShares<T>(sample, s, buckets));
  return false;
}

// Returns sum_jk w_j w_k [v_j = v_k] if want_ties, otherwise 0 or that. What crowds its buckets is left to the sort.
template <class T, class Out, class Workplace>
double hard_ranks(const Core<T>&, const Row<T>& row, const Stats<T>& s, bool want_ties, Out* out, Workplace& work) {
  double ties = 0;
  const auto done = [&]<bool with_ties> {
    return s.uniform ? hard_ranks_by_buckets<CountedRanks<with_ties, T, Out>>(row, s, out, ties, work.ws)
                     : hard_ranks_by_buckets<WeighedRanks<with_ties, T, Out>>(row, s, out, ties, work.ws);
  };
  if (s.high > s.low && (want_ties ? done.template operator()<true>() : done.template operator()<false>())) return ties;
  return hard_ranks_sorted(row, s, out, work.ws);
}

}  // namespace pcoherence::PCOH_ISA
