"""Every fast path against the reference where a slip would hide: in float64, so that it shows.

A path is a backend and the way it takes: the CPU's, CUDA's small batches and its pipeline (on
emulated thread blocks), Triton's pairs and its scan (in its interpreter).
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from covering import covering
from emulation import DEVICE, Emulate
from torch import Tensor

from pcoherence import perception_coherence_loss
from pcoherence.backends import clouds, cuda_kernels, pipeline
from pcoherence.spec import OBJECTIVES
from pcoherence.testing import make_case, relative_error

FAST = ("cpu", "cuda small", "cuda pipeline")
SLOW = ("triton pairs", "triton scan")
"""In its interpreter a call takes a second."""
METRICS = ("euclidean", "sqeuclidean", "cosine")
SCALES = ("anchor", "none")

Rows = Sequence[tuple[Any, ...]]
Found = tuple[Tensor, list[Tensor]]
Evaluate = Callable[..., Found]


def on_all_paths(names: str, rows: Rows, few: Rows) -> pytest.MarkDecorator:
    """The rows of options on the fast paths, and a few of them on the slow ones."""
    cases = [(path, *row) for paths, options in ((FAST, rows), (SLOW, few)) for path in paths
             for row in options]  # fmt: skip
    return pytest.mark.parametrize(f"evaluate, {names}", cases, indirect=["evaluate"])


def singles(values: Sequence[Any]) -> Rows:
    return [(value,) for value in values]


def evaluated(
    backend: str, device: str, leaves: list[Tensor], constants: dict[str, Any], **options: Any
) -> Found:
    """Loss and gradients; leaves are the student and perhaps its candidates."""
    used = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in constants.items()}
    if len(used) == 2:
        given["student_candidates"] = used[1]
    loss = perception_coherence_loss(used[0], **given, **options, backend=backend)
    upstream = torch.ones_like(loss)
    return loss.detach().cpu(), [g.cpu() for g in torch.autograd.grad(loss, used, upstream)]


def reference(leaves: list[Tensor], constants: dict[str, Any], **options: Any) -> Found:
    return evaluated("reference", "cpu", leaves, constants, **options)


@pytest.fixture
def evaluate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """`evaluated` by one of the paths, in blocks of few anchors where there are blocks."""
    backend, _, way = request.param.partition(" ")
    device, method = "cpu", "auto"
    if backend == "cpu":
        request.getfixturevalue("cpu_backend")
    elif backend == "cuda":
        emulate: Emulate = request.getfixturevalue("emulate")
        emulate(threads=64, seed=1)
        device = DEVICE
    else:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed")
        device, method = "cuda" if torch.cuda.is_available() else "cpu", way
    if way == "pipeline":
        monkeypatch.setattr(cuda_kernels, "SMALL_CANDIDATES", 0)
        monkeypatch.setattr(pipeline, "BLOCK_BYTES", 1)
        monkeypatch.setattr(pipeline, "MIN_ROWS", 7)  # of 17, so that the last block is smaller
        monkeypatch.setattr(clouds, "SYMMETRIC_BYTES", 0)
    return lambda *given, **options: evaluated(
        backend, device, *given, **{"method": method, **options}
    )


def problem(
    n: int, rectangular: bool, weighted: bool, seed: int = 0, by_anchor: bool = False
) -> tuple[list[Tensor], Any]:
    """Leaves and constants: n candidates, half as many anchors where rectangular.

    Every candidate has weight, perhaps another for each anchor; anchors are the candidates before
    them, or nobody.
    """
    m = max(1, n // 2) if rectangular else n
    leaves = [make_case("gaussian", m, 5, seed=seed + n)]
    constants: dict[str, Any] = {"teacher": make_case("gaussian", m, 4, seed=seed + n + 1)}
    generator = torch.Generator().manual_seed(seed + n)
    if rectangular:
        leaves.append(make_case("gaussian", n, 5, seed=seed + n + 2))
        constants["teacher_candidates"] = make_case("gaussian", n, 4, seed=seed + n + 3)
        constants["self_index"] = torch.arange(m) - 1  # -1: nobody; 0: the first
    if weighted:
        constants["anchor_weights"] = torch.rand(m, generator=generator, dtype=torch.float64)
        shape = (m, n) if by_anchor else (n,)
        constants["candidate_weights"] = torch.rand(shape, generator=generator, dtype=torch.float64)
    return leaves, constants


def compare(found: Found, truth: Found, tolerance: float = 1e-9) -> None:
    assert relative_error(found[0], truth[0], 0.1) <= tolerance
    for ours, theirs in zip(found[1], truth[1], strict=True):
        assert relative_error(ours, theirs, 0.1) <= tolerance


WEIGHTS = ("none", "of candidates", "of pairs")
LEVELS = (OBJECTIVES, METRICS, SCALES, (None, 0.3), (None, 0.2), (False, True), WEIGHTS)


@on_all_paths(
    "objective, metric, scale, soft, neighbourhood, rectangular, weights",
    covering(*LEVELS, strength=3),
    covering(*LEVELS),
)
def test_options(
    objective: str,
    metric: str,
    scale: str,
    soft: float | None,
    neighbourhood: float | None,
    rectangular: bool,
    weights: str,
    evaluate: Evaluate,
) -> None:
    """Any three, or two; features are of unlike scales, and so are the temperatures."""
    weighted = weights != "none"
    leaves, constants = problem(17, rectangular, weighted, by_anchor=weights == "of pairs")
    leaves = [7 * leaf for leaf in leaves]
    constants = {k: 0.2 * v if k.startswith("teacher") else v for k, v in constants.items()}
    temperatures = {"temperature": 0.1, "teacher_temperature": soft}
    if scale == "none" and metric != "cosine":
        far = {"euclidean": 1, "sqeuclidean": 2}[metric]
        temperatures = {
            "temperature": 0.3 * 7**far,
            "teacher_temperature": soft and soft * 0.2**far,
        }
    options = {"objective": objective, "metric": metric, "scale": scale, **temperatures}
    options["reduction"] = "none" if weighted else "sum"
    options["neighbourhood"] = neighbourhood
    compare(evaluate(leaves, constants, **options), reference(leaves, constants, **options))


@on_all_paths("metric", singles(METRICS), singles(["euclidean"]))
def test_near_pairs_pull_on_both_sides(metric: str, evaluate: Evaluate) -> None:
    """Of anchors and candidates given apart; a near pair's gradient leaves the products."""
    x, c = make_case("gaussian", 9, 4), make_case("gaussian", 35, 4, seed=1)
    c[5] = c[4]
    c[:4] = x[:4] + 1e-9
    constants = {"teacher": x.flip(1), "teacher_candidates": c.flip(1), "self_index": None}
    given = [x, c], constants
    compare(evaluate(*given, metric=metric), reference(*given, metric=metric))


