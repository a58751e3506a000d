"""Gradients, operator contracts and torch.compile of the CPU backend."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck
from torch.library import opcheck

import pcoherence
from pcoherence import backends, ops
from pcoherence.spec import METHODS, METRICS, NUMBERS, OBJECTIVES, SCALES, LossSpec
from pcoherence.testing import make_case, relative_error

pytestmark = pytest.mark.usefixtures("cpu_backend")

REFUSED = 'double backward is not supported.*backend="reference"'


def loss(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return pcoherence.perception_coherence_loss(student, teacher, **options, backend="cpu")


def quartic(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None, :] - b[None, :, :]).pow(4).sum(-1)


@pytest.mark.parametrize(
    ("objective", "metric", "scale", "method"),
    list(itertools.product(OBJECTIVES, METRICS, SCALES, METHODS)),
)
def test_gradcheck(objective: str, metric: str, scale: str, method: str) -> None:
    student = make_case("gaussian", 5, 3, seed=1).requires_grad_()
    teacher = make_case("gaussian", 5, 2, seed=2)
    options = {"objective": objective, "metric": metric, "scale": scale, "method": method}
    assert gradcheck(lambda x: loss(x, teacher, **options), (student,), fast_mode=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("soft", [None, 0.2])
def test_gradcheck_of_a_neighbourhood(soft: float | None, objective: str, method: str) -> None:
    student = make_case("gaussian", 6, 3, seed=1).requires_grad_()
    teacher = make_case("lattice", 6, 2, seed=2)  # with ties
    options = {"objective": objective, "teacher_temperature": soft, "method": method}
    weights = 0.2 + torch.rand(6, generator=torch.Generator().manual_seed(0))
    for own in (None, weights, weights + torch.arange(36.0).view(6, 6) / 36):
        own_options = options | {"candidate_weights": own, "neighbourhood": 0.2}
        assert gradcheck(lambda x, own=own_options: loss(x, teacher, **own), (student,))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_rectangular(reduction: str, method: str) -> None:
    leaves = [make_case("gaussian", n, 3, seed=n).requires_grad_() for n in (3, 6)]
    anchors, bank = make_case("gaussian", 3, 2), make_case("gaussian", 6, 2, seed=1)

    def function(student: Tensor, candidates: Tensor) -> Tensor:
        return loss(
            student,
            anchors,
            student_candidates=candidates,
            teacher_candidates=bank,
            reduction=reduction,
            method=method,
        )

    assert gradcheck(function, leaves)


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_soft_rank(method: str) -> None:
    values = make_case("gaussian", 3, 7).requires_grad_()
    weights = torch.rand(7)
    assert gradcheck(
        lambda v: pcoherence.soft_rank(v, 0.4, weights=weights, method=method, backend="cpu"),
        (values,),
    )


def operator_calls(
    requires_grad: bool, weighted: bool, neighbourhood: float | None = None
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Arguments for every operator."""
    x = make_case("gaussian", 5, 3, seed=1).requires_grad_(requires_grad)
    bank = make_case("gaussian", 6, 3, seed=2).requires_grad_(requires_grad)
    y, y_bank = make_case("gaussian", 5, 2, seed=3), make_case("gaussian", 6, 2, seed=4)
    d = make_case("gaussian", 5, 6, seed=5).abs().requires_grad_(requires_grad)
    d_teacher = make_case("gaussian", 5, 6, seed=6).abs()
    coefficients = torch.rand(5, dtype=torch.float64)
    w = torch.rand(*((5, 6) if neighbourhood else (6,))).double() if weighted else None
    index = torch.tensor([0, 1, -1, 3, 5]) if weighted else None
    points = (x, bank, y, y_bank) if weighted else (x, None, y, None)
    others = (coefficients, w, index, 0.2, 0.3 if weighted else 0.0)
    options = LossSpec(teacher_metric="cosine", neighbourhood=neighbourhood).packed()
    return {
        "sum": (ops.native.coherence, (*points, *others, options, False, True, weighted)),
        "rows": (ops.native.coherence, (*points, *others, options, False, False, False)),
        "sum_from_distances": (
            ops.native.coherence,
            (d, None, d_teacher, None, *others, options, True, True, False),
        ),
        "rows_from_distances": (
            ops.native.coherence,
            (d, None, d_teacher, None, *others, options, True, False, False),
        ),
        "soft_rank": (ops.native.soft_rank, (d, w, None, 0.3, "auto")),
        "soft_rank_backward": (ops.native.soft_rank, (d, w, d_teacher, 0.3, "auto")),
    }


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("name", "neighbourhood"),
    [
        *((name, None) for name in operator_calls(False, False)),
        # Ranks by themselves have no neighbourhood.
        *((name, 0.3) for name in operator_calls(False, False) if "soft_rank" not in name),
    ],
)
def test_opcheck(
    name: str, neighbourhood: float | None, requires_grad: bool, weighted: bool
) -> None:
    operator, arguments = operator_calls(requires_grad, weighted, neighbourhood)[name]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # The last check differentiates every output; these ones' are gradients, and refuse.
    if not (requires_grad and (name.startswith("sum") or name == "soft_rank_backward")):
        checks.append("test_aot_dispatch_dynamic")
    opcheck(operator, arguments, test_utils=checks)


