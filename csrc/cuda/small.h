// Batches of a few hundred points: what users of ordinary batches wait for is launches, not arithmetic. One kernel goes
// from the features given to every anchor's loss and V, a second one to the gradient of the features and the total.
// Distances and gradients come from differences in float64: nothing cancels, over- or underflows, and equal points tie.
#pragma once

#include "distances.h"
#include "row.h"

namespace pcoherence::cuda {

template <class T>
struct Cloud {
  const T* anchors;     // [rows, width]
  const T* candidates;  // [n, width]; the anchors themselves where `same`
  int width;
  bool same;
  MetricTraits traits;                         // of a metric that comes from |a - c|^2
  double *anchor_lengths, *candidate_lengths;  // [rows], [n] |x| for metrics of directions are written here, or null
};

// Also an ordinary RowTask, from distances: where `features` is false, the rest is not used. One kernel for both is
// compiled in half the time, and the choice costs a row nothing.
template <class T>
struct SmallTask {
  RowTask<T> row;
  bool features;
  Cloud<T> student, teacher;
  T *student_distances, *teacher_distances;  // [rows, n]: row.student, row.teacher
};

template <class T>
struct SmallGradientTask {
  Cloud<T> cloud;
  std::int64_t rows;
  int n;
  const T* v;             // [rows, n]
  T* anchors;             // [rows, width] or null; where `same`, all of the gradient
  T* candidates;          // [n, width] or null
  const double* losses;   // [rows]
  const T* coefficients;  // [rows]
  T* total;               // [1] sum_i c_i L_i
};

// |x| by one warp; infinite for a zero vector, which has no direction and stays zero.
template <class T, class G>
PCOH_DEVICE double length(G& g, const T* x, int width) {
  const double square = sum_over_features(g, width, [=](int f) { return double(x[f]) * double(x[f]); });
  return square == 0 ? std::numeric_limits<double>::infinity() : std::sqrt(square);
}

// Distances of anchor r into out [n].
template <class T, class G>
PCOH_DEVICE void small_distances(G& g, const Cloud<T>& cloud, std::int64_t r, int n, bool order_only, T* out) {
  const MetricTraits& m = cloud.traits;
  const T* a = cloud.anchors + r * cloud.width;
  const double a_length = m.directions ? length(g, a, cloud.width) : 1.0;
  if (cloud.anchor_lengths != nullptr && g.thread() == 0) cloud.anchor_lengths[r] = a_length;
  for (int k = g.warp(); k < n; k += g.warps()) {
    const T* c = cloud.candidates + std::int64_t(k) * cloud.width;
    double d;
    if (m.directions) {
      const double c_length = length(g, c, cloud.width);
      if (cloud.candidate_lengths != nullptr && r == 0 && g.lane() == 0) cloud.candidate_lengths[k] = c_length;
      d = m.factor * sum_over_features(g, cloud.width, [=](int f) {
            const double difference = double(a[f]) / a_length - double(c[f]) / c_length;
            return difference * difference;
          });
    } else {
      d = m.factor * squared_difference(g, a, c, cloud.width);
      if (m.root && !order_only) d = std::sqrt(d);
    }
    if (g.lane() == 0) out[k] = static_cast<T>(d);
  }
}

template <class T, class G>
PCOH_DEVICE void small_row(G& g, const SmallTask<T>& task, std::int64_t r, Arena arena) {
  if (task.features) {
    const std::int64_t start = r * task.row.n;
    small_distances(g, task.teacher, r, task.row.n, !task.row.soft_teacher, task.teacher_distances + start);
    small_distances(g, task.student, r, task.row.n, false, task.student_distances + start);
    g.sync();
  }
  anchor_row(g, task.row, r, arena);
}

// The gradient of point p: an anchor, or with p >= rows the candidate p - rows. Every thread owns features.
template <class T, class G>
PCOH_DEVICE void small_gradient(G& g, const SmallGradientTask<T>& task, std::int64_t p) {
  const Cloud<T>& cloud = task.cloud;
  const int width = cloud.width;
  const bool anchor = p < task.rows;
  const std::int64_t i = anchor ? p : p - task.rows;
  T* out = (anchor ? task.anchors : task.candidates);
  if (p == 0) {
    double sum = 0;
    for (std::int64_t r = g.thread(); r < task.rows; r += g.threads())
      sum += double(task.coefficients[r]) * task.losses[r];
    sum = total(g, sum);
    if (g.thread() == 0) *task.total = static_cast<T>(sum);
  }
  if (out == nullptr) return;
  out += i * width;
  const bool directions = cloud.traits.directions;
  const double* anchor_lengths = cloud.anchor_lengths;
  const double* candidate_lengths = cloud.same ? cloud.anchor_lengths : cloud.candidate_lengths;
  const T* own = (anchor ? cloud.anchors : cloud.candidates) + i * width;
  const T* others = anchor ? cloud.candidates : cloud.anchors;
  const double* own_length = anchor ? anchor_lengths : candidate_lengths;
  const double* lengths = anchor ? candidate_lengths : anchor_lengths;
  const double shrink = directions ? 1 / own_length[i] : 1.0;
  const int count = anchor ? task.n : static_cast<int>(task.rows);
  // d / d x_i of sum_rk V_rk |..|: row i of V, column i of V, or both where the candidates are the anchors.
  const auto v_of = [&](int j) {
    if (!anchor) return double(task.v[j * std::int64_t(task.n) + i]);
    const double v = double(task.v[i * task.n + j]);
    return cloud.same ? v + double(task.v[j * std::int64_t(task.n) + i]) : v;
  };
  double along = 0;  // directions: the gradient's part along x, which x / |x| does not feel
  for (int f = g.thread(); f < width; f += g.threads()) {
    const double x = double(own[f]) * shrink;
    double sum = 0;
    for (int j = 0; j < count; ++j) {
      const double v = v_of(j);
      if (v == 0) continue;  // of weight 0, whatever the point is
      const double y = double(others[std::int64_t(j) * width + f]) * (directions ? 1 / lengths[j] : 1.0);
      sum += v * (x - y);
    }
    out[f] = static_cast<T>(sum);
    along += double(out[f]) * x;
  }
  if (!directions) return;
  along = total(g, along);
  for (int f = g.thread(); f < width; f += g.threads())
    out[f] = static_cast<T>((double(out[f]) - along * (double(own[f]) * shrink)) * shrink);
}

}  // namespace pcoherence::cuda
