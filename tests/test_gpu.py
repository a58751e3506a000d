"""The GPU backends on a GPU: options, dtypes, odd sizes, streams, graphs, repeatability.

Skipped where there is no GPU: there the same kernels are tested in Triton's interpreter
(test_triton.py) and with emulated thread blocks (test_cuda_rows.py). PCOHERENCE_REHEARSAL=1 runs
them with the CPU backend in the GPU's place, which tests the tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from soft_rank_cases import MASKS, check_masked
from torch import Tensor
from torch.autograd import gradcheck

import pcoherence
from benchmarks.gpu import device
from pcoherence.backends import clouds, pipeline
from pcoherence.spec import METRICS, OBJECTIVES, SCALES
from pcoherence.testing import (
    CASES,
    make_case,
    reference_value_and_grad,
    relative_error,
    tolerances,
    truth,
)

if not device.present():
    pytest.skip("no CUDA device", allow_module_level=True)

DEVICE = device.DEVICE
BACKENDS = tuple(device.BACKENDS)
METHODS_OF = [(backend, method) for backend, names in device.BACKENDS.items() for method in names]
SIZES = (3, 33, 513, 1031, 2059, 8192)
"""Odd, but for one that divides by all tiles; of one thread block, of several, of many."""
ALL_SOFT = 2059
"""Points up to which soft teachers are checked, too."""
LOSS_FLOOR, GRADIENT_FLOOR = 0.1, 0.1
"""What losses of a few points and gradients that vanish are held to; see relative_error.

Terms of the gradient are of the size 1 / temperature, 0.1 is a hundredth of that or less.
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_is_there(backend: str) -> None:
    assert pcoherence.available_backends()[backend] is None


