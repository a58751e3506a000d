"""Tables of measured results, taken from the Markdown that the measurements wrote.

A page says which part of which table it shows. So its numbers are those of the last run, and none
is copied by hand::

    .. results:: benchmarks/results/distillation/README.md
       :after: ### images
       :columns: method | 5-NN | order
       :heads: loss | 5 nearest | order
       :rows: ^(teacher|rop)
       :align: left | right
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parent.parent.parent
MARKS = re.compile(r"\*\*(?P<strong>[^*]+)\*\*|`(?P<literal>[^`]+)`")


def parts(text: str) -> list[str]:
    """What stands between bars."""
    return [part.strip() for part in text.split("|")]


def cells(line: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    return parts(line.strip().removeprefix("|").removesuffix("|"))


def find_table(text: str, after: str, columns: list[str]) -> tuple[list[list[str]], list[int]]:
    """The rows of a table, and the places of the columns in them.

    It is the first that has all of the columns, behind the line that begins with ``after``. These
    may be several lines, one behind the other, with `` // `` between them.
    """
    lines = text.splitlines()
    start = 0
    for begin in after.split(" // ") if after else []:
        start = next(i for i in range(start, len(lines)) if lines[i].startswith(begin)) + 1
    for i, line in enumerate(lines[start:], start):
        head = cells(line)
        if line.startswith("|") and set(columns) <= set(head):
            rows = itertools.takewhile(lambda row: row.startswith("|"), lines[i + 2 :])
            return [cells(row) for row in rows], [head.index(column) for column in columns]
    raise StopIteration


def inline(text: str) -> list[nodes.Node]:
    """A cell's text with its bold and its code."""
    found: list[nodes.Node] = []
    end = 0
    for match in MARKS.finditer(text):
        found.append(nodes.Text(text[end : match.start()]))
        kind = nodes.strong if match["strong"] else nodes.literal
        shown = match["strong"] or match["literal"]
        found.append(kind(shown, shown))
        end = match.end()
    return [*found, nodes.Text(text[end:])]


def table(heads: list[str], rows: list[list[str]], align: list[str]) -> nodes.table:
    """The table as docutils has it."""
    group = nodes.tgroup(cols=len(heads))
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    group += [nodes.colspec(colwidth=max(width, 1)) for width in widths]

    def line(texts: list[str]) -> nodes.row:
        row = nodes.row()
        for text, side in zip(texts, align, strict=True):
            row += nodes.entry("", nodes.paragraph("", "", *inline(text)), classes=[f"is-{side}"])
        return row

    group += nodes.thead("", line(heads))
    group += nodes.tbody("", *(line(row) for row in rows))
    return nodes.table("", group, classes=["results", "colwidths-auto"])


class Results(SphinxDirective):
    """``.. results::``."""

    required_arguments = 1
    option_spec = {  # noqa: RUF012 - docutils' own form
        "after": directives.unchanged,
        "columns": directives.unchanged_required,
        "heads": directives.unchanged,
        "rows": directives.unchanged,
        "align": directives.unchanged,
    }

    def run(self) -> list[nodes.Node]:
        """Called by docutils."""
        path = ROOT / self.arguments[0]
        self.env.note_dependency(str(path))
        columns = parts(self.options["columns"])
        heads = parts(self.options.get("heads", self.options["columns"]))
        try:
            rows, places = find_table(path.read_text(), self.options.get("after", ""), columns)
        except StopIteration:
            raise self.error(f"{path}: no such table") from None
        wanted = re.compile(self.options.get("rows", ""))
        rows = [[row[i] for i in places] for row in rows if wanted.search(" | ".join(row))]
        if not rows or len(heads) != len(columns):
            raise self.error(f"{path}: no such rows, or not a head for each column")
        align = parts(self.options.get("align", "left"))
        align += align[-1:] * (len(columns) - len(align))
        return [table(heads, rows, align)]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("results", Results)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
