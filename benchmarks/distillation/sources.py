"""What results depend on: a change of it must not meet results that were kept before.

The library is left out: after a change of what it computes, empty the folder of results.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from . import EXAMPLES

HERE = Path(__file__).parent
TAKEN = ("bags", "images", "measures", "packages", "sentences", "steps", "training")
READ = ("__init__", "__main__", "effects", "page", "plots", "summary", "tables")
# All but what people read; and of the examples, what the study takes from them.
FILES = (
    *sorted(path for path in HERE.glob("*.py") if path.stem not in READ),
    *(EXAMPLES / f"_{name}.py" for name in TAKEN),
)


def digest(depends: object) -> str:
    """Eight digits of these values and of the program's text."""
    found = zlib.crc32(repr(depends).encode())
    for path in FILES:
        found = zlib.crc32(path.read_bytes(), found)
    return f"{found:08x}"
