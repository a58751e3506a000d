"""The accuracy that the project promises, against the float64 reference, and hostile inputs.

In float32 the loss errs by at most 5e-6 and its gradient by 2e-5 of its norm, or twice what brute
force in float32 errs by where that is more; in float64 both by 1e-9. Errors are root mean squares
over a few draws of the inputs, ours and brute force's alike: a single draw of a rounding error
may happen to be small, and twice an accident is no bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from covering import covering
from torch import Tensor

from pcoherence import library, perception_coherence_loss
from pcoherence.spec import METHODS, METRICS, OBJECTIVES, REDUCTIONS, SCALES
from pcoherence.testing import (
    ACCURACY,
    CASES,
    make_case,
    reference_value_and_grad,
    relative_error,
    root_mean_square,
    tolerances,
)

pytestmark = pytest.mark.usefixtures("cpu_backend")

Found = tuple[Tensor, Tensor]
Errors = tuple[float, float]
TEMPERATURES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
BY_EVERY_METHOD = ("mse", "cross_entropy")
"""One objective of each kind: of the residuals of ranks, and of all comparisons."""

GRADIENT_FLOOR = 1e-3
"""A gradient that vanishes, as where all neighbours are many temperatures apart, is held to this.

Its terms are of the size 1 / temperature and more: 2e-8 is far below their roundings.
"""
FLOORS = 0.0, GRADIENT_FLOOR
"""What the errors of a loss and its gradient are relative to, where those are smaller."""


def evaluate(student: Tensor, teacher: Tensor, backend: str = "cpu", **options: Any) -> Found:
    """Loss and gradient."""
    leaf = student.detach().clone().requires_grad_()
    loss = perception_coherence_loss(leaf, teacher, backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf, torch.ones_like(loss))[0]


FEW = 40
"""Up to so many points the reference is quickest at once; of more, one anchor at a time."""


def by_reference(student: Tensor, teacher: Tensor, dtype: torch.dtype, **options: Any) -> Found:
    """In float64 the truth; in the inputs' own dtype what brute force makes of it."""
    if len(student) > FEW:
        return reference_value_and_grad(student, teacher, dtype=dtype, **options)[:2]
    options = in_double(options) if dtype == torch.float64 else options
    return evaluate(student.to(dtype), teacher.to(dtype), "reference", **options)


def errors(found: Found, truth: Found, floors: Errors = FLOORS) -> Errors:
    return (
        relative_error(found[0], truth[0], floors[0]),
        relative_error(found[1], truth[1], floors[1]),
    )


def in_double(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }


