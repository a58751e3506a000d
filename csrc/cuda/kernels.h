// The kernels for the GPU and their launches, of one type in each of launch_float.cu and launch_double.cu, which are
// compiled side by side. Torch-free: nvcc compiles them on a machine that has neither a GPU nor a CUDA build of torch.
#pragma once

#include <cuda_runtime.h>

#include "instances.h"
#include "plan.h"
#include "work.h"

namespace pcoherence::cuda {
namespace {

template <class T, class Task>
__global__ void __launch_bounds__(kMaxThreads<T>, 1)
    row_kernel(const __grid_constant__ Task task, const __grid_constant__ Plan plan, char* workspace) {
  extern __shared__ __align__(16) char shared[];
  CudaGroup g(shared);
  for (std::int64_t r = blockIdx.x; r < rows_of(task); r += gridDim.x) {
    work(g, task, r,
         Arena(shared + kScratchBytes, plan.shared - kScratchBytes, workspace + blockIdx.x * plan.workspace,
               plan.workspace));
    g.sync();
  }
}

template <class Task>
__global__ void __launch_bounds__(kMostThreadsOf<Task>) stream_kernel(const __grid_constant__ Task task) {
  __shared__ __align__(16) char scratch[kScratchBytes];
  CudaGroup g(scratch);
  work(g, task, static_cast<std::int64_t>(blockIdx.x), static_cast<int>(blockIdx.y));
}

// The kernel, allowed as much shared memory as the plan takes.
template <class T, class Task>
auto prepared_kernel(const Plan& plan) {
  const auto kernel = row_kernel<T, Task>;
  constexpr std::int64_t by_default = 48 << 10;  // more has to be asked for
  if (plan.shared > by_default) {
    // The most there is, not plan.shared: another thread of the host may be launching rows of another length.
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(current_device().shared_per_block));
    // Or the driver may leave the cache so much that the second of two blocks does not fit.
    cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  return kernel;
}

template <class T, class Task>
Resources resources_of(const Plan& plan) {
  const auto kernel = prepared_kernel<T, Task>(plan);
  cudaFuncAttributes found{};
  cudaFuncGetAttributes(&found, kernel);
  int resident = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, plan.threads, plan.shared);
  return {found.numRegs, static_cast<std::int64_t>(found.localSizeBytes), resident};
}

}  // namespace

template <class T>
Plan plan(const Device& device, std::int64_t rows, std::int64_t n, Method method) {
  return plan_for<T, CudaGroup>(device, rows, n, method);
}

template <class T>
Resources resources(RowKernel kernel, const Plan& plan) {
  if constexpr (std::is_same_v<T, double>)
    if (kernel == RowKernel::soft_rank) return resources_of<T, SoftRankTask<T>>(plan);
  return resources_of<T, SmallTask<T>>(plan);
}

template <template <class> class Task, class T>
void launch_rows(const Task<T>& task, const Plan& plan, char* workspace, cudaStream_t stream) {
  if (rows_of(task) == 0) return;
  const auto kernel = prepared_kernel<T, Task<T>>(plan);
  kernel<<<plan.blocks, plan.threads, plan.shared, stream>>>(task, plan, workspace);
}
template <class Task>
void launch(const Task& task, const Plan& plan, char* workspace, Stream stream) {
  launch_rows(task, plan, workspace, static_cast<cudaStream_t>(stream));
}

template <class Task>
void launch(const Task& task, Stream stream) {
  const Shape s = shape(task);
  if (s.x == 0 || s.y == 0) return;
  const dim3 grid(static_cast<unsigned>(s.x), static_cast<unsigned>(s.y));
  stream_kernel<<<grid, s.threads, 0, static_cast<cudaStream_t>(stream)>>>(task);
}

}  // namespace pcoherence::cuda
