"""How things are measured: interleaved medians, and peak memory of a fresh process."""

from __future__ import annotations

import json
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


def interleaved(
    contestants: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each call, the contestants taking turns: a slow spell hits all of them alike."""
    for call in contestants.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios of neighbouring measurements."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def loss_step(n: int, d: int, **options: Any) -> Callable[[], None]:
    """Forward and backward of the loss on standard normal features, [n, d] each."""
    generator = torch.Generator().manual_seed(n + d)
    student = torch.randn(n, d, generator=generator).requires_grad_()
    teacher = torch.randn(n, d, generator=generator)

    def step() -> None:
        student.grad = None
        pcoherence.perception_coherence_loss(student, teacher, **options).backward()  # type: ignore[no-untyped-call]

    return step


def four_products(n: int, d: int) -> Callable[[], None]:
    """The yardstick: X X^T, Y Y^T, V X and V^T X in float32, into memory allocated beforehand."""
    x, y, v = torch.randn(n, d), torch.randn(n, d), torch.randn(n, n)
    square, tall = torch.empty(n, n), torch.empty(n, d)

    def multiply() -> None:
        torch.mm(x, x.T, out=square)
        torch.mm(y, y.T, out=square)
        torch.mm(v, x, out=tall)
        torch.mm(v.T, x, out=tall)

    return multiply


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


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True
    ).stdout.strip()
    return {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pcoherence": pcoherence.__version__,
        "commit": commit or "unknown",
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def write_json(path: Path, content: object) -> None:
    """Readable and stable: sorted keys, two spaces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
