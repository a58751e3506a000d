// One anchor's row, from distances to loss and gradient.
#pragma once

#include "objectives.h"

namespace pcoherence::PCOH_ISA {
namespace {

template <class T>
void divide(T* values, double by, int n) {
  const T factor = static_cast<T>(1 / by);
  for (int k = 0; k < n; k += lanes_v<T>) store(values + k, load(values + k) * factor);
}

struct TeacherResult {
  double entropy = 0;  // sum_jk w_j w_k H(P_jk), for cross_entropy only
  Status status = Status::ok;
};

// F^T into `out`.
template <class T>
TeacherResult teacher_ranks(const Options& options, const AnchorRow<T>& a, const T* weights, int n, bool uniform,
                            const Stats<T>& s, T* out, Workspace& ws) {
  TeacherResult result;
  if (!options.soft_teacher()) {
    const Candidates<T> candidates{n, weights, s.weight, s.count, uniform};
    if (options.objective == Objective::cross_entropy)
      result.entropy = std::log(2.0) * hard_ranks<true>(a.teacher, candidates, s.low, s.high, out, ws);
    else
      hard_ranks<false>(a.teacher, candidates, s.low, s.high, out, ws);
    return result;
  }
  const double mean = options.scale == Scale::anchor ? s.mean : 1.0;
  const Scaling scale = scaling(s.low, s.high, mean, 1 / options.teacher_temperature);
  const SumsRow<T> row{a.teacher, weights, n, s.low, scale};
  result.status = with_sums(options.method, row, ws, [&](auto& sums) {
    sums.ranks(out);
    divide(out, s.weight, n);
    if (options.objective == Objective::cross_entropy)
      result.entropy = sums.softplus_total() - s.weight * linear_part(row, out, 0);
  });
  return result;
}

// Gradient g w.r.t. the positions s, over per_pull -> what the pipeline stores, in place of the student's distances.
template <class T>
void store_gradient(const Options& options, AnchorRow<T>& a, const T* g, double per_pull, const SumsRow<T>& row,
                    const Stats<T>& s) {
  using V = vec_t<T>;
  const T* weights = row.weights;
  const int n = row.n;
  const Scaling& scale = row.scale;
  double through_mean = 0;  // -sum_k g_k s_k: the pull on log(mean)
  if (options.scale == Scale::anchor) {
    Sum sum;
    // Only candidates of weight 0 can lie below, and their g is 0; a range may overflow T.
    const V most = splat<T>(std::numeric_limits<T>::max());
    for (int k = 0; k < n; k += lanes_v<T>)
      sum.add(load(g + k) * vmin(vmax(load(row.values + k) - row.low, V{}), most));
    through_mean = -a.coefficient * per_pull * sum.total() * scale.per_distance;
  }
  const bool by_mean = options.scale == Scale::anchor && s.mean > 0;
  const T per_g = static_cast<T>(a.coefficient * per_pull * scale.per_distance * a.chain);
  const T per_w = by_mean ? static_cast<T>(through_mean / (s.weight * s.mean) * a.chain) : T(0);
  Sum stored;
  for (int k = 0; k < n; k += lanes_v<T>) {
    const V d = load(a.student + k);
    V v = load(g + k) * per_g + load(weights + k) * per_w;
    if (a.chain_root) v = select(d > V{}, v / d, V{});
    stored.add(v);
    store(a.student + k, v);
  }
  a.stored_sum = stored.total();
}

template <class T>
void anchor(const Options& options, const CandidateWeights<T>& c, AnchorRow<T>& a, Workspace& ws) {
  const int n = static_cast<int>(padded(c.n));
  const T* weights = c.weights;
  Weighed weighed = c.weighed;
  if (a.self >= 0) {
    T* without = ws.weights.need<T>(n);
    std::memcpy(without, c.weights, sizeof(T) * n);
    without[a.self] = 0;
    weights = without;
    if (!c.uniform)
      weighed = weigh(weights, n);
    else if (c.weights[a.self] > 0)
      weighed = {c.weighed.total / c.weighed.count * (c.weighed.count - 1), c.weighed.count - 1};
  }
  const Stats<T> t = stats(a.teacher, weights, n, weighed), s = stats(a.student, weights, n, weighed);
  if (s.weight == 0) {  // nobody to compare: the anchor contributes nothing
    if (a.want_gradient) fill_row(a.student, T(0), n);
    return;
  }
  if (!s.finite || !t.finite) {
    a.loss = a.stored_sum = std::numeric_limits<double>::quiet_NaN();
    if (a.want_gradient) fill_row(a.student, std::numeric_limits<T>::quiet_NaN(), n);
    return;
  }

  T* teacher = ws.teacher_ranks.need<T>(n);
  const TeacherResult from_teacher = teacher_ranks(options, a, weights, n, c.uniform, t, teacher, ws);
  a.status = from_teacher.status;
  if (a.status != Status::ok) return;

  const double mean = options.scale == Scale::anchor ? s.mean : 1.0;
  const Scaling scale = scaling(s.low, s.high, mean, 1 / options.temperature);
  const SumsRow<T> row{a.student, weights, n, s.low, scale};
  a.status = with_sums(options.method, row, ws, [&](auto& sums) {
    T* ranks = ws.ranks.need<T>(n);
    sums.ranks(ranks);
    divide(ranks, s.weight, n);
    T* g = ws.pulled.need<T>(n);
    double per_pull = 1;
    if (options.objective == Objective::cross_entropy) {
      const int levels = c.uniform && !options.soft_teacher() ? 2 * weighed.count : 0;  // ties share a half
      a.loss = (sums.softplus_total() - s.weight * linear_part(row, teacher, levels) - from_teacher.entropy) /
               (s.weight * s.weight);
      if (!a.want_gradient) return;
      const T factor = static_cast<T>(2 / s.weight);
      for (int k = 0; k < n; k += lanes_v<T>)
        store(g + k, load(weights + k) * (load(ranks + k) - load(teacher + k)) * factor);
    } else {
      T* residuals = ws.residuals.need<T>(n);
      a.loss = objective(options.objective, ranks, teacher, weights, s.weight, n, residuals);
      if (!a.want_gradient) return;
      sums.pullback(residuals, g);
      per_pull = 1 / s.weight;
    }
    store_gradient(options, a, g, per_pull, row, s);
  });
}

}  // namespace
}  // namespace pcoherence::PCOH_ISA
