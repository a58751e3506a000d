"""Default devices and dtypes, inference mode and fake tensors: the values are the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pcoherence
from pcoherence import CandidateBank, PerceptionCoherenceLoss, plots
from pcoherence.adapters.metric_learning import CoherenceLoss
from pcoherence.adapters.torchmetrics import CoherenceMetric
from pcoherence.testing import make_case

N = 12
TENSORS = {
    "student": make_case("gaussian", N, 4, seed=1, dtype=torch.float32),
    "teacher": make_case("gaussian", N, 5, seed=2, dtype=torch.float32),
    "student_candidates": make_case("gaussian", 20, 4, seed=3, dtype=torch.float32),
    "teacher_candidates": make_case("gaussian", 20, 5, seed=4, dtype=torch.float32),
    "anchor_weights": torch.linspace(0, 1, N, dtype=torch.float64),
    "candidate_weights": torch.linspace(1, 2, N),
    "self_index": torch.arange(N),
}

Given = dict[str, Tensor]
Call = Callable[[Given], Tensor]


def loss(*names: str, **options: Any) -> Call:
    """The loss of student and teacher, with the tensors of these names."""

    def call(given: Given) -> Tensor:
        tensors = {name: given[name] for name in ("student", "teacher", *names)}
        return pcoherence.perception_coherence_loss(**tensors, **options)

    return call


def cubic(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, p=3.0)


def with_bank(given: Given) -> Tensor:
    criterion = PerceptionCoherenceLoss(bank=CandidateBank(30))
    first = criterion(given["student"], given["teacher"])
    return first + criterion(given["student"], given["teacher"])


def drawn(given: Given) -> Tensor:
    torch.manual_seed(0)
    return loss("anchor_weights", num_anchors=4)(given)


WEIGHTED = ("anchor_weights", "candidate_weights")
CALLS: dict[str, Call] = {
    "mean": loss(),
    "none": loss(reduction="none"),
    "weights": loss(*WEIGHTED, reduction="none"),
    "own candidates": loss(
        "self_index", "student_candidates", "teacher_candidates", reduction="none"
    ),
    "soft teacher, no scale": loss(teacher_temperature=0.2, scale="none"),
    "callable": loss("anchor_weights", metric=cubic, reduction="none"),
    "reference": loss(*WEIGHTED, backend="reference", teacher_temperature=0.2, reduction="none"),
    "bank": with_bank,
    "num_anchors": drawn,
    "soft_rank": lambda t: pcoherence.soft_rank(t["student"]),
    "soft_rank, weights": lambda t: pcoherence.soft_rank(
        t["student"].T, weights=t["candidate_weights"]
    ),
    "soft_rank, reference": lambda t: pcoherence.soft_rank(
        t["student"].T, weights=t["candidate_weights"], backend="reference"
    ),
    "transport": lambda t: pcoherence.optimal_transport_loss(
        t["student"], t["teacher"], standardize=False
    ),
    "transport, sinkhorn": lambda t: pcoherence.optimal_transport_loss(
        t["student"], t["teacher"], solver="sinkhorn", cost="cosine"
    ),
    "metric-learning": lambda t: CoherenceLoss(t["teacher"])(t["student"], t["self_index"]),
}
MEASURES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "coherence": lambda s, t: pcoherence.coherence(s, t, self_index=TENSORS["self_index"]),
    "coherence, callable": lambda s, t: pcoherence.coherence(s, t, metric=cubic),
    "plain coherence": lambda s, t: pcoherence.metrics.rank_agreement(s @ s.T, t @ t.T, None, 3),
    "diagnose": lambda s, t: PerceptionCoherenceLoss().diagnose(s, t),
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "default device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


def with_gradient(call: Call, given: Given = TENSORS) -> tuple[Tensor, Tensor]:
    student = TENSORS["student"].clone().requires_grad_()
    value = call(given | {"student": student})
    upstream = torch.arange(1, value.numel() + 1, dtype=value.dtype, device="cpu").view_as(value)
    return value.detach(), torch.autograd.grad(value, student, upstream)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("cpu_backend")
def test_defaults_change_nothing(name: str, mode: str) -> None:
    expected = with_gradient(CALLS[name])
    with MODES[mode]():
        found = with_gradient(CALLS[name])
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.usefixtures("cpu_backend")
def test_defaults_change_no_measure(name: str, mode: str) -> None:
    expected = MEASURES[name](TENSORS["student"], TENSORS["teacher"])
    with MODES[mode]():
        found = MEASURES[name](TENSORS["student"], TENSORS["teacher"])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is theirs or bool((torch.as_tensor(ours) == torch.as_tensor(theirs)).all())


@pytest.mark.parametrize("mode", MODES)
def test_many_points_are_thinned_out_evenly(mode: str) -> None:
    """Up to the last, to which half precision cannot count."""
    x = make_case("gaussian", 3000, 3, dtype=torch.float32)
    with MODES[mode]():
        rows = pcoherence.metrics.evenly_spaced(3000, 256, x.device)
        assert rows[[0, -1]].tolist() == [0, 2999]
        assert rows.unique().numel() == 256
        found = PerceptionCoherenceLoss().diagnose(x, x)
        plots.rank_agreement(x, x)
    assert found == PerceptionCoherenceLoss().diagnose(x, x)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "default device"])
def test_metrics_that_keep_features(mode: str) -> None:
    """On the device where the library itself keeps them."""
    student, teacher = TENSORS["student"], TENSORS["teacher"]
    with MODES[mode]():
        metric = CoherenceMetric()
        metric.update(student, teacher)
        found = metric.compute()
    for name, expected in pcoherence.coherence(student, teacher)._asdict().items():
        torch.testing.assert_close(found[name], expected.float())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("cpu_backend")
def test_what_inference_mode_made_serves_training(name: str) -> None:
    with torch.inference_mode():
        made = {key: tensor.clone() for key, tensor in TENSORS.items()}
    assert made["teacher"].is_inference()
    expected, found = with_gradient(CALLS[name]), with_gradient(CALLS[name], made)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_fake_tensors_have_no_values_to_check(backend: str, cpu_backend: str) -> None:
    with FakeTensorMode():
        x, y, w = torch.randn(6, 3), torch.randn(6, 4), torch.ones(6)
        index = torch.arange(6)
        rows = pcoherence.perception_coherence_loss(
            x, y, anchor_weights=w, candidate_weights=w, self_index=index, reduction="none",
            backend=backend,
        )  # fmt: skip
        assert rows.shape == (6,)
        assert pcoherence.soft_rank(x, weights=w[:3], backend=backend).shape == (6, 3)
