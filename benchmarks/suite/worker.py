"""The process of one contestant on one case; see run.py, which starts it.

`python -m benchmarks.suite.worker JOB OUTCOME`: both are JSON files. Whatever ends this process, a
signal included, becomes a row there.
"""

from __future__ import annotations

import itertools
import json
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import measure
from . import cases, contestants, verify
from .contestants import OTHER, PRODUCTS, Contestant, Loss, UnavailableError
from .rows import Spread, nominal_gflops

BUILD_SECONDS = 180
"""For what is not measured: KeOps and inductor start a C++ compiler. Loaded machines are slow."""

TURNS = 4
"""Inputs that take turns, so that no call finds its own in the cache from the call before."""

MOST_ROUNDS = 200
FEWEST_ROUNDS = 3

SLOW_SECONDS = 1.0
"""A call this long leaves nothing to warm up."""

WARM_POINTS = 64


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process is told.

    Attributes:
        case, contestant: names.
        device: type of the device.
        budget: seconds of measuring, beyond FEWEST_ROUNDS.
        time_limit: seconds, once everything is built and warm.
        memory_limit: bytes above what the libraries take.
        truth: file of the case's truth.
        plugin: file that defines more contestants, or None.
    """

    case: str
    contestant: str
    device: str
    budget: float
    time_limit: float
    memory_limit: int
    truth: str
    plugin: str | None = None

    def save(self, path: Path) -> None:
        """For `load`."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Job:
        """As saved."""
        return cls(**json.loads(path.read_text()))


def run(job: Job) -> dict[str, Any]:
    """What the row of this job says beyond case and machine."""
    case = cases.find(job.case)
    contestant = contestants.known(Path(job.plugin) if job.plugin else None)[job.contestant]
    _end_after(BUILD_SECONDS)
    if contestant.name == PRODUCTS.name:
        return _measured(*_products(case, job.device), case, job)
    try:
        loss = contestant.build(case)
    except UnavailableError as reason:
        return {"status": "not installed", "reason": str(reason)}
    limit_memory(job.memory_limit, job.device)
    try:
        return _contest(contestant, loss, case, job)
    except verify.WrongResultError as reason:
        return {"status": "wrong result", "reason": str(reason)}
    except Exception as error:
        if out_of_memory(error):
            limit = f"more than {job.memory_limit / 2**30:.3g} GiB"
            return {"status": "out of memory", "reason": limit}
        return {"status": "failed", "reason": f"{type(error).__name__}: {_first_line(error)}"}


def _contest(contestant: Contestant, loss: Loss, case: cases.Case, job: Job) -> dict[str, Any]:
    """Memory of the first call, then whether it is right, then times."""
    _warm(contestant, loss, case, job.device)
    _end_after(job.time_limit)
    inputs = [case.inputs(turn, job.device) for turn in range(TURNS)]
    result: list[Tensor] = []

    def first_call() -> None:
        value = loss(*inputs[0], None)
        value.backward()  # type: ignore[no-untyped-call]
        result.append(value.detach())

    start = time.perf_counter()
    peak = measure.device_peak_memory(first_call, job.device)
    slow = time.perf_counter() - start > SLOW_SECONDS
    student = inputs[0][0]
    assert student.grad is not None
    outcome: dict[str, Any] = {}
    if contestant.check != OTHER:
        truth = verify.load(Path(job.truth), job.device)
        batch = result[0], student.grad
        errors = verify.check(contestant.check, case, loss, batch, truth, job.device)
        outcome = {"loss_error": errors.loss, "gradient_error": errors.gradient}
        outcome["verified"] = truth.text
    outcome["peak_bytes"] = max(0, peak - student.grad.nbytes)
    return outcome | _measured(*_steps(loss, inputs), case, job, warm=not slow)


def _warm(contestant: Contestant, loss: Loss, case: cases.Case, device: str) -> None:
    """Threads, tables, torch's first-use memory, and whatever the contestant compiles."""
    student, teacher = case.inputs(0, device)
    if not contestant.by_shape:
        points = min(case.n, WARM_POINTS)
        student = student.detach()[:points].clone().requires_grad_()
        teacher = teacher[:points].clone()
    loss(student, teacher, None).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        loss(student, teacher, None)


def _steps(
    loss: Loss, inputs: list[tuple[Tensor, Tensor]]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The loss alone, and forward and backward, each going round the inputs."""
    turns, forward_turns = itertools.cycle(inputs), itertools.cycle(inputs)

    def forward() -> None:
        with torch.no_grad():
            loss(*next(forward_turns), None)

    def step() -> None:
        student, teacher = next(turns)
        student.grad = None
        loss(student, teacher, None).backward()  # type: ignore[no-untyped-call]

    return forward, step


def _products(case: cases.Case, device: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two and four products; of half precision, on a CPU, in float32, as the losses do it."""
    half = case.torch_dtype not in (torch.float32, torch.float64)
    dtype = torch.float32 if half and device == "cpu" else case.torch_dtype
    return measure.products(case.n, case.d, dtype, device)


def _measured(
    forward: Callable[[], None],
    step: Callable[[], None],
    case: cases.Case,
    job: Job,
    *,
    warm: bool = True,
) -> dict[str, Any]:
    """Times, in turn with the limit's."""
    _lift_memory_limit()  # the limit's own blocks are not the contestant's
    seconds = measure.interleaved(
        {"forward": forward, "step": step, "limit": _products(case, job.device)[1]},
        MOST_ROUNDS,
        budget=job.budget,
        at_least=FEWEST_ROUNDS,
        warm=warm,
        device=job.device,
    )
    ratios = [a / b for a, b in zip(seconds["step"], seconds["limit"], strict=True)]
    spread = Spread.of(seconds["step"])
    return {
        "status": "ok",
        "forward": Spread.of(seconds["forward"]),
        "step": spread,
        "times_limit": Spread.of(ratios),
        "gflops": nominal_gflops(case.n, case.d, spread.p50),
    }


# --- limits ------------------------------------------------------------------------------------


def _end_after(seconds: float) -> None:
    """The system ends this process then, whatever native code it is in: SIGALRM."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def limit_memory(limit: int, device: str) -> None:
    """Allocations beyond the limit fail. On a GPU the host's address space says nothing."""
    if device == "cpu":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        used = pages * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, hard))
    else:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))


def _lift_memory_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def out_of_memory(error: Exception) -> bool:
    """However torch, C++ and Python say it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = str(error).lower()
    return any(
        clause in said for clause in ("allocate memory", "out of memory", "bad_alloc", "enomem")
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:160]


def main() -> None:
    """Do the job; write the outcome."""
    job, outcome = Job.load(Path(sys.argv[1])), Path(sys.argv[2])
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32, for everybody
    if job.contestant == "":
        verify.save(verify.truth(cases.find(job.case), job.device), Path(job.truth))
        outcome.write_text("{}")
    else:
        outcome.write_text(json.dumps(run(job)))


if __name__ == "__main__":
    main()
