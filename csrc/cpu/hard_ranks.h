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

// Buckets more crowded than this are left to the sort: comparing within a bucket costs its size per element.
inline constexpr int kCrowded = 16;

template <int step, class V, std::size_t... l>
inline V lanes_below(V v, std::index_sequence<l...>) {
  constexpr int n = sizeof...(l);
  return __builtin_shufflevector(V{}, v, (int(l) < step ? int(l) : n + int(l) - step)...);
}

// Exclusive running sums of counts[0..n), n a multiple of the 64-byte vector's lanes, in place; returns the largest.
template <class I>
int exclusive_sums(I* counts, int n) {
  typedef typename CountVector<I>::type V;
  constexpr int lanes = 64 / sizeof(I);
  constexpr auto all = std::make_index_sequence<lanes>{};
  I start = 0;
  V fullest{};
  for (int b = 0; b < n; b += lanes) {
    const V size = load_as<V>(counts + b);
    fullest = vmax(size, fullest);
    V sum = size;  // inclusive, by doubling: add what lies 1, 2, 4, ... lanes below
    sum += lanes_below<1>(sum, all);
    sum += lanes_below<2>(sum, all);
    sum += lanes_below<4>(sum, all);
    sum += lanes_below<8>(sum, all);
    if constexpr (lanes > 16) sum += lanes_below<16>(sum, all);
    store(counts + b, sum - size + start);
    start += sum[lanes - 1];
  }
  return max_lane(fullest);
}

// sorted[0 .. lanes) against its neighbours up to `window` places away, which hold every value of its bucket:
// what 2 #{less} + #{equal, itself included} exceeds 2 position + 1 by; equal: #{equal} without itself.
template <bool count_equal, class T>
inline ivec_t<T> compare_with_neighbours(const T* sorted, int window, ivec_t<T>& equal) {
  const vec_t<T> own = load(sorted);
  const ivec_t<T> one = ivec_t<T>{} + 1;
  ivec_t<T> excess{};
  const auto compare = [&](vec_t<T> other) {  // sign(own - other)
    excess = own > other ? excess + one : excess;
    excess = own < other ? excess - one : excess;
    if constexpr (count_equal) equal = own == other ? equal + one : equal;
  };
  for (int d = 1; d <= window; ++d) {
    compare(load(sorted - d));
    compare(load(sorted + d));
  }
  return excess;
}

// Buckets for each value: more make the windows shorter and the counters longer (2 measured best).
inline constexpr int kBucketsPerValue = 2;

// How often buckets may follow the values: each time a bucket gets room for those that it held.
inline constexpr int kRefinements = 2;

// A row's values in buckets, whose numbers rise with the values. I: holds every bucket's number.
template <class T, class I>
struct Buckets {
  const Row<T>& row;
  const Stats<T>& s;
  Workspace& ws;
  int count = (kBucketsPerValue * row.n + 31) / 32 * 32;  // of those with weight; one more is for the rest
  T per_unit = T(count) / (s.high - s.low);
  I* number = ws.bucket.need<I>(row.n);     // [n] the bucket of a value
  I* start = ws.counts.need<I>(count + 1);  // [count + 1] how many values lie in those below a bucket
  I* position = ws.arrival.need<I>(row.n);  // [n] how many came to its bucket before a value
  T* spot = nullptr;                        // [n] number and, as a fraction, place in it; null: by equal widths
  int fullest = 0;

  bool finite() const { return per_unit <= std::numeric_limits<T>::max(); }

  // Of equal width.
  void lay() {
    each_spot([&](int k, vec_t<T> t) { enter(k, t); });
    fill();
  }

  // Room in proportion to what they hold. By number and place a value stays above those that it is above.
  void refine() {
    T* to = ws.spots.need<T>(row.n);
    if (spot == nullptr) each_spot([&](int k, vec_t<T> t) { store(to + k, t); });
    spot = to;
    for (int k = 0; k < row.n; ++k) {
      const int b = std::min(static_cast<int>(spot[k]), count - 1);
      const T place = std::min(spot[k] - T(b), T(1));
      spot[k] = T(kBucketsPerValue) * (T(start[b]) + place * T(start[b + 1] - start[b]));
    }
    for (int k = 0; k < row.n; k += lanes_v<T>) enter(k, load(spot + k));
    fill();
  }

 private:
  template <class F>
  void each_spot(F&& f) const {
    const vec_t<T> zero{}, end = splat<T>(T(count));
    for (int k = 0; k < row.n; k += lanes_v<T>) f(k, vmin(vmax((load(row.values + k) - s.low) * per_unit, zero), end));
  }

