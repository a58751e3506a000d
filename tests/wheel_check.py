"""Install the wheel in fresh environments outside the tree, and try it: `make wheel-check`.

    python tests/wheel_check.py WHEEL [--python python3.10 ...] [--torch 2.11.0 2.13.0 ...]

Every Python that is found meets every torch that can be installed for it; what cannot be had is
said. A CUDA build of torch takes some GB each; environments are removed again.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13")
TORCHES = ("2.11.0", "2.13.0", "2.14.1")

SMOKE = """
import sys, torch, pcoherence
from pcoherence import library

library.load("cpu")
x = torch.randn(65, 8, generator=torch.manual_seed(0)).double().requires_grad_()
y = torch.randn(65, 4, generator=torch.manual_seed(1)).double()

def loss(student, backend):
    return pcoherence.perception_coherence_loss(student, y, backend=backend)

expected = loss(x, "reference")
(slope,) = torch.autograd.grad(expected, x)
calls = {"eager": lambda s: loss(s, "cpu")}
if "--compile" in sys.argv:
    calls["compiled"] = torch.compile(calls["eager"], fullgraph=True, backend="aot_eager")
for name, call in calls.items():
    found = call(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, x)[0], slope, rtol=1e-8, atol=1e-12)
ranks = (x.detach()[:, :1].t().contiguous(), None, None, 0.3, "auto")
torch.library.opcheck(torch.ops.pcoherence.soft_rank.default, ranks)
for said in (pcoherence.__file__, library.path("cpu"), pcoherence.__version__):
    print(said)
"""
"""Value, gradient, opcheck, compile; what it prints says where it all came from."""


def found_python(python: str) -> str | None:
    """A Python on PATH or among pyenv's; None without it."""
    known = sorted(
        Path.home().glob(f".pyenv/versions/{python.removeprefix('python')}.*/bin/python3")
    )
    for found in (shutil.which(python), *map(str, known)):
        if found is None:
            continue
        done = subprocess.run([found, "-c", ""], capture_output=True)
        if done.returncode == 0:
            return found
    return None


def check(python: str, torch: str, wheel: Path) -> str:
    """ "works", or what went wrong, in one line."""
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder, "env", "bin", "python")
        install = [str(own), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        steps: Sequence[tuple[str, list[str]]] = (
            ("venv", [python, "-m", "venv", str(own.parent.parent)]),
            ("torch", [*install, f"torch=={torch}", "numpy"]),
            ("wheel", [*install, "--no-deps", str(wheel)]),
            ("smoke test", [str(own), "-I", "-c", SMOKE, "--compile"]),
        )
        for name, step in steps:
            done = subprocess.run(step, capture_output=True, text=True, cwd=folder)
            if done.returncode != 0:
                lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
                return f"{name}: {lines[-1][:160]}"
        inside = done.stdout.splitlines()[:2]
        if not all(Path(line).is_relative_to(Path(folder).resolve()) for line in inside):
            return f"smoke test: it ran elsewhere, {inside}"
    return "works"


def main() -> None:
    """A line for each environment; the exit status says whether all that could be had work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="NAME")
    parser.add_argument("--torch", nargs="+", default=TORCHES, metavar="VERSION")
    arguments = parser.parse_args()
    bad = 0
    for name in arguments.python:
        python = found_python(name)
        for torch in arguments.torch if python else ():
            begun = time.monotonic()
            said = check(python, torch, arguments.wheel.resolve())
            missing = said.startswith(("venv", "torch"))  # not the wheel's fault
            bad += said != "works" and not missing
            print(
                f"{name:<11} torch {torch:<8} {time.monotonic() - begun:4.0f} s  {said}", flush=True
            )
        if python is None:
            print(f"{name:<11} not here", flush=True)
    sys.exit(min(bad, 1))


if __name__ == "__main__":
    main()
