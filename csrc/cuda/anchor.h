// One anchor's row by one group of threads, from distances to loss and gradient: what csrc/cpu/anchor.h does, with the
// same meaning in every corner (rows without weight, NaN, ties, vanishing gradients).
#pragma once

#include "objectives.h"

namespace pcoherence::cuda {

template <class T>
struct RowTask {
  Options options;
  Summation<T> sums;
  std::int64_t rows;
  int n;
  const T* student;                           // [rows, n] distances
  const T* teacher;                           // [rows, n] distances, or for hard ranks anything in the same order
  const double *student_unit, *teacher_unit;  // [1] a distance in the metric = unit * the distance here; or null: 1
  const T* weights;                           // [n] of the candidates, or null: ones
  const std::int64_t* self;                   // [rows] candidate excluded, -1 for none; or null
  const T* coefficients;                      // [rows] c_i, or null: ones
  double chain;     // what a gradient w.r.t. a distance is multiplied by before it is stored, ...
  bool chain_root;  // ... and with this divided by the distance (0 where that is 0)
  T* gradient;      // [rows, n] of c_i L_i, or null: losses alone. May be `student`
  double* losses;   // [rows] L_i
};

// A row that has neither ranks nor a gradient of its own: everything of it is `value`.
template <class T, class G>
PCOH_DEVICE void give_up(G& g, const RowTask<T>& task, std::int64_t r, double value) {
  if (task.gradient != nullptr) fill(g, task.gradient + r * task.n, T(value), task.n);
  if (g.thread() == 0) task.losses[r] = value;
}

template <class T>
PCOH_DEVICE Scaling scaling(Scale scale, const Stats<T>& s, double temperature, const double* unit) {
  const double mean = scale == Scale::anchor ? s.mean() : 1;
  return pcoherence::scaling(s.low, s.high, mean, (unit != nullptr ? *unit : 1) / temperature);
}

// pull [n] times `factor`, the gradient w.r.t. positions (in temperatures) -> what the pipeline stores. row: positions.
template <class T, class G>
PCOH_APART void store_gradient(G& g, const RowTask<T>& task, std::int64_t r, const RowView<T>& row, double unit,
                               const Stats<T>& s, const Scaling& scale, const T* pull, T factor) {
  const double coefficient = task.coefficients ? double(task.coefficients[r]) : 1.0;
  double through_mean = 0;  // -sum_k pull_k s_k: the pull on log(mean)
  if (task.options.scale == Scale::anchor) {
    double sum = 0;
    by_memory(g, pull, [&](const T* from) {
      each(g, row.n, [&, values = row.values](int k) { sum += double(from[k] * factor) * double(values[k]); });
    });
    through_mean = -coefficient * total(g, sum) * unit;
  }
  const double mean = s.mean();
  const bool by_mean = task.options.scale == Scale::anchor && mean > 0;
  const T per_pull = static_cast<T>(coefficient * scale.per_distance * task.chain);
  const T per_weight = by_mean ? static_cast<T>(through_mean / (s.weight * mean) * task.chain) : T(0);
  const T* distances = task.student + r * task.n;  // may be `out`: every thread reads an element before it writes it
  T* out = task.gradient + r * task.n;
  const bool chain_root = task.chain_root;
  by_memory(g, pull, [&](const T* from) {
    with_weights(row, [&](auto weight) {
      each(g, row.n, [=](int k) {
        const T d = distances[k];
        const T v = from[k] * factor * per_pull + weight(k) * per_weight;
        out[k] = !chain_root ? v : d > 0 ? v / d : T(0);
      });
    });
  });
}

// Memory of one group for rows of n: the teacher's ranks, then either the teacher's values and their ranking or the
// student's values and ranks with the kernel sums.
template <class T, class G>
constexpr std::int64_t row_bytes(std::int64_t n, int threads, std::int64_t bins) {
  const std::int64_t row = n * sizeof(T) + 16, sort = hard_rank_bytes(n, sizeof(T));
  const std::int64_t grid = Grid<T, G>::bytes(bins) + Grid<T, G>::lane_bytes(threads);
  std::int64_t sums = grid;
  if (Scan<T, G>::bytes(n, threads) > sums) sums = Scan<T, G>::bytes(n, threads);
  if (Pairs<T, G>::bytes(n) > sums) sums = Pairs<T, G>::bytes(n);
  return row + (sort > row + sums ? row + sort : 2 * row + sums);
}

template <class T, class G>
PCOH_APART void anchor_row(G& g, const RowTask<T>& task, std::int64_t r, Arena arena) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  const int n = task.n;
  const std::int64_t row_size = std::int64_t(n) * sizeof(T) + 16;
  const int self = task.self ? static_cast<int>(task.self[r]) : -1;

