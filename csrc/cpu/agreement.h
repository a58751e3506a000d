// How far two rows of distances order the same candidates alike: exact, hard, n log n.
#pragma once

#include <cstdint>
#include <vector>

namespace pcoherence {

struct Agreement {
  double kendall = 0;   // tau-b: (concordant - discordant) / sqrt((pairs - ties in a) (pairs - ties in b))
  double spearman = 0;  // correlation of mid-ranks
  double overlap = 0;   // share of the `nearest` nearest that both have in common; ties go to the lower index
};

// Scratch of one thread.
struct AgreementScratch {
  std::vector<std::int32_t> by_a, by_b, merged;
  std::vector<double> rank_a, rank_b;
};

// a, b: [n]; self: candidate left out, or -1. Correlations are 0 where a or b is constant, everything is NaN where a
// value is not finite.
template <class T>
Agreement rank_agreement(const T* a, const T* b, std::int64_t n, std::int64_t self, std::int64_t nearest,
                         AgreementScratch& scratch);

}  // namespace pcoherence
