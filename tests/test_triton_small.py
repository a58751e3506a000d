"""Triton's two kernels for small batches against the reference, as in test_triton.py."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from covering import covering
from test_triton import DEVICE, DTYPES, METRICS, check, evaluate, expected, moved, problem
from torch import Tensor

from pcoherence import perception_coherence_loss
from pcoherence.backends import pipeline, triton_kernels, triton_small
from pcoherence.kernels import small, tuning
from pcoherence.spec import OBJECTIVES, OF_DISTANCES, ROW_OPTIONS, SCALES, TEMPERATURES, LossSpec
from pcoherence.testing import CASES, make_case, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many points each batch had that went this way; one at least did."""
    sizes = []
    taken = triton_small.small

    def counted(spec: Any, batch: Any, *flags: bool) -> Any:
        sizes.append(batch.n)
        return taken(spec, batch, *flags)

    monkeypatch.setattr(triton_small, "small", counted)
    return sizes


@pytest.mark.parametrize(
    (
        "objective", "scale", "metric", "teacher_metric", "tau", "neighbourhood",
        "rectangular", "weighted", "dtype",
    ),
    covering(
        OBJECTIVES, SCALES, METRICS, METRICS, (None, 0.2), (None, 0.3), (False, True),
        (False, True), DTYPES,
    ),
)  # fmt: skip
def test_options(
    objective: str,
    scale: str,
    metric: str,
    teacher_metric: str,
    tau: float | None,
    neighbourhood: float | None,
    rectangular: bool,
    weighted: bool,
    dtype: torch.dtype,
    served: list[int],
) -> None:
    leaves, constants = problem(17, dtype, rectangular, weighted)
    check(
        leaves,
        constants,
        "pairs",
        objective=objective,
        scale=scale,
        metric=metric,
        teacher_metric=teacher_metric,
        teacher_temperature=tau,
        neighbourhood=neighbourhood,
        reduction="mean" if weighted else "sum",
    )
    assert served == [17]


@pytest.mark.parametrize(
    ("n", "objective", "metric", "rectangular", "dtype"),
    covering((2, 3, 33, 65), OBJECTIVES, METRICS, (False, True), DTYPES),
)
def test_sizes(n: int, objective: str, metric: str, rectangular: bool, dtype: torch.dtype) -> None:
    leaves, constants = problem(n, dtype, rectangular, weighted=n == 33)
    check(leaves, constants, "auto", objective=objective, metric=metric)


@pytest.mark.parametrize(
    ("objective", "metric"), [("mse", "cosine"), ("cross_entropy", "euclidean")]
)
def test_many_tiles(objective: str, metric: str, served: list[int]) -> None:
    leaves, constants = problem(257, torch.float32, rectangular=False, weighted=False)
    weights = torch.zeros(257)
    weights[[0, 31, 64, 256]] = 1  # the truth costs n^2 an anchor
    constants["anchor_weights"] = weights
    check(leaves, constants, "auto", objective=objective, metric=metric)
    assert served == [257]


@pytest.mark.parametrize(
    ("case", "metric", "objective", "dtype"),
    covering(CASES, METRICS, ("mse", "cross_entropy"), DTYPES),
)
def test_cases(case: str, metric: str, objective: str, dtype: torch.dtype) -> None:
    leaves, constants = problem(33, dtype, rectangular=False, weighted=False, case=case)
    check(leaves, constants, "auto", metric=metric, objective=objective)


@pytest.mark.parametrize(
    ("case", "metric", "dtype"), covering(("duplicates", "equal", "lattice"), METRICS, DTYPES)
)
def test_tied_teachers(case: str, metric: str, dtype: torch.dtype) -> None:
    leaves, constants = problem(33, dtype, rectangular=False, weighted=True)
    constants["teacher"] = make_case(case, 33, 3, dtype=dtype)
    check(leaves, constants, "auto", objective="cross_entropy", teacher_metric=metric)


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 10.0])
@pytest.mark.parametrize("objective", ["mse", "cross_entropy"])
def test_temperatures(temperature: float, objective: str) -> None:
    leaves, constants = problem(33, torch.float64, rectangular=False, weighted=True)
    check(leaves, constants, "auto", temperature=temperature, objective=objective)


