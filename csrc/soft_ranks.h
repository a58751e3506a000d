// The kernel sums behind soft ranks: which functions are summed, and the constants of the two fast
// algorithms (docs/mathematics.rst). Shared by every backend; the same names as pcoherence/soft_ranks.py.
//
//   sigmoid(t)  = 1 / (1 + exp(-t))                    R_j = sum_k w_k sigmoid(s_j - s_k)
//   slope(t)    = sigmoid(t) sigmoid(-t)               derivative of sigmoid, even in t
//   softplus(t) = log(1 + exp(t))                      cross_entropy's kernel, of which the sums take what is left
//                                                      without t * step(t): log(1 + exp(-|t|)), at most log 2
#pragma once

#include <cmath>

#include "inline.h"

namespace pcoherence {

inline constexpr double kLog2 = 0.69314718055994530942;  // softplus(0)

enum class Kernel { sigmoid, slope, softplus };

template <class T>
PCOH_INLINE T sigmoid(T t) {
  const T z = std::exp(-std::abs(t));
  return (t >= 0 ? T(1) : z) / (1 + z);
}

template <class T>
PCOH_INLINE T slope(T t) {
  const T z = std::exp(-std::abs(t));
  return z / ((1 + z) * (1 + z));
}

template <class T>
PCOH_INLINE T softplus(T t) {
  return (t > 0 ? t : T(0)) + std::log1p(std::exp(-std::abs(t)));
}

// What the infinite values of a row, which rank at its ends, weigh, and all others.
struct Ends {
  double below = 0, between = 0, above = 0;  // -inf, finite values, +inf

  PCOH_INLINE void add(double value, double weight) {
    (std::isfinite(value) ? between : value < 0 ? below : above) += weight;
  }
  // What counts to a value, given its sum over the finite ones; ties of infinities count 1/2.
  PCOH_INLINE double rank(double value, double sum) const {
    if (std::isfinite(value)) return below + sum;
    return value < 0 ? below / 2 : below + between + above / 2;
  }
};

// Above this range / temperature the positions saturate: neighbours that float32 can tell apart are already
// hundreds of temperatures away from each other, and exp would overflow long before.
inline constexpr double kMaxRange = 1e30;

struct Scaling {
  double per_distance;  // 1 / (mean * temperature)
  double range;         // of the row, in temperatures
};

// Of a row of distances from low to high. A mean of 0 or less is no unit (see over_mean in pcoherence/distances.py).
PCOH_INLINE Scaling scaling(double low, double high, double mean, double inverse_temperature) {
  double c = inverse_temperature / (mean > 0 ? mean : 1);
  const double spread = high - low;
  if (!(c * spread <= kMaxRange)) c = kMaxRange / spread;
  return {c, c * spread};
}

// Grid: bins of this width (in units of the temperature) hold polynomials of `order` terms in the local
// coordinate x in [-1, 1]. The kernels are analytic for |Im t| < pi, so the interpolation error falls like
// rho^-order with rho = pi/(width/2) + sqrt(1 + (pi/(width/2))^2) = 8.5 at width 1.5. Measured maximum error of
// (sigmoid, slope): order 8: 8e-8, 3e-7, what float32 can see; order 16: below 1e-11.
// 8 floats fill one 256-bit register, which sets the order; 1.5 is the widest bin that float32 allows with it.
inline constexpr double kBinWidth = 1.5;

template <class T>
struct GridOrder;
template <>
struct GridOrder<float> {
  static constexpr int order = 8;
  // Beyond this many temperatures sigmoid is 0 or 1 to within exp(-18) = 1.5e-8, a quarter of float32's epsilon.
  static constexpr double reach = 18.0;
};
template <>
struct GridOrder<double> {
  static constexpr int order = 16;
  static constexpr double reach = 34.5;  // exp(-34.5) = 1e-15
};

// The grid's memory grows with range / temperature; above this many bins a row is refused by method
// "grid"; with "auto", long before, it goes to the scan, or loses its empty bins.
inline constexpr int kMaxBins = 1 << 16;

// Scan: sigmoid and log1p as polynomials of this degree in z = exp(-|t|). The error of the slope falls
// like 5.83^-degree times degree^2: 16 gives 1e-10, 24 what float64 resolves. Multiples of 8 doubles, the widest
// register.
template <class T>
inline constexpr int kSeriesDegree = sizeof(T) == 4 ? 16 : 24;

}  // namespace pcoherence
