"""What a GPU measures: loss and gradient against the matrix products, the reference and the clock.

    python -m benchmarks.gpu.figures --journal FILE --backend cuda|triton --part speed

Ratios within one run, medians, timed with events. Every figure is a line of the journal as soon as
it is known; one that cannot be measured says why, and the others follow. Parts: "speed", what is
wanted first; "accuracy"; "large", n = 65,536; "compiled", torch.compile of the reference;
"choices", which products and how many rows at a time (choices.py).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pcoherence
from benchmarks import kinds, measure
from benchmarks.gpu import choices, device, journal
from pcoherence.backends.products import full_float32
from pcoherence.testing import ACCURACY, make_case, relative_error, truth

WARMUP, REPEATS = 3, 11
SMALL_REPEATS = 101
"""Of calls up to 1,024 points, which take a millisecond and vary."""

SIZES = ((256, 512), (1024, 512), (4096, 128), (8192, 512))
CHOICE_SIZES = ((8192, 512), (4096, 128))
"""Where products take most of the time, and where rows do; the rule is about the first."""
KINDS = ("outlier", "heavy tails", "50 clusters", "10 clusters")
"""Data other than Gaussian: points that make the range of every row long, gaps, and near pairs."""

AT_MOST = {
    "float32: error of the loss": ACCURACY[torch.float32][0],
    "float32: error of the gradient": ACCURACY[torch.float32][1],
    "n 65,536, d 256: peak memory": 8.0,
}
AT_MOST_CUDA = {
    "n 8,192, d 512: eager, times the products": 0.6,
    "n 4,096, d 128: eager, times the products": 1.5,
    "n 65,536, d 256: eager, times the products": 1.5,
    "n 256, d 512: as a graph": 0.25,
}
AT_LEAST_CUDA = {"n 1,024, d 128: faster than torch.compile of the reference": 25.0}
"""What figures are held to: estimates by counting operations and bytes, from before any run."""

KERNELS = 14
"""Lines of a table of kernels: nearly all that a call launches."""

PARTS = ("speed", "accuracy", "large", "compiled", "choices")

Event = dict[str, Any]


def scaled(n: int) -> int:
    """A number of points; a rehearsal's are an eighth."""
    return n // 8 if device.REHEARSAL else n


def points(kind: str, n: int, d: int, seed: int) -> Tensor:
    """Float32 [n, d] on the device."""
    return kinds.draw(kind, n, d, seed).float().to(device.DEVICE)


def step(backend: str, n: int, d: int, kind: str = "gaussian") -> Callable[[], tuple[Tensor, ...]]:
    """Loss and gradient of [n, d] float32 features."""
    student, teacher = points(kind, n, d, 0).requires_grad_(), points(kind, n, d, 1)

    def run() -> tuple[Tensor, ...]:
        loss = pcoherence.perception_coherence_loss(
            student, teacher, backend=backend, **measure.PLAIN
        )
        return loss.detach(), *torch.autograd.grad(loss, student)

    return run


def products(n: int, d: int) -> Callable[[], None]:
    """X X^T, Y Y^T, V X and V^T X in float32, into memory allocated beforehand."""
    call = measure.products(n, d, device=device.DEVICE)[1]

    def run() -> None:
        with full_float32():
            call()

    return run


def milliseconds(*calls: Callable[[], object], repeats: int) -> list[list[float]]:
    """Times of each call, taken in turn."""
    for call in calls:
        for _ in range(WARMUP):
            call()
    named = {str(i): call for i, call in enumerate(calls)}
    seconds = measure.interleaved(named, repeats, warm=False, device=device.DEVICE)
    return [[1e3 * second for second in found] for found in seconds.values()]


def place(n: int, d: int, kind: str = "gaussian") -> str:
    """How figures of a size and kind of data begin."""
    return f"n {scaled(n):,}, d {d}" + ("" if kind == "gaussian" else f", {kind}")


def figure(name: str, value: float, unit: str) -> Event:
    """Something measured."""
    return {"figure": name, "value": value, "unit": unit}


