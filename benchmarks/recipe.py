"""How the libraries are built: setup.py as a module, where sources and flags are said alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

SETUP = Path(__file__).resolve().parent.parent / "setup.py"


def recipe() -> Any:
    """The module."""
    spec = importlib.util.spec_from_file_location("setup", SETUP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
