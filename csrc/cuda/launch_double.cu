#include "kernels.h"

namespace pcoherence::cuda {
PCOH_INSTANTIATE(double)
}
