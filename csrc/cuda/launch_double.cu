#include "kernels.h"

namespace pcoherence::cuda {
PCOH_INSTANTIATE(double)
PCOH_INSTANTIATE_SOFT_RANK
}  // namespace pcoherence::cuda
