"""`python -m benchmarks.distillation run|page`: train and measure all students; write the page."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from . import page, plans, results, runner

RESULTS = Path(__file__).resolve().parents[1] / "results" / "distillation"
WORK = Path(__file__).resolve().parents[2] / ".benchmarks" / "study"


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="train and measure; goes on where it was stopped")
    command.add_argument("--quick", action="store_true", help="a smoke run, under 5 minutes")
    command.add_argument("--work", type=Path, default=WORK, help="folder for data and results")
    command.add_argument("--output", type=Path, help="folder for the page")
    command.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    command = commands.add_parser("page", help="write the page of results that are there")
    command.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    options = parser.parse_args()
    console = Console(width=100)
    if options.command == "page":
        console.print(f"Written: {page.write(options.folder)}")
        return
    plan = plans.QUICK if options.quick else plans.FULL
    output = options.output or (options.work / "quick" if options.quick else RESULTS)
    start = time.perf_counter()
    try:
        found = runner.run(plan, options.work, options.processes)
    except KeyboardInterrupt:
        console.print(f"Interrupted; {options.work} has what was done. The same command goes on.")
        sys.exit(130)
    results.save(output / f"{plan.name}.jsonl", found)
    page.show(found, console)
    console.print(f"Written: {page.write(output)}")
    console.print(f"Done in {(time.perf_counter() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
