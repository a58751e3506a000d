// The operators of pcoherence/ops.py on CPU: host checks, and torch as the runtime of the pipeline.
// LibTorch's stable ABI only: one binary serves torch 2.11 and later.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../boxing.h"
#include "../soft_ranks.h"
#include "agreement.h"
#include "pipeline.h"

namespace pcoherence {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// As torch's own checks, without the place in this file: users read the message.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

const torch::stable::Device kCpu(torch::headeronly::DeviceType::CPU);

template <class T>
constexpr ScalarType scalar_type = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

Tensor new_tensor(std::vector<std::int64_t> sizes, ScalarType type) {
  return torch::stable::empty(sizes, type, std::nullopt, kCpu);
}

// ---------------------------------------------------------------- torch as the runtime

constexpr std::int64_t kFewMultiplications = 1 << 16;

template <class T>
class TorchRuntime : public Runtime<T> {
 public:
  T* allocate(std::int64_t count) override { return memory_.emplace_back().template need<T>(count); }

  int threads() const override { return static_cast<int>(torch::stable::get_num_threads()); }

  void parallel_for(std::int64_t count, std::int64_t grain,
                    const std::function<void(std::int64_t, std::int64_t, int)>& body) override {
    torch::stable::parallel_for(0, count, grain, [&](std::int64_t begin, std::int64_t end) {
      std::uint32_t thread = 0;
      TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
      body(begin, end, static_cast<int>(thread));
    });
  }

  void multiply_nt(T* c, std::int64_t ldc, const T* a, const T* b, std::int64_t m, std::int64_t n,
                   std::int64_t k) override {
    if (few(m, n, k)) {
      for (std::int64_t i = 0; i < m; ++i) kernels().of<T>().dot_products(c + i * ldc, a + i * k, b, n, k);
      return;
    }
    multiply(view(c, m, n, ldc, 1), view(a, m, k, k, 1), view(b, k, n, 1, k));
  }
  void multiply_nn(T* c, const T* a, std::int64_t lda, const T* b, std::int64_t m, std::int64_t n,
                   std::int64_t k) override {
    if (few(m, n, k)) {
      std::fill_n(c, m * k, T(0));
      for (std::int64_t i = 0; i < m; ++i)
        for (std::int64_t j = 0; j < n; ++j) add_multiple(c + i * k, a[i * lda + j], b + j * k, k);
      return;
    }
    multiply(view(c, m, k, k, 1), view(a, m, n, lda, 1), view(b, n, k, k, 1));
  }
  void accumulate_tn(T* c, const T* a, std::int64_t lda, const T* b, std::int64_t m, std::int64_t n,
                     std::int64_t k) override {
    if (few(m, n, k)) {
      for (std::int64_t i = 0; i < m; ++i)
        for (std::int64_t j = 0; j < n; ++j) add_multiple(c + j * k, a[i * lda + j], b + i * k, k);
      return;
    }
    const Tensor out = view(c, n, k, k, 1), left = view(a, n, m, 1, lda), right = view(b, m, k, k, 1);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), 1.0, 1.0));
  }

 private:
  // So few multiplications take less time than asking the library for them.
  static bool few(std::int64_t m, std::int64_t n, std::int64_t k) { return m * n * k <= kFewMultiplications; }
  static void add_multiple(T* out, T factor, const T* x, std::int64_t k) {
    for (std::int64_t f = 0; f < k; ++f) out[f] += factor * x[f];
  }
  static Tensor view(const T* data, std::int64_t rows, std::int64_t columns, std::int64_t row_stride,
                     std::int64_t column_stride) {
    const std::int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
    return torch::stable::from_blob(const_cast<T*>(data), {sizes, 2}, {strides, 2}, kCpu, scalar_type<T>);
  }
  static void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }

  std::vector<Buffer> memory_;
};

// ---------------------------------------------------------------- host checks

void check_matrix(const Tensor& t, const char* name) {
  check(t.dim() == 2, name, ": expected a matrix, got ", t.dim(), " dimensions");
  check(t.is_contiguous(), name, ": expected a contiguous tensor");
  check(t.is_cpu(), name, ": expected a CPU tensor");
}

void check_vector(const OptionalTensor& t, const char* name, std::int64_t size, ScalarType type, int dimensions = 1) {
  if (!t) return;
  check(t->dim() == dimensions && t->numel() == size, name, ": expected one value for each of ", size);
  check(t->is_contiguous() && t->is_cpu() && t->scalar_type() == type, name,
        ": expected a contiguous CPU tensor of the features' dtype (self_index: int64)");
}

// Rows are indexed by int, padding included.
constexpr std::int64_t kMaxCandidates = std::int64_t(1) << 30;

template <class T>
void check_weights(const OptionalTensor& t, const char* name) {
  if (!t) return;
  const T* w = static_cast<const T*>(t->const_data_ptr());
  const double most = 0x1p110 / double(t->size(t->dim() - 1));  // MOST_TOTAL of inputs.py
  for (std::int64_t i = 0; i < t->numel(); ++i)
    check(w[i] >= 0 && w[i] <= most, name, ": expected weights from 0 to ", most, ", got ", double(w[i]),
          " at position ", i);
}

