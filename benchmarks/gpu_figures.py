"""The GPU figures: loss and gradient against the matrix products, the reference and the clock.

    python -m benchmarks.gpu_figures --output DIR

Ratios within one run, medians, timed with CUDA events. Every figure is written as soon as it is
known, so that a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import pcoherence
from benchmarks import measure
from pcoherence.testing import reference_value_and_grad, relative_error

WARMUP, REPEATS = 3, 11


def milliseconds(*calls: Callable[[], object], repeats: int = REPEATS) -> list[list[float]]:
    """Times of each call, taken in turn; the device is idle before each."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        for _ in range(WARMUP):
            call()
    for _ in range(repeats):
        for call, found in zip(calls, times, strict=True):
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end))
    return times


def step(backend: str, n: int, d: int, **options: Any) -> Callable[[], None]:
    """Loss and gradient of [n, d] float32 features."""
    student = torch.randn(n, d, device="cuda").requires_grad_()
    teacher = torch.randn(n, d, device="cuda")

    def run() -> None:
        student.grad = None
        loss = pcoherence.perception_coherence_loss(student, teacher, backend=backend, **options)
        loss.backward()  # type: ignore[no-untyped-call]

    return run


def products(n: int, d: int) -> Callable[[], None]:
    """X X^T, Y Y^T, V X and V^T X in float32, into memory allocated beforehand."""
    x, y, v = (torch.randn(*shape, device="cuda") for shape in ((n, d), (n, d), (n, n)))
    square, tall = torch.empty(n, n, device="cuda"), torch.empty(n, d, device="cuda")

    def run() -> None:
        torch.mm(x, x.T, out=square)
        torch.mm(y, y.T, out=square)
        torch.mm(v, x, out=tall)
        torch.mm(v.T, x, out=tall)

    return run


def row(name: str, value: float, unit: str, bar: float, at_most: bool) -> dict[str, Any]:
    """One line of the table."""
    met = value <= bar if at_most else value >= bar
    sign = "at most" if at_most else "at least"
    return {"figure": name, "value": value, "unit": unit, "bar": f"{sign} {bar:g}", "met": met}


def against_products(backend: str, n: int, d: int, bar: float) -> dict[str, Any]:
    """Times the four products alone."""
    ours, theirs = milliseconds(step(backend, n, d), products(n, d))
    ratio = measure.median_ratio(ours, theirs)
    name = f"{backend}: n {n:,}, d {d}, {statistics.median(ours):.2f} ms, times the four products"
    return row(name, ratio, "x", bar, True)


def small_latency(backend: str) -> dict[str, Any]:
    """A step at n = 256 replayed from a CUDA graph."""
    call = step(backend, 256, 128)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    (times,) = milliseconds(graph.replay, repeats=101)
    name = f"{backend}: n 256, d 128 under a CUDA graph"
    return row(name, statistics.median(times), "ms", 0.25, True)


def against_compiled_reference(backend: str, n: int, bar: float) -> dict[str, Any]:
    """Forward and backward of torch.compile of the reference, over ours."""
    student = torch.randn(n, 128, device="cuda").requires_grad_()
    teacher = torch.randn(n, 128, device="cuda")
    compiled = torch.compile(pcoherence.reference.perception_coherence_loss)

    def reference() -> None:
        student.grad = None
        compiled(student, teacher).backward()  # type: ignore[no-untyped-call]

    name = f"{backend}: n {n:,}, d 128, faster than torch.compile of the reference"
    try:
        ours, theirs = milliseconds(step(backend, n, 128), reference, repeats=3)
    except torch.OutOfMemoryError:
        return {"figure": name, "value": None, "unit": "", "bar": "out of memory", "met": None}
    return row(name, measure.median_ratio(theirs, ours), "x", bar, False)


def large_memory(backend: str) -> dict[str, Any]:
    """Peak above inputs at n = 65,536, d = 256, forward and backward."""
    call = step(backend, 65536, 256)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return row(f"{backend}: n 65,536, d 256, peak memory", peak, "GiB", 8, True)


def accuracy(backend: str) -> Iterator[dict[str, Any]]:
    """Errors against float64 at n = 2,047, temperature 0.1."""
    student, teacher = torch.randn(2047, 64), torch.randn(2047, 64)
    anchors = torch.zeros(2047)
    anchors[::400] = 1
    truth = reference_value_and_grad(student, teacher, anchor_weights=anchors)
    leaf = student.cuda().requires_grad_()
    loss = pcoherence.perception_coherence_loss(
        leaf, teacher.cuda(), anchor_weights=anchors.cuda(), backend=backend
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    yield row(f"{backend}: loss error", relative_error(loss.cpu(), truth[0]), "", 5e-6, True)
    yield row(
        f"{backend}: gradient error", relative_error(gradient.cpu(), truth[1]), "", 2e-5, True
    )


def figures() -> Iterator[dict[str, Any]]:
    """All of them, the cheapest and most wanted first."""
    available = pcoherence.available_backends()
    backends = [name for name in ("cuda", "triton") if available[name] is None]
    for backend in backends:
        yield from accuracy(backend)
        yield small_latency(backend)
        yield against_products(backend, 8192, 512, 1.5)
        yield against_products(backend, 4096, 128, 2.0)
    for backend in backends:
        for n in (1024, 2048):
            yield against_compiled_reference(backend, n, 10 if backend == "cuda" else 5)
    for backend in backends:
        yield large_memory(backend)


def environment() -> dict[str, str]:
    """Where this was measured."""
    properties = torch.cuda.get_device_properties(0)
    return measure.environment() | {
        "device": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "cuda": str(torch.version.cuda),
    }


def main() -> None:
    """Measure, print a table, write figures.json after every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"))
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    where, rows = environment(), []
    for figure in figures():
        rows.append(figure)
        value = "-" if figure["value"] is None else f"{figure['value']:.3g}"
        print(f"{figure['figure']}: {value} {figure['unit']} ({figure['bar']})", flush=True)
        content = {"environment": where, "figures": rows}
        (output / "figures.json").write_text(json.dumps(content, indent=1) + "\n")
    table = Table(title=f"GPU figures on {where['device']}")
    for column in ("figure", "measured", "bar", ""):
        table.add_column(column)
    for figure in rows:
        verdict = {True: "met", False: "MISSED", None: "-"}[figure["met"]]
        value = "-" if figure["value"] is None else f"{figure['value']:.3g} {figure['unit']}"
        table.add_row(figure["figure"], value, figure["bar"], verdict)
    Console().print(table)


if __name__ == "__main__":
    main()
