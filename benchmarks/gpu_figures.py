"""The GPU figures: loss and gradient against the matrix products, the reference and the clock.

    python -m benchmarks.gpu_figures --output DIR [--backend cuda|triton]

Ratios within one run, medians, timed with CUDA events. Every figure is written to
figures-BACKEND.json as soon as it is known, so that a run that is cut off leaves what it had; one
that cannot be measured says why in place of its bar, and the others follow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import traceback
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
BACKENDS = ("cuda", "triton")


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


def without_bar(name: str, value: float | None, unit: str, instead: str = "-") -> dict[str, Any]:
    """One line that nothing is held to."""
    return {"figure": name, "value": value, "unit": unit, "bar": instead, "met": None}


def accuracy(backend: str) -> Iterator[dict[str, Any]]:
    """Errors against float64 at n = 2,047, temperature 0.1."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2047, 64, generator=generator) for _ in range(2))
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


def replayed(backend: str, n: int, d: int, bar: float | None) -> Iterator[dict[str, Any]]:
    """A step replayed from a CUDA graph: without the host."""
    call = step(backend, n, d)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    (times,) = milliseconds(graph.replay, repeats=101 if n <= 1024 else REPEATS)
    name, time = f"{backend}: n {n:,}, d {d} under a CUDA graph", statistics.median(times)
    yield without_bar(name, time, "ms") if bar is None else row(name, time, "ms", bar, True)


def kernels(backend: str, n: int, d: int) -> Iterator[dict[str, Any]]:
    """Where the device's time goes: a table of kernels, printed, and their sum."""
    call = step(backend, n, d)
    for _ in range(WARMUP):
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found = profiler.key_averages()
    print(found.table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))
    time = sum(event.self_device_time_total for event in found) / 1e3
    yield without_bar(f"{backend}: n {n:,}, d {d}, sum of kernels", time, "ms")


def eager(backend: str, n: int) -> Iterator[dict[str, Any]]:
    """A step as users call it, where the host's launches count."""
    (times,) = milliseconds(step(backend, n, 128), repeats=101)
    yield without_bar(f"{backend}: n {n:,}, d 128, eager", statistics.median(times), "ms")


def against_products(backend: str, n: int, d: int, bar: float) -> Iterator[dict[str, Any]]:
    """Times the four products alone, and what those take."""
    ours, theirs = milliseconds(step(backend, n, d), products(n, d))
    ratio = measure.median_ratio(ours, theirs)
    name = f"{backend}: n {n:,}, d {d}, {statistics.median(ours):.2f} ms, times the four products"
    yield row(name, ratio, "x", bar, True)
    yield without_bar(f"the four products: n {n:,}, d {d}", statistics.median(theirs), "ms")


def memory(backend: str) -> Iterator[dict[str, Any]]:
    """Peak above inputs, forward and backward: the largest symmetric batch, and a large one."""
    peak = measure.device_peak_memory(step(backend, 8192, 512), "cuda") / 2**30
    yield without_bar(f"{backend}: n 8,192, d 512, peak memory", peak, "GiB")
    peak = measure.device_peak_memory(step(backend, 65536, 256), "cuda") / 2**30
    yield row(f"{backend}: n 65,536, d 256, peak memory", peak, "GiB", 8, True)


def against_compiled_reference(backend: str, n: int, bar: float) -> Iterator[dict[str, Any]]:
    """Forward and backward of torch.compile of the reference, over ours."""
    torch.compiler.reset()  # each n is compiled for itself, as a first call would be
    student = torch.randn(n, 128, device="cuda").requires_grad_()
    teacher = torch.randn(n, 128, device="cuda")
    compiled = torch.compile(pcoherence.reference.perception_coherence_loss, dynamic=False)

    def reference() -> None:
        student.grad = None
        compiled(student, teacher).backward()  # type: ignore[no-untyped-call]

    ours, theirs = milliseconds(step(backend, n, 128), reference, repeats=3)
    name = f"{backend}: n {n:,}, d 128, faster than torch.compile of the reference"
    yield row(name, measure.median_ratio(theirs, ours), "x", bar, False)


def figures(backend: str) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    """What is measured and its rows, the cheapest and most wanted first; compiling takes longest.

    Nothing is measured before its rows are asked for.
    """
    yield "accuracy", accuracy(backend)
    yield "CUDA graph, n 256", replayed(backend, 256, 128, 0.25)
    for n in (256, 1024):
        yield f"eager, n {n:,}", eager(backend, n)
    for n, d, bar in ((8192, 512, 1.5), (4096, 128, 2.0)):
        yield f"products, n {n:,}, d {d}", against_products(backend, n, d, bar)
    for n, d in ((256, 128), (1024, 128), (8192, 512)):
        yield f"kernels, n {n:,}", kernels(backend, n, d)
    yield "memory", memory(backend)
    yield "CUDA graph, n 1,024", replayed(backend, 1024, 128, None)
    for n in (1024, 2048):
        bar = 10 if backend == "cuda" else 5
        yield f"compiled reference, n {n:,}", against_compiled_reference(backend, n, bar)


def attempt(name: str, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows; if measuring them fails, one that says so, so that others can follow."""
    try:
        yield from rows
    except Exception as error:
        traceback.print_exc()
        yield without_bar(name, None, "", repr(error)[:160])  # two lines of a terminal


def environment() -> dict[str, str]:
    """Where this was measured."""
    properties = torch.cuda.get_device_properties(0)
    return measure.environment() | {
        "device": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "cuda": str(torch.version.cuda),
    }


def measured(figure: dict[str, Any]) -> str:
    """The value and its unit."""
    return "-" if figure["value"] is None else f"{figure['value']:.3g} {figure['unit']}"


def run(backend: str, output: Path) -> list[dict[str, Any]]:
    """Measure one backend, write its file after every figure, print a table; the rows."""
    where, rows = environment(), []
    print(where, flush=True)
    for name, found in figures(backend):
        for figure in attempt(f"{backend}: {name}", found):
            rows.append(figure)
            print(f"{figure['figure']}: {measured(figure)} ({figure['bar']})", flush=True)
            content = {"environment": where, "figures": rows}
            path = output / f"figures-{backend}.json"
            path.write_text(json.dumps(content, indent=1) + "\n")
    table = Table(title=f"{backend} on {where['device']}")
    for column in ("figure", "measured", "bar", ""):
        table.add_column(column)
    for figure in rows:
        verdict = {True: "met", False: "MISSED", None: "-"}[figure["met"]]
        table.add_row(figure["figure"], measured(figure), figure["bar"], verdict)
    Console(markup=False).print(table)  # an error's brackets are no markup
    return rows


def main() -> None:
    """Measure; the exit status says whether all that was asked for could be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--backend", choices=BACKENDS, help="all that are available if not given")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    missing = {name: pcoherence.available_backends()[name] for name in BACKENDS}
    if arguments.backend and missing[arguments.backend] is not None:
        sys.exit(f"{arguments.backend}: {missing[arguments.backend]}")
    chosen = [name for name in BACKENDS if arguments.backend in (None, name)]
    rows = [figure for name in chosen if missing[name] is None for figure in run(name, output)]
    sys.exit(int(any(figure["value"] is None for figure in rows)))


if __name__ == "__main__":
    main()
