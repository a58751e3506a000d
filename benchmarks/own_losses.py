"""`python -m benchmarks.own_losses`: Smooth-AP by soft_rank, and written plainly; time and memory.

The loss is the code of docs/own_losses.rst itself. Each row is measured in a process of its own,
after both ways have been compared; one that does not fit the limit of memory says so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import measure
from .suite.worker import limit_memory, out_of_memory

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "own_losses.rst"

SIZES = (384, 1024, 4096)
"""A batch of the authors, and larger ones."""

FEATURES = 512
OF_A_CLASS = 4
"""As the authors draw batches."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(scores, hits, others), each [q, n] -> the loss, 0-d."""


def page() -> dict[str, Any]:
    """The names that the page's code defines; what it prints is dropped."""
    blocks = re.findall(r"^\.\. testcode::\n((?:\n|   .*\n)+)", PAGE.read_text(), re.M)
    names: dict[str, Any] = {"__name__": "page"}
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng():
        for block in blocks:
            exec(compile(textwrap.dedent(block), str(PAGE), "exec"), names)
    return names


def plain_smooth_ap(
    scores: Tensor, hits: Tensor, others: Tensor, temperature: float = 0.01
) -> Tensor:
    """The authors' formula, by all triples: rank_j = 1 + sum_{k != j} w_k sigmoid((s_k - s_j) / t).

    Memory q n^2, as in their program, which makes some more copies of it.
    """
    apart = scores[:, None, :] - scores[:, :, None]  # [q, j, k]
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    above = torch.sigmoid(apart / temperature).masked_fill(itself, 0)
    ranks = [1 + torch.einsum("qjk,qk->qj", above, w.to(above.dtype)) for w in (hits, others)]
    count = hits.sum(1)
    precision = (hits * ranks[0] / ranks[1]).sum(1) / count.clamp(min=1)
    return 1 - precision[count > 0].mean()


def batch(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Embeddings [n, FEATURES] near their classes' centres, a leaf, and labels [n]."""
    generator = torch.Generator().manual_seed(n)
    labels = torch.arange(n) // OF_A_CLASS
    centres, noise = (torch.randn(n, FEATURES, generator=generator) for _ in range(2))
    return (centres[labels] + 4 * noise).to(dtype).requires_grad_(), labels


def step(
    loss: Loss, n: int, dtype: torch.dtype = torch.float32
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward; a call returns the loss and its gradient."""
    of_batch = page()["of_batch"]
    embeddings, labels = batch(n, dtype)

    def call() -> tuple[Tensor, ...]:
        value = loss(*of_batch(embeddings, labels))
        return value.detach(), *torch.autograd.grad(value, embeddings)

    return call


def losses() -> dict[str, Loss]:
    """Both ways, by name."""
    return {"soft_rank": page()["smooth_ap"], "all triples": plain_smooth_ap}


def core_seconds(call: Callable[[], object], budget: float) -> list[float]:
    """Of 3 to 20 calls, the time of all cores, which does not count what other programs took."""
    found: list[float] = []
    while len(found) < 3 or (len(found) < 20 and sum(found) < budget):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return found


def row(who: str, n: int, memory_limit: float, budget: float) -> dict[str, Any]:
    """Median seconds and peak bytes, or why there are none; verified first, in float64."""
    results = [step(loss, 64, torch.float64)() for loss in losses().values()]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)
    call = step(losses()[who], n)
    limit_memory(int(memory_limit * 2**30), "cpu")
    try:
        peak = measure.peak_memory(call)
        seconds = core_seconds(call, budget)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return {"reason": f"more than {memory_limit:g} GiB"}
    return {"seconds": statistics.median(seconds), "bytes": peak}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.own_losses", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-limit", type=float, default=8.0, help="GiB; default: 8")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of a row; default: 5")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # one row, by the process for it
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.job is not None:
        print(json.dumps(row(asked.job, asked.sizes[0], asked.memory_limit, asked.budget)))
        return
    print(f"Smooth-AP, forward and backward, d {FEATURES}, float32, threads: {asked.threads}")
    print(f"{'n':>6}  {'':12}{'core time':>12}{'memory':>12}")
    for n in asked.sizes:
        for who in losses():
            command = [sys.executable, "-m", "benchmarks.own_losses", "--job", who]
            options = {"sizes": n, "threads": asked.threads, "budget": asked.budget}
            options["memory-limit"] = asked.memory_limit
            command += [
                part for name, value in options.items() for part in (f"--{name}", str(value))
            ]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout)
            if "reason" in found:
                print(f"{n:6,}  {who:12}{'-':>12}  {found['reason']}", flush=True)
            else:
                spent, size = (
                    f"{found['seconds'] * 1e3:,.1f} ms",
                    f"{found['bytes'] / 2**20:,.0f} MiB",
                )
                print(f"{n:6,}  {who:12}{spent:>12}{size:>12}", flush=True)


if __name__ == "__main__":
    main()
