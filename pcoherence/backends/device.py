"""The pipeline that GPU backends share: torch's runtime around a backend's row kernels.

    features -> distances (a block of b anchors x n candidates) -> row kernels: loss, and the
    gradient with respect to distances in place -> gradient with respect to features

Everything runs on the tensors' device without a host synchronisation (no value is read back, no
shape depends on data), so that a call can be captured in a CUDA graph. No sum depends on the order
in which threads arrive: results repeat bit for bit. Memory is O(m d + n d + b n), after three
square matrices of at most SYMMETRIC_BYTES.

The same steps as csrc/cpu/pipeline.cpp and csrc/cpu/features.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .points import TRAITS, Prepared, Side, Traits, lengths, power_of_two_below, slabs, wide
from .products import multiply, subtract_product

BLOCK_BYTES = 32 << 20
"""Bytes of a block of distances: 2,048 anchors of 4,096 float32 candidates.

That many rows keep 132 multiprocessors busy with a warp a row; a handful of such blocks is small
beside the memory of a GPU, and rereading all candidates for each block costs little beside its
products.
"""

SYMMETRIC_BYTES = 256 << 20
"""A batch that is its own candidates holds n x n matrices of up to this size, n = 8,192 in float32.

Symmetry then saves one of the four products and 7/16 of two others: 2.6 of 5.5 ms at d = 512 and
50 TFLOP/s, for 0.4 ms of moving mirror images and transposes at 3 TB/s. Three matrices are held,
1 % of the memory of an H100.
"""

MIRRORED_ROWS = 1024
"""Rows of a product that are computed at a time from the diagonal on; the rest is mirrored.

With n = 2,048, 8 x 16 tiles of 128 x 128: as many as there are multiprocessors, 132.
"""

MIRRORED_WIDTH = 128
"""Features from which that pays: it saves at most 7/16 of 2 d operations for a pair, 2.2 ps at
d = 128 and 50 TFLOP/s, and moves 4 bytes, 1.3 ps at 3 TB/s.
"""

MIN_ROWS = 256
"""Rows of a block at least, however long: two for nearly each of 132 multiprocessors.

