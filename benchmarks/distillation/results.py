"""A student that was trained, and what was measured of it; a file of them, one a line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .methods import Options

SEARCH, TEST = "search", "test"
OPTION, BASELINE = "option", "baseline"
SOFT_TEACHER, SCALE = "soft teacher", "scale"
BATCH_RATES, BATCH_SIZE = "batch rates", "batch size"
COMPARISONS, BANK = "comparisons", "bank"
"""Phases of the protocol."""

DISTANCES = ("euclidean", "cosine")
ANY = "any"
"""Of measures that do not depend on a distance."""

Measures = Mapping[str, Mapping[str, float]]
"""By one of DISTANCES or ANY, then by name."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One student to be trained and measured; equal jobs give equal results.

    Attributes:
        phase: of the protocol.
        split: what is measured: "validation" or "test".
        group: points are compared within groups of this many; 0: over the whole batch.
        bank: so many points of former batches are compared, too.
        steps: of the optimizer; 0: as many as let it see the plan's number of points.
    """

    phase: str
    setting: str
    student: str
    method: str
    options: Options
    rate: float
    batch: int
    seed: int
    split: str
    group: int = 0
    bank: int = 0
    steps: int = 0

    @property
    def key(self) -> str:
        """What tells jobs apart."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Result:
    """What came of a job."""

    job: Job
    measures: Measures
    seconds: float = field(compare=False)

    def value(self, measure: str, distance: str) -> float:
        """Of a measure: by the distance, if it depends on one."""
        found = self.measures[ANY]
        return found[measure] if measure in found else self.measures[distance][measure]


def rounded(measures: Measures) -> Measures:
    """To the digits that a file keeps, so that a result is the same before and after."""
    return {
        distance: {name: float(f"{value:.5g}") for name, value in own.items()}
        for distance, own in measures.items()
    }


def load(path: Path) -> list[Result]:
    """The results of a file, none if there is no file; without a line that was cut off."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")  # empty, unless a run was cut off
    return [_read(line) for line in lines]


def append(path: Path, result: Result) -> None:
    """Add a line, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(_write(result) + "\n")


def save(path: Path, results: list[Result]) -> None:
    """Replace the file by these results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")  # whole or not at all, whenever it is interrupted
    part.write_text("".join(_write(result) + "\n" for result in results))
    part.replace(path)


def _write(result: Result) -> str:
    content = {"job": dataclasses.asdict(result.job), "measures": result.measures}
    return json.dumps(content | {"seconds": round(result.seconds, 2)})


def _read(line: str) -> Result:
    content = json.loads(line)
    return Result(Job(**content["job"]), content["measures"], content["seconds"])
