"""Every option of the loss, named once: the known names, their defaults and their checks."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

METRICS = ("euclidean", "sqeuclidean", "cosine", "cityblock")
SCALES = ("anchor", "none")
OBJECTIVES = ("mse", "l1", "huber", "cross_entropy", "spearman")
REDUCTIONS = ("mean", "sum", "none")
METHODS = ("auto", "grid", "scan", "pairs")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

Metric: TypeAlias = str | Callable[[Tensor, Tensor], Tensor]
"""A name from METRICS, or a callable: a [m, d], b [n, d] -> distances [m, n]."""


def check_name(argument: str, value: object, known: tuple[str, ...]) -> None:
    """Raise unless `value` is one of the `known` names."""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise TypeError(f"{argument}: expected one of {', '.join(known)}; got {kind} {value!r}")
    if value not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(known)}; got {value!r}")


def check_positive(argument: str, value: object) -> None:
    """Raise unless `value` is a finite number above 0, also as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        kind = type(value).__name__
        hint = " (take its .item())" if isinstance(value, Tensor) else ""
        raise TypeError(f"{argument}: expected a finite number above 0; got {kind} {value!r}{hint}")
    # Comparisons, which torch.compile can follow for a temperature that changes.
    large = isinstance(value, numbers.Rational) and value > sys.float_info.max  # type: ignore[operator]
    if large or not 0 < float(value) < math.inf:
        raise ValueError(f"{argument}: expected a finite number above 0; got {value!r}")


def check_share(argument: str, value: object) -> None:
    """Raise unless `value` is a number above 0 and at most 1."""
    if isinstance(value, numbers.Real) and not 0 < value <= 1:  # type: ignore[operator]
        raise ValueError(
            f"{argument}: expected a share of the candidates above 0 and at most 1, or None for "
            f"all alike; got {value!r} (k of n candidates are the share k / n)"
        )
    check_positive(argument, value)


def check_flag(argument: str, value: object) -> None:
    """Raise unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument}: expected True or False; got {type(value).__name__} {value!r}")


def check_metric(argument: str, value: object) -> None:
    """Raise unless `value` is a known metric name or a callable."""
    if callable(value):
        return
    known = ", ".join(METRICS)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise TypeError(f"{argument}: expected one of {known}, or a callable; got {kind} {value!r}")
    if value not in METRICS:
        raise ValueError(f"{argument}: expected one of {known}, or a callable; got {value!r}")


def check_metrics(metric: object, teacher_metric: object) -> None:
    """Raise unless both are known; teacher_metric None: the same as `metric`."""
    check_metric("metric", metric)
    if teacher_metric is not None:
        check_metric("teacher_metric", teacher_metric)


def check_count(argument: str, value: object) -> None:
    """Raise unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected an int of at least 1; got {value!r}")
    if value < 1:
        raise ValueError(f"{argument}: expected an int of at least 1; got {value}")


def fixed(value: Any) -> Any:
    """An option that torch.compile must know: it may take a number for a variable.

    It compiles again for another one.
    """
    if isinstance(value, str) or not torch.compiler.is_compiling():
        return value
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # imports much

    return guard_scalar(value)


