// Weights in a neighbourhood by place: where a candidate stands among those that weigh something.
#pragma once

#include "anchor_row.h"
#include "inline.h"

namespace pcoherence {

// w_j / (1 + F_j / h) = h w_j / (h + F_j), but for a factor, on which nothing depends: so chosen that no h under- or
// overflows.
template <class T>
struct NearDivisor {
  T offset, slope;

  PCOH_DEVICE explicit NearDivisor(double h)
      : offset(static_cast<T>(h / (h + 0.5))), slope(static_cast<T>(1 / (h + 0.5))) {}
  template <class V>
  PCOH_DEVICE V operator()(V rank) const {
    return offset + rank * slope;
  }
};

// Of `count` candidates, by place as twice_place() numbers them, [2 count]: weights in the neighbourhood, and the ranks
// under such weights if everybody has a place of his own. A workplace's NearTable has  available  whether it knows the
// ranks  total  of the weights  weight(i)  rank(i).
template <class T>
struct NearTable {
  const T *weights, *ranks;
  double total;
  static constexpr bool available = true;

  PCOH_DEVICE T weight(int i) const { return weights[i]; }
  PCOH_DEVICE T rank(int i) const { return ranks[i]; }
};

// Up to this many candidates of equal weights, T tells apart twice their hard ranks, which are whole numbers.
template <class T>
inline constexpr int kWholeRanks = sizeof(T) == 4 ? 1 << 20 : 1 << 28;

// 2 F count for the hard rank F of a candidate, less 1: from 0 to 2 count - 2; of weight 0 it is 2 count - 1.
template <class T, class Row>
PCOH_DEVICE int twice_place(const Row& row, const T* ranks, int k, int count) {
  const int twice = static_cast<int>(ranks[k] * T(2 * count) - T(0.5)), last = 2 * count - 2;
  return row.weight(k) > 0 ? (twice < last ? twice : last) : last + 1;
}

// Pairs (j, k) of equal weights, j not k, that tie: from sum_jk w_j w_k of those that do, j = k included.
PCOH_DEVICE double tied_pairs(const Weighed& weighed, double ties) {
  const double count = weighed.count;
  return ties * count * count / (weighed.total * weighed.total) - count;
}

}  // namespace pcoherence
