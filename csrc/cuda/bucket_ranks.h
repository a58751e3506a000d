// What comes before a candidate of a row that is ordered by bucket, and what equals it: as numbers whose sum no order
// of additions changes.
#pragma once

#include "buckets.h"

namespace pcoherence::cuda {

// A Ranks says what candidates amount to, once they lie in the order of their buckets:
//   put(i, k)                 candidate k went to place i of the window
//   beside(i)                 what is kept of place i, which moves with its value: an empty type where nothing is
//   add_up(g, earlier)        the window's are all in their order, and earlier windows' amount to that; returns all
//   before(first, i)          what all amount to that come before place i of the window that begins at `first`
//   between(i, j)             those at places i, ..., j - 1
//   rank(before, equal)       of a candidate: what those amount to that come before it, and that equal it
//   tie(k, equal)  ties(sum)  candidate k's part of sum_jk w_j w_k [v_j = v_k], and all of it

// Candidates that all weigh the same are counted.
template <class T, class Out>
class CountedRanks {
 public:
  using Amount = int;
  using Tie = int;  // at most kFullest a value
  struct Beside {};
  static constexpr int place_bytes = 0;

  static PCOH_DEVICE bool possible(const Stats<T>&) { return true; }
  PCOH_DEVICE CountedRanks(const Row<T>&, const Stats<T>& s, Arena&, int)
      : weight_(s.total / s.count), scale_(Out(0.5) / Out(s.count)) {}
  template <class G>
  PCOH_DEVICE bool in_fast(const G&) const {
    return true;
  }
  template <bool, class G>
  PCOH_DEVICE const CountedRanks& known(const G&) const {
    return *this;
  }

  template <class G>
  PCOH_DEVICE void clear(G&) const {}
  PCOH_DEVICE void put(int, int) const {}
  PCOH_DEVICE Beside* beside(int) const { return nullptr; }
  template <class G>
  PCOH_DEVICE Amount add_up(G&, Amount) const {
    return 0;
  }

  PCOH_DEVICE Amount before(int first, int i) const { return first + i; }
  PCOH_DEVICE Amount between(int i, int j) const { return j - i; }
  PCOH_DEVICE Out rank(Amount before, Amount equal) const { return Out(2 * before + equal) * scale_; }
  PCOH_DEVICE Tie tie(int, Amount equal) const { return equal; }
  PCOH_DEVICE double ties(double pairs) const { return pairs * weight_ * weight_; }

 private:
  double weight_;  // of one
  Out scale_;
};

// In neighbourhoods that are smaller, weights tell ranks apart that WeighedRanks rounds to one.
inline constexpr double kSortedShare = 0x1p-20;

// Weights of any size, as whole numbers of 2^-60 of their sum: these add up to the same in any order, and 64 bits hold
// twice all of them.
template <class T, class Out>
class WeighedRanks {
 public:
  using Amount = unsigned long long;
  using Tie = double;
  using Beside = Amount;
  static constexpr int place_bytes = sizeof(Amount);
  // Memory for a window.
  static constexpr std::int64_t bytes(std::int64_t window) { return places(window) * place_bytes + 16; }

  // Not where what a weight is multiplied by is more than a number holds.
  static PCOH_DEVICE bool possible(const Stats<T>& s) { return all / s.total <= std::numeric_limits<double>::max(); }
  PCOH_DEVICE WeighedRanks(const Row<T>& row, const Stats<T>& s, Arena& arena, int window)
      : weights_(row.weights), per_weight_(all / s.total), places_(static_cast<int>(places(window))) {
    amounts_ = arena.take<Amount>(places_);
  }
  template <class G>
  PCOH_DEVICE bool in_fast(const G& g) const {
    return g.in_fast(amounts_);
  }
  template <bool fast, class G>
  PCOH_DEVICE WeighedRanks known(const G& g) const {
    WeighedRanks other = *this;
    other.amounts_ = at<fast>(g, amounts_);
    return other;
  }

  // Places of a window's buckets alone are written.
  template <class G>
  PCOH_DEVICE void clear(G& g) const {
    Amount* amounts = amounts_;
    each(g, places_, [=](int i) { amounts[i] = 0; });
    g.sync();
  }
  PCOH_DEVICE void put(int i, int k) const {
    amounts_[i] = static_cast<Amount>(double(weights_[k]) * per_weight_ + 0.5);
  }
  PCOH_DEVICE Beside* beside(int i) const { return amounts_ + i; }
  template <class G>
  PCOH_APART Amount add_up(G& g, Amount earlier) const {
    Amount* amounts = amounts_;
    const Amount own = running_sums(
        g, places_, [=](int i) { return amounts[i]; }, [=](int i, Amount before) { amounts[i] = earlier + before; });
    g.sync();
    return earlier + own;
  }

  PCOH_DEVICE Amount before(int, int i) const { return amounts_[i]; }
  PCOH_DEVICE Amount between(int i, int j) const { return amounts_[j] - amounts_[i]; }
  PCOH_DEVICE Out rank(Amount before, Amount equal) const { return Out(double(2 * before + equal) * (0.5 / all)); }
  PCOH_DEVICE Tie tie(int k, Amount equal) const { return double(weights_[k]) * double(equal); }
  PCOH_DEVICE double ties(double sum) const { return sum / per_weight_; }

 private:
  static constexpr double all = 0x1p60;
  // A bucket that begins within the window may end beyond; and the end of the last.
  static constexpr std::int64_t places(std::int64_t window) { return window + kFullest + 1; }

  const T* weights_;  // [n]
  double per_weight_;
  int places_;
  Amount* amounts_;  // [places_] what each amounts to, then what all before it do
};

}  // namespace pcoherence::cuda
