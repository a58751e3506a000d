"""How things are measured: interleaved medians, and peak memory of a fresh process."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import pcoherence
from pcoherence.spec import LossSpec

from .kinds import GAUSSIAN, draw


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    budget: float = math.inf,
    at_least: int = 1,
    warm: bool = True,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Seconds of each call, the contestants taking turns: a slow spell hits all of them alike.

    Args:
        contestants: calls by name.
        repeats: of each, at most.
        budget: seconds after which no other round begins, once there were `at_least`.
        at_least: rounds.
        warm: call each once beforehand.
        device: type of the device on which they compute.
    """
    if warm:
        for call in contestants.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    for done in range(repeats):
        if done >= at_least and time.perf_counter() - begin > budget:
            break
        for name, call in contestants.items():
            seconds[name].append(seconds_of(call, device))
    return seconds


def seconds_of(call: Callable[[], object], device: str = "cpu") -> float:
    """One call: by the clock, or on a GPU between two events of its stream."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    first, last = (torch.Event(device, enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) * 1e-3


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios of neighbouring measurements."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


PLAIN: Mapping[str, Any] = {"objective": "mse", "temperature": 0.1, "neighbourhood": None}
"""The loss that is measured: all candidates alike, as whoever it is compared with has it."""


def defaults() -> dict[str, Any]:
    """The same options as the library has them, which cost more."""
    return {name: getattr(LossSpec(), name) for name in PLAIN}


def loss_step(n: int, d: int, kind: str = GAUSSIAN, **options: Any) -> Callable[[], None]:
    """Forward and backward of the plain loss on features of a kind, [n, d] each."""
    asked = {**PLAIN, **options}
    student, teacher = (draw(kind, n, d, seed=n + d + side).float() for side in (0, 1))
    student.requires_grad_()

    def step() -> None:
        student.grad = None
        pcoherence.perception_coherence_loss(student, teacher, **asked).backward()  # type: ignore[no-untyped-call]

    return step


PRODUCT_ROWS = 4096
"""Rows that the yardstick multiplies at a time: all of them up to here, 1 GiB at n 65,536."""


def products(
    n: int, d: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The yardsticks of forward, X X^T and Y Y^T, and of forward and backward: V X and V^T X too.

    Into memory allocated beforehand; above PRODUCT_ROWS in blocks of as many rows.
    """
    rows = min(n, PRODUCT_ROWS)
    x, y = (torch.randn(n, d, device=device).to(dtype) for _ in range(2))
    v = torch.randn(rows, n, device=device).to(dtype)
    square, tall = v.new_empty(rows, n), v.new_empty(n, d)

    def distances() -> None:
        for begin in range(0, n, rows):
            part = slice(begin, min(begin + rows, n))
            block = square[: part.stop - begin]
            torch.mm(x[part], x.T, out=block)
            torch.mm(y[part], y.T, out=block)

    def all_four() -> None:
        distances()
        for begin in range(0, n, rows):
            part = slice(begin, min(begin + rows, n))
            block = v[: part.stop - begin]
            torch.mm(block, x, out=tall[part])
        for begin in range(0, n, rows):
            part = slice(begin, min(begin + rows, n))
            block = v[: part.stop - begin]
            torch.addmm(tall, block.T, x[part], beta=float(begin > 0), out=tall)

    return distances, all_four


def four_products(n: int, d: int) -> Callable[[], None]:
    """The yardstick: X X^T, Y Y^T, V X and V^T X in float32, into memory allocated beforehand."""
    return products(n, d)[1]


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes by which resident memory rises at most during the call, sampled every millisecond."""
    before = peak = resident_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(peak, resident_bytes()) - before


def step_peak_memory(n: int, d: int) -> int:
    """Peak of one step, above inputs and gradient, in a process that has done nothing larger."""
    program = (
        "import torch\n"
        "from benchmarks.measure import loss_step, peak_memory\n"
        "loss_step(256, 16)()\n"  # threads, tables and torch's own first-use memory
        f"step = loss_step({n}, {d})\n"
        f"print(peak_memory(step) - {n * d * 4})\n"  # the gradient
    )
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return int(result.stdout.split()[-1])


def train(n: int, steps: int) -> int:
    """Train a small student, and return the bytes added after a twentieth of the steps."""
    student = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    teacher, criterion = torch.nn.Linear(32, 24), pcoherence.PerceptionCoherenceLoss()
    optimizer = torch.optim.Adam(student.parameters())
    before = 0
    for step in range(steps):
        if step == steps // 20:
            before = resident_bytes()
        x = torch.randn(n, 32)
        loss = criterion(student(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return resident_bytes() - before


def growth_in_training(n: int, steps: int) -> int:
    """What `train` returns, in a process of its own."""
    program = f"from benchmarks.measure import train; print(train({n}, {steps}))"
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return int(result.stdout.split()[-1])


def device_peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes above those in use before the call: resident, or on a GPU allocated by torch."""
    if device == "cpu":
        return peak_memory(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    return {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pcoherence": pcoherence.__version__,
        "commit": _commit() or "unknown",
    }


def _commit() -> str:
    """As PCOHERENCE_COMMIT says, for copies of the tree without .git; else as git does, if here."""
    told = os.environ.get("PCOHERENCE_COMMIT")
    if told:
        return told
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def write_json(path: Path, content: object) -> None:
    """Readable and stable: sorted keys, two spaces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
