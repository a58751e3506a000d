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

// The buckets of a row's values into bucket [n]; those without weight have one of their own, the last.
template <class T, class I, class Buckets>
void find_buckets(const Row<T>& row, const Buckets& bucket_of, int buckets, I* bucket) {
  using V = vec_t<T>;
  typedef I Index __attribute__((vector_size(lanes_v<T> * sizeof(I))));
  const V zero{}, top = splat<T>(T(buckets - 1)), beyond = splat<T>(T(buckets));
  for (int k = 0; k < row.n; k += lanes_v<T>) {
    const V b = vmin(vmax(bucket_of(load(row.values + k)), zero), top);
    // By way of 32 bits: there is no direct conversion to 16, and the compiler would go lane by lane.
    const auto wide = __builtin_convertvector(select(load(row.weights + k) > zero, b, beyond), index_t<T>);
    store(bucket + k, __builtin_convertvector(wide, Index));
  }
}

// Exclusive running sums of counts [n], n a multiple of a vector's lanes, in place. crowded(first, lanes): some of the
// counts from `first` on are larger than `limit`.
template <class I, class F>
void exclusive_sums(I* counts, int n, int limit, F&& crowded) {
  typedef I V __attribute__((vector_size(64)));
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

// Buckets that hold more than a window, and how many vectors of `lanes` comparisons they take.
struct Crowded {
  std::int32_t* buckets;
  int count = 0;
  std::int64_t comparisons = 0;

  void add(int bucket, int size, int lanes) {
    buckets[count++] = bucket;
    comparisons += std::int64_t(size) * ((size + lanes - 1) / lanes);
  }
};

// Into buckets, then every value is compared with those of its own. No branch depends on the data, unless buckets are
// crowded; false where they are too crowded. I: holds every bucket's number. A Ranks (bucket_ranks.h) has
//   lanes                        values that it compares at a time
//   arrange(position)            told where each candidate lies in the order of buckets, [n]
//   by_window(sorted)            ranks of all
//   by_all(sorted, begin, end)   again, of a bucket
//   at(position)  ties()         the results
template <class I, class Buckets, class Ranks, class T, class Out>
bool hard_ranks_bucketed(const Row<T>& row, int count, const Buckets& bucket_of, int buckets, Ranks& ranks, Out* out,
                         Workspace& ws) {
  const T* values = row.values;
  const int n = row.n;
  auto* bucket = ws.bucket.need<I>(n);
  find_buckets(row, bucket_of, buckets, bucket);

  auto* counts = ws.counts.need<I>(buckets + 1);
  auto* position = ws.position.need<I>(n);
  std::memset(counts, 0, sizeof(*counts) * (buckets + 1));
#pragma GCC unroll 8
  for (int k = 0; k < n; ++k) position[k] = counts[bucket[k]]++;
  Crowded crowded{ws.crowded.need<std::int32_t>(n / kWindow + 1)};
  exclusive_sums(counts, buckets, kWindow + 1, [&](int first, int lanes) {
    for (int b = first; b < first + lanes; ++b)
      if (counts[b] > kWindow + 1) crowded.add(b, counts[b], Ranks::lanes);
  });
  if (crowded.comparisons > std::int64_t(kComparisons) * n) return false;
  counts[buckets] = static_cast<I>(count);  // where those with weight end

  constexpr T inf = std::numeric_limits<T>::infinity();
  constexpr int margin = Sorted<T>::margin;
  T* sorted = ws.sorted.need<T>(n + 2 * margin) + margin;
  std::fill(sorted - margin, sorted, -inf);
#pragma GCC unroll 8
  for (int k = 0; k < n; ++k) sorted[position[k] += counts[bucket[k]]] = values[k];
  std::fill(sorted + count, sorted + n + margin, inf);

  ranks.arrange(position);
  const Sorted<T> ordered{sorted, n, count};
  ranks.by_window(ordered);
  for (int i = 0; i < crowded.count; ++i)
    ranks.by_all(ordered, counts[crowded.buckets[i]], counts[crowded.buckets[i] + 1]);
#pragma GCC unroll 8
  for (int k = 0; k < n; ++k) out[k] = ranks.at(position[k]);
  return true;
}

// Of so many values bucket numbers, and twice the ranks, are whole numbers that T tells apart.
template <class T>
inline constexpr int kMostInBuckets = sizeof(T) == 4 ? (1 << 23) - 1 : 1 << 29;

// By buckets; what hard_ranks() returns, or nothing where that is left to the sort.
template <class Ranks, class T, class Out>
std::optional<double> hard_ranks_by_buckets(const Row<T>& row, const Stats<T>& s, Out* out, Workspace& ws) {
  static_assert(kBucketsPerValue * kRowPadding % 32 == 0);  // lanes of exclusive_sums(), of 16 bits
  const int buckets = kBucketsPerValue * row.n;
  const auto by = [&](const auto& bucket_of) -> std::optional<double> {
    Ranks ranks(row, s, ws);
    const bool done = buckets < std::numeric_limits<std::uint16_t>::max()
                          ? hard_ranks_bucketed<std::uint16_t>(row, s.count, bucket_of, buckets, ranks, out, ws)
                          : hard_ranks_bucketed<std::uint32_t>(row, s.count, bucket_of, buckets, ranks, out, ws);
    return done ? std::optional(ranks.ties()) : std::nullopt;
  };
  const EqualWidths<T> widths(s, buckets);
  if (!widths.possible() || row.n > kMostInBuckets<T>) return std::nullopt;
  if (row.n < kSampled) return by(widths);
  const RowSample<T> sample(row);
  if (!sample.crowds(s)) return by(widths);
  if constexpr (EqualShares<T>::available) return by(EqualShares<T>(sample, s, buckets));
  return std::nullopt;
}

// Returns sum_jk w_j w_k [v_j = v_k] if want_ties, otherwise anything.
template <class T, class Out, class Workplace>
double hard_ranks(const Core<T>&, const Row<T>& row, const Stats<T>& s, bool want_ties, Out* out, Workplace& work) {
  std::optional<double> ties;
  if (!(s.high > s.low)) {
    // all are equal
  } else if (!s.uniform) {
    if (WeighedRanks<T, Out>::possible(s)) ties = hard_ranks_by_buckets<WeighedRanks<T, Out>>(row, s, out, work.ws);
  } else if (want_ties) {
    ties = hard_ranks_by_buckets<CountedRanks<true, T, Out>>(row, s, out, work.ws);
  } else {
    ties = hard_ranks_by_buckets<CountedRanks<false, T, Out>>(row, s, out, work.ws);
  }
  return ties ? *ties : hard_ranks_sorted(row, s, out, work.ws);
}

}  // namespace pcoherence::PCOH_ISA
