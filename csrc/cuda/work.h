// Which function of a group does a task's piece of work: the only list of kernels, for launcher and emulation alike.
#pragma once

#include <algorithm>

#include "prepare.h"
#include "small.h"
#include "symmetric.h"

namespace pcoherence::cuda {

// Rows with memory of their own.
template <class T, class G>
PCOH_DEVICE void work(G& g, const SmallTask<T>& task, std::int64_t r, Arena arena) {
  small_row(g, task, r, arena);
}
template <class T, class G>
PCOH_DEVICE void work(G& g, const SoftRankTask<T>& task, std::int64_t r, Arena arena) {
  soft_rank_row(g, task, r, arena);
}
template <class T>
constexpr std::int64_t rows_of(const SmallTask<T>& task) {
  return task.row.rows;
}
template <class Task>
constexpr std::int64_t rows_of(const Task& task) {
  return task.rows;
}

// The rest, block (x, y) of a grid of shape(task).
struct Shape {
  std::int64_t x;
  int y, threads;
};
inline constexpr int kStreamThreads = 256;  // for kernels that read and write rows
inline constexpr int kPullThreads = 128;    // features of a block
// Of any launch for a task.
template <class Task>
inline constexpr int kMostThreadsOf = kStreamThreads;
template <class T>
inline constexpr int kMostThreadsOf<Several<CentreTask<T>>> = kCentreThreads;

// Blocks that treat `rows`, a warp each.
constexpr Shape a_warp_each(std::int64_t rows) {
  constexpr int warps = kStreamThreads / kWarp;
  return {(rows + warps - 1) / warps, 1, kStreamThreads};
}

template <class T, class G>
PCOH_DEVICE void work(G& g, const CentreTask<T>& task, std::int64_t x, int) {
  find_centre(g, task, x);
}
template <class T>
Shape shape(const CentreTask<T>& task) {
  return {task.stage == CentreStage::finish ? 1 : kSampleParts, 1, kCentreThreads};
}

template <class T, class G>
PCOH_DEVICE void work(G& g, const PrepareTask<T>& task, std::int64_t x, int) {
  prepare_points(g, task, x);
}
template <class T>
Shape shape(const PrepareTask<T>& task) {
  return a_warp_each(task.rows);
}

template <class T, class G>
PCOH_DEVICE void work(G& g, const IdenticalTask<T>& task, std::int64_t x, int) {
  find_identical(g, task, x);
}
template <class T>
Shape shape(const IdenticalTask<T>& task) {
  return a_warp_each(task.n);
}

template <class T, class G>
PCOH_DEVICE void work(G& g, const FirstTask<T>& task, std::int64_t x, int) {
  store_first(g, task, x);
}
template <class T>
Shape shape(const FirstTask<T>& task) {
  return {(task.n + kStreamThreads - 1) / kStreamThreads, 1, kStreamThreads};
}

template <class Task, class G>
PCOH_DEVICE void work(G& g, const Several<Task>& tasks, std::int64_t x, int y) {
  work(g, tasks.of[y], x, 0);
}
template <class Task>
Shape shape(const Several<Task>& tasks) {
  Shape all = shape(tasks.of[0]);
  for (int i = 1; i < tasks.count; ++i) all.x = std::max(all.x, shape(tasks.of[i]).x);
  all.y = tasks.count;
  return all;
}

template <class T, class G>
PCOH_DEVICE void work(G& g, const RowSumsTask<T>& task, std::int64_t x, int) {
  row_sums(g, task, x);
}
template <class T>
Shape shape(const RowSumsTask<T>& task) {
  return {task.rows, 1, kStreamThreads};
}

template <class T>
PCOH_DEVICE constexpr std::int64_t groups_across(const ProductTask<T>& task) {
  return (words_of(task.n) + kTilesOfGroup - 1) / kTilesOfGroup;
}
template <class T, class G>
PCOH_DEVICE void work(G& g, const ProductTask<T>& task, std::int64_t x, int) {
  const std::int64_t across = groups_across(task);
  finish_products(g, task, x % across, x / across);
}
template <class T>
Shape shape(const ProductTask<T>& task) {
  return {groups_across(task) * words_of(task.rows), 1, kTilesOfGroup * kWarp};
}

template <class T, class G>
PCOH_DEVICE void work(G& g, const PullTask<T>& task, std::int64_t x, int) {
  if (task.transposed)
    pull_near_columns(g, task, x);
  else
    pull_near(g, task, x);
}
template <class T>
Shape shape(const PullTask<T>& task) {
  return {task.transposed ? words_of(task.rows) : task.rows, 1, kPullThreads};
}

template <class T, class G>
PCOH_DEVICE void work(G& g, const ClearTask<T>& task, std::int64_t x, int) {
  clear_near(g, task, x);
}
template <class T>
Shape shape(const ClearTask<T>& task) {
  return {task.rows, 1, kPullThreads};
}

template <class T, class G>
PCOH_DEVICE void work(G& g, const TransposeTask<T>& task, std::int64_t x, int y) {
  add_transpose(g, task, x, y);
}
template <class T>
Shape shape(const TransposeTask<T>& task) {
  const std::int64_t tiles = tiles_across<T>(task.n);
  return {tiles, static_cast<int>(tiles / 2 + 1), kStreamThreads};
}

template <class T, class G>
PCOH_DEVICE void work(G& g, const SmallGradientTask<T>& task, std::int64_t x, int) {
  small_gradient(g, task, x);
}
template <class T>
Shape shape(const SmallGradientTask<T>& task) {
  return {task.rows + (task.candidates != nullptr ? task.n : 0), 1, kStreamThreads};
}

}  // namespace pcoherence::cuda
