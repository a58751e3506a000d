// Hard mid-ranks of one row: F_j = (sum_k w_k [v_k < v_j] + sum_k w_k [v_k = v_j] / 2) / W.
#pragma once

#include "core.h"
#include "sort.h"

namespace pcoherence::PCOH_ISA {

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

// Every value is compared with so many neighbours on either side: all of its bucket where that holds one more. The few
// buckets that hold more are compared apart: of 1.5 values on average, as in the middle of a normal distribution, 0.4
// %.
inline constexpr int kWindow = 4;
// So many vectors of comparisons, for each value of the row, take as long as the sort of all (by their instructions).
inline constexpr int kComparisons = 4;

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

// How values compare with others, one by one.
template <bool count_equal, class T>
struct Comparison {
  vec_t<T> own;
  ivec_t<T> excess{};  // #{less} - #{greater}
  ivec_t<T> equal{};

  void with(vec_t<T> other) {
    const ivec_t<T> one = ivec_t<T>{} + 1;
    excess = own > other ? excess + one : excess;
    excess = own < other ? excess - one : excess;
    if constexpr (count_equal) equal = own == other ? equal + one : equal;
  }
};

// sorted[0 .. lanes) with what lies up to kWindow places away.
template <bool count_equal, class T>
inline Comparison<count_equal, T> compare_with_neighbours(const T* sorted) {
  Comparison<count_equal, T> c{load(sorted)};
  for (int d = 1; d <= kWindow; ++d) {
    c.with(load(sorted - d));
    c.with(load(sorted + d));
  }
  return c;
}

// sorted[first .. first + lanes) with all of sorted[begin .. end), which holds them.
template <bool count_equal, class T>
inline Comparison<count_equal, T> compare_with_all(const T* sorted, int first, int begin, int end) {
  Comparison<count_equal, T> c{load(sorted + first)};
  for (int i = begin; i < end; ++i) c.with(splat(sorted[i]));
  return c;
}

// Buckets for each value: more make them emptier and the counters longer (2 measured best).
inline constexpr int kBucketsPerValue = 2;

// Buckets of equal width, from the lowest value to the highest.
template <class T>
struct EqualWidths {
  T low, per_width;

  EqualWidths(const Stats<T>& s, int buckets) : low(s.low), per_width(T(buckets) / (s.high - s.low)) {}
  // Not where the range, or its inverse, is more than T holds.
  bool possible() const { return per_width > 0 && per_width <= std::numeric_limits<T>::max(); }
  vec_t<T> operator()(vec_t<T> v) const { return (v - low) * per_width; }
};

// Equal weights: one pass into buckets, then every value is compared with those of its bucket. No branch
// depends on the data, unless buckets are crowded. I: holds every bucket's number. False where too many are crowded;
// with `want_ties`, `ties` receives sum_jk w_j w_k [v_j = v_k].
template <bool want_ties, class I, class Buckets, class T, class Out>
bool hard_ranks_bucketed(const Row<T>& row, const Stats<T>& s, Out* out, double& ties, Workspace& ws,
                         const Buckets& number, int buckets) {
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
  counts[buckets] = static_cast<I>(s.count);

  // Sentinels on both sides stand for "nothing there": they compare as below before, as above after.
  constexpr int margin = (kWindow + lanes + lanes - 1) / lanes * lanes;
  T* sorted = ws.sorted.need<T>(n + 2 * margin) + margin;
  for (int i = 1; i <= margin; ++i) sorted[-i] = -std::numeric_limits<T>::infinity();
#pragma GCC unroll 8
  for (int k = 0; k < n; ++k) sorted[position[k] += counts[bucket[k]]] = values[k];
  for (int i = s.count; i < n + margin; ++i) sorted[i] = std::numeric_limits<T>::infinity();

  // Twice the rank is a whole number: exact in T, and scaled at the end where more digits are wanted.
  T* rank = ws.sorted_ranks.need<T>(n + lanes);
  constexpr bool late = sizeof(Out) > sizeof(T);
  const T scale = late ? T(1) : T(0.5) / T(s.count);
  ivec_t<T> iota{}, equal{};
  for (int i = 0; i < lanes; ++i) iota[i] = i;
  for (int p = 0; p < n; p += lanes) {
    const auto c = compare_with_neighbours<want_ties>(sorted + p);
    store(rank + p, __builtin_convertvector(2 * (iota + p) + 1 + c.excess, V) * scale);
    if constexpr (want_ties) equal += iota < s.count - p ? c.equal : 0;
  }
  for (int i = 0; i < found; ++i) {
    const int begin = counts[crowded[i]], end = counts[crowded[i] + 1];
    for (int p = begin; p < end; p += lanes) {
      const auto c = compare_with_all<want_ties>(sorted, p, begin, end);
      const auto mine = iota < end - p;
      store(rank + p, select(mine, __builtin_convertvector(begin + end + c.excess, V) * scale, load(rank + p)));
      if constexpr (want_ties) equal += mine ? c.equal - 1 - compare_with_neighbours<want_ties>(sorted + p).equal : 0;
    }
  }
  if constexpr (want_ties) {
    double pairs = s.count;
    for (int i = 0; i < lanes; ++i) pairs += double(equal[i]);
    const double weight = s.total / s.count;
    ties = pairs * weight * weight;
  }
  if constexpr (late)
    for (int k = 0; k < n; ++k) out[k] = Out(rank[position[k]]) * 0.5 / s.count;
  else
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) out[k] = rank[position[k]];
  return true;
}

