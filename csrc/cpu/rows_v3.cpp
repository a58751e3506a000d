// Row kernels for x86-64-v3 (AVX2 and FMA).
#if defined(__x86_64__)
#include "rows_prelude.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#endif

#define PCOH_ISA isa_v3
#define PCOH_ISA_NAME "v3"
#include "rows.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
