"""The CPU operators called directly, as compiled graphs do: they check what they rely on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pcoherence import ops

pytestmark = pytest.mark.usefixtures("cpu_backend")

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(5, 3, generator=G), torch.randn(5, 4, generator=G)
C, D = torch.randn(6, 3, generator=G), torch.randn(6, 4, generator=G)
ONES, SIX = torch.ones(5), torch.ones(6)
ROWS, OTHER_ROWS = torch.rand(5, 6, generator=G), torch.rand(5, 6, generator=G)

Call = Callable[..., None]


def without(given: dict[str, Any], name: str) -> list[Any]:
    return [value for key, value in given.items() if key != name]


def feature_options(changed: dict[str, Any]) -> dict[str, Any]:
    return {
        "student": X, "student_candidates": C, "teacher": Y, "teacher_candidates": D,
        "coefficients": ONES, "anchor_weights": ONES, "candidate_weights": SIX,
        "self_index": torch.arange(5), "temperature": 0.1, "teacher_temperature": 0.2,
        "metric": "euclidean", "teacher_metric": "cosine", "scale": "anchor", "objective": "mse",
        "method": "auto",
    } | changed  # fmt: skip


def feature_sum(**changed: Any) -> None:
    ops.native.coherence_sum(*feature_options(changed).values(), True, True)


def feature_rows(**changed: Any) -> None:
    ops.native.coherence_rows(*without(feature_options(changed), "coefficients"))


def distance_options(changed: dict[str, Any]) -> dict[str, Any]:
    return {
        "student_distances": ROWS, "teacher_distances": OTHER_ROWS, "coefficients": ONES,
        "candidate_weights": SIX, "self_index": torch.arange(5), "temperature": 0.1,
        "teacher_temperature": 0.2, "scale": "anchor", "objective": "mse", "method": "auto",
    } | changed  # fmt: skip


def distance_sum(**changed: Any) -> None:
    ops.native.coherence_sum_from_distances(*distance_options(changed).values(), True)


def distance_rows(**changed: Any) -> None:
    given = without(distance_options(changed), "coefficients")
    ops.native.coherence_rows_from_distances(*given)


def rank_options(changed: dict[str, Any]) -> dict[str, Any]:
    return {
        "values": ROWS, "weights": SIX, "grad": ROWS, "temperature": 0.1, "method": "auto",
    } | changed  # fmt: skip


def soft_rank(**changed: Any) -> None:
    ops.native.soft_rank(*without(rank_options(changed), "grad"))


def soft_rank_backward(**changed: Any) -> None:
    ops.native.soft_rank_backward(*rank_options(changed).values())


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
                but(SIX, 5, torch.inf), SIX.double(), torch.ones(12)[::2], SIX[:, None])),
    *((f, "anchor_weights", w) for f in FEATURES
      for w in (ONES[:4], but(ONES, 4, -1), torch.ones(6))),
    *((f, "coefficients", torch.ones(n)) for f in (feature_sum, distance_sum) for n in (4, 6)),
    *((f, "self_index", i) for f in (*LOSSES, agreement)
      for i in (torch.arange(5) + 2, torch.arange(5) - 2, torch.arange(4),
                torch.arange(5, dtype=torch.int32))),
    *((f, "temperature", t) for f in (*LOSSES, *RANKS) for t in (0.0, -1.0)),
    *((f, "teacher_temperature", -1.0) for f in LOSSES),
    *((f, name, "?") for f in LOSSES for name in ("scale", "objective", "method")),
    *((f, name, "?") for f in FEATURES for name in ("metric", "teacher_metric")),
    *((f, "method", "?") for f in RANKS),
    *((f, "scale", "batch") for f in DISTANCES),
    *((f, name, x) for f in FEATURES for name, t in (("student", X), ("teacher", Y),
                                           ("student_candidates", C), ("teacher_candidates", D))
      for x in (t[0], t.t().contiguous().t(), t[:4])),
    *((f, name, x) for f in FEATURES
      for name, t in (("student_candidates", C), ("teacher_candidates", D))
      for x in (t[:, :2].contiguous(), t.double(), t[:1])),
    *((f, name, x) for f in (*DISTANCES, agreement) for name in
      ("student_distances", "teacher_distances")
      for x in (ROWS[:4], ROWS.t().contiguous().t(), ROWS[:, :5].contiguous(), ROWS.double())),
    (agreement, "nearest", 0),
    *((f, "weights", w) for f in RANKS for w in (SIX[:5], torch.ones(4, 6), SIX.double(),
                                           but(SIX, 5, -1), torch.ones(7))),
    *((soft_rank_backward, "grad", g) for g in (ROWS[:4], ROWS.double(), ROWS.t())),
    *((f, "values", ROWS.t()) for f in RANKS),
]  # fmt: skip


@pytest.mark.parametrize(("call", "argument", "value"), WRONG)
def test_what_is_wrong_raises(call: Call, argument: str, value: Any) -> None:
    """Instead of being read beyond its end."""
    call()
    with pytest.raises(RuntimeError, match=r"^\w+: (expected|unknown name)"):
        call(**{argument: value})


def test_no_anchors_pull_nobody() -> None:
    """A gradient of candidates is zeros then, not what memory held."""
    for dtype in (torch.float32, torch.float64):
        x, y, c, d = (t.to(dtype) for t in (X[:0], Y[:0], C, D))
        weights, options = (torch.ones(0, dtype=dtype), None, None), (0.1, 0.0)
        names = ("euclidean", "euclidean", "anchor", "mse", "auto")
        total, own, others = ops.native.coherence_sum(
            x, c, y, d, *weights, torch.arange(0), *options, *names, True, True
        )
        assert total == 0
        assert own.shape == (0, 3)
        assert torch.equal(others, torch.zeros_like(c))
