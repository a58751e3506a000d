"""What a GPU backend writes as kernels; `pipeline.py` puts them together.

T is float32 or float64, and all tensors of T are of the same; matrices are contiguous in their last
dimension unless said otherwise. Everything is launched without a host synchronisation: no value is
read back, no shape depends on data. No sum depends on the order in which threads arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from ..inputs import rows_of
from ..spec import LossSpec
from .points import MetricTraits, Network, Prepared, Side

if TYPE_CHECKING:
    from .pipeline import Batch, Results


def too_many_bins(most: int) -> RuntimeError:
    """Of an explicit grid, which is not replaced by another method; as csrc/cpu/ops.cpp says it."""
    from ..kernels.tables import BIN_WIDTH  # not at import: it fits polynomials

    return RuntimeError(
        f"method: 'grid' would need more than {most} bins for a row, one for every {BIN_WIDTH} "
        "temperatures of its range; use method='scan' or 'auto', or a higher temperature"
    )


class Rows(NamedTuple):
    """A block of b anchors."""

    student: Tensor  # T [b, n]: distances; where a gradient is wanted it is left here
    teacher: Tensor  # T [b, n]: distances, or for hard ranks anything in the same order
    weights: Tensor | None  # T [n] or [b, n]: w_k of the candidates; None: ones
    self_index: Tensor | None  # int64 [b]: the candidate that is left out, or -1; None: nobody
    coefficients: Tensor | None  # T [b]: c_i, by which the gradient is multiplied; None: ones

    def part(self, part: slice) -> Rows:
        """Some of the anchors."""
        self_index, coefficients = (
            None if given is None else given[part] for given in (self.self_index, self.coefficients)
        )
        weights = rows_of(self.weights, part)
        return Rows(self.student[part], self.teacher[part], weights, self_index, coefficients)


class Units(NamedTuple):
    """A distance in the metric = unit * the distance as measured; float64, 0-d; None: 1.

    What scale "anchor" divides by has the same unit: there it does not matter, and is None.
    """

    student: Tensor | None = None
    teacher: Tensor | None = None


class RowKernels(Protocol):
    """The stages, each on a block of b anchors.

    `near` is what the backend wants to remember of the pairs whose gradient leaves the products.
    """

    def prepare(self, networks: Sequence[Network]) -> list[Prepared]:
        """Points of one network or two for products, see points.py; all have candidates or none."""
        ...

    def product_distances(
        self,
        out: Tensor,
        products: Tensor,
        anchors: Side,
        candidates: Side,
        begin: int,
        same: bool,
        upper: bool,
        first: Tensor,
        traits: MetricTraits,
        order_only: bool,
    ) -> Any:
        """out_ij = distance from products_ik = a_i . c_k, k = first_j; returns `near`.

        |a_i - c_k|^2 = |a_i|^2 + |c_k|^2 - 2 products_ik in float64, at least 0 (NaN stays); by
        differences of Side.rows where it is below Nearness.distance; 0 where k is the anchor
        itself (`same` and k = first[begin + i]). With `order_only` anything in the same order will
        do, and must not turn different distances into equal ones. out, products T [b, n]; anchors:
        the sides of rows begin .. begin + b; first int64 [n]: the first candidate identical to j.
        With `upper`, of all anchors, which are the candidates, products_ij are given for i <= j.
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

    def add_transpose(self, matrix: Tensor) -> None:
        """matrix_ij += matrix_ji, in place and exactly symmetric; matrix T [n, n]."""
        ...

    def row_sums(self, matrix: Tensor) -> Tensor:
        """sum_k matrix_ik, float64 [b]; matrix T [b, n]."""
        ...

    def anchors(
        self,
        spec: LossSpec,
        rows: Rows,
        units: Units,
        stored: MetricTraits | None,
        spare: Tensor | None,
    ) -> Tensor:
        """Losses L_i without the coefficient, float64 [b].

        With `stored`, V = chain * c_i dL_i/dd_ij is left in rows.student, with root divided by
        d_ij (0 where that is 0). spare T [b, n] or None: memory that may be overwritten. W_i = 0:
        loss and V are 0. NaN or infinite distances: both are NaN.
        """
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

    def takes_differences(self, method: str, n: int) -> bool:
        """Whether distances to n candidates are measured by `difference_distances`."""
        ...

    def difference_distances(
        self,
        out: Tensor,
        anchors: Tensor,
        candidates: Tensor,
        traits: MetricTraits,
        order_only: bool,
    ) -> None:
        """out_ij = distance(a_i, c_j) by differences, exactly equal for equal candidates.

        out T [b, n]; anchors T [b, d]; candidates T [n, d]; `order_only` as in product_distances.
        """
        ...


class FusedKernels(RowKernels, Protocol):
    """Row kernels, and some that do all of a small batch."""

    def is_small(self, spec: LossSpec, batch: Batch) -> bool:
        """Whether `small` takes this call."""
        ...

    def small(self, spec: LossSpec, batch: Batch, *flags: bool) -> tuple[Tensor | None, Results]:
        """A small batch in two launches, or one without a gradient.

        Args: `flags`: whether the gradients of student and candidates are wanted.

        Returns: sum_i coefficients_i L_i, 0-d, or None without a gradient; and the results.
        """
        ...
