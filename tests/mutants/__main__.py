"""Puts small slips into the code, one at a time, and runs the tests that should notice them.

The bar is 95 %. Ends with 1 below it, and where a test fails without any slip.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import tree
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from slips import Slip, read
from tree import Result, Worker

HERE = Path(__file__).parent
BAR = 0.95
LIMIT = 600.0
"""Seconds for the tests of one slip: the longest list takes five minutes."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/mutants", description=__doc__)
    parser.add_argument("--only", default="", help="slips whose file or name this pattern finds")
    parser.add_argument("--slips", type=Path, nargs="*", help="TOML files; default: all in slips/")
    parser.add_argument("--folder", type=Path, default=tree.ROOT / ".benchmarks" / "mutants")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at the same time")
    parser.add_argument("--list", action="store_true", help="name the slips and run nothing")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without slips")
    return parser.parse_args()


def chosen(asked: argparse.Namespace) -> list[Slip]:
    files = asked.slips or sorted((HERE / "slips").glob("*.toml"))
    found = [slip for path in files for slip in read(path)]
    return [slip for slip in found if re.search(asked.only, f"{slip.file} {slip.name}")]


def prepared(folder: Path, slips: list[Slip], jobs: int) -> list[Worker]:
    """A built copy for each job."""
    first = tree.copied(folder / "tree-0")
    if any(slip.native for slip in slips):
        tree.with_switches(first, slips)
    tree.build(first, slips)
    copies = [folder / f"tree-{job}" for job in range(1, jobs)]
    for copy in copies:
        shutil.copytree(first, copy, symlinks=True)
    return [Worker(tree) for tree in (first, *copies)]


def table(results: dict[Slip, Result]) -> Table:
    shown = Table("slip", "s", "noticed by")
    file = None
    for slip, result in results.items():
        if slip.file != file:
            file = slip.file
            shown.add_section()
            shown.add_row(f"[bold]{file}[/bold]")
        by = result.by.removeprefix("tests/test_").replace(".py::", " ", 1)
        shown.add_row(slip.name, f"{result.seconds:.0f}", by if result.noticed else "[red]nothing")
    return shown


def main() -> int:
    asked, console = arguments(), Console()
    slips = chosen(asked)
    if asked.list or not slips:
        names = [f"{slip.file}: {slip.name}" for slip in slips]
        console.print(*names, f"{len(slips)} slips", sep="\n")
        return 0
    folder: Path = asked.folder
    shutil.rmtree(folder, ignore_errors=True)
    logs = folder / "logs"
    logs.mkdir(parents=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("building", total=len(slips))
        workers = prepared(folder, slips, asked.jobs)
        if not asked.trust:
            progress.update(task, description="without slips")
            tests = sorted({test for slip in slips for test in slip.tests})
            alone = workers[0].run(tests, logs / "none.txt", 3600, "-n", str(asked.jobs))
            if alone.noticed:
                console.print(f"without any slip {alone.by} fails: {logs / 'none.txt'}")
                return 1
        free: queue.Queue[Worker] = queue.Queue()
        for worker in workers:
            free.put(worker)

        def attempt(number: int) -> Result:
            worker, slip = free.get(), slips[number - 1]
            try:
                return worker.tried(slip, number, logs / f"{number}.txt", LIMIT)
            finally:
                free.put(worker)

        results: dict[Slip, Result] = {}
        with ThreadPoolExecutor(asked.jobs) as pool:
            waiting = {pool.submit(attempt, number + 1): slip for number, slip in enumerate(slips)}
            for done in as_completed(waiting):
                slip, result = waiting[done], done.result()
                results[slip] = result
                missed = sum(not other.noticed for other in results.values())
                progress.update(task, advance=1, description=f"{missed} not noticed")
    for worker in workers:
        worker.close()
    console.print(table({slip: results[slip] for slip in slips}))
    noticed = sum(result.noticed for result in results.values())
    console.print(f"{noticed} of {len(slips)} noticed: {noticed / len(slips):.1%} (bar: {BAR:.0%})")
    return 0 if noticed >= BAR * len(slips) else 1


if __name__ == "__main__":
    raise SystemExit(main())