Each block adds to the gradient of all candidates, 8 bytes a feature in float32: 2.7 ps at 3 TB/s.
The product that is added takes 10 ps with 256 rows and at 50 TFLOP/s.
"""


@dataclass(frozen=True)
class RowOptions:
    """What the kernels of a row are asked for; names as in pcoherence/spec.py.

    `chain` and `root` say what is stored for the gradient: see Traits.
    """

    objective: str
    scale: str
    method: str
    soft_teacher: bool
    chain: float
    root: bool
    gradient: bool


class RowWeights(NamedTuple):
    """Weights of a block of b anchors."""

    candidates: Tensor | None  # [n] w_k; None: ones
    own: Tensor  # int64 [b]: the candidate that is the anchor itself and is left out, or -1
    coefficients: Tensor  # [b] c_i, by which the gradient is multiplied


class Units(NamedTuple):
    """What a distance is divided by, on the device: float64, 0-d."""

    inverse_temperature: Tensor  # 1 / tau in units of the (scaled) distance
    mean: Tensor | None  # scale "batch": the mean distance


class RowResults(NamedTuple):
    """Of a block of b anchors, float64."""

    losses: Tensor  # [b] L_i, without the coefficient
    mean_pull: Tensor  # [b] scale "batch": d c_i L_i / d mean distance; otherwise 0


class RowKernels(Protocol):
    """The stages that a backend writes as kernels, each on a block of anchors.

    T is float32 or float64, and all tensors of T are of the same; matrices are contiguous in their
    last dimension unless said otherwise. `near` is whatever the backend wants to remember of the
    pairs whose gradient leaves the products.
    """

    def difference_distances(
        self, out: Tensor, anchors: Tensor, candidates: Tensor, traits: Traits, order_only: bool
    ) -> None:
        """out_ij = distance(a_i, c_j) by differences, exactly equal for equal candidates.

        out T [b, n]; anchors T [b, d]; candidates T [n, d]. With `order_only` anything in the
        same order will do, and must not turn different distances into equal ones.
        """
        ...

    def prepare(self, anchors: Tensor, candidates: Tensor | None, traits: Traits) -> Prepared:
        """Points for products, see points.prepare; T [m, d], and [n, d] or the anchors."""
        ...

    def product_distances(
        self,
        out: Tensor,
        products: Tensor,
        anchors: Side,
        candidates: Side,
        begin: int,
        same: bool,
        first: Tensor,
        traits: Traits,
        order_only: bool,
    ) -> Any:
        """out_ij = distance from products_ik = a_i . c_k, k = first_j; returns `near`.

        |a_i - c_k|^2 = |a_i|^2 + |c_k|^2 - 2 products_ik in float64, at least 0 (NaN stays); by
        differences of Side.rows where it is below Nearness.distance; 0 where k is the anchor
        itself (`same` and k = first[begin + i]). out, products T [b, n]; anchors: the sides of
        rows begin .. begin + b; first int64 [n]: the first candidate that is identical to j.
        """
        ...

    def accumulate_differences(
        self, out: Tensor, points: Tensor, others: Tensor, v: Tensor, near: Any, transposed: bool
    ) -> None:
        """Differences weighted by V, over the pairs of `near` (None: all), in a fixed order.

        out_i += sum_j v_ij (points_i - others_j), or with `transposed` the candidates' side,
        out_j += sum_i v_ij (points_j - others_i). v T [b, n]; out and points T [b, d] (with
        `transposed` [n, d]), others T [n, d] ([b, d]).
        """
        ...

    def clear_near(self, v: Tensor, near: Any) -> None:
        """v_ij = 0 for the pairs of `near`; v T [b, n]."""
        ...

    def mirror(self, matrix: Tensor) -> None:
        """matrix_ji = matrix_ij for i < j; matrix T [n, n]."""
        ...

    def add_transpose(self, matrix: Tensor) -> None:
        """matrix_ij += matrix_ji, in place and exactly symmetric; matrix T [n, n]."""
        ...

    def row_sums(self, matrix: Tensor, weights: RowWeights | None) -> tuple[Tensor, Tensor]:
        """sum_k w_ik m_ik and W_i = sum_k w_ik (None: ones), both float64 [b]; matrix T [b, n]."""
        ...

    def anchors(
        self,
        options: RowOptions,
        student: Tensor,
        teacher: Tensor,
        weights: RowWeights,
        student_units: Units,
        teacher_units: Units,
        spare: Tensor | None,
    ) -> RowResults:
        """Losses, and with options.gradient V = chain * c_i dL_i/dd_ij (/ d_ij) over `student`.

        student T [b, n]: distances; teacher T [b, n]: distances, or for hard ranks anything in
        the same order; not changed. spare T [b, n] or None: memory that may be overwritten.
        W_i = 0: loss and V are 0. NaN or infinite distances: both are NaN.
        """
        ...

    def takes_differences(self, method: str, n: int) -> bool:
        """Whether `method` for n candidates measures by differences instead of products."""
        ...

    def soft_rank(
        self,
        values: Tensor,
        weights: Tensor | None,
        upstream: Tensor | None,
        temperature: float,
        method: str,
    ) -> Tensor:
        """1/2 + sum_k w_k sigmoid((v_j - v_k) / temperature), or its pullback of `upstream`.

        Infinite values rank at the ends and have no slope. Computed in float64: float32 positions
        of a wide range lose the digits of what lies close together at its ends.

        values, upstream T [r, n]; weights T [n], [r, n] or None for ones -> T [r, n].
        """
        ...


# ---------------------------------------------------------------- features


class Cloud:
    """One network's points, anchors and candidates, made ready for distances.

    Args:
        anchors: T [m, d].
        candidates: T [n, d], or None: the anchors themselves.
        metric: a name in TRAITS.

    Attributes:
        symmetric: whether all anchors have to come in one block, since that saves work.
    """

    symmetric = False
    _scale: Tensor  # float64, 0-d: a power of two that points are multiplied by

    def __init__(self, anchors: Tensor, candidates: Tensor | None, metric: str) -> None:
        self.anchors = anchors
        self.candidates = anchors if candidates is None else candidates
        self.same = candidates is None
        self.traits = TRAITS[metric]

    @property
    def unit(self) -> Tensor:
        """float64, 0-d: a distance in the given metric = unit * the distance measured here."""
        return 1 / self._scale if self.traits.root else 1 / self._scale.square()

    def pull(self, gradient: Tensor, given: Tensor) -> Tensor:
        """Gradient w.r.t. the points measured here -> w.r.t. the points given, both T [r, d].

        Through x / |x| for directions, which does not change along x.
        """
        if not self.traits.directions:
            return gradient * self._scale.to(gradient.dtype)
        out = torch.empty_like(gradient)
        for begin, end in slabs(*gradient.shape):
            x, g = given[begin:end], gradient[begin:end].double()
            length = lengths(x)
            direction = x.double() / length
            radial = (g * direction).sum(1, keepdim=True) * direction
            out[begin:end] = ((g - radial) * (self._scale / length)).to(out.dtype)
        return out


class DifferenceCloud(Cloud):
    """Distances and their gradient by differences: m n d work, no cancellation, exact ties.

    For few points, where preparing products costs more than it saves.
    """

    def __init__(
        self, anchors: Tensor, candidates: Tensor | None, metric: str, kernels: RowKernels
    ) -> None:
        super().__init__(anchors, candidates, metric)
        self._kernels = kernels
        origin = self.candidates[:1]
        if self.traits.directions:
            # Directions share a large mean where features do: it would cost digits of T.
            first = wide(origin, self.traits)
            self._scale = torch.ones((), dtype=torch.float64, device=anchors.device)
            self._rows = [(wide(x, self.traits) - first).to(x.dtype) for x in self._distinct()]
        else:
            # Squares must neither over- nor underflow.
            spread = (self.candidates - origin).abs().double()
            spread = spread.amax() if spread.numel() else spread.sum()
            usable = spread.isfinite() & (spread > 0)
            self._scale = 1 / power_of_two_below(torch.where(usable, spread, 1.0))
            self._rows = [x * self._scale.to(x.dtype) for x in self._distinct()]

    def _distinct(self) -> list[Tensor]:
        return [self.anchors] if self.same else [self.anchors, self.candidates]

    def distances(self, out: Tensor, products: Tensor, begin: int, order_only: bool) -> Any:
        """Distances of anchors begin .. begin + len(out) into out [b, n]; nothing is near."""
        anchors = self._rows[0][begin : begin + out.shape[0]]
        self._kernels.difference_distances(out, anchors, self._rows[-1], self.traits, order_only)

    def gradient(self, anchors: bool, candidates: bool) -> DifferenceGradient:
        """An empty sum of gradients with respect to these points."""
        return DifferenceGradient(
            self._kernels, *self._rows, anchors=anchors, candidates=candidates
        )


class DifferenceGradient:
    """sum_j V_ij (x_i - c_j) for the anchors, and the opposite for the candidates."""

    def __init__(
        self,
        kernels: RowKernels,
        anchor_rows: Tensor,
        candidate_rows: Tensor | None = None,
        *,
        anchors: bool,
        candidates: bool,
    ) -> None:
        self._kernels = kernels
        self._x = anchor_rows
        self._c = anchor_rows if candidate_rows is None else candidate_rows
        same = candidate_rows is None
        self.anchors = torch.zeros_like(self._x) if anchors else None
        self.candidates = torch.zeros_like(self._c) if candidates and not same else None
        self._to_candidates = self.anchors if same else self.candidates

    def add(self, v: Tensor, begin: int, near: Any) -> None:
        """A block of V [b, n], for the anchors from `begin`."""
        end = begin + v.shape[0]
        x = self._x[begin:end]
        if self.anchors is not None:
            out = self.anchors[begin:end]
            self._kernels.accumulate_differences(out, x, self._c, v, None, False)
        if self._to_candidates is not None:
            out = self._to_candidates
            self._kernels.accumulate_differences(out, self._c, x, v, None, True)

    def finish(self) -> None:
        """After the last block."""


class ProductCloud(Cloud):
    """Distances and their gradient by matrix products, but of near pairs by differences."""

    def __init__(
        self, anchors: Tensor, candidates: Tensor | None, metric: str, kernels: RowKernels
    ) -> None:
        super().__init__(anchors, candidates, metric)
        self._kernels = kernels
        n = self.candidates.shape[0]
        self.symmetric = self.same and n * n * anchors.element_size() <= SYMMETRIC_BYTES
        prepared = kernels.prepare(anchors, candidates, self.traits)
        self._anchor_side, self._candidate_side, self._first, self._scale = prepared

    def distances(self, out: Tensor, products: Tensor, begin: int, order_only: bool) -> Any:
        """Distances of anchors begin .. begin + len(out) into out [b, n]; returns the near pairs.

        products [b, n] is overwritten.
        """
        anchors = self._anchor_side.part(begin, begin + out.shape[0])
        if self.symmetric:
            self._symmetric_products(products)
        else:
            multiply(anchors.prepared, self._candidate_side.prepared.t(), products)
        return self._kernels.product_distances(
            out,
            products,
            anchors,
            self._candidate_side,
            begin,
            self.same,
            self._first,
            self.traits,
            order_only,
        )

    def _symmetric_products(self, out: Tensor) -> None:
        """X X^T into out T [n, n], in slabs of rows from the diagonal on."""
        x = self._anchor_side.prepared
        n, width = x.shape
        rows = MIRRORED_ROWS if width >= MIRRORED_WIDTH else n
        for begin in range(0, n, rows):
            end = min(begin + rows, n)
            multiply(x[begin:end], x[begin:].t(), out[begin:end, begin:])
        if rows < n:
            self._kernels.mirror(out)

    def gradient(self, anchors: bool, candidates: bool) -> ProductGradient | SymmetricGradient:
        """An empty sum of gradients with respect to these points."""
        if self.symmetric:
            return SymmetricGradient(self._kernels, self._anchor_side, wanted=anchors)
        sides = self._anchor_side, None if self.same else self._candidate_side
        return ProductGradient(self._kernels, *sides, anchors=anchors, candidates=candidates)


class SymmetricGradient:
    """rowsum(S)_i x_i - (S X)_i, S = V + V^T: of anchors that are the candidates and come at once.

    By rounding a pair may be near in one row alone: each row is free to choose.
    """

    candidates = None

    def __init__(self, kernels: RowKernels, side: Side, wanted: bool) -> None:
        self._kernels = kernels
        self._x = side
        self.anchors = torch.zeros_like(side.prepared) if wanted else None

    def add(self, v: Tensor, begin: int, near: Any) -> None:
        """V [n, n], which becomes S; near pairs become 0 in it."""
        if self.anchors is None:
            return
        x = self._x
        self._kernels.add_transpose(v)
        self._kernels.accumulate_differences(self.anchors, x.rows, x.rows, v, near, False)
        self._kernels.clear_near(v, near)
        _add_products(self._kernels, self.anchors, v, x.prepared, x.prepared)

    def finish(self) -> None:
        """After the last block."""


def _add_products(kernels: RowKernels, out: Tensor, v: Tensor, x: Tensor, c: Tensor) -> None:
    """out_i += rowsum(v)_i x_i - (v c)_i; out, x T [b, d], v T [b, n], c T [n, d]."""
    # torch would convert all of v to float64 first.
    sums = kernels.row_sums(v, None)[0].to(v.dtype)
    out.addcmul_(sums[:, None], x)
    subtract_product(out, v, c)


class ProductGradient:
    """rowsum(V)_i x_i - (V C)_i for the anchors, and the transpose for the candidates."""

    def __init__(
        self,
        kernels: RowKernels,
        anchor_side: Side,
        candidate_side: Side | None,
        *,
        anchors: bool,
        candidates: bool,
    ) -> None:
        self._kernels = kernels
        self._x = anchor_side
        self._c = anchor_side if candidate_side is None else candidate_side
        self._same = candidate_side is None
        self.anchors = torch.zeros_like(self._x.prepared) if anchors else None
        self.candidates = None
        self._column_sums = None
        if candidates or (anchors and self._same):
            # Until finish() without the columns' sums times c_j.
            self.candidates = torch.zeros_like(self._c.prepared)
            self._column_sums = torch.zeros_like(self._c.norms)

    def add(self, v: Tensor, begin: int, near: Any) -> None:
        """A block of V [b, n], for the anchors from `begin`; near pairs become 0 in it."""
        end = begin + v.shape[0]
        x, c = self._x.part(begin, end), self._c
        if self.anchors is not None:
            out = self.anchors[begin:end]
            self._kernels.accumulate_differences(out, x.rows, c.rows, v, near, False)
        if self.candidates is not None:
            out = self.candidates
            self._kernels.accumulate_differences(out, c.rows, x.rows, v, near, True)
        self._kernels.clear_near(v, near)
        if self.anchors is not None:
            _add_products(self._kernels, self.anchors[begin:end], v, x.prepared, c.prepared)
        if self.candidates is not None and self._column_sums is not None:
            subtract_product(self.candidates, v.t(), x.prepared)
            # Of a block in T: as exact as the product, and without a copy of it in float64.
            self._column_sums += v.sum(0)

    def finish(self) -> None:
        """After the last block."""
        if self.candidates is None or self._column_sums is None:
            return
        sums = self._column_sums[:, None].to(self.candidates.dtype)
        self.candidates.addcmul_(sums, self._c.prepared)
        if self._same:
            if self.anchors is not None:
                self.anchors += self.candidates
            self.candidates = None


# ---------------------------------------------------------------- the loss


class PointSet(NamedTuple):
    """One network's features and metric."""

    anchors: Tensor  # T [m, d]
    candidates: Tensor | None  # T [n, d]; None: the anchors themselves
    metric: str  # in TRAITS