def evaluate(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient on the GPU, given tensors of the CPU."""
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    leaf = student.detach().to(DEVICE).requires_grad_()
    loss = pcoherence.perception_coherence_loss(leaf, teacher.to(DEVICE), **moved)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach().cpu(), gradient.cpu()


def check(
    student: Tensor,
    teacher: Tensor,
    backend: str,
    methods: Sequence[str] = ("auto",),
    **options: Any,
) -> None:
    """Against the float64 truth, with twice what brute force in the same dtype errs by."""
    # The same points in float64, whatever they are rounded to: the same truth.
    exact = student.double(), teacher.double()
    right = truth(*exact, dtype=torch.float64, **options)
    rough = errors(truth(*exact, dtype=student.dtype, **options), right)
    limits = tolerances(student.dtype, rough)
    for method in methods:
        found = errors(evaluate(student, teacher, backend=backend, method=method, **options), right)
        for what, error, limit in zip(("loss", "gradient"), found, limits, strict=True):
            assert error <= limit, f"{method} {what}: {error:.2e} > {limit:.2e}"


def errors(found: Sequence[Tensor], truth: Sequence[Tensor]) -> tuple[float, float]:
    loss, gradient = (
        relative_error(*pair)
        for pair in zip(found, truth, (LOSS_FLOOR, GRADIENT_FLOOR), strict=True)
    )
    return loss, gradient


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("backend", "method"), METHODS_OF)
def test_values(backend: str, method: str, n: int, dtype: torch.dtype, objective: str) -> None:
    """Value and gradient; the same points in both dtypes, so that one truth serves both."""
    student = make_case("gaussian", n, 9, dtype=torch.float32, seed=n).to(dtype)
    teacher = make_case("gaussian", n, 13, dtype=torch.float32, seed=n + 1).to(dtype)
    for soft in (None, 0.2) if n <= ALL_SOFT else (None,):
        check(student, teacher, backend, [method], objective=objective, teacher_temperature=soft)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_scales_and_weights(
    backend: str, scale: str, metric: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    # A lattice ties; under cosine its directions round, in whatever order a backend divides.
    case = "gaussian" if metric == "cosine" else "lattice"
    student, teacher = make_case("gaussian", 37, 5, dtype=dtype), make_case(case, 37, 7, seed=1)
    weights = torch.randint(3, (37,), generator=generator).to(dtype)
    for n, options in (
        (37, {"anchor_weights": weights, "candidate_weights": weights.flip(0)}),
        (37, {"self_index": None}),
    ):
        check(
            student[:n],
            teacher[:n].to(dtype),
            backend,
            metric=metric,
            scale=scale,
            temperature=0.3 if scale != "none" else 1.0,
            **options,
        )


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 0.1, 10.0])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hostile_points(backend: str, case: str, temperature: float) -> None:
    for n in (130, 700):  # the small path of CUDA, and the large
        student = make_case(case, n, 24, dtype=torch.float32, seed=1)
        teacher = make_case("gaussian", n, 16, dtype=torch.float32, seed=2)
        anchors = torch.zeros(n)
        anchors[:: n // 5] = 1.0
        check(student, teacher, backend, temperature=temperature, anchor_weights=anchors)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o != "l1"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, objective: str, scale: str) -> None:
    student = make_case("gaussian", 7, 3).to(DEVICE).requires_grad_()
    teacher = make_case("gaussian", 7, 4, seed=1).to(DEVICE)
    for method in device.BACKENDS[backend]:
        assert gradcheck(
            lambda x, method=method: pcoherence.perception_coherence_loss(
                x,
                teacher,
                objective=objective,
                scale=scale,
                method=method,
                backend=backend,
                temperature=0.3,
                reduction="none",
            ),
            student,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_rectangular_with_gradients_to_candidates(backend: str) -> None:
    student, teacher = make_case("gaussian", 21, 5), make_case("gaussian", 21, 6, seed=1)
    more = make_case("gaussian", 50, 5, seed=2), make_case("gaussian", 50, 6, seed=3)
    index = torch.randint(-1, 50, (21,), generator=torch.Generator().manual_seed(0))
    given = {"student_candidates": more[0], "teacher_candidates": more[1], "self_index": index}
    _, expected, expected_candidates = reference_value_and_grad(student, teacher, **given)
    leaves = [x.to(DEVICE).requires_grad_() for x in (student, more[0])]
    loss = pcoherence.perception_coherence_loss(
        leaves[0],
        teacher.to(DEVICE),
        student_candidates=leaves[1],
        teacher_candidates=more[1].to(DEVICE),
        self_index=index.to(DEVICE),
        backend=backend,
    )
    found = torch.autograd.grad(loss, leaves)
    assert relative_error(found[0].cpu(), expected) < 1e-9
    assert expected_candidates is not None
    assert relative_error(found[1].cpu(), expected_candidates) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_longer_than_shared_memory(backend: str) -> None:
    """A few anchors against 70,000 candidates, compared with the CPU backend in float64."""
    n, m = 70_001, 5
    student = make_case("gaussian", n, 8, dtype=torch.float32)
    teacher = make_case("gaussian", n, 9, dtype=torch.float32, seed=1)
    for temperature in (0.1, 1e-4):
        options = {"temperature": temperature, "self_index": torch.arange(m)}
        found = evaluate(
            student[:m],
            teacher[:m],
            student_candidates=student,
            teacher_candidates=teacher,
            backend=backend,
            **options,
        )
        leaf = student[:m].double().requires_grad_()
        loss = pcoherence.perception_coherence_loss(
            leaf,
            teacher[:m].double(),
            student_candidates=student.double(),
            teacher_candidates=teacher.double(),
            backend="cpu",
            **options,
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert relative_error(found[0], loss) < 5e-6
        # At 1e-4 near ties decide; float32 distances cannot do better than this.
        assert relative_error(found[1], gradient) < (2e-5 if temperature == 0.1 else 2e-2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_distances_held_at_once_or_in_blocks(
    backend: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More anchors than a block has, and than are mirrored at a time; some pairs are near."""
    monkeypatch.setattr(pipeline, "BLOCK_BYTES", 8 << 20)
    monkeypatch.setattr(clouds, "MIRRORED_WIDTH", 16)
    if not symmetric:
        monkeypatch.setattr(clouds, "SYMMETRIC_BYTES", 0)
    n = 2 * clouds.MIRRORED_ROWS + 11
    student = make_case("clustered", n, clouds.MIRRORED_WIDTH, dtype=torch.float32)
    teacher = make_case("gaussian", n, 33, dtype=torch.float32, seed=1)
    anchors = torch.zeros(n)
    anchors[:: n // 5] = 1.0
    for scale in SCALES:
        check(student, teacher, backend, scale=scale, temperature=0.5, anchor_weights=anchors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_stay_with_their_anchor(backend: str) -> None:
    for bad, n in itertools.product((float("nan"), float("inf")), (33, 700)):
        student, teacher = make_case("gaussian", n, 3), make_case("gaussian", n, 3, seed=1)
        student[4, 1] = bad
        loss, _ = evaluate(student, teacher, backend=backend)
        assert loss.isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_errs_at_most_twice_as_much_as_torch(
    backend: str, dtype: torch.dtype
) -> None:
    student = make_case("gaussian", 300, 64, dtype=dtype)
    teacher = make_case("gaussian", 300, 64, dtype=dtype, seed=1)
    _, truth, _ = reference_value_and_grad(student, teacher)

    def rounded(a: Tensor, b: Tensor) -> Tensor:
        """Distances as torch gives them in half precision."""
        return torch.cdist(a.float(), b.float()).to(dtype).float()

    leaf = student.clone().requires_grad_()
    torch_loss = pcoherence.perception_coherence_loss(leaf, teacher, metric=rounded, backend="cpu")
    (theirs,) = torch.autograd.grad(torch_loss, leaf)
    _, ours = evaluate(student, teacher, backend=backend)
    assert ours.dtype == dtype
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth)


def batch(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 48, device=DEVICE), torch.randn(n, 64, device=DEVICE)


def step(backend: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    loss = pcoherence.perception_coherence_loss(leaf, teacher, backend=backend)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("n", [100, 1500])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mode_repeats_bit_for_bit(backend: str, n: int) -> None:
    points = batch(n)
    first = step(backend, *points)
    for _ in range(10):
        assert all(map(torch.equal, first, step(backend, *points)))


@pytest.mark.parametrize("n", [100, 1500])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mode_another_stream(backend: str, n: int) -> None:
    """Work that is still under way on the stream is waited for, and only on that stream."""
    student, teacher = batch(n)
    expected = step(backend, student, teacher)
    with device.side_stream():
        size = 64 if device.REHEARSAL else 4096
        busy = torch.randn(size, size, device=DEVICE)
        for _ in range(20):
            busy = busy @ busy / 64
        late = student + 0 * busy[0, 0].nan_to_num()
        found = step(backend, late, teacher)
    device.synchronize()
    assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("n", [100, 1500])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mode_graph(backend: str, n: int) -> None:
    """Nothing synchronises, and a replay sees new inputs."""
    student, teacher = batch(n)
    replay, result = device.captured(lambda: step(backend, student, teacher))
    for _ in range(2):
        student.copy_(torch.randn_like(student))
        replay()
        device.synchronize()
        assert all(map(torch.equal, step(backend, student, teacher), result))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mode_graph_with_a_bank(backend: str) -> None:
    """Neither its use nor its filling reads a value."""
    bank = pcoherence.CandidateBank(50, student_width=8, teacher_width=6).to(DEVICE)
    criterion = pcoherence.PerceptionCoherenceLoss(bank=bank, backend=backend)
    student, teacher = torch.randn(20, 8, device=DEVICE), torch.randn(20, 6, device=DEVICE)
    replay, _ = device.captured(lambda: (criterion(student, teacher),))
    before = int(bank.pushed)
    for step_number in range(4):
        student.copy_(torch.full_like(student, float(step_number)))
        replay()
    assert int(bank.pushed) == before + 80
    assert len(bank) == 50
    assert sorted(bank.student[:, 0].tolist()) == [1.0] * 10 + [2.0] * 20 + [3.0] * 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_mode_compile_equals_eager(backend: str) -> None:
    student, teacher = batch(200)
    compiled = torch.compile(
        lambda x: pcoherence.perception_coherence_loss(x, teacher, backend=backend),
        fullgraph=True,
    )
    leaf = student.clone().requires_grad_()
    loss = compiled(leaf)
    loss.backward()
    expected = step(backend, student, teacher)
    assert torch.equal(loss, expected[0])
    assert torch.equal(leaf.grad, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_mode_tf32_changes_nothing(backend: str) -> None:
    points = batch(1500)
    expected = step(backend, *points)
    torch.set_float32_matmul_precision("high")
    try:
        assert all(map(torch.equal, expected, step(backend, *points)))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("backend", BACKENDS)
def test_mode_autocast_and_grad_scaler(backend: str) -> None:
    network = torch.nn.Linear(16, 8, device=DEVICE)
    images, target = torch.randn(64, 16, device=DEVICE), torch.randn(64, 12, device=DEVICE)
    scaler = torch.amp.GradScaler(DEVICE)
    criterion = pcoherence.PerceptionCoherenceLoss(backend=backend)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with torch.autocast(DEVICE, torch.float16):
        features = network(images)
        loss = criterion(features, target.to(features.dtype))
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(p.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_rank(backend: str) -> None:
    for n, temperature in itertools.product((2, 33, 1031, 40_001), (1e-3, 0.3, 30.0)):
        values = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
        weights = torch.rand(n)
        upstream = torch.randn(3, n)
        found = []
        for where, dtype, name in (
            ("cpu", torch.float64, "cpu"),
            (DEVICE, torch.float32, backend),
        ):
            leaf = values.to(where, dtype).requires_grad_()
            ranks = pcoherence.soft_rank(leaf, temperature, weights=weights.to(where), backend=name)
            gradient = torch.autograd.grad(ranks, leaf, upstream.to(where, dtype))[0]
            found.append((ranks.detach().cpu(), gradient.cpu()))
        assert relative_error(found[1][0], found[0][0]) < 1e-5
        assert relative_error(found[1][1], found[0][1]) < 1e-5


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_rank_beside_masks(backend: str, mask: str) -> None:
    for n, dtype in itertools.product((2, 33, 1031), (torch.float32, torch.float64)):
        check_masked(backend, "auto", mask, n, dtype, DEVICE)


@pytest.mark.parametrize("n", [33, 600, 3, 130])  # the most telling first
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_for_the_sanitizer(backend: str, n: int) -> None:
    """What `make gpu-check` runs under compute-sanitizer: every path once, odd and small."""
    for method, objective in itertools.product(device.BACKENDS[backend], ("mse", "cross_entropy")):
        student, teacher = torch.randn(n, 5), torch.randn(n, 6)
        loss, gradient = evaluate(
            student, teacher, method=method, objective=objective, backend=backend
        )
        assert loss.isfinite()
        assert gradient.isfinite().all()
