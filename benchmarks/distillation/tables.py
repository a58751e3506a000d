"""Tables in Markdown, and numbers in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .summary import Interval


def percent(value: Interval) -> str:
    """A mean, with half of its interval if there is one."""
    if math.isnan(value.half):
        return f"{100 * value.mean:.1f}"
    return f"{100 * value.mean:.1f} ± {100 * value.half:.1f}"


def signed(value: Interval) -> str:
    """A difference, in points."""
    if math.isnan(value.half):
        return f"{100 * value.mean:+.1f}"
    return f"{100 * value.mean:+.1f} ± {100 * value.half:.1f}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    rule = ["---"] * len(columns)
    return ["| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows)]


def short(method: str) -> str:
    """A method's name where all are of one family."""
    return method.removeprefix("index ").removeprefix("coherence ")
