// Distances: which metrics come from products of features, and where products are not good enough.
// Shared by every backend; the same names as pcoherence/distances.py.
#pragma once

#include <cstdlib>

#include "options.h"

namespace pcoherence {

// How a metric comes from features. With products: |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, of the points themselves or of
// their directions, then factor * |a - b|^2 or, with root, |a - b|. The rest need every difference.
struct MetricTraits {
  bool products;    // otherwise a row kernel of its own, see cloud.cpp
  bool directions;  // of x / |x| instead of x
  bool root;
  double factor;
  // The gradient w.r.t. features is sum_j V_ij (x_i - c_j), where V = chain * (gradient w.r.t. the distance), with root
  // divided by the distance.
  double chain;
};
constexpr MetricTraits traits(Metric m) {
  switch (m) {
    case Metric::euclidean:
      return {.products = true, .directions = false, .root = true, .factor = 1, .chain = 1};
    case Metric::sqeuclidean:
      return {.products = true, .directions = false, .root = false, .factor = 1, .chain = 2};
    case Metric::cosine:  // 1 - cos = 1/2 |a/|a| - b/|b||^2, without the cancellation of 1 - cos
      return {.products = true, .directions = true, .root = false, .factor = 0.5, .chain = 1};
    case Metric::cityblock:  // V sign(x_i - c_j) instead
      return {.products = false, .directions = false, .root = false, .factor = 1, .chain = 1};
  }
  std::abort();  // not a value of the enumeration
}

template <class T>
struct Nearness;
// A pair with |a - b|^2 < distance * (|a|^2 + |b|^2) is measured by differences: the product form loses
// 1 / ratio of its digits. Below `gradient`, its gradient also leaves the products, which lose 1 / sqrt(ratio).
// float32: at most 4 bits of the distance and 6 bits of one pair's gradient are lost. float64 has more to spare, but
// not much of the distance: at temperature 1e-4 the gradient multiplies its error by 10^4, and 1e-9 is promised.
template <>
struct Nearness<float> {
  static constexpr float distance = 1.0f / 16, gradient = 1.0f / 4096;
};
template <>
struct Nearness<double> {
  static constexpr double distance = 1.0 / 64, gradient = 1.0 / (1 << 24);
};

}  // namespace pcoherence
