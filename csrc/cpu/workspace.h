// Scratch memory: named buffers that grow on demand, are reused from row to row, and come from a pool that outlives
// the call.
#pragma once

#include <cstddef>

#include "../inline.h"

namespace pcoherence {

// When set (tests), every buffer handed out is filled with 0xff first: NaN as floating point, -1 as integer.
extern bool poison_workspace;

// Of every block: one cache line, one AVX-512 register.
inline constexpr std::size_t kAlignment = 64;

// Where the candidates are the anchors, all their distances are held at once if each network's fit in this, because
// symmetry then halves all four products. It bounds the memory of small n; from n = 4,096 (float32) on, blocks of
// anchors do.
inline constexpr std::size_t kSymmetricBytes = 64 << 20;

// What the pool holds at most: the two square blocks of the largest symmetric problem, and a quarter more for features
// and gradients.
inline constexpr std::size_t kPoolBytes = 2 * kSymmetricBytes / 4 * 5;

// Memory [bytes], aligned; null: none.
struct Block {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// Large blocks of finished calls are kept for the next: a training loop asks for the same ones in every step, and the
// system takes longer to clear fresh pages than a matrix product takes to fill them. Thread-safe.
Block take_block(std::size_t bytes);
PCOH_EXPORT void return_block(Block block) noexcept;

class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept : block_(other.block_) { other.block_ = {}; }
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() { return_block(block_); }

  // At least `count` elements, aligned, contents undefined. Inlined into each instruction set's kernels; what
  // it calls is compiled once.
  template <class T>
  PCOH_INLINE T* need(std::size_t count) {
    return static_cast<T*>(need_bytes((count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment));
  }

 private:
  PCOH_EXPORT void* need_bytes(std::size_t bytes);

  Block block_;
};

// Of one thread.
struct Workspace {
  static constexpr int kRows = 6;  // as many as an anchor takes
  Buffer near;                     // see Workplace::near_table
  const void* near_table = nullptr;
  int near_count = 0;
  double near_offset = 0, near_total = 0;
  Buffer student, teacher;  // [n], distances that may not be overwritten
  Buffer wide[3];           // double [n], see anchor_row_in_double()
  Buffer weights;           // [n], of an anchor that has its own
  Buffer rows[kRows];       // [n], handed out in this order
  Buffer bins, held, places, numbers, locals, moments, partial_sums, fields, mass;               // grid
  Buffer items, items_swap, histogram;                                                           // radix sort
  Buffer bucket, position, counts, crowded, sorted, sorted_ranks, sorted_weights, weight_below;  // hard ranks
  Buffer steps, up, down;                                                                        // scan
};

}  // namespace pcoherence
