"""Sphinx: the pages of this folder. `make docs` builds them, tests/test_docs.py runs them."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pcoherence

sys.path.insert(0, str(Path(__file__).parent))  # for _ext

project = "pcoherence"
author = "the pcoherence authors"
copyright = f"2026, {author}"
release = pcoherence.__version__
version = release

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "_ext.mathml",
    "_ext.results",
]
smartquotes_action = "D"  # dashes alone: quotes stay as they are typed
exclude_patterns = ["_build", "_ext", "_static"]
highlight_language = "none"  # literal blocks are commands; testcode is Python by itself
html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

# Docstrings put names in single backticks: a link where the name is documented, code otherwise.
default_role = "py:obj"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False  # what a function returns is a sentence, not the name of a class
# Packages that adapters import, and that a build of the pages need not have.
autodoc_mock_imports = [
    "lightning",
    "matplotlib",
    "pytorch_metric_learning",
    "sentence_transformers",
    "timm",
    "torchmetrics",
    "torchvision",
    "transformers",
]

# Nothing is downloaded at build time, so names of other packages cannot be links.
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:class", r"(collections|torch|lightning|torchmetrics|pytorch_metric_learning)\..*"),
    ("py:class", "Figure|Metric|Tensor"),
    ("py:exc", r".*, .*"),
]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", constructor)


def constructor(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: Any, returns: Any
) -> tuple[str, None] | None:
    """Of an adapter's class, whose base may be mocked, the signature of its own __init__."""
    if what != "class" or "adapters" not in name or "__init__" not in vars(obj):
        return None
    _, *parameters = inspect.signature(obj.__init__).parameters.values()
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters])), None


doctest_global_setup = "import importlib.util"  # for the conditions of skipif
