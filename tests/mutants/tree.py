"""Copies of the checkout, with slips in them, and test runs there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slips import Slip, replaced, slipped, switch

ROOT = Path(__file__).parent.parent.parent
NUMBER = "PCOHERENCE_SLIP"
"""Of the native slip that a process has; none where unset."""

HEADER = """#pragma once
extern "C" __attribute__((visibility("hidden"))) int pcoherence_slip;
"""
DEFINITION = """#include <cstdlib>
static const char* told = std::getenv("PCOHERENCE_SLIP");
int pcoherence_slip = told ? std::atoi(told) : 0;
"""


@dataclass(frozen=True)
class Result:
    """What the tests said: `by` is the first that failed, or why there is none."""

    noticed: bool
    by: str
    seconds: float


def copied(folder: Path) -> Path:
    """What git has or would have, under `folder`, and nothing that an earlier run left."""
    shutil.rmtree(folder, ignore_errors=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def with_switches(folder: Path, slips: Sequence[Slip]) -> None:
    """Write all native slips into the sources at once; number i + 1 switches slips[i] on."""
    (folder / "csrc" / "slip.h").write_text(HEADER)
    files = {slip.file for slip in slips if slip.native} | {"csrc/tables.cpp"}
    files.add("csrc/cpu/rows_prelude.h")  # before any target is set
    for file in files:
        path = folder / file
        text = path.read_text()
        choices = [
            choice
            for number, slip in enumerate(slips, start=1)
            if slip.file == file
            for choice in switch(slip, number, text)
        ]
        head = f'#include "{folder / "csrc" / "slip.h"}"\n'
        head += DEFINITION if file == "csrc/tables.cpp" else ""
        path.write_text(head + replaced(text, choices))


def build(folder: Path, slips: Sequence[Slip]) -> None:
    """The CPU extension, or the checkout's where no slip is in it; tests build CUDA's emulation."""
    built = list((ROOT / "pcoherence").glob("_C.*.so"))
    if built and not any(slip.native and "/cuda/" not in slip.file for slip in slips):
        for path in built:
            shutil.copy2(path, folder / "pcoherence")
        return
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PCOHERENCE_CUDA": "0", "PATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(
            f"mutants: the sources with all slips do not build\n{done.stdout}{done.stderr}"
        )


class Worker:
    """Runs tests in a copy, one run after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py")), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        )

    def run(
        self, tests: Sequence[str], log: Path, limit: float, *options: str, number: int = 0
    ) -> Result:
        """The tests, up to the first that fails; more than `limit` seconds are noticed, too."""
        arguments = ["-x", "-rfE", "--tb=short", "-p", "no:cacheprovider", *options, *tests]
        asked = {"arguments": arguments, "environment": {NUMBER: str(number)}, "log": str(log)}
        begin = time.monotonic()
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps({**asked, "limit": limit}), file=self._server.stdin, flush=True)
        code = json.loads(self._server.stdout.readline())
        seconds = time.monotonic() - begin
        if code is None:
            return Result(True, "it hangs", seconds)
        if code == 0:
            return Result(False, "", seconds)
        if code < 0:
            return Result(True, f"signal {-code}", seconds)
        said = log.read_text(errors="replace")
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        if failed is None:
            raise SystemExit(f"mutants: pytest ended with {code}\n{said[-4000:]}")
        return Result(True, failed[1], seconds)

    def tried(self, slip: Slip, number: int, log: Path, limit: float) -> Result:
        """Run the tests that should notice a slip, with it."""
        if slip.native:
            return self.run(slip.tests, log, limit, number=number)
        path = self.folder / slip.file
        text = path.read_text()
        path.write_text(slipped(slip, text))
        try:
            return self.run(slip.tests, log, limit)
        finally:
            path.write_text(text)

    def close(self) -> None:
        self._server.terminate()
        self._server.wait()
