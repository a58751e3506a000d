"""Tests that need several processes: a test file runs itself as a script in each of them."""

from __future__ import annotations

import datetime
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

# Before there is a group, which would be its functions' default argument, and never end.
import torch.distributed.nn  # noqa: F401

CHECKOUT = os.pathsep.join(path for path in sys.path if path)
"""Where this process finds its modules: others are to test the same code, not what is installed."""


GLOO = "pt_gloo_runloop"
"""What the threads of a gloo group are called; they end with it."""


def threads() -> list[str]:
    """The names of this process's threads, where Linux tells them."""
    return [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]


def run_in_processes(script: str, size: int, folder: Path) -> None:
    """Run `script` in `size` processes; the first failure's output is the error."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": CHECKOUT}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(size), str(folder / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


def end_group(held: bool = False) -> None:
    """The end of a process in a gloo group.

    A thread of gloo that is still at work when the interpreter goes aborts the process, so the
    group must have ended. `held`: it cannot, because torch holds it for good, with the meshes of
    DTensors in many caches and in graphs of torch.compile.
    """
    gc.collect()  # frames of errors that were expected, in cycles
    dist.monitored_barrier()  # nobody leaves while another still communicates
    dist.destroy_process_group()
    if held:
        os._exit(0)  # without the interpreter's end; nothing was printed that must be flushed
    assert GLOO not in threads(), "a group outlived destroy_process_group"


def join_group(work: Callable[[int, int], None], held: bool = False) -> None:
    """In such a script: `work(rank, size)` inside a gloo process group; see `end_group`."""
    rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    work(rank, size)
    end_group(held)
