"""What the row kernels of every GPU backend are held to."""

from __future__ import annotations

import plain_points
import torch
from torch import Tensor

from pcoherence.backends import points
from pcoherence.backends.row_kernels import RowKernels
from pcoherence.testing import CASES, make_case

POINTS = (*CASES, "nan", "zeros", "mostly one", "turned")


def points_with(case: str, dtype: torch.dtype) -> Tensor:
    """Points [70, 19]; with "nan" and "zeros" some rows are that, and some copies of others.

    "mostly one": the median point is the centre. "turned": of two copies and, between them, the
    same features the other way round.
    """
    if case in CASES:
        return make_case(case, 70, 19, dtype=dtype)
    points = make_case("gaussian", 70, 19, dtype=dtype)
    if case == "mostly one":
        points[10:60] = points[0]
        return points
    if case == "turned":
        points[2::3] = points[:-1:3]
        points[1::3] = points[:-1:3].flip(1)
        return points
    points[40:50] = points[:10]
    points[::7] = torch.nan if case == "nan" else -0.0
    if case == "zeros":
        points[::14] = 0.0
    return points


def check_prepared(
    kernels: RowKernels, anchors: Tensor, candidates: Tensor | None, metric: str
) -> None:
    """Equal but for the rounding of the centre and of directions; identical points exactly."""
    traits = points.TRAITS[metric]
    (found,) = kernels.prepare([points.Network(anchors, candidates, traits)])
    expected = plain_points.prepare(anchors, candidates, traits)
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


def check_sample_of_one(kernels: RowKernels, device: str) -> None:
    """Where all points of the sample are equal, the others are asked."""
    for metric, dtype in (("euclidean", torch.float32), ("cosine", torch.float64)):
        given = make_case("gaussian", 2 * points.SAMPLE, 3, dtype=dtype, seed=2)
        given[::2] = given[0]
        check_prepared(kernels, given.to(device), None, metric)


def check_near_pairs(kernels: RowKernels, n: int, width: int, device: str) -> None:
    """Distances of [34, n], and gradients shared out to the products and to near pairs.

    Few are near: the last candidate is as far as its copy, which has a near one as neighbour.
    """
    candidates = make_case("gaussian", n, width).to(device)
    candidates[n - 1] = candidates[5]
    anchors = make_case("gaussian", 34, width, seed=2).to(device)
    anchors[[0, 1, 33]] = candidates[[1, n // 2, 3]] + 1e-9
    traits = points.TRAITS["euclidean"]
    ((own, others, first, _),) = kernels.prepare([points.Network(anchors, candidates, traits)])
    out = anchors.new_empty(34, n)
    products = own.prepared @ others.prepared.t()
    products[:, n - 1] = torch.nan  # that of the first of its kind serves
    near = kernels.product_distances(
        out, products, own, others, 0, False, False, first, traits, False
    )
    exact = (own.rows[:, None] - others.rows[None]).norm(dim=2)
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=0)
    assert torch.equal(out[:, n - 1], out[:, 5])

    v = make_case("gaussian", 34, n, seed=1).to(device)
    rest = v.clone()
    kernels.clear_near(rest, near)
    assert ((rest == 0) | (rest == v)).all()
    assert not rest[exact < 1e-6].any()
    for transposed, ours, theirs in ((False, own, others), (True, others, own)):
        every, far = (m.t() if transposed else m for m in (v, rest))
        whole = every.sum(1, keepdim=True) * ours.rows - every @ theirs.rows
        found = torch.zeros_like(whole)
        kernels.accumulate_differences(found, ours.rows, theirs.rows, v, near, transposed)
        found += far.sum(1, keepdim=True) * ours.rows - far @ theirs.rows
        torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)
    if kernels.takes_differences("pairs", n):
        whole = v.sum(1, keepdim=True) * own.rows - v @ others.rows
        found = torch.ones_like(whole)
        kernels.accumulate_differences(found, own.rows, others.rows, v, None, False)
        torch.testing.assert_close(found - 1, whole, rtol=1e-11, atol=1e-11)


def check_upper(kernels: RowKernels, n: int, width: int, device: str) -> None:
    """Distances [n, n] from products above the diagonal are those from all; some pairs are near.

    Some of them are of points that are there twice.
    """
    points_ = make_case("gaussian", n, width)
    points_[1::3] = points_[:-1:3] + 1e-9
    points_[n - 2] = points_[0]
    points_[n - 1] = points_[1]
    for metric in ("euclidean", "cosine"):
        traits = points.TRAITS[metric]
        network = points.Network(points_.to(device), None, traits)
        ((own, _, first, _),) = kernels.prepare([network])
        products = own.prepared @ own.prepared.t()
        found = []
        for upper in (False, True):
            given = products.clone()
            if upper:
                given[torch.ones_like(given, dtype=torch.bool).tril(-1)] = torch.nan
            out, v = (torch.full_like(given, fill) for fill in (torch.nan, 1.0))
            how = 0, True, upper, first, traits, False
            near = kernels.product_distances(out, given, own, own, *how)
            kernels.clear_near(v, near)
            found.append((out, v))
        (whole, kept), (out, rest) = found
        torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-15)
        assert torch.equal(out, out.t())
        assert torch.equal(rest, kept)
        assert (rest == 0).sum() > n / 4
        assert torch.equal(out[:, n - 1], out[:, 1])


def check_transpose_added(kernels: RowKernels, given: Tensor) -> None:
    """To [n, n], to the last bit."""
    found = given.clone()
    kernels.add_transpose(found)
    assert torch.equal(found, given + given.t())
