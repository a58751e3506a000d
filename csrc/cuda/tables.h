// The constants of csrc/tables.h in device memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../tables.h"

namespace pcoherence::cuda {

template <class T>
struct DeviceGrid {
  static constexpr int order = GridOrder<T>::order;
  static constexpr int reach = GridTable<T>::bins_in_reach;
  // Of bins farther apart than this, half of the terms are enough: they err by up to 5e-8 (64-bit: 6e-13) of the
  // kernel, less than all terms do of bins side by side (8e-8, 1e-11).
  static constexpr int near = 7;
  static constexpr std::int64_t size = (2 * reach + 1) * order * order;
};

template <class T>
struct DeviceTables {
  // [2 * reach + 1, order (q), order (r)] each: what GridTable has, but a thread loads the terms of its own q
  const T *sigmoid, *slope, *softplus;
  const double *sigmoid_series, *softplus_series;  // [kSeriesDegree<T>] each: see Series
};

// Half of the terms of a polynomial in x from -1 to 1, c [order, stride]: the others, from the last on, are replaced by
// the Chebyshev polynomial's that vanishes with them.
template <int order>
void halve_terms(double* c, int stride) {
  double chebyshev[order][order] = {};
  chebyshev[0][0] = chebyshev[1][1] = 1;
  for (int k = 2; k < order; ++k)
    for (int j = 0; j <= k; ++j) chebyshev[k][j] = (j > 0 ? 2 * chebyshev[k - 1][j - 1] : 0) - chebyshev[k - 2][j];
  for (int k = order - 1; k >= order / 2; --k) {
    const double share = c[k * stride] / chebyshev[k][k];
    for (int j = 0; j <= k; ++j) c[j * stride] -= share * chebyshev[k][j];
    c[k * stride] = 0;
  }
}

// One of DeviceTables, on the host. Returns its end.
template <class T>
T* copy_table(Kernel kernel, T* out) {
  using Grid = DeviceGrid<T>;
  constexpr int order = Grid::order;
  for (int difference = -Grid::reach; difference <= Grid::reach; ++difference) {
    double terms[order * order];
    std::copy_n(grid_table<T>(kernel).at(difference), order * order, terms);
    if (difference < -Grid::near || difference > Grid::near) {
      for (int i = 0; i < order; ++i) halve_terms<order>(terms + i, order);
      for (int i = 0; i < order; ++i) halve_terms<order>(terms + i * order, 1);
    }
    for (int q = 0; q < order; ++q)
      for (int r = 0; r < order; ++r) *out++ = static_cast<T>(terms[r * order + q]);
  }
  return out;
}

}  // namespace pcoherence::cuda
