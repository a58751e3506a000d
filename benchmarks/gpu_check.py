"""One command for a GPU machine: build, test, sanitise, measure.

    make gpu-check [GPU_OUTPUT=DIR]      (or python3 -m benchmarks.gpu_check --output DIR)

Needs no network: that machine's own Python, torch, triton and nvcc are used, nothing is installed,
the extensions are built in place. Every step has a time limit and its own log in DIR, steps go on
after one fails, and summary.txt is rewritten after each, so that a run that is cut off leaves all
it knew. About 8 minutes at most.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Step(NamedTuple):
    """A command, and for how many seconds at most it may run."""

    name: str
    command: list[str]
    seconds: int


def steps(output: Path) -> list[Step]:
    """What is done, the most telling first."""
    python, pytest = (
        sys.executable,
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
    )
    spread = ["-n", "6"] if _has("xdist") else []
    small = [*pytest, "tests/test_gpu.py", "-k", "sanitizer"]
    found = [
        Step("environment", [python, "-c", _ENVIRONMENT], 60),
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 150),
        Step("report", [python, "-m", "pcoherence"], 60),
        Step("tests", [*pytest, "tests/test_gpu.py", *spread, "--durations=10"], 150),
        Step("figures", [python, "-m", "benchmarks.gpu_figures", "--output", str(output)], 120),
        Step("triton tests", [*pytest, "tests/test_triton.py", *spread], 80),
    ]
    if shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            found.append(Step(tool, [*sanitizer, *small, "-k", "sanitizer and cuda"], 60))
    return found


_ENVIRONMENT = """
import subprocess, sys, torch
print("python", sys.version)
print("torch", torch.__version__, "cuda", torch.version.cuda)
print(torch.cuda.get_device_properties(0))
try:
    import triton
    print("triton", triton.__version__)
except ImportError as error:
    print("triton:", error)
subprocess.run(["nvcc", "--version"])
subprocess.run(["git", "log", "-1", "--format=commit %H"])
"""


def _has(module: str) -> bool:
    return (
        subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode
        == 0
    )


def architecture() -> str:
    """The compute capability of this machine's GPU, such as 9.0."""
    code = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"gpu-check: no CUDA device that torch can use\n{done.stderr}")
    return done.stdout.strip()


def run(step: Step, output: Path, environment: dict[str, str]) -> str:
    """Run one step into its log; what became of it."""
    log = output / f"{step.name.replace(' ', '-')}.log"
    start = time.monotonic()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                step.command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=step.seconds,
            )
            outcome = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
        except subprocess.TimeoutExpired:
            outcome = f"CUT OFF after {step.seconds} s"
    tail = log.read_text(errors="replace").splitlines()[-25:]
    print(
        f"--- {step.name}: {outcome}, {time.monotonic() - start:.0f} s", *tail, sep="\n", flush=True
    )
    return outcome


def main() -> None:
    """Do all steps; the exit status is the number of those that did not succeed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    output: Path = parser.parse_args().output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture(),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    summary: list[str] = []
    for step in steps(output):
        summary.append(f"{step.name}: {run(step, output, environment)}")
        (output / "summary.txt").write_text("\n".join(summary) + "\n")
    print("", *summary, sep="\n")
    sys.exit(sum(not line.endswith(": ok") for line in summary))


if __name__ == "__main__":
    main()
