// Hard ranks of a row whose values lie in ascending order but for those of one bucket.
#pragma once

#include "core.h"

namespace pcoherence::PCOH_ISA {

// Every value is compared with so many neighbours on either side: all of its bucket where that holds one more. The few
// buckets that hold more are compared apart: of 1.5 values on average, as in the middle of a normal distribution, 0.4
// %.
inline constexpr int kWindow = 4;
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

}  // namespace pcoherence::PCOH_ISA
