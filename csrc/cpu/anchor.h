// One anchor's row (../anchor.h) by one core.
#pragma once

#include "../anchor.h"
#include "soft_ranks.h"

namespace pcoherence::PCOH_ISA {
namespace {

// Beside what anchor() takes of T: weights without the anchor itself, and a row of doubles or of places.
static_assert(Workspace::kRows >= kAnchorRows + 2);

template <class To, class From>
To* copied(Buffer& buffer, const From* from, int n) {
  To* to = buffer.need<To>(n);
  for (int k = 0; k < n; ++k) to[k] = static_cast<To>(from[k]);
  return to;
}

template <class T>
Weighed weigh_row(const T* weights, std::int64_t n) {
  return weigh(Core<T>{}, Row<T>{weights, static_cast<int>(padded(n))});
}

// An anchor and the candidates but for `self`.
template <class T>
Outcome anchor_row(const Options& options, const CandidateWeights<T>& c, const AnchorRow<T>& a, std::int64_t self,
                   Workspace& ws);

// In float64: the cross entropy of soft comparisons is a small difference, to the last digit, of what float32 rounds.
inline Outcome anchor_row_in_double(const Options& options, const CandidateWeights<float>& c, const AnchorRow<float>& a,
                                    std::int64_t self, Workspace& ws) {
  const int n = static_cast<int>(padded(c.n));
  double* student = copied<double>(ws.wide[0], a.student, n);
  const AnchorRow<double> wide{.student = student,
                               .teacher = copied<double>(ws.wide[1], a.teacher, n),
                               .gradient = a.gradient != nullptr ? student : nullptr,
                               .coefficient = a.coefficient,
                               .chain = a.chain,
                               .chain_root = a.chain_root,
                               .student_unit = a.student_unit,
                               .teacher_unit = a.teacher_unit};
  const CandidateWeights<double> weights{c.n, copied<double>(ws.wide[2], c.weights, n), c.weighed};
  const Outcome result = anchor_row(options, weights, wide, self, ws);
  if (a.gradient != nullptr)
    for (int k = 0; k < n; ++k) a.gradient[k] = static_cast<float>(student[k]);
  return result;
}

template <class T>
Outcome anchor_row(const Options& options, const CandidateWeights<T>& c, const AnchorRow<T>& a, std::int64_t self,
                   Workspace& ws) {
  if constexpr (sizeof(T) < sizeof(double))
    if (options.objective == Objective::cross_entropy && options.soft_teacher())
      return anchor_row_in_double(options, c, a, self, ws);
  Core<T> core;
  Workplace<T> work{options.method, ws};
  Row<T> row{c.weights, static_cast<int>(padded(c.n))};
  Weighed weighed = c.weighed;
  if (self >= 0) {
    T* weights = work.take(row.n);
    std::memcpy(weights, c.weights, sizeof(T) * row.n);
    weights[self] = 0;
    row.weights = weights;
    if (!weighed.uniform) {
      weighed = weigh(core, row);
    } else if (c.weights[self] > 0) {
      weighed.total = weighed.total / weighed.count * (weighed.count - 1);
      --weighed.count;
    }
  }
  return anchor(core, options, a, row, weighed, work);
}

}  // namespace
}  // namespace pcoherence::PCOH_ISA
