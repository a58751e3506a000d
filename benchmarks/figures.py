"""The figures that the README quotes: accuracy, speed, memory, repeatability.

`python -m benchmarks.figures` measures, prints a table with the bar that each figure should
clear, writes benchmarks/results/figures.json, and with --readme puts the table into README.md.
Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

import pcoherence
from pcoherence.testing import (
    ACCURACY,
    CASES,
    make_case,
    reference_value_and_grad,
    relative_error,
    root_mean_square,
    tolerances,
)

from . import measure
from .kinds import GAUSSIAN, KINDS

RESULTS = Path(__file__).parent / "results" / "figures.json"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"


class Figure(NamedTuple):
    """One number, the bar it should clear, and whether it does."""

    name: str
    measured: str
    bar: str
    met: bool


def at_most(name: str, value: float, bar: float, unit: str = "") -> Figure:
    """A figure that should not exceed its bar."""
    return Figure(name, f"{value:.3g}{unit}", f"at most {bar:g}{unit}", value <= bar)


def at_least(name: str, value: float, bar: float, unit: str = "") -> Figure:
    """A figure that should reach its bar."""
    return Figure(name, f"{value:.3g}{unit}", f"at least {bar:g}{unit}", value >= bar)


# --- accuracy ----------------------------------------------------------------------------------

SIZES = (2, 3, 17, 130, 511, 2047)
TEMPERATURES = (1e-4, 1e-2, 0.1, 1.0, 10.0)
ANCHORS = 6
"""Weighted anchors of a case: the float64 reference costs n^2 for each."""
MOST_DRAWS = 12


def relative_errors(
    found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Of loss and gradient. A loss of a few points may vanish: floor 0.1."""
    loss, gradient = (relative_error(*pair, 0.1) for pair in zip(found, truth, strict=True))
    return loss, gradient


def errors(
    student: Tensor, teacher: Tensor, truth: tuple[Tensor, Tensor], **options: object
) -> tuple[float, float]:
    """Errors of a fast backend."""
    leaf = student.clone().requires_grad_()
    loss = pcoherence.perception_coherence_loss(leaf, teacher, **options)  # type: ignore[arg-type]
    loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return relative_errors((loss, leaf.grad), truth)


