"""The named cases: one list for every backend and every peer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kinds import GAUSSIAN, KINDS, draw
from ..measure import PLAIN

PEERS = ("reference", "compile", "keops", "torchsort")
LIMITS = ("products", "cdist")
TRANSPORT = "transport"
"""The objective of the cases that match neurons instead of ranking points."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One loss to compute; student and teacher are of one kind, [n, d] each.

    Attributes:
        family: what the case is for; a table of the page holds one family.
        n, d: points, and features of both sides.
        dtype: of the inputs, a name in torch.
        objective: as in `perception_coherence_loss`, or "transport": `optimal_transport_loss`.
        tau: the student's temperature.
        kind: of both sides' points, a name from KINDS.
        methods: of ours, by which every backend computes it.
        others: peers and limits that compute it too.
        quick: whether a quick run takes it.
        full_on: device types on which only a full run takes it.
    """

    family: str
    n: int
    d: int = 128
    dtype: str = "float32"
    objective: str = "mse"
    tau: float = 0.1
    kind: str = GAUSSIAN
    methods: tuple[str, ...] = ("auto",)
    others: tuple[str, ...] = ()
    quick: bool = False
    full_on: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique, and made of what differs from the ordinary case."""
        parts = [self.family, f"n{self.n}", f"d{self.d}"]
        parts += [self.dtype] if self.dtype != "float32" else []
        parts += [self.objective] if self.objective not in ("mse", self.family) else []
        parts += [f"tau{self.tau:g}"] if self.tau != 0.1 else []
        parts += [self.kind.replace(" ", "_")] if self.kind != GAUSSIAN else []
        return "-".join(parts)

    @property
    def options(self) -> dict[str, Any]:
        """Of the loss."""
        return {**PLAIN, "temperature": self.tau, "objective": self.objective}

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the inputs."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def inputs(self, turn: int, device: str) -> tuple[Tensor, Tensor]:
        """Student, a leaf that requires gradients, and teacher; [n, d], another draw each turn."""
        student, teacher = (
            draw(self.kind, self.n, self.d, seed=2 * turn + side).to(self.torch_dtype)
            for side in (0, 1)
        )
        return student.to(device).requires_grad_(), teacher.to(device)


def _sizes() -> Iterable[Case]:
    """How time, memory and error grow: n from 64 to 65,536.

    The peers get as far as 4,096 where they do not fail before. A step of n 32,768 takes a CPU of
    two cores some 20 s, of 65,536 a minute and a half: those are for full runs there.
    """
    methods = {64: ("auto", "scan", "pairs"), 4096: ("auto", "scan")}
    for n in (2**k for k in range(6, 17)):
        peers = PEERS if n <= 4096 and n != 128 else ()
        limits = LIMITS if n in (64, 256, 1024, 4096, 16384) or n > 16384 else ()
        three = methods[64] if n in (512, 1024) else ("auto",)
        yield Case(
            family="sizes",
            n=n,
            methods=methods.get(n, three),
            others=peers + limits,
            quick=n in (64, 256, 1024),
            full_on=("cpu",) if n > 16384 else (),
        )


CASES: tuple[Case, ...] = (
    *_sizes(),
    *(Case(family="width", n=n, d=512, others=LIMITS) for n in (1024, 4096)),
    # 1e-2: near hard ranks, where the grid has many bins; 1: everything is compared softly.
    *(
        Case(family="temperature", n=1024, tau=tau, methods=("grid", "scan", "pairs"))
        for tau in (1e-2, 1.0)
    ),
    *(
        Case(family="objective", n=1024, objective=objective)
        for objective in ("l1", "huber", "cross_entropy", "spearman")
    ),
    *(Case(family="data", n=4096, kind=kind, others=LIMITS) for kind in KINDS if kind != GAUSSIAN),
    *(
        Case(family="data", n=4096, kind=kind, objective="cross_entropy", tau=0.03)
        for kind in (GAUSSIAN, "10 clusters", "outlier")
    ),
    # n 512: the largest that the reference computes within the memory limit, in float32.
    *(
        Case(
            family="precision",
            n=512,
            dtype=dtype,
            methods=("grid", "scan", "pairs"),
            others=("reference",),
        )
        for dtype in ("float32", "float64", "bfloat16")
    ),
    *(
        Case(
            family="transport",
            n=1024,
            d=d,
            objective=TRANSPORT,
            methods=(),
            others=("transport exact", "POT"),
        )
        for d in (128, 512)
    ),
)


def find(name: str) -> Case:
    """The case of that name."""
    for case in CASES:
        if case.name == name:
            return case
    raise ValueError(f"case: expected one of `python -m benchmarks list`; got {name!r}")
