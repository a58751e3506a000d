// Objectives on the residual of ranks r = F^S - F^T: value phi(r) and slope phi'(r).
// Policies on numbers and on compiler vectors alike (a comparison selects by `?:`), for host and device.
// The same names as pcoherence/objectives.py.
#pragma once

#if defined(__CUDACC__)
#define PCOH_INLINE __host__ __device__ __forceinline__
#else
// Must be inlined: a caller may be compiled for another instruction set than this header.
#define PCOH_INLINE inline __attribute__((always_inline))
#endif

namespace pcoherence {

// F lies in (0, 1): with the usual 1 the linear part would never be reached. A power of two: exact in any dtype.
inline constexpr float kHuberDelta = 0.125f;

struct Mse {
  template <class V>
  static PCOH_INLINE V value(V r) {
    return r * r;
  }
  template <class V>
  static PCOH_INLINE V slope(V r) {
    return r + r;
  }
};

struct L1 {
  template <class V>
  static PCOH_INLINE V value(V r) {
    return r < V{} ? -r : r;
  }
  template <class V>
  static PCOH_INLINE V slope(V r) {
    const V one = V{} + 1;
    return r < V{} ? -one : (r > V{} ? one : V{});
  }
};

struct Huber {
  template <class V>
  static PCOH_INLINE V value(V r) {
    const V size = L1::value(r), delta = V{} + kHuberDelta;
    return size <= delta ? r * r / 2 : delta * (size - delta / 2);
  }
  template <class V>
  static PCOH_INLINE V slope(V r) {
    const V delta = V{} + kHuberDelta;
    return r < -delta ? -delta : (r > delta ? delta : r);
  }
};

}  // namespace pcoherence
