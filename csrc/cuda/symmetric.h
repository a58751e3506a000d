// Square matrices of a batch that is its own candidates. A thread block takes a tile and its mirror image through
// shared memory, so that both are read and written in whole lines.
#pragma once

#include "group.h"

namespace pcoherence::cuda {

// The sum of the matrix and its transpose, symmetric to the last bit.
template <class T>
struct TransposeTask {
  std::int64_t n;
  T* matrix;  // [n, n]
};

// Edge of a tile: 128 bytes, the line of a cache, and a tile fits into the scratch.
template <class T>
inline constexpr int kTileEdge = 128 / sizeof(T);
template <class T>
PCOH_DEVICE constexpr std::int64_t tiles_across(std::int64_t n) {
  return (n + kTileEdge<T> - 1) / kTileEdge<T>;
}

// Tile (x, x + y modulo tiles) and its mirror image, y <= tiles / 2: every pair once.
template <class T, class G>
PCOH_DEVICE void add_transpose(G& g, const TransposeTask<T>& task, std::int64_t x, int y) {
  constexpr int edge = kTileEdge<T>;
  static_assert(edge * edge * sizeof(T) <= kScratchBytes);
  const std::int64_t tiles = tiles_across<T>(task.n), other = (x + y) % tiles;
  if (2 * y >= tiles && other <= x) return;  // half of the way round, both tiles of a pair come upon each other
  const std::int64_t top = (x < other ? x : other) * edge, left = (x < other ? other : x) * edge;
  T* tile = reinterpret_cast<T*>(g.scratch());
  // Columns turned by the row: neither rows nor columns of the tile meet in one bank.
  const auto kept = [=](int row, int column) -> T& { return tile[row * edge + (column ^ row)]; };
  const auto at = [&](std::int64_t row, std::int64_t column) { return task.matrix + row * task.n + column; };
  const auto each_of = [&](std::int64_t first_row, std::int64_t first_column, auto f) {
    each(g, edge * edge, [&](int k) {
      const int row = k / edge, column = k % edge;
      if (first_row + row < task.n && first_column + column < task.n)
        f(row, column, at(first_row + row, first_column + column));
    });
  };
  each_of(left, top, [&](int row, int column, const T* p) { kept(row, column) = *p; });
  g.sync();
  // The thread that has read an element of the tile writes the sum to the same place of the image.
  each_of(top, left, [&](int row, int column, T* p) { kept(column, row) = *p += kept(column, row); });
  g.sync();
  if (top != left) each_of(left, top, [&](int row, int column, T* p) { *p = kept(row, column); });
}

}  // namespace pcoherence::cuda
