// Objectives on the residual of ranks r = F^S - F^T: value phi(r) and slope phi'(r).
// slope(r, resolution) may take |r| <= resolution for 0. Policies on numbers and on compiler vectors alike (a
// comparison selects by `?:`), for host and device. The same names as pcoherence/objectives.py.
#pragma once

#include "inline.h"

namespace pcoherence {

// F lies in (0, 1): with the usual 1 the linear part would never be reached. A power of two: exact in any dtype.
inline constexpr float kHuberDelta = 0.125f;

// Residuals up to this size may be nothing but the error of the kernel sums. It is far below 1 / (2 n), by which
// hard ranks differ, for every n in reach.
template <class T>
inline constexpr T kResolution = sizeof(T) == 4 ? T(0x1p-22) : T(0x1p-36);

// Where all ranks of a row are equal, rounding leaves a standard deviation of about epsilon: below this many epsilons
// there is no direction to correlate with, and spearman is 1.
inline constexpr double kSpearmanFloor = 8.0;

struct Mse {
  template <class V>
  static PCOH_INLINE V value(V r) {
    return r * r;
  }
  template <class V, class E>
  static PCOH_INLINE V slope(V r, E) {
    return r + r;
  }
};

struct L1 {
  template <class V>
  static PCOH_INLINE V value(V r) {
    return r < V{} ? -r : r;
  }
  template <class V, class E>
  static PCOH_INLINE V slope(V r, E resolution) {
    const V one = V{} + 1, zero{};
    return r < zero - resolution ? -one : (r > zero + resolution ? one : zero);
  }
};

struct Huber {
  template <class V>
  static PCOH_INLINE V value(V r) {
    const V size = L1::value(r), delta = V{} + kHuberDelta;
    return size <= delta ? r * r / 2 : delta * (size - delta / 2);
  }
  template <class V, class E>
  static PCOH_INLINE V slope(V r, E) {
    const V delta = V{} + kHuberDelta;
    return r < -delta ? -delta : (r > delta ? delta : r);
  }
};

}  // namespace pcoherence
