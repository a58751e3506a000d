"""The documentation's pages, built once for all tests of a run."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def run(*command: str) -> str:
    """What a Python command prints; its output is the message where it fails."""
    done = subprocess.run(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(builder: str, folder: Path) -> str:
    options = ["-q", "-W", "--keep-going", "-n", "-b", builder]
    return run("-m", "sphinx", *options, str(DOCS), str(folder / builder))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, cpu_backend: str) -> Path:
    """The folder of HTML pages, which build without a warning."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers; the first builds, others wait
    with (folder / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "html" / "objects.inv").exists():  # written last
            build("html", folder)
    return folder / "html"