def test_one_gradient_flag_of_two_raises_in_backward() -> None:
    operator, arguments = operator_calls(True, True)["sum"]
    total, *_ = operator(*arguments[:-2], True, False)
    with pytest.raises(RuntimeError, match="turn on the flags of both"):
        total.backward()


@pytest.mark.parametrize("weighted", [False, True])
def test_without_flags_both_total_and_losses_have_gradients(weighted: bool) -> None:
    """By a second pass, and what arrives for one is added to what arrives for the other."""
    operator, arguments = operator_calls(True, weighted)["rows"]
    leaves = [tensor for tensor in arguments[:2] if tensor is not None]
    coefficients, upstream = arguments[4], torch.rand(5, dtype=torch.float64)
    total, losses, *_ = operator(*arguments)
    torch.testing.assert_close(total, coefficients @ losses)
    found = torch.autograd.grad(3 * total + upstream @ losses, leaves)
    flagged = (*arguments[:4], 3 * coefficients + upstream, *arguments[5:-2], True, weighted)
    for ours, theirs in zip(found, operator(*flagged)[2:], strict=False):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"metric": quartic}], ids=["mean", "none", "callable"]
)
def test_double_backward_raises(options: dict[str, Any]) -> None:
    student = make_case("gaussian", 5, 3).requires_grad_()
    value = loss(student, make_case("gaussian", 5, 3, seed=1), **options).square().sum()
    (gradient,) = torch.autograd.grad(value, student, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        gradient.square().sum().backward()


def test_double_backward_of_soft_rank_raises() -> None:
    values = make_case("gaussian", 5, 3).requires_grad_()
    ranks = pcoherence.soft_rank(values, backend="cpu").square().sum()
    (gradient,) = torch.autograd.grad(ranks, values, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none", "scale": "none"},
        {"metric": quartic},
        {"objective": "spearman", "teacher_temperature": 0.2, "anchor_weights": torch.rand(9)},
    ],
    ids=["default", "none", "callable", "weights"],
)
def test_compiled_equals_eager(options: dict[str, Any]) -> None:
    student = make_case("gaussian", 9, 3).requires_grad_()
    teacher = make_case("gaussian", 9, 2, seed=1)
    torch.compiler.reset()

    def function(x: Tensor) -> Tensor:
        return loss(x * 2, teacher, **options)

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        value = call(student)
        upstream = torch.linspace(1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
        results.append((value, *torch.autograd.grad(value, student, upstream)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-14)


def test_compiled_with_numbers_for_variables() -> None:
    """As torch.compile takes floats with dynamic=True."""
    student, teacher = make_case("gaussian", 9, 3), make_case("gaussian", 9, 2, seed=1)
    torch.compiler.reset()
    module = pcoherence.PerceptionCoherenceLoss(teacher_temperature=0.2, backend="cpu")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(student, teacher), module(student, teacher))


@pytest.mark.parametrize("name", list(NUMBERS))
def test_compiled_with_numbers_that_change(name: str) -> None:
    student, teacher = make_case("gaussian", 9, 3), make_case("gaussian", 9, 2, seed=1)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for value in (0.4, 0.3, 1):
        expected = loss(student, teacher, **{name: value})
        torch.testing.assert_close(compiled(student, teacher, **{name: value}), expected)
    torch.compiler.reset()
    for value in (0.4, 0.3):  # the second criterion of a process
        module = pcoherence.PerceptionCoherenceLoss(**{name: value}, backend="cpu")
        again = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(again(student, teacher), module(student, teacher))


def test_compiled_module_and_soft_rank() -> None:
    student, teacher = make_case("gaussian", 9, 3), make_case("gaussian", 9, 2)
    module = pcoherence.PerceptionCoherenceLoss(metric="cosine", backend="cpu")
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), module(student, teacher))
    ranks = torch.compile(pcoherence.soft_rank, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(ranks(student), pcoherence.soft_rank(student))


def every_other(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, 0)[::2]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


@pytest.mark.parametrize("view", [every_other, transposed, expanded])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_layout_does_not_matter(view: Callable[[Tensor], Tensor], reduction: str) -> None:
    points = make_case("gaussian", 9, 3), make_case("gaussian", 9, 4, seed=1)
    results = []
    for layout in (view, lambda tensor: view(tensor).contiguous()):
        leaf = points[0].clone().requires_grad_()
        value = loss(layout(leaf), view(points[1]), reduction=reduction).sum()
        results.append((value, *torch.autograd.grad(value, leaf)))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("side", [0, 1])
def test_gradient_of_one_side_alone(side: int, reduction: str) -> None:
    leaves = [make_case("gaussian", n, 3, seed=n) for n in (4, 9)]
    bank = {"teacher_candidates": make_case("gaussian", 9, 2), "reduction": reduction}
    gradients = []
    for needed in ([0, 1], [side]):
        student, candidates = (
            leaf.clone().requires_grad_(i in needed) for i, leaf in enumerate(leaves)
        )
        value = loss(student, make_case("gaussian", 4, 2), student_candidates=candidates, **bank)
        value.sum().backward()
        gradients.append([student.grad, candidates.grad])
    assert gradients[1][1 - side] is None
    torch.testing.assert_close(gradients[1][side], gradients[0][side], rtol=1e-12, atol=0)


def test_teacher_gets_no_gradient() -> None:
    student, teacher = (make_case("gaussian", 5, 3, seed=i).requires_grad_() for i in range(2))
    loss(student, teacher, teacher_temperature=0.1).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student = make_case("gaussian", 17, 5, dtype=dtype).requires_grad_()
    teacher = make_case("gaussian", 17, 4, dtype=dtype, seed=1)
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    raised = student.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(loss(raised, teacher.float()), raised)
    assert relative_error(gradient, expected) <= torch.finfo(dtype).eps
    assert pcoherence.soft_rank(student, backend="cpu").dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nan_and_inf_give_nan(objective: str, bad: float, method: str) -> None:
    for side, dtype in itertools.product((0, 1), (torch.float32, torch.float64)):
        points = [make_case("gaussian", 33, 3, dtype=dtype, seed=i) for i in range(2)]
        points[side][7, 1] = bad
        points[0].requires_grad_()
        value = loss(points[0], points[1], objective=objective, method=method)
        value.backward()
        assert value.isnan()


def test_empty_anchors_give_zero_with_zero_gradient() -> None:
    bank = torch.randn(4, 3, requires_grad=True)
    empty = torch.zeros(0, 3, requires_grad=True)
    value = loss(
        empty, torch.zeros(0, 2), student_candidates=bank, teacher_candidates=torch.randn(4, 2)
    )
    value.backward()
    assert value == 0
    assert bank.grad is not None
    assert (bank.grad == 0).all()
    loss(empty, torch.zeros(0, 2)).backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 3)


