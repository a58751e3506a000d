// Launching the kernels: plain functions on device pointers and a stream, without torch. Every function returns after
// enqueueing; none allocates, synchronises or reads device memory, so that all of it can be captured in a CUDA graph.
#pragma once

#include <cstdint>

#include "prepare.h"
#include "small.h"
#include "symmetric.h"

namespace pcoherence::cuda {

// What a launch needs to know of its device.
struct Device {
  int multiprocessors;
  std::int64_t shared_per_block;           // bytes, the most that a block may ask for
  std::int64_t shared_per_multiprocessor;  // bytes
};

using Stream = void*;  // cudaStream_t

// How rows of n are run: by thread blocks that go from row to row, each with memory of its own.
struct Plan {
  int threads;             // of a block
  int blocks;              // enough to fill the device, and no more than there are rows
  std::int64_t shared;     // bytes of shared memory of a block
  std::int64_t reserve;    // bytes of it that rows leave to the grid
  std::int64_t workspace;  // bytes of global memory of a block, for what shared memory cannot hold
  int bins;                // that a row's grid may have
  std::int64_t workspace_bytes() const { return workspace * blocks; }
};
template <class T>
Plan plan(const Device& device, std::int64_t rows, std::int64_t n, Method method);

// What the compiler and the driver make of a row kernel: registers and bytes of local memory of a thread, and how many
// blocks of a plan a multiprocessor holds at a time.
struct Resources {
  int registers;
  std::int64_t local;
  int resident;
};
enum class RowKernel { rows, soft_rank };  // soft_rank: of double alone
template <class T>
Resources resources(RowKernel kernel, const Plan& plan);

// Tasks of rows: SmallTask, SoftRankTask. workspace: plan.workspace_bytes() of uninitialised memory, aligned to 16
// bytes.
template <class Task>
void launch(const Task& task, const Plan& plan, char* workspace, Stream stream);
// All other tasks; work.h lists both kinds.
template <class Task>
void launch(const Task& task, Stream stream);

// The first error of a launch since the last call, in words; null: none.
const char* last_error();
// Of the current device; asked once for each.
const Device& current_device();

}  // namespace pcoherence::cuda
