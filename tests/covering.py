"""Fewer rows of options than all, in which nothing that is decided by a few of them is missed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def covering(*levels: Sequence[Any], strength: int = 2) -> list[tuple[Any, ...]]:
    """Rows such that all values of any `strength` options meet in one, by greedy choice."""
    indices = [range(len(values)) for values in levels]
    groups = list(itertools.combinations(range(len(levels)), strength))
    rows = list(itertools.product(*indices))

    def met(row: tuple[int, ...]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
        return {(group, tuple(row[option] for option in group)) for group in groups}

    missing = set().union(*map(met, rows))
    gain = {row: len(groups) for row in rows}
    chosen = []
    while missing:
        # Gains only shrink: a row whose gain is still the largest need not be compared.
        best = max(rows, key=gain.__getitem__)
        found = met(best) & missing
        if len(found) < gain[best]:
            gain[best] = len(found)
            continue
        missing -= found
        gain[best] = 0
        chosen.append(tuple(values[i] for values, i in zip(levels, best, strict=True)))
    return chosen
