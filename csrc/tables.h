// Constants of the two algorithms, computed once in long double: no literals to trust.
#pragma once

#include <array>

#include "soft_ranks.h"

namespace pcoherence {

template <class T>
struct GridTable {
  static constexpr int order = GridOrder<T>::order;
  // Bins farther apart are beyond reach for every pair of their points: as many bins lie between.
  static constexpr int bins_in_reach = static_cast<int>(GridOrder<T>::reach / kBinWidth);
  static_assert(bins_in_reach * kBinWidth == GridOrder<T>::reach);

  // [order (r), order (q)]: coefficients of x^q y^r for bins that differ by `difference`, |difference| <=
  // bins_in_reach.
  const T* at(int difference) const {
    return values.data() + static_cast<std::size_t>(difference + bins_in_reach) * order * order;
  }
  alignas(64) std::array<T, (2 * bins_in_reach + 1) * order * order> values;  // as vectors are loaded
};

// The table of `kernel`, built on first use (thread-safe), then shared.
template <class T>
const GridTable<T>& grid_table(Kernel kernel);

// On z in [0, 1]: 1 / (1 + z) = 1 + sum_m sigmoid[m - 1] z^m, exact at both ends;
//                 log(1 + z) = sum_m softplus[m - 1] z^m, m = 1, ..., kSeriesDegree<T>.
template <class T>
struct Series {
  double sigmoid[kSeriesDegree<T>];
  double softplus[kSeriesDegree<T>];
};
template <class T>
const Series<T>& series();

}  // namespace pcoherence
