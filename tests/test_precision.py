"""Daily use in training: autocast, loss scaling, compiled steps, export, determinism."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pcoherence
from pcoherence import PerceptionCoherenceLoss, perception_coherence_loss
from pcoherence.spec import OBJECTIVES
from pcoherence.testing import make_case

HALVES = (torch.bfloat16, torch.float16)


def images(n: int = 40) -> tuple[Tensor, Tensor]:
    shapes = ((n, 12, 1), (n, 6, 2))
    student, teacher = (
        make_case("gaussian", n, d, dtype=torch.float32, seed=seed) for n, d, seed in shapes
    )
    return student, teacher


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_autocast_changes_nothing_in_the_loss(
    cpu_backend: str, objective: str, dtype: torch.dtype
) -> None:
    """The products of distances and gradients stay float32 inside."""
    student, teacher = images()
    found = []
    for enabled in (False, True):
        points = student.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = perception_coherence_loss(
                points, teacher, objective=objective, backend=cpu_backend
            )
        (gradient,) = torch.autograd.grad(loss, points)
        found.append((loss, gradient))
    (plain, plain_gradient), (cast, cast_gradient) = found
    assert cast.dtype == cast_gradient.dtype == torch.float32
    assert torch.equal(plain, cast)
    assert torch.equal(plain_gradient, cast_gradient)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_students_with_stored_teachers(cpu_backend: str, dtype: torch.dtype) -> None:
    """Under autocast the network's outputs are half precision; a teacher from a file is not."""
    inputs, teacher = images()
    model = network()
    with torch.autocast("cpu", dtype):
        student = model(inputs)
        assert student.dtype == dtype
        loss = perception_coherence_loss(student, teacher, backend=cpu_backend)
        same = PerceptionCoherenceLoss(backend=cpu_backend)(student.float(), teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, same)
    student.retain_grad()
    loss.backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    with pytest.raises(TypeError, match=r"^teacher: expected the student's dtype"):
        perception_coherence_loss(student, teacher, backend=cpu_backend)
    with (
        torch.autocast("cpu", dtype),
        pytest.raises(TypeError, match=r"^teacher: expected the student's dtype"),
    ):
        perception_coherence_loss(student, teacher.double(), backend=cpu_backend)


@pytest.mark.parametrize("dtype", HALVES)
def test_scaled_training_steps(cpu_backend: str, dtype: torch.dtype) -> None:
    """With GradScaler and autocast, training goes as in float32, up to half precision."""
    inputs, teacher = images(128)
    criterion = PerceptionCoherenceLoss(backend=cpu_backend)
    losses = {}
    for enabled in (False, True):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        for _ in range(60):
            with torch.autocast("cpu", dtype, enabled=enabled):
                loss = criterion(model(inputs), teacher)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses[enabled] = loss.item()
        if enabled:
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    start = criterion(network()(inputs), teacher).item()
    # What is learnt in half precision is what is learnt in float32, to a tenth of it.
    assert losses[False] < 0.7 * start
    assert abs(losses[True] - losses[False]) < 0.1 * (start - losses[False])


def train(model: nn.Module, criterion: nn.Module, compiled: bool) -> list[Tensor]:
    """Three steps; the losses and the parameters after them."""
    inputs, teacher = images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

    def step() -> Tensor:
        loss: Tensor = criterion(model(inputs), teacher)
        return loss

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    losses = []
    for _ in range(3):
        loss = run()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [torch.stack(losses), *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_compiled_training_equals_eager(cpu_backend: str, objective: str) -> None:
    model = network()
    criterion = PerceptionCoherenceLoss(objective=objective, backend=cpu_backend)
    eager = train(copy.deepcopy(model), criterion, compiled=False)
    compiled = train(model, criterion, compiled=True)
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Step(nn.Module):
    """A network and its loss."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.model = network()
        self.criterion = criterion

    def forward(self, inputs: Tensor, teacher: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.model(inputs), teacher)
        return loss


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_program_equals_eager(cpu_backend: str, dynamic: bool) -> None:
    step = Step(PerceptionCoherenceLoss(backend=cpu_backend))
    n = torch.export.Dim("n", min=2, max=4096)
    shapes = ({0: n}, {0: n}) if dynamic else None
    program = torch.export.export(step, images(), dynamic_shapes=shapes).module()
    for size in (40, 57) if dynamic else (40,):
        torch.testing.assert_close(program(*images(size)), step(*images(size)))


def test_deterministic_algorithms_are_what_we_have(cpu_backend: str) -> None:
    student, teacher = images()
    points = student.requires_grad_()
    results = []
    assert torch.are_deterministic_algorithms_enabled()  # as in all tests: nothing raises
    for enabled in (True, False):
        torch.use_deterministic_algorithms(enabled)
        try:
            loss = perception_coherence_loss(points, teacher, backend=cpu_backend)
            ranks = pcoherence.soft_rank(student, backend=cpu_backend)
            results.append((loss, *torch.autograd.grad(loss, points), ranks))
        finally:
            torch.use_deterministic_algorithms(True)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
