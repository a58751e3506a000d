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

// Values of a row, by buckets in ascending order; those without weight at the end.
template <class T>
struct Sorted {
  const T* values;  // [-kWindow .. n + lanes + kWindow): beyond the row's own, infinities that compare as nothing there
  int n, count;     // of all, and of those that weigh

  // f(v), v the values that lie up to kWindow places away from those at p.
  template <class V, class F>
  void neighbours(int p, F&& f) const {
    for (int d = 1; d <= kWindow; ++d) {
      f(load_as<V>(values + p - d), -d);
      f(load_as<V>(values + p + d), d);
    }
  }
};

// Ranks of candidates that all weigh the same: whole numbers count them, exactly, in T.
template <bool want_ties, class T, class Out>
class CountedRanks {
 public:
  static bool possible(const Stats<T>&) { return true; }
  CountedRanks(const Row<T>& row, const Stats<T>& s, Workspace& ws)
      : stats_(s), scale_(late ? T(1) : T(0.5) / T(s.count)), twice_(ws.sorted_ranks.need<T>(row.n + lanes)) {
    for (int i = 0; i < lanes; ++i) iota_[i] = i;
  }

  template <class I>
  void arrange(const I*) {}

  void by_window(const Sorted<T>& sorted) {
    for (int p = 0; p < sorted.n; p += lanes) {
      const auto [excess, equal] = compare_with_neighbours(sorted, p);
      put(p, 2 * (iota_ + p) + 1 + excess);
      if constexpr (want_ties) equal_ += iota_ < sorted.count - p ? equal : 0;
    }
  }
  // Instead, for a bucket that holds more than the window.
  void by_all(const Sorted<T>& sorted, int begin, int end) {
    for (int p = begin; p < end; p += lanes) {
      const V own = load(sorted.values + p);
      Comparison c{};
      for (int i = begin; i < end; ++i) c.with(own, splat(sorted.values[i]));
      const auto mine = iota_ < end - p;
      store(twice_ + p, select(mine, converted(begin + end + c.excess), load(twice_ + p)));
      if constexpr (want_ties) equal_ += mine ? c.equal - compare_with_neighbours(sorted, p).equal : 0;
    }
  }

  Out at(int position) const { return late ? Out(twice_[position]) * 0.5 / stats_.count : Out(twice_[position]); }
  double ties() const {
    double pairs = 0;
    for (int i = 0; i < lanes; ++i) pairs += double(equal_[i]);
    const double weight = stats_.total / stats_.count;
    return pairs * weight * weight;
  }

 private:
  using V = vec_t<T>;
  using I = ivec_t<T>;
  static constexpr int lanes = lanes_v<T>;
  static constexpr bool late = sizeof(Out) > sizeof(T);  // scaled at the end, where more digits are wanted
  struct Comparison {
    I excess, equal;  // #{less} - #{greater}, #{equal}

    void with(V own, V other) {
      excess = own > other ? excess + 1 : excess;
      excess = own < other ? excess - 1 : excess;
      if constexpr (want_ties) equal = own == other ? equal + 1 : equal;
    }
  };

  // With those at p themselves.
  static Comparison compare_with_neighbours(const Sorted<T>& sorted, int p) {
    const V own = load(sorted.values + p);
    Comparison c{{}, I{} + 1};
    sorted.template neighbours<V>(p, [&](V other, int) { c.with(own, other); });
    return c;
  }
  V converted(I twice) const { return __builtin_convertvector(twice, V) * scale_; }
  void put(int p, I twice) { store(twice_ + p, converted(twice)); }

  const Stats<T>& stats_;
  T scale_;
  T* twice_;  // [n] twice the rank, times scale_
  I iota_{}, equal_{};
};

// Ranks of candidates that weigh anything. Only sums are taken, in float64, so that the smallest ranks keep their
// digits.
template <bool want_ties, class T, class Out>
class WeighedRanks {
 public:
  // Not where the total, or its inverse, is more than a number holds.
  static bool possible(const Stats<T>& s) { return s.total <= most && 1 / s.total <= most; }
  WeighedRanks(const Row<T>& row, const Stats<T>& s, Workspace& ws)
      : row_(row),
        per_total_(1 / s.total),
        weights_(ws.sorted_weights.need<T>(row.n + 2 * margin) + margin),
        below_(ws.weight_below.need<double>(row.n + 2 * margin) + margin),
        ranks_(ws.sorted_ranks.need<Out>(row.n + lanes)) {}

  template <class I>
  void arrange(const I* position) {
    const int n = row_.n;
    for (int k = 0; k < n; ++k) weights_[position[k]] = row_.weights[k];
    running_sums(Core<T>{}, n, [&](int p) { return double(weights_[p]); }, [&](int p, double sum) { below_[p] = sum; });
    for (int i = 1; i <= margin; ++i) weights_[-i] = below_[-i] = 0;
    for (int i = 0; i < margin; ++i) weights_[n + i] = 0;
  }

  void by_window(const Sorted<T>& sorted) {
    for (int p = 0; p < sorted.n; p += lanes) {
      const auto [less, equal] = compare_with_neighbours(sorted, p);
      store(ranks_ + p, rank(load(below_ + p - kWindow), less, equal));
      if constexpr (want_ties) ties_ += widened(load_as<Octet>(weights_ + p)) * equal;
    }
  }
  void by_all(const Sorted<T>& sorted, int begin, int end) {
    for (int p = begin; p < end; p += lanes) {
      Comparison c{};
      const dvec own = widened(load_as<Octet>(sorted.values + p));
      for (int i = begin; i < end; ++i) c.with(own, dvec{} + double(sorted.values[i]), dvec{} + double(weights_[i]));
      const Ranks own_ranks = rank(dvec{} + below_[begin], c.less, c.equal);
      const dvec counted = compare_with_neighbours(sorted, p).equal;
      for (int i = 0; i < std::min(lanes, end - p); ++i) {
        ranks_[p + i] = own_ranks[i];
        if constexpr (want_ties) ties_[i] += weights_[p + i] * (c.equal[i] - counted[i]);
      }
    }
  }

  Out at(int position) const { return ranks_[position]; }
  double ties() const { return sum_lanes(ties_); }

 private:
  using Octet = typename Simd<T>::octet;
  using Ranks = typename Simd<Out>::octet;
  static constexpr double most = std::numeric_limits<double>::max();
  static constexpr int lanes = 8, margin = 2 * lanes;
  static_assert(margin >= kWindow + lanes);
  struct Comparison {
    dvec less, equal;  // what others weigh that are

    void with(dvec own, dvec other, dvec weight) {
      less = other < own ? less + weight : less;
      equal = other == own ? equal + weight : equal;
    }
  };

  // With those at p themselves.
  Comparison compare_with_neighbours(const Sorted<T>& sorted, int p) const {
    const dvec own = widened(load_as<Octet>(sorted.values + p));
    Comparison c{{}, widened(load_as<Octet>(weights_ + p))};
    sorted.template neighbours<Octet>(
        p, [&](Octet value, int d) { c.with(own, widened(value), widened(load_as<Octet>(weights_ + p + d))); });
    return c;
  }
  // before: what all weigh that are not compared, and less.
  Ranks rank(dvec before, dvec less, dvec equal) const {
    return __builtin_convertvector((before + less + equal * 0.5) * per_total_, Ranks);
  }

  const Row<T>& row_;
  double per_total_;
  T* weights_;     // [-margin .. n + margin) as sorted
  double* below_;  // [-margin .. n) what all before a place weigh
  Out* ranks_;     // [n]
  dvec ties_{};
};

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