class CallWeights(NamedTuple):
    """Weights of a whole call; None stands for ones, and for nobody."""

    coefficients: Tensor | None  # T [m]: the total is sum_i coefficients_i L_i
    anchors: Tensor | None  # T [m]
    candidates: Tensor | None  # T [n]
    own: Tensor | None  # int64 [m]


class Options(NamedTuple):
    """Options of a call; teacher_temperature 0 ranks the teacher hard."""

    temperature: float
    teacher_temperature: float
    scale: str
    objective: str
    method: str
    differences: bool  # distances by differences instead of products


class Results(NamedTuple):
    """Of a whole call; a gradient is None where it was not wanted."""

    losses: Tensor  # float64 [m]
    anchors: Tensor | None  # T [m, ds]; without candidates all of the gradient
    candidates: Tensor | None  # T [n, ds]


def block_rows(m: int, n: int, item_bytes: int) -> int:
    """How many anchors a block takes."""
    fits = BLOCK_BYTES // (item_bytes * max(n, 1))
    return min(m, max(MIN_ROWS, fits))


def inverse_temperature(temperature: float, unit: Tensor | None, device: torch.device) -> Tensor:
    """1 / tau for distances in multiples of `unit` (None: of their mean), float64, 0-d."""
    inverse = 1 / temperature if temperature > 0 else 1.0  # a hard teacher does not use it
    if unit is None:
        return torch.full((), inverse, dtype=torch.float64, device=device)
    return unit * inverse