def test_repeated_runs_are_identical() -> None:
    student = make_case("gaussian", 130, 16, dtype=torch.float32).requires_grad_()
    teacher = make_case("gaussian", 130, 8, dtype=torch.float32, seed=1)
    first, second = (
        (value := loss(student, teacher), *torch.autograd.grad(value, student)) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# --- other derivatives --------------------------------------------------------------------------


def by_choice(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss by backend "auto"."""
    return pcoherence.perception_coherence_loss(student, teacher)


def test_function_transforms_use_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators know only the backward pass: "auto" steps aside, a name is refused."""
    student, teacher = torch.randn(7, 3).double(), torch.randn(7, 4).double()
    direction = torch.randn_like(student)
    leaf = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, teacher), leaf)
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match=r"torch\.func transforms need the reference"):
        found = torch.func.grad(by_choice)(student, teacher)
    torch.testing.assert_close(found, expected)
    _, tangent = torch.func.jvp(lambda x: by_choice(x, teacher), (student,), (direction,))
    torch.testing.assert_close(tangent, (expected * direction).sum())
    with pytest.raises(ValueError, match=r"^backend: 'cpu' cannot serve .*torch\.func"):
        torch.func.grad(loss)(student, teacher)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(student, direction)
        with pytest.raises(ValueError, match=r"^backend: 'cpu' cannot serve .*forward-mode"):
            loss(dual, teacher)