@on_all_paths(
    "metric, rectangular",
    list(itertools.product(METRICS, (False, True))),
    [("cosine", True), ("cosine", False)],
)
def test_zero_vectors(metric: str, rectangular: bool, evaluate: Evaluate) -> None:
    """They have no direction: under cosine no gradient, wherever they stand."""
    leaves, constants = problem(18, rectangular, False)
    for points in leaves:
        points[[0, 3, 7]] = 0
        points[4] = -0.0
    # Not the teacher's: 1 - cos with a zero vector is 1 for all, and hard ranks order its rounding.
    options = {"metric": metric, "teacher_metric": "euclidean"}
    found = evaluate(leaves, constants, **options)
    compare(found, reference(leaves, constants, **options))
    if metric == "cosine":
        for gradient in found[1]:
            assert not gradient[[0, 3, 4, 7]].any()
            assert gradient[1].any()


@on_all_paths(
    "objective, reduction",
    list(itertools.product(OBJECTIVES, ("mean", "sum", "none"))),
    [("mse", "mean"), ("cross_entropy", "mean")],
)
def test_no_anchor_has_weight(objective: str, reduction: str, evaluate: Evaluate) -> None:
    leaves, constants = problem(17, False, False)
    constants["anchor_weights"] = torch.zeros(17, dtype=torch.float64)
    loss, (gradient,) = evaluate(leaves, constants, objective=objective, reduction=reduction)
    assert (loss == 0).all()
    assert (gradient == 0).all()