  // F^T is touched twice, all else again and again: it is the first to leave fast memory.
  T* teacher = arena.take<T>(n, 3 * row_size + task.sums.reserve);
  double entropy = 0;  // sum_jk w_j w_k H(P_jk), for cross_entropy
  {
    Arena stage = arena;
    T* values = stage.take<T>(n, task.sums.reserve);
    const RowView<T> row{values, task.weights, n, self};
    const Stats<T> t = stats(g, row, task.teacher + r * n);
    if (t.weight == 0) return give_up(g, task, r, 0);  // nobody to compare: the anchor contributes nothing
    if (!t.finite()) return give_up(g, task, r, nan);
    if (!task.options.soft_teacher()) {
      const HardRanks<T> hard{t.count, t.weight, t.uniform(), t.low, t.high};
      const double ties = hard_ranks(g, row, hard, teacher, stage);
      if (task.options.objective == Objective::cross_entropy) entropy = 0.69314718055994530942 * ties;  // log 2
    } else {
      const T per_weight = static_cast<T>(1 / t.weight);
      const Scaling scale = scaling(task.options.scale, t, task.options.teacher_temperature, task.teacher_unit);
      const bool done = with_sums(g, task.sums, row, t.range(), scale, stage, [&](auto& sums) {
        sums.ranks(teacher);
        g.sync();
        each(g, n, [=](int k) { teacher[k] *= per_weight; });
        if (task.options.objective == Objective::cross_entropy)
          entropy = sums.softplus_total() - t.weight * linear_part(g, row, sums.unit, teacher);
      });
      if (!done) return give_up(g, task, r, nan);
    }
    g.sync();  // the stage's memory is used again
  }

  T* values = arena.take<T>(n, task.sums.reserve);
  const RowView<T> row{values, task.weights, n, self};
  const Stats<T> s = stats(g, row, task.student + r * n);
  if (!s.finite()) return give_up(g, task, r, nan);
  T* ranks = arena.take<T>(n, task.sums.reserve);
  const Scaling scale = scaling(task.options.scale, s, task.options.temperature, task.student_unit);
  const bool done = with_sums(g, task.sums, row, s.range(), scale, arena, [&](auto& sums) {
    sums.ranks(ranks);
    g.sync();
    double loss = 0;
    T factor = static_cast<T>(1 / s.weight);  // of what `ranks` becomes, to be the gradient w.r.t. positions
    if (task.options.objective == Objective::cross_entropy) {
      loss = (sums.softplus_total() - s.weight * linear_part(g, row, sums.unit, teacher) - entropy) /
             (s.weight * s.weight);
      each(g, n, [&](int k) { ranks[k] = row.weight(k) * (ranks[k] * factor - teacher[k]); });
      factor *= 2;
    } else {
      loss = objective(g, task.options.objective, row, teacher, s.weight, ranks);
      if (task.gradient != nullptr) sums.pullback(ranks, ranks);
    }
    if (g.thread() == 0) task.losses[r] = loss;
    g.sync();
    if (task.gradient != nullptr) store_gradient(g, task, r, row, sums.unit, s, scale, ranks, factor);
  });
  if (!done) give_up(g, task, r, nan);
}

}  // namespace pcoherence::cuda
