"""Memory stays flat over many steps: each group of jobs in a process of its own, one job after the
other, as what the heap does depends on all that was asked of it before."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not sys.platform.startswith("linux"):
    pytest.skip("resident memory is read from /proc", allow_module_level=True)

WARM, STEPS = 40, 240
MOST_MIB = 3.0
"""What may be added in STEPS: an n x n float32 matrix a step adds 15 MiB at n = 128."""

CALLS, MOST_BYTES = 4000, 12
"""What a call may leave in use: less than the smallest allocation, 24 bytes. A leak shows here long
before it shows in resident memory."""

Step = Callable[[], object]


def loss_step(n: int, d: int = 16, dtype: torch.dtype = torch.float32, **options: object) -> Step:
    from pcoherence import PerceptionCoherenceLoss

    student = torch.randn(n, d, dtype=dtype, requires_grad=True)
    teacher = torch.randn(n, d + 3, dtype=dtype)
    criterion = PerceptionCoherenceLoss(**options)  # type: ignore[arg-type]

    def step() -> None:
        student.grad = None
        criterion(student, teacher).sum().backward()

    return step


def training(n: int) -> Step:
    """A student that learns."""
    from pcoherence import PerceptionCoherenceLoss

    student = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    teacher, criterion = torch.nn.Linear(32, 24), PerceptionCoherenceLoss()
    optimizer = torch.optim.Adam(student.parameters())

    def step() -> None:
        x = torch.randn(n, 32)
        loss = criterion(student(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def changing_sizes() -> Step:
    """As last batches and buckets of sequences have them."""
    steps = itertools.cycle([loss_step(n) for n in (256, 97, 301, 160, 64, 512)])
    return lambda: next(steps)()


def ranks(rows: int, n: int, temperature: float) -> Step:
    from pcoherence import soft_rank

    values = torch.randn(rows, n, requires_grad=True)

    def step() -> None:
        values.grad = None
        soft_rank(values, temperature).square().mean().backward()

    return step


def measures(n: int) -> Step:
    from pcoherence import coherence

    x, y = torch.randn(n, 16), torch.randn(n, 16)
    return lambda: coherence(x, y)


def transport(d: int) -> Step:
    from pcoherence import optimal_transport_loss

    student, teacher = torch.randn(64, d, requires_grad=True), torch.randn(64, d)

    def step() -> None:
        student.grad = None
        optimal_transport_loss(student, teacher).backward()

    return step


def with_bank(n: int) -> Step:
    from pcoherence import CandidateBank

    return loss_step(n, bank=CandidateBank(300))


GROUPS: dict[str, Callable[[], list[Step]]] = {
    "sizes": lambda: [loss_step(n) for n in (256, 128, 200, 400, 64)],
    "training": lambda: [training(128), training(256), changing_sizes()],
    "dtypes and metrics": lambda: [
        loss_step(160, dtype=torch.float64),
        loss_step(256, dtype=torch.bfloat16),
        loss_step(256, metric="cosine"),
        loss_step(200, metric="cityblock"),
        loss_step(200, metric=lambda a, b: torch.cdist(a, b, p=2.0)),
    ],
    "methods and options": lambda: [
        loss_step(128, method="scan", temperature=1e-3),
        loss_step(128, method="pairs"),
        loss_step(256, objective="cross_entropy", teacher_temperature=0.1),
        loss_step(256, reduction="none"),
        loss_step(256, num_anchors=100),
        loss_step(24, backend="reference"),
    ],
    "everything else": lambda: [
        ranks(8, 3000, 1.0),
        ranks(2, 40_000, 1e-3),
        measures(256),
        transport(64),
        with_bank(128),
    ],
}


def small_calls() -> list[Step]:
    """Every operator of the extension."""
    from pcoherence.spec import LossSpec

    x = torch.rand(6, 6)
    wider = x * torch.arange(1, 60, 10)[:, None]
    weights, self_index = torch.ones(6), torch.arange(6)
    others = weights, weights, self_index, 0.1, 0.0, LossSpec().packed()
    call = torch.ops.pcoherence
    points = (x, None, x, None)
    flags = itertools.product((False, True), (False, True))
    return [
        *(
            lambda distances=distances, flag=flag: call.coherence(
                *points, *others, distances, flag, False
            )
            for distances, flag in flags
        ),
        lambda: call.soft_rank(x, None, None, 0.1, "auto"),
        lambda: call.soft_rank(x, None, x, 0.1, "auto"),
        lambda: call.soft_rank(wider, None, None, 0.1, "grid"),  # buffers grow from row to row
        lambda: call.rank_agreement(x, x, self_index, 2),
    ]


@pytest.mark.parametrize(
    ("group", "threads"), [*((g, 1) for g in GROUPS), ("sizes", 2), ("leaks", 1)]
)
@pytest.mark.usefixtures("cpu_backend")
def test_memory_stays_flat(group: str, threads: int) -> None:
    if group == "leaks" and not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("glibc from 2.33 on says what is in use")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, group]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("cpu_backend")
def test_calls_of_many_sizes_leave_a_bounded_pool() -> None:
    """Each takes two blocks that serve no other size: 230 MiB, if all of them were kept."""
    command = [sys.executable, __file__, "pool"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


class Heap(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def bytes_in_use() -> int:
    """Of the heap."""
    gc.collect()
    report = ctypes.CDLL(None).mallinfo2
    report.restype = Heap
    return int(report().uordblks)


def main(group: str) -> int:
    """The growth of every job, printed; 1 if one grows."""
    found = []
    for number, step in enumerate(GROUPS[group]()):
        for _ in range(WARM):
            step()
        before = resident_mib()
        for _ in range(STEPS):
            step()
        found.append(resident_mib() - before)
        print(f"job {number}: {found[-1]:.1f} MiB in {STEPS} steps, at most {MOST_MIB}")
    return int(max(found) > MOST_MIB)


def main_leaks() -> int:
    """What calls leave in use, printed; 1 if one leaves something."""
    found = []
    for number, call in enumerate(small_calls()):
        for _ in range(CALLS // 4):
            call()
        before = bytes_in_use()
        for _ in range(CALLS):
            call()
        found.append((bytes_in_use() - before) / CALLS)
        print(f"job {number}: {found[-1]:.1f} bytes a call left in use, at most {MOST_BYTES}")
    return int(max(found) > MOST_BYTES)


def main_pool() -> int:
    """What stays resident; 1 if it is more than the pool and a tenth."""
    from pcoherence import library

    loss_step(64)()
    before = resident_mib()
    for n in (4096, 2700, 1800, 1200):
        loss_step(n)()
    found = resident_mib() - before
    kept = library.about()["constants"]["pool bytes"] / 2**20
    print(f"{found:.1f} MiB stay, at most {kept} and a tenth")
    return int(found > 1.1 * kept)


if __name__ == "__main__":
    import pcoherence  # noqa: F401  # the operators

    mains = {"leaks": main_leaks, "pool": main_pool}
    sys.exit(mains[sys.argv[1]]() if sys.argv[1] in mains else main(sys.argv[1]))
