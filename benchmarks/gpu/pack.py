"""Build here what would cost time on a GPU machine, into one folder that is carried there.

    make gpu-pack [CARD_PYTHON=...]        (or python -m benchmarks.gpu.pack --python ...)

The folder, .gpu-pack, gets
    _C_cuda.abi3.so    the CUDA extension, for one architecture; from Python 3.10 on
    _C.*.so            the CPU extension, where the headers of such a Python are found
    truths.pt          float64 truths of the checks, so that no CPU there computes any
    triton.tar.xz      Triton's kernels, where that Python has torch and triton as the machine does
    manifest.json      what it was built from
There `make gpu-check` finds it. Needs nvcc, g++ and a CPU build of torch; no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.gpu.check import PACK, ROOT, cuda_home
from pcoherence import remembered

MOST_BYTES = 48 << 20
"""Of the folder: it travels with a working tree, the two in less than 64 MiB."""

TRUTHS = ("tests/test_gpu.py", "tests/test_cuda_rows.py", "tests/test_triton.py")
"""Tests whose truths are carried."""

HEADERS = 'import sysconfig as s; print(s.get_path("include"), s.get_config_var("EXT_SUFFIX"))'
HAS_TRITON = "import torch, triton; print(torch.__version__, triton.__version__)"


def run(command: Sequence[object], variables: Mapping[str, str] | None = None) -> None:
    """A command in the project's root; its failure ends all of this."""
    subprocess.run(list(map(str, command)), cwd=ROOT, env={**os.environ, **(variables or {})},
                   check=True)  # fmt: skip


def includes() -> list[str]:
    """Torch's headers."""
    return [f"-I{Path(torch.__file__).parent / 'include'}"]


def settings() -> tuple[list[str], list[str], tuple[str, str]]:
    """What setup.py builds with: flags of C++, of nvcc, and the oldest torch that will do."""
    found: dict[str, object] = {}
    source = (ROOT / "setup.py").read_text().partition("\ndef headers")[0]
    exec(compile(source, "setup.py", "exec"), found)
    return found["CXX_FLAGS"], found["NVCC_FLAGS"], found["STABLE_ABI"]  # type: ignore[return-value]


