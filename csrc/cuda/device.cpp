// What launches need of CUDA's runtime besides kernels.
#include <cuda_runtime_api.h>

#include <array>
#include <mutex>

#include "launch.h"

namespace pcoherence::cuda {

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
