// Functions that host and device code share, and that the row kernels compile for several instruction sets.
#pragma once

#if defined(__CUDACC__)
#define PCOH_INLINE __host__ __device__ __forceinline__
#else
// Must be inlined: a caller may be compiled for another instruction set than the header it includes.
#define PCOH_INLINE inline __attribute__((always_inline))
#endif
