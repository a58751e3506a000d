"""A row of results, and the files that hold them: JSON, a row a line."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

OK = "ok"
SKIPPED = "skipped"
"""Not a failure: nothing was tried."""


class Spread(NamedTuple):
    """Percentiles of a few measurements, by linear interpolation."""

    p20: float
    p50: float
    p80: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        p20, p50, p80 = (_digits(cuts[k]) for k in (1, 4, 7))
        return cls(p20, p50, p80, len(values))


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one contestant on one case.

    Attributes:
        case, family, n, d, dtype, objective, tau: the case.
        contestant: its name.
        status: "ok", "skipped", or what went wrong: "wrong result", "out of memory", "timeout",
            "crashed", "failed", "not installed", "not run".
        reason: a clause about a status that is not "ok".
        verified: what the result was compared with; empty: with nothing, another operator.
        loss_error, gradient_error: relative, against float64.
        forward, step: seconds of the loss without gradient, and of forward and backward.
        times_limit: step over the four matrix products measured in turn with it.
        peak_bytes: memory above inputs and gradient during a step.
        gflops: see `nominal_gflops`, of the median step.
        device, processor, threads, torch, python, pcoherence, commit: where it was measured.
    """

    case: str
    family: str
    n: int
    d: int
    dtype: str
    objective: str
    tau: float
    contestant: str
    status: str
    reason: str = ""
    verified: str = ""
    loss_error: float | None = None
    gradient_error: float | None = None
    forward: Spread | None = None
    step: Spread | None = None
    times_limit: Spread | None = None
    peak_bytes: int | None = None
    gflops: float | None = None
    device: str = ""
    processor: str = ""
    threads: str = ""
    torch: str = ""
    python: str = ""
    pcoherence: str = ""
    commit: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies a row among results."""
        return self.case, self.contestant, self.device


def nominal_gflops(n: int, d: int, seconds: float) -> float:
    """10^9 operations a second of the four matrix products alone, 2 n^2 d each.

    Two distance matrices, V X and V^T X. What else a contestant computes is not counted, and one
    that leaves half of a symmetric product out is credited with all of it: the figure compares
    times across sizes, it is not a counter of instructions.
    """
    return _digits(8.0 * n * n * d / seconds / 1e9)


def load(path: Path) -> list[Row]:
    """The rows of a file."""
    return [_row(content) for content in json.loads(path.read_text())]


def save(path: Path, rows: Sequence[Row]) -> None:
    """Replace the file at once, so that an interrupted run leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_content(row)) for row in rows]
    temporary = path.with_suffix(".partial")
    temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    temporary.replace(path)


def _content(row: Row) -> dict[str, Any]:
    """Fields that say something."""
    content = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    return {name: value for name, value in content.items() if value not in (None, "")}


def _row(content: dict[str, Any]) -> Row:
    for name in ("forward", "step", "times_limit"):
        if name in content:
            content[name] = Spread(*content[name])
    return Row(**content)


def _digits(value: float) -> float:
    """Four significant digits: more is noise, and makes files long."""
    return float(f"{value:.4g}") if math.isfinite(value) else value
