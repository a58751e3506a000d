"""The Triton kernels against the reference: on the GPU, or in triton's interpreter on CPU tensors.

The interpreter takes a few tenths of a second a call: options are covered in pairs, not in full.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import numpy
import plain_points
import pytest
import torch
from covering import covering
from row_kernels import (
    POINTS,
    check_near_pairs,
    check_prepared,
    check_sample_of_one,
    check_transpose_added,
    check_upper,
    points_with,
)
from soft_rank_cases import MASKS, check_masked
from torch import Tensor

import pcoherence
from pcoherence import perception_coherence_loss, soft_rank
from pcoherence.spec import OBJECTIVES, SCALES, LossSpec
from pcoherence.testing import (
    CASES,
    make_case,
    reference_value_and_grad,
    relative_error,
    tolerances,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if pcoherence.available_backends()["triton"] is not None:
    pytest.skip(str(pcoherence.available_backends()["triton"]), allow_module_level=True)

from pcoherence.backends import REGISTRY, clouds, pipeline, triton_kernels
from pcoherence.backends.points import first_identical
from pcoherence.backends.triton import TritonBackend
from pcoherence.backends.triton_kernels import row_kernels
from pcoherence.kernels import statistics, tables, tuning

# The interpreter computes with numpy, which warns of the NaN and infinities that kernels mask.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
METHODS = ("pairs", "scan", "grid")
ANY_RANGE = ("pairs", "scan", "auto")
METRICS = ("euclidean", "sqeuclidean", "cosine")
DTYPES = (torch.float32, torch.float64)

Found = tuple[Tensor, list[Tensor]]


@pytest.fixture(autouse=True)
def grids_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "auto" choose between grid and scan for rows of a few dozen candidates.

    Small batches taken by kernels of their own are in test_triton_small.py.
    """
    monkeypatch.setattr(tuning, "PAIRS_MOST", 2)
    monkeypatch.setattr(tuning, "FUSED_MOST", 0)
    monkeypatch.setattr(tuning, "ELEMENTS_PER_BIN", dict.fromkeys(DTYPES, 2))


