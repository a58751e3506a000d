// How many threads, blocks and bytes a launch takes: host arithmetic, shared by the launcher and its emulation.
#pragma once

#include <algorithm>

#include "launch.h"

namespace pcoherence::cuda {

// Threads of a multiprocessor: 768 of float32 leave each 80 registers of its 65,536, without which they spill; float64
// needs twice as many. Two blocks share them, so that one computes while the other waits at a barrier; where the rows
// of two do not fit into shared memory, one has them all.
template <class T>
inline constexpr int kMaxThreads = sizeof(T) == 4 ? 768 : 384;
template <class T>
inline constexpr int kMaxHalf = sizeof(T) == 4 ? kMaxThreads<T> / 2 : 0;  // float64 always runs alone
inline constexpr int kMinThreads = 64;

// Shared memory that rows leave to the grid: the order of 8,192 elements by their bins (16 KiB), and moments and
// coefficients of 160 bins (152 bytes each).
inline constexpr std::int64_t kGridReserve = 40 << 10;
// What "auto" may use the grid for: moments and coefficients of so many (38 KiB; 64-bit: 134) still fit into shared
// memory, beside short rows.
inline constexpr int kMostBins = 256;
// An explicit grid goes up to kMaxBins, with memory for it in global memory, by as few blocks as keep to this.
inline constexpr std::int64_t kExplicitGridBytes = std::int64_t(512) << 20;
// The hardware keeps this much of a multiprocessor's shared memory for each block, ...
inline constexpr std::int64_t kSystemShared = 1024;
// ... and two blocks leave this: of 228 KiB they would otherwise take the last byte, and where anything else took one,
// the second would wait for the first. Rows of up to 8,700 fit with it, instead of 8,828.
inline constexpr std::int64_t kSharedMargin = 1024;

template <class T, class G>
Plan plan_for(const Device& device, std::int64_t rows, std::int64_t n, Method method) {
  Plan p{};
  p.bins = method == Method::grid ? kMaxBins : kMostBins;
  p.reserve = kGridReserve;
  const std::int64_t row = row_bytes<T>(n);
  const std::int64_t wanted = kScratchBytes + kAnchorRows * row + kGridReserve;
  // Two blocks share a multiprocessor as long as the student's values and ranks stay in shared memory.
  const std::int64_t half = device.shared_per_multiprocessor / 2 - kSystemShared - kSharedMargin;
  const bool halves = kMaxHalf<T> > 0 && kScratchBytes + kStudentRows * row + kGridReserve <= half;
  // As many as there are elements: of a short row everything is a wait that other warps can fill.
  const std::int64_t most_threads = halves ? kMaxHalf<T> : kMaxThreads<T>;
  p.threads = static_cast<int>(std::clamp<std::int64_t>((n + kWarp - 1) / kWarp * kWarp, kMinThreads, most_threads));
  const std::int64_t most = halves ? half : device.shared_per_block;
  p.shared = std::min({wanted, most, device.shared_per_block}) / 16 * 16;
  p.reserve = std::min(p.reserve, (p.shared - kScratchBytes) / 2);
  p.workspace = (task_bytes<T, G>(n, p.threads, p.bins) + 255) / 256 * 256;
  const std::int64_t resident = std::int64_t(device.multiprocessors) * (halves ? 2 : 1);
  std::int64_t blocks = std::min(rows, resident);
  if (method == Method::grid) blocks = std::min(blocks, std::max<std::int64_t>(1, kExplicitGridBytes / p.workspace));
  p.blocks = static_cast<int>(std::max<std::int64_t>(1, blocks));
  return p;
}

}  // namespace pcoherence::cuda
