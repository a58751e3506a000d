// Hard ranks of a row that is ordered by bucket, but not within buckets.
#pragma once

#include "core.h"

namespace pcoherence::PCOH_ISA {

// So many neighbours on either side are compared: all of a bucket that holds one more. Fuller buckets are compared
// apart: of 1.5 values on average, as in the middle of a normal distribution, 0.4 %.
inline constexpr int kWindow = 4;

// Values by buckets in ascending order.
template <class T>
struct Sorted {
  static constexpr int margin = 2 * lanes_v<T>;  // for a vector that begins in the row, and its window
  static_assert(margin >= kWindow + lanes_v<T>);

  const T* values;  // [-margin .. n + margin): -inf before 0, +inf from `count` on
  int n, count;     // of all, and of those that weigh

  // f(v, d), v the values that lie d places from those at p, |d| up to kWindow.
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
  static constexpr int lanes = lanes_v<T>;

  CountedRanks(const Row<T>& row, const Stats<T>& s, Workspace& ws)
      : stats_(s), scale_(late ? T(1) : T(0.5) / T(s.count)), ranks_(ws.sorted_ranks.need<T>(row.n + lanes)) {}

  template <class I>
  void arrange(const I*) {}

  void by_window(const Sorted<T>& sorted) {
    for (int p = 0; p < sorted.n; p += lanes) {
      const auto [excess, equal] = compare_with_neighbours(sorted, p);
      // Of place q all before the window are less: 2 #{less} + #{equal} = 2 q + 1 + excess.
      store(ranks_ + p, converted(2 * (numbers + p) + 1 + excess));
      if constexpr (want_ties) equal_ += numbers < sorted.count - p ? equal : 0;
    }
  }
  void by_all(const Sorted<T>& sorted, int begin, int end) {
    for (int p = begin; p < end; p += lanes) {
      const V own = load(sorted.values + p);
      Comparison c{};
      for (int i = begin; i < end; ++i) c.with(own, splat(sorted.values[i]));
      const auto mine = numbers < end - p;
      store(ranks_ + p, select(mine, converted(begin + end + c.excess), load(ranks_ + p)));
      if constexpr (want_ties) equal_ += mine ? c.equal - compare_with_neighbours(sorted, p).equal : 0;
    }
  }

  Out at(int position) const { return late ? Out(ranks_[position]) * 0.5 / stats_.count : Out(ranks_[position]); }
  double ties() const {
    const double weight = stats_.total / stats_.count;
    return double(sum_lanes(equal_)) * weight * weight;
  }

 private:
  using V = vec_t<T>;
  using I = ivec_t<T>;
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

  const Stats<T>& stats_;
  T scale_;
  T* ranks_;  // [n] F, or if `late` 2 F count
  const I numbers = lane_numbers<I>();
  I equal_{};
};

// Ranks of candidates that weigh anything. Only sums are taken, in float64, so that the smallest ranks keep their
// digits.
template <class T, class Out>
class WeighedRanks {
 public:
  static constexpr int lanes = 8;

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
    std::fill(weights_ - margin, weights_, T(0));
    std::fill(weights_ + n, weights_ + n + margin, T(0));
    std::fill(below_ - margin, below_, 0.0);
  }

  void by_window(const Sorted<T>& sorted) {
    for (int p = 0; p < sorted.n; p += lanes) {
      const auto [less, equal] = compare_with_neighbours(sorted, p);
      store(ranks_ + p, rank(load(below_ + p - kWindow), less, equal));
      ties_ += widened(load_as<Octet>(weights_ + p)) * equal;
    }
  }
  void by_all(const Sorted<T>& sorted, int begin, int end) {
    for (int p = begin; p < end; p += lanes) {
      Comparison c{};
      const dvec own = widened(load_as<Octet>(sorted.values + p));
      for (int i = begin; i < end; ++i) c.with(own, dvec{} + double(sorted.values[i]), dvec{} + double(weights_[i]));
      const OutOctet own_ranks = rank(dvec{} + below_[begin], c.less, c.equal);
      const dvec counted = compare_with_neighbours(sorted, p).equal;
      for (int i = 0; i < std::min(lanes, end - p); ++i) {
        ranks_[p + i] = own_ranks[i];
        ties_[i] += weights_[p + i] * (c.equal[i] - counted[i]);
      }
    }
  }

  Out at(int position) const { return ranks_[position]; }
  double ties() const { return sum_lanes(ties_); }

 private:
  using Octet = typename Simd<T>::octet;
  using OutOctet = typename Simd<Out>::octet;
  static constexpr double most = std::numeric_limits<double>::max();
  static constexpr int margin = Sorted<T>::margin;
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
  OutOctet rank(dvec before, dvec less, dvec equal) const {
    return __builtin_convertvector((before + less + equal * 0.5) * per_total_, OutOctet);
  }

  const Row<T>& row_;
  double per_total_;
  T* weights_;     // [-margin .. n + margin) as sorted
  double* below_;  // [-margin .. n) what all before a place weigh
  Out* ranks_;     // [n]
  dvec ties_{};
};

}  // namespace pcoherence::PCOH_ISA
