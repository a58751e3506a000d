"""Mutation testing: puts small slips (mutants) into copies of the code, one at a time.

For each it runs the tests that should notice, and prints a table. Ends with 1 below 95 %, and
where a test fails without any slip.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from checkout import ROOT, copied
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mutants import tree
from mutants.slips import Slip, read
from mutants.tree import HANGS, Result, Worker

HERE = Path(__file__).parent
BAR = 0.95
"""What a slip in twenty is left for: those that turn out to change nothing."""

LIMIT = 600.0
"""Seconds for the tests of one slip. The longest list takes half of it where others are busy."""

BASELINE_LIMIT = 3600.0
"""Seconds for all tests without a slip, of which a worker has its share."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="PYTHONPATH=tests python -m mutants", description=__doc__)
    parser.add_argument("--only", default="", help="slips whose file or name this pattern finds")
    parser.add_argument("--slips", type=Path, nargs="*", help="TOML files; default: all in slips/")
    parser.add_argument("--folder", type=Path, default=ROOT / ".benchmarks" / "mutants")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help="slips at the same time")
    parser.add_argument("--list", action="store_true", help="name the slips and run nothing")
    parser.add_argument(
        "--skip-baseline", action="store_true", help="do not first run the tests without a slip"
    )
    return parser.parse_args()


def chosen(asked: argparse.Namespace) -> list[Slip]:
    files = asked.slips or sorted((HERE / "slips").glob("*.toml"))
    found = [slip for path in files for slip in read(path)]
    return [slip for slip in found if re.search(asked.only, f"{slip.file} {slip.name}")]


def prepared(folder: Path, slips: list[Slip], jobs: int) -> list[Worker]:
    """A built copy for each job."""
    for old in (*folder.glob("tree-*"), folder / "logs"):
        shutil.rmtree(old, ignore_errors=True)
    (folder / "logs").mkdir(parents=True)
    first = copied(folder / "tree-0")
    if any(slip.native for slip in slips):
        tree.with_switches(first, slips)
    tree.build(first, slips)
    copies = [folder / f"tree-{job}" for job in range(1, jobs)]
    for copy in copies:
        shutil.copytree(first, copy, symlinks=True)
    return [Worker(copy) for copy in (first, *copies)]


def check_baseline(workers: list[Worker], slips: list[Slip], logs: Path) -> None:
    """Raise SystemExit if a test fails without a slip: what it says of slips means nothing."""
    asked = {test for slip in slips for test in slip.tests}
    tests = sorted(test for test in asked if test.partition("::")[0] not in asked - {test})
    shares = [tests[job :: len(workers)] for job in range(len(workers))]
    with ThreadPoolExecutor(len(workers)) as pool:
        started = [
            pool.submit(worker.run, share, logs / f"baseline-{job}.txt", BASELINE_LIMIT)
            for job, (worker, share) in enumerate(zip(workers, shares, strict=True))
            if share
        ]
        for job, found in enumerate(run.result() for run in started):
            if found.noticed or found.by:
                log = logs / f"baseline-{job}.txt"
                raise SystemExit(f"mutants: without any slip: {found.by}; see {log}")


def attempts(workers: list[Worker], slips: list[Slip], logs: Path) -> Iterator[tuple[int, Result]]:
    """The place of a slip, and what its tests said, as they end."""
    free: queue.Queue[Worker] = queue.Queue()
    for worker in workers:
        free.put(worker)

    def attempt(place: int) -> tuple[int, Result]:
        worker = free.get()
        try:
            log = logs / f"{place + 1}.txt"
            return place, worker.tried(slips[place], place + 1, log, LIMIT)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(len(workers)) as pool:
        try:
            waiting = [pool.submit(attempt, place) for place in range(len(slips))]
            for done in as_completed(waiting):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.close()


def table(slips: list[Slip], results: dict[int, Result]) -> Table:
    shown = Table("slip", "s", "noticed by")
    file = None
    for place, slip in enumerate(slips):
        if place not in results:
            continue
        if slip.file != file:
            file = slip.file
            shown.add_section()
            shown.add_row(f"[bold]{escape(file)}[/bold]")
        result = results[place]
        by = escape(result.by.removeprefix("tests/test_").replace(".py::", " ", 1))
        said = by if result.noticed else f"[red]nothing {by}[/red]"
        shown.add_row(escape(slip.name), f"{result.seconds:.0f}", said)
    return shown


def verdict(slips: list[Slip], results: dict[int, Result]) -> tuple[str, bool]:
    """The last line, and whether the bar is met by all."""
    noticed = sum(result.noticed for result in results.values())
    share = noticed / max(len(results), 1)
    line = f"{noticed} of {len(results)} noticed: {share:.1%} (bar: {BAR:.0%})"
    hanging = sum(result.by == HANGS for result in results.values())
    if hanging:
        line += f"; of {hanging} the tests did not end in {LIMIT:.0f} s"
    left = len(slips) - len(results)
    if left:
        line += f"; {left} not tried"
    return line, share >= BAR and not left


def main() -> int:
    asked, console = arguments(), Console()
    slips = chosen(asked)
    if asked.list or not slips:
        names = [escape(f"{slip.file}: {slip.name}") for slip in slips]
        console.print(*names, f"{len(slips)} slips", sep="\n")
        return 0 if asked.list else 1
    logs = asked.folder / "logs"
    text = TextColumn("{task.description}")
    results: dict[int, Result] = {}
    with (
        contextlib.suppress(KeyboardInterrupt),  # what is known by then is shown
        Progress(text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress,
    ):
        task = progress.add_task("building", total=len(slips))
        workers = prepared(asked.folder, slips, asked.jobs)
        if not asked.skip_baseline:
            progress.update(task, description="baseline")
            check_baseline(workers, slips, logs)
        for place, result in attempts(workers, slips, logs):
            results[place] = result
            missed = sum(not other.noticed for other in results.values())
            progress.update(task, advance=1, description=f"{missed} not noticed")
    console.print(table(slips, results))
    line, met = verdict(slips, results)
    console.print(line)
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
