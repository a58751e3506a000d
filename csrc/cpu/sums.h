// The row that Grid, Scan and Pairs sum over (grid.h, scan.h, pairs.h).
#pragma once

#include "simd.h"

namespace pcoherence::PCOH_ISA {

// s = value / temperature. Sums go by differences of the values as they are given, or by positions in float64: taken
// from the lowest value in T, a position would lose the digits that tell apart what lies close together far away.
template <class T>
struct SumsRow {
  const T* values;   // [n], finite
  const T* weights;  // [n]
  int n;             // a multiple of the lane count
  T low;             // smallest value that counts
  Scaling scale;

  double temperatures(std::uint32_t from, std::uint32_t to) const {
    return (double(values[to]) - double(values[from])) * scale.per_distance;
  }
  double position(std::uint32_t k) const { return (double(values[k]) - double(low)) * scale.per_distance; }
};

}  // namespace pcoherence::PCOH_ISA
