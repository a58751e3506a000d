"""Peak memory and time of a step, cached against uncached: `python -m benchmarks.cached`.

Every row is a process of its own, which has done nothing larger. Peak memory is what is resident
at most beyond what was before the step. The loss has few anchors, so that the encoder's time
shows. Nothing is asserted, nothing written.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pcoherence import PerceptionCoherenceLoss, cached_backward

from .measure import peak_memory, seconds_of

CHUNKS = (None, 8192, 2048, 512, 128)
"""None: uncached, the whole batch at once."""
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""glibc keeps what is freed of smaller blocks, so that gaps between chunks would count as used."""
MIB = 2**20


def perceptron() -> tuple[nn.Module, tuple[int, ...]]:
    """Eight wide layers and the shape of a point: 16 activations of 512 numbers each."""
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(512, 512), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(512, 64)), (512,)


def convolutions() -> tuple[nn.Module, tuple[int, ...]]:
    """Three layers on small images, of 16 to 32 channels."""
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 64),
    )
    return network, (1, 16, 16)


ENCODERS = {"mlp": perceptron, "conv": convolutions}


class Row(NamedTuple):
    """What one process measures."""

    peak: float
    """MiB, of the first step."""
    seconds: float
    """Median of further steps."""
    loss: float


def step_of(encoder: str, n: int, chunk: int | None, anchors: int) -> Callable[[], Tensor]:
    """One step's loss and gradient; chunk None: uncached. Every step draws the same anchors."""
    torch.manual_seed(0)
    student, shape = ENCODERS[encoder]()
    inputs, teacher = torch.randn(n, *shape), torch.randn(n, 128)
    criterion = PerceptionCoherenceLoss(num_anchors=anchors)

    def step() -> Tensor:
        torch.manual_seed(1)
        student.zero_grad()
        if chunk is not None:
            return cached_backward(student, inputs, criterion, teacher, chunk)
        loss: Tensor = criterion(student(inputs), teacher)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def measure(encoder: str, n: int, chunk: int | None, anchors: int, repeats: int) -> Row:
    """In this process."""
    step_of(encoder, 64, 32, 64)()  # threads, tables and torch's own first-use memory
    step = step_of(encoder, n, chunk, anchors)
    losses: list[Tensor] = []
    peak = peak_memory(lambda: losses.append(step()))
    seconds = statistics.median(seconds_of(step) for _ in range(repeats))
    return Row(peak / MIB, seconds, float(losses[0]))


def measured(encoder: str, chunk: int | None, options: argparse.Namespace) -> Row:
    """In a process of its own."""
    arguments = (encoder, options.n, chunk, options.anchors, options.repeats)
    program = (
        "import json, torch\n"
        f"torch.set_num_threads({options.threads})\n"
        "from benchmarks.cached import measure\n"
        f"print(json.dumps(measure(*{arguments!r})))\n"
    )
    command, environment = [sys.executable, "-c", program], os.environ | GIVEN_BACK
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return Row(*json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cached", description=__doc__)
    parser.add_argument("--n", type=int, default=16_384, help="points of the batch")
    parser.add_argument("--anchors", type=int, default=1024, help="of them, drawn for the loss")
    parser.add_argument("--repeats", type=int, default=3, help="steps that are timed")
    parser.add_argument("--encoder", choices=ENCODERS, help="one of them; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    table = Table(
        title=f"a step of {options.n:,} points, {options.anchors:,} anchors, "
        f"threads: {options.threads}"
    )
    for name in ("encoder", "chunk", "chunks", "peak MiB", "seconds", "loss"):
        table.add_column(name, justify="left" if name == "encoder" else "right")
    console = Console(width=80)
    for encoder in [options.encoder] if options.encoder else ENCODERS:
        for chunk in CHUNKS:
            with console.status(f"{encoder}, {'uncached' if chunk is None else chunk}"):
                row = measured(encoder, chunk, options)
            table.add_row(
                encoder,
                "uncached" if chunk is None else f"{chunk:,}",
                "" if chunk is None else str(-(-options.n // chunk)),
                f"{row.peak:,.0f}",
                f"{row.seconds:.2f}",
                f"{row.loss:.6f}",
            )
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