@on_all_paths("n, weighted", [(33, False), (33, True), (130, True)], [(33, True)])
def test_spearman_of_constant_ranks(n: int, weighted: bool, evaluate: Evaluate) -> None:
    """A collapsed student, and a collapsed teacher: 1, without gradient, in float32 too."""
    for dtype in (torch.float64, torch.float32):
        leaves, constants = problem(n, False, weighted)
        constants = {name: value.to(dtype) for name, value in constants.items()}
        for student, teacher in (
            (make_case("equal", n, 5, dtype=dtype), constants["teacher"]),
            (leaves[0].to(dtype), make_case("equal", n, 4, dtype=dtype)),
        ):
            given = constants | {"teacher": teacher}
            losses, (gradient,) = evaluate([student], given, objective="spearman", reduction="sum")
            total = n if not weighted else constants["anchor_weights"].sum()
            assert float(losses) == pytest.approx(float(total), rel=1e-6)
            assert not gradient.any()


UNITS = (2.0**-40, 2.0**40)


@on_all_paths(
    "objective, unit",
    list(itertools.product(OBJECTIVES, UNITS)),
    [("spearman", unit) for unit in UNITS],
)
def test_weights_have_no_unit(objective: str, unit: float, evaluate: Evaluate) -> None:
    """Also where ranks hardly differ, and spearman has to tell that from rounding."""
    leaves, constants = problem(17, False, True)
    options = {"objective": objective, "temperature": 1e9 if objective == "spearman" else 0.1}
    found = evaluate(leaves, constants, **options)
    scaled = {k: unit * v if k == "candidate_weights" else v for k, v in constants.items()}
    compare(evaluate(leaves, scaled, **options), found, 1e-12)
    # 1e-10 apart, ranks are rounded to 1e-16.
    compare(found, reference(leaves, constants, **options), 1e-5)


@on_all_paths(
    "metric, unit",
    [("euclidean", 1e10), ("euclidean", 1e15), ("cityblock", 1e18)],
    [("euclidean", 1e10)],
)
def test_large_weights_of_large_distances(metric: str, unit: float, evaluate: Evaluate) -> None:
    """Their product, which only the mean needs, is larger than any float32."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 9, 3, generator=generator)
    for leaf, other in ((student, unit * teacher), (unit * student, teacher)):
        given = {"teacher": other, "candidate_weights": torch.full((9,), 1e20)}
        found = evaluate([leaf], given, metric=metric)
        wide = {name: tensor.double() for name, tensor in given.items()}
        loss, (gradient,) = reference([leaf.double()], wide, metric=metric)
        assert relative_error(found[0], loss) < 5e-6
        assert relative_error(found[1][0], gradient) < 1e-4  # of one draw, nine points


BAD = (math.nan, math.inf, -math.inf)


@on_all_paths(
    "metric, objective, bad",
    covering(METRICS, OBJECTIVES, BAD),
    [("euclidean", "mse", math.nan)],
)
def test_what_is_not_finite_shows_where_it_is_seen(
    metric: str, objective: str, bad: float, evaluate: Evaluate
) -> None:
    """An anchor of NaN or inf is NaN, and changes no other's loss or gradient."""
    leaves, constants = problem(17, True, False)
    options = {"metric": metric, "objective": objective, "reduction": "none"}
    clean = evaluate(leaves, constants, **options)
    others = torch.arange(8) != 3
    for side, weight in (("student", 0.0), ("teacher", 1.0)):  # 0 marks padding, and hides nothing
        student, teacher = leaves[0].clone(), constants["teacher"].clone()
        (student if side == "student" else teacher)[3, 2] = bad
        weights = torch.ones(8, dtype=torch.float64)
        weights[3] = weight
        given = constants | {"teacher": teacher, "anchor_weights": weights}
        losses, (gradient, _) = evaluate([student, leaves[1]], given, **options)
        assert losses.isnan().tolist() == [i == 3 for i in range(8)]
        assert relative_error(losses[others], clean[0][others]) <= 1e-12
        assert relative_error(gradient[others], clean[1][0][others]) <= 1e-12
        assert gradient[3].isnan().all()


