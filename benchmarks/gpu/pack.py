"""Build here what would cost time on a GPU machine, into one folder that is carried there.

    make gpu-pack [CARD_PYTHON=...]        (or python -m benchmarks.gpu.pack --python ...)

The folder, .gpu-pack, gets
    _C_cuda.abi3.so    the CUDA extension, for one architecture; from Python 3.10 on
    _C.*.so            the CPU extension, for a Python like the one there
    truths.pt          float64 truths of the checks, so that no CPU there has to compute them
    triton.tar.xz      Triton's kernels, where that Python has torch and triton as the machine does
    manifest.json      what it was built from
There `make gpu-check` finds it, and uses the modules if the sources are still the same. Python,
torch and triton should have the versions that they have there; torch may be a CPU build. Needs
nvcc, g++ and gcc; no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import measure
from benchmarks.gpu import modules
from benchmarks.gpu.groups import ROOT
from benchmarks.gpu.modules import PACK
from pcoherence import remembered

MOST_BYTES = 48 << 20
"""Of the folder, which is copied to the machine with the tree, perhaps for each run."""

TRUTHS = ("tests/test_gpu.py", "tests/test_cuda_rows.py", "tests/test_triton.py")
"""Tests whose truths are carried."""

LIBRARIES = Path(torch.__file__).parent / "lib"

HEADERS = 'import sysconfig as s; print(s.get_path("include"), s.get_config_var("EXT_SUFFIX"))'
HAS_TRITON = "import torch, triton; print(torch.__version__, triton.__version__)"


def run(command: Sequence[object], variables: Mapping[str, str] | None = None) -> None:
    """A command in the project's root; its failure ends all of this."""
    environment = {**os.environ, **(variables or {})}
    subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=True)


def includes() -> list[str]:
    """Torch's headers."""
    return [f"-I{Path(torch.__file__).parent / 'include'}"]


def recipe() -> Any:
    """setup.py as a module: sources and flags are said there alone."""
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def defines(macros: Sequence[tuple[str, str | None]]) -> list[str]:
    """As the compiler takes them."""
    return [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in macros]


def cuda_module(folder: Path, work: Path, capability: str, cudart: Path) -> None:
    """The CUDA extension, without a CUDA build of torch.

    What it needs of libtorch_cuda is found when it is loaded: a stub of that name stands in for
    it, so that the loader will look there.
    """
    setup = recipe()
    architecture = f"arch=compute_{capability},code=sm_{capability}"
    nvcc = ["nvcc", *setup.NVCC_FLAGS, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    cxx = ["g++", *setup.CXX_FLAGS, *defines(setup.CUDA_MACROS), "-fPIC", *includes()]
    cxx += [f"-I{sysconfig.get_path('include')}"]
    jobs, objects = [], []
    for source in setup.CUDA_SOURCES:
        objects.append(work / f"{Path(source).stem}.o")
        compiler = [*nvcc, "-gencode", architecture] if source.endswith(".cu") else cxx
        jobs.append([*compiler, "-c", source, "-o", str(objects[-1])])
    running = [subprocess.Popen(job, cwd=ROOT) for job in jobs]
    for job, process in zip(jobs, running, strict=True):
        if process.wait() != 0:
            raise SystemExit(f"gpu-pack: failed: {shlex.join(job)}")
    stub = work / "libtorch_cuda.so"
    nothing = work / "stub.c"
    nothing.write_text("void pcoherence_stub(void) {}\n")
    run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", nothing, "-o", stub])
    run(
        [
            *("g++", "-shared", "-Wl,--no-as-needed", *objects),
            *(f"-L{work}", f"-L{LIBRARIES}", f"-L{cudart}"),
            *("-ltorch_cuda", "-ltorch_cpu", "-lc10", "-lcudart"),
            *("-o", folder / modules.CUDA_MODULE),
        ]
    )


def cpu_module(folder: Path, include: str, suffix: str) -> None:
    """The CPU extension for another Python, whose headers and names these are."""
    setup = recipe()
    pybind = importlib.import_module("pybind11").get_include()
    run(
        [
            *("g++", *setup.CXX_FLAGS, *defines([setup.STABLE_ABI])),
            *("-DTORCH_EXTENSION_NAME=_C", "-fPIC", "-shared", *includes()),
            *(f"-I{include}", f"-I{pybind}", *setup.cpu_sources()),
            *(f"-L{LIBRARIES}", "-ltorch", "-ltorch_cpu", "-lc10", "-o", folder / f"_C{suffix}"),
        ]
    )


def triton_cache(folder: Path, work: Path, python: str, capability: str) -> None:
    """Triton's kernels for the device, by a Triton like the one there."""
    cache = work / "triton"
    environment = {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    subprocess.run(
        [python, "-m", "benchmarks.gpu.offline", capability, "--all"],
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


class Tools(NamedTuple):
    """What a pack is built with."""

    cudart: Path  # folder of libcudart
    include: str  # headers of the other Python
    suffix: str  # of its extension modules
    triton: str | None  # versions of its torch and triton; None without them


def tools(python: str) -> Tools:
    """Find everything before anything is built.

    Raises:
        SystemExit: something is missing; says what.
    """
    missing = [name for name in ("nvcc", "g++", "gcc") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"gpu-pack: expected {', '.join(missing)} on PATH")
    places = [Path(modules.toolkit_folder(), name) for name in ("lib64", "lib")]
    cudart = next((place for place in places if (place / "libcudart.so").exists()), None)
    if cudart is None:
        raise SystemExit(f"gpu-pack: expected libcudart.so in {' or '.join(map(str, places))}")
    try:
        told = subprocess.run([python, "-c", HEADERS], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"gpu-pack: --python: expected a Python; got {python}: {error}") from error
    include, suffix = told.stdout.split()
    if not Path(include, "Python.h").exists():
        raise SystemExit(f"gpu-pack: --python: expected its headers in {include}; got no Python.h")
    found = subprocess.run([python, "-c", HAS_TRITON], capture_output=True, text=True)
    return Tools(cudart, include, suffix, found.stdout.strip() or None)


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
    found = tools(arguments.python)
    new = PACK.with_name(f"{PACK.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    work = new / "work"
    work.mkdir(parents=True)
    notes: dict[str, object] = {
        **measure.environment(),
        "capability": arguments.capability,
        "sources": modules.sources(),
        "triton": found.triton or "without triton: its kernels are compiled there",
    }
    steps: list[tuple[str, Callable[[], None]]] = [
        ("_C_cuda", lambda: cuda_module(new, work, arguments.capability, found.cudart)),
        ("_C", lambda: cpu_module(new, found.include, found.suffix)),
        ("truths", lambda: truths(new)),
    ]
    if found.triton is not None:
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