def some_anchors(n: int, count: int) -> Tensor:
    """Weights of a few anchors [n], the one that is an outlier in that case among them."""
    generator = torch.Generator().manual_seed(n)
    weights = torch.zeros(n)
    weights[torch.randperm(n, generator=generator)[:count]] = 1 + torch.rand(
        min(n, count), generator=generator
    )
    weights[n // 2] = 1
    return weights


def check(
    n: int,
    case: str,
    draws: int,
    methods: Sequence[str] = ("auto",),
    anchors: int = 3,
    floors: Errors = FLOORS,
    **options: Any,
) -> None:
    """All methods, in both dtypes, on the same float32 points, for a few anchors."""
    found: dict[tuple[str, torch.dtype], list[Errors]] = {}
    plain = []
    for seed in range(draws):
        student = make_case(case, n, 24, dtype=torch.float32, seed=seed)
        # The lattice's distances tie in the teacher too.
        other = "lattice" if case == "lattice" else "gaussian"
        teacher = make_case(other, n, 16, dtype=torch.float32, seed=1000 + seed)
        arguments = options | {"anchor_weights": some_anchors(n, anchors)}
        truth = by_reference(student, teacher, torch.float64, **arguments)
        brute_force = by_reference(student, teacher, torch.float32, **arguments)
        plain.append(errors(brute_force, truth, floors))
        for method, dtype in itertools.product(methods, (torch.float32, torch.float64)):
            ours = evaluate(student.to(dtype), teacher.to(dtype), method=method, **arguments)
            found.setdefault((method, dtype), []).append(errors(ours, truth, floors))
    for (method, dtype), each in found.items():
        brute = root_mean_square(plain) if dtype == torch.float32 else (0.0, 0.0)
        for what, error, limit in zip(
            ("loss", "gradient"), root_mean_square(each), tolerances(dtype, brute), strict=True
        ):
            assert error <= limit, f"{method} {dtype} {what}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("objective", BY_EVERY_METHOD)
def test_every_method(objective: str, case: str, temperature: float) -> None:
    # Tens of thousands of bins for 33 points are for tests/test_rows.py.
    methods = [m for m in METHODS if m != "grid" or temperature >= 1e-2]
    check(33, case, 5, methods, objective=objective, temperature=temperature)


@pytest.mark.parametrize(
    ("objective", "case", "temperature"),
    covering([o for o in OBJECTIVES if o not in BY_EVERY_METHOD], CASES, TEMPERATURES),
)
def test_other_objectives(objective: str, case: str, temperature: float) -> None:
    """Any two of the three: the sums are those of `test_every_method`."""
    # At a tiny temperature few comparisons have an error at all: twice that of 3 draws is no bound.
    draws = 3 if temperature >= 1e-2 else 12
    check(129, case, draws, objective=objective, temperature=temperature)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", CASES)
def test_three_points(case: str, temperature: float) -> None:
    plain = {"objective": "mse", "neighbourhood": None, "temperature": temperature}
    check(3, case, 8, ("auto", "scan"), **plain)
    # The default's loss of two candidates may vanish, or be exp(-1 / temperature); so may its
    # gradient, of terms of the size 1 / temperature and above. Few draws have a comparison within
    # reach of a temperature this small, so it takes many.
    floors = 0.1, 0.01 / temperature
    check(3, case, 64, ("auto", "scan"), floors=floors, temperature=temperature)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", CASES)
def test_moderate_batches(case: str, temperature: float) -> None:
    check(513, case, 2, anchors=1, temperature=temperature)


# Past the cache in float64 (from 1,449 points on), with slabs of 128 rows: what differs there from
# 513 points is where rows are kept, so every case meets one temperature, not all.
@pytest.mark.parametrize(
    ("case", "temperature"), list(zip(CASES, itertools.cycle([1e-4, 0.1, 10.0]), strict=False))
)
def test_large_batches(case: str, temperature: float) -> None:
    check(1471, case, 1, anchors=1, temperature=temperature)


@pytest.mark.parametrize("case", CASES)
def test_large_batches_of_comparisons(case: str) -> None:
    check(1023, case, 1, anchors=1, objective="cross_entropy", teacher_temperature=0.05)


# --- hostile geometry --------------------------------------------------------------------------


def check_against_brute_force(
    student: Tensor,
    teacher: Tensor,
    methods: Sequence[str] = ("auto",),
    floors: Errors = FLOORS,
    **options: Any,
) -> None:
    """One draw, where brute force itself is accurate."""
    truth = evaluate(student.double(), teacher.double(), "reference", **in_double(options))
    plain = (0.0, 0.0)
    if student.dtype != torch.float64:
        plain = errors(evaluate(student, teacher, "reference", **options), truth, floors)
    limits = tolerances(student.dtype, plain)
    for method in methods:
        ours = errors(evaluate(student, teacher, method=method, **options), truth, floors)
        for what, error, limit in zip(("loss", "gradient"), ours, limits, strict=True):
            assert error <= limit, f"{method} {what}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("metric", [m for m in METRICS if m != "cosine"])  # without angles in 1-d
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_fine_structure_far_from_the_mean(side: str, metric: str) -> None:
    """Points near 0 keep the digits that float32 gives them there, wherever the others are."""
    points = torch.tensor([0, 1e-6, 3e-6, 7e-6, 100, 101, 103, 107, 111, 118])[:, None]
    others = torch.tensor([3.0, 1, 2, 8, 5, -1, 4, 0, -7, 10])[:, None]
    fine = (torch.arange(10) < 4).float()
    student, teacher = (points, others) if side == "student" else (others, points)
    options = {"anchor_weights": fine, "candidate_weights": fine}
    check_against_brute_force(student, teacher, metric=metric, **options)


def check_near_pairs(points: Tensor, gradient: bool = True, **options: Any) -> None:
    """Of any size, so no error is relative to more than what it is an error of."""
    teacher = make_case("gaussian", len(points), 5, dtype=torch.float32)
    truth = evaluate(points.double(), teacher.double(), "reference", **in_double(options))
    found = evaluate(points, teacher, **options)
    for what, ours, expected, bar in zip(
        ("loss", "gradient"), found, truth, ACCURACY[torch.float32], strict=True
    ):
        error = relative_error(ours, expected)
        if what == "loss" or gradient:
            assert error <= bar, f"{what}: {error:.1e} > {bar:.1e}"


@pytest.mark.parametrize("width", [3, 16, 100, 128, 200])
@pytest.mark.parametrize("size", [1e-40, 1e-36, 1.0, 1e33])
def test_near_pairs_of_any_width_and_size(size: float, width: int) -> None:
    """Differences in float32 times a power of two, a vector or several at a time, or in float64."""
    points = (size * make_case("clustered", 40, width)).float()
    check_near_pairs(points, temperature=1.0, objective="mse")


@pytest.mark.parametrize("width", [16, 33])
def test_near_pairs_whose_squares_vanish(width: int) -> None:
    """Points near 0 that differ by 1e-21, whose squares float32 rounds to a few units or 0.

    So it does to the inverse squares of which the gradient is made: to inf.
    """
    sizes = torch.tensor([0, 1e-21, 3e-21, 7e-21, 1, 1.1, 1.3, 1.7, 2, 2.5])
    direction = make_case("gaussian", 1, width, dtype=torch.float32)
    fine = (sizes < 1e-3).float()
    options = {"anchor_weights": fine, "candidate_weights": fine, "temperature": 1.0}
    check_near_pairs(sizes[:, None] * direction, gradient=False, objective="mse", **options)


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("distance", [3.0, 10.0, 100.0])
def test_tight_clusters(distance: float, spread: float) -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        centres = distance * torch.randn(4, 8, generator=generator)
        chosen = centres[torch.randint(4, (33,), generator=generator)]
        student = chosen + spread * torch.randn(33, 8, generator=generator)
        teacher = make_case("gaussian", 33, 5, dtype=torch.float32, seed=seed)
        check_against_brute_force(student, teacher, objective="cross_entropy")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_l1_has_subgradient_0_where_ranks_agree(dtype: torch.dtype, seed: int) -> None:
    """A residual of 0 pulls nobody, whatever a kernel's rounding makes of it.

    At this temperature soft ranks are hard ones, and distances on a lattice tie exactly: a
    candidate that ties with another in the student alone feels whether its residual is 0.
    """
    student, teacher = (make_case("lattice", 33, 2, dtype=dtype, seed=seed + i) for i in (0, 99))
    # Ten thousand bins a row: once will do.
    methods = [m for m in METHODS if m != "grid" or seed == 0]
    for near in (None, 0.4):
        options = {"objective": "l1", "temperature": 1e-4, "neighbourhood": near}
        check_against_brute_force(student, teacher, methods, **options)


# 65 points have ranks of k / 64, which float32 holds exactly; 64 do not.
@pytest.mark.parametrize("n", [64, 65, 130])
@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 1e-2])
def test_cross_entropy_near_agreement(temperature: float, n: int) -> None:
    """Where training ends, terms of the size 1 / temperature must not cancel in float32."""
    ours, plain = [], []
    for seed in range(8):
        points = make_case("gaussian", n, 8, dtype=torch.float32, seed=seed)
        options: dict[str, Any] = {"objective": "cross_entropy", "temperature": temperature}
        options["anchor_weights"] = some_anchors(n, 4)
        truth = by_reference(points, points, torch.float64, **options)
        ours.append(errors(evaluate(points, points, **options), truth))
        plain.append(errors(by_reference(points, points, torch.float32, **options), truth))
    limits = tolerances(torch.float32, root_mean_square(plain))
    for what, error, limit in zip(
        ("loss", "gradient"), root_mean_square(ours), limits, strict=True
    ):
        assert error <= limit, f"{what}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize(
    ("metric", "power"),
    [
        (metric, power)
        for metric in METRICS
        for power in (60, -60, 100, -100)
        if metric != "sqeuclidean" or abs(power) <= 60  # or the squares would leave float32
    ],
)
def test_scale_of_the_features(metric: str, power: int) -> None:
    """Features near 1e18, 1e-18, 1e30 and 1e-30 are as good as any, by powers of two."""
    student, teacher = (make_case("gaussian", 33, 8, seed=i).float() for i in range(2))
    for objective in ("mse", "cross_entropy"):
        # A soft teacher: one draw, in which no near tie of hard ranks shall decide.
        options: dict[str, Any] = {"metric": metric, "objective": objective}
        options["teacher_temperature"] = 0.1
        truth = evaluate(student.double(), teacher.double(), "reference", **options)
        plain = errors(evaluate(student, teacher, "reference", **options), truth)
        limits = tolerances(torch.float32, plain)
        loss, gradient = evaluate(student * 2.0**power, teacher * 2.0**power, **options)
        ours = errors((loss, gradient.double() * 2.0**power), truth)
        for what, error, limit in zip(("loss", "gradient"), ours, limits, strict=True):
            assert error <= limit, f"{objective} {what}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("scale", SCALES)
