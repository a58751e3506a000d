// Distances: which metrics come from products of features, and where products are not good enough.
// Shared by every backend; the same names as pcoherence/distances.py.
#pragma once

#include "spec.h"

namespace pcoherence {

// euclidean, sqeuclidean and cosine are functions of |a - b|^2 = |a|^2 + |b|^2 - 2 a.b
// (cosine: 1/2 |a/|a| - b/|b||^2); cityblock needs every difference.
constexpr bool from_products(Metric m) { return m != Metric::cityblock; }

template <class T>
struct Nearness;
// A pair with |a - b|^2 < distance * (|a|^2 + |b|^2) is measured by differences: the product form loses
// 1 / ratio of its digits. Below `gradient`, its gradient also leaves the products, which lose 1 / sqrt(ratio).
// float32: at most 4 bits of the distance and 6 bits of one pair's gradient are lost; float64 has them to spare.
template <>
struct Nearness<float> {
  static constexpr float distance = 1.0f / 16, gradient = 1.0f / 4096;
};
template <>
struct Nearness<double> {
  static constexpr double distance = 1.0 / 4096, gradient = 1.0 / (1 << 24);
};

}  // namespace pcoherence