// So many values of a row stand for all of them, where there are so many of those that looking costs nothing.
inline constexpr int kSample = 64, kSampled = 1024;

// Evenly spaced in the row.
template <class T>
struct RowSample {
  T values[kSample];

  explicit RowSample(const Row<T>& row) {
    for (int i = 0; i < kSample; ++i) values[i] = row.values[std::int64_t(i) * row.n / kSample];
  }

  // Whether buckets of equal width would be crowded: more than 5 lie in one of 256 parts of the range (of a normal
  // distribution 0.7 are expected in its middle).
  bool crowds(const Stats<T>& s) const {
    constexpr int parts = 256, many = 5;
    int here[parts] = {}, most = 0;
    const T per_part = T(parts) / (s.high - s.low);
    for (const T v : values) {
      const T part = std::min(std::max((v - s.low) * per_part, T(0)), T(parts - 1));
      most = std::max(most, ++here[static_cast<int>(part)]);
    }
    return most > many;
  }
};

// Buckets that a sample says are equally full: of equal width between every other of its values.
template <class T>
struct EqualShares {
  static constexpr bool available = false;
};
#if defined(PCOH_AVX512)
template <>
struct EqualShares<float> {
  static constexpr bool available = true;
  static constexpr int parts = 32;  // two registers

  EqualShares(RowSample<float> sample, const Stats<float>& s, int buckets) : per_part(float(buckets) / parts) {
    std::sort(sample.values, sample.values + kSample, [](float a, float b) { return a < b; });
    float from[parts + 1], per_value[parts];
    from[0] = s.low;
    for (int i = 1; i < parts; ++i) from[i] = std::min(std::max(sample.values[i * kSample / parts], s.low), s.high);
    from[parts] = s.high;
    for (int i = 0; i < parts; ++i) {
      const float width = per_part / (from[i + 1] - from[i]);
      per_value[i] = width <= std::numeric_limits<float>::max() ? width : 0;
    }
    for (int i = 0; i < 2; ++i) {
      begin[i] = load(from + 16 * i);
      slope[i] = load(per_value + 16 * i);
    }
  }
  vec_t<float> operator()(vec_t<float> v) const {
    __m512i part = _mm512_setzero_si512();
    for (int step = parts / 2; step > 0; step /= 2) {
      const __m512i next = _mm512_add_epi32(part, _mm512_set1_epi32(step));
      part = _mm512_mask_mov_epi32(part, _mm512_cmp_ps_mask(v, at(begin, next), _CMP_GE_OQ), next);
    }
    const vec_t<float> within = (v - at(begin, part)) * at(slope, part), last = splat(per_part - 1);
    return _mm512_cvtepi32_ps(part) * per_part + vmin(within, last);
  }

  float per_part;
  vec_t<float> begin[2], slope[2];

 private:
  static __m512 at(const vec_t<float> (&table)[2], __m512i which) {
    return _mm512_permutex2var_ps(table[0], which, table[1]);
  }
};
#endif

// Returns sum_jk w_j w_k [v_j = v_k] if want_ties, otherwise 0 or that.
template <class T, class Out, class Workplace>
double hard_ranks(const Core<T>&, const Row<T>& row, const Stats<T>& s, bool want_ties, Out* out, Workplace& work) {
  double ties = 0;
  if (s.uniform && s.high > s.low) {
    const int buckets = (kBucketsPerValue * row.n + 31) / 32 * 32;
    const bool narrow = kBucketsPerValue * row.n + 32 < std::numeric_limits<std::uint16_t>::max();
    const auto bucketed = [&]<class Buckets>(const Buckets& number) {
      const auto run = narrow      ? want_ties ? hard_ranks_bucketed<true, std::uint16_t, Buckets, T, Out>
                                               : hard_ranks_bucketed<false, std::uint16_t, Buckets, T, Out>
                       : want_ties ? hard_ranks_bucketed<true, std::uint32_t, Buckets, T, Out>
                                   : hard_ranks_bucketed<false, std::uint32_t, Buckets, T, Out>;
      return run(row, s, out, ties, work.ws, number, buckets);
    };
    // What crowds one kind of buckets after all is left to the sort.
    if (const EqualWidths<T> widths(s, buckets); widths.possible()) {
      const RowSample<T> sample(row);
      if (row.n < kSampled || !sample.crowds(s)) {
        if (bucketed(widths)) return ties;
      } else if constexpr (EqualShares<T>::available) {
        if (bucketed(EqualShares<T>(sample, s, buckets))) return ties;
      }
    }
  }
  return hard_ranks_sorted(row, s, out, work.ws);
}

}  // namespace pcoherence::PCOH_ISA
