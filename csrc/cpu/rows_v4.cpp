// Row kernels for x86-64-v4 (AVX-512).
#if defined(__x86_64__)
#include <immintrin.h>

#include "rows_prelude.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#endif

#define PCOH_ISA isa_v4
#define PCOH_AVX512
#define PCOH_ISA_NAME "v4"
#include "rows.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
