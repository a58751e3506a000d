// One anchor's row (../anchor.h) by one core.
#pragma once

#include "../anchor.h"
#include "soft_ranks.h"

namespace pcoherence::PCOH_ISA {
namespace {

// An anchor and the candidates but for `self`.
template <class T>
Outcome anchor_row(const Options& options, const CandidateWeights<T>& c, const AnchorRow<T>& a, std::int64_t self,
                   Workspace& ws) {
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
