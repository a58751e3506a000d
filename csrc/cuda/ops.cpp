// The row kernels as operators of torch, through LibTorch's stable ABI: host checks, device guard, current stream.
// pcoherence/backends/cuda_kernels.py calls them.
//
// Conventions: tensors are contiguous, on one device, of one dtype T, float32 or float64, unless said otherwise; what
// an operator writes is given to it. Nothing synchronises.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <string>

#include "../boxing.h"
#include "point_ops.h"
#include "row_ops.h"

namespace pcoherence::cuda::operators {

// The grid's tables of sigmoid, slope and softplus, in the dtype of `like`; to be copied to the device once.
Tensor tables(Tensor like) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  std::optional<Tensor> result;
  dispatch(like, "like", [&](auto zero) {
    using T = decltype(zero);
    result = torch::stable::empty({3 * DeviceGrid<T>::size}, scalar_type<T>, std::nullopt, cpu);
    T* out = static_cast<T*>(result->mutable_data_ptr());
    for (const Kernel kernel : {Kernel::sigmoid, Kernel::slope, Kernel::softplus}) out = copy_table(kernel, out);
  });
  return *result;
}

// float64 [2 * degree]: the scan's series of sigmoid, then of softplus, for the dtype of `like`.
Tensor series_of(Tensor like) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  std::optional<Tensor> result;
  dispatch(like, "like", [&](auto zero) {
    using T = decltype(zero);
    result = torch::stable::empty({2 * kSeriesDegree<T>}, ScalarType::Double, std::nullopt, cpu);
    double* out = static_cast<double*>(result->mutable_data_ptr());
    out = std::copy_n(series<T>().sigmoid, kSeriesDegree<T>, out);
    std::copy_n(series<T>().softplus, kSeriesDegree<T>, out);
  });
  return *result;
}

// int64 [7]: threads of a block, blocks, bytes of its shared memory and of its workspace; registers and bytes of local
// memory of a thread; blocks that a multiprocessor holds. kernel: "rows" or "soft_rank", for `rows` rows of n.
Tensor resources_of(Tensor like, std::string kernel, std::int64_t rows, std::int64_t n, std::string method) {
  STD_TORCH_CHECK(kernel == "rows" || kernel == "soft_rank", "kernel: expected 'rows' or 'soft_rank', got '", kernel,
                  "'");
  STD_TORCH_CHECK(kernel == "rows" || like.scalar_type() == ScalarType::Double, "like: expected float64 for soft_rank");
  const OnDevice on(like);
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor result = torch::stable::empty({7}, ScalarType::Long, std::nullopt, cpu);
  dispatch(like, "like", [&](auto zero) {
    using T = decltype(zero);
    const Plan p = plan<T>(current_device(), rows, n, named<Method>(kMethodNames, method, "method"));
    const Resources r = resources<T>(kernel == "rows" ? RowKernel::rows : RowKernel::soft_rank, p);
    const std::array<std::int64_t, 7> found{p.threads,   p.blocks, p.shared,  p.workspace,
                                            r.registers, r.local,  r.resident};
    std::copy(found.begin(), found.end(), static_cast<std::int64_t*>(result.mutable_data_ptr()));
  });
  check_launch();
  return result;
}

}  // namespace pcoherence::cuda::operators

// The emulation has a name of its own: it may meet the CUDA extension in one process.
#if defined(PCOH_EMULATE)
#define PCOH_LIBRARY pcoherence_cuda_emulated
#define PCOH_DISPATCH_KEY CPU
#else
#define PCOH_LIBRARY pcoherence_cuda
#define PCOH_DISPATCH_KEY CUDA
#endif

STABLE_TORCH_LIBRARY(PCOH_LIBRARY, m) {
  m.def(
      "rows(Tensor(a!) student, Tensor teacher, Tensor? weights, Tensor? self_index, Tensor? coefficients, "
      "float temperature, float teacher_temperature, str options, Tensor? unit, Tensor? teacher_unit, float chain, "
      "bool root, bool gradient, Tensor(b!) losses, Tensor tables, Tensor series, Tensor(c!) status) -> ()");
  m.def(
      "small_rows(Tensor student, Tensor? student_candidates, Tensor teacher, Tensor? teacher_candidates, "
      "Tensor? weights, Tensor? self_index, Tensor? coefficients, float temperature, float teacher_temperature, "
      "str options, bool gradient, Tensor(a!) student_distances, Tensor(b!) teacher_distances, Tensor(c!)? shrinks, "
      "Tensor(d!)? candidate_shrinks, Tensor(e!) losses, Tensor tables, Tensor series, Tensor(f!) status) -> ()");
  m.def(
      "small_gradient(Tensor student, Tensor? student_candidates, Tensor v, str metric, Tensor? shrinks, "
      "Tensor? candidate_shrinks, Tensor losses, Tensor? coefficients, Tensor(a!)? out, Tensor(b!)? candidates_out, "
      "Tensor(c!) total) -> ()");
  m.def(
      "soft_rank(Tensor values, Tensor? weights, Tensor? upstream, float temperature, str method, Tensor(a!) out, "
      "Tensor tables, Tensor series, Tensor(b!) status) -> ()");
  m.def("row_sums(Tensor matrix, Tensor(a!) sums) -> ()");
  m.def(
      "prepare(Tensor[] points, int[] directions, Tensor(a!)[] numbers, Tensor(b!)[] prepared, Tensor(c!)[] norms, "
      "Tensor(d!)[] scaled, Tensor(e!)[] first) -> ()");
  m.def(
      "product_distances(Tensor(a!) out, Tensor products, Tensor anchor_norms, Tensor candidate_norms, "
      "Tensor anchors, Tensor candidates, Tensor first, Tensor(b!) near, int begin, bool same, bool upper, bool root, "
      "float factor) -> ()");
  m.def(
      "accumulate_differences(Tensor(a!) out, Tensor points, Tensor others, Tensor v, Tensor near, bool transposed) "
      "-> ()");
  m.def("clear_near(Tensor(a!) v, Tensor near) -> ()");
  m.def("add_transpose(Tensor(a!) matrix) -> ()");
  m.def("tables(Tensor like) -> Tensor");
  m.def("series(Tensor like) -> Tensor");
  m.def("resources(Tensor like, str kernel, int rows, int n, str method) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(PCOH_LIBRARY, PCOH_DISPATCH_KEY, m) {
  m.impl("rows", PCOH_BOX(&pcoherence::cuda::operators::rows));
  m.impl("small_rows", PCOH_BOX(&pcoherence::cuda::operators::small_rows));
  m.impl("small_gradient", PCOH_BOX(&pcoherence::cuda::operators::small_gradient));
  m.impl("soft_rank", PCOH_BOX(&pcoherence::cuda::operators::soft_rank));
  m.impl("row_sums", PCOH_BOX(&pcoherence::cuda::operators::row_sums));
  m.impl("prepare", PCOH_BOX(&pcoherence::cuda::operators::prepare));
  m.impl("product_distances", PCOH_BOX(&pcoherence::cuda::operators::product_distances));
  m.impl("accumulate_differences", PCOH_BOX(&pcoherence::cuda::operators::accumulate_differences));
  m.impl("clear_near", PCOH_BOX(&pcoherence::cuda::operators::clear_near));
  m.impl("add_transpose", PCOH_BOX(&pcoherence::cuda::operators::add_transpose));
  m.impl("tables", PCOH_BOX(&pcoherence::cuda::operators::tables));
  m.impl("series", PCOH_BOX(&pcoherence::cuda::operators::series_of));
  m.impl("resources", PCOH_BOX(&pcoherence::cuda::operators::resources_of));
}