def moved(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def evaluate(leaves: list[Tensor], constants: dict[str, Any], **options: Any) -> Found:
    """Loss and gradients by the kernels; leaves are the student and perhaps its candidates."""
    leaves = [leaf.detach().to(DEVICE).requires_grad_() for leaf in leaves]
    constants = {name: moved(value) for name, value in constants.items()}
    if len(leaves) == 2:
        constants["student_candidates"] = leaves[1]
    loss = perception_coherence_loss(leaves[0], **constants, **options, backend="triton")
    upstream = torch.ones_like(loss)
    return loss.cpu(), [g.cpu() for g in torch.autograd.grad(loss, leaves, upstream)]


def expected(leaves: list[Tensor], constants: dict[str, Any], **options: Any) -> Found:
    """The truth: the reference in float64."""
    if len(leaves) == 2:
        constants = constants | {"student_candidates": leaves[1]}
    loss, *gradients = reference_value_and_grad(leaves[0], **constants, **options)
    return loss, [g for g in gradients if g is not None]


def brute_force(leaves: list[Tensor], constants: dict[str, Any], **options: Any) -> Found:
    """The reference in the inputs' own dtype."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    if len(leaves) == 2:
        constants = constants | {"student_candidates": leaves[1]}
    loss = perception_coherence_loss(leaves[0], **constants, **options, backend="reference")
    return loss, list(torch.autograd.grad(loss, leaves, torch.ones_like(loss)))


def errors(found: Found, truth: Found) -> tuple[float, float]:
    gradient, right = (torch.cat([g.double().flatten() for g in x[1]]) for x in (found, truth))
    return relative_error(found[0], truth[0], 0.1), relative_error(gradient, right, 0.1)


def check(leaves: list[Tensor], constants: dict[str, Any], method: str, **options: Any) -> None:
    """Loss and gradient within tolerance of the float64 reference on the same rounded inputs."""
    truth = expected(leaves, constants, **options)
    allowed = tolerances(leaves[0].dtype, errors(brute_force(leaves, constants, **options), truth))
    found = evaluate(leaves, constants, method=method, **options)
    assert found[0].dtype == leaves[0].dtype
    for error, limit in zip(errors(found, truth), allowed, strict=True):
        assert error <= limit, f"{error:.2e} > {limit:.2e}"


def problem(
    n: int, dtype: torch.dtype, rectangular: bool, weighted: bool, case: str = "gaussian"
) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves and constants: n candidates, and fewer anchors when rectangular."""
    m = max(1, n // 2) if rectangular else n
    leaves = [make_case(case, m, 5, dtype=dtype, seed=n)]
    constants: dict[str, Any] = {"teacher": make_case("gaussian", m, 4, dtype=dtype, seed=n + 1)}
    generator = torch.Generator().manual_seed(n)
    if rectangular:
        leaves.append(make_case(case, n, 5, dtype=dtype, seed=n + 2))
        constants["teacher_candidates"] = make_case("gaussian", n, 4, dtype=dtype, seed=n + 3)
        index = torch.randperm(n, generator=generator)[:m]
        constants["self_index"] = torch.where(index % 3 == 0, -1, index)
    if weighted:
        constants["anchor_weights"] = torch.rand(m, generator=generator, dtype=dtype)
        constants["anchor_weights"][m // 2 + 1 :: 4] = 0
        constants["candidate_weights"] = torch.rand(n, generator=generator, dtype=dtype)
        constants["candidate_weights"][:: max(3, n // 4)] = 0
    return leaves, constants


@pytest.mark.parametrize(
    ("objective", "scale", "metric", "method", "tau", "rectangular", "weighted", "dtype"),
    covering(
        OBJECTIVES, SCALES, METRICS, METHODS, (None, 0.2), (False, True), (False, True), DTYPES
    ),
)
def test_options(
    objective: str,
    scale: str,
    metric: str,
    method: str,
    tau: float | None,
    rectangular: bool,
    weighted: bool,
    dtype: torch.dtype,
) -> None:
    leaves, constants = problem(17, dtype, rectangular, weighted)
    check(
        leaves,
        constants,
        method,
        objective=objective,
        scale=scale,
        metric=metric,
        teacher_temperature=tau,
        reduction="mean" if weighted else "sum",
    )


@pytest.mark.parametrize(
    ("objective", "n", "method", "rectangular", "dtype"),
    covering(OBJECTIVES, (2, 3, 33), METHODS, (False, True), DTYPES),
)
def test_sizes(objective: str, n: int, method: str, rectangular: bool, dtype: torch.dtype) -> None:
    leaves, constants = problem(n, dtype, rectangular, weighted=n == 33)
    check(leaves, constants, method, objective=objective)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "objective"), [(130, "cross_entropy"), (70, "mse")])
def test_many_tiles(n: int, objective: str, method: str) -> None:
    """More candidates than a tile; mse, because cross_entropy does not use the scan's pullback."""
    leaves, constants = problem(n, torch.float32, rectangular=False, weighted=False)
    weights = torch.zeros(n)
    weights[[0, 31, 64, n - 1]] = 1  # the truth costs n^2 an anchor
    check(leaves, constants | {"anchor_weights": weights}, method, objective=objective)


def test_one_anchor() -> None:
    leaves, constants = problem(3, torch.float32, rectangular=True, weighted=False)
    assert leaves[0].shape[0] == 1
    for method in METHODS:
        check(leaves, constants, method)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_anchors(method: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "BLOCK_BYTES", 1)
    monkeypatch.setattr(pipeline, "MIN_ROWS", 7)
    monkeypatch.setattr(clouds, "MIRRORED_ROWS", 9)
    monkeypatch.setattr(clouds, "MIRRORED_WIDTH", 5)  # the student's, not the teacher's
    if not symmetric:
        monkeypatch.setattr(clouds, "SYMMETRIC_BYTES", 0)
    leaves, constants = problem(17, torch.float64, rectangular=False, weighted=True)
    check(leaves, constants, method, scale="none", teacher_temperature=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("case", POINTS)
def test_points_are_prepared_as_by_torch(case: str, metric: str, dtype: torch.dtype) -> None:
    given = points_with(case, dtype).to(DEVICE)
    for anchors, candidates in ((given, None), (given[:9], given)):
        check_prepared(row_kernels(), anchors, candidates, metric)


def test_points_that_a_sample_does_not_tell_apart() -> None:
    check_sample_of_one(row_kernels(), DEVICE)


@pytest.mark.parametrize(("n", "width"), [(9, 3), (70, 19)])
def test_near_pairs(n: int, width: int) -> None:
    check_near_pairs(row_kernels(), n, width, DEVICE)


@pytest.mark.parametrize(("n", "width"), [(13, 2), (70, 8)])
def test_products_above_the_diagonal(n: int, width: int) -> None:
    check_upper(row_kernels(), n, width, DEVICE)


@pytest.mark.parametrize(("n", "dtype"), covering((1, 2, 32, 65, 100), DTYPES))
def test_add_transpose(n: int, dtype: torch.dtype) -> None:
    check_transpose_added(row_kernels(), make_case("gaussian", n, n, dtype=dtype).to(DEVICE))


@pytest.mark.parametrize(
    ("case", "metric", "method", "dtype"), covering(CASES, METRICS, ANY_RANGE, DTYPES)
)
def test_cases(case: str, metric: str, method: str, dtype: torch.dtype) -> None:
    leaves, constants = problem(33, dtype, rectangular=False, weighted=False, case=case)
    check(leaves, constants, method, metric=metric)


@pytest.mark.parametrize(
    ("case", "method", "dtype"), covering(("duplicates", "equal", "lattice"), METHODS, DTYPES)
)
def test_tied_teachers(case: str, method: str, dtype: torch.dtype) -> None:
    """In float64, too: in float32 the rounding of distances hides a tie that is missed."""
    leaves, constants = problem(33, dtype, rectangular=False, weighted=True)
    constants["teacher"] = make_case(case, 33, 3, dtype=dtype)
    check(leaves, constants, method, objective="cross_entropy")


@pytest.mark.parametrize(
    ("temperature", "method"),
    [*covering((1e-4, 1e-2, 10.0), ANY_RANGE), (1e-2, "grid"), (10.0, "grid")],
)
def test_temperatures(temperature: float, method: str) -> None:
    leaves, constants = problem(33, torch.float64, rectangular=False, weighted=True)
    objective = "mse" if method == "pairs" else "cross_entropy"
    check(leaves, constants, method, temperature=temperature, objective=objective)


@pytest.mark.parametrize("method", ANY_RANGE)
def test_cross_entropy_of_agreement_does_not_cancel(method: str) -> None:
    """Positions near 1 / temperature would leave 1e-5 of a product with rounded ranks."""
    points = make_case("duplicates", 33, 24, dtype=torch.float32)
    options = {"objective": "cross_entropy", "metric": "cosine", "temperature": 1e-3}
    loss, _ = evaluate([points], {"teacher": points}, method=method, **options)
    truth, _ = expected([points], {"teacher": points}, **options)
    assert relative_error(loss, truth, 0.1) <= 5e-6


@pytest.mark.parametrize(("method", "scale"), covering(METHODS, SCALES))
def test_any_upstream_gradient(method: str, scale: str) -> None:
    leaves, constants = problem(17, torch.float64, rectangular=True, weighted=True)
    found = []
    for backend, device in (("reference", "cpu"), ("triton", DEVICE)):
        used = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
        others = {name: value.to(device) for name, value in constants.items()}
        losses = perception_coherence_loss(
            used[0],
            student_candidates=used[1],
            **others,
            scale=scale,
            reduction="none",
            backend=backend,
            method="auto" if backend == "reference" else method,
        )
        upstream = torch.linspace(-1, 2, losses.numel(), dtype=losses.dtype, device=device)
        found.append([losses, *torch.autograd.grad(losses, used, upstream)])
    for right, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours.cpu(), right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("side", [0, 1])
def test_gradient_of_one_side_alone(side: int) -> None:
    leaves, constants = problem(17, torch.float64, rectangular=True, weighted=False)
    for method in METHODS:
        both = evaluate(leaves, constants, method=method)[1]
        used = [leaf.clone().to(DEVICE) for leaf in leaves]
        used[side].requires_grad_()
        others = {name: value.to(DEVICE) for name, value in constants.items()}
        perception_coherence_loss(
            used[0], student_candidates=used[1], **others, method=method, backend="triton"
        ).backward()
        assert used[1 - side].grad is None
        assert used[side].grad is not None
        torch.testing.assert_close(used[side].grad.cpu(), both[side], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("method", "side"), covering(METHODS, (0, 1)))
def test_nan_and_inf_give_nan(method: str, side: int) -> None:
    bad = math.nan if side else math.inf
    points = [make_case("gaussian", 17, 3, dtype=torch.float32, seed=i) for i in range(2)]
    points[side][7, 1] = bad
    loss, (gradient,) = evaluate([points[0]], {"teacher": points[1]}, method=method)
    assert loss.isnan()
    assert gradient.isnan().any()


@pytest.mark.parametrize("method", METHODS)
def test_nan_spoils_only_the_anchors_that_see_it(method: str) -> None:
    points = [make_case("gaussian", n, 5, seed=n) for n in (7, 9)]
    points[0][3, 2] = math.nan
    teachers = [make_case("gaussian", n, 4, seed=n) for n in (7, 9)]
    losses = perception_coherence_loss(
        points[0].to(DEVICE),
        teachers[0].to(DEVICE),
        student_candidates=points[1].to(DEVICE),
        teacher_candidates=teachers[1].to(DEVICE),
        reduction="none",
        method=method,
        backend="triton",
    )
    assert losses.isnan().tolist() == [i == 3 for i in range(7)]


@pytest.mark.parametrize("method", METHODS)
def test_nobody_to_compare_with_is_zero(method: str) -> None:
    leaves, constants = problem(17, torch.float32, rectangular=False, weighted=False)
    constants["candidate_weights"] = torch.zeros(17)
    loss, (gradient,) = evaluate(leaves, constants, method=method)
    assert loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("dtype", "method"), covering((torch.float16, torch.bfloat16), METHODS), ids=str
)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, method: str) -> None:
    leaves, constants = problem(17, dtype, rectangular=False, weighted=False)
    loss, (gradient,) = evaluate(leaves, constants, method=method)
    raised = {"teacher": constants["teacher"].float()}
    right, (expected_gradient,) = evaluate([leaves[0].float()], raised, method=method)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, right)
    assert gradient.dtype == dtype
    assert relative_error(gradient, expected_gradient) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("method", METHODS)
def test_memory_layout_and_repetition_do_not_matter(method: str) -> None:
    leaves, constants = problem(33, torch.float32, rectangular=True, weighted=True)
    strided = [leaf.t().contiguous().t() for leaf in leaves]
    others = {name: value.repeat_interleave(2, 0)[::2] for name, value in constants.items()}
    first = evaluate(leaves, constants, method=method)
    for again in (
        evaluate(leaves, constants, method=method),
        evaluate(strided, others, method=method),
    ):
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


def test_other_metrics_come_as_blocks_of_distances() -> None:
    leaves, constants = problem(9, torch.float64, rectangular=False, weighted=True)
    check(leaves, constants, "scan", metric="cityblock", teacher_metric="euclidean")
    check(leaves, constants, "pairs", metric=lambda a, b: torch.cdist(a, b, p=4))


@pytest.mark.parametrize("weights", ["none", "row", "all"])
@pytest.mark.parametrize(("n", "dtype"), covering((1, 2, 33), DTYPES))
def test_soft_rank(n: int, dtype: torch.dtype, weights: str) -> None:
    generator = torch.Generator().manual_seed(n)
    values, upstream = torch.randn(2, 3, n, generator=generator, dtype=dtype).unbind()
    given = {
        "none": None,
        "row": torch.rand(n, generator=generator),
        "all": torch.rand(3, n, generator=generator),
    }[weights]
    for temperature, method in itertools.product((0.3, 10.0), (*METHODS, "auto")):
        found = []
        for backend, device, dtype_used in (
            ("reference", "cpu", torch.float64),
            ("triton", DEVICE, dtype),
        ):
            leaf = values.to(device, dtype_used).requires_grad_()
            ranks = soft_rank(
                leaf,
                temperature,
                weights=moved(given) if backend == "triton" else given,
                backend=backend,
                method="auto" if backend == "reference" else method,
            )
            found.append((ranks, *torch.autograd.grad(ranks, leaf, upstream.to(leaf))))
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        for right, ours in zip(*found, strict=True):
            assert relative_error(ours.cpu(), right, 1.0) <= tolerance


@pytest.mark.parametrize("method", METHODS)
def test_soft_rank_in_blocks(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights, upstream = make_case("gaussian", 9, 7).to(DEVICE).view(3, 3, 7)
    leaf = values.clone().requires_grad_()

    def computed() -> list[Tensor]:
        ranks = soft_rank(leaf, 0.3, weights=weights.abs(), backend="triton", method=method)
        return [ranks, *torch.autograd.grad(ranks, leaf, upstream)]

    whole = computed()
    monkeypatch.setattr(pipeline, "BLOCK_BYTES", 1)
    monkeypatch.setattr(pipeline, "MIN_ROWS", 2)
    assert all(map(torch.equal, computed(), whole))


@pytest.mark.parametrize(
    ("mask", "method"),
    [
        *itertools.product(MASKS, ANY_RANGE),
        *itertools.product(("none", "-inf", "inf", "both ends"), ("grid",)),
    ],
)
def test_soft_rank_beside_masks(mask: str, method: str) -> None:
    for n, dtype in itertools.product((2, 33), (torch.float32, torch.float64)):
        check_masked("triton", method, mask, n, dtype, DEVICE)


@pytest.mark.parametrize(
    ("objective", "tau", "neighbourhood", "dtype"),
    covering(OBJECTIVES, (None, 0.3), (None, 0.1), DTYPES),
)
def test_auto_takes_grid_and_scan_row_by_row(
    objective: str, tau: float | None, neighbourhood: float | None, dtype: torch.dtype
) -> None:
    """Anchors far from a cloud see a wider range of it, but for those that see it edge on."""
    leaves, constants = problem(33, dtype, rectangular=True, weighted=True)
    leaves[1][::2, 0] += 9
    leaves[0][::3, 0] -= 20
    options = {"scale": "none", "temperature": 0.5, "teacher_temperature": tau}
    distances = torch.cdist(leaves[0], leaves[1])[:, constants["candidate_weights"] > 0]
    bins = (distances.amax(1) - distances.amin(1)) / (0.5 * tables.BIN_WIDTH)
    limit = tuning.fitting_bins(33, dtype)
    assert 0 < int((bins >= limit).sum()) < len(bins)
    check(leaves, constants, "auto", objective=objective, neighbourhood=neighbourhood, **options)


@pytest.mark.parametrize("method", ["grid", "auto"])
def test_rows_for_whose_grids_there_is_no_memory(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, constants = problem(17, torch.float64, rectangular=True, weighted=True)
    values = make_case("gaussian", 9, 7).to(DEVICE)
    whole = evaluate(leaves, constants, method=method)
    ranks = soft_rank(values, backend="triton", method=method)
    monkeypatch.setattr(tuning, "SCRATCH_BYTES", 5 * 4 * 16 * tuning.MOST_BINS * 8)
    parts = evaluate(leaves, constants, method=method)
    assert torch.equal(whole[0], parts[0])
    assert all(map(torch.equal, whole[1], parts[1]))
    assert torch.equal(ranks, soft_rank(values, backend="triton", method=method))


@pytest.mark.parametrize(("method", "dtype", "long"), covering(ANY_RANGE, DTYPES, (False, True)))
def test_tiles_of_gpus(
    method: str, dtype: torch.dtype, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter has others, which hold more rows and fewer candidates."""
    tiles = tuning.tiles
    monkeypatch.setattr(tuning, "tiles", lambda dtype, on_gpu: tiles(dtype, True))
    monkeypatch.setattr(tuning, "LONG_ROW", 7 if long else 8)
    leaves, constants = problem(7, dtype, rectangular=True, weighted=True)
    check(leaves, constants, method, neighbourhood=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_have_more_warps(dtype: torch.dtype) -> None:
    short, long = (tuning.row_tiles(dtype, True, n) for n in (tuning.LONG_ROW - 1, tuning.LONG_ROW))
    for kernels in ("row", "scan", "sort", "grid"):
        few, more = (getattr(t, f"{kernels}_warps") for t in (short, long))
        assert few < more <= 32
    assert tuning.row_tiles(dtype, False, tuning.LONG_ROW) == tuning.tiles(dtype, False)


def test_too_many_bins_raise() -> None:
    """65,536 are the CPU's, which plays Triton where the checks themselves are checked."""
    leaves, constants = problem(9, torch.float64, rectangular=False, weighted=False)
    values = torch.tensor([[0.0, 1.0], [0.0, 1e6]], dtype=torch.float64, device=DEVICE)
    for call in (
        lambda: evaluate(leaves, constants, method="grid", temperature=1e-6),
        lambda: soft_rank(values, backend="triton", method="grid"),
    ):
        bins = r"^method: 'grid' would need more than (512|65536) bins"
        with pytest.raises(RuntimeError, match=bins):
            call()


def test_bins_are_counted_as_kernels_round_them() -> None:
    """A range just below 512 bins is 512 in float32: refused, and not left unserved."""
    for below, refused in ((1e-9, True), (1e-6, False)):
        stats = torch.zeros(statistics.STATISTICS.value, 2, dtype=torch.float64, device=DEVICE)
        stats[statistics.RANGE.value, 1] = 512 * tables.BIN_WIDTH * (1 - below)
        with pytest.raises(RuntimeError) if refused else nullcontext():
            triton_kernels.check_bins(stats, 512, torch.float32)
        triton_kernels.check_bins(stats, 512, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grid_tables_are_polynomials_of_the_kernels(dtype: torch.dtype) -> None:
    """To the errors that csrc/soft_ranks.h states."""
    order, reach = tables.GRID_ORDER[dtype], tables.GRID_REACH[dtype]
    x = numpy.linspace(-1, 1, 21)
    powers = x[:, None] ** numpy.arange(order)
    found = numpy.einsum("kqpd,xq,yp->kxyd", tables.grid_coefficients(order, reach), powers, powers)
    difference = numpy.arange(-reach, reach + 1)
    t = tables.BIN_WIDTH * (difference + (x[:, None, None] - x[:, None]) / 2)
    sigmoid, slope = 1 / (1 + numpy.exp(-t)), 0.25 / numpy.cosh(t / 2) ** 2
    softplus = numpy.log1p(numpy.exp(t)) - t * numpy.heaviside(difference, 0.5)
    most = (1e-7, 3e-7, 1e-7) if dtype == torch.float32 else (1e-11,) * 3
    for ours, right, bound in zip(found, (sigmoid, slope, softplus), most, strict=True):
        assert abs(ours - right).max() <= bound


def test_soft_rank_of_nothing_finite_or_weighted() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [1.0, math.nan, 3.0]], device=DEVICE)
    leaf = values.clone().requires_grad_()
    for method in METHODS:
        ranks = soft_rank(leaf, backend="triton", method=method)
        (gradient,) = torch.autograd.grad(ranks, leaf, values[:1].expand(2, 3))
        for found in (ranks, gradient):
            assert found.isnan().sum(1).tolist() == [0, 3]
        weightless = soft_rank(
            values[:1], weights=torch.zeros(3, device=DEVICE), backend="triton", method=method
        )
        assert (weightless == 0.5).all()


@pytest.mark.parametrize("method", METHODS)
def test_operators_keep_the_rules_of_torch(method: str) -> None:
    operators = TritonBackend().operators()
    x, y, c, z = (
        make_case("gaussian", n, 3, dtype=torch.float32, seed=n).to(DEVICE) for n in (4, 5, 6, 7)
    )
    y, z = y[:4], z[:6]
    ones, nobody = torch.ones(4, device=DEVICE), torch.full((4,), -1, device=DEVICE)
    hard, soft = LossSpec(teacher_metric="cosine"), LossSpec(scale="none", teacher_temperature=0.2)
    distances = torch.cdist(x, c), torch.cdist(y, z)
    x.requires_grad_()
    student = distances[0].clone().requires_grad_()

    def others(spec: LossSpec, *flags: bool) -> tuple[Any, ...]:
        packed = dataclasses.replace(spec, method=method).packed(distances=flags[0])
        return (None, nobody, *spec.temperatures, packed, *flags)

    from_distances = student, None, distances[1], None
    for operator, arguments in (
        (operators.coherence, (x, c, y, z, ones, *others(hard, False, True, False))),
        (operators.coherence, (x, c, y, z, ones, *others(hard, False, False, False))),
        (operators.coherence, (*from_distances, ones, *others(hard, True, True, False))),
        (operators.coherence, (*from_distances, None, *others(soft, True, False, False))),
        (operators.soft_rank, (student, None, None, 0.1, method)),
    ):
        torch.library.opcheck(
            operator,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


def test_compiled_equals_eager() -> None:
    leaves, constants = problem(9, torch.float32, rectangular=False, weighted=True)
    student = leaves[0].to(DEVICE).requires_grad_()
    others = {name: value.to(DEVICE) for name, value in constants.items()}
    torch.compiler.reset()

    def function(x: Tensor) -> Tensor:
        return perception_coherence_loss(2 * x, **others, method="scan", backend="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = [
        (loss := call(student), *torch.autograd.grad(loss, student))
        for call in (function, compiled)
    ]
    for eager, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_nothing(method: str) -> None:
    leaves, constants = problem(9, torch.float32, rectangular=False, weighted=False)
    plain = evaluate(leaves, constants, method=method)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = evaluate(leaves, constants, method=method)
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1][0], cast[1][0])


@pytest.mark.parametrize("method", METHODS)
def test_points_of_width_zero_are_equal(method: str) -> None:
    empty = torch.zeros(5, 0)
    found = evaluate([empty], {"teacher": make_case("gaussian", 5, 3).float()}, method=method)
    assert found[0] > 0
    assert found[1][0].shape == (5, 0)


def test_double_backward_raises() -> None:
    leaves, constants = problem(5, torch.float64, rectangular=False, weighted=False)
    student = leaves[0].to(DEVICE).requires_grad_()
    loss = perception_coherence_loss(student, constants["teacher"].to(DEVICE), backend="triton")
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


def test_what_it_cannot_do_is_refused() -> None:
    points = make_case("gaussian", 5, 3).to(DEVICE)
    assert REGISTRY["triton"].supports_soft_rank(torch.zeros(3, device="meta"), "auto") is not None
    operators = TritonBackend().operators()
    with pytest.raises(ValueError, match="values: expected a contiguous tensor"):
        operators.soft_rank(points.t(), None, None, 1.0, "auto")
    with pytest.raises(ValueError, match="upstream: expected shape"):
        operators.soft_rank(points, None, points[1:], 1.0, "auto")


def test_without_gpu_and_interpreter_it_says_so() -> None:
    code = "import pcoherence; print(pcoherence.available_backends()['triton'])"
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("no CUDA device; for tests alone, TRITON_INTERPRET=1")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-12), (torch.float64, 4e-15)])
def test_series_of_the_scan(dtype: torch.dtype, tolerance: float) -> None:
    z = numpy.linspace(0, 1, 1001)
    sigmoid, softplus = tables.coefficients(tables.SERIES_DEGREE[dtype])
    powers = z[:, None] ** numpy.arange(1, len(sigmoid) + 1)
    assert numpy.abs(1 + powers @ sigmoid - 1 / (1 + z)).max() <= tolerance
    assert numpy.abs(powers @ softplus - numpy.log1p(z)).max() <= tolerance
    assert abs(sigmoid.sum() + 0.5) <= 1e-15  # 1/2 on a tie


def test_first_identical_row() -> None:
    rows = torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 2.0], [2.0, 1.0], [0.0, 1.0], [1.0, 2.0]])
    assert first_identical(rows, plain_points.row_hashes(rows)).tolist() == [0, 1, 0, 3, 1, 0]
