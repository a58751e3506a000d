// Losses of an anchor from its ranks, and their derivatives by these.
#pragma once

#include "soft_ranks.h"

namespace pcoherence::PCOH_ISA {
namespace {

// Loss of one anchor from its ranks; residuals[j] = d loss / d F_j.
template <class Phi, class T>
double residual_objective(const T* student, const T* teacher, const T* weights, double total, int n, T* residuals) {
  Sum loss;
  const T per_weight = static_cast<T>(1 / total);
  for (int k = 0; k < n; k += lanes_v<T>) {
    const auto r = load(student + k) - load(teacher + k), w = load(weights + k);
    loss.add(w * Phi::value(r));
    store(residuals + k, w * Phi::slope(r, kResolution<T>) * per_weight);
  }
  return loss.total() / total;
}

template <class T>
double spearman(const T* student, const T* teacher, const T* weights, double total, int n, T* residuals) {
  Sum student_sum, teacher_sum;
  for (int k = 0; k < n; k += lanes_v<T>) {
    student_sum.add(load(weights + k) * load(student + k));
    teacher_sum.add(load(weights + k) * load(teacher + k));
  }
  const T student_mean = static_cast<T>(student_sum.total() / total);
  const T teacher_mean = static_cast<T>(teacher_sum.total() / total);
  Sum student_square, teacher_square, product;
  for (int k = 0; k < n; k += lanes_v<T>) {
    const auto f = load(student + k) - student_mean, t = load(teacher + k) - teacher_mean, w = load(weights + k);
    student_square.add(w * f * f);
    teacher_square.add(w * t * t);
    product.add(w * f * t);
  }
  const double scale = std::sqrt(student_square.total() * teacher_square.total());
  constexpr double deviation = kSpearmanFloor * std::numeric_limits<T>::epsilon();
  constexpr double floor = deviation * deviation;
  const bool flat = !(student_square.total() > total * floor) || !(teacher_square.total() > total * floor);
  const double correlation = flat ? 0 : product.total() / scale;
  const T by_teacher = flat ? T(0) : static_cast<T>(1 / scale);
  const T by_student = flat ? T(0) : static_cast<T>(correlation / student_square.total());
  for (int k = 0; k < n; k += lanes_v<T>) {
    const auto f = load(student + k) - student_mean, t = load(teacher + k) - teacher_mean;
    store(residuals + k, load(weights + k) * (f * by_student - t * by_teacher));
  }
  return 1 - correlation;
}

template <class T>
double objective(Objective which, const T* student, const T* teacher, const T* weights, double total, int n,
                 T* residuals) {
  switch (which) {
    case Objective::mse:
      return residual_objective<Mse>(student, teacher, weights, total, n, residuals);
    case Objective::l1:
      return residual_objective<L1>(student, teacher, weights, total, n, residuals);
    case Objective::huber:
      return residual_objective<Huber>(student, teacher, weights, total, n, residuals);
    case Objective::spearman:
      return spearman(student, teacher, weights, total, n, residuals);
    case Objective::cross_entropy:
      break;  // not a function of the residuals: see anchor()
  }
  std::abort();
}

// Sum of w_j s_j (2 F_j - 1) over the row, s in temperatures: the linear part of cross_entropy, divided by W. What is
// left of it after softplus_total may be a small fraction. levels: where ranks are multiples of 1 / levels, their
// rounding can be undone; otherwise 0.
template <class T>
double linear_part(const SumsRow<T>& row, const T* ranks, int levels) {
  double total = 0;
  for (int k = 0; k < row.n; ++k) {
    const double rank = levels > 0 ? std::nearbyint(double(ranks[k]) * levels) / levels : double(ranks[k]);
    total += double(row.weights[k]) * row.position(k) * (2 * rank - 1);
  }
  return total;
}

}  // namespace
}  // namespace pcoherence::PCOH_ISA