class Coherence:
    """One call, from features: a class for what its passes over the blocks share."""

    def __init__(
        self,
        kernels: RowKernels,
        options: Options,
        student: PointSet,
        teacher: PointSet,
        weights: CallWeights,
    ) -> None:
        cloud = DifferenceCloud if options.differences else ProductCloud
        self._kernels = kernels
        self._options = options
        self._student: ProductCloud | DifferenceCloud = cloud(*student, kernels)
        self._teacher: ProductCloud | DifferenceCloud = cloud(*teacher, kernels)
        like = student.anchors
        self._m, self._n = like.shape[0], self._student.candidates.shape[0]
        self._rows = block_rows(self._m, self._n, like.element_size())
        self._held = self._m if self._student.symmetric else self._rows  # distances at a time
        self._blocks = [like.new_empty(self._held, self._n) for _ in range(3)]
        self._own = _or_nobody(weights.own, like, self._m)
        self._candidates = weights.candidates
        self._anchors = weights.anchors
        self._coefficients = _or_ones(weights.coefficients, like, self._m)

    def run(self, want_anchors: bool, want_candidates: bool) -> Results:
        """Losses, and gradients of sum_i coefficients_i L_i."""
        o = self._options
        want = want_anchors or want_candidates
        soft = o.teacher_temperature > 0
        wanted = {"anchors": want_anchors, "candidates": want_candidates}
        gradient = self._student.gradient(**wanted) if want else None
        by_batch = o.scale == "batch"
        mean_gradient = self._student.gradient(**wanted) if want and by_batch else None
        student_mean = teacher_mean = weight = None
        if by_batch:
            student_mean, weight = self._batch_mean(self._student, mean_gradient)
            if soft:
                teacher_mean, _ = self._batch_mean(self._teacher, None)
        traits = self._student.traits
        options = RowOptions(o.objective, o.scale, o.method, soft, traits.chain, traits.root, want)
        student_units = self._units(self._student, o.temperature, student_mean)
        teacher_units = self._units(self._teacher, o.teacher_temperature, teacher_mean)

        results = []
        for begin in range(0, self._m, self._held):
            end = min(begin + self._held, self._m)
            student, teacher, spare = (block[: end - begin] for block in self._blocks)
            self._teacher.distances(teacher, spare, begin, not soft)
            near = self._student.distances(student, spare, begin, False)
            for first in range(begin, end, self._rows):
                last = min(first + self._rows, end)
                part = slice(first - begin, last - begin)
                results.append(
                    self._kernels.anchors(
                        options,
                        student[part],
                        teacher[part],
                        self._weights(first, last),
                        student_units,
                        teacher_units,
                        spare[part],
                    )
                )
            if gradient is not None:
                gradient.add(student, begin, near)
        losses, pulls = (_joined(parts) for parts in zip(*results, strict=True))
        if gradient is None:
            return Results(losses, None, None)
        gradient.finish()
        factor = None
        if mean_gradient is not None and weight is not None:
            mean_gradient.finish()
            factor = _safe_quotient(pulls.sum(), weight)
        found = []
        for name, given in (
            ("anchors", self._student.anchors),
            ("candidates", self._student.candidates),
        ):
            g = getattr(gradient, name) if wanted[name] else None
            if g is not None and factor is not None:
                through_mean = getattr(mean_gradient, name)
                g = (g.double() + factor * through_mean.double()).to(g.dtype)
            found.append(None if g is None else self._student.pull(g, given))
        return Results(losses, *found)

    def _weights(self, begin: int, end: int) -> RowWeights:
        return RowWeights(self._candidates, self._own[begin:end], self._coefficients[begin:end])

    def _units(self, cloud: Cloud, temperature: float, mean: Tensor | None) -> Units:
        # Without a mean, the temperature is in units of the metric; the points are in others.
        unit = cloud.unit if self._options.scale == "none" else None
        return Units(inverse_temperature(temperature, unit, self._own.device), mean)

    def _batch_mean(
        self,
        cloud: ProductCloud | DifferenceCloud,
        gradient: ProductGradient | SymmetricGradient | DifferenceGradient | None,
    ) -> tuple[Tensor, Tensor]:
        """sum_ik a_i w_ik d_ik / sum_i a_i W_i and its denominator, float64, 0-d.

        With `gradient`, adds that of the numerator to it.
        """
        parts = []
        for begin in range(0, self._m, self._held):
            end = min(begin + self._held, self._m)
            block, spare = (block[: end - begin] for block in self._blocks[::2])
            near = cloud.distances(block, spare, begin, False)
            weights = self._weights(begin, end)
            sums = torch.stack(self._kernels.row_sums(block, weights))
            if self._anchors is not None:
                a = self._anchors[begin:end].double()
                # Padding counts for nothing, whatever its distances are.
                sums = torch.where(a == 0, 0.0, a * sums)
            parts.append(sums.sum(1))
            if gradient is not None:
                self._distances_to_gradient(cloud.traits, block, begin, end)
                gradient.add(block, begin, near)
        distance, weight = torch.stack(parts).sum(0).unbind()
        return _safe_quotient(distance, weight), weight

    def _distances_to_gradient(self, traits: Traits, block: Tensor, begin: int, end: int) -> None:
        """Distances -> V of sum_ik a_i w_ik d_ik, in place; block T [b, n]."""
        if traits.root:
            block.reciprocal_().nan_to_num_(nan=torch.nan, posinf=0.0, neginf=0.0)
        else:
            block.fill_(1.0)
        if self._candidates is not None:
            block.mul_(self._candidates)
        anchors = None if self._anchors is None else self._anchors[begin:end, None]
        block.mul_(traits.chain if anchors is None else anchors * traits.chain)
        own = self._own[begin:end, None]
        # -1, and entries past the last where self_index could not be checked, keep their value.
        column = own.clamp(0, block.shape[1] - 1)
        nobody = own != column
        block.scatter_(1, column, torch.where(nobody, block.gather(1, column), 0.0))