def held(backend: str, event: Event) -> Event:
    """The event with what it is held to, if anything; a rehearsal is held to nothing."""
    name, value = str(event.get("figure")), event.get("value")
    if device.REHEARSAL or value is None:
        return event
    cudas = backend == "cuda"
    most = AT_MOST.get(name) or (AT_MOST_CUDA.get(name) if cudas else None)
    least = AT_LEAST_CUDA.get(name) if cudas else None
    if most is not None:
        return {**event, "bar": f"at most {most:g}", "met": value <= most}
    if least is not None:
        return {**event, "bar": f"at least {least:g}", "met": value >= least}
    return event


def at_size(backend: str, n: int, d: int, kind: str = "gaussian") -> Iterator[Event]:
    """A step, eager and replayed from a graph, beside the four products."""
    repeats = SMALL_REPEATS if n <= 1024 else REPEATS
    call, limit = step(backend, scaled(n), d, kind), products(scaled(n), d)
    where = place(n, d, kind)
    ours, theirs = milliseconds(call, limit, repeats=repeats)
    yield figure(f"{where}: eager", statistics.median(ours), "ms")
    if kind == "gaussian":
        yield figure(f"{where}: the four products", statistics.median(theirs), "ms")
    ratio = measure.median_ratio(ours, theirs)
    yield figure(f"{where}: eager, times the products", ratio, "x")
    replay, _ = device.captured(call)
    replayed, theirs = milliseconds(replay, limit, repeats=repeats)
    yield figure(f"{where}: as a graph", statistics.median(replayed), "ms")
    ratio = measure.median_ratio(replayed, theirs)
    yield figure(f"{where}: as a graph, times the products", ratio, "x")


def by_kernel(backend: str, n: int, d: int, kind: str = "gaussian") -> Iterator[Event]:
    """Where the device's time goes in one call."""
    call = step(backend, scaled(n), d, kind)
    for _ in range(WARMUP):
        call()
    found = device.time_by_kernel(call)
    where = place(n, d, kind)
    yield figure(f"{where}: kernels", sum(row[1] for row in found), "ms")
    yield {"time": where, "kernels": found[:KERNELS]}


