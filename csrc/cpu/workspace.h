// Scratch memory of one thread: named buffers that grow on demand and are reused from row to row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace pcoherence {

// When set (tests), every buffer handed out is filled with 0xff first: NaN as floating point, -1 as integer.
extern bool poison_workspace;

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  // At least `count` elements, 64-byte aligned, contents undefined.
  template <class T>
  T* need(std::size_t count) {
    const std::size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > bytes_) grow(bytes);
    if (poison_workspace) std::memset(data_, 0xff, bytes);
    return static_cast<T*>(data_);
  }

 private:
  void grow(std::size_t bytes) {
    std::free(data_);
    bytes_ = 0;
    data_ = std::aligned_alloc(64, bytes);
    if (data_ == nullptr) throw std::bad_alloc();
    bytes_ = bytes;
  }

  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

struct Workspace {
  Buffer weights, positions, ranks, teacher_ranks, residuals, pulled;  // [n], one anchor's row
  Buffer bins, locals, moments, replicas, fields;                      // grid
  Buffer items, items_swap, histogram;                                 // radix sort
  Buffer bucket, arrival, counts, sorted, sorted_ranks;                // hard ranks
  Buffer steps, up, down, carry;                                       // scan
};

}  // namespace pcoherence
