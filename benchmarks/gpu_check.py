"""One command for a GPU machine: build, test, sanitise, measure.

    make gpu-check [GPU_OUTPUT=DIR]      (or python3 -m benchmarks.gpu_check --output DIR)

Needs no network: that machine's own Python (3.11 or newer), torch, triton and nvcc are used,
nothing is installed, the extensions are built in place. Every step has a time limit, steps go on
after one fails, and summary.txt is rewritten after each, so that a run that is cut off leaves all
it knew. DIR gets summary.txt, gpu-check.log with what all steps printed, and figures-cuda.json and
figures-triton.json. Under eight minutes.

PCOHERENCE_COMMIT says which commit this is, for copies of the tree without .git.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

DEADLINE = 470
"""Seconds for everything: under eight minutes, which leaves two of a ten-minute job to start it."""

SHORTEST = 5
"""Seconds below which a step is not begun: Python and torch take about that to start."""

PROCESSES = min(12, max(1, (os.cpu_count() or 1) - 4))
"""That run tests: their truths keep a core busy each, and four are left to the rest.

Every process also holds a CUDA context, of about half a GiB: so no more than a dozen.
"""


class Step(NamedTuple):
    """A command, for how many seconds at most it may run, and variables of its environment."""

    name: str
    command: list[str]
    seconds: float
    variables: Mapping[str, str] = {}


def steps(output: Path) -> list[Step]:
    """What is done, the most telling first."""
    python = sys.executable
    # Not the project's addopts, whose -q leaves a run that is cut off with nothing but dots.
    pytest = [python, "-m", "pytest", "-o", "addopts=", "--strict-markers", "-v", "--tb=short"]
    pytest += ["-p", "no:cacheprovider"]
    if _has("pytest_timeout"):
        pytest.append("--timeout=60")
    spread = ["-n", str(PROCESSES)] if _has("xdist") else []
    if spread and _has("pytest_timeout"):
        # A signal would wait for a kernel that hangs. This ends the worker; xdist starts another.
        spread.append("--timeout-method=thread")
    figures = [python, "-m", "benchmarks.gpu_figures", "--output", str(output), "--backend"]
    found = [
        Step("environment", [python, "-c", _ENVIRONMENT], 30),
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 240),
        Step("report", [python, "-m", "pcoherence"], 30),
        Step("tests", [*pytest, "tests/test_gpu.py", *spread, "--durations=10"], 150),
        # A process for each: after an illegal access CUDA refuses all that the process asks.
        Step("figures cuda", [*figures, "cuda"], 90),
        Step("figures triton", [*figures, "triton"], 90),
        Step("triton tests", [*pytest, "tests/test_triton.py", *spread], 110),
    ]
    if shutil.which("compute-sanitizer"):
        tests = ["tests/test_gpu.py", "-k", "sanitizer and cuda"]
        for tool, options in (
            # Calls by which torch asks what the driver can do may fail; they are not our errors.
            ("memcheck", ["--report-api-errors", "no"]),
            ("racecheck", []),
        ):
            sanitizer = ["compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "9"]
            # In torch's cache, an access out of bounds would hit another tensor unseen.
            uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            found.append(Step(tool, [*sanitizer, *pytest, *tests], 60, uncached))
    return found


_ENVIRONMENT = """
import os, subprocess, sys, torch

def show(*command):
    try:
        subprocess.run(command)
    except OSError as error:
        print(f"{command[0]}: {error}")

print("python", sys.version)
print("torch", torch.__version__, "cuda", torch.version.cuda)
try:
    import triton
    print("triton", triton.__version__)
except ImportError as error:
    print("triton:", error)
print("CUDA_HOME", os.environ.get("CUDA_HOME"))
show("nvcc", "--version")
if commit := os.environ.get("PCOHERENCE_COMMIT"):
    print("commit", commit)
else:
    show("git", "log", "-1", "--format=commit %H")
print(torch.cuda.get_device_properties(0))
"""


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def architecture() -> str:
    """The compute capability of this machine's GPU, such as 9.0."""
    code = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE
    )
    if done.returncode != 0:
        raise SystemExit(f"gpu-check: no CUDA device that torch can use\n{done.stderr}")
    return done.stdout.strip()


def toolkit(dryrun: str) -> str | None:
    """The toolkit's folder, as `nvcc --dryrun` prints it."""
    top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
    return os.path.realpath(top[1].strip()) if top else None


def cuda_home() -> dict[str, str]:
    """CUDA_HOME where nothing says it: torch guesses from nvcc's path, which may be a wrapper's."""
    if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return {}
    command = ["nvcc", "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    try:
        found = toolkit(subprocess.run(command, capture_output=True, text=True).stderr)
    except OSError:  # no nvcc
        return {}
    return {"CUDA_HOME": found} if found else {}


def run(step: Step, log: Path, environment: Mapping[str, str], left: float) -> str:
    """Run one step, in at most the seconds that are left, into the log; what became of it."""
    if left < SHORTEST:
        return "SKIPPED: no time left"
    limit = min(step.seconds, left)
    with log.open("a") as file:
        command = " ".join(step.command).partition("\n")[0]
        print(f"=== {step.name}: {command}", file=file, flush=True)
        printed = file.tell()
        start = time.monotonic()
        # A group of its own: what the step has started ends with it and does not stay on the GPU.
        # Without setsid, after which whoever ends all that belongs to a job would miss it.
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**environment, **step.variables},
            stdin=subprocess.DEVNULL,  # not the terminal's group: reading from it would stop it
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            status = process.wait(limit)
            outcome = "ok" if status == 0 else f"FAILED ({status})"
        except subprocess.TimeoutExpired:
            outcome = f"CUT OFF after {limit:.0f} s"
        finally:  # also where this program is interrupted
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        print(f"\n=== {step.name}: {outcome}, {time.monotonic() - start:.0f} s\n", file=file)
    tail = log.read_bytes()[printed:].decode(errors="replace").splitlines()[-25:]
    print(f"--- {step.name}", *tail, sep="\n", flush=True)
    return outcome


def run_all(
    steps: Sequence[Step], output: Path, environment: Mapping[str, str], deadline: float
) -> list[str]:
    """Run them one after the other until time.monotonic() reaches the deadline; the summary."""
    log = output / "gpu-check.log"
    log.write_text("")
    summary: list[str] = []
    for step in steps:
        outcome = run(step, log, environment, deadline - time.monotonic())
        summary.append(f"{step.name}: {outcome}")
        (output / "summary.txt").write_text("\n".join(summary) + "\n")
    return summary


def main() -> None:
    """Do all steps; the exit status is the number of those that did not succeed."""
    deadline = time.monotonic() + DEADLINE
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    output: Path = parser.parse_args().output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        **cuda_home(),
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture(),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    summary = run_all(steps(output), output, environment, deadline)
    print("", *summary, sep="\n")
    sys.exit(sum(not line.endswith(": ok") for line in summary))


if __name__ == "__main__":
    main()