def pooled_errors(
    case: str, n: int, tau: float, dtype: torch.dtype
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Errors of each method and of brute force, (loss, gradient), over fresh draws of a case."""
    methods: dict[str, list[tuple[float, float]]] = {"auto": [], "scan": []}
    brute = []
    for draw in range(max(2, min(MOST_DRAWS, 2048 // n))):
        student = make_case(case, n, 16, dtype=dtype, seed=n + 1000 * draw)
        teacher = make_case(case, n, 24, dtype=dtype, seed=n + 1000 * draw + 1)
        weights = torch.zeros(n, dtype=dtype)
        weights[torch.linspace(0, n - 1, min(n, ANCHORS)).long()] = 1.0
        options = {**measure.PLAIN, "anchor_weights": weights, "temperature": tau}
        loss, gradient, _ = reference_value_and_grad(student, teacher, **options)
        rough = reference_value_and_grad(student, teacher, dtype=dtype, **options)[:2]
        brute.append(relative_errors(rough, (loss, gradient)))
        for method, pooled in methods.items():
            found = errors(
                student, teacher, (loss, gradient), method=method, backend="cpu", **options
            )
            pooled.append(found)
    return [root_mean_square(each) for each in methods.values()], root_mean_square(brute)


def accuracy(dtype: torch.dtype, sizes: tuple[int, ...]) -> Iterator[Figure]:
    """Worst errors over kinds of data, sizes, temperatures and methods, in units of the bar.

    The bar is ACCURACY, or in float32 twice what brute force errs by, where that is larger. At a
    tiny temperature a few near ties make all of the error: single draws of it say nothing, so
    both sides are pooled over fresh draws.
    """
    names = ("loss", "gradient")
    worst = dict.fromkeys(names, (0.0, "", 0.0, 0.0))  # share of the bar, where, error, bar
    cases = [(c, n, tau) for c in CASES for n in sizes for tau in TEMPERATURES]
    for case, n, tau in tqdm(cases, desc=f"accuracy {str(dtype)[6:]}", leave=False, disable=None):
        methods, brute = pooled_errors(case, n, tau, dtype)
        bars = tolerances(dtype, brute) if dtype == torch.float32 else ACCURACY[dtype]
        for pooled in methods:
            for name, error, bar in zip(names, pooled, bars, strict=True):
                if not error / bar <= worst[name][0]:
                    worst[name] = (error / bar, f"{case}, n {n}, tau {tau:g}", error, bar)
    for name, promised in zip(names, ACCURACY[dtype], strict=True):
        share, where, error, bar = worst[name]
        by_brute = ", 2x brute force" if bar > promised else ""
        yield Figure(
            f"{str(dtype)[6:]} {name} error, nearest to its bar ({where})",
            f"{error:.1e}",
            f"at most {bar:.1e}{by_brute}",
            share <= 1,
        )


# --- speed, memory, repeatability --------------------------------------------------------------


def against_products(n: int, d: int, bar: float, repeats: int) -> Figure:
    """Forward and backward against the four matrix products alone."""
    seconds = measure.interleaved(
        {"loss": measure.loss_step(n, d, backend="cpu"), "products": measure.four_products(n, d)},
        repeats,
    )
    ratio = measure.median_ratio(seconds["loss"], seconds["products"])
    ms = statistics.median(seconds["loss"]) * 1e3
    return at_most(f"n {n:,}, d {d}: times the four products ({ms:.0f} ms)", ratio, bar, "x")


def defaults_against_plain(n: int, d: int, bar: float, repeats: int) -> Figure:
    """The library's defaults against the plain loss that all other times are of."""
    seconds = measure.interleaved(
        {
            "plain": measure.loss_step(n, d, backend="cpu"),
            "defaults": measure.loss_step(n, d, backend="cpu", **measure.defaults()),
        },
        repeats,
    )
    ratio = measure.median_ratio(seconds["defaults"], seconds["plain"])
    ms = statistics.median(seconds["defaults"]) * 1e3
    return at_most(f"n {n:,}, d {d}: defaults, times mse ({ms:.0f} ms)", ratio, bar, "x")


def any_data(n: int, d: int, bar: float, repeats: int) -> Figure:
    """The kind of data, or weights, that costs most, against standard normal features."""
    steps = {kind: measure.loss_step(n, d, kind, backend="cpu") for kind in KINDS}
    weights = torch.rand(n, generator=torch.Generator().manual_seed(n))
    steps["weights"] = measure.loss_step(n, d, backend="cpu", candidate_weights=weights)
    seconds = measure.interleaved(steps, repeats)
    ratios = {kind: measure.median_ratio(own, seconds[GAUSSIAN]) for kind, own in seconds.items()}
    worst = max(ratios, key=ratios.__getitem__)
    name = f"n {n:,}, d {d}: the worst of {len(ratios) - 1} kinds of data ({worst}), times Gaussian"
    return at_most(name, ratios[worst], bar, "x")


def against_reference(n: int, d: int, bar: float, repeats: int) -> Figure:
    """Forward and backward against the reference."""
    seconds = measure.interleaved(
        {
            "loss": measure.loss_step(n, d, backend="cpu"),
            "reference": measure.loss_step(n, d, backend="reference"),
        },
        repeats,
    )
    ratio = measure.median_ratio(seconds["reference"], seconds["loss"])
    ms = statistics.median(seconds["loss"]) * 1e3
    name = f"n {n:,}, d {d}: faster than the reference ({ms:.2f} ms)"
    return at_least(name, ratio, bar, "x")


def growth(repeats: int) -> Figure:
    """Exponent of time in n, from 1,024 to 8,192, by least squares in logarithms."""
    sizes = (1024, 2048, 4096, 8192)
    seconds = measure.interleaved(
        {str(n): measure.loss_step(n, 128, backend="cpu") for n in sizes}, repeats
    )
    x = [math.log(n) for n in sizes]
    y = [math.log(statistics.median(seconds[str(n)])) for n in sizes]
    slope = statistics.linear_regression(x, y).slope
    return at_most("growth of time from n 1,024 to 8,192: exponent", slope, 2.2)


def memory(n: int) -> Figure:
    """Peak above inputs and gradient."""
    peak = measure.step_peak_memory(n, 128) / 2**20
    return at_most(f"n {n:,}, d 128: peak memory above inputs", peak, 256, " MiB")


def memory_over_time(steps: int) -> Figure:
    """What a long training adds: 8 MiB are the noise of Python's and torch's own heaps."""
    added = measure.growth_in_training(128, steps) / 2**20
    return at_most(f"n 128: memory added in {steps:,} steps of training", added, 8, " MiB")


def repeatable() -> Figure:
    """Loss and gradient, bit for bit, on repeated runs."""
    student, teacher = make_case("gaussian", 1501, 40, dtype=torch.float32), torch.randn(1501, 30)

    def run() -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        loss = pcoherence.perception_coherence_loss(leaf, teacher, backend="cpu")
        loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    first = run()
    same = sum(all(map(torch.equal, first, run())) for _ in range(10))
    return at_least("runs out of 10 equal to the first, bit for bit", same, 10)


def figures(quick: bool) -> Iterator[Figure]:
    """All of them, in the order of the table."""
    repeats = 3 if quick else 11
    yield against_reference(64, 128, 1.0, 200)
    yield against_reference(128, 128, 2.0, 30)
    yield against_reference(512, 128, 150.0, 3)
    yield against_products(4096, 512, 1.5, repeats)
    yield against_products(4096, 128, 2.0, repeats)
    yield any_data(4096, 128, 1.3, repeats)
    yield defaults_against_plain(4096, 128, 2.0, repeats)
    yield growth(repeats)
    yield memory(4096)
    yield memory(16384)
    yield memory_over_time(2_000 if quick else 20_000)
    yield repeatable()
    for dtype in (torch.float32, torch.float64):
        yield from accuracy(dtype, SIZES[:4] if quick else SIZES)


def show(results: list[Figure], where: dict[str, str], console: Console) -> None:
    """The table, narrow enough for a terminal."""
    table = Table(title="Figures of pcoherence", caption=", ".join(where.values()))
    for column in ("figure", "measured", "bar", ""):
        table.add_column(column)
    for figure in results:
        table.add_row(figure.name, figure.measured, figure.bar, "met" if figure.met else "MISSED")
    console.print(table)


def put_into_readme(results: list[Figure], where: dict[str, str]) -> None:
    """Replace what stands between the two markers."""
    lines = ["| figure | measured | bar |", "| --- | --- | --- |"]
    for figure in results:
        missed = "" if figure.met else ", missed"
        lines.append(f"| {figure.name} | {figure.measured} | {figure.bar}{missed} |")
    lines += ["", f"Measured on: {where['processor']}, {where['threads']} threads, "]
    lines[-1] += f"torch {where['torch']}, commit {where['commit']}."
    before, rest = README.read_text().split(BEGIN)
    _, after = rest.split(END)
    README.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after)


def main(write: Callable[[Path, object], None] = measure.write_json) -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, smaller sizes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--readme", action="store_true", help="also update README.md")
    arguments = parser.parse_args()
    results = []
    for figure in figures(arguments.quick):
        results.append(figure)
        tqdm.write(f"{figure.name}: {figure.measured}")
    where = measure.environment()
    write(arguments.output, {"environment": where, "figures": [f._asdict() for f in results]})
    if arguments.readme:
        put_into_readme(results, where)
    show(results, where, Console(width=100))


if __name__ == "__main__":
    main()
