// Operators on points: their preparation, distances and gradients.
#pragma once

#include <vector>

#include "checks.h"

namespace pcoherence::cuda {

namespace operators {
namespace {

// Points of up to two networks made ready for products, as pcoherence/backends/points.py says. Of every network i:
// directions[i] (0 or 1), numbers[i] float64 [1 + d], the scale and the centre, and first[i] int64 [n]. Of its anchors,
// and then of its candidates where those are others: points T [r, d], prepared, scaled T [r, d], norms float64 [r].
// Directions are not scaled apart: their prepared points serve.
void prepare(std::vector<Tensor> points, std::vector<std::int64_t> directions, std::vector<Tensor> numbers,
             std::vector<Tensor> prepared, std::vector<Tensor> norms, std::vector<Tensor> scaled,
             std::vector<Tensor> first) {
  const std::size_t networks = directions.size(), sides = points.size();
  STD_TORCH_CHECK(networks > 0 && sides <= kMostClouds && (sides == networks || sides == 2 * networks),
                  "points: expected anchors, or anchors and candidates, of one network or two");
  STD_TORCH_CHECK(numbers.size() == networks && first.size() == networks, "numbers: expected of every network");
  STD_TORCH_CHECK(prepared.size() == sides && norms.size() == sides && scaled.size() == sides,
                  "prepared: expected for all points");
  on_device(points[0], "points", [&](auto zero, const Like& like, Stream stream) {
    using T = decltype(zero);
    Several<CentreTask<T>> centres;
    Several<PrepareTask<T>> sides_task;
    Several<IdenticalTask<T>> identical;
    Several<FirstTask<T>> firsts;
    std::vector<Tensor> workspaces;  // until all is launched
    const std::size_t each = sides / networks;
    for (std::size_t i = 0; i < networks; ++i) {
      const std::size_t last = i * each + each - 1;  // candidates
      const std::int64_t n = dimension(points[last], 0, "points"), width = dimension(points[last], 1, "points");
      STD_TORCH_CHECK(n > 0, "candidates: expected at least one");
      double* given = like.out<double>(numbers[i], "numbers", 1 + width);

      // Hashes, what the centre needs, the table, slots: in this order, each aligned to what it holds.
      const std::int64_t size = table_size(n), doubles = n + centre_memory(width), ints = 2 * size + n;
      workspaces.push_back(torch::stable::new_empty(points[0], {doubles + (ints + 1) / 2}, ScalarType::Double));
      auto* hashes = reinterpret_cast<std::uint64_t*>(bytes(workspaces.back()));
      auto* memory = reinterpret_cast<double*>(hashes + n);
      auto* table = reinterpret_cast<int*>(memory + centre_memory(width));
      const Identity found{table, table + size, table + 2 * size, size};

      for (std::size_t side = i * each; side <= last; ++side) {
        const std::int64_t rows = dimension(points[side], 0, "points");
        sides_task.add({rows, static_cast<int>(width), directions[i] != 0,
                        like.in<T>(points[side], "points", rows * width), given + 1, given,
                        like.out<T>(prepared[side], "prepared", rows * width),
                        directions[i] ? nullptr : like.out<T>(scaled[side], "scaled", rows * width),
                        like.out<double>(norms[side], "norms", rows), side == last ? hashes : nullptr, table});
      }
      const PrepareTask<T>& candidates = sides_task.of[last];
      centres.add({CentreStage::first_mean, n, candidates.width, candidates.directions, candidates.points, given + 1,
                   given, memory});
      identical.add(
          {n, candidates.width, candidates.directions ? candidates.prepared : candidates.scaled, hashes, found});
      firsts.add({n, found, like.out<std::int64_t>(first[i], "first", n)});
    }
    for (const auto stage : {CentreStage::first_mean, CentreStage::first_distances, CentreStage::mean,
                             CentreStage::distances, CentreStage::finish}) {
      for (CentreTask<T>& centre : centres.of) centre.stage = stage;
      launch(centres, stream);
    }
    launch(sides_task, stream);
    launch(identical, stream);
    launch(firsts, stream);
  });
}

// near: int32 [b, ceil(n / 32)] is written; see ProductTask for the rest.
void product_distances(Tensor out, Tensor products, Tensor anchor_norms, Tensor candidate_norms, Tensor anchors,
                       Tensor candidates, Tensor first, Tensor near, std::int64_t begin, bool same, bool upper,
                       bool root, double factor) {
  on_device(out, "out", [&](auto zero, const Like& like, Stream stream) {
    using T = decltype(zero);
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
    STD_TORCH_CHECK(!upper || (same && begin == 0 && task.rows == task.n),
                    "upper: expected all anchors, which are the candidates");
    task.begin = begin;
    task.same = same;
    task.upper = upper;
    task.root = root;
    task.factor = static_cast<T>(factor);
    launch(task, stream);
  });
}

// v: [rows of points, rows of others], or its transpose where `transposed`; near: as made for v.
void accumulate_differences(Tensor out, Tensor points, Tensor others, Tensor v, Tensor near, bool transposed) {
  on_device(out, "out", [&](auto zero, const Like& like, Stream stream) {
    using T = decltype(zero);
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
    launch(task, stream);
  });
}

void clear_near(Tensor v, Tensor near) {
  on_device(v, "v", [&](auto zero, const Like& like, Stream stream) {
    using T = decltype(zero);
    ClearTask<T> task{};
    task.rows = dimension(v, 0, "v");
    task.n = candidates_of(v, "v");
    task.near = like.in<unsigned>(near, "near", task.rows * words_of(task.n));
    task.v = like.out<T>(v, "v", task.rows * task.n);
    launch(task, stream);
  });
}

// matrix: T [n, n].
void add_transpose(Tensor matrix) {
  on_device(matrix, "matrix", [&](auto zero, const Like& like, Stream stream) {
    using T = decltype(zero);
    const std::int64_t n = dimension(matrix, 0, "matrix");
    launch(TransposeTask<T>{n, like.out<T>(matrix, "matrix", n * n)}, stream);
  });
}

void row_sums(Tensor matrix, Tensor sums) {
  on_device(matrix, "matrix", [&](auto zero, const Like& like, Stream stream) {
    using T = decltype(zero);
    RowSumsTask<T> task{};
    task.rows = dimension(matrix, 0, "matrix");
    task.n = candidates_of(matrix, "matrix");
    task.matrix = like.in<T>(matrix, "matrix", task.rows * task.n);
    task.sums = like.out<double>(sums, "sums", task.rows);
    launch(task, stream);
  });
}

}  // namespace
}  // namespace operators
}  // namespace pcoherence::cuda
