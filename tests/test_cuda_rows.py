"""The CUDA kernels, each alone: on a GPU, or where there is none on emulated thread blocks.

For the emulation their source is compiled for the host. Every emulated thread is a fiber that runs
from barrier to barrier; in which order they take turns is permuted by a seed, so that a missing
barrier, or a sum that depends on who comes first, shows as bits that depend on the seed. The
operators' glue and the Python pipeline are those of the GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulation import DEVICE, Emulate, counted
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
from benchmarks.kinds import GAUSSIAN, KINDS, draw
from pcoherence import perception_coherence_loss
from pcoherence.backends import clouds, cuda_kernels, pipeline, points
from pcoherence.backends.cuda_kernels import CudaRowKernels
from pcoherence.spec import METHODS, OBJECTIVES
from pcoherence.testing import CASES, make_case, relative_error, tolerances

Found = tuple[Tensor, Tensor]


def from_distances(
    student: Tensor, teacher: Tensor, backend: str = "cuda", **options: Any
) -> Found:
    """Loss and gradient w.r.t. distances [m, n], given as features whose metric is themselves."""
    n, to = student.shape[1], place(backend)
    leaf = student.detach().clone().to(to).requires_grad_()
    nothing = torch.zeros(n, n, dtype=student.dtype, device=to)
    loss = perception_coherence_loss(
        leaf,
        teacher.to(to),
        student_candidates=nothing,
        teacher_candidates=nothing,
        metric=lambda a, b: a,
        backend=backend,
        **moved(options, to),
    )
    return loss.detach().cpu(), torch.autograd.grad(loss, leaf)[0].cpu()


def from_features(student: Tensor, teacher: Tensor, backend: str = "cuda", **options: Any) -> Found:
    to = place(backend)
    leaf = student.detach().clone().to(to).requires_grad_()
    loss = perception_coherence_loss(leaf, teacher.to(to), backend=backend, **moved(options, to))
    return loss.detach().cpu(), torch.autograd.grad(loss, leaf)[0].cpu()


def place(backend: str) -> str:
    """The kernels' device, or the truth's."""
    return DEVICE if backend == "cuda" else "cpu"


def moved(options: dict[str, Any], to: str) -> dict[str, Any]:
    return {
        name: value.to(to) if isinstance(value, Tensor) else value
        for name, value in options.items()
    }


def in_double(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }


def check(
    evaluate: Callable[..., Found],
    student: Tensor,
    teacher: Tensor,
    methods: tuple[str, ...] = METHODS,
    **options: Any,
) -> None:
    """Every method against the float64 reference, within what the project promises."""
    truth = evaluate(student.double(), teacher.double(), "reference", **in_double(options))
    # Losses and gradients of a few points may vanish: they are differences of ranks in (0, 1).
    floors = 0.1, 1e-3 if student.shape[0] > 33 else 0.1
    brute = evaluate(student, teacher, "reference", **options)

    def errors(found: Found) -> tuple[float, float]:
        loss, gradient = map(relative_error, found, truth, floors)
        return loss, gradient

    allowed = tolerances(student.dtype, errors(brute))
    for method in methods:
        found = errors(evaluate(student, teacher, method=method, **options))
        assert found[0] <= allowed[0], f"{method}: loss errs by {found[0]:.1e} > {allowed[0]:.1e}"
        assert found[1] <= allowed[1], f"{method}: gradient {found[1]:.1e} > {allowed[1]:.1e}"


def rows(n: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Distances of two anchors [2, n]: some of the teacher's tie."""
    generator = torch.Generator().manual_seed(n + seed)
    student = torch.rand(2, n, generator=generator, dtype=torch.float64)
    teacher = torch.rand(2, n, generator=generator, dtype=torch.float64)
    teacher[1] = (teacher[1] * 8).round() / 8
    return student.to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("teacher_temperature", [None, 0.2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows(
    objective: str, teacher_temperature: float | None, dtype: torch.dtype, emulate: Emulate
) -> None:
    emulate(threads=64, seed=1)
    for n, scale in ((2, "anchor"), (3, "none"), (17, "anchor"), (33, "none"), (130, "anchor")):
        if n == 130 and dtype == torch.float64:
            continue  # test_long_rows has some
        check(
            from_distances,
            *rows(n, dtype),
            objective=objective,
            scale=scale,
            teacher_temperature=teacher_temperature,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [513, 1030])
def test_long_rows(n: int, dtype: torch.dtype, emulate: Emulate) -> None:
    emulate(threads=128, seed=2)
    for objective in ("mse", "cross_entropy"):
        check(from_distances, *rows(n, dtype), objective=objective, temperature=0.02)


# 1e-4: hundreds of bins or none at all; 10: a single bin.
@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 1e-2, 1.0, 10.0])
def test_temperatures(temperature: float, emulate: Emulate) -> None:
    emulate(threads=96, seed=3)
    for objective, n in (("mse", 200), ("cross_entropy", 130)):
        check(
            from_distances,
            *rows(n, torch.float32),
            objective=objective,
            temperature=temperature,
        )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights(objective: str, emulate: Emulate) -> None:
    emulate(threads=64, seed=4)
    student, teacher = rows(70, torch.float32)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(70, generator=generator) < 0.6
    for weights in (kept * 0.7, kept * torch.rand(70, generator=generator)):
        check(
            from_distances,
            student,
            teacher,
            objective=objective,
            candidate_weights=weights,
            self_index=torch.tensor([3, -1]),
        )


