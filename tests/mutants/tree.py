"""Slips in copies of the checkout, and test runs there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkout import ROOT

from mutants.slips import Slip, replaced, slipped, switch

NUMBER = "PCOHERENCE_SLIP"
"""Of the native slip that a process has; none where unset."""

HANGS = "it hangs"

HEADER = """#pragma once
extern "C" __attribute__((visibility("default"))) int pcoherence_slip;
"""
DEFINITION = """#include <cstdlib>
static const char* told = std::getenv("PCOHERENCE_SLIP");
int pcoherence_slip = told ? std::atoi(told) : 0;
"""


@dataclass(frozen=True)
class Result:
    """What the tests said; `by`: the first that failed, HANGS, a signal, or what went wrong."""

    noticed: bool
    by: str
    seconds: float


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
    """The CPU library, or the checkout's where no slip is in it; tests build CUDA's emulation."""
    built = list((ROOT / "pcoherence").glob("*.so"))
    if built and not any(slip.native and "/cuda/" not in slip.file for slip in slips):
        for file in built:
            shutil.copy2(file, folder / "pcoherence")
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
            start_new_session=True,  # an interrupt is for this process alone
            env=os.environ
            | {
                "PYTHONPATH": str(folder),
                "PYTHONDONTWRITEBYTECODE": "1",  # or a slip of the same size and second is not seen
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",  # GPU kernels are emulated and interpreted
            },
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
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError("mutants: the process that runs the tests has ended")
        code = json.loads(answer)
        seconds = time.monotonic() - begin
        if code is None:
            return Result(True, HANGS, seconds)
        if code == 0:
            return Result(False, "", seconds)
        if code < 0 and -code != signal.SIGKILL:  # which ends what takes too much memory
            return Result(True, f"signal {-code}", seconds)
        said = log.read_text(errors="replace")
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
        if code == 1 and failed is not None:
            return Result(True, failed[1], seconds)
        return Result(False, f"pytest ended with {code}: {log}", seconds)

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
