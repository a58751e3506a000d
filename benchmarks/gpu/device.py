"""The GPU, or in a rehearsal the CPU in its place.

With PCOHERENCE_REHEARSAL=1 everything that runs on a GPU runs on CPU tensors: the backends "cuda"
and "triton" are played by the CPU backend, events by the clock, a graph by calling again. What a
rehearsal says of kernels is nothing; what it shows is that the checks themselves work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pcoherence import backends
from pcoherence.backends import triton
from pcoherence.backends.cpu import CpuBackend
from pcoherence.backends.operators import Ported
from pcoherence.inputs import LossInputs
from pcoherence.spec import METHODS, LossSpec

REHEARSAL = os.environ.get("PCOHERENCE_REHEARSAL") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
BACKENDS = {"cuda": METHODS, "triton": triton.PORTED["method"]}
"""The GPU backends and their methods."""

PAIRS_MOST = 600
"""Points up to which a stand-in takes all pairs, when asked to: it has no thousand cores."""


class StandIn(CpuBackend):
    """The CPU backend under another's name, with the other's methods."""

    def __init__(self, name: str) -> None:
        self.name = name

    def ported(self) -> Ported:
        """As the backend that it stands for."""
        return {**super().ported(), "method": BACKENDS[self.name]}

    def loss(self, spec: LossSpec, inputs: LossInputs) -> Tensor:
        """As the CPU backend."""
        if spec.method == "pairs" and inputs.student.shape[0] > PAIRS_MOST:
            spec = dataclasses.replace(spec, method="auto")
        return super().loss(spec, inputs)


def rehearse() -> None:
    """Put the stand-ins in place."""
    backends.REGISTRY.update({name: StandIn(name) for name in BACKENDS})


def present() -> bool:
    """Whether there is a device to run on."""
    return REHEARSAL or torch.cuda.is_available()


def synchronize() -> None:
    """Wait until the device has done everything."""
    if not REHEARSAL:
        torch.cuda.synchronize()


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """Work goes to another stream, which waits for what came before and is waited for."""
    if REHEARSAL:
        yield
        return
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], Any], Any]:
    """A graph of the call, after a warm-up on a side stream: what replays it, what it writes."""
    with side_stream():
        for _ in range(3):
            call()
    if REHEARSAL:
        result = call()

        def again() -> None:
            for old, new in zip(result, call(), strict=True):
                old.copy_(new)

        return again, result
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def time_by_kernel(call: Callable[[], object]) -> list[tuple[str, float, int]]:
    """Kernels of one call by descending time: name, milliseconds, launches."""
    activity = torch.profiler.ProfilerActivity
    wanted = activity.CPU if REHEARSAL else activity.CUDA
    with torch.profiler.profile(activities=[wanted]) as profiler:
        call()
        synchronize()
    name = "self_cpu_time_total" if REHEARSAL else "self_device_time_total"
    found = [(e.key, getattr(e, name) / 1e3, e.count) for e in profiler.key_averages()]
    return sorted((row for row in found if row[1] > 0), key=lambda row: -row[1])


def lost() -> str | None:
    """Why the device serves this process no more, as after an illegal access; None: it does."""
    if REHEARSAL or not torch.cuda.is_available():
        return None
    try:
        synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None
