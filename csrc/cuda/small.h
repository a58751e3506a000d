// Batches of a few hundred points: what users of ordinary batches wait for is launches, not arithmetic. One kernel goes
// from the features given to every anchor's loss and V, a second one to the gradient of the features and the total.
// Distances and gradients come from differences, summed in float64: nothing cancels, and equal points tie. Features are
// taken as they are: in float32 differences from 1e-18 to 1e18 leave room for V, which is a gradient over a distance.
// What counts is conversions to float64, a quarter as fast as its arithmetic, and loads that wait for others.
#pragma once

#include "anchor.h"
#include "distances.h"

namespace pcoherence::cuda {

template <class T>
struct GivenPoints {
  const T* anchors;     // [rows, width]
  const T* candidates;  // [n, width]; the anchors themselves where `same`
  int width;
  bool same;
  MetricTraits traits;                         // of a metric that comes from |a - c|^2
  double *anchor_shrinks, *candidate_shrinks;  // [rows], [n] 1 / |x| of metrics of directions, or null
};

// Also an ordinary RowTask, from distances: where `features` is false, the rest is not used. One kernel for both is
// compiled in half the time, and the choice costs a row nothing.
template <class T>
struct SmallTask {
  RowTask<T> row;
  bool features;
  GivenPoints<T> student, teacher;
  T *student_distances, *teacher_distances;  // [rows, n]: row.student, row.teacher
};

template <class T>
struct SmallGradientTask {
  GivenPoints<T> points;
  std::int64_t rows;
  int n;
  const T* v;             // [rows, n]
  T* anchors;             // [rows, width] or null; where `same`, all of the gradient
  T* candidates;          // [n, width] or null
  const double* losses;   // [rows]
  const T* coefficients;  // [rows], or null: ones
  T* total;               // [1] sum_i c_i L_i
};

// sum_f term(i, f) for i = 0, ..., kTogether - 1 by one warp: for lane l that of i = l % kTogether. Equal terms have
// equal sums, whatever i is.
template <class G, class F>
PCOH_DEVICE double sums_over_features(G& g, int width, F term) {
  double sum[kTogether] = {};
  // 64-bit: a number that cannot overflow lets loads share an address.
  for (std::int64_t f = g.lane(); f < width; f += kWarp) unrolled<kTogether>([&](auto i) { sum[i] += term(i, f); });
  total_by_lane(g, sum);
  return sum[0];
}

// Distances of anchor r into out [n].
template <class T, class G>
PCOH_DEVICE void small_distances(G& g, const GivenPoints<T>& points, std::int64_t r, int n, bool order_only, T* out) {
  const MetricTraits& m = points.traits;
  const int width = points.width, own = g.lane() % kTogether;  // the candidate that a lane finishes
  const T* a = points.anchors + r * width;
  Length anchor(1);
  if (m.directions) {
    // As for candidates below: a point has one length, wherever it stands.
    const double square =
        sums_over_features(g, width, [=](auto, std::int64_t f) { return double(a[f]) * double(a[f]); });
    anchor = Length(square);
    if (points.anchor_shrinks != nullptr && g.thread() == 0) points.anchor_shrinks[r] = anchor.inverse;
  }
  for (int first = g.warp() * kTogether; first < n; first += g.warps() * kTogether) {
    const T* c[kTogether];  // the last ones again where there are no more
    unrolled<kTogether>([&](auto i) {
      const int k = first + i < n ? first + i : n - 1;
      c[i] = points.candidates + std::int64_t(k) * width;
    });
    const bool finishes = g.lane() < kTogether && first + own < n;
    double d;
    if (m.directions) {
      const double square = sums_over_features(g, width, [&](auto i, std::int64_t f) {
        const double value = double(c[i][f]);
        return value * value;
      });
      const Length candidate(square);
      if (points.candidate_shrinks != nullptr && r == 0 && finishes)
        points.candidate_shrinks[first + own] = candidate.inverse;
      double lengths[kTogether], inverses[kTogether];
      unrolled<kTogether>([&](auto i) {
        lengths[i] = g.shuffle(candidate.length, i);
        inverses[i] = g.shuffle(candidate.inverse, i);
      });
      d = m.factor * sums_over_features(g, width, [&](auto i, std::int64_t f) {
            const double difference =
                quotient(double(a[f]), anchor) - quotient(double(c[i][f]), lengths[i], inverses[i]);
            return difference * difference;
          });
    } else {
      d = m.factor * sums_over_features(g, width, [&](auto i, std::int64_t f) {
            const double difference = double(a[f] - c[i][f]);
            return difference * difference;
          });
      if (m.root && !order_only) d = std::sqrt(d);
    }
    if (finishes) out[first + own] = static_cast<T>(d);
  }
}

template <class T, class G>
PCOH_DEVICE void small_row(G& g, const SmallTask<T>& task, std::int64_t r, Arena arena) {
  if (task.features) {
    const std::int64_t start = r * task.row.n;
    small_distances(g, task.teacher, r, task.row.n, !task.row.options.soft_teacher(), task.teacher_distances + start);
    small_distances(g, task.student, r, task.row.n, false, task.student_distances + start);
    g.sync();
  }
  anchor_row(g, task.row, r, arena);
}

// For every feature f: store(f, sum_j term(v(j), j, f)), four terms at a time in their own type, whose loads need not
// wait for each other. v() is called once for a part of the threads' features, and kept in fast memory. A pair whose v
// is 0 counts nothing, whatever its points are.
template <class T, class G, class V, class Term, class Store>
PCOH_DEVICE void sum_over_pairs(G& g, int count, int width, V v, Term term, Store store) {
  constexpr int part = kScratchBytes / sizeof(T);
  T* kept = reinterpret_cast<T*>(g.scratch());
  for (int first = 0; first < width; first += g.threads()) {
    const int f = first + g.thread();
    double sum = 0;
    for (int begin = 0; begin < count; begin += part) {
      const int here = count - begin < part ? count - begin : part;
      g.sync();
      each(g, here, [=](int j) { kept[j] = v(begin + j); });
      g.sync();
      if (f >= width) continue;
      const auto counted = [=](int j) {
        const auto value = term(kept[j], begin + j, f);
        return kept[j] == 0 ? decltype(value)(0) : value;
      };
      int j = 0;
      for (; j + 4 <= here; j += 4) sum += double((counted(j) + counted(j + 1)) + (counted(j + 2) + counted(j + 3)));
      for (; j < here; ++j) sum += double(counted(j));
    }
    if (f < width) store(f, sum);
  }
  g.sync();  // what was kept has been read
}

// The gradient of point p: an anchor, or with p >= rows the candidate p - rows. Every thread owns features.
template <class T, class G>
PCOH_DEVICE void small_gradient(G& g, const SmallGradientTask<T>& task, std::int64_t p) {
  const GivenPoints<T>& points = task.points;
  const int width = points.width;
  const bool anchor = p < task.rows;
  const std::int64_t i = anchor ? p : p - task.rows;
  T* out = (anchor ? task.anchors : task.candidates);
  if (p == 0) {
    double sum = 0;
    each(g, static_cast<int>(task.rows),
         [&](int r) { sum += (task.coefficients ? double(task.coefficients[r]) : 1.0) * task.losses[r]; });
    sum = total(g, sum);
    if (g.thread() == 0) *task.total = static_cast<T>(sum);
  }
  if (out == nullptr) return;
  out += i * width;
  const bool directions = points.traits.directions;
  const double* anchor_shrinks = points.anchor_shrinks;
  const double* candidate_shrinks = points.same ? points.anchor_shrinks : points.candidate_shrinks;
  const T* own = (anchor ? points.anchors : points.candidates) + i * width;
  const T* others = anchor ? points.candidates : points.anchors;
  const double* shrinks = anchor ? candidate_shrinks : anchor_shrinks;  // of the others
  const double shrink = !directions ? 1.0 : anchor ? anchor_shrinks[i] : candidate_shrinks[i];
  const int count = anchor ? task.n : static_cast<int>(task.rows);
  // d / d x_i of sum_rk V_rk |..|: row i of V, column i of V, or both where the candidates are the anchors.
  const int n = task.n;  // and an element's number fits into an int: a batch is small
  const T *row = task.v + i * n, *column = task.v + i;
  const bool both = anchor && points.same;
  const auto v = [=](int j) { return both ? row[j] + column[j * n] : anchor ? row[j] : column[j * n]; };
  if (!directions) {
    sum_over_pairs<T>(
        g, count, width, v, [=](T v, int j, int f) { return v * (own[f] - others[j * width + f]); },
        [=](int f, double sum) { out[f] = static_cast<T>(sum); });
    return;
  }
  double along = 0;  // the gradient's part along x, which x / |x| does not feel
  sum_over_pairs<T>(
      g, count, width, v,
      [=](T v, int j, int f) {
        return double(v) * (double(own[f]) * shrink - double(others[j * width + f]) * shrinks[j]);
      },
      [&](int f, double sum) {
        out[f] = static_cast<T>(sum);
        along += double(out[f]) * (double(own[f]) * shrink);
      });
  along = total(g, along);
  each(g, width,
       [=](int f) { out[f] = static_cast<T>((double(out[f]) - along * (double(own[f]) * shrink)) * shrink); });
}

}  // namespace pcoherence::cuda
