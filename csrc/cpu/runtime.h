// What the pipeline needs from its host: memory, threads and matrix products. torch provides them (ops.cpp).
#pragma once

#include <cstdint>
#include <functional>

namespace pcoherence {

template <class T>
class Runtime {
 public:
  virtual ~Runtime() = default;

  // `count` elements, 64-byte aligned, contents undefined, alive as long as the runtime.
  virtual T* allocate(std::int64_t count) = 0;

  virtual int threads() const = 0;
  // body(begin, end, thread) over [0, count) in contiguous pieces of at least `grain`.
  virtual void parallel_for(std::int64_t count, std::int64_t grain,
                            const std::function<void(std::int64_t, std::int64_t, int)>& body) = 0;

  // c [m, n] (rows ldc apart) = a [m, k] b [n, k]^T
  virtual void multiply_nt(T* c, std::int64_t ldc, const T* a, const T* b, std::int64_t m, std::int64_t n,
                           std::int64_t k) = 0;
  // c [m, k] = a [m, n] (rows lda apart) b [n, k]
  virtual void multiply_nn(T* c, const T* a, std::int64_t lda, const T* b, std::int64_t m, std::int64_t n,
                           std::int64_t k) = 0;
  // c [n, k] += a [m, n]^T (rows lda apart) b [m, k]
  virtual void accumulate_tn(T* c, const T* a, std::int64_t lda, const T* b, std::int64_t m, std::int64_t n,
                             std::int64_t k) = 0;
};

}  // namespace pcoherence