def test_vmap_is_right() -> None:
    students, teacher = torch.randn(3, 7, 3).double(), torch.randn(7, 4).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.func.vmap(by_choice, (0, None))(students, teacher)
    torch.testing.assert_close(found, torch.stack([loss(x, teacher) for x in students]))


def test_vmap_over_weights_and_self_index() -> None:
    student, teacher = torch.randn(7, 3).double(), torch.randn(7, 4).double()
    weights = torch.rand(3, 7, dtype=torch.float64)
    index = torch.stack([torch.arange(7), torch.full((7,), -1), torch.arange(7).flip(0)])

    def one(w: Tensor, i: Tensor) -> Tensor:
        return pcoherence.perception_coherence_loss(
            student, teacher, anchor_weights=w, candidate_weights=w, self_index=i
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.func.vmap(one)(weights, index)
    expected = torch.stack([one(w, i) for w, i in zip(weights, index, strict=True)])
    torch.testing.assert_close(found, expected)
    ranks = torch.func.vmap(lambda w: pcoherence.soft_rank(student[:, 0], weights=w))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ranks(weights)
    torch.testing.assert_close(
        found, pcoherence.soft_rank(student[:, 0].expand(3, 7), weights=weights)
    )


def test_transforms_of_something_else(cpu_backend: str) -> None:
    """torch.func may be at work around a loss whose student it does not transform."""
    student, teacher = make_case("gaussian", 9, 3), make_case("gaussian", 9, 4, seed=1)

    def loss(factor: Tensor) -> Tensor:
        return pcoherence.perception_coherence_loss(student, teacher * factor, backend=cpu_backend)

    one = torch.ones((), dtype=torch.float64)
    assert torch.func.grad(lambda w: 2 * w + loss(one))(one) == 2
    assert torch.equal(torch.vmap(lambda w: w + loss(one))(torch.zeros(2)), loss(one).expand(2))
    leaf = student.clone().requires_grad_()
    value = pcoherence.perception_coherence_loss(leaf, teacher, backend=cpu_backend)
    (expected,) = torch.autograd.grad(value, leaf)
    slope, value = torch.func.grad_and_value(
        lambda w: w * pcoherence.perception_coherence_loss(leaf, teacher, backend=cpu_backend)
    )(one)
    assert slope == value
    (found,) = torch.autograd.grad(value, leaf)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("changed", ["student", "teacher", "candidate_weights", "parameter"])
def test_what_is_changed_before_backward_raises(changed: str, reduction: str) -> None:
    """A callable metric is asked again then: of something else, silently."""
    metric = Scaled()
    leaf = make_case("gaussian", 9, 3).requires_grad_()
    given = {
        "student": leaf * 1,
        "teacher": make_case("gaussian", 9, 3, seed=1),
        "candidate_weights": torch.ones(9, dtype=torch.float64),
    }
    value = pcoherence.perception_coherence_loss(
        **given, metric=metric, reduction=reduction, backend="cpu"
    )
    with torch.no_grad():
        (metric.scale if changed == "parameter" else given[changed]).mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        value.sum().backward()


class Scaled(torch.nn.Module):
    """A metric with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return quartic(a * self.scale, b * self.scale)


def test_forward_derivatives_of_candidates_and_metrics_take_the_reference() -> None:
    """Instead of being 0."""
    student, teacher = make_case("gaussian", 7, 3), make_case("gaussian", 7, 2, seed=1)
    bank, teachers = make_case("gaussian", 9, 3, seed=2), make_case("gaussian", 9, 2, seed=3)

    def of_candidates(candidates: Tensor, backend: str) -> Tensor:
        return pcoherence.perception_coherence_loss(
            student, teacher, student_candidates=candidates, teacher_candidates=teachers,
            backend=backend,
        )  # fmt: skip

    def of_metric(scale: Tensor, backend: str) -> Tensor:
        return pcoherence.perception_coherence_loss(
            student, teacher, metric=lambda a, b: quartic(a * scale, b * scale),
            teacher_metric="euclidean", backend=backend,
        )  # fmt: skip

    for function, point in (
        (of_candidates, bank),
        (of_metric, torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)),
    ):
        tangent = torch.linspace(-1, 1, point.numel(), dtype=torch.float64).reshape(point.shape)
        found, expected = (
            torch.func.jvp(lambda x, b=backend, f=function: f(x, b), (point,), (tangent,))[1]
            for backend in ("auto", "reference")
        )
        assert expected != 0
        torch.testing.assert_close(found, expected)
