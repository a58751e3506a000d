// The kernels for the GPU. Torch-free: nvcc compiles it on a machine that has neither a GPU nor a CUDA build of torch.
#include <cuda_runtime.h>

#include <array>
#include <mutex>

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

template <class T, class Task>
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
  // The most there is, not plan.shared: another thread of the host may be launching rows of another length.
  if (plan.shared > by_default)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(current_device().shared_per_block));
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

template <class T, class Task>
void launch_rows(const Task& task, const Plan& plan, char* workspace, Stream stream) {
  if (rows_of(task) == 0) return;
  const auto kernel = prepared_kernel<T, Task>(plan);
  kernel<<<plan.blocks, plan.threads, plan.shared, static_cast<cudaStream_t>(stream)>>>(task, plan, workspace);
}

template <class T, class Task>
void launch_stream(const Task& task, Stream stream) {
  const Shape s = shape(task);
  if (s.x == 0 || s.y == 0) return;
  const dim3 grid(static_cast<unsigned>(s.x), static_cast<unsigned>(s.y));
  stream_kernel<T, Task><<<grid, s.threads, 0, static_cast<cudaStream_t>(stream)>>>(task);
}

}  // namespace

template <class T>
Plan plan(const Device& device, std::int64_t rows, std::int64_t n, Method method) {
  return plan_for<T, CudaGroup>(device, rows, n, method);
}

template <class T>
Resources resources(RowKernel kernel, const Plan& plan) {
  return kernel == RowKernel::rows ? resources_of<T, SmallTask<T>>(plan) : resources_of<T, SoftRankTask<T>>(plan);
}

template <class T>
void launch(const RowTask<T>& task, const Plan& plan, char* workspace, Stream stream) {
  launch_rows<T>(SmallTask<T>{.row = task, .features = false}, plan, workspace, stream);
}
template <class T>
void launch(const SmallTask<T>& task, const Plan& plan, char* workspace, Stream stream) {
  launch_rows<T>(task, plan, workspace, stream);
}
template <class T>
void launch(const SoftRankTask<T>& task, const Plan& plan, char* workspace, Stream stream) {
  launch_rows<T>(task, plan, workspace, stream);
}
template <class T>
void launch(const RowSumsTask<T>& task, Stream stream) {
  launch_stream<T>(task, stream);
}
template <class T>
void launch(const ProductTask<T>& task, Stream stream) {
  launch_stream<T>(task, stream);
}
template <class T>
void launch(const DifferenceTask<T>& task, Stream stream) {
  launch_stream<T>(task, stream);
}
template <class T>
void launch(const PullTask<T>& task, Stream stream) {
  launch_stream<T>(task, stream);
}
template <class T>
void launch(const ClearTask<T>& task, Stream stream) {
  launch_stream<T>(task, stream);
}
template <class T>
void launch(const CentreTask<T>& task, Stream stream) {
  launch_stream<T>(task, stream);
}
template <class T>
void launch(const PrepareTask<T>& task, Stream stream) {
  launch_stream<T>(task, stream);
}
template <class T>
void launch(const IdenticalTask<T>& task, Stream stream) {
  launch_stream<T>(task, stream);
}
template <class T>
void launch(const FirstTask<T>& task, Stream stream) {
  launch_stream<T>(task, stream);
}
template <class T>
void launch(const SymmetriseTask<T>& task, Stream stream) {
  launch_stream<T>(task, stream);
}
template <class T>
void launch(const SmallGradientTask<T>& task, Stream stream) {
  launch_stream<T>(task, stream);
}

#define PCOH_INSTANTIATE(T)                                                    \
  template Plan plan<T>(const Device&, std::int64_t, std::int64_t, Method);    \
  template Resources resources<T>(RowKernel, const Plan&);                     \
  template void launch<T>(const RowTask<T>&, const Plan&, char*, Stream);      \
  template void launch<T>(const SmallTask<T>&, const Plan&, char*, Stream);    \
  template void launch<T>(const SoftRankTask<T>&, const Plan&, char*, Stream); \
  template void launch<T>(const RowSumsTask<T>&, Stream);                      \
  template void launch<T>(const ProductTask<T>&, Stream);                      \
  template void launch<T>(const DifferenceTask<T>&, Stream);                   \
  template void launch<T>(const PullTask<T>&, Stream);                         \
  template void launch<T>(const ClearTask<T>&, Stream);                        \
  template void launch<T>(const CentreTask<T>&, Stream);                       \
  template void launch<T>(const PrepareTask<T>&, Stream);                      \
  template void launch<T>(const IdenticalTask<T>&, Stream);                    \
  template void launch<T>(const FirstTask<T>&, Stream);                        \
  template void launch<T>(const SymmetriseTask<T>&, Stream);                   \
  template void launch<T>(const SmallGradientTask<T>&, Stream);
PCOH_INSTANTIATE(float)
PCOH_INSTANTIATE(double)
#undef PCOH_INSTANTIATE

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const Device& current_device() {
  constexpr int most = 64;
  static std::array<Device, most> known;
  static std::mutex mutex;
  int index = 0;
  cudaGetDevice(&index);
  const std::lock_guard<std::mutex> lock(mutex);
  Device& device = known.at(index);
  if (device.multiprocessors == 0) {
    const auto ask = [index](cudaDeviceAttr attribute) {
      int value = 0;
      cudaDeviceGetAttribute(&value, attribute, index);
      return value;
    };
    device.shared_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    device.shared_per_multiprocessor = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    device.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  }
  return device;
}

}  // namespace pcoherence::cuda
