// Row kernels for the baseline of the platform's ABI.
#include "rows_prelude.h"

#define PCOH_ISA isa_default
#define PCOH_ISA_NAME "default"
#include "rows.inc"
