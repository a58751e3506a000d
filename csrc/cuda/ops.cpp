// The row kernels as operators of torch, through LibTorch's stable ABI: host checks, device guard, current stream.
// pcoherence/backends/cuda.py calls them; nothing else does.
//
// Conventions: tensors are contiguous, on one device, of one dtype T, float32 or float64, unless said otherwise; what
// an operator writes is given to it. Nothing synchronises.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "../boxing.h"
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

template <class F>
void dispatch(const Tensor& t, const char* name, F&& f) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name, ": expected float32 or float64");
  type == ScalarType::Float ? f(float{}) : f(double{});
}

// ---------------------------------------------------------------- host checks

// Where everything has to be, and the dtype that T stands for.
struct Like {
  const Tensor& model;

  void check(const Tensor& t, const char* name, ScalarType type, std::int64_t count) const {
    STD_TORCH_CHECK(t.is_cuda() == model.is_cuda() && t.get_device_index() == model.get_device_index(), name,
                    ": expected on the device of the distances");
    STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
    STD_TORCH_CHECK(t.scalar_type() == type, name, ": not of the expected dtype");
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

// ---------------------------------------------------------------- rows

// tables, series: what tables() and series() return, on the device. status: int32 [1].
template <class T>
Summation<T> summation(const Like& like, Method method, const Tensor& tables, const Tensor& series,
                       const Tensor& status, const Plan& plan) {
  constexpr std::int64_t table = (2 * GridTable<T>::bins_in_reach + 1) * GridTable<T>::order * GridTable<T>::order;
  const T* t = like.in<T>(tables, "tables", 3 * table);
  const double* s = like.in<double>(series, "series", 2 * kSeriesDegree<T>);
  return {method,
          plan.bins,
          plan.reserve,
          {t, t + table, t + 2 * table, s, s + kSeriesDegree<T>},
          like.out<int>(status, "status", 1)};
}

// Memory for a plan's blocks; returned to torch's allocator after the launch, which is ordered by the stream.
Tensor workspace_like(const Tensor& t, const Plan& plan) {
  return torch::stable::new_empty(t, {plan.workspace_bytes() / 8}, ScalarType::Double);
}
char* bytes(const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }

// How a row's gradient is stored: see RowTask.
struct Stored {
  double chain;
  bool root, wanted;
};

// What rows() and small_rows() have in common.
struct RowArguments {
  Options options;
  Stored stored;
  Tensor student, teacher;  // [b, n] distances
  OptionalTensor weights, self, coefficients;
  Tensor losses, tables, series, status;

  std::int64_t rows() const { return dimension(student, 0, "student"); }
  int n() const { return candidates_of(student, "student"); }

  template <class T>
  Plan plan() const {
    return cuda::plan<T>(current_device(), rows(), n(), options.method);
  }

  template <class T>
  RowTask<T> task(const Plan& plan) const {
    const Like like{student};
    const std::int64_t b = rows(), count = n();
    RowTask<T> t{};
    t.options = options;
    t.sums = summation<T>(like, options.method, tables, series, status, plan);
    t.rows = b;
    t.n = n();
    t.gradient = stored.wanted ? like.out<T>(student, "student", b * count) : nullptr;
    t.student = like.in<T>(student, "student", b * count);
    t.teacher = like.in<T>(teacher, "teacher", b * count);
    t.weights = like.in<T>(weights, "weights", count);
    t.self = like.in<std::int64_t>(self, "self_index", b);
    t.coefficients = like.in<T>(coefficients, "coefficients", b);
    t.chain = stored.chain;
    t.chain_root = stored.root;
    t.losses = like.out<double>(losses, "losses", b);
    return t;
  }
};

// One network of a small batch: features [m, d], and [n, d] or none where the candidates are the anchors.
template <class T>
Cloud<T> cloud(const Like& like, const Tensor& anchors, const OptionalTensor& candidates, Metric metric, std::int64_t m,
               std::int64_t n) {
  const std::int64_t width = dimension(anchors, 1, "anchors");
  Cloud<T> c{};
  c.anchors = like.in<T>(anchors, "anchors", m * width);
  c.candidates = candidates ? like.in<T>(*candidates, "candidates", n * width) : c.anchors;
  STD_TORCH_CHECK(candidates || m == n, "candidates: expected, since there are not as many as anchors");
  c.width = static_cast<int>(width);
  c.same = !candidates;
  c.traits = traits(metric);
  STD_TORCH_CHECK(c.traits.products, "metric: not part of the CUDA kernels");
  return c;
}

}  // namespace

// ---------------------------------------------------------------- operators: their schemas are at the end

namespace operators {

// unit, teacher_unit: float64, 0-d, see RowTask.
void rows(Tensor student, Tensor teacher, OptionalTensor weights, OptionalTensor self_index,
          OptionalTensor coefficients, double temperature, double teacher_temperature, std::string packed,
          OptionalTensor unit, OptionalTensor teacher_unit, double chain, bool root, bool gradient, Tensor losses,
          Tensor tables, Tensor series, Tensor status) {
  const RowArguments a{unpacked(packed, temperature, teacher_temperature),
                       {chain, root, gradient},
                       student,
                       teacher,
                       weights,
                       self_index,
                       coefficients,
                       losses,
                       tables,
                       series,
                       status};
  const OnDevice on(student);
  dispatch(student, "student", [&](auto zero) {
    using T = decltype(zero);
    const Plan p = a.plan<T>();
    SmallTask<T> task{.row = a.task<T>(p), .features = false};
    const Like like{student};
    task.row.student_unit = like.in<double>(unit, "unit", 1);
    task.row.teacher_unit = like.in<double>(teacher_unit, "teacher_unit", 1);
    const Tensor workspace = workspace_like(student, p);
    launch(task, p, bytes(workspace), on.stream);
  });
  check_launch();
}

// student_candidates and teacher_candidates: both or neither. shrinks, candidate_shrinks: float64 [m], [n], 1 / |x| for
// a metric of directions, written for small_gradient().
void small_rows(Tensor student, OptionalTensor student_candidates, Tensor teacher, OptionalTensor teacher_candidates,
                OptionalTensor weights, OptionalTensor self_index, OptionalTensor coefficients, double temperature,
                double teacher_temperature, std::string packed, bool gradient, Tensor student_distances,
                Tensor teacher_distances, OptionalTensor shrinks, OptionalTensor candidate_shrinks, Tensor losses,
                Tensor tables, Tensor series, Tensor status) {
  const Options options = unpacked(packed, temperature, teacher_temperature);
  const MetricTraits metric = traits(options.metric);
  const RowArguments a{options,
                       {metric.chain, metric.root, gradient},
                       student_distances,
                       teacher_distances,
                       weights,
                       self_index,
                       coefficients,
                       losses,
                       tables,
                       series,
                       status};
  const OnDevice on(student);
  dispatch(student, "student", [&](auto zero) {
    using T = decltype(zero);
    const Like like{student};
    const std::int64_t m = a.rows();
    const int n = a.n();
    const Plan p = a.plan<T>();
    SmallTask<T> task{};
    task.row = a.task<T>(p);
    task.features = true;
    task.student = cloud<T>(like, student, student_candidates, options.metric, m, n);
    task.teacher = cloud<T>(like, teacher, teacher_candidates, options.teacher_metric, m, n);
    task.student.anchor_shrinks = like.out<double>(shrinks, "shrinks", m);
    task.student.candidate_shrinks = like.out<double>(candidate_shrinks, "candidate_shrinks", n);
    task.student_distances = like.out<T>(student_distances, "student_distances", m * n);
    task.teacher_distances = like.out<T>(teacher_distances, "teacher_distances", m * n);
    const Tensor workspace = workspace_like(student, p);
    launch(task, p, bytes(workspace), on.stream);
  });
  check_launch();
}

void small_gradient(Tensor student, OptionalTensor student_candidates, Tensor v, std::string metric,
                    OptionalTensor shrinks, OptionalTensor candidate_shrinks, Tensor losses,
                    OptionalTensor coefficients, OptionalTensor out, OptionalTensor candidates_out, Tensor total) {
  const OnDevice on(student);
  dispatch(student, "student", [&](auto zero) {
    using T = decltype(zero);
    const Like like{student};
    SmallGradientTask<T> task{};
    task.rows = dimension(v, 0, "v");
    task.n = candidates_of(v, "v");
    const auto parsed = named<Metric>(kMetricNames, metric, "metric");
    task.cloud = cloud<T>(like, student, student_candidates, parsed, task.rows, task.n);
    STD_TORCH_CHECK(!task.cloud.traits.directions || (shrinks && (task.cloud.same || candidate_shrinks)),
                    "shrinks: expected for the metric '", metric, "'");
    task.cloud.anchor_shrinks = like.out<double>(shrinks, "shrinks", task.rows);
    task.cloud.candidate_shrinks = like.out<double>(candidate_shrinks, "candidate_shrinks", task.n);
    task.v = like.in<T>(v, "v", task.rows * task.n);
    task.anchors = like.out<T>(out, "out", student.numel());
    task.candidates =
        like.out<T>(candidates_out, "candidates_out", student_candidates ? student_candidates->numel() : 0);
    task.losses = like.in<double>(losses, "losses", task.rows);
    task.coefficients = like.in<T>(coefficients, "coefficients", task.rows);
    task.total = like.out<T>(total, "total", 1);
    launch(task, on.stream);
  });
  check_launch();
}

// out: T [r, n]; see SoftRankTask.
void soft_rank(Tensor values, OptionalTensor weights, OptionalTensor upstream, double temperature, std::string method,
               Tensor out, Tensor tables, Tensor series, Tensor status) {
  const OnDevice on(values);
  dispatch(values, "values", [&](auto zero) {
    using T = decltype(zero);
    const Like like{values};
    SoftRankTask<T> task{};
    task.rows = dimension(values, 0, "values");
    task.n = candidates_of(values, "values");
    const std::int64_t count = task.rows * task.n;
    const auto parsed = named<Method>(kMethodNames, method, "method");
    const Plan p = plan<T>(current_device(), task.rows, task.n, parsed);
    task.sums = summation<T>(like, parsed, tables, series, status, p);
    task.weights_per_row = weights && weights->dim() == 2;
    task.values = like.in<T>(values, "values", count);
    task.weights = like.in<T>(weights, "weights", task.weights_per_row ? count : task.n);
    task.upstream = like.in<T>(upstream, "upstream", count);
    task.out = like.out<T>(out, "out", count);
    task.temperature = temperature;
    const Tensor workspace = workspace_like(values, p);
    launch(task, p, bytes(workspace), on.stream);
  });
  check_launch();
}

void row_sums(Tensor matrix, Tensor sums) {
  const OnDevice on(matrix);
  dispatch(matrix, "matrix", [&](auto zero) {
    using T = decltype(zero);
    const Like like{matrix};
    RowSumsTask<T> task{};
    task.rows = dimension(matrix, 0, "matrix");
    task.n = candidates_of(matrix, "matrix");
    task.matrix = like.in<T>(matrix, "matrix", task.rows * task.n);
    task.sums = like.out<double>(sums, "sums", task.rows);
    launch(task, on.stream);
  });
  check_launch();
}

// ---------------------------------------------------------------- distances and gradients

// One network's points made ready for products, as pcoherence/backends/points.py says. numbers: float64 [1 + d], the
// scale and the centre. anchors T [m, d]; prepared, scaled T [m, d], norms float64 [m]; scaled is null for directions,
// whose prepared points serve. Candidates likewise, or none where they are the anchors. first: int64 [n].
void prepare(Tensor anchors, OptionalTensor candidates, bool directions, Tensor numbers, Tensor prepared, Tensor norms,
             OptionalTensor scaled, OptionalTensor candidate_prepared, OptionalTensor candidate_norms,
             OptionalTensor candidate_scaled, Tensor first) {
  const OnDevice on(anchors);
  dispatch(anchors, "anchors", [&](auto zero) {
    using T = decltype(zero);
    const Like like{anchors};
    const bool same = !candidates;
    STD_TORCH_CHECK(same || (candidate_prepared && candidate_norms && (directions || candidate_scaled)),
                    "candidate_prepared: expected for candidates that are not the anchors");
    STD_TORCH_CHECK(directions || scaled, "scaled: expected for points that are not directions");
    const std::int64_t m = dimension(anchors, 0, "anchors"), n = same ? m : dimension(*candidates, 0, "candidates");
    const std::int64_t width = dimension(anchors, 1, "anchors"), size = table_size(n);
    STD_TORCH_CHECK(n > 0, "candidates: expected at least one");
    const T* from = same ? like.in<T>(anchors, "anchors", m * width) : like.in<T>(*candidates, "candidates", n * width);
    double* given = like.out<double>(numbers, "numbers", 1 + width);

    // Hashes, what the centre needs, the table, slots: in this order, each aligned to what it holds.
    const std::int64_t doubles = n + kCentreMemory, ints = 2 * size + n;
    const Tensor workspace = torch::stable::new_empty(anchors, {doubles + (ints + 1) / 2}, ScalarType::Double);
    auto* hashes = reinterpret_cast<std::uint64_t*>(bytes(workspace));
    auto* memory = reinterpret_cast<double*>(hashes + n);
    auto* table = reinterpret_cast<int*>(memory + kCentreMemory);
    const Identity found{table, table + size, table + 2 * size, size};

    launch(CentreTask<T>{n, static_cast<int>(width), directions, from, given + 1, given, memory}, on.stream);
    PrepareTask<T> task{m,
                        static_cast<int>(width),
                        directions,
                        like.in<T>(anchors, "anchors", m * width),
                        given + 1,
                        given,
                        like.out<T>(prepared, "prepared", m * width),
                        directions ? nullptr : like.out<T>(scaled, "scaled", m * width),
                        like.out<double>(norms, "norms", m),
                        same ? hashes : nullptr,
                        table};
    launch(task, on.stream);
    if (!same) {
      task.rows = n;
      task.points = from;
      task.prepared = like.out<T>(candidate_prepared, "candidate_prepared", n * width);
      task.scaled = directions ? nullptr : like.out<T>(candidate_scaled, "candidate_scaled", n * width);
      task.norms = like.out<double>(candidate_norms, "candidate_norms", n);
      task.hashes = hashes;
      launch(task, on.stream);
    }
    launch(IdenticalTask<T>{n, static_cast<int>(width), directions ? task.prepared : task.scaled, hashes, found},
           on.stream);
    launch(FirstTask<T>{n, found, like.out<std::int64_t>(first, "first", n)}, on.stream);
  });
  check_launch();
}

// near: int32 [b, ceil(n / 32)] is written; see ProductTask for the rest.
void product_distances(Tensor out, Tensor products, Tensor anchor_norms, Tensor candidate_norms, Tensor anchors,
                       Tensor candidates, Tensor first, Tensor near, std::int64_t begin, bool same, bool root,
                       double factor) {
  const OnDevice on(out);
  dispatch(out, "out", [&](auto zero) {
    using T = decltype(zero);
    const Like like{out};
    ProductTask<T> task{};
    task.rows = dimension(out, 0, "out");
    task.n = candidates_of(out, "out");
    task.width = static_cast<int>(dimension(anchors, 1, "anchors"));
    task.products = like.in<T>(products, "products", task.rows * task.n);
    task.out = like.out<T>(out, "out", task.rows * task.n);
    STD_TORCH_CHECK(task.out != task.products || task.rows * task.n == 0, "out: expected other memory than products");
    task.near = like.out<unsigned>(near, "near", task.rows * words_of(task.n));
    task.anchor_norms = like.in<double>(anchor_norms, "anchor_norms", task.rows);
    task.candidate_norms = like.in<double>(candidate_norms, "candidate_norms", task.n);
    task.anchors = like.in<T>(anchors, "anchors", task.rows * task.width);
    task.candidates = like.in<T>(candidates, "candidates", std::int64_t(task.n) * task.width);
    task.first = like.in<std::int64_t>(first, "first", task.n);
    STD_TORCH_CHECK(!same || begin + task.rows <= task.n, "begin: expected anchors that are candidates");
    task.begin = begin;
    task.same = same;
    task.root = root;
    task.factor = static_cast<T>(factor);
    launch(task, on.stream);
  });
  check_launch();
}

// v: [rows of points, rows of others], or its transpose where `transposed`; near: as made for v.
void accumulate_differences(Tensor out, Tensor points, Tensor others, Tensor v, Tensor near, bool transposed) {
  const OnDevice on(out);
  dispatch(out, "out", [&](auto zero) {
    using T = decltype(zero);
    const Like like{out};
    PullTask<T> task{};
    task.rows = dimension(points, 0, "points");
    task.n = static_cast<int>(dimension(others, 0, "others"));
    task.width = static_cast<int>(dimension(points, 1, "points"));
    const std::int64_t columns = transposed ? task.rows : task.n, lines = transposed ? task.n : task.rows;
    task.points = like.in<T>(points, "points", task.rows * task.width);
    task.others = like.in<T>(others, "others", std::int64_t(task.n) * task.width);
    task.v = like.in<T>(v, "v", lines * columns);
    STD_TORCH_CHECK(dimension(v, 1, "v") == columns, "v: expected ", columns, " columns, got ", v.size(1));
    task.row_stride = transposed ? 1 : columns;
    task.column_stride = transposed ? columns : 1;
    task.near = like.in<unsigned>(near, "near", lines * words_of(columns));
    task.transposed = transposed;
    task.out = like.out<T>(out, "out", task.rows * task.width);
    launch(task, on.stream);
  });
  check_launch();
}

void clear_near(Tensor v, Tensor near) {
  const OnDevice on(v);
  dispatch(v, "v", [&](auto zero) {
    using T = decltype(zero);
    const Like like{v};
    ClearTask<T> task{};
    task.rows = dimension(v, 0, "v");
    task.n = candidates_of(v, "v");
    task.near = like.in<unsigned>(near, "near", task.rows * words_of(task.n));
    task.v = like.out<T>(v, "v", task.rows * task.n);
    launch(task, on.stream);
  });
  check_launch();
}

// The upper triangle mirrored, or with `add` the transpose added. matrix: T [n, n].
void symmetrise(Tensor matrix, bool add) {
  const OnDevice on(matrix);
  dispatch(matrix, "matrix", [&](auto zero) {
    using T = decltype(zero);
    SymmetriseTask<T> task{};
    task.n = dimension(matrix, 0, "matrix");
    task.matrix = Like{matrix}.out<T>(matrix, "matrix", task.n * task.n);
    task.add = add;
    launch(task, on.stream);
  });
  check_launch();
}

// ---------------------------------------------------------------- constants, on the host

// [3, ...]: the grid's tables of sigmoid, slope and softplus, in the dtype of `like`; to be copied to the device once.
Tensor tables(Tensor like) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  std::optional<Tensor> result;
  dispatch(like, "like", [&](auto zero) {
    using T = decltype(zero);
    const auto size = static_cast<std::int64_t>(grid_table<T>(Kernel::sigmoid).values.size());
    result = torch::stable::empty({3 * size}, scalar_type<T>, std::nullopt, cpu);
    T* out = static_cast<T*>(result->mutable_data_ptr());
    for (const Kernel kernel : {Kernel::sigmoid, Kernel::slope, Kernel::softplus}) {
      const auto& values = grid_table<T>(kernel).values;
      out = std::copy(values.begin(), values.end(), out);
    }
  });
  return *result;
}

// float64 [2, degree]: the scan's series of sigmoid and softplus for the dtype of `like`.
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

}  // namespace operators
}  // namespace pcoherence::cuda

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
      "prepare(Tensor anchors, Tensor? candidates, bool directions, Tensor(a!) numbers, Tensor(b!) prepared, "
      "Tensor(c!) norms, Tensor(d!)? scaled, Tensor(e!)? candidate_prepared, Tensor(f!)? candidate_norms, "
      "Tensor(g!)? candidate_scaled, Tensor(h!) first) -> ()");
  m.def(
      "product_distances(Tensor(a!) out, Tensor products, Tensor anchor_norms, Tensor candidate_norms, "
      "Tensor anchors, Tensor candidates, Tensor first, Tensor(b!) near, int begin, bool same, bool root, "
      "float factor) -> ()");
  m.def(
      "accumulate_differences(Tensor(a!) out, Tensor points, Tensor others, Tensor v, Tensor near, bool transposed) "
      "-> ()");
  m.def("clear_near(Tensor(a!) v, Tensor near) -> ()");
  m.def("symmetrise(Tensor(a!) matrix, bool add) -> ()");
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
  m.impl("symmetrise", PCOH_BOX(&pcoherence::cuda::operators::symmetrise));
  m.impl("tables", PCOH_BOX(&pcoherence::cuda::operators::tables));
  m.impl("series", PCOH_BOX(&pcoherence::cuda::operators::series_of));
  m.impl("resources", PCOH_BOX(&pcoherence::cuda::operators::resources_of));
}
