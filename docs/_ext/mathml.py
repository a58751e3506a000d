"""Formulas as MathML, written when the pages are built: browsers draw it, nothing is fetched."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def mathml(latex: str, display: str, node: nodes.Element) -> str:
    """The element ``<math>``; a command that the converter does not know is a warning."""
    if "&" in latex or r"\\" in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    converted = convert(" ".join(latex.split()), display=display)
    unknown = re.findall(r"\\\w+", converted)
    if unknown:
        logger.warning("no MathML for %s in %r", ", ".join(unknown), latex, location=node)
    return converted


def visit_inline(translator: Any, node: nodes.math) -> None:
    """Called by Sphinx for the role ``math``."""
    translator.body.append(mathml(node.astext(), "inline", node))
    raise nodes.SkipNode


def visit_block(translator: Any, node: nodes.math_block) -> None:
    """Called by Sphinx for the directive ``math``."""
    translator.body.append(f'<div class="math">{mathml(node.astext(), "block", node)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