@on_all_paths(
    "objective, bad",
    list(itertools.product(OBJECTIVES, BAD)),
    [("cross_entropy", math.inf)],
)
def test_weights_do_not_hide_what_is_not_finite(
    objective: str, bad: float, evaluate: Evaluate
) -> None:
    """A candidate of NaN or inf makes every anchor NaN, also where it, or all, have weight 0."""
    leaves, constants = problem(17, True, False)
    options = {"objective": objective, "reduction": "none"}
    for side, weight, others in (
        ("student", 1.0, 1.0), ("student", 0.0, 1.0), ("student", 0.0, 0.0), ("teacher", 0.0, 0.0)
    ):  # fmt: skip
        candidates, theirs = leaves[1].clone(), constants["teacher_candidates"].clone()
        (candidates if side == "student" else theirs)[11, 2] = bad
        weights = torch.full((17,), others, dtype=torch.float64)
        weights[11] = weight
        given = constants | {"candidate_weights": weights, "teacher_candidates": theirs}
        losses, gradients = evaluate([leaves[0], candidates], given, **options)
        assert losses.isnan().all()
        assert all(gradient.isnan().any() for gradient in gradients)


@on_all_paths("objective", singles(OBJECTIVES), singles(["mse", "cross_entropy"]))
def test_range_that_overflows(objective: str, evaluate: Evaluate) -> None:
    """A callable metric may give distances whose difference float32 cannot hold."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.rand(2, 3, 40, generator=generator)
    teacher = (2 * teacher - 1) * 3e38
    points, others = torch.zeros(3, 1), torch.zeros(40, 1)

    def with_range(rows: Tensor, soft: float | None) -> Found:
        constants = {"teacher": points, "teacher_candidates": others, "self_index": None}
        to = {
            "metric": lambda a, b: 0 * (a + b.T) + student.to(a.device),
            "teacher_metric": lambda a, b: rows.to(a.device),
        }
        return evaluate(
            [points, others], constants, objective=objective, teacher_temperature=soft,
            scale="none", **to,
        )  # fmt: skip

    found, expected = (with_range(rows, None) for rows in (teacher, teacher / 1e30))
    assert found[0].isfinite()
    torch.testing.assert_close(found[0], expected[0])
    if objective == "cross_entropy":
        return  # a sum over all |z|, which float32 cannot tell from what the teacher takes off it
    # Neighbours are far more than a temperature apart: soft ranks are the order, too.
    torch.testing.assert_close(with_range(teacher, 0.1)[0], found[0], rtol=1e-4, atol=1e-4)


@on_all_paths("metric, rectangular", list(itertools.product(METRICS, (False, True))), [])
def test_points_that_nearly_coincide_pull_alike(
    metric: str, rectangular: bool, evaluate: Evaluate
) -> None:
    """On both sides, and without costing others their digits, however close they are."""
    x = make_case("gaussian", 21, 11)
    constants = {"teacher": make_case("gaussian", 21, 4, seed=1)}
    leaves = [x]
    for i, gap in enumerate((0.1, 1e-4, 1e-7, 1e-12)):
        x[9 + i] = x[i] + gap * x[i].flip(0)
    if rectangular:
        constants |= {"teacher_candidates": constants["teacher"][3:], "self_index": None}
        leaves = [x[:9], x[3:]]
        constants["teacher"] = constants["teacher"][:9]
    compare(evaluate(leaves, constants, metric=metric), reference(leaves, constants, metric=metric))


@on_all_paths(
    "metric",
    singles(["euclidean", "sqeuclidean", "cosine"]),
    singles(["euclidean", "sqeuclidean", "cosine"]),
)
def test_points_that_coincide_do_not_pull(metric: str, evaluate: Evaluate) -> None:
    """Nor take digits from those that nearly do: in a square V is largest where they meet."""
    group = torch.arange(24) % 3
    points = make_case("gaussian", 3, 11)[group]
    points = points + 1e-5 * make_case("gaussian", 6, 11, seed=2)[torch.arange(24) % 6]
    constants = {
        "teacher": make_case("gaussian", 24, 4, seed=1),
        "candidate_weights": (group[:, None] == group).to(points.dtype),
    }
    options = {"metric": metric, "objective": "mse"}
    compare(evaluate([points], constants, **options), reference([points], constants, **options))


@on_all_paths(
    "scale, rectangular, weighted",
    list(itertools.product(("anchor", "none"), (False, True), (False, True))),
    [("anchor", True, True)],
)
def test_distances_that_are_given(
    scale: str, rectangular: bool, weighted: bool, evaluate: Evaluate
) -> None:
    """By a metric whose gradient needs its distances again, as they were."""
    leaves, constants = problem(17, rectangular, weighted)
    options = {"metric": lambda a, b: torch.cdist(a, b), "scale": scale}
    compare(evaluate(leaves, constants, **options), reference(leaves, constants, **options))


@on_all_paths("weighted", singles([False, True]), singles([True]))
def test_a_mean_below_0_divides_nothing(weighted: bool, evaluate: Evaluate) -> None:
    """Nor does it pull: a callable metric may give similarities, or none at all."""
    leaves, constants = problem(17, True, weighted)
    for shift in (-9.0, 0.0):

        def metric(a: Tensor, b: Tensor, shift: float = shift) -> Tensor:
            return (a @ b.t() if shift else 0 * (a @ b.t())) + shift

        options = {"metric": metric, "teacher_metric": "euclidean"}
        found = evaluate(leaves, constants, **options)
        compare(found, reference(leaves, constants, scale="none", **options))


@on_all_paths("objective", singles(OBJECTIVES), singles(["mse", "cross_entropy"]))
def test_a_far_candidate_of_weight_0(objective: str, evaluate: Evaluate) -> None:
    """Its position may overflow, and nobody is compared with it."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.rand(2, 3, 40, generator=generator)
    weights = torch.ones(40)
    weights[7] = 0
    points, others = torch.zeros(3, 1), torch.zeros(40, 1)
    found = []
    for value in (0.5, 3e38):
        student[:, 7] = teacher[:, 7] = value
        constants = {"teacher": points, "teacher_candidates": others, "self_index": None}
        constants["candidate_weights"] = weights
        options = {
            "metric": lambda a, b: (0 * a + b.T) + student.to(a.device),
            "teacher_metric": lambda a, b: teacher.to(a.device),
            "objective": objective,
            "temperature": 1e-3,
            "teacher_temperature": 1e-3,
            "scale": "none",
        }
        found.append(evaluate([points, others], constants, **options))
    near, far = found
    compare(far, near, 2e-5)
    assert not far[1][1][7].any()


