"""Slips: small patches of the code, each with the tests that should notice it.

A slip is written where it stands, with as much around it as makes the place unique:

    [[slip]]
    name = "a candidate's weight is forgotten in ranks"
    file = "csrc/cpu/pairs.h"
    code = "sum += «weight * sigmoid(t) ⇒ sigmoid(t)»;"
    tests = ["tests/test_soft_rank.py"]  # optional: RELATED says which, otherwise

In C++ both versions are built and the environment chooses, so what stands there is an expression,
`«a + b ⇒ a - b»`, or whole statements, `«g.sync(); ⇒ »`, and types agree. Elsewhere any text
will do.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BINARY = re.compile(r"\s*[-+*/%|^&<>=]+\s")
"""How a text begins that is an operator and its right side: no expression."""

MARKED = re.compile(r"«(.*?) ?⇒ ?(.*?)»", re.DOTALL)

RELATED = {
    "csrc/cuda/": "corners cuda_rows cuda_races triton gpu loss_options accuracy",
    "csrc/": "operators corners rows soft_rank names loss_options autograd metrics precision "
    "reference threads modes memory validation properties accuracy bank cuda_rows",
    "kernels/": "corners triton gpu triton_compile",
    "pcoherence/backends/triton_": "corners triton gpu triton_compile",
    "pcoherence/backends/": "operators reference corners tf32 cuda_rows backends modes autograd "
    "memory validation triton gpu loss_options precision accuracy",
    "pcoherence/adapters/features": "adapters_features",
    "pcoherence/adapters/lightning": "adapters_lightning",
    "pcoherence/adapters/metric": "adapters_metric_learning",
    "pcoherence/adapters/sentence": "adapters_sentence_transformers",
    "pcoherence/adapters/torchmetrics": "adapters_torchmetrics",
    "pcoherence/transport": "transport tf32 validation docs",
    "pcoherence/metrics": "metrics adapters_torchmetrics validation distillation",
    "pcoherence/diagnostics": "diagnostics validation docs",
    "pcoherence/plots": "plots",
    "pcoherence/cached": "cached adapters_sentence_transformers",
    "pcoherence/bank": "bank distributed validation modes",
    "pcoherence/anchors": "anchors bank distributed validation",
    "pcoherence/distributed": "distributed bank validation",
    "pcoherence/": "reference validation names soft_rank anchors backends autograd modes "
    "loss_options corners inductor bank memory docs",
    "benchmarks/distillation/": "distillation",
    "benchmarks/gpu/": "gpu_check",
    "benchmarks/": "benchmarks",
}
"""Tests that know a file, those that end soon first: of the first prefix that fits."""


@dataclass(frozen=True)
class Choice:
    """Text [begin, end) of a file, and what stands there instead."""

    begin: int
    end: int
    new: str


@dataclass(frozen=True)
class Slip:
    name: str
    file: str
    code: str
    tests: tuple[str, ...]

    @property
    def native(self) -> bool:
        return self.file.startswith("csrc/")

    def choices(self, text: str) -> list[Choice]:
        """Where its file `text` changes; an error where that is not one place.

        Raises: ValueError.
        """
        marks = list(MARKED.finditer(self.code))
        if not marks:
            raise ValueError(f"{self.name}: code: expected «old ⇒ new»; got {self.code!r}")
        before = MARKED.sub(lambda mark: mark[1], self.code)
        if self.native and any(BINARY.match(part) for mark in marks for part in mark.groups()):
            raise ValueError(f"{self.name}: expected expressions or statements; got {self.code!r}")
        found = text.count(before)
        if found != 1:
            raise ValueError(f"{self.name}: {self.file} has {found} places like this:\n{before}")
        choices, at, read = [], text.index(before), 0
        for mark in marks:
            at += mark.start() - read
            choices.append(Choice(at, at + len(mark[1]), mark[2]))
            at, read = at + len(mark[1]), mark.end()
        return choices


def related(file: str) -> tuple[str, ...]:
    """Test files for a slip that names none. Raises: ValueError where none knows its file."""
    for prefix, names in RELATED.items():
        if file.startswith(prefix):
            return tuple(f"tests/test_{name}.py" for name in names.split())
    raise ValueError(f"{file}: expected a file of {', '.join(RELATED)}")


def read(path: Path) -> list[Slip]:
    """The slips of a TOML file. Raises: ValueError where a key is unknown or missing."""
    found = []
    for entry in tomllib.loads(path.read_text())["slip"]:
        known: dict[str, Any] = dict(entry)
        if "file" in known and "tests" not in known:
            known["tests"] = related(known["file"])
        if known.keys() != Slip.__dataclass_fields__.keys():
            raise ValueError(f"{path}: expected name, file, code and perhaps tests; got {entry}")
        found.append(Slip(**{**known, "tests": tuple(known["tests"])}))
    return found


def replaced(text: str, choices: Iterable[Choice]) -> str:
    """`text` with all choices made. Raises: ValueError where two overlap."""
    pieces, at = [], 0
    for choice in sorted(choices, key=lambda choice: (choice.begin, choice.end)):
        if choice.begin < at:
            raise ValueError(f"two slips overlap at {text[choice.begin : choice.end]!r}")
        pieces += [text[at : choice.begin], choice.new]
        at = choice.end
    return "".join([*pieces, text[at:]])


def slipped(slip: Slip, text: str) -> str:
    """Its file with the slip in it. Raises: ValueError, SyntaxError."""
    new = replaced(text, slip.choices(text))
    if slip.file.endswith(".py"):
        ast.parse(new)
    return new


def switch(slip: Slip, number: int, text: str) -> Iterator[Choice]:
    """In C++: its choices, made where the process was told this number."""
    for choice in slip.choices(text):
        old = text[choice.begin : choice.end]
        test = f"pcoherence_slip == {number}"
        if (old or choice.new).rstrip().endswith((";", "}")):
            new = f"{{ if ({test}) {{ {choice.new} }} else {{ {old} }} }}"
        else:
            new = f"({test} ? ({choice.new}) : ({old}))"
        yield Choice(choice.begin, choice.end, new)
