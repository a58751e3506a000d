"""What only a GPU can decide: how products are computed, and how many anchors are held at a time.

Every way of the products meets every way of the rows, each timed as a graph beside the default in
the same run, and its errors compared with those of the default's products. `chosen` is the rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks import measure
from pcoherence.backends import clouds, pipeline, products, splits

PRODUCTS: dict[str, splits.Split | None] = {
    "float32": None,
    "float16 parts": splits.FLOAT16,
    "float16 parts cut at 1,024": splits.FLOAT16._replace(longest=1024),
    "float16 parts cut at 256": splits.FLOAT16._replace(longest=256),
    "bfloat16 parts": splits.BFLOAT16,
}
"""Cut sums cost more traffic and make up for accumulators that truncate."""

ROWS = {"at once": None, "32 MiB": 32 << 20, "10 MiB": 10 << 20}
"""Of three matrices: n x n where the batch is its own candidates, or blocks; three of 10 MiB stay
in a cache of 50 MiB."""

DEFAULT = "float32", "at once"

WORSE = 1.25
"""Errors up to this times those of float32 products count as equal: both are roundings."""

QUICKER = 0.95
"""The default stays unless another takes at most this share of its time."""


class Measured(NamedTuple):
    """One way: its time over the default's, and its errors over those of float32 products."""

    products: str
    rows: str
    time: float
    loss_error: float
    gradient_error: float

    @property
    def exact(self) -> bool:
        """Whether it errs no more than float32 products do."""
        return max(self.loss_error, self.gradient_error) <= WORSE


def chosen(ways: list[Measured]) -> tuple[str, str]:
    """The rule: the quickest of those that are exact, unless the default is about as quick."""
    exact = [way for way in ways if way.exact and way.time <= QUICKER]
    if not exact:
        return DEFAULT
    best = min(exact, key=lambda way: way.time)
    return best.products, best.rows


@contextlib.contextmanager
def using(product: str, rows: str) -> Iterator[None]:
    """Meanwhile the pipeline works this way."""
    before = products.SPLIT, pipeline.BLOCK_BYTES, clouds.SYMMETRIC_BYTES
    size = ROWS[rows]
    products.SPLIT = PRODUCTS[product]
    if size is not None:
        pipeline.BLOCK_BYTES, clouds.SYMMETRIC_BYTES = size, 0
    try:
        yield
    finally:
        products.SPLIT, pipeline.BLOCK_BYTES, clouds.SYMMETRIC_BYTES = before


def ways() -> list[tuple[str, str]]:
    """All of them, the default first."""
    return [(product, rows) for rows in ROWS for product in PRODUCTS]


def compare(
    replays: Callable[[], Callable[[], Any]],
    errors: Callable[[], tuple[float, float]],
    milliseconds: Callable[..., list[list[float]]],
    repeats: int,
) -> Iterator[Measured]:
    """Each way beside the default.

    Args:
        replays: captures a step as a graph, with whatever is in use.
        errors: of loss and gradient, likewise.
        milliseconds: times calls in turn.
        repeats: of each.
    """
    default = replays()
    plain = errors()
    of_products: dict[str, tuple[float, float]] = {DEFAULT[0]: plain}
    for product, rows in ways():
        with using(product, rows):
            if product not in of_products:
                of_products[product] = errors()
            # The default beside itself says how much the clock errs.
            usual, this = milliseconds(default, replays(), repeats=repeats)
        found = of_products[product]
        yield Measured(
            product,
            rows,
            measure.median_ratio(this, usual),
            found[0] / plain[0],
            found[1] / plain[1],
        )