@pytest.mark.parametrize("case", ["equal", "outlier", "duplicates", "crowded"])
def test_hostile_rows(case: str, emulate: Emulate) -> None:
    emulate(threads=64, seed=5)
    student, teacher = rows(130, torch.float32)
    if case == "equal":
        student[0], teacher[0] = 0.7, 0.3
    elif case == "outlier":
        student[:, 7], teacher[:, 9] = 1e4, 1e4
    elif case == "duplicates":
        student[:, 65:], teacher[:, 65:] = student[:, :65], teacher[:, :65]
    else:
        teacher = teacher.pow(40)
    for objective in ("mse", "spearman", "cross_entropy"):
        check(from_distances, student, teacher, objective=objective)


TEMPERATURE = 0.01
"""Of rows whose bins are known, at scale "none"."""


def in_bins(places: Tensor, dtype: torch.dtype) -> Tensor:
    """Distances [2, n] with these whole numbers of bins [2, n] between them, some within a bin."""
    generator = torch.Generator().manual_seed(places.shape[1])
    within = torch.rand(places.shape, generator=generator, dtype=torch.float64)
    return ((places + 0.05 + 0.9 * within) * 1.5 * TEMPERATURE).to(dtype)


# Elements that no warp's share divides, and fewer than a warp has lanes.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [5, 64, 333])
@pytest.mark.parametrize(
    "case", ["one bin", "a bin each", "all but one", "empty bins", "at cuts", "crowded"]
)
def test_elements_in_the_order_of_their_bins(
    case: str, n: int, dtype: torch.dtype, emulate: Emulate
) -> None:
    first = torch.arange(n)
    places = {
        "one bin": torch.zeros(n),
        "a bin each": (7 * first) % n if n % 7 else first,
        "all but one": 40.0 * (first == n // 2),
        "empty bins": 9 * (first % 5),
        "at cuts": first // 64,  # where a bin begins, order is cut
        "crowded": (first % 40).clamp(max=3) + 3 * (first == 4),  # bins that are cut, and few
    }[case]
    student = in_bins(torch.stack([places, places.flip(0)]), dtype)
    teacher = rows(n, dtype)[1]
    options = {"scale": "none", "temperature": TEMPERATURE, "methods": ("grid",)}
    weights = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=dtype)
    weights[1::3] = 0
    # In fast memory; the grid alone; neither.
    for shared in (0, 4096 + 3 * n * student.element_size(), 4096 + 256):
        emulate(threads=96, shared=shared, seed=19)
        for w in (None, weights):
            check(from_distances, student, teacher, candidate_weights=w, **options)


