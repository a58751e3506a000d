// Functions that host and device code share, and that the row kernels compile for several instruction sets.
#pragma once

#if defined(__CUDACC__)
#define PCOH_INLINE __host__ __device__ __forceinline__
#define PCOH_DEVICE __device__ inline
// A function of its own: what several kernels need, or a path that is rarely taken, is compiled once.
#define PCOH_APART __device__ __noinline__
#define PCOH_UNROLL _Pragma("unroll")
#define PCOH_ROLLED _Pragma("unroll 1")
#define PCOH_TRAP() __trap()
#else
#include <cstdlib>
// Must be inlined: a caller may be compiled for another instruction set than the header it includes.
#define PCOH_INLINE inline __attribute__((always_inline))
#define PCOH_DEVICE inline
#define PCOH_APART inline
#define PCOH_UNROLL
#define PCOH_ROLLED
#define PCOH_TRAP() std::abort()
#endif
// What other files than a library's own may call: its users, and the tests.
#define PCOH_EXPORT __attribute__((visibility("default")))