def errors(backend: str, dtype: torch.dtype) -> tuple[float, float]:
    """Of loss and gradient, against float64, at n = 2,047."""
    n, d = 2047, 64
    anchors = torch.zeros(n)
    anchors[::400] = 1
    student, teacher = (make_case("gaussian", n, d, dtype=dtype, seed=i) for i in (0, 1))
    right = truth(student, teacher, anchor_weights=anchors, **measure.PLAIN)
    leaf = student.to(device.DEVICE).requires_grad_()
    loss = pcoherence.perception_coherence_loss(
        leaf,
        teacher.to(device.DEVICE),
        anchor_weights=anchors.to(device.DEVICE, dtype),
        backend=backend,
        **measure.PLAIN,
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    return relative_error(loss.cpu(), right[0]), relative_error(gradient.cpu(), right[1])


def accuracy(backend: str) -> Iterator[Event]:
    """Errors in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for what, error in zip(("loss", "gradient"), errors(backend, dtype), strict=True):
            yield figure(f"{name}: error of the {what}", error, "")


def by_choice(backend: str, n: int, d: int) -> Iterator[Event]:
    """Every way of products and rows beside the default; and what the rule makes of it."""
    where, found = place(n, d), []
    for way in choices.compare(
        lambda: device.captured(step(backend, scaled(n), d))[0],
        lambda: errors(backend, torch.float32),
        milliseconds,
        REPEATS,
    ):
        found.append(way)
        name = f"{where}: {way.products}, {way.rows}"
        yield figure(f"{name}: times the default", way.time, "x")
        yield figure(f"{name}: error of the loss, times float32's", way.loss_error, "x")
        yield figure(f"{name}: error of the gradient, times float32's", way.gradient_error, "x")
    best = choices.chosen(found)
    (time_of_best,) = (way.time for way in found if (way.products, way.rows) == best)
    yield figure(f"{where}: choice: {', '.join(best)}", time_of_best, "x")


def large(backend: str) -> Iterator[Event]:
    """Memory above inputs: of the largest symmetric batch, and of a large one; its time."""
    for n, d, timed in ((8192, 512, False), (65536, 256, True)):
        call = step(backend, scaled(n), d)
        peak = measure.device_peak_memory(call, device.DEVICE)
        yield figure(f"{place(n, d)}: peak memory", peak / 2**30, "GiB")
        if timed:
            seconds = measure.seconds_of(call, device.DEVICE)
            yield figure(f"{place(n, d)}: eager", 1e3 * seconds, "ms")
            four = products(scaled(n), d)
            four()
            limit = measure.seconds_of(four, device.DEVICE)
            yield figure(f"{place(n, d)}: eager, times the products", seconds / limit, "x")


def compiled(backend: str) -> Iterator[Event]:
    """Forward and backward of the reference, as it is and by torch.compile, over ours."""
    # Not at 2,048: n^3 numbers would exhaust the memory.
    n, d = 1024, 128
    student, teacher = (
        points("gaussian", scaled(n), d, 0).requires_grad_(),
        points("gaussian", scaled(n), d, 1),
    )
    plain = pcoherence.reference.perception_coherence_loss
    ours = step(backend, scaled(n), d)
    for name, call in (
        ("the reference", plain),
        ("torch.compile of the reference", torch.compile(plain, dynamic=False)),
    ):

        def theirs(call: Callable[..., Tensor] = call) -> Tensor:
            return torch.autograd.grad(call(student, teacher), student)[0]

        mine, others = milliseconds(ours, theirs, repeats=3)
        where = place(n, d)
        yield figure(f"{where}: {name}", statistics.median(others), "ms")
        yield figure(f"{where}: faster than {name}", measure.median_ratio(others, mine), "x")


def parts(backend: str) -> dict[str, list[tuple[str, Iterator[Event]]]]:
    """What is measured, by part, the most wanted first; nothing is before it is asked for."""
    sizes = [(f"n {n:,}, d {d}", n, d) for n, d in SIZES]
    speed = [(name, at_size(backend, n, d)) for name, n, d in reversed(sizes)]
    speed += [(f"kernels, {name}", by_kernel(backend, n, d)) for name, n, d in reversed(sizes)]
    for kind in KINDS:
        speed += [(kind, at_size(backend, 4096, 128, kind))]
        speed += [(f"kernels, {kind}", by_kernel(backend, 4096, 128, kind))]
    return {
        "speed": speed,
        "accuracy": [("accuracy", accuracy(backend))],
        "large": [("large", large(backend))],
        "compiled": [("compiled reference", compiled(backend))],
        "choices": [
            (f"choices, n {n:,}, d {d}", by_choice(backend, n, d)) for n, d in CHOICE_SIZES
        ],
    }


def attempt(name: str, events: Iterator[Event]) -> Iterator[Event]:
    """The events; where measuring fails, one that says so, so that others can follow."""
    try:
        yield from events
    except Exception as error:
        traceback.print_exc()
        yield {"figure": name, "value": None, "unit": "", "message": repr(error)[:160]}


def main() -> None:
    """Measure; the exit status says whether all could be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--group", default="figures")
    parser.add_argument("--backend", choices=tuple(device.BACKENDS), required=True)
    parser.add_argument("--part", nargs="+", choices=PARTS, required=True)
    arguments = parser.parse_args()
    if device.REHEARSAL:
        device.rehearse()
    missing = pcoherence.available_backends()[arguments.backend]
    if missing is not None:
        journal.write(arguments.journal, arguments.group, figure="all", value=None, message=missing)
        sys.exit(f"{arguments.backend}: {missing}")
    failed = False
    earlier, _ = journal.read(arguments.journal)
    begun = {event.get("begin") for event in earlier if event["group"] == arguments.group}
    wanted = [found for part in arguments.part for found in parts(arguments.backend)[part]]
    write = partial(journal.write, arguments.journal, arguments.group)
    for name, events in wanted:
        if name in begun:  # by a process that died of it
            continue
        write(begin=name, measures=True, at=time.time())
        for event in map(partial(held, arguments.backend), attempt(name, events)):
            failed |= "figure" in event and event["value"] is None
            write(backend=arguments.backend, **event)
            print(event, flush=True)
        write(end=name)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
