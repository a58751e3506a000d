"""Who computes the cases: every backend and method of ours, peers, and the limits."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

import pcoherence

from .cases import Case

Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(student [n, d], teacher [n, d], anchor weights [n] or None) -> the loss, 0-d."""

PRECISE, SAME, OTHER = "precise", "same loss", "another operator"
"""How a result is checked: to the library's accuracy; to be the same loss; not at all."""


class UnavailableError(Exception):
    """A contestant cannot run here; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """Someone who computes a loss.

    Attributes:
        name: unique.
        note: what it is, for the page.
        build: returns its loss for a case, or raises `UnavailableError`.
        check: PRECISE, SAME or OTHER.
        devices: types of device that it serves.
        by_shape: whether every shape is compiled anew; that time is not counted.
    """

    name: str
    note: str
    build: Callable[[Case], Loss]
    check: str = SAME
    devices: tuple[str, ...] = ("cpu", "cuda")
    by_shape: bool = False


# --- ours --------------------------------------------------------------------------------------

BACKENDS = {"cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}
"""Our backends and the devices on which they are measured (Triton's interpreter is for tests)."""


def _ours(backend: str, method: str, devices: tuple[str, ...]) -> Contestant:
    def build(case: Case) -> Loss:
        reason = pcoherence.available_backends()[backend]
        if reason is not None:
            raise UnavailableError(reason)

        def loss(student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
            return pcoherence.perception_coherence_loss(
                student,
                teacher,
                anchor_weights=weights,
                method=method,
                backend=backend,
                **case.options,
            )

        return loss

    note = f'`backend="{backend}", method="{method}"`'
    return Contestant(
        name=f"{backend} {method}", note=note, build=build, check=PRECISE, devices=devices
    )


# --- peers -------------------------------------------------------------------------------------


def _reference(case: Case) -> Loss:
    def loss(student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        return pcoherence.reference.perception_coherence_loss(
            student, teacher, anchor_weights=weights, **case.options
        )

    return loss


def _compiled(case: Case) -> Loss:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes of its own
    compiled = torch.compile(_reference(case), dynamic=False)

    def loss(student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        # Always with weights: without and with would be compiled twice, half a minute each.
        return compiled(student, teacher, _or_ones(weights, student))

    return loss


def _keops(case: Case) -> Loss:
    """Distances by torch, [n, n]; the sums over pairs of candidates by KeOps, storing no n^3."""
    try:
        from pykeops.torch import LazyTensor
    except ImportError as error:
        raise UnavailableError(f"{error}; pip install '.[peers]'") from error
    if case.objective != "mse":
        raise UnavailableError("only written for objective mse")

    def sums(distances: Tensor, compare: Callable[[LazyTensor], LazyTensor]) -> Tensor:
        """sum_k compare(d_ij - d_ik); distances [n, n]: anchors are a batch dimension."""
        own, other = distances[:, :, None, None], distances[:, None, :, None]
        total: Tensor = compare(LazyTensor(own) - LazyTensor(other)).sum(2)
        return total[..., 0]

    def loss(student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        n = student.shape[0]
        itself = torch.eye(n, dtype=torch.bool, device=student.device)
        d_s = _distances(student, itself)
        d_s = d_s / (d_s.sum(1, keepdim=True) / (n - 1) * case.tau)
        with torch.no_grad():
            d_t = _distances(teacher, itself)
            # The anchor itself, at distance 0, is taken out of each sum again.
            ranks_t = sums(d_t, lambda z: 0.5 * (z.sign() + 1)) - 0.5 * (d_t.sign() + 1)
        ranks_s = sums(d_s, lambda z: 1 / (1 + (-z).exp())) - torch.sigmoid(d_s)
        residuals = (ranks_s - ranks_t).masked_fill(itself, 0) / (n - 1)
        return _mean(residuals.square().sum(1) / (n - 1), weights)

    return loss


def _torchsort(case: Case) -> Loss:
    """torchsort.soft_rank (a projection on the permutahedron) instead of sums of sigmoids."""
    try:
        import torchsort
    except ImportError as error:
        raise UnavailableError(f"{error}; pip install --no-build-isolation torchsort") from error

    def loss(student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        n = student.shape[0]
        itself = torch.eye(n, dtype=torch.bool, device=student.device)
        d_s = _distances(student, itself)
        d_s = d_s / d_s.mean(1, keepdim=True)
        ranks_s = torchsort.soft_rank(d_s, regularization_strength=case.tau)
        with torch.no_grad():
            ranks_t = _distances(teacher, itself).argsort(1).argsort(1) + 1.0
        return _mean(((ranks_s - ranks_t) / n).square().mean(1), weights)

    return loss


# --- transport ---------------------------------------------------------------------------------


def _transport(case: Case) -> Loss:
    return lambda student, teacher, _: pcoherence.optimal_transport_loss(student, teacher)


def pot_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`optimal_transport_loss` with its defaults, by POT alone; any dtype."""
    try:
        import ot
    except ImportError as error:
        raise UnavailableError(f"{error}; pip install '.[transport]'") from error
    columns = [(x - x.mean(0)) / x.std(0, correction=0) for x in (student, teacher)]
    costs = ot.dist(columns[0].T, columns[1].T) / len(student)
    uniform = [costs.new_full((size,), 1 / size) for size in costs.shape]
    cost: Tensor = ot.emd2(*uniform, costs)
    return cost


# --- limits ------------------------------------------------------------------------------------


def _cdist(case: Case) -> Loss:
    def loss(student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        with torch.no_grad():
            torch.cdist(teacher, teacher)
        return torch.cdist(student, student).sum()

    return loss


def _products(case: Case) -> Loss:
    raise NotImplementedError("measured by measure.four_products")


PRODUCTS = Contestant(
    name="products",
    note="the four matrix products that the loss is made of; the limit is half",
    build=_products,
    check=OTHER,
)

_KNOWN = (
    PRODUCTS,
    Contestant(
        name="cdist",
        note="`torch.cdist` of both sides, and its backward pass: distances without any ranks",
        build=_cdist,
        check=OTHER,
    ),
    *(
        _ours(backend, method, devices)
        for backend, devices in BACKENDS.items()
        for method in ("auto", "grid", "scan", "pairs")
    ),
    Contestant(name="reference", note="the definition in plain torch, n^3", build=_reference),
    Contestant(
        name="compile", note="`torch.compile` of the reference", build=_compiled, by_shape=True
    ),
    Contestant(name="keops", note="KeOps: all pairs, nothing of size n^3 stored", build=_keops),
    Contestant(
        name="torchsort",
        note="`torchsort.soft_rank` of the same distances: another operator, time alone compares",
        build=_torchsort,
        check=OTHER,
    ),
    Contestant(
        name="transport exact",
        note="`OptimalTransportLoss()`: neurons instead of ranks",
        build=_transport,
        check=PRECISE,
    ),
    Contestant(
        name="POT",
        note="the same by `ot.dist` and `ot.emd2` alone",
        build=lambda case: lambda student, teacher, _: pot_loss(student, teacher),
    ),
)


def known(plugin: Path | None = None) -> dict[str, Contestant]:
    """All contestants by name, with those of a Python file that defines CONTESTANTS."""
    added: Iterable[Contestant] = runpy.run_path(str(plugin))["CONTESTANTS"] if plugin else ()
    return {contestant.name: contestant for contestant in (*_KNOWN, *added)}


def of_case(case: Case, plugin: Path | None = None) -> list[Contestant]:
    """Those who are to compute a case: limits and ours, peers, those of the plugin."""
    everybody = known(plugin)
    names: list[str] = [name for name in ("products", "cdist") if name in case.others]
    names += [f"{backend} {method}" for backend in BACKENDS for method in case.methods]
    names += [name for name in case.others if name not in names]
    names += list(everybody)[len(_KNOWN) :]
    return [everybody[name] for name in names]


# --- helpers -----------------------------------------------------------------------------------


def _or_ones(weights: Tensor | None, like: Tensor) -> Tensor:
    return like.new_ones(like.shape[0]) if weights is None else weights


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Over anchors, [n] -> 0-d."""
    return losses.mean() if weights is None else (weights * losses).sum() / weights.sum()


def _distances(points: Tensor, itself: Tensor) -> Tensor:
    """Euclidean, [n, n]; exactly 0, and without gradient, from a point to itself."""
    return torch.cdist(points, points).masked_fill(itself, 0)