  void enter(int k, vec_t<T> t) const {
    typedef I Index __attribute__((vector_size(lanes_v<T> * sizeof(I))));
    const vec_t<T> top = splat<T>(T(count - 1)), beyond = splat<T>(T(count));
    // By way of 32 bits: there is no direct conversion to 16, and the compiler would go lane by lane.
    const auto wide =
        __builtin_convertvector(select(load(row.weights + k) > vec_t<T>{}, vmin(t, top), beyond), index_t<T>);
    store(number + k, __builtin_convertvector(wide, Index));
  }

  // The last bucket, of those without weight, stands for itself: it starts where all others end.
  void fill() {
    std::memset(start, 0, sizeof(I) * (count + 1));
    for (int k = 0; k < row.n; ++k) position[k] = start[number[k]]++;
    fullest = exclusive_sums(start, count);
    start[count] = static_cast<I>(s.count);
  }
};

// Values in the order of their buckets, and on both sides sentinels for "nothing there": they compare as below before,
// as above after. Vectors go past the last value, and windows past that.
template <class T>
inline constexpr int kMargin = kCrowded + lanes_v<T>;

// Equal weights. Twice the rank is a whole number: exact in T, and scaled at the end where more digits are wanted.
template <bool want_ties, class I, class T, class Out>
double ranks_by_count(const Buckets<T, I>& buckets, const T* sorted, Out* out) {
  using V = vec_t<T>;
  constexpr int lanes = lanes_v<T>;
  const Stats<T>& s = buckets.s;
  const int n = buckets.row.n, window = buckets.fullest - 1, whole = s.count / lanes * lanes;
  T* rank = buckets.ws.sorted_ranks.template need<T>(n);
  constexpr bool late = sizeof(Out) > sizeof(T);
  const T scale = late ? T(1) : T(0.5) / T(s.count);
  ivec_t<T> iota{}, equal{};
  for (int i = 0; i < lanes; ++i) iota[i] = 2 * i + 1;
  for (int p = 0; p < n; p += lanes) {
    ivec_t<T> here{};
    const ivec_t<T> doubled = iota + 2 * p + compare_with_neighbours<want_ties>(sorted + p, window, here);
    store(rank + p, __builtin_convertvector(doubled, V) * scale);
    if (want_ties && p < whole) equal += here;
    if (want_ties && p == whole)
      for (int i = 0; i < s.count - whole; ++i) equal[i] += here[i];
  }
  const I* position = buckets.position;
  if constexpr (late)
    for (int k = 0; k < n; ++k) out[k] = Out(rank[position[k]]) * 0.5 / s.count;
  else
    for (int k = 0; k < n; ++k) out[k] = rank[position[k]];
  double pairs = s.count;
  for (int i = 0; i < lanes; ++i) pairs += double(equal[i]);
  const double weight = s.total / s.count;
  return pairs * weight * weight;
}

// For one vector of values, at places from `place` on, add(below, tied) of a neighbour at a time: its weight where it
// lies in the same bucket and below, half of it where it ties; and its weight where it ties. No sums: nothing is
// rounded before it is added. by_place: values; mass: their weights; first: where their buckets begin.
template <class T, class Add>
void each_neighbour(const T* by_place, const T* mass, const ivec_t<T>& first, int place, int window, Add&& add) {
  using V = vec_t<T>;
  ivec_t<T> here;
  for (int i = 0; i < lanes_v<T>; ++i) here[i] = place + i;
  const T *values = by_place + place, *weights = mass + place;
  const V own = load(values), zero{};
  for (int d = 1; d <= window; ++d) {
    const V left = load(values - d), right = load(values + d), before = load(weights - d), after = load(weights + d);
    const V tied_left = select(left == own, before, zero), tied_right = select(right == own, after, zero);
    add(select((left < own) & (here - d >= first), before, tied_left * T(0.5)), tied_left);
    add(select(right < own, after, tied_right * T(0.5)), tied_right);
  }
}