def _or_ones(given: Tensor | None, like: Tensor, size: int) -> Tensor:
    return like.new_ones(size) if given is None else given


def _or_nobody(given: Tensor | None, like: Tensor, size: int) -> Tensor:
    if given is not None:
        return given
    return torch.full((size,), -1, dtype=torch.int64, device=like.device)


def _joined(parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _safe_quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is 0 (or below, or NaN)."""
    usable = denominator > 0
    return torch.where(usable, numerator / torch.where(usable, denominator, 1.0), 0.0)


def coherence_from_distances(
    kernels: RowKernels,
    options: Options,
    student: Tensor,
    teacher: Tensor,
    weights: CallWeights,
    want_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Losses float64 [m], and the gradient of sum_i coefficients_i L_i w.r.t. student distances.

    student, teacher: T [m, n]; options.scale is "anchor" or "none". The gradient is T [m, n].
    """
    m, n = student.shape
    soft = options.teacher_temperature > 0
    row_options = RowOptions(
        options.objective, options.scale, options.method, soft, 1.0, False, want_gradient
    )
    device = student.device
    units, teacher_units = (
        Units(inverse_temperature(tau, None, device), None)
        for tau in (options.temperature, options.teacher_temperature)
    )
    out = student.clone() if want_gradient else student
    own = _or_nobody(weights.own, student, m)
    coefficients = _or_ones(weights.coefficients, student, m)
    losses = []
    step = block_rows(m, n, student.element_size())
    for begin in range(0, m, step):
        part = slice(begin, min(begin + step, m))
        row_weights = RowWeights(weights.candidates, own[part], coefficients[part])
        result = kernels.anchors(
            row_options, out[part], teacher[part], row_weights, units, teacher_units, None
        )
        losses.append(result.losses)
    return _joined(losses), out if want_gradient else None
