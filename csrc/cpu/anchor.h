// One anchor's row (../anchor.h) by one core.
#pragma once

#include "../anchor.h"
#include "soft_ranks.h"

namespace pcoherence::PCOH_ISA {
namespace {

// The candidates of an anchor: all but `self`.
template <class T>
Row<T> row_of(const CandidateWeights<T>& c, std::int64_t self, Workplace<T>& work) {
  const int n = static_cast<int>(padded(c.n));
  if (self < 0) return {c.weights, n, c.weighed};
  T* weights = work.take(n);
  std::memcpy(weights, c.weights, sizeof(T) * n);
  weights[self] = 0;
  if (!c.weighed.uniform) return {weights, n, weigh(weights, n)};
  Weighed weighed = c.weighed;
  if (c.weights[self] > 0) {
    weighed.total = weighed.total / weighed.count * (weighed.count - 1);
    --weighed.count;
  }
  return {weights, n, weighed};
}

template <class T>
Outcome anchor_of(const Options& options, const CandidateWeights<T>& c, const AnchorRow<T>& a, std::int64_t self,
                  Workspace& ws) {
  Core<T> core;
  Workplace<T> work{options.method, ws};
  const Row<T> row = row_of(c, self, work);
  return anchor(core, options, a, row, work);
}

}  // namespace
}  // namespace pcoherence::PCOH_ISA
