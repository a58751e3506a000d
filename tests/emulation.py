"""The CUDA kernels without a GPU, for every test that wants them; compiled once."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import pcoherence
from benchmarks.recipe import recipe
from pcoherence import backends, ops
from pcoherence.backends import cuda

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEPT = ROOT / ".benchmarks" / "tests"
"""Compiling takes half a minute of a core and more: once for all processes of a run, and later."""

SOURCES = ("csrc/tables.cpp", "csrc/cuda/ops.cpp", "tests/emulate.cpp")
Emulate = Callable[..., None]


class Emulated(cuda.CudaBackend):
    """The backend on CPU tensors."""

    made = None

    def available(self) -> None:
        return None

    def operators(self) -> ops.Operators:
        assert self.made is not None
        return self.made

    def refuses(self, tensor: torch.Tensor) -> str | None:
        return None if tensor.device.type == "cpu" else "it is emulated on the CPU"


@contextlib.contextmanager
def kept(name: str, *ingredients: object) -> Iterator[Path]:
    """A folder for what is made of csrc/ and the ingredients; one process makes, others wait."""
    key = hashlib.sha256(repr((ingredients, torch.__version__)).encode())
    for path in [*sorted((ROOT / "csrc").rglob("*.*")), *sorted(ROOT.glob("tests/emulate.*"))]:
        key.update(path.read_bytes())
    folder = KEPT / f"{name}-{key.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def compiled(compiler: str) -> Path:
    """The kernels with the emulation in place of the launcher."""
    root = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-g0", "-fPIC", "-Werror=switch", "-DPCOH_EMULATE"]
    setup = recipe()
    flags += [*setup.defines([setup.STABLE_ABI]), f"-I{root / 'include'}"]
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        flags += ["-mfma", "-ffp-contract=fast"]  # nvcc contracts, too
    with kept("emulation", flags) as folder:
        path = folder / "emulation.so"
        if path.exists():
            return path
        objects = [str(folder / f"{Path(source).stem}.o") for source in SOURCES]
        jobs = [
            subprocess.Popen([compiler, *flags, "-c", source, "-o", target], cwd=ROOT)
            for source, target in zip(SOURCES, objects, strict=True)
        ]
        assert [job.wait() for job in jobs] == [0] * len(jobs)
        libraries = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        part = folder / "emulation.part"
        subprocess.run([compiler, "-shared", "-o", part, *objects, *libraries], check=True)
        part.rename(path)
    return path


@functools.cache
def loaded() -> ctypes.CDLL | None:
    """The library, loaded into torch; None on a GPU, where the kernels are themselves."""
    if DEVICE == "cuda":
        assert pcoherence.available_backends()["cuda"] is None
        return None
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the kernels with")
    path = str(compiled(compiler))
    torch.ops.load_library(path)
    Emulated.made = ops.Operators("pcoherence_emulated")
    cuda.implement(Emulated.made, "CPU")
    return ctypes.CDLL(path)


def counted(what: str) -> int:
    """ "barriers" or "slow_atomics" of emulated rows so far: what the path taken can be told by."""
    library = loaded()
    assert library is not None
    count = getattr(library, f"pcoherence_{what}")
    count.restype = ctypes.c_long
    return int(count())


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulate]:
    """Sets the threads of a block, its bytes of shared memory (0: as on a GPU), and the seed.

    Meanwhile backend "cuda" is the emulation; on a GPU it is itself, and its plan the device's.
    """
    library = loaded()
    if library is None:
        yield lambda **_: None
        return
    monkeypatch.setitem(backends.REGISTRY, "cuda", Emulated())
    # Under another name than the CUDA extension's operators, which may be loaded as well.
    monkeypatch.setattr(torch.ops, "pcoherence_cuda", torch.ops.pcoherence_cuda_emulated)

    def configure(threads: int = 0, shared: int = 0, seed: int = 0) -> None:
        library.pcoherence_emulate(threads, ctypes.c_long(shared), seed)

    configure()
    yield configure
    configure()