// Any weights: the running sum of those in the buckets below, and what is below in its own. In float64, without a
// difference: small weights beside large ones keep their digits.
template <class I, class T, class Out>
double ranks_by_weight(const Buckets<T, I>& buckets, const T* sorted, Out* out) {
  using Whole = std::decay_t<decltype(ivec_t<T>{}[0])>;
  const Row<T>& row = buckets.row;
  const Stats<T>& s = buckets.s;
  const int n = row.n, window = buckets.fullest - 1;
  const I* position = buckets.position;
  T* mass = buckets.ws.sorted_weights.template need<T>(n + 2 * kMargin<T>) + kMargin<T>;
  Whole* first = buckets.ws.sorted_starts.template need<Whole>(n);
  std::fill_n(mass - kMargin<T>, kMargin<T>, T(0));
  for (int k = 0; k < n; ++k) {
    mass[position[k]] = row.weights[k];
    first[position[k]] = buckets.start[buckets.number[k]];
  }
  std::fill_n(mass + s.count, n + kMargin<T> - s.count, T(0));
  double* below = buckets.ws.sorted_sums.template need<double>(n);
  running_sums(Core<T>{}, n, [&](int p) { return double(mass[p]); }, [&](int p, double sum) { below[p] = sum; });
  double* rank = buckets.ws.sorted_ranks.template need<double>(n);
  for (int p = 0; p < n; ++p) rank[p] = below[first[p]];
  dvec ties{};
  const auto finish = [&](double* at, dvec weight, dvec beside, dvec tied) {
    store(at, (load(at) + (weight * 0.5 + beside)) / s.total);
    ties += weight * (weight + tied);
  };
  for (int p = 0; p < n; p += lanes_v<T>) {
    const vec_t<T> weight = load(mass + p);
    const auto start = load_as<ivec_t<T>>(first + p);
    if constexpr (sizeof(T) == sizeof(double)) {
      dvec beside{}, tied{};
      each_neighbour(sorted, mass, start, p, window, [&](dvec b, dvec t) { beside += b, tied += t; });
      finish(rank + p, weight, beside, tied);
    } else {
      dvec beside[2] = {}, tied[2] = {};
      each_neighbour(sorted, mass, start, p, window, [&](vec_t<T> b, vec_t<T> t) {
        beside[0] += low_half(b), beside[1] += high_half(b);
        tied[0] += low_half(t), tied[1] += high_half(t);
      });
      finish(rank + p, low_half(weight), beside[0], tied[0]);
      finish(rank + p + 8, high_half(weight), beside[1], tied[1]);
    }
  }
  for (int k = 0; k < n; ++k) out[k] = static_cast<Out>(rank[position[k]]);
  return sum_lanes(ties);
}

// One pass into buckets, then every value is compared with its neighbours in bucket order as far as the fullest bucket
// reaches. No branch depends on the data, but that crowded buckets are laid again where the values are. False where
// that did not help; with `want_ties`, `ties` receives sum_jk w_j w_k [v_j = v_k].
template <class I, class T, class Out>
bool hard_ranks_bucketed(const Row<T>& row, const Stats<T>& s, bool want_ties, Out* out, double& ties, Workspace& ws) {
  Buckets<T, I> buckets{row, s, ws};
  if (!buckets.finite()) return false;
  buckets.lay();
  for (int round = 0; buckets.fullest > kCrowded; ++round) {
    const int before = buckets.fullest;
    if (round == kRefinements) return false;
    buckets.refine();
    if (buckets.fullest > kCrowded && 2 * buckets.fullest > before) return false;  // they tie
  }
  const int n = row.n;
  constexpr T inf = std::numeric_limits<T>::infinity();
  T* sorted = ws.sorted.need<T>(n + 2 * kMargin<T>) + kMargin<T>;
  std::fill_n(sorted - kMargin<T>, kMargin<T>, -inf);
  for (int k = 0; k < n; ++k) sorted[buckets.position[k] += buckets.start[buckets.number[k]]] = row.values[k];
  std::fill_n(sorted + s.count, n + kMargin<T> - s.count, inf);
  ties = !s.uniform  ? ranks_by_weight(buckets, sorted, out)
         : want_ties ? ranks_by_count<true>(buckets, sorted, out)
                     : ranks_by_count<false>(buckets, sorted, out);
  return true;
}

// Returns sum_jk w_j w_k [v_j = v_k] if want_ties, otherwise anything.
template <class T, class Out, class Workplace>
double hard_ranks(const Core<T>&, const Row<T>& row, const Stats<T>& s, bool want_ties, Out* out, Workplace& work) {
  double ties = 0;
  if (s.high > s.low) {
    const bool narrow = kBucketsPerValue * row.n + 32 < std::numeric_limits<std::uint16_t>::max();
    const auto bucketed =
        narrow ? hard_ranks_bucketed<std::uint16_t, T, Out> : hard_ranks_bucketed<std::uint32_t, T, Out>;
    if (bucketed(row, s, want_ties, out, ties, work.ws)) return ties;
  }
  return hard_ranks_sorted(row, s, out, work.ws);
}

}  // namespace pcoherence::PCOH_ISA
