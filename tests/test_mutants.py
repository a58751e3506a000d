"""The slips of tests/mutants still fit the code, and the tool that tries them tells them apart."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

MUTANTS = Path(__file__).parent / "mutants"
ROOT = MUTANTS.parent.parent
sys.path.insert(0, str(MUTANTS))

import slips as mutants  # noqa: E402

FILES = sorted((MUTANTS / "slips").glob("*.toml"))
SLIPS = [slip for path in FILES for slip in mutants.read(path)]


def test_there_are_slips_of_every_language() -> None:
    kinds = [(slip.file.split("/")[0], Path(slip.file).suffix) for slip in SLIPS]
    assert {kind for kind, _ in kinds} == {"pcoherence", "csrc", "kernels", "benchmarks"}
    assert len(SLIPS) >= 80
    assert len({(slip.file, slip.name) for slip in SLIPS}) == len(SLIPS)


@pytest.mark.parametrize("file", sorted({slip.file for slip in SLIPS}))
def test_slips_fit(file: str) -> None:
    """Each has one place in its file, changes it, and names tests that there are."""
    text = (ROOT / file).read_text()
    own = [slip for slip in SLIPS if slip.file == file]
    for slip in own:
        assert mutants.slipped(slip, text) != text
        for test in slip.tests:
            assert (ROOT / test.partition("::")[0]).exists(), f"{slip.name}: {test}"
    if file.startswith("csrc/"):  # all are built at once
        every = [choice for i, slip in enumerate(own) for choice in mutants.switch(slip, i, text)]
        mutants.replaced(text, every)
