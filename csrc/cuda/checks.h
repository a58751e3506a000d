// Torch as the runtime of the operators, through its stable interface, and what they check before they launch anything.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <type_traits>

#include "launch.h"

namespace pcoherence::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---------------------------------------------------------------- torch as the runtime

#if defined(PCOH_EMULATE)
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  Stream stream = nullptr;
};
#else
// Makes a tensor's device and its current stream the ones to launch on.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
  Stream stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

void check_launch() {
  const char* error = last_error();
  STD_TORCH_CHECK(error == nullptr, "pcoherence: launching a CUDA kernel failed: ", error == nullptr ? "" : error);
}

template <class T>
constexpr ScalarType scalar_type = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

constexpr const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

template <class F>
void dispatch(const Tensor& t, const char* name, F&& f) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name, ": expected float32 or float64, got ",
                  name_of(type));
  type == ScalarType::Float ? f(float{}) : f(double{});
}

// ---------------------------------------------------------------- host checks

// Where everything has to be, and the dtype that T stands for.
struct Like {
  const Tensor& model;

  void check(const Tensor& t, const char* name, ScalarType type, std::int64_t count) const {
    STD_TORCH_CHECK(t.is_cuda() == model.is_cuda() && t.get_device_index() == model.get_device_index(), name,
                    ": expected on the device of the first tensor");
    STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
    STD_TORCH_CHECK(t.scalar_type() == type, name, ": expected ", name_of(type), ", got ", name_of(t.scalar_type()));
    STD_TORCH_CHECK(t.numel() == count, name, ": expected ", count, " elements, got ", t.numel());
  }

  template <class V>
  const V* in(const Tensor& t, const char* name, std::int64_t count) const {
    check(t, name, type_of<V>(), count);
    return static_cast<const V*>(t.const_data_ptr());
  }
  template <class V>
  const V* in(const OptionalTensor& t, const char* name, std::int64_t count) const {
    return t ? in<V>(*t, name, count) : nullptr;
  }
  template <class V>
  V* out(const Tensor& t, const char* name, std::int64_t count) const {
    check(t, name, type_of<V>(), count);
    return static_cast<V*>(t.mutable_data_ptr());
  }
  template <class V>
  V* out(const OptionalTensor& t, const char* name, std::int64_t count) const {
    return t ? out<V>(*t, name, count) : nullptr;
  }

 private:
  template <class V>
  static constexpr ScalarType type_of() {
    if constexpr (std::is_same_v<V, std::int64_t>)
      return ScalarType::Long;
    else if constexpr (std::is_same_v<V, unsigned> || std::is_same_v<V, int>)
      return ScalarType::Int;
    else
      return scalar_type<V>;
  }
};

std::int64_t dimension(const Tensor& t, std::int64_t i, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected a matrix, got ", t.dim(), " dimensions");
  return t.size(i);
}

int candidates_of(const Tensor& t, const char* name) {
  const std::int64_t n = dimension(t, 1, name);
  STD_TORCH_CHECK(n < (std::int64_t(1) << 30), name, ": expected fewer than 2^30 candidates, got ", n);
  return static_cast<int>(n);
}

char* bytes(const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }

// f(zero, like, stream), zero a T, where `model` is: what every operator that launches is in.
template <class F>
void on_device(const Tensor& model, const char* name, F&& f) {
  const OnDevice on(model);
  dispatch(model, name, [&](auto zero) { f(zero, Like{model}, on.stream); });
  check_launch();
}

}  // namespace
}  // namespace pcoherence::cuda
