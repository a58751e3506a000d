// Operators on rows: losses, ranks and small batches.
#pragma once

#include <string>

#include "checks.h"

namespace pcoherence::cuda {
namespace {

// tables, series: what tables() and series() return, on the device. status: int32 [1].
template <class T>
Summation<T> summation(const Like& like, Method method, const Tensor& tables, const Tensor& series,
                       const Tensor& status, const Plan& plan) {
  constexpr std::int64_t table = DeviceGrid<T>::size;
  const T* t = like.in<T>(tables, "tables", 3 * table);
  const double* s = like.in<double>(series, "series", 2 * kSeriesDegree<T>);
  return {method,
          plan.bins,
          plan.reserve,
          {t, t + table, t + 2 * table, s, s + kSeriesDegree<T>},
          like.out<int>(status, "status", 1)};
}

// The plan's memory returns to torch's allocator after the launch, which is ordered by the stream.
template <class Task>
void launch_rows(const Like& like, const Task& task, const Plan& plan, Stream stream) {
  const Tensor workspace = torch::stable::new_empty(like.model, {plan.workspace_bytes() / 8}, ScalarType::Double);
  launch(task, plan, bytes(workspace), stream);
}

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
    t.by_anchor = weights && weights->dim() == 2;
    t.weights = like.in<T>(weights, "weights", t.by_anchor ? b * count : count);
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
GivenPoints<T> given_points(const Like& like, const Tensor& anchors, const OptionalTensor& candidates, Metric metric,
                            std::int64_t m, std::int64_t n) {
  const std::int64_t width = dimension(anchors, 1, "anchors");
  GivenPoints<T> c{};
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

namespace operators {
namespace {

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
  on_device(student, "student", [&](auto zero, const Like& like, Stream stream) {
    using T = decltype(zero);
    const Plan p = a.plan<T>();
    SmallTask<T> task{.row = a.task<T>(p), .features = false};
    task.row.student_unit = like.in<double>(unit, "unit", 1);
    task.row.teacher_unit = like.in<double>(teacher_unit, "teacher_unit", 1);
    launch_rows(like, task, p, stream);
  });
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
  on_device(student, "student", [&](auto zero, const Like& like, Stream stream) {
    using T = decltype(zero);
    const std::int64_t m = a.rows();
    const int n = a.n();
    const Plan p = a.plan<T>();
    SmallTask<T> task{};
    task.row = a.task<T>(p);
    task.features = true;
    task.student = given_points<T>(like, student, student_candidates, options.metric, m, n);
    task.teacher = given_points<T>(like, teacher, teacher_candidates, options.teacher_metric, m, n);
    task.student.anchor_shrinks = like.out<double>(shrinks, "shrinks", m);
    task.student.candidate_shrinks = like.out<double>(candidate_shrinks, "candidate_shrinks", n);
    task.student_distances = like.out<T>(student_distances, "student_distances", m * n);
    task.teacher_distances = like.out<T>(teacher_distances, "teacher_distances", m * n);
    launch_rows(like, task, p, stream);
  });
}

void small_gradient(Tensor student, OptionalTensor student_candidates, Tensor v, std::string metric,
                    OptionalTensor shrinks, OptionalTensor candidate_shrinks, Tensor losses,
                    OptionalTensor coefficients, OptionalTensor out, OptionalTensor candidates_out, Tensor total) {
  on_device(student, "student", [&](auto zero, const Like& like, Stream stream) {
    using T = decltype(zero);
    SmallGradientTask<T> task{};
    task.rows = dimension(v, 0, "v");
    task.n = candidates_of(v, "v");
    const auto parsed = named<Metric>(kMetricNames, metric, "metric");
    task.points = given_points<T>(like, student, student_candidates, parsed, task.rows, task.n);
    STD_TORCH_CHECK(!task.points.traits.directions || (shrinks && (task.points.same || candidate_shrinks)),
                    "shrinks: expected for the metric '", metric, "'");
    task.points.anchor_shrinks = like.out<double>(shrinks, "shrinks", task.rows);
    task.points.candidate_shrinks = like.out<double>(candidate_shrinks, "candidate_shrinks", task.n);
    task.v = like.in<T>(v, "v", task.rows * task.n);
    task.anchors = like.out<T>(out, "out", student.numel());
    task.candidates =
        like.out<T>(candidates_out, "candidates_out", student_candidates ? student_candidates->numel() : 0);
    task.losses = like.in<double>(losses, "losses", task.rows);
    task.coefficients = like.in<T>(coefficients, "coefficients", task.rows);
    task.total = like.out<T>(total, "total", 1);
    launch(task, stream);
  });
}

// All float64. out: [r, n]; see SoftRankTask.
void soft_rank(Tensor values, OptionalTensor weights, OptionalTensor upstream, double temperature, std::string method,
               Tensor out, Tensor tables, Tensor series, Tensor status) {
  using T = double;
  const OnDevice on(values);
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
  launch_rows(like, task, p, on.stream);
  check_launch();
}

}  // namespace
}  // namespace operators
}  // namespace pcoherence::cuda
