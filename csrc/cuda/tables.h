// The constants of csrc/tables.h in device memory.
#pragma once

#include "../tables.h"

namespace pcoherence::cuda {

template <class T>
struct DeviceTables {
  // [2 * bins_in_reach + 1, order (r), order (q)] each: see GridTable
  const T *sigmoid, *slope, *softplus;
  const double *sigmoid_series, *softplus_series;  // [kSeriesDegree<T>] each: see Series
};

}  // namespace pcoherence::cuda
