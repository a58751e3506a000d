// Operators on points: their preparation, distances and gradients.
#pragma once

#include "checks.h"

namespace pcoherence::cuda {

namespace operators {
namespace {

// One network's points made ready for products, as pcoherence/backends/points.py says. numbers: float64 [1 + d], the
// scale and the centre. anchors T [m, d]; prepared, scaled T [m, d], norms float64 [m]; scaled is null for directions,
// whose prepared points serve. Candidates likewise, or none where they are the anchors. first: int64 [n].
void prepare(Tensor anchors, OptionalTensor candidates, bool directions, Tensor numbers, Tensor prepared, Tensor norms,
             OptionalTensor scaled, OptionalTensor candidate_prepared, OptionalTensor candidate_norms,
             OptionalTensor candidate_scaled, Tensor first) {
  on_device(anchors, "anchors", [&](auto zero, const Like& like, Stream stream) {
    using T = decltype(zero);
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

    launch(CentreTask<T>{n, static_cast<int>(width), directions, from, given + 1, given, memory}, stream);
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
    launch(task, stream);
    if (!same) {
      task.rows = n;
      task.points = from;
      task.prepared = like.out<T>(candidate_prepared, "candidate_prepared", n * width);
      task.scaled = directions ? nullptr : like.out<T>(candidate_scaled, "candidate_scaled", n * width);
      task.norms = like.out<double>(candidate_norms, "candidate_norms", n);
      task.hashes = hashes;
      launch(task, stream);
    }
    launch(IdenticalTask<T>{n, static_cast<int>(width), directions ? task.prepared : task.scaled, hashes, found},
           stream);
    launch(FirstTask<T>{n, found, like.out<std::int64_t>(first, "first", n)}, stream);
  });
}

// near: int32 [b, ceil(n / 32)] is written; see ProductTask for the rest.
void product_distances(Tensor out, Tensor products, Tensor anchor_norms, Tensor candidate_norms, Tensor anchors,
                       Tensor candidates, Tensor first, Tensor near, std::int64_t begin, bool same, bool root,
                       double factor) {
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
    task.begin = begin;
    task.same = same;
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

// The upper triangle mirrored, or with `add` the transpose added. matrix: T [n, n].
void symmetrise(Tensor matrix, bool add) {
  on_device(matrix, "matrix", [&](auto zero, const Like& like, Stream stream) {
    using T = decltype(zero);
    SymmetriseTask<T> task{};
    task.n = dimension(matrix, 0, "matrix");
    task.matrix = like.out<T>(matrix, "matrix", task.n * task.n);
    task.add = add;
    launch(task, stream);
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
