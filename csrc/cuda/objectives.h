// Losses of an anchor from its ranks, and their derivatives by these: what csrc/cpu/objectives.h does.
#pragma once

#include "../objectives.h"
#include "soft_ranks.h"

namespace pcoherence::cuda {

struct Triple {
  double a, b, c;
  friend PCOH_DEVICE Triple operator+(const Triple& x, const Triple& y) { return {x.a + y.a, x.b + y.b, x.c + y.c}; }
};

// Loss of one anchor from its ranks R [n], which become d loss / d F.
template <class Phi, class T, class G>
PCOH_DEVICE double residual_objective(G& g, const RowView<T>& row, const T* teacher, double weight, T* ranks) {
  const T per_weight = static_cast<T>(1 / weight);
  double loss = 0;
  by_memory(g, ranks, [&](T* student) {
    with_weights(row, [&](auto weight_of) {
      each(g, row.n, [&](int k) {
        const T r = student[k] * per_weight - teacher[k], w = weight_of(k);
        loss += double(w * Phi::value(r));
        student[k] = w * Phi::slope(r, kResolution<T>) * per_weight;
      });
    });
  });
  return total(g, loss) / weight;
}

template <class T, class G>
PCOH_DEVICE double spearman(G& g, const RowView<T>& row, const T* teacher, double weight, T* ranks) {
  const T per_weight = static_cast<T>(1 / weight);
  Triple sum{};
  each(g, row.n, [&](int k) {
    ranks[k] *= per_weight;
    sum.a += double(row.weight(k)) * double(ranks[k]);
    sum.b += double(row.weight(k)) * double(teacher[k]);
  });
  sum = total(g, sum);
  const T student_mean = static_cast<T>(sum.a / weight), teacher_mean = static_cast<T>(sum.b / weight);
  Triple square{};  // of the student, of the teacher, their product
  each(g, row.n, [&](int k) {
    const T f = ranks[k] - student_mean, t = teacher[k] - teacher_mean, w = row.weight(k);
    square = square + Triple{double(w * f * f), double(w * t * t), double(w * f * t)};
  });
  square = total(g, square);
  const double scale = std::sqrt(square.a * square.b);
  constexpr double deviation = kSpearmanFloor * std::numeric_limits<T>::epsilon();
  constexpr double floor = deviation * deviation;
  const bool flat = !(square.a > weight * floor) || !(square.b > weight * floor);
  const double correlation = flat ? 0 : square.c / scale;
  const T by_teacher = flat ? T(0) : static_cast<T>(1 / scale);
  const T by_student = flat ? T(0) : static_cast<T>(correlation / square.a);
  each(g, row.n, [&](int k) {
    const T f = ranks[k] - student_mean, t = teacher[k] - teacher_mean;
    ranks[k] = row.weight(k) * (f * by_student - t * by_teacher);
  });
  return 1 - correlation;
}

template <class T, class G>
PCOH_APART double objective(G& g, Objective which, const RowView<T>& row, const T* teacher, double weight, T* ranks) {
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
      break;  // not a function of the residuals: see anchor_row()
  }
  PCOH_TRAP();
  return 0;
}

// Sum of w_j s_j (2 F_j - 1) over the row, s in temperatures: the linear part of cross_entropy, divided by W.
template <class T, class G>
PCOH_APART double linear_part(G& g, const RowView<T>& row, double unit, const T* ranks) {
  double sum = 0;
  with_weights(row, [&](auto weight) {
    each(g, row.n, [&, values = row.values](int k) {
      sum += double(weight(k)) * double(values[k]) * (2 * double(ranks[k]) - 1);
    });
  });
  return total(g, sum) * unit;
}

}  // namespace pcoherence::cuda