@on_all_paths("rectangular", singles([False, True]), singles([False]))
def test_l1_of_agreement(rectangular: bool, evaluate: Evaluate) -> None:
    """Ranks that differ by rounding agree, and have no slope."""
    for dtype in (torch.float32, torch.float64):
        leaves = [make_case("gaussian", 33, 5, dtype=dtype)]
        if rectangular:
            leaves.append(make_case("gaussian", 40, 5, dtype=dtype, seed=1))
        # Distances of the same points, whose features are summed in another order.
        constants: dict[str, Any] = {"teacher": leaves[0].flip(1)}
        if rectangular:
            constants["teacher_candidates"] = leaves[1].flip(1)
        options = {"objective": "l1", "temperature": 0.1, "teacher_temperature": 0.1}
        loss, gradients = evaluate(leaves, constants, **options)
        assert loss.abs() <= 1e-6
        assert not any(gradient.any() for gradient in gradients)


@on_all_paths(
    "objective, shift",
    list(itertools.product(OBJECTIVES, (1000.0, -1000.0))),
    [("mse", 1000.0), ("cross_entropy", -1000.0)],
)
def test_a_constant_added_to_distances(objective: str, shift: float, evaluate: Evaluate) -> None:
    """It changes nothing without a scale, and costs no digits that the distances still have."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randint(2048, (2, 3, 40), generator=generator) / 2048
    points, others = torch.zeros(3, 1), torch.zeros(40, 1)
    constants = {"teacher": points, "teacher_candidates": others, "self_index": None}
    near, far = (
        evaluate(
            [points, others],
            constants,
            objective=objective,
            metric=lambda a, b, by=by: (0 * a + b.T) + (student + by).to(a.device),
            teacher_metric=lambda a, b, by=by: (teacher + by).to(a.device),
            temperature=0.01,
            teacher_temperature=0.02,
            scale="none",
        )
        for by in (0.0, shift)
    )
    compare(far, near, 2e-5)


@on_all_paths("weighted", singles([False, True]), singles([False]))
def test_the_own_distance_is_not_hidden(weighted: bool, evaluate: Evaluate) -> None:
    """A metric that gives NaN from a point to itself gives NaN, although nobody ranks that."""
    leaves, constants = problem(17, False, weighted)
    points = leaves[0][:, :4]

    def metric(a: Tensor, b: Tensor) -> Tensor:
        distances = (a[:, None] - b[None]).abs().sum(2)
        return torch.where(distances == 0, torch.nan, distances)

    for given in ({"metric": metric, "teacher_metric": "euclidean"}, {"teacher_metric": metric}):
        losses, _ = evaluate([points], constants, reduction="none", **given)
        assert losses.isnan().all()


AGREEING = ("equal", "near", "unlike")


@on_all_paths(
    "student, soft, weighted, neighbourhood",
    covering(AGREEING, (False, True), (False, True), (None, 0.2)),
    [("near", False, True, 0.2), ("near", True, False, None)],
)
def test_the_value_of_cross_entropy_in_float32(
    student: str, soft: bool, weighted: bool, neighbourhood: float | None, evaluate: Evaluate
) -> None:
    """A small difference of large sums, near agreement more so; errors pooled over draws."""
    errors = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        y = make_case(("gaussian", "duplicates")[seed % 2], 33, 4, seed=seed).float()
        x = {
            "equal": y,
            "near": y + 0.01 * torch.randn(y.shape, generator=generator),
            "unlike": make_case("gaussian", 33, 4, seed=seed + 10).float(),
        }[student]
        options: dict[str, Any] = {"objective": "cross_entropy", "temperature": 0.01}
        options |= {"teacher_temperature": 0.01 if soft else None, "neighbourhood": neighbourhood}
        weights = torch.rand(33, generator=generator)
        given = {"teacher": y} | ({"candidate_weights": weights} if weighted else {})
        wide = {name: tensor.double() for name, tensor in given.items()}
        loss, (gradient,) = reference([x.double()], wide, **options)
        found = evaluate([x], given, **options), reference([x], given, **options)
        errors.append(
            [
                (relative_error(value, loss, 1e-2), relative_error(pulled, gradient, 0.1))
                for value, (pulled,) in found
            ]
        )
    ours, brute_force = torch.tensor(errors).square().mean(0).sqrt().tolist()
    for error, bar, brute in zip(ours, (5e-6, 2e-5), brute_force, strict=True):
        assert error <= max(bar, 2 * brute)


@on_all_paths("objective", singles(OBJECTIVES), singles(["cross_entropy", "spearman"]))
def test_no_loss_is_below_0(objective: str, evaluate: Evaluate) -> None:
    """Rounding alone would leave -5e-8 of two points, whose single candidates agree."""
    for n, seed in itertools.product((2, 3), range(3)):
        points = make_case("gaussian", n, 4, seed=seed).float()
        for temperature in (0.03, 10.0):
            options = {"objective": objective, "reduction": "none", "temperature": temperature}
            losses, _ = evaluate([points], {"teacher": points}, **options)
            assert (losses >= 0).all()
            if n == 2 and objective != "spearman":  # to which one rank is a constant
                assert (losses <= torch.finfo(torch.float32).eps).all()
