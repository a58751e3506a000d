"""What the row kernels of every GPU backend are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from pcoherence.backends import points
from pcoherence.backends.device import RowKernels
from pcoherence.testing import CASES, make_case

POINTS = (*CASES, "nan", "zeros")


def points_with(case: str, dtype: torch.dtype) -> Tensor:
    """Points [70, 19]; with "nan" and "zeros" some rows are that, and some copies of others."""
    if case not in ("nan", "zeros"):
        return make_case(case, 70, 19, dtype=dtype)
    points = make_case("gaussian", 70, 19, dtype=dtype)
    points[40:50] = points[:10]
    points[::7] = torch.nan if case == "nan" else -0.0
    return points


def check_prepared(
    kernels: RowKernels, anchors: Tensor, candidates: Tensor | None, metric: str
) -> None:
    """Equal but for the rounding of the centre and of directions; identical points exactly."""
    traits = points.TRAITS[metric]
    found = kernels.prepare(anchors, candidates, traits)
    expected = points.prepare(anchors, candidates, traits)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.first, expected.first)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        # The centre may be rounded to another multiple of what is a fraction of the spread.
        shift = (ours.prepared - theirs.prepared)[ours.prepared.isfinite().all(1)]
        # Directions are rounded to float64 before they are scaled.
        rounding = torch.finfo(anchors.dtype).eps * ours.prepared.nan_to_num().abs().max()
        rounding += traits.directions * torch.finfo(torch.float64).eps * found.scale
        assert (shift - shift[0]).abs().max() <= 4 * rounding
        assert shift[0].abs().max() <= 1
        if not traits.directions:
            assert torch.equal(ours.rows.nan_to_num(), theirs.rows.nan_to_num())
        norms = ours.prepared.double().square().sum(1)
        torch.testing.assert_close(ours.norms, norms, rtol=1e-14, atol=0, equal_nan=True)


def check_symmetrised(kernels: RowKernels, given: Tensor) -> None:
    """The upper triangle of [n, n] mirrored, and the transpose added, to the last bit."""
    found = given.clone()
    kernels.mirror(found)
    assert torch.equal(found, given.triu() + given.triu(1).t())
    found = given.clone()
    kernels.add_transpose(found)
    assert torch.equal(found, given + given.t())
