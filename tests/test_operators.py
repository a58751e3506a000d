"""The CPU operators called directly, as compiled graphs do: they check what they rely on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulation import DEVICE

from pcoherence import backends, ops
from pcoherence.backends import cuda_kernels, triton
from pcoherence.spec import LossSpec

pytestmark = pytest.mark.usefixtures("cpu_backend")

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(5, 3, generator=G), torch.randn(5, 4, generator=G)
C, D = torch.randn(6, 3, generator=G), torch.randn(6, 4, generator=G)
ONES, SIX = torch.ones(5), torch.ones(6)
ROWS, OTHER_ROWS = torch.rand(5, 6, generator=G), torch.rand(5, 6, generator=G)

Call = Callable[..., None]


def given(changed: dict[str, Any], **others: Any) -> dict[str, Any]:
    """Arguments of ops.native.coherence, some of its options by their own names."""
    arguments = {
        "student": X, "student_candidates": C, "teacher": Y, "teacher_candidates": D,
        "coefficients": ONES, "candidate_weights": SIX, "self_index": torch.arange(5),
        "temperature": 0.1, "teacher_temperature": 0.2, "options": LossSpec().packed(),
        "distances": False, "grad_student": False, "grad_candidates": False,
    } | others  # fmt: skip
    for name, value in changed.items():
        if name in arguments:
            arguments[name] = value
        else:
            arguments["options"] += f",{name}={value}"  # the last one counts
    return arguments


def feature_sum(**changed: Any) -> None:
    flags = dict.fromkeys(("grad_student", "grad_candidates"), True)
    ops.native.coherence(**given(changed, **flags))


def feature_rows(**changed: Any) -> None:
    ops.native.coherence(**given(changed))


def distance_options() -> dict[str, Any]:
    options = {"student": ROWS, "teacher": OTHER_ROWS, "distances": True}
    return options | {"student_candidates": None, "teacher_candidates": None}


def distance_sum(**changed: Any) -> None:
    ops.native.coherence(**given(changed, grad_student=True, **distance_options()))


def distance_rows(**changed: Any) -> None:
    ops.native.coherence(**given(changed, **distance_options()))


def rank_options(changed: dict[str, Any]) -> dict[str, Any]:
    return {
        "values": ROWS, "weights": SIX, "upstream": None, "temperature": 0.1, "method": "auto",
    } | changed  # fmt: skip


def soft_rank(**changed: Any) -> None:
    ops.native.soft_rank(**rank_options(changed))


def soft_rank_backward(**changed: Any) -> None:
    ops.native.soft_rank(**rank_options({"upstream": ROWS} | changed))


FEATURES: tuple[Call, ...] = (feature_sum, feature_rows)
DISTANCES: tuple[Call, ...] = (distance_sum, distance_rows)
LOSSES = (*FEATURES, *DISTANCES)
RANKS: tuple[Call, ...] = (soft_rank, soft_rank_backward)


def agreement(**changed: Any) -> None:
    given = {
        "student_distances": ROWS, "teacher_distances": OTHER_ROWS, "self_index": torch.arange(5),
        "nearest": 2,
    } | changed  # fmt: skip
    torch.ops.pcoherence.rank_agreement(*given.values())


def but(tensor: torch.Tensor, position: int, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[position] = value
    return changed


WRONG: list[tuple[Call, str, Any]] = [
    *((f, "candidate_weights", w) for f in LOSSES
      for w in (SIX[:5], torch.ones(7), but(SIX, 5, -1), but(SIX, 0, torch.nan),
                but(SIX, 5, torch.inf), SIX.double(), torch.ones(12)[::2], SIX[:, None],
                torch.ones(6, 5), torch.ones(4, 6), torch.ones(5, 6)[None], -torch.ones(5, 6))),
    *((f, "coefficients", torch.ones(n)) for f in LOSSES for n in (4, 6)),
    *((f, "self_index", i) for f in (*LOSSES, agreement)
      for i in (torch.arange(5) + 2, torch.arange(5) - 2, torch.arange(4),
                torch.arange(5, dtype=torch.int32))),
    *((f, "temperature", t) for f in (*LOSSES, *RANKS) for t in (0.0, -1.0)),
    *((f, name, -1.0) for f in LOSSES for name in ("teacher_temperature", "neighbourhood")),
    *((f, name, "?") for f in LOSSES for name in ("scale", "objective", "method", "neighbourhood")),
    *((f, name, "?") for f in FEATURES for name in ("metric", "teacher_metric")),
    *((f, "method", "?") for f in RANKS),
    *((f, "options", o) for f in LOSSES for o in ("?", "?=1", "metric")),
    *((f, "student_candidates", ROWS) for f in DISTANCES),
    *((f, name, x) for f in FEATURES for name, t in (("student", X), ("teacher", Y),
                                           ("student_candidates", C), ("teacher_candidates", D))
      for x in (t[0], t.t().contiguous().t(), t[:4])),
    *((f, name, x) for f in FEATURES
      for name, t in (("student_candidates", C), ("teacher_candidates", D))
      for x in (t[:, :2].contiguous(), t.double(), t[:1])),
    *((f, name + (f is agreement) * "_distances", x) for f in (*DISTANCES, agreement)
      for name in ("student", "teacher")
      for x in (ROWS[:4], ROWS.t().contiguous().t(), ROWS[:, :5].contiguous(), ROWS.double())),
    (agreement, "nearest", 0),
    *((f, "weights", w) for f in RANKS for w in (SIX[:5], torch.ones(4, 6), SIX.double(),
                                           but(SIX, 5, -1), torch.ones(7))),
    *((soft_rank_backward, "upstream", g) for g in (ROWS[:4], ROWS.double(), ROWS.t())),
    *((f, "values", ROWS.t()) for f in RANKS),
]  # fmt: skip


@pytest.mark.parametrize(("call", "argument", "value"), WRONG)
def test_what_is_wrong_raises(call: Call, argument: str, value: Any) -> None:
    """Instead of being read beyond its end."""
    call()
    with pytest.raises((RuntimeError, ValueError), match=r"^\w+: (expected|unknown)"):
        call(**{argument: value})


def test_no_anchors_pull_nobody() -> None:
    """A gradient of candidates is zeros then, not what memory held."""
    for dtype in (torch.float32, torch.float64):
        x, y, c, d = (t.to(dtype) for t in (X[:0], Y[:0], C, D))
        options = 0.1, 0.0, LossSpec().packed(), False, True, True
        total, _, own, others = ops.native.coherence(
            x, c, y, d, None, None, torch.arange(0), *options
        )
        assert total == 0
        assert own.shape == (0, 3)
        assert torch.equal(others, torch.zeros_like(c))


@pytest.mark.parametrize("distances", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda small", "cuda pipeline"])
def test_no_coefficients_are_ones(
    backend: str, distances: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = "cpu"
    if backend.startswith("cuda"):
        request.getfixturevalue("emulate")(threads=64)
        device = DEVICE
        monkeypatch.setattr(cuda_kernels, "SMALL_CANDIDATES", 512 if backend == "cuda small" else 0)
    elif backend == "triton":
        if "cpu" not in triton.DEVICES and not torch.cuda.is_available():
            pytest.skip("triton has nothing to run on")
        device = triton.DEVICES[-1]
    operators = backends.REGISTRY[backend.split()[0]].operators()  # type: ignore[attr-defined]
    points = [None, *(t.to(device) for t in (X, Y, ROWS, OTHER_ROWS))]
    student, teacher = (points[3], points[4]) if distances else (points[1], points[2])
    asked = *LossSpec().temperatures, LossSpec().packed(distances), distances

    def evaluated(coefficients: torch.Tensor | None, flag: bool) -> Any:
        given = student, None, teacher, None, coefficients, None, None
        return operators.coherence(*given, *asked, flag, False)

    for flag in (False, True):
        for ours, expected in zip(
            evaluated(None, flag), evaluated(ONES.to(device), flag), strict=True
        ):
            assert torch.equal(ours, expected)