void check_self_index(const OptionalTensor& t, std::int64_t n) {
  if (!t) return;
  const auto* index = static_cast<const std::int64_t*>(t->const_data_ptr());
  for (std::int64_t i = 0; i < t->numel(); ++i)
    check(index[i] >= -1 && index[i] < n, "self_index: expected -1 or a candidate below ", n, ", got ", index[i],
          " at position ", i);
}

void check_status(Status status) {
  check(status != Status::too_many_bins, "method: 'grid' would need more than ", kMaxBins,
        " bins for a row, one for every ", kBinWidth,
        " temperatures of its range; use method='scan' or 'auto', or a higher temperature");
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* data(const OptionalTensor& t) {
  return t ? data<T>(*t) : nullptr;
}
template <class T>
T* mutable_data(const Tensor& t) {
  return t.numel() > 0 ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

template <class F>
auto dispatch(ScalarType type, const char* name, F&& f) {
  check(type == ScalarType::Float || type == ScalarType::Double, name, ": expected float32 or float64");
  return type == ScalarType::Float ? f(float{}) : f(double{});
}

// ---------------------------------------------------------------- coherence

// The tensors of one call.
struct Inputs {
  Tensor student;  // [m, width], or distances [m, n]
  OptionalTensor student_candidates;
  Tensor teacher;
  OptionalTensor teacher_candidates, coefficients, candidate_weights, self_index;
  bool distances;

  ScalarType type() const { return student.scalar_type(); }
  bool by_anchor() const { return candidate_weights && candidate_weights->dim() == 2; }  // [m, n]
  std::int64_t m() const { return student.size(0); }
  std::int64_t n() const {
    return distances ? student.size(1) : student_candidates ? student_candidates->size(0) : m();
  }

  void check_all() const {
    check_side(student, student_candidates, "student", "student_candidates");
    check_side(teacher, teacher_candidates, "teacher", "teacher_candidates");
    check(teacher.size(0) == m(), "teacher: expected ", m(), " rows, got ", teacher.size(0));
    check(!distances || teacher.size(1) == n(), "teacher: expected ", n(), " distances, got ", teacher.size(1));
    check(!distances || !student_candidates, "student_candidates: expected none with distances");
    check(student_candidates.has_value() == teacher_candidates.has_value(),
          "teacher_candidates: expected together with student_candidates, or neither");
    if (teacher_candidates)
      check(teacher_candidates->size(0) == n(), "teacher_candidates: expected ", n(), " rows, got ",
            teacher_candidates->size(0));
    check(m() == 0 || n() >= 2, "student: expected at least 2 candidates, got ", n());
    check(n() < kMaxCandidates, "student: expected fewer than 2^30 candidates, got ", n());
    check_vector(coefficients, "coefficients", m(), type());
    if (by_anchor())
      check(candidate_weights->size(0) == m() && candidate_weights->size(1) == n(),
            "candidate_weights: expected one value for each of ", n(), ", or for each of ", m(), " times ", n());
    check_vector(candidate_weights, "candidate_weights", by_anchor() ? m() * n() : n(), type(), by_anchor() ? 2 : 1);
    check_vector(self_index, "self_index", m(), ScalarType::Long);
    check_self_index(self_index, n());
  }

  void check_side(const Tensor& anchors, const OptionalTensor& candidates, const char* name,
                  const char* candidates_name) const {
    check_matrix(anchors, name);
    check(anchors.scalar_type() == type(), name, ": expected the dtype of student");
    if (!candidates) return;
    check_matrix(*candidates, candidates_name);
    check(candidates->scalar_type() == type(), candidates_name, ": expected the dtype of student");
    check(candidates->size(1) == anchors.size(1), candidates_name, ": expected width ", anchors.size(1), ", got ",
          candidates->size(1));
  }

  template <class T>
  GivenPoints<T> points(const Tensor& anchors, const OptionalTensor& candidates, Metric metric) const {
    return {data<T>(anchors), data<T>(candidates), m(), n(), anchors.size(1), metric};
  }

  template <class T>
  void run(const Options& options, Results<T>& results) const {
    check_weights<T>(candidate_weights, "candidate_weights");
    const Weighting<T> weights{data<T>(coefficients), data<T>(candidate_weights), by_anchor(),
                               data<std::int64_t>(self_index)};
    if (m() == 0) {
      const std::int64_t size = results.gradient_candidates ? student_candidates->numel() : 0;
      std::fill_n(results.gradient_candidates, size, T(0));
      return;
    }
    TorchRuntime<T> runtime;
    if (distances)
      check_status(coherence_from_distances<T>(options, data<T>(student), data<T>(teacher), m(), n(), weights, results,
                                               runtime));
    else
      check_status(coherence<T>(options, points<T>(student, student_candidates, options.metric),
                                points<T>(teacher, teacher_candidates, options.teacher_metric), weights, results,
                                runtime));
  }
};

Tensor gradient_like(bool wanted, const Tensor& points) {
  return new_tensor(wanted ? std::vector{points.size(0), points.size(1)} : std::vector{std::int64_t(0)},
                    points.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> coherence_operator(
    Tensor student, OptionalTensor student_candidates, Tensor teacher, OptionalTensor teacher_candidates,
    OptionalTensor coefficients, OptionalTensor candidate_weights, OptionalTensor self_index, double temperature,
    double teacher_temperature, std::string packed, bool distances, bool grad_student, bool grad_candidates) {
  const Inputs inputs{student,      student_candidates, teacher,    teacher_candidates,
                      coefficients, candidate_weights,  self_index, distances};
  inputs.check_all();
  const Options options = unpacked(packed, temperature, teacher_temperature);
  grad_candidates = grad_candidates && student_candidates;
  const Tensor losses = new_tensor({grad_student || grad_candidates ? 0 : inputs.m()}, inputs.type());
  const Tensor student_gradient = gradient_like(grad_student, student);
  const Tensor candidates_gradient = gradient_like(grad_candidates, student_candidates ? *student_candidates : student);
  const double total = dispatch(inputs.type(), "student", [&](auto zero) {
    using T = decltype(zero);
    Results<T> results{mutable_data<T>(losses), mutable_data<T>(student_gradient),
                       mutable_data<T>(candidates_gradient)};
    inputs.run<T>(options, results);
    return results.total;
  });
  return {torch::stable::full({}, total, inputs.type(), std::nullopt, kCpu), losses, student_gradient,
          candidates_gradient};
}

// ---------------------------------------------------------------- agreement of ranks

Tensor rank_agreement_rows(Tensor student_distances, Tensor teacher_distances, OptionalTensor self_index,
                           std::int64_t nearest) {
  const Inputs inputs{student_distances, std::nullopt, teacher_distances, std::nullopt,
                      std::nullopt,      std::nullopt, self_index,        true};
  inputs.check_all();
  check(nearest >= 1, "nearest: expected at least 1, got ", nearest);
  const std::int64_t m = inputs.m(), n = inputs.n();
  const Tensor out = new_tensor({m, 3}, ScalarType::Double);
  dispatch(inputs.type(), "student_distances", [&](auto zero) {
    using T = decltype(zero);
    const T *a = data<T>(student_distances), *b = data<T>(teacher_distances);
    const auto* self = data<std::int64_t>(self_index);
    auto* result = mutable_data<double>(out);
    TorchRuntime<T> runtime;
    runtime.parallel_for(m, 1, [&](std::int64_t begin, std::int64_t end, int) {
      AgreementScratch scratch;
      for (std::int64_t i = begin; i < end; ++i) {
        const Agreement found = rank_agreement(a + i * n, b + i * n, n, self ? self[i] : -1, nearest, scratch);
        result[3 * i] = found.kendall;
        result[3 * i + 1] = found.spearman;
        result[3 * i + 2] = found.overlap;
      }
    });
    return 0;
  });
  return out;
}

// ---------------------------------------------------------------- soft ranks

// upstream: absent for the ranks themselves.
Tensor soft_rank(Tensor values, OptionalTensor weights, OptionalTensor upstream, double temperature,
                 std::string method) {
  check_matrix(values, "values");
  const std::int64_t rows = values.size(0), n = values.size(1);
  check(n < kMaxCandidates, "values: expected fewer than 2^30 values in a row, got ", n);
  check(temperature > 0, "temperature: expected a number > 0, got ", temperature);
  const bool per_row = weights && weights->dim() == 2;
  if (weights) {
    check(weights->is_contiguous() && weights->is_cpu() && weights->scalar_type() == values.scalar_type(),
          "weights: expected a contiguous CPU tensor of the dtype of values");
    check(weights->numel() == (per_row ? rows * n : n), "weights: expected [", n, "] or [", rows, ", ", n, "]");
  }
  if (upstream)
    check(upstream->is_contiguous() && upstream->is_cpu() && upstream->numel() == rows * n &&
              upstream->scalar_type() == values.scalar_type(),
          "upstream: expected a contiguous CPU tensor like values");
  const auto parsed = named<Method>(kMethodNames, method, "method");
  const Tensor out = new_tensor({rows, n}, values.scalar_type());
  if (rows * n == 0) return out;
  dispatch(values.scalar_type(), "values", [&](auto zero) {
    using T = decltype(zero);
    check_weights<T>(weights, "weights");
    TorchRuntime<T> runtime;
    check_status(soft_ranks<T>(data<T>(values), data<T>(weights), per_row, data<T>(upstream), mutable_data<T>(out),
                               rows, n, temperature, parsed, runtime));
    return 0;
  });
  return out;
}

}  // namespace
}  // namespace pcoherence

STABLE_TORCH_LIBRARY_IMPL(pcoherence, CPU, m) {
  m.impl("coherence", PCOH_BOX(&pcoherence::coherence_operator));
  m.impl("rank_agreement", PCOH_BOX(&pcoherence::rank_agreement_rows));
  m.impl("soft_rank", PCOH_BOX(&pcoherence::soft_rank));
}
