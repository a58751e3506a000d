"""Parameters, subclasses, fake tensors: equal to plain tensors, or refused by name.

DTensors are in test_mesh.py, torch.func in test_autograd.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from torch.utils._pytree import tree_map_only

from pcoherence import CandidateBank, PerceptionCoherenceLoss, perception_coherence_loss, soft_rank
from pcoherence.inputs import LossInputs
from pcoherence.testing import make_case

pytestmark = [
    pytest.mark.usefixtures("cpu_backend"),
    pytest.mark.filterwarnings("ignore:.*(MaskedTensor|nested tensors).*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*slow reference"),  # of meta tensors
]
X, Y = make_case("gaussian", 9, 3, seed=0), make_case("gaussian", 9, 4, seed=1)
ARGUMENTS: dict[str, Tensor] = {
    "student": X,
    "teacher": Y,
    "student_candidates": make_case("gaussian", 12, 3, seed=2),
    "teacher_candidates": make_case("gaussian", 12, 4, seed=3),
    "anchor_weights": torch.arange(9.0),
    "candidate_weights": torch.arange(12.0),
    "self_index": torch.arange(9),
}
BACKENDS = ("reference", "cpu")


class Named(Tensor):
    """A subclass as its users write it: the default __torch_function__."""


class Wrapped(Tensor):
    """A subclass around another tensor, which sees every operation."""

    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(
            cls, plain.shape, dtype=plain.dtype, device=plain.device
        )

    def __init__(self, plain: Tensor) -> None:
        self.plain = plain

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(Wrapped, lambda t: t.plain, (args, kwargs or {}))
        return tree_map_only(Tensor, Wrapped, function(*args, **kwargs))


def test_all_arguments_are_here() -> None:
    assert set(ARGUMENTS) == set(LossInputs._fields)


def plain(backend: str, **changed: Any) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with respect to the student."""
    arguments = ARGUMENTS | changed
    student = arguments["student"].clone().requires_grad_()
    loss = perception_coherence_loss(**(arguments | {"student": student}), backend=backend)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_are_tensors(backend: str) -> None:
    loss, gradient = plain(backend)
    student = nn.Parameter(X)
    found = perception_coherence_loss(**(ARGUMENTS | {"student": student}), backend=backend)
    assert type(found) is Tensor
    found.backward()
    assert torch.equal(found, loss)
    assert student.grad is not None
    assert torch.equal(student.grad, gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_subclass_comes_back(name: str, backend: str) -> None:
    """As from torch's own functions; the gradient is its tensor's."""
    loss, gradient = plain(backend)
    leaf = X.clone().requires_grad_()
    arguments = ARGUMENTS | {"student": leaf}
    arguments[name] = arguments[name].as_subclass(Named)
    found = perception_coherence_loss(**arguments, backend=backend)
    assert type(found) is Named
    found.backward()
    assert torch.equal(found.as_subclass(Tensor), loss)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad.as_subclass(Tensor), gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrapper_sees_the_operators(name: str, backend: str) -> None:
    loss, gradient = plain(backend)
    leaf = X.clone().requires_grad_()
    if name == "student":
        leaf = Wrapped(X).requires_grad_()
    arguments = ARGUMENTS | {name: Wrapped(ARGUMENTS[name])} | {"student": leaf}
    found = perception_coherence_loss(**arguments, backend=backend)
    assert isinstance(found, Wrapped)
    found.backward()
    assert torch.equal(found.plain, loss)
    slope = leaf.grad
    assert torch.equal(slope.plain if isinstance(slope, Wrapped) else slope, gradient)


def nested(layout: torch.layout) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.nested.nested_tensor([t[:3], t[3:]], layout=layout)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "masked": (
        lambda t: masked_tensor(t, torch.ones_like(t, dtype=torch.bool)),
        r"expected a plain tensor; got a MaskedTensor \(take {}.to_tensor\(0\)",
    ),
    "nested": (nested(torch.strided), "expected a dense tensor; got a nested tensor"),
    "jagged": (nested(torch.jagged), "expected a dense tensor; got a nested tensor"),
    "sparse": (Tensor.to_sparse, "expected a dense tensor; got layout torch.sparse_coo"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_is_no_plain_matrix_is_refused(name: str, kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(TypeError, match=f"^{name}: " + message.format(name)):
        perception_coherence_loss(**(ARGUMENTS | {name: make(ARGUMENTS[name])}))


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", ["values", "weights"])
def test_soft_rank_refuses_them_too(name: str, kind: str) -> None:
    make, message = REFUSED[kind]
    given = {"values": X, "weights": torch.ones_like(X)}
    with pytest.raises(TypeError, match=f"^{name}: " + message.format(name)):
        soft_rank(**(given | {name: make(given[name])}))


def test_a_refused_batch_leaves_the_bank() -> None:
    criterion = PerceptionCoherenceLoss(bank=CandidateBank(20))
    criterion(X, Y)
    with pytest.raises(TypeError, match=r"^teacher: .*got a MaskedTensor"):
        criterion(X, masked_tensor(Y, Y > 0))
    assert len(criterion.bank) == 9


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_values_the_shape_is_right(reduction: str, kind: str) -> None:
    """And the gradient's."""
    expected = perception_coherence_loss(**ARGUMENTS, reduction=reduction)
    mode = FakeTensorMode()
    with contextlib.nullcontext() if kind == "meta" else mode:
        make = (lambda t: t.to("meta")) if kind == "meta" else mode.from_tensor
        arguments = {name: make(value) for name, value in ARGUMENTS.items()}
        student = arguments["student"].requires_grad_()
        found = perception_coherence_loss(**arguments, reduction=reduction)
        found.sum().backward()
    assert type(found) is type(student.detach())
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.device == student.device
    assert student.grad is not None
    assert student.grad.shape == student.shape


def test_values_do_not_meet_what_has_none() -> None:
    with pytest.raises(ValueError, match=r"^teacher: expected device meta, .*; got cpu"):
        perception_coherence_loss(X.to("meta"), Y)
