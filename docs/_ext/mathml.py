"""Formulas as MathML, written when the pages are built: browsers draw it, nothing is fetched.

With the pages goes a font that has a table for mathematics, without which brackets do not stretch.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger

logger = getLogger(__name__)


MATHML = "{http://www.w3.org/1998/Math/MathML}"
LARGE = {"sub": "munder", "sup": "mover", "subsup": "munderover"}
FONT = "STIXTwoMath-Regular.ttf"
# Latin, Greek, primes, letters like R of the reals, arrows, operators, brackets, italics.
CHARACTERS = "20-7E,B1,B7,391-3C9,3D5,3F5,2016,2026,2032-2034,2061,210E-211D,2190-2194,2200-22FF"
CHARACTERS += ",2308-230B,27E8,27E9,1D434-1D467,1D6E2-1D71B"


def mathml(latex: str, display: str, node: nodes.Element) -> str:
    """The element ``<math>``; a command that the converter does not know is a warning."""
    if "&" in latex or r"\\" in latex:
        latex = rf"\begin{{align*}}{latex}\end{{align*}}"
    converted = convert(" ".join(latex.split()), display=display)
    unknown = re.findall(r"\\\w+", converted)
    if unknown:
        logger.warning("no MathML for %s in %r", ", ".join(unknown), latex, location=node)
    formula = ElementTree.fromstring(converted)
    for element in list(formula.iter()):
        mend(element)
    ElementTree.register_namespace("", MATHML.strip("{}"))
    return ElementTree.tostring(formula, encoding="unicode")


def mend(element: ElementTree.Element) -> None:
    """Limits of sums below them, functions as names, and the spaces that TeX gives them."""
    tag = element.tag.removeprefix(f"{MATHML}m")
    if tag in LARGE and element[0].text == "\N{N-ARY SUMMATION}":
        element.tag = MATHML + LARGE[tag]  # in running text the browser puts them beside it
    if tag == "sup" and element[1].text == "\N{PRIME}":
        element.tag = f"{MATHML}mrow"  # the font has it raised already
    before = None
    for child in element:
        if is_function(child) or child.text in ("\N{INFINITY}", "\N{PARTIAL DIFFERENTIAL}"):
            child.tag = f"{MATHML}mi"
        elif child.text in ("|", "/", "\N{PRIME}"):
            child.attrib.update(lspace="0", rspace="0")
        elif child.text == "\N{MINUS SIGN}" and (before is None or is_open(before)):
            child.set("form", "prefix")
        before = child
    if tag not in ("row", "ath", "td", "style"):
        return
    children = list(element)
    for left, right in reversed(list(itertools.pairwise(children))):
        if (is_function(left) or is_function(right)) and f"{MATHML}mo" not in (left.tag, right.tag):
            space = ElementTree.Element(f"{MATHML}mspace", width="0.167em")
            element.insert(children.index(right), space)


def is_open(element: ElementTree.Element) -> bool:
    """Whether a minus behind it is a sign."""
    return element.tag == f"{MATHML}mo" and element.text not in (")", "]", "|")


def is_function(element: ElementTree.Element) -> bool:
    """Whether it is a name of several letters."""
    text = element.text or ""
    named = element.tag in (f"{MATHML}mi", f"{MATHML}mo")
    return named and len(text) > 1 and text.isalpha()


def write_font(app: Sphinx, exception: Exception | None) -> None:
    """The part of the font that formulas use, beside the pages."""
    path = Path(app.outdir, "_static", "formulas.woff")
    if exception is not None or app.builder.format != "html" or path.exists():
        return
    from fontTools import subset

    spec = importlib.util.find_spec("ziamath")
    assert spec is not None, "the package ziamath brings the font"
    assert spec.origin is not None
    source = Path(spec.origin).parent / "fonts" / FONT
    logging.getLogger("fontTools").setLevel("WARNING")
    options = subset.Options(flavor="woff", layout_features=["ssty"])  # what scripts look like
    font = subset.load_font(str(source), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=subset.parse_unicodes(CHARACTERS))
    subsetter.subset(font)
    subset.save_font(font, str(path), options)


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
    app.connect("build-finished", write_font)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
