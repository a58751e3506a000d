// Anchors' rows (../anchor.h), each by one group of threads.
#pragma once

#include <algorithm>

#include "../anchor.h"
#include "hard_ranks.h"
#include "soft_ranks.h"

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
  const T* weights;                           // [n] of the candidates, [rows, n] with `by_anchor`, or null: ones
  bool by_anchor;
  const std::int64_t* self;  // [rows] candidate excluded, -1 for none; or null
  const T* coefficients;     // [rows] c_i, or null: ones
  double chain;              // what a gradient w.r.t. a distance is multiplied by before it is stored, ...
  bool chain_root;           // ... and with this divided by the distance (0 where that is 0)
  T* gradient;               // [rows, n] of c_i L_i, or null: losses alone. May be `student`
  double* losses;            // [rows] L_i
};

// Memory of one group for a task's row of n.
template <class T, class G>
constexpr std::int64_t task_bytes(std::int64_t n, int threads, std::int64_t bins) {
  const std::int64_t row = row_bytes<T>(n);
  const std::int64_t sort = std::max(hard_rank_bytes<T>(n), places_bytes(2 * n));
  const std::int64_t sums = std::max({Layout<T>::bytes(bins) + Grid<T, G>::bytes(bins) + Grid<T, G>::items_bytes(n),
                                      Scan<T, G>::bytes(n, threads), Pairs<T, G>::bytes(n)});
  // The teacher's stage holds sums or the ranking of hard ranks.
  return kKeptRows * row + row_bytes<double>(n) +
         std::max(kTeacherRows * row + std::max(sort, sums), kStudentRows * row + sums);
}

template <class T, class G>
PCOH_DEVICE void anchor_row(G& g, const RowTask<T>& task, std::int64_t r, Arena arena) {
  const std::int64_t begin = r * task.n;
  const AnchorRow<T> a{.student = task.student + begin,
                       .teacher = task.teacher + begin,
                       .gradient = task.gradient != nullptr ? task.gradient + begin : nullptr,
                       .coefficient = task.coefficients != nullptr ? double(task.coefficients[r]) : 1.0,
                       .chain = task.chain,
                       .chain_root = task.chain_root,
                       .student_unit = task.student_unit != nullptr ? *task.student_unit : 1.0,
                       .teacher_unit = task.teacher_unit != nullptr ? *task.teacher_unit : 1.0};
  const T* weights = task.weights + (task.by_anchor ? begin : 0);
  const Row<T> row{weights, task.n, task.self != nullptr ? static_cast<int>(task.self[r]) : -1};
  Workplace<T, G> work(task.sums, arena);
  const double share = task.options.neighbourhood;
  work.sorts_weights = share > 0 && share < kSortedShare;
  const Outcome result = anchor(g, task.options, a, row, weigh(g, row), work);
  report(g, result.status, task.sums);
  if (g.thread() == 0) task.losses[r] = result.loss;
}

}  // namespace pcoherence::cuda