NUMBERS: dict[str, Callable[[str, object], None]] = {
    "temperature": check_positive,
    "teacher_temperature": check_positive,
    "neighbourhood": check_share,
}
"""Options that are numbers, and what checks them."""


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """The options of the loss that are not tensors; checked on construction.

    Defaults of temperature, neighbourhood, metric, objective came of a study: docs/evidence.rst.

    Attributes:
        temperature: student's tau > 0, in units of the scaled distance.
        teacher_temperature: teacher's tau; None ranks the teacher hard (ties count 1/2).
        neighbourhood: share of candidates in (0, 1], nearest first, at which weights have halved;
            None: no weight depends on the rank.
        metric: student's distance, a name from METRICS or a callable.
        teacher_metric: teacher's distance; None means the same as `metric`.
        scale: what distances are divided by: the mean of an anchor's, or nothing.
        objective: a name from OBJECTIVES.
        reduction: over anchors, a name from REDUCTIONS.
        num_anchors: how many anchors to draw at random for an unbiased estimate; None takes all.
        method: how a fast backend sums kernels, a name from METHODS.
        backend: who computes, a name from BACKENDS.

    Raises:
        TypeError, ValueError: naming the option, what was expected and what came.
    """

    temperature: float = 0.03
    teacher_temperature: float | None = None
    neighbourhood: float | None = 0.4
    metric: Metric = "euclidean"
    teacher_metric: Metric | None = None
    scale: str = "anchor"
    objective: str = "cross_entropy"
    reduction: str = "mean"
    num_anchors: int | None = None
    method: str = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, check in NUMBERS.items():
            value = getattr(self, name)
            if value is not None or name == "temperature":
                check(name, value)
                object.__setattr__(self, name, float(value))  # whatever number it is; it is frozen
        check_metrics(self.metric, self.teacher_metric)
        check_name("scale", self.scale, SCALES)
        check_name("objective", self.objective, OBJECTIVES)
        check_name("reduction", self.reduction, REDUCTIONS)
        if self.num_anchors is not None:
            check_count("num_anchors", self.num_anchors)
        check_name("method", self.method, METHODS)
        check_name("backend", self.backend, BACKENDS)

    @property
    def resolved_teacher_metric(self) -> Metric:
        """The teacher's metric with its default filled in."""
        return self.metric if self.teacher_metric is None else self.teacher_metric

    @property
    def temperatures(self) -> tuple[float, float]:
        """Student's and teacher's as the operators take them: 0 ranks the teacher hard."""
        return self.temperature, self.teacher_temperature or 0.0

    def packed(self, distances: bool = False) -> str:
        """The options of a row in one word: "objective=l1,metric=cosine,teacher_metric=cosine".

        What kernels take unsaid (ROW_OPTIONS) is left out: they need not know of it. With
        `distances`, of rows given as distances, so are the metrics, which may be callables.
        """
        parts = []
        for name, unsaid in ROW_OPTIONS.items():
            value = getattr(self, name)
            if value != unsaid:
                parts.append(f"{name}={fixed(value)}")
        if not distances:
            parts += [f"metric={self.metric}", f"teacher_metric={self.resolved_teacher_metric}"]
        return ",".join(parts)

    @classmethod
    @functools.lru_cache(maxsize=256)
    def unpacked(cls, packed: str, temperature: float, teacher_temperature: float) -> LossSpec:
        """What was packed, checked; `teacher_temperature` as in `temperatures`.

        Raises:
            TypeError, ValueError: as on construction; or a name is unknown.
        """
        options = dict(ROW_OPTIONS)
        for part in packed.split(",") if packed else ():
            name, _, text = part.partition("=")
            if name in ROW_OPTIONS:
                options[name] = text if isinstance(ROW_OPTIONS[name], str) else float(text)
            elif name in ("metric", "teacher_metric"):
                options[name] = text
            else:
                raise ValueError(f"options: expected what LossSpec.packed gives; got {part!r}")
        soft = None if teacher_temperature == 0 else teacher_temperature
        return cls(temperature=temperature, teacher_temperature=soft, **options)


TEMPERATURES = {"temperature", "teacher_temperature"}
"""Options that go beside the packed ones, as numbers."""

OF_DISTANCES = {"metric", "teacher_metric"}
"""Options that rows which come as distances do not have."""

OF_A_CALL = {"reduction", "num_anchors", "backend"}
"""Options that are done with before a row is computed."""

ROW_NAMES = {"scale": SCALES, "objective": OBJECTIVES, "method": METHODS}
"""Options of a row that are one of some names; others are a number, or None."""

ROW_OPTIONS: dict[str, Any] = {
    field.name: ROW_NAMES[field.name][0] if field.name in ROW_NAMES else None
    for field in dataclasses.fields(LossSpec)
    if field.name not in TEMPERATURES | OF_DISTANCES | OF_A_CALL
}
"""The options that the kernels of a row are asked for, and what they take unsaid.

That is the first name, or no number: not the library's defaults, which may change.
"""
