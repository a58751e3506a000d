"""`python -m benchmarks run|report|page|list`: how this library compares, and what changed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from .suite import page, report, run, tables
from .suite.contestants import PRECISE, known
from .suite.rows import load

RESULTS = Path(__file__).parent / "results"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    for name, text in (
        ("run", "verify and measure; prints a table, writes JSON"),
        ("list", "what a run would do"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
        size = command.add_mutually_exclusive_group()
        size.add_argument("--quick", action="store_true", help="a minute or two")
        size.add_argument("--full", action="store_true", help="also n 32,768 and 65,536 on a CPU")
        command.add_argument("--only", default="", help='regular expression on "case contestant"')
        command.add_argument("--plugin", type=Path, help="Python file that defines CONTESTANTS")
        if name == "run":
            command.add_argument("--output", type=Path, help="default: results/DEVICE.json")
            command.add_argument("--resume", action="store_true", help="keep rows of the output")
            command.add_argument("--time-limit", type=float, default=60.0, help="seconds a row")
            command.add_argument("--memory-limit", type=float, default=8.0, help="GiB")
            command.add_argument("--budget", type=float, default=1.0, help="seconds of measuring")

    text = "what changed between two results"
    command = commands.add_parser("report", help=text, description=text)
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)

    text = "write README.md and the pictures of a folder of results"
    command = commands.add_parser("page", help=text, description=text)
    command.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    return parser


def _options(arguments: argparse.Namespace) -> run.Options:
    given = {name: value for name, value in vars(arguments).items() if name != "command"}
    if given.get("output") is None:
        given["output"] = RESULTS / f"{arguments.device}.json"
    return run.Options(**given)


def main() -> None:
    """Do what the command line says."""
    arguments = _parser().parse_args()
    console = Console(width=100)
    if arguments.command == "list":
        tables.show_list(run.selected(_options(arguments)), arguments.device, console)
    elif arguments.command == "run":
        options = _options(arguments)
        try:
            rows = run.run(options)
        except KeyboardInterrupt:
            console.print(f"Interrupted; {options.output} has what was done, --resume goes on.")
            sys.exit(130)
        tables.show_rows(rows, console)
        # Failures of peers are results; a wrong or missing result of ours is a bug.
        precise = {who.name for who in known().values() if who.check == PRECISE}
        ours = [row for row in rows if row.contestant in precise]
        bad = [row for row in ours if row.status in ("wrong result", "crashed", "failed")]
        sys.exit(1 if bad else 0)
    elif arguments.command == "report":
        report.show(load(arguments.before), load(arguments.after), console)
    else:
        console.print(f"Written: {page.write(arguments.folder)}")


if __name__ == "__main__":
    main()
