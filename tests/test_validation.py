"""Every wrong argument raises before any work, and the message starts with its name."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from pcoherence import (
    PerceptionCoherenceLoss,
    perception_coherence_loss,
    reference,
    soft_rank,
)
from pcoherence.spec import METRICS, NUMBERS, OBJECTIVES, REDUCTIONS, SCALES, LossSpec

X = torch.randn(5, 3)
Y = torch.randn(5, 4)
BANK = {"student_candidates": torch.randn(6, 3), "teacher_candidates": torch.randn(6, 4)}

WRONG: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("student", TypeError, {"student": [[1.0]]}),
    ("student", TypeError, {"student": X.long()}),
    ("student", TypeError, {"student": X.to(torch.complex64)}),
    ("student", ValueError, {"student": X[0]}),
    ("student", ValueError, {"student": X[:1], "teacher": Y[:1]}),
    ("teacher", TypeError, {"teacher": None}),
    ("teacher", TypeError, {"teacher": Y.double()}),
    ("teacher", ValueError, {"teacher": Y[:4]}),
    ("teacher", ValueError, {"teacher": Y[None]}),
    ("teacher", ValueError, {"teacher": Y.to("meta")}),
    ("teacher_candidates", ValueError, {"student_candidates": BANK["student_candidates"]}),
    ("student_candidates", ValueError, {"teacher_candidates": BANK["teacher_candidates"]}),
    ("student_candidates", ValueError, BANK | {"student_candidates": torch.randn(6, 2)}),
    ("student_candidates", TypeError, BANK | {"student_candidates": torch.zeros(6, 3).double()}),
    ("student_candidates", ValueError, {k: v[:1] for k, v in BANK.items()}),
    ("teacher_candidates", ValueError, BANK | {"teacher_candidates": torch.randn(7, 4)}),
    ("teacher_candidates", ValueError, BANK | {"teacher_candidates": torch.randn(6, 5)}),
    ("anchor_weights", ValueError, {"anchor_weights": torch.ones(6)}),
    ("anchor_weights", ValueError, {"anchor_weights": torch.tensor([1, 1, -1, 1, 1])}),
    ("anchor_weights", ValueError, {"anchor_weights": torch.ones(5, requires_grad=True)}),
    ("anchor_weights", TypeError, {"anchor_weights": [1.0] * 5}),
    ("candidate_weights", ValueError, {"candidate_weights": torch.full((5,), math.nan)}),
    ("candidate_weights", ValueError, {"candidate_weights": torch.full((5,), math.inf)}),
    ("candidate_weights", ValueError, {"candidate_weights": torch.full((5,), 1e33)}),
    ("candidate_weights", ValueError, {"candidate_weights": torch.ones(5, 5).double() * 1e33}),
    ("anchor_weights", ValueError, {"anchor_weights": torch.ones(5).double() * 1e300}),
    ("candidate_weights", ValueError, BANK | {"candidate_weights": torch.ones(5)}),
    ("candidate_weights", ValueError, {"candidate_weights": torch.ones(5, 1)}),
    ("candidate_weights", TypeError, {"candidate_weights": torch.ones(5).to(torch.complex64)}),
    ("candidate_weights", ValueError, {"candidate_weights": torch.ones(5, device="meta")}),
    ("self_index", ValueError, {"self_index": "none"}),
    ("self_index", TypeError, {"self_index": 3}),
    ("self_index", TypeError, {"self_index": torch.arange(5, dtype=torch.int32)}),
    ("self_index", ValueError, {"self_index": torch.arange(6)}),
    ("self_index", ValueError, {"self_index": torch.arange(5) + 1}),
    ("self_index", ValueError, {"self_index": torch.arange(5) - 2}),
    ("temperature", ValueError, {"temperature": 0.0}),
    ("temperature", ValueError, {"temperature": -1}),
    ("temperature", ValueError, {"temperature": math.nan}),
    ("temperature", ValueError, {"temperature": math.inf}),
    ("temperature", TypeError, {"temperature": "0.1"}),
    ("temperature", TypeError, {"temperature": True}),
    ("temperature", TypeError, {"temperature": None}),
    ("teacher_temperature", ValueError, {"teacher_temperature": 0}),
    ("neighbourhood", ValueError, {"neighbourhood": 0}),
    ("neighbourhood", ValueError, {"neighbourhood": 1.5}),
    ("neighbourhood", ValueError, {"neighbourhood": 10}),
    ("neighbourhood", TypeError, {"neighbourhood": "0.1"}),
    ("metric", ValueError, {"metric": "manhattan"}),
    ("metric", TypeError, {"metric": 2}),
    ("metric", ValueError, {"metric": lambda a, b: torch.zeros(2, 2)}),
    ("metric", TypeError, {"metric": lambda a, b: 0.0}),
    ("teacher_metric", ValueError, {"teacher_metric": "l2"}),
    ("teacher_metric", ValueError, {"teacher_metric": lambda a, b: torch.zeros(2, 2)}),
    ("scale", ValueError, {"scale": "mean"}),
    ("scale", TypeError, {"scale": None}),
    ("objective", ValueError, {"objective": "l2"}),
    ("reduction", ValueError, {"reduction": "avg"}),
    ("method", ValueError, {"method": "sort"}),
    ("backend", ValueError, {"backend": "mps"}),
]


@pytest.mark.parametrize(("argument", "error", "arguments"), WRONG)
@pytest.mark.filterwarnings("ignore:pcoherence. using the slow reference")
def test_message_names_the_argument(
    argument: str, error: type[Exception], arguments: dict[str, Any]
) -> None:
    with pytest.raises(error, match=rf"^{argument}: expected .*; got "):
        perception_coherence_loss(**({"student": X, "teacher": Y} | arguments))


@pytest.mark.parametrize(
    ("argument", "known"),
    [
        ("metric", METRICS),
        ("scale", SCALES),
        ("objective", OBJECTIVES),
        ("reduction", REDUCTIONS),
    ],
)
def test_unknown_names_list_the_known(argument: str, known: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=", ".join(known)):
        PerceptionCoherenceLoss(**{argument: "?"})


@pytest.mark.parametrize(
    ("argument", "error", "arguments"),
    [
        ("values", TypeError, {"values": 1.0}),
        ("values", TypeError, {"values": torch.arange(3)}),
        ("values", ValueError, {"values": torch.tensor(1.0)}),
        ("temperature", ValueError, {"temperature": 0}),
        ("weights", ValueError, {"weights": torch.ones(4)}),
        ("weights", ValueError, {"weights": torch.ones(1, 5, 3)}),
        ("weights", ValueError, {"weights": -torch.ones(3)}),
        ("weights", ValueError, {"weights": torch.ones(3, requires_grad=True)}),
        ("method", ValueError, {"method": "sort"}),
        ("backend", ValueError, {"backend": "gpu"}),
    ],
)
def test_soft_rank_message_names_the_argument(
    argument: str, error: type[Exception], arguments: dict[str, Any]
) -> None:
    with pytest.raises(error, match=rf"^{argument}: expected .*; got "):
        soft_rank(**({"values": torch.randn(5, 3)} | arguments))


def test_numpy_scalars_are_numbers() -> None:
    assert torch.equal(
        perception_coherence_loss(X, X, temperature=np.float32(0.5)),
        perception_coherence_loss(X, X, temperature=0.5),
    )


def test_a_tensor_is_no_temperature() -> None:
    with pytest.raises(TypeError, match=r"^temperature: .*take its \.item\(\)"):
        perception_coherence_loss(X, X, temperature=torch.tensor(0.1))


def test_sparse_features() -> None:
    with pytest.raises(TypeError, match=r"^student: expected a dense tensor; got layout"):
        perception_coherence_loss(X.to_sparse(), X)


def test_complex_distances() -> None:
    with pytest.raises(TypeError, match=r"^metric: expected floating point distances"):
        perception_coherence_loss(X, X, metric=lambda a, b: torch.cdist(a, b).to(torch.complex64))


@pytest.mark.parametrize(
    ("student", "teacher", "advice"),
    [
        (torch.float32, torch.float64, "convert it: teacher.to(student.dtype)"),
        (torch.float32, torch.float16, "convert it: teacher.to(student.dtype)"),
        (torch.bfloat16, torch.float32, "convert the student: student.float()"),
        (torch.float16, torch.bfloat16, "convert both: student.float(), teacher.float()"),
        (torch.bfloat16, torch.float64, "convert both: student.float(), teacher.float()"),
    ],
)
def test_a_mixed_dtype_says_how_to_convert(
    student: torch.dtype, teacher: torch.dtype, advice: str
) -> None:
    """Never the teacher to half precision: rounding would change its order."""
    with pytest.raises(TypeError, match=rf"^teacher: .*\({re.escape(advice)}\)$"):
        perception_coherence_loss(X.to(student), X.to(teacher))


def test_what_is_no_embedding() -> None:
    with pytest.raises(TypeError, match=r"embeddings, not class labels\)$"):
        perception_coherence_loss(X, torch.arange(len(X)))
    with pytest.raises(ValueError, match=r"\(pool or flatten it first\)$"):
        perception_coherence_loss(X, X[:, :, None])
    with pytest.raises(ValueError, match=r"^metric: expected all distances .* torch\.cdist gives"):
        perception_coherence_loss(X, X, metric=torch.nn.functional.pairwise_distance)


def test_a_generator_is_checked_before_any_work() -> None:
    functions = perception_coherence_loss, reference.perception_coherence_loss
    for call in (*functions, PerceptionCoherenceLoss()):
        with pytest.raises(
            TypeError, match=r"^generator: expected a torch.Generator or None; got int"
        ):
            call(X, Y, generator=3)


@pytest.mark.parametrize("name", ["metric", "teacher_metric"])
@pytest.mark.parametrize("way", ["register_module", "set_submodule", "setattr"])
def test_a_metric_is_the_submodule_that_is_there(name: str, way: str) -> None:
    """However it came to be there."""

    class Weighted(torch.nn.Module):
        def __init__(self, power: float) -> None:
            super().__init__()
            self.power = power

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.cdist(a, b, p=self.power)

    criterion = PerceptionCoherenceLoss(**{name: Weighted(1.0)}, teacher_temperature=0.1)
    shallow = copy.copy(criterion)
    change = {"setattr": functools.partial(setattr, criterion)}.get(way) or getattr(criterion, way)
    change(name, Weighted(5.0))
    expected = PerceptionCoherenceLoss(**{name: Weighted(5.0)}, teacher_temperature=0.1)(X, Y)
    assert torch.equal(criterion(X, Y), expected)
    assert torch.equal(shallow(X, Y), expected)  # which shares its submodules


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_quantised_embeddings_are_told_what_to_do(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"^teacher: .*quantised embeddings, take teacher\.float"):
        perception_coherence_loss(X, torch.ones(len(X), 4).to(dtype))


@pytest.mark.parametrize("name", list(NUMBERS))
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("value", [Fraction(2, 5), np.float16(0.1), np.float32(0.1), 1])
def test_numbers_of_any_kind_are_floats(value: Any, backend: str, name: str) -> None:
    found, expected = (
        perception_coherence_loss(X.double(), Y.double(), backend=backend, **{name: each})
        for each in (value, float(value))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("value", [Fraction(2, 5), np.float16(0.1), 1])
def test_a_temperature_of_soft_ranks_is_a_float(value: Any, backend: str) -> None:
    expected = soft_rank(X, float(value), backend=backend)
    assert torch.equal(soft_rank(X, value, backend=backend), expected)
    assert torch.equal(reference.soft_rank(X, value), reference.soft_rank(X, float(value)))


@pytest.mark.parametrize("name", list(NUMBERS))
@pytest.mark.parametrize("value", [10**400, Fraction(10**400), Fraction(1, 10**400)])
def test_numbers_that_are_no_floats(value: Any, name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{name}: expected a (finite number|share of .*) above 0.*; got "
    ):
        perception_coherence_loss(X, Y, **{name: value})


def test_a_count_is_no_neighbourhood() -> None:
    with pytest.raises(ValueError, match=r"got 10 \(k of n candidates are the share k / n\)"):
        PerceptionCoherenceLoss(neighbourhood=10)


@pytest.mark.parametrize("made", [{}, {"neighbourhood": None, "metric": "cosine"}])
def test_options_can_be_read(made: dict[str, Any]) -> None:
    """Defaults, too: a log or a checkpoint can say which were in force."""
    criterion = PerceptionCoherenceLoss(**made)
    options = vars(LossSpec(**made))
    for copied in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert {name: getattr(copied, name) for name in options} == options
    assert all(f"{name}={value!r}" in repr(criterion) for name, value in options.items())
    with pytest.raises(AttributeError, match="nothing"):
        criterion.nothing  # noqa: B018


def test_a_metric_that_is_a_module_is_read_as_one() -> None:
    metric = torch.nn.PairwiseDistance()
    criterion = PerceptionCoherenceLoss(metric=metric)
    assert criterion.metric is metric
    assert repr(criterion).count("metric=") == 1  # the teacher's; the other has a line of its own


def test_a_temperature_may_be_set() -> None:
    criterion = PerceptionCoherenceLoss(objective="huber")
    criterion.temperature = 0.03
    assert criterion.temperature == 0.03
    expected = perception_coherence_loss(X, Y, temperature=0.03, objective="huber")
    assert torch.equal(criterion(X, Y), expected)
    with pytest.raises(ValueError, match=r"^temperature: expected a finite number above 0; got 0"):
        criterion.temperature = 0
    assert criterion.temperature == 0.03


@pytest.mark.parametrize("name", ["objective", "scale", "metric", "method", "reduction"])
def test_other_options_stay(name: str) -> None:
    """Assigning them would otherwise do nothing, silently."""
    criterion = PerceptionCoherenceLoss(metric=torch.nn.PairwiseDistance())
    with pytest.raises(AttributeError, match=rf"^{name}: expected .* as the loss was made"):
        setattr(criterion, name, "none")


def test_a_metric_may_be_wrapped_in_place() -> None:
    class Halved(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.cdist(a, b)

    criterion = PerceptionCoherenceLoss(metric=Halved(), temperature=0.3)
    wrapped = torch.nn.Sequential()
    wrapped.forward = lambda a, b: torch.cdist(a, b) ** 2  # type: ignore[method-assign]
    criterion.metric = wrapped
    assert dict(criterion.named_children()) == {"metric": wrapped}
    expected = perception_coherence_loss(X, Y, metric=wrapped, temperature=0.3)
    assert torch.equal(criterion(X, Y), expected)
    with pytest.raises(AttributeError, match=r"^metric: expected Halved.*, as the loss was made"):
        criterion.metric = "cosine"
