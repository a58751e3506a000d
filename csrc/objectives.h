// Losses of an anchor from its ranks, and their derivatives by these. The same names as pcoherence/objectives.py.
#pragma once

#include <cmath>
#include <limits>

#include "options.h"
#include "row.h"

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

// ---------------------------------------------------------------- of the residual r = F^S - F^T
// Its value phi(r) and slope phi'(r), which may take |r| <= resolution for 0. On numbers and on compiler vectors alike
// (a comparison selects by `?:`).

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

// ---------------------------------------------------------------- of a row
// For a group of lanes, see row.h. ranks: R [n], which become d loss / d F. teacher: F^T [n].

template <class Phi, class T, class G, class Row>
PCOH_DEVICE double residual_objective(G& g, const Row& row, const T* teacher, double weight, T* ranks) {
  const T per_weight = static_cast<T>(1 / weight);
  typename G::Sum loss;
  by_memory(g, ranks, [&](T* student) {
    each_candidate(g, row, [&](int k, auto w) {
      const auto r = G::get(student, k) * per_weight - G::get(teacher, k);
      loss.add(w * Phi::value(r));
      G::put(student, k, w * Phi::slope(r, kResolution<T>) * per_weight);
    });
  });
  return total(g, loss) / weight;
}

template <class T, class G, class Row>
PCOH_DEVICE double spearman(G& g, const Row& row, const T* teacher, double weight, T* ranks) {
  const T per_weight = static_cast<T>(1 / weight);
  typename G::Sum student_sum, teacher_sum, none;
  each_candidate(g, row, [&](int k, auto w) {
    const auto f = G::get(ranks, k) * per_weight;
    G::put(ranks, k, f);
    student_sum.add(w * f);
    teacher_sum.add(w * G::get(teacher, k));
  });
  const Triple sum = total(g, student_sum, teacher_sum, none);
  const T student_mean = static_cast<T>(sum.a / weight), teacher_mean = static_cast<T>(sum.b / weight);
  typename G::Sum student_square, teacher_square, product;
  each_candidate(g, row, [&](int k, auto w) {
    const auto f = G::get(ranks, k) - student_mean, t = G::get(teacher, k) - teacher_mean;
    student_square.add(w * f * f);
    teacher_square.add(w * t * t);
    product.add(w * f * t);
  });
  const Triple square = total(g, student_square, teacher_square, product);
  const double scale = std::sqrt(square.a) * std::sqrt(square.b);  // the root of their product may underflow
  constexpr double deviation = kSpearmanFloor * std::numeric_limits<T>::epsilon();
  constexpr double floor = deviation * deviation;
  const bool flat = !(square.a > weight * floor) || !(square.b > weight * floor);
  const double correlation = flat ? 0 : square.c / scale;
  const T by_teacher = flat ? T(0) : static_cast<T>(1 / scale);
  const T by_student = flat ? T(0) : static_cast<T>(correlation / square.a);
  each_candidate(g, row, [&](int k, auto w) {
    const auto f = G::get(ranks, k) - student_mean, t = G::get(teacher, k) - teacher_mean;
    G::put(ranks, k, w * (f * by_student - t * by_teacher));
  });
  return 1 - correlation;
}

template <class T, class G, class Row>
PCOH_APART double objective(G& g, Objective which, const Row& row, const T* teacher, double weight, T* ranks) {
  switch (which) {
    case Objective::mse:
      return residual_objective<Mse>(g, row, teacher, weight, ranks);
    case Objective::l1:
      return residual_objective<L1>(g, row, teacher, weight, ranks);
    case Objective::huber:
      return residual_objective<Huber>(g, row, teacher, weight, ranks);
    case Objective::spearman:
      return spearman(g, row, teacher, weight, ranks);
    case Objective::cross_entropy:
      break;  // not a function of the residuals: see student_stage()
  }
  PCOH_TRAP();
  return 0;
}

}  // namespace pcoherence
