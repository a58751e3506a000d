// Scratch memory of one thread: named buffers that grow on demand and are reused from row to row.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

#include "../inline.h"

namespace pcoherence {

// When set (tests), every buffer handed out is filled with 0xff first: NaN as floating point, -1 as integer.
extern bool poison_workspace;

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  std::size_t bytes() const { return bytes_; }

  // At least `count` elements, 64-byte aligned, contents undefined. Inlined into each instruction set's kernels; what
  // it calls is compiled once.
  template <class T>
  PCOH_INLINE T* need(std::size_t count) {
    return static_cast<T*>(need_bytes((count * sizeof(T) + 63) / 64 * 64));
  }

 private:
  void* need_bytes(std::size_t bytes);

  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Large buffers of finished calls, kept for the next: a training loop asks for the same ones in every step, and the
// system takes longer to clear fresh pages than a matrix product takes to fill them. Thread-safe.
std::unique_ptr<Buffer> take_buffer(std::size_t bytes);
void return_buffer(std::unique_ptr<Buffer> buffer);

struct Workspace {
  Buffer student, teacher;                                             // [n], distances that may not be overwritten
  Buffer weights, positions, ranks, teacher_ranks, residuals, pulled;  // [n], one anchor's row
  Buffer bins, locals, moments, replicas, fields, carry;               // grid
  Buffer items, items_swap, histogram;                                 // radix sort
  Buffer bucket, arrival, counts, sorted, sorted_ranks;                // hard ranks
  Buffer steps, up, down;                                              // scan
};

}  // namespace pcoherence
