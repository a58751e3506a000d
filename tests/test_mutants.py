"""The slips of tests/mutants still fit the code, and its processes tell how tests end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from mutants import slips

MUTANTS = Path(__file__).parent / "mutants"


SLIPS = [slip for path in sorted((MUTANTS / "slips").glob("*.toml")) for slip in slips.read(path)]


def test_every_folder_has_slips() -> None:
    folders = {slip.file.split("/")[0] for slip in SLIPS}
    assert folders == {"pcoherence", "csrc", "kernels", "benchmarks"}
    assert len({(slip.file, slip.name) for slip in SLIPS}) == len(SLIPS)


@pytest.mark.parametrize("file", sorted({slip.file for slip in SLIPS}))
def test_slips_fit(file: str) -> None:
    """Each has one place in its file, changes it, and names tests that there are."""
    text = (ROOT / file).read_text()
    own = [slip for slip in SLIPS if slip.file == file]
    for slip in own:
        assert slips.slipped(slip, text) != text
        for test in slip.tests:
            path, _, name = test.partition("::")
            function = f"def {name.partition('[')[0]}("
            assert not name or function in (ROOT / path).read_text(), f"{slip.name}: {test}"
            assert (ROOT / path).exists(), f"{slip.name}: {test}"
    if file.startswith("csrc/"):  # all are built at once
        every = [choice for i, slip in enumerate(own) for choice in slips.switch(slip, i, text)]
        slips.replaced(text, every)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process for each slip is a fork")
def test_processes_tell_how_tests_end(tmp_path: Path) -> None:
    test = tmp_path / "test_ends.py"
    test.write_text(
        "import os, time\n"
        "def test_good(): assert os.environ['SAID'] == 'this'\n"
        "def test_bad(): assert False\n"
        "def test_crash(): os.abort()\n"
        "def test_hang(): time.sleep(600)\n"
    )
    asked = [
        {
            "arguments": ["-o", "addopts=", "--rootdir", str(tmp_path), f"{test}::test_{name}"],
            "environment": {"SAID": "this"},
            "log": str(tmp_path / "log.txt"),
            "limit": 3 if name == "hang" else 60,
        }
        for name in ("good", "bad", "crash", "hang", "good")
    ]
    done = subprocess.run(
        [sys.executable, str(MUTANTS / "server.py"), str(tmp_path)],
        input="".join(json.dumps(one) + "\n" for one in asked),
        capture_output=True,
        text=True,
        check=True,
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [0, 1, -6, None, 0]
