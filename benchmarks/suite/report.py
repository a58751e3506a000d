"""What changed between two results: ratios with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from .rows import OK, Row, Spread


class Ratio(NamedTuple):
    """After over before: of the medians, and the range that both spreads allow."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, before: Spread, after: Spread) -> Ratio:
        """Of two spreads of the same quantity."""
        return cls(after.p20 / before.p80, after.p50 / before.p50, after.p80 / before.p20)

    @property
    def changed(self) -> bool:
        """Whether the middle 60 % of before and after do not overlap."""
        return self.low > 1 or self.high < 1

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f} to {self.high:.2f})"


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of the same case, contestant and device, in the order of `after`."""
    known = {row.key: row for row in before}
    return [(known[row.key], row) for row in after if row.key in known]


def show(before: Sequence[Row], after: Sequence[Row], console: Console) -> None:
    """A table of pairs, and what only one side has."""
    table = Table(title="After / before: above 1 is slower, * where the spreads do not overlap")
    for column in ("case", "contestant"):
        table.add_column(column, overflow="fold")
    for column in ("time", "times the products", "memory", "grad. error"):
        table.add_column(column, justify="right")
    pairs = compare(before, after)
    changes = 0
    for old, new in pairs:
        if old.status != OK or new.status != OK:
            if old.status != new.status:
                changes += 1
                table.add_row(new.case, new.contestant, f"{old.status} -> {new.status}", "", "", "")
            continue
        ratios = [_ratio(old.step, new.step), _ratio(old.times_limit, new.times_limit)]
        changes += any(ratio is not None and ratio.changed for ratio in ratios)
        table.add_row(
            new.case,
            new.contestant,
            *(
                "" if ratio is None else f"{ratio}{' *' if ratio.changed else ''}"
                for ratio in ratios
            ),
            _quotient(old.peak_bytes, new.peak_bytes),
            _quotient(old.gradient_error, new.gradient_error),
        )
    console.print(table)
    console.print(f"{len(pairs)} rows in both, {changes} changed.")
    keys = [{row.key for row in rows} for rows in (before, after)]
    for title, only in (("before", keys[0] - keys[1]), ("after", keys[1] - keys[0])):
        if only:
            names = ", ".join(sorted(" ".join(key[:2]) for key in only))
            console.print(f"Only {title}: {names}")
    machines = [{_machine(row) for row in rows} for rows in (before, after)]
    if machines[0] != machines[1]:
        console.print("[bold]Different machines or settings:[/bold] times do not compare;")
        console.print('"times the products" does, roughly.')
        for title, machine in zip(("before", "after"), machines, strict=True):
            console.print(f"{title}: {'; '.join(sorted(machine))}")


def _ratio(before: Spread | None, after: Spread | None) -> Ratio | None:
    return None if before is None or after is None else Ratio.of(before, after)


def _quotient(before: float | None, after: float | None) -> str:
    return f"{after / before:.2f}" if before and after is not None else ""


def _machine(row: Row) -> str:
    return f"{row.device}, {row.processor}, {row.threads} threads, torch {row.torch}"
