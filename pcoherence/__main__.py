"""`python -m pcoherence`: versions, the library's build, and who can compute here.

`python -m pcoherence compare`: see compare.py.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Sequence

import torch

import pcoherence
from pcoherence import library


def report() -> list[tuple[str, str]]:
    """The rows of the table: what, and its version or state."""
    rows = [
        ("pcoherence", pcoherence.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        *_library(),
    ]
    for name, reason in pcoherence.available_backends().items():
        rows.append((f"backend {name}", "available" if reason is None else f"no: {reason}"))
    return rows


def _version(package: str) -> str:
    """The installed version, without importing the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _library() -> list[tuple[str, str]]:
    try:
        built = library.about()["build"]
    except OSError as error:
        return [("library", f"not found: {error}")]
    rows = [(f"  {key}", str(value)) for key, value in built.items()]
    return [("library", str(library.path("cpu"))), *rows]


def main(arguments: Sequence[str] = ()) -> None:
    """Print the table, or do what the first argument says."""
    if arguments:
        _command(*arguments)
        return
    rows = report()
    width = max(len(name) for name, _ in rows)
    for name, state in rows:
        print(f"{name:<{width}}  {state}")


def _command(name: str, *arguments: str) -> None:
    if name == "compare":
        importlib.import_module("pcoherence.compare").main(arguments)
    elif name in ("-h", "--help"):
        print("python -m pcoherence: versions, the library, and who can compute here")
        print("python -m pcoherence compare TEACHER STUDENT: what another embedding model finds")
    else:
        print(f"python -m pcoherence: expected compare or nothing; got {name}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