def cuda_module(folder: Path, work: Path, capability: str) -> None:
    """The CUDA extension, without a CUDA build of torch.

    What it needs of libtorch_cuda is found when it is loaded: a stub of that name stands in for
    it, so that the loader will look there.
    """
    cxx, nvcc, (name, version) = settings()
    defines = [f"-D{name}={version}", "-DUSE_CUDA"]
    home = Path(cuda_home().get("CUDA_HOME") or os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    launch = work / "launch.o"
    architecture = f"arch=compute_{capability},code=sm_{capability}"
    jobs = [
        [
            *("nvcc", *nvcc, "-Xcompiler", "-fPIC,-fvisibility=hidden", "-gencode", architecture),
            *("-c", "csrc/cuda/launch.cu", "-o", str(launch)),
        ]
    ]
    objects = [launch]
    python = subprocess.run([sys.executable, "-c", HEADERS], capture_output=True, text=True)
    for source in ("csrc/tables.cpp", "csrc/cuda/ops.cpp", "csrc/cuda/module.cpp"):
        objects.append(work / f"{Path(source).stem}.o")
        jobs.append(
            [
                *("g++", *cxx, *defines, "-fPIC", *includes(), f"-I{python.stdout.split()[0]}"),
                *("-c", source, "-o", str(objects[-1])),
            ]
        )
    running = [subprocess.Popen(job, cwd=ROOT) for job in jobs]
    for job, process in zip(jobs, running, strict=True):
        if process.wait() != 0:
            raise SystemExit(f"gpu-pack: failed: {shlex.join(job)}")
    stub = work / "libtorch_cuda.so"
    nothing = work / "stub.c"
    nothing.write_text("void pcoherence_stub(void) {}\n")
    run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", nothing, "-o", stub])
    libraries = Path(torch.__file__).parent / "lib"
    cudart = next(path for path in (home / "lib64", home / "lib") if path.is_dir())
    run(
        [
            *("g++", "-shared", "-Wl,--no-as-needed", *objects),
            *(f"-L{work}", f"-L{libraries}", f"-L{cudart}"),
            *("-ltorch_cuda", "-ltorch_cpu", "-lc10", "-lcudart"),
            *("-o", folder / "_C_cuda.abi3.so"),
        ]
    )


def cpu_module(folder: Path, python: str) -> str | None:
    """The CPU extension for another Python; why not, or None."""
    try:
        told = subprocess.run([python, "-c", HEADERS], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"there is no {python} here ({error})"
    include, suffix = told.stdout.split()
    if not Path(include, "Python.h").exists():
        return f"{python} has no headers in {include}"
    import pybind11

    cxx, _, (name, version) = settings()
    sources = ["csrc/tables.cpp", *sorted(map(str, (ROOT / "csrc/cpu").glob("*.cpp")))]
    libraries = Path(torch.__file__).parent / "lib"
    run(
        [
            *("g++", *cxx, f"-D{name}={version}", "-DTORCH_EXTENSION_NAME=_C", "-fPIC", "-shared"),
            *(*includes(), f"-I{include}", f"-I{pybind11.get_include()}", *sources),
            *(f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", "-o", folder / f"_C{suffix}"),
        ]
    )
    return None


def triton_cache(folder: Path, work: Path, python: str, capability: str) -> str | None:
    """Triton's kernels for the device, by a Triton like the one there; why not, or None."""
    told = subprocess.run([python, "-c", HAS_TRITON], capture_output=True, text=True)
    if told.returncode != 0:
        return f"{python} has no torch and triton; they are compiled there"
    cache = work / "triton"
    environment = {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    command = [python, "-m", "pcoherence.kernels.offline", capability, "--all"]
    subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    with tarfile.open(folder / "triton.tar.xz", "w:xz") as file:
        file.add(cache, ".")
    return None


def truths(folder: Path) -> None:
    """What the checks compare with, by running them in a rehearsal."""
    rehearsal = {"PCOHERENCE_REHEARSAL": "1", "PCOHERENCE_REMEMBERED": str(folder)}
    tests = ["-m", "pytest", *TRUTHS, "-n", "auto", "-p", "no:cacheprovider"]
    run([sys.executable, *tests], rehearsal)
    figures = ["-m", "benchmarks.gpu.figures", "--backend", "cuda", "--part", "accuracy"]
    run([sys.executable, *figures, "--journal", os.devnull], rehearsal)
    print(f"{remembered.gather(folder)} truths")


def size(folder: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Build all of it anew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", default="90", help="such as 90 for sm_90")
    parser.add_argument("--python", default="python3.12", help="like the one there")
    arguments = parser.parse_args()
    shutil.rmtree(PACK, ignore_errors=True)
    work = PACK / "work"
    work.mkdir(parents=True)
    notes: dict[str, object] = {**measure.environment(), "capability": arguments.capability}
    steps: list[tuple[str, Callable[[], str | None]]] = [
        ("_C_cuda", lambda: cuda_module(PACK, work, arguments.capability)),
        ("_C", lambda: cpu_module(PACK, arguments.python)),
        ("truths", lambda: truths(PACK)),
        ("Triton", lambda: triton_cache(PACK, work, arguments.python, arguments.capability)),
    ]
    for name, step in steps:
        begun = time.monotonic()
        missing = step()
        notes[name] = missing or "built"
        print(f"{name}: {notes[name]}, {time.monotonic() - begun:.0f} s", flush=True)
    shutil.rmtree(work)
    measure.write_json(PACK / "manifest.json", notes)
    print(json.dumps(notes, indent=1))
    found = size(PACK)
    print(f"{PACK.name}: {found / 2**20:.1f} MiB")
    if found > MOST_BYTES:
        raise SystemExit(f"gpu-pack: more than {MOST_BYTES >> 20} MiB")


if __name__ == "__main__":
    main()