def test_temperatures_keep_the_digits_of_float64() -> None:
    for value in (5e-324, 1e-300, 0.1, math.pi, 1e300):
        bits = torch.tensor(triton_small.bits_of(value)).view(torch.float64)
        assert bits.item() == value


def test_directions_of_any_length_tie() -> None:
    """Equal directions are as near, and a point has one length wherever it stands."""
    points = make_case("gaussian", 9, 5)
    points = torch.cat([points, 2 * points, 4 * points])
    teacher = make_case("gaussian", 27, 3)
    options = {"metric": "cosine", "objective": "cross_entropy", "temperature": 1e-3}
    for leaves, constants in (([points], {"teacher": teacher}), ([teacher], {"teacher": points})):
        check(leaves, constants, "auto", **options)


@pytest.mark.parametrize("metric", METRICS)
def test_zero_vectors(metric: str) -> None:
    points = make_case("gaussian", 9, 5)
    points[::4] = 0
    check([points], {"teacher": make_case("gaussian", 9, 3)}, "auto", metric=metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("flags", [(True, False), (False, True), (False, False)])
def test_gradient_of_one_side_alone(flags: tuple[bool, bool], metric: str) -> None:
    leaves, constants = problem(17, torch.float64, rectangular=True, weighted=False)
    loss, both = evaluate(leaves, constants, metric=metric)
    used = [x.clone().to(DEVICE).requires_grad_(f) for x, f in zip(leaves, flags, strict=True)]
    others = {name: moved(value) for name, value in constants.items()}
    found = perception_coherence_loss(
        used[0], student_candidates=used[1], **others, metric=metric, backend="triton"
    )
    torch.testing.assert_close(found.detach().cpu(), loss.detach(), rtol=1e-14, atol=0)
    if any(flags):
        found.backward()
    for leaf, wanted, right in zip(used, flags, both, strict=True):
        assert (leaf.grad is not None) == wanted
        if leaf.grad is not None:
            assert torch.equal(leaf.grad.cpu(), right)


@pytest.mark.parametrize("weights", ["none", "row", "all"])
def test_losses_by_anchor(weights: str) -> None:
    leaves, constants = problem(17, torch.float64, rectangular=True, weighted=False)
    generator = torch.Generator().manual_seed(0)
    if weights != "none":
        shape = (17,) if weights == "row" else (8, 17)
        constants["candidate_weights"] = torch.rand(shape, generator=generator).double()
        constants["candidate_weights"][..., ::5] = 0
    for objective in ("spearman", "cross_entropy"):
        check(leaves, constants, "auto", objective=objective, reduction="none")
        check(leaves, constants, "auto", objective=objective, reduction="mean")


@pytest.mark.parametrize(("bad", "side"), [*itertools.product((math.nan, math.inf), (0, 1))])
def test_nan_and_inf_give_nan(bad: float, side: int) -> None:
    points = [make_case("gaussian", 17, 3, dtype=torch.float32, seed=i) for i in range(2)]
    points[side][7, 1] = bad
    loss, (gradient,) = evaluate([points[0]], {"teacher": points[1]})
    assert loss.isnan()
    assert gradient.isnan().any()


def test_nan_spoils_only_the_anchors_that_see_it() -> None:
    points = [make_case("gaussian", n, 5, seed=n) for n in (7, 9)]
    points[0][3, 2] = math.nan
    teachers = [make_case("gaussian", n, 4, seed=n) for n in (7, 9)]
    losses = perception_coherence_loss(
        points[0].to(DEVICE),
        teachers[0].to(DEVICE),
        student_candidates=points[1].to(DEVICE),
        teacher_candidates=teachers[1].to(DEVICE),
        reduction="none",
        backend="triton",
    )
    assert losses.isnan().tolist() == [i == 3 for i in range(7)]


def test_nobody_to_compare_with_is_zero() -> None:
    leaves, constants = problem(17, torch.float32, rectangular=False, weighted=False)
    constants["candidate_weights"] = torch.zeros(17)
    loss, (gradient,) = evaluate(leaves, constants)
    assert loss == 0
    assert (gradient == 0).all()


def test_points_of_width_zero_are_equal() -> None:
    for metric in METRICS:
        empty = torch.zeros(5, 0)
        teacher = make_case("gaussian", 5, 3).float()
        loss, (gradient,) = evaluate([empty], {"teacher": teacher}, metric=metric)
        truth, _ = expected([torch.zeros(5, 1)], {"teacher": teacher}, metric="euclidean")
        assert relative_error(loss, truth) <= 1e-6
        assert gradient.shape == (5, 0)


def test_results_repeat() -> None:
    leaves, constants = problem(33, torch.float32, rectangular=True, weighted=True)
    first, again = (evaluate(leaves, constants, metric="cosine") for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert all(map(torch.equal, first[1], again[1]))


def launches(monkeypatch: pytest.MonkeyPatch, call: Any) -> list[str]:
    """The kernels of small.py that a call launches."""
    names: list[str] = []

    class Noted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            names.append(self.name)
            return self.kernel[grid]

    with monkeypatch.context() as patch:
        for name in ("small_rows", "small_gradient"):
            patch.setattr(small, name, Noted(name, getattr(small, name)))
        call()
    return names


def test_two_launches_or_one_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, constants = problem(9, torch.float32, rectangular=False, weighted=False)
    both = launches(monkeypatch, lambda: evaluate(leaves, constants))
    assert both == ["small_rows", "small_gradient"]
    x, y = leaves[0].to(DEVICE), constants["teacher"].to(DEVICE)
    alone = launches(monkeypatch, lambda: perception_coherence_loss(x, y, backend="triton"))
    assert alone == ["small_rows"]


@pytest.mark.parametrize(
    ("method", "most", "reads", "taken"),
    [
        ("auto", 9, 9 * 9 * 9, True),
        ("pairs", 9, 9 * 9 * 9, True),
        ("pairs", 8, 9 * 9 * 9, False),
        ("pairs", 9, 9 * 9 * 9 - 1, False),
        ("scan", 9, 9 * 9 * 9, False),
        ("grid", 9, 9 * 9 * 9, False),
    ],
)
def test_who_is_small(
    method: str, most: int, reads: int, taken: bool, served: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tuning, "FUSED_MOST", most)
    monkeypatch.setattr(pipeline, "SMALL_READS", reads)
    leaves, constants = problem(9, torch.float64, rectangular=False, weighted=False)
    check(leaves, constants, method)
    assert served == [9] * taken


def test_every_option_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or an option that these kernels do not know would be as if it had not been asked for."""
    read: set[str] = set()

    class Noted(LossSpec):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    kernels, taken = triton_kernels.row_kernels(), triton_small.small

    def noted(spec: LossSpec, batch: Any, *flags: bool) -> Any:
        options = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        asked = Noted(**options)
        read.clear()  # its own checks read all
        assert kernels.is_small(asked, batch)
        return taken(asked, batch, *flags)

    monkeypatch.setattr(triton_small, "small", noted)
    leaves, constants = problem(9, torch.float64, rectangular=False, weighted=False)
    evaluate(leaves, constants)
    assert {*ROW_OPTIONS, *TEMPERATURES, *OF_DISTANCES} <= read


def test_small_is_part_of_the_kernels() -> None:
    """Of batches beyond "auto"'s pairs the grid or the scan takes the rows."""
    batch = triton_small.Batch(torch.zeros(600, 2), None, torch.zeros(600, 2), *[None] * 4)
    for method in ("auto", "pairs"):
        spec = triton_small.LossSpec(method=method)
        assert not triton_kernels.row_kernels().is_small(spec, batch)


def test_every_pair_of_equal_points_is_zero_apart() -> None:
    """And the gradient of what ties is that of the reference: zero where distances are zero."""
    points = make_case("duplicates", 33, 19, dtype=torch.float32)
    teacher = make_case("gaussian", 33, 4, dtype=torch.float32)

    def gradient(x: Tensor) -> Tensor:
        return evaluate([x], {"teacher": teacher}, temperature=1e-2)[1][0]

    right = expected([points], {"teacher": teacher}, temperature=1e-2)[1][0]
    assert relative_error(gradient(points), right) <= 2e-5