def test_weights_of_extreme_range(scale: str, objective: str) -> None:
    generator = torch.Generator().manual_seed(3)
    ours, limits = [], []
    for seed in range(6):
        student, teacher = (make_case("gaussian", 33, 8, seed=seed + i).float() for i in (0, 99))
        weights = 10 ** (12 * torch.rand(2, 33, generator=generator) - 6)
        options = {
            "anchor_weights": weights[0],
            "candidate_weights": weights[1],
            "scale": scale,
            "objective": objective,
        }
        truth = evaluate(student.double(), teacher.double(), "reference", **options)
        ours.append(errors(evaluate(student, teacher, **options), truth))
        limits.append(errors(evaluate(student, teacher, "reference", **options), truth))
        exact = errors(evaluate(student.double(), teacher.double(), **options), truth)
        assert max(exact) <= 1e-9
    allowed = tolerances(torch.float32, root_mean_square(limits))
    for error, limit in zip(root_mean_square(ours), allowed, strict=True):
        assert error <= limit, f"{error:.2e} > {limit:.2e}"


# --- more than one block of anchors ------------------------------------------------------------


def in_blocks(metric: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """More anchors than a block takes, and so few candidates that the reference is quick.

    Some pairs are near, in the first block and in the second.
    """
    block = int(library.about()["constants"]["anchors of a block"])
    m, n = block + 18, 11
    student, teacher = (make_case("gaussian", m, d, seed=d) for d in (9, 4))
    candidates, others = (make_case("gaussian", n, d, seed=d) for d in (9 + m, 4 + m))
    candidates, others = candidates[:, :9], others[:, :4]
    for anchor, candidate in ((3, 0), (block - 1, 1), (block, 2), (m - 1, 0)):
        student[anchor] = candidates[candidate] * (1 + 1e-12)
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    return student, teacher, {
        "student_candidates": candidates,
        "teacher_candidates": others,
        "anchor_weights": torch.rand(m, **draw),
        "candidate_weights": torch.rand(n, **draw),
        "self_index": torch.randint(-1, n, (m,), generator=generator),
        "metric": metric,
    }  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_second_block_is_as_good_as_the_first(scale: str, metric: str) -> None:
    """In float64, where a slip shows; losses by themselves, and gradients of all points."""
    student, teacher, options = in_blocks(metric)
    for objective, soft, reduction in (("mse", None, "none"), ("cross_entropy", 0.2, "mean")):
        options |= {"scale": scale, "objective": objective, "teacher_temperature": soft}
        found = []
        for backend in ("reference", "cpu"):
            leaves = [x.clone().requires_grad_() for x in (student, options["student_candidates"])]
            loss = perception_coherence_loss(
                leaves[0],
                teacher,
                **(options | {"student_candidates": leaves[1]}),
                reduction=reduction,
                backend=backend,
            )
            upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
            found.append((loss.detach(), *torch.autograd.grad(loss, leaves, upstream)))
        for truth, ours in zip(*found, strict=True):
            assert relative_error(ours, truth) <= 1e-9


@pytest.mark.parametrize("metric", METRICS)
def test_a_batch_in_blocks_is_the_batch(metric: str) -> None:
    """Its own points, given as candidates: in blocks, and as rows computed one by one."""
    n = int(library.about()["constants"]["anchors of a block"]) + 18
    student, teacher = (make_case("gaussian", n, d, seed=d) for d in (9, 4))
    student[n - 10 : n - 5] = student[:5] * (1 + 1e-9)
    leaf = student.clone().requires_grad_()
    options = {"metric": metric, "reduction": "none", "backend": "cpu"}
    losses = perception_coherence_loss(leaf, teacher, **options)
    upstream = torch.linspace(-1, 2, n, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(losses, leaf, upstream)
    both = [student.clone().requires_grad_() for _ in range(2)]
    options |= {"teacher_candidates": teacher}
    apart = perception_coherence_loss(
        both[0], teacher, student_candidates=both[1], self_index=torch.arange(n), **options
    )
    pulls = torch.autograd.grad(apart, both, upstream)
    assert relative_error(losses, apart) <= 1e-9
    assert relative_error(gradient, pulls[0] + pulls[1]) <= 1e-9
    for i in (0, 511, 512, 529):
        points = student[i : i + 1].clone().requires_grad_()
        row = perception_coherence_loss(
            points,
            teacher[i : i + 1],
            student_candidates=student,
            self_index=torch.tensor([i]),
            **options,
        )
        assert relative_error(losses[i : i + 1], row) <= 1e-9
        (alone,) = torch.autograd.grad(row, points, upstream[i : i + 1])
        assert relative_error(pulls[0][i : i + 1], alone) <= 1e-9


# --- the smallest shapes -----------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_smallest_shapes(objective: str, metric: str) -> None:
    """2 points; 2 with themselves; 1 anchor of 2 and of 3 candidates; widths 1 and 0."""
    for dtype, width in itertools.product((torch.float32, torch.float64), (0, 1, 2)):
        x, y = (make_case("gaussian", 3, 2, seed=i).to(dtype)[:, :width] for i in range(2))
        banks = [
            {"student_candidates": x[:n], "teacher_candidates": y[:n], "self_index": index}
            for n, index in ((2, None), (3, None), (3, torch.tensor([2])))
        ]
        calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = [
            (x[:2], y[:2], {}),
            (x[:2], y[:2], {"self_index": None}),
            (x, y, {}),
            *((x[2:], y[2:], bank) for bank in banks),
        ]
        for student, teacher, extra in calls:
            # A loss of so few points may vanish: held to epsilons of the terms it is made of.
            floors = (1.0, 1.0) if objective == "cross_entropy" else (0.1, 0.1)
            check_against_brute_force(
                student, teacher, METHODS, floors, objective=objective, metric=metric, **extra
            )


@pytest.mark.parametrize("metric", METRICS)
def test_the_distance_to_oneself_is_0(metric: str) -> None:
    """Exactly: at a low temperature the root of a rounding would be far from there."""
    student, teacher = (make_case("gaussian", 33, 45, seed=i) for i in range(2))
    student[:9] = 1e-6 * student[:9]
    for self_index in (None, "auto"):
        options = {"metric": metric, "self_index": self_index, "temperature": 1e-5}
        check_against_brute_force(student, teacher, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["auto", "scan", "pairs"])
@pytest.mark.parametrize("objective", ["mse", "huber", "spearman"])
def test_the_tiniest_temperatures_order(objective: str, method: str, dtype: torch.dtype) -> None:
    """Where even its inverse overflows, the student's ranks are hard ones.

    A range of more than 1e30 temperatures counts as that many, and exp(-87) is the least exp.
    """
    student, teacher = (make_case("gaussian", 33, 7, dtype=dtype, seed=i) for i in range(2))
    options: dict[str, Any] = {"objective": objective, "method": method}
    expected, _ = evaluate(student, teacher, temperature=1e-12, **options)
    for temperature, scale in itertools.product((1e-45, 1e-310), SCALES):
        options |= {"temperature": temperature, "scale": scale}
        loss, gradient = evaluate(student, teacher, **options)
        assert relative_error(loss, expected) <= 1e-6
        assert gradient.abs().max() <= 33 * math.exp(-87) * 1e30


@pytest.mark.parametrize("width", [5, 8, 19])
def test_equal_coordinates_pull_nobody(width: int) -> None:
    """Under cityblock, in whole registers and beside them."""
    student, teacher = (make_case("lattice", 33, width, seed=i) for i in range(2))
    check_against_brute_force(student, teacher, metric="cityblock")


@pytest.mark.parametrize(("metric", "teacher_metric"), list(itertools.permutations(METRICS, 2)))
def test_each_side_by_its_own_metric(metric: str, teacher_metric: str) -> None:
    student, teacher = (make_case("gaussian", 17, 7, seed=i) for i in range(2))
    for reduction in REDUCTIONS:
        options = {"metric": metric, "teacher_metric": teacher_metric, "reduction": reduction}
        check_against_brute_force(student, teacher, **options)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_of_0_and_1(objective: str) -> None:
    """Also of those who have none, as anchors: they are not among their own candidates."""
    student, teacher = (make_case("gaussian", 33, 7, seed=i) for i in range(2))
    weights = (torch.arange(33) % 3 > 0).double()
    options = {"candidate_weights": weights, "objective": objective, "reduction": "none"}
    check_against_brute_force(student, teacher, METHODS, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 2])
def test_parallel_vectors_tie_in_cosine(width: int, dtype: torch.dtype) -> None:
    """On an axis all directions are 1 or -1, exactly, as in sparse features they often are."""
    teacher = torch.zeros(5, width, dtype=dtype)
    teacher[:, 0] = torch.tensor([1, 3, 7, -5, -11])
    student = torch.tensor([0, 1, 4, 9, 16], dtype=dtype)[:, None]
    check_against_brute_force(student, teacher, metric="euclidean", teacher_metric="cosine")


# --- determinism, NaN and inf ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["gaussian", "duplicates", "clustered"])
@pytest.mark.parametrize("metric", METRICS)
def test_repeated_runs_are_identical(metric: str, case: str, dtype: torch.dtype) -> None:
    student = make_case(case, 515, 20, dtype=dtype)
    teacher = make_case("gaussian", 515, 16, dtype=dtype, seed=1)
    options = {"metric": metric, "objective": "cross_entropy"}
    first, other = (evaluate(student, teacher, **options) for _ in range(2))
    assert first[1].isfinite().all()
    assert torch.equal(other[0], first[0])
    assert torch.equal(other[1], first[1])


SIDES = ("student", "teacher", "student_candidates", "teacher_candidates")
DTYPES = (torch.float32, torch.float64)
PLACES = ((0, 0), (15, 18), (31, 7), (32, 18))
"""Of points [33, 19]."""
OPTIONS = covering(DTYPES, OBJECTIVES, METHODS, SCALES, (None, 0.2), (0.0, 1.0), PLACES)


def evaluate_rows(
    points: dict[str, Any], weights: Tensor, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Losses, and the gradients of their sum for the student and its given candidates."""
    leaves = {name: x.clone().requires_grad_() for name, x in points.items() if name in SIDES[::2]}
    losses = perception_coherence_loss(
        **(points | leaves),
        anchor_weights=weights,
        candidate_weights=weights,
        reduction="none",
        backend="cpu",
        **options,
    )
    upstream = torch.ones_like(losses)
    return losses.detach(), list(torch.autograd.grad(losses, list(leaves.values()), upstream))


@pytest.mark.parametrize(
    ("side", "metric", "bad"), covering(SIDES, METRICS, (math.nan, math.inf, -math.inf))
)
def test_nan_and_inf_show_where_they_are_seen(side: str, metric: str, bad: float) -> None:
    """Whoever is compared with them is NaN, whatever the weights; nobody else changes.

    In any row, also one of padding, and in any column; among points that are their own candidates
    all are compared.
    """
    for dtype, objective, method, scale, soft, weight, (row, column) in OPTIONS:
        every = {name: make_case("gaussian", 33, 19, dtype=dtype, seed=i)
                 for i, name in enumerate(SIDES)}  # fmt: skip
        weights = torch.ones(33, dtype=dtype)
        weights[row] = weight
        options = {"objective": objective, "method": method, "scale": scale, "metric": metric}
        options["teacher_temperature"] = soft
        for points in (every, {name: every[name] for name in SIDES[:2]}):
            if side not in points:
                continue
            broken = points | {side: points[side].clone()}
            broken[side][row, column] = bad
            losses, gradients = evaluate_rows(broken, weights, **options)
            if side.endswith("candidates") or len(points) == 2:
                assert losses.isnan().all()
                assert all(gradient.isnan().any(1).all() for gradient in gradients)
                continue
            anchor = torch.arange(33) == row
            assert torch.equal(losses.isnan(), anchor)
            assert gradients[0][row].isnan().any()
            assert gradients[1].isnan().any(1).all()  # every candidate is pulled by that anchor
            clean, expected = evaluate_rows(points, weights, **options)
            allowed = (1e-9, 1e-9) if dtype == torch.float64 else (1e-5, 1e-4)
            assert relative_error(losses[~anchor], clean[~anchor]) <= allowed[0]
            assert relative_error(gradients[0][~anchor], expected[0][~anchor]) <= allowed[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_but_nan(bad: float) -> None:
    for method, metric in itertools.product(METHODS, METRICS):
        points = torch.full((18, 3), bad)
        loss, _ = evaluate(points, points, method=method, metric=metric)
        assert loss.isnan()


@pytest.mark.parametrize("brute_force", [(math.nan, 0.0), (0.0, math.nan)])
def test_brute_force_that_gives_nan_is_no_bound(brute_force: Errors) -> None:
    with pytest.raises(ValueError, match=r"^brute_force: expected numbers"):
        tolerances(torch.float32, brute_force)
