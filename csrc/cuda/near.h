// Weights of a neighbourhood, and ranks under them, without a table: where everybody has a place of his own they are
// sums of 1 / (H + j + 1/2) over the places j = 0, 1, ..., H = h count, and these are differences of digamma.
#pragma once

#include <cmath>

#include "../near.h"
#include "group.h"

namespace pcoherence::cuda {

// See NearTable in ../near.h.
template <class T>
struct NearSums {
  bool available;  // whether the sums hold to T's last digit
  double total;    // of the weights
  int count;
  T offset, slope, per_rank;  // a weight is 1 / (offset + slope F), F = per_rank (i + 1) at place i
  T h, per_h, at_zero, per_sum;

  PCOH_DEVICE NearSums(int count, double offset, double slope)
      : count(count), offset(T(offset)), slope(T(slope)), per_rank(T(0.5) / T(count)) {
    const double begin = offset / slope * count;
    // The first term that correction() leaves out, over a sum of at least log 2, is then below epsilon / 8.
    constexpr double enough = sizeof(T) == 4 ? 32 : 256;
    available = begin >= enough;
    const double sum = std::log1p(slope / offset) + correction(1 / (begin + count)) - correction(1 / begin);
    total = sum * count / slope;
    h = T(begin);
    per_h = T(1 / begin);
    at_zero = T(correction(1 / begin));
    per_sum = T(1 / sum);
  }

  PCOH_DEVICE T weight(int i) const {
    return i < 2 * count - 1 ? reciprocal(offset + slope * (per_rank * T(i + 1))) : T(0);
  }
  // What is below, and half of one's own; of a place that two share, all of it: one is below, or half of both.
  PCOH_DEVICE T rank(int i) const {
    const T below = T(i / 2), x = h + below, own = (i % 2 == 0 ? T(0.5) : T(1)) * reciprocal(h + T(i + 1) / 2);
    return (std::log1p(below * per_h) + (correction(reciprocal(x)) - at_zero) + own) * per_sum;
  }

 private:
  // digamma(x + 1/2) - log x, y = 1 / x
  template <class V>
  static PCOH_DEVICE V correction(V y) {
    const V square = y * y;
    return square * (V(1) / 24 - square * (V(7) / 960));
  }
};

}  // namespace pcoherence::cuda