# What 16 bits number, and just not.
@pytest.mark.parametrize("n", [65536, 65600])
def test_order_of_very_long_rows(n: int, emulate: Emulate) -> None:
    emulate(threads=128)
    generator = torch.Generator().manual_seed(n)
    levels, temperature = 60, 0.5  # 80 bins
    chosen = torch.randint(levels, (n,), generator=generator).double()
    weights = torch.rand(n, generator=generator)
    upstream = torch.rand(n, generator=generator)

    def weighed(w: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
        """sum_k w_k kernel(s_j - s_k), of as many terms as there are levels."""
        mass = torch.zeros(levels, dtype=torch.float64).index_add(0, chosen.long(), w.double())
        at = torch.arange(levels, dtype=torch.float64)
        return (kernel((at[:, None] - at) / temperature) @ mass)[chosen.long()]

    values = chosen.float()[None].to(DEVICE).requires_grad_()
    found = pcoherence.soft_rank(
        values, temperature, weights=weights.to(DEVICE), backend="cuda", method="grid"
    )
    (pulled,) = torch.autograd.grad(found, values, upstream[None].to(DEVICE))
    truth = weighed(weights, torch.sigmoid) + 0.5
    assert relative_error(found[0].cpu(), truth) <= tolerances(torch.float32, (0.0, 0.0))[0]

    def slope(t: Tensor) -> Tensor:
        return torch.sigmoid(t) * torch.sigmoid(-t) / temperature

    expected = upstream * weighed(weights, slope) - weights * weighed(upstream, slope)
    assert relative_error(pulled[0].cpu(), expected) <= tolerances(torch.float32, (0.0, 0.0))[1]


def of_kind(kind: str, n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Distances from two points of a kind to n others, student's and teacher's."""
    student, teacher = (draw(kind, n + 2, d, seed) for d, seed in ((16, 0), (24, 1)))
    return tuple(torch.cdist(points[:2], points[2:]).to(dtype) for points in (student, teacher))


def any_weights(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """From 1 to 1e-6, a tenth of them 0."""
    generator = torch.Generator().manual_seed(n)
    exponents, kept = torch.rand(2, n, generator=generator, dtype=dtype)
    return torch.where(kept > 0.1, 10 ** (-6 * exponents), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_data(kind: str, dtype: torch.dtype, emulate: Emulate) -> None:
    emulate(threads=96, seed=15)
    student, teacher = of_kind(kind, 1000, dtype)
    weights = any_weights(1000, dtype)
    for objective in ("mse", "cross_entropy"):
        check(from_distances, student, teacher, methods=("auto", "grid"), objective=objective)
    check(from_distances, student, teacher, methods=("auto",), candidate_weights=weights)
    # All of it in global memory; values ordered a window at a time, and with their weights.
    for shared in (4096 + 3000, 4096 + 9000, 4096 + 12000):
        emulate(threads=96, seed=16, shared=shared)
        for weighted in (None, weights):
            check(
                from_distances,
                student,
                teacher,
                methods=("auto",),
                self_index=torch.tensor([5, 7]),
                candidate_weights=weighted,
            )


# Shares of candidates by which ranks in a neighbourhood are sums without a table, and just not.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "share"), [(40, 0.799), (40, 0.801), (257, 1.0), (600, 0.1)])
def test_neighbourhoods(n: int, share: float, dtype: torch.dtype, emulate: Emulate) -> None:
    emulate(threads=64, seed=18)
    student, teacher = rows(n, dtype)
    student[0, 3], teacher[0, 3], teacher[0, 5] = 0.5, 0.25, 0.25  # a single tie
    check(from_distances, student, teacher, methods=("grid",), neighbourhood=share)


def check_places(student: Tensor, teacher: Tensor, weights: Tensor | None, **options: Any) -> None:
    """With ranks in T, and in float64."""
    for objective in ("mse", "cross_entropy"):
        given = {"objective": objective, "candidate_weights": weights, **options}
        check(from_distances, student, teacher, methods=("auto",), **given)


@pytest.mark.parametrize("share", [1e-6, 1e-12, 1e-20])
def test_neighbourhoods_smaller_than_weights_tell_apart(share: float, emulate: Emulate) -> None:
    """Ranks under one weight of 1e20 and ones, which are a small part of it."""
    emulate(threads=96, seed=21)
    student, teacher = rows(300, torch.float64)
    weights = torch.where(torch.arange(300) == teacher[0].argmax(), 1e20, 1.0)
    options = {"neighbourhood": share, "candidate_weights": weights.double()}
    check(from_distances, student[:1], teacher[:1], methods=("auto",), objective="mse", **options)


# At one place: one; few; as many as a byte counts; more.
@pytest.mark.parametrize("tied", [1, 4, 255, 256])
# Memory for all places; for some, a window at a time; for none.
@pytest.mark.parametrize("shared", [0, 4096 + 2300, 4096 + 64])
def test_places_in_a_neighbourhood(tied: int, shared: int, emulate: Emulate) -> None:
    emulate(threads=96, seed=20, shared=shared)
    student, teacher = rows(700, torch.float32)
    teacher[:, 2 : 2 + tied] = 0.5
    teacher[1, -9:] = teacher[1, -10]
    # Equal ones make tied pairs no whole number; or some are left out.
    given = torch.full((700,), 0.3), 0.3 * (torch.arange(700) % 7 > 0)
    selves = None, torch.tensor([3, 699])
    for weights, own in ((None, None), *zip(given, selves, strict=True)):
        check_places(student, teacher, weights, self_index=own)


# 40, 200: in a crowded bucket, which is ordered by itself; 600: more than a counter holds.
@pytest.mark.parametrize("ties", [40, 200, 600])
def test_buckets_that_overflow(ties: int, emulate: Emulate) -> None:
    emulate(threads=96, seed=17)
    student, teacher = rows(700, torch.float32)
    teacher[:, :ties] = 0.5
    teacher[1, : ties // 2] = 0.5 + 2**-24  # neighbours of a bucket
    for weights in (None, any_weights(700)):
        check_places(student, teacher, weights)


@pytest.mark.parametrize("weights", [None, any_weights(700)], ids=["equal", "weights"])
def test_a_crowded_bucket_of_different_values(weights: Tensor | None, emulate: Emulate) -> None:
    """20 in one bucket, too few for the sample to see."""
    emulate(threads=96, seed=19)
    student, teacher = rows(700, torch.float32)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    teacher[:, :20] = 0.5 + order * 2.0**-22
    check_places(student, teacher, weights)


def test_weights_whose_sum_has_no_inverse(emulate: Emulate) -> None:
    emulate(threads=96)
    student, teacher = rows(300, torch.float64)
    weights = any_weights(300, torch.float64)
    for objective in ("mse", "spearman"):
        options = {"objective": objective, "temperature": 0.1}
        expected = from_distances(student, teacher, candidate_weights=weights, **options)
        found = from_distances(student, teacher, candidate_weights=weights * 2.0**-980, **options)
        torch.testing.assert_close(found, expected)


def barriers_passed(kind: str, weights: Tensor | None) -> int:
    before = counted("barriers")
    from_distances(*of_kind(kind, 2000), candidate_weights=weights)
    return counted("barriers") - before


@pytest.mark.skipif(DEVICE == "cuda", reason="barriers are counted by the emulation")
@pytest.mark.parametrize("weights", [None, any_weights(2000)], ids=["equal", "weights"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != GAUSSIAN])
def test_kinds_of_data_take_the_same_path(
    kind: str, weights: Tensor | None, emulate: Emulate
) -> None:
    """Neither sort nor scan, which pass ten times as many barriers as buckets and grid."""
    emulate(threads=256)
    assert barriers_passed(kind, weights) <= 1.3 * barriers_passed(GAUSSIAN, weights)


@pytest.mark.skipif(DEVICE == "cuda", reason="barriers are counted by the emulation")
def test_weights_take_the_same_path(emulate: Emulate) -> None:
    """A few sums more; the sort would pass three times as many barriers."""
    emulate(threads=256)
    assert barriers_passed(GAUSSIAN, any_weights(2000)) <= 1.5 * barriers_passed(GAUSSIAN, None)


@pytest.mark.skipif(DEVICE == "cuda", reason="barriers are counted by the emulation")
def test_the_farthest_point_takes_the_same_path(emulate: Emulate) -> None:
    """More bins than an explicit grid may have, if nearly all of them are empty."""
    emulate(threads=128)
    student, teacher = rows(1000, torch.float32)
    passed = []
    for bins in (1_000, 200_000):
        student[:, 7] = bins * 1.5 * TEMPERATURE
        before = counted("barriers")
        options = {"scale": "none", "temperature": TEMPERATURE}
        from_distances(student, teacher, **options)
        passed.append(counted("barriers") - before)
        check(from_distances, student, teacher, methods=("auto",), **options)
    assert passed[1] <= 1.3 * passed[0]


@pytest.mark.skipif(DEVICE == "cuda", reason="the emulation counts what goes to global memory")
@pytest.mark.parametrize("weights", [None, any_weights(2000)], ids=["equal", "weights"])
@pytest.mark.parametrize("objective", ["mse", "cross_entropy"])
@pytest.mark.parametrize("kind", [GAUSSIAN, "outlier"])
def test_what_is_accessed_at_random_stays_in_fast_memory(
    kind: str, objective: str, weights: Tensor | None, emulate: Emulate
) -> None:
    """Of a row as long for this memory as 65,536 elements are for 227 KiB: neither fits."""
    emulate(threads=128, shared=4096 + 2000 * 7 // 2 + 4200)
    before = counted("slow_atomics")
    from_distances(*of_kind(kind, 2000), objective=objective, candidate_weights=weights)
    assert counted("slow_atomics") == before


def test_range_that_overflows(emulate: Emulate) -> None:
    """A callable metric may give distances whose difference float32 cannot hold."""
    emulate(threads=64)
    student, teacher = rows(40, torch.float32)
    teacher = (2 * teacher - 1) * 3e38
    expected = from_distances(student, teacher / 1e30)
    torch.testing.assert_close(from_distances(student, teacher), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_row(bad: float, emulate: Emulate) -> None:
    emulate(threads=64)
    student, teacher = rows(40, torch.float32)
    student[0, 5] = bad
    for method in METHODS:
        loss, gradient = from_distances(student, teacher, method=method)
        assert loss.isnan()
        assert gradient[0].isnan().all()
        assert gradient[1].isfinite().all()
    weights = torch.zeros(40)
    loss, gradient = from_distances(*rows(40, torch.float32), candidate_weights=weights)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS[1:])
def test_results_repeat_bit_for_bit(method: str, dtype: torch.dtype, emulate: Emulate) -> None:
    student, teacher = rows(300, dtype)
    weights = torch.rand(300, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for objective, weighted in (("mse", None), ("spearman", weights), ("cross_entropy", weights)):
        options = {"objective": objective, "method": method, "candidate_weights": weighted}
        options["temperature"] = 0.01  # 67 bins
        emulate(threads=128)
        expected = from_distances(student, teacher, **options)
        # Turns in another order; and all rows, buckets and bins in global memory.
        for seed, shared in ((1, 0), (2, 0), (0, 4096 + 256), (3, 4096 + 3000)):
            emulate(threads=128, seed=seed, shared=shared)
            found = from_distances(student, teacher, **options)
            assert all(map(torch.equal, found, expected)), (objective, seed, shared)


@pytest.mark.parametrize("path", ["distances", "small", "blocks"])
def test_grid_with_too_many_bins_raises(
    path: str, emulate: Emulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(threads=64)
    if path == "blocks":
        by_products(monkeypatch, False)
    given = rows(17, torch.float64)
    evaluate = from_distances
    if path != "distances":
        evaluate, given = from_features, (make_case("gaussian", 17, 3), make_case("lattice", 17, 3))
    with pytest.raises(RuntimeError, match=r"^method: 'grid' would need more than 65536 bins"):
        evaluate(*given, temperature=1e-9, method="grid")
    assert evaluate(*given, temperature=1e-9)[0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_soft_rank(method: str, dtype: torch.dtype, emulate: Emulate) -> None:
    emulate(threads=64, seed=6)
    for n in (1, 2, 33, 130):
        values = rows(n, dtype)[0].requires_grad_()
        for weights in (None, torch.rand(n, dtype=dtype), torch.rand(2, n, dtype=dtype)):
            upstream = torch.randn(2, n, dtype=dtype)
            found, truth = (
                pcoherence.soft_rank(
                    v.to(place(b)),
                    0.05,
                    weights=None if w is None else w.to(place(b)),
                    backend=b,
                    method=m,
                ).cpu()
                for v, w, b, m in (
                    (values, weights, "cuda", method),
                    (values.double(), None if weights is None else weights.double(),
                     "reference", "auto"),
                )
            )  # fmt: skip
            assert relative_error(found, truth) <= tolerances(dtype, (0.0, 0.0))[0]
            (ours,) = torch.autograd.grad(found, values, upstream)
            (theirs,) = torch.autograd.grad(truth, values, upstream.double())
            assert relative_error(ours, theirs, 1.0) <= tolerances(dtype, (0.0, 0.0))[1]


@pytest.mark.parametrize("method", METHODS)
def test_soft_rank_of_nan(method: str, emulate: Emulate) -> None:
    """Its row has no ranks and no gradient; others do."""
    emulate(threads=64, seed=6)
    values = rows(33, torch.float32)[0].to(DEVICE)
    values[1, 5] = torch.nan
    leaf = values.requires_grad_()
    ranks = pcoherence.soft_rank(leaf, 0.05, backend="cuda", method=method)
    upstream = torch.arange(33.0, device=DEVICE).expand(2, 33)
    for found in (ranks, torch.autograd.grad(ranks, leaf, upstream)[0]):
        assert found.isnan().sum(1).tolist() == [0, 33]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("method", ["auto", "scan", "pairs"])
def test_soft_rank_beside_masks(method: str, mask: str, emulate: Emulate) -> None:
    emulate(threads=64, seed=6)
    for n, dtype in itertools.product((2, 33), (torch.float32, torch.float64)):
        check_masked("cuda", method, mask, n, dtype, DEVICE)


def by_products(monkeypatch: pytest.MonkeyPatch, symmetric: bool) -> None:
    """Even small batches, in blocks of 7 anchors; or with all distances at a time, mirrored."""
    monkeypatch.setattr(cuda_kernels, "SMALL_CANDIDATES", 0)
    monkeypatch.setattr(pipeline, "BLOCK_BYTES", 1)
    monkeypatch.setattr(pipeline, "MIN_ROWS", 7)
    monkeypatch.setattr(clouds, "MIRRORED_ROWS", 9)
    monkeypatch.setattr(clouds, "MIRRORED_WIDTH", 20)  # the teacher's, not the student's
    if not symmetric:
        monkeypatch.setattr(clouds, "SYMMETRIC_BYTES", 0)


@pytest.mark.parametrize("path", ["small", "blocks", "symmetric"])
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_features(
    metric: str, path: str, emulate: Emulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(threads=64, seed=7)
    if path != "small":
        by_products(monkeypatch, path == "symmetric")
    for case, scale in zip(CASES, itertools.cycle(("anchor", "none")), strict=False):
        if (case, metric) == ("lattice", "cosine"):
            continue  # directions are on no lattice: in float32 and float64 other distances tie
        student = make_case(case, 37, 5, dtype=torch.float32)
        # With seed 1, two of the clustered teacher's distances are equal once they are rounded.
        teacher = make_case(case, 37, 40, dtype=torch.float32, seed=2)
        options = {"metric": metric, "scale": scale}
        if scale == "none":
            options["temperature"] = 1.0
        check(from_features, student, teacher, methods=("auto",), **options)


@pytest.mark.parametrize("path", ["small", "blocks"])
def test_candidates(path: str, emulate: Emulate, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(threads=64, seed=8)
    if path != "small":
        by_products(monkeypatch, False)
    x, c = make_case("gaussian", 9, 4), make_case("gaussian", 35, 4, seed=1)
    c[5] = c[4]
    c[:4] = x[:4] + 1e-9  # near pairs
    for metric in ("euclidean", "cosine"):
        found, truth = [], []
        for backend, to in (("cuda", found), ("reference", truth)):
            leaves = [given.clone().to(place(backend)).requires_grad_() for given in (x, c)]
            loss = perception_coherence_loss(
                leaves[0],
                x.flip(1).to(place(backend)),
                student_candidates=leaves[1],
                teacher_candidates=c.flip(1).to(place(backend)),
                self_index=None,
                metric=metric,
                backend=backend,
            )
            to += [loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, leaves))]
        for ours, theirs in zip(found, truth, strict=True):
            assert relative_error(ours, theirs) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_directions_tie(dtype: torch.dtype, emulate: Emulate) -> None:
    """Whatever their lengths: hard ranks of the teacher must not order roundings."""
    emulate(threads=64, seed=9)
    directions = make_case("gaussian", 9, 5, dtype=dtype, seed=2)
    teacher = torch.cat([directions, directions * 2.0**40, directions / 1024, directions])
    student = make_case("gaussian", 36, 4, dtype=dtype)
    check(from_features, student, teacher, metric="euclidean", teacher_metric="cosine")
    check(from_features, teacher, student, metric="cosine", teacher_metric="euclidean")
    # Of whole lengths, by which all of them can be divided exactly.
    whole = torch.tensor([[1, 2, 2], [2, -1, 2], [2, 3, 6], [1, 4, 8], [4, -4, 7], [2, 6, 9]])
    teacher = torch.cat([whole * factor for factor in (1, 3, 5, 7, 11, 13)]).to(dtype)
    check(from_features, student, teacher, metric="euclidean", teacher_metric="cosine")


@pytest.mark.parametrize(("n", "width"), [(13, 2), (70, 8), (100, 3), (300, 5)])
def test_products_above_the_diagonal(n: int, width: int, emulate: Emulate) -> None:
    emulate(seed=15)
    check_upper(CudaRowKernels(), n, width, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 16, 31, 33, 64, 100])
def test_add_transpose(n: int, dtype: torch.dtype, emulate: Emulate) -> None:
    emulate(seed=10)
    check_transpose_added(CudaRowKernels(), make_case("gaussian", n, n, dtype=dtype).to(DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("case", POINTS)
def test_points_are_prepared_as_by_torch(
    case: str, metric: str, dtype: torch.dtype, emulate: Emulate
) -> None:
    emulate(seed=11)
    given = points_with(case, dtype).to(DEVICE)
    for anchors, candidates in ((given, None), (given[:9], given)):
        check_prepared(CudaRowKernels(), anchors, candidates, metric)


def test_points_that_a_sample_does_not_tell_apart(emulate: Emulate) -> None:
    emulate(seed=12)
    check_sample_of_one(CudaRowKernels(), DEVICE)


# More columns than a block takes, and than a warp has words for; more features than threads.
@pytest.mark.parametrize(("n", "width"), [(40, 3), (2100, 130)])
def test_near_pairs(n: int, width: int, emulate: Emulate) -> None:
    emulate(seed=13)
    check_near_pairs(CudaRowKernels(), n, width, DEVICE)


def test_points_that_differ_late(emulate: Emulate) -> None:
    """In features that other lanes, or a lane later, compare: many share a slot."""
    emulate(seed=14)
    for width in (20, 40, 70):
        given = make_case("gaussian", 200, width)
        given[:, : width - 4] = given[0, : width - 4]
        check_prepared(CudaRowKernels(), given.to(DEVICE), None, "euclidean")


def test_many_identical_points_share_the_first(emulate: Emulate) -> None:
    """Whoever comes first: all probe the same slots."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(5, (300,), generator=generator)
    given = make_case("gaussian", 5, 3, dtype=torch.float32)[kinds].to(DEVICE)
    for seed in (0, 1, 2):
        emulate(seed=seed)
        network = points.Network(given, None, points.TRAITS["euclidean"])
        (found,) = CudaRowKernels().prepare([network])
        first = torch.tensor([kinds.tolist().index(kind) for kind in kinds.tolist()])
        assert torch.equal(found.first.cpu(), first)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_more_anchors_than_fast_memory_holds(metric: str, emulate: Emulate) -> None:
    """A small gradient sums over anchors in parts of 512 (float64): nobody may run ahead."""
    m = 700
    x, c = make_case("gaussian", m, 3), make_case("gaussian", 5, 3, seed=1)

    def computed(backend: str, device: str) -> list[Tensor]:
        leaves = [given.to(device).requires_grad_() for given in (x.clone(), c.clone())]
        loss = perception_coherence_loss(
            leaves[0],
            x.flip(1).to(device),
            student_candidates=leaves[1],
            teacher_candidates=c.flip(1).to(device),
            metric=metric,
            backend=backend,
        )
        return [loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, leaves))]

    found = []
    for seed in (0, 1, 2):
        emulate(threads=64, seed=seed)
        found.append(computed("cuda", DEVICE))
    assert all(
        torch.equal(*pair) for again in found[1:] for pair in zip(found[0], again, strict=True)
    )
    for ours, theirs in zip(found[0], computed("reference", "cpu"), strict=True):
        assert relative_error(ours, theirs) <= 1e-9


def test_small_batches_take_two_launches(emulate: Emulate, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate()
    x, y = make_case("gaussian", 20, 4), make_case("gaussian", 20, 6, seed=1)
    called = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(kernels, name)

    kernels = torch.ops.pcoherence_cuda
    from_features(x, y)
    monkeypatch.setattr(torch.ops, "pcoherence_cuda", Recorder())
    from_features(x, y)
    assert called == ["small_rows", "small_gradient"]
