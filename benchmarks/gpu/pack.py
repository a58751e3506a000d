"""Build here what would cost time on a GPU machine, into one folder that is carried there.

    make gpu-pack [CARD_PYTHON=...]        (or python -m benchmarks.gpu.pack --python ...)

The folder, .gpu-pack, gets
    libpcoherence_*.so the libraries, CUDA's for one architecture; for any Python
    truths.pt          float64 truths of the checks, so that no CPU there has to compute them
    triton.tar.xz      Triton's kernels, where that Python has torch and triton as the machine does
    manifest.json      what it was built from
There `make gpu-check` finds it, and uses the modules if the sources are still the same. Python,
torch and triton should have the versions that they have there; torch may be a CPU build. Needs
nvcc and g++; no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.gpu import modules
from benchmarks.gpu.groups import ROOT
from benchmarks.gpu.modules import PACK
from benchmarks.recipe import recipe
from pcoherence import remembered

MOST_BYTES = 56 << 20
"""Of the folder, which is copied to the machine with the tree, perhaps for each run."""

TRUTHS = tuple(f"tests/test_{name}.py" for name in ("gpu", "cuda_rows", "triton", "triton_small"))
"""Tests whose truths are carried."""

TORCH = Path(torch.__file__).parent

HAS_TRITON = "import torch, triton; print(torch.__version__, triton.__version__)"


def run(command: Sequence[object], variables: Mapping[str, str] | None = None) -> None:
    """A command in the project's root; its failure ends all of this."""
    environment = {**os.environ, **(variables or {})}
    subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=True)


def cuda_library(folder: Path, work: Path, capability: str) -> None:
    """The CUDA library, without a CUDA build of torch; `capability` 90 stands for sm_90."""
    os.chdir(ROOT)
    recipe().build_cuda(folder / modules.LIBRARIES[1], work, f"{capability[:-1]}.{capability[-1]}")


def cpu_library(folder: Path) -> None:
    """The CPU library."""
    setup = recipe()
    run(
        [
            *("g++", *setup.CXX_FLAGS, *setup.defines([setup.STABLE_ABI])),
            *("-fPIC", "-shared", f"-I{TORCH / 'include'}", *setup.cpu_sources()),
            *(f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
            *("-o", folder / modules.LIBRARIES[0]),
        ]
    )


def triton_cache(folder: Path, work: Path, python: str, capability: str) -> None:
    """Triton's kernels for the device, by a Triton like the one there.

    Of calls that reach every kernel, the default one among them: some 400, 11 MiB. With --all they
    would be 1,500, take hours on two cores, and make more than MOST_BYTES.
    """
    cache = work / "triton"
    environment = {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    subprocess.run(
        [python, "-m", "benchmarks.gpu.offline", capability],
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    with tarfile.open(folder / "triton.tar.xz", "w:xz") as file:
        file.add(cache, ".")


def truths(folder: Path) -> None:
    """What the checks compare with, by running them in a rehearsal."""
    rehearsal = {"PCOHERENCE_REHEARSAL": "1", "PCOHERENCE_REMEMBERED": str(folder)}
    tests = ["-m", "pytest", *TRUTHS, "-n", "auto", "-p", "no:cacheprovider"]
    run([sys.executable, *tests], rehearsal)
    figures = ["-m", "benchmarks.gpu.figures", "--backend", "cuda", "--part", "accuracy"]
    run([sys.executable, *figures, "--journal", os.devnull], rehearsal)
    print(f"{remembered.gather(folder)} truths")


def tools(python: str) -> str | None:
    """Find everything before anything is built; that Python's torch and triton, or None.

    Raises:
        SystemExit: something is missing; says what.
    """
    missing = [name for name in ("nvcc", "g++") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"gpu-pack: expected {', '.join(missing)} on PATH")
    try:
        subprocess.run([python, "-c", ""], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"gpu-pack: --python: expected a Python; got {python}: {error}") from error
    found = subprocess.run([python, "-c", HAS_TRITON], capture_output=True, text=True)
    return found.stdout.strip() or None


def main() -> None:
    """Build all of it anew; an earlier pack stays until this one is whole."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--capability", default="90", help="90, the default, stands for sm_90")
    parser.add_argument("--python", default="python3.12", help="like the one there")
    arguments = parser.parse_args()
    triton = tools(arguments.python)
    new = PACK.with_name(f"{PACK.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    work = new / "work"
    work.mkdir(parents=True)
    notes: dict[str, object] = {
        **measure.environment(),
        "capability": arguments.capability,
        "sources": modules.sources(),
        "triton": triton or "without triton: its kernels are compiled there",
    }
    steps: list[tuple[str, Callable[[], None]]] = [
        ("cuda", lambda: cuda_library(new, work, arguments.capability)),
        ("cpu", lambda: cpu_library(new)),
        ("truths", lambda: truths(new)),
    ]
    if triton is not None:
        steps += [
            ("triton", lambda: triton_cache(new, work, arguments.python, arguments.capability))
        ]
    for name, step in steps:
        begun = time.monotonic()
        step()
        print(f"{name}: built, {time.monotonic() - begun:.0f} s", flush=True)
    shutil.rmtree(work)
    measure.write_json(new / modules.MANIFEST, notes)
    print(json.dumps(notes, indent=1))
    size = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
    print(f"{PACK.name}: {size / 2**20:.1f} MiB")
    if size > MOST_BYTES:
        raise SystemExit(f"gpu-pack: more than {MOST_BYTES >> 20} MiB")
    shutil.rmtree(PACK, ignore_errors=True)
    new.rename(PACK)


if __name__ == "__main__":
    main()
