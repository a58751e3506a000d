"""How numbers read, and the tables of a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .cases import Case
from .contestants import Contestant
from .rows import OK, SKIPPED, Row, Spread


def milliseconds(spread: Spread | None) -> str:
    """The median, in ms with three digits."""
    return "" if spread is None else _three(spread.p50 * 1e3)


def spread_of(spread: Spread | None) -> str:
    """p20 to p80, in ms."""
    if spread is None:
        return ""
    return f"{_three(spread.p20 * 1e3)} to {_three(spread.p80 * 1e3)}"


def times(spread: Spread | None) -> str:
    """A ratio."""
    return "" if spread is None else f"{_three(spread.p50)}x"


def mebibytes(count: int | None) -> str:
    """MiB."""
    return "" if count is None else f"{count / 2**20:,.1f}"


def error(value: float | None) -> str:
    """A relative error."""
    return "" if value is None else f"{value:.0e}"


def rate(value: float | None) -> str:
    """GFLOP/s."""
    return "" if value is None else _three(value)


def _three(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    if value >= 1000:
        return f"{value:,.0f}"
    digits = f"{value:.3g}"
    return f"{value:.5f}" if "e" in digits else digits


def show_rows(rows: Sequence[Row], console: Console) -> None:
    """A section for each case; why rows failed, or were skipped, in lines below."""
    table = Table(title="Forward + backward; the four products alone, of which half is the limit")
    table.add_column("case, contestant", no_wrap=True)
    for column in ("ms", "p20 to p80", "times the products", "peak MiB", "GFLOP/s", "grad. error"):
        table.add_column(column, justify="right")
    tried = [row for row in rows if row.status != SKIPPED]
    for case in dict.fromkeys(row.case for row in tried):
        table.add_section()
        table.add_row(f"[bold]{case}[/bold]")
        for row in tried:
            if row.case == case:
                table.add_row(f"  {row.contestant}", *_cells(row))
    console.print(table)
    for row in tried:
        if row.status != OK:
            console.print(f"{row.case} {row.contestant}: {row.status}, {row.reason}")
    skipped = {f"{row.contestant}: {row.reason}" for row in rows if row.status == SKIPPED}
    for line in sorted(skipped):
        console.print(f"skipped: {line}")


def _cells(row: Row) -> list[str]:
    """What `show_rows` says of a row."""
    if row.status != OK:
        return ["", f"[bold]{row.status}[/bold]"]
    return [
        milliseconds(row.step),
        spread_of(row.step),
        times(row.times_limit),
        mebibytes(row.peak_bytes),
        rate(row.gflops),
        error(row.gradient_error),
    ]


def show_list(chosen: Sequence[tuple[Case, Contestant]], device: str, console: Console) -> None:
    """Cases with who computes them, and who cannot on this device."""
    table = Table(title=f"{len(chosen)} rows on {device}")
    table.add_column("case", no_wrap=True)
    for column in ("contestants", "skipped here"):
        table.add_column(column, overflow="fold")
    for case in dict.fromkeys(case for case, _ in chosen):
        ours = [contestant for own, contestant in chosen if own == case]
        here = [contestant.name for contestant in ours if device in contestant.devices]
        others = [contestant.name for contestant in ours if device not in contestant.devices]
        table.add_row(case.name, ", ".join(here), ", ".join(others))
    console.print(table)
