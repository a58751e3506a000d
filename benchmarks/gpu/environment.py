"""The machine: versions, what the device can hold, and what each row kernel takes of it.

python -m benchmarks.gpu.environment --journal FILE
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.gpu import device, journal, modules, plan

LENGTHS = (256, 1024, 4096, 8192, 65536)
"""Candidates of a row for which the driver is asked how many blocks a multiprocessor holds."""

RESOURCES = ("threads", "blocks", "shared", "workspace", "registers", "local", "resident")
"""What torch.ops.pcoherence_cuda.resources returns."""


def facts() -> Iterator[tuple[str, Any]]:
    """The device's own numbers, whether the libraries are there, versions: what is needed first."""
    if device.REHEARSAL:
        yield "device", "none: a rehearsal on the CPU"
        yield "capability", "9.0"
    else:
        properties = torch.cuda.get_device_properties(0)
        yield "device", properties.name
        yield "capability", f"{properties.major}.{properties.minor}"
    yield modules.CPU_FACT, loaded("cpu")
    yield modules.CUDA_FACT, loaded("cuda")
    yield from measure.environment().items()
    yield "cores", os.cpu_count()
    yield "glibc", platform.libc_ver()[1]
    try:
        yield "triton", importlib.import_module("triton").__version__
    except ImportError as error:
        yield "triton", str(error)
    if device.REHEARSAL:
        return
    for name in dir(properties):
        if not name.startswith("_"):
            yield name, str(getattr(properties, name))
    yield "cuda", torch.version.cuda
    yield "driver", printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    yield "nvcc", printed("nvcc", "--version").rpartition("\n")[2]
    yield from resources()


def printed(*command: str) -> str:
    """What a command says, or why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout.strip()


def loaded(name: str) -> str:
    """Load the library for "cpu" or "cuda": LOADED, or why it cannot be."""
    library = importlib.import_module("pcoherence.library")
    try:
        library.load(name)
    except OSError as error:
        return " ".join(str(error).split())[: journal.MESSAGE]
    print(f"{name}: {library.path(name)}", flush=True)
    return modules.LOADED


def resources() -> Iterator[tuple[str, str]]:
    """Of each row kernel, for rows of some lengths."""
    if not hasattr(torch.ops.pcoherence_cuda, "resources"):
        return
    for dtype in (torch.float32, torch.float64):
        like = torch.empty(0, dtype=dtype, device=device.DEVICE)
        for n in LENGTHS:
            for kernel in ("rows",) if dtype == torch.float32 else ("rows", "soft_rank"):
                numbers = torch.ops.pcoherence_cuda.resources(like, kernel, n, n, "auto").tolist()
                named = zip(RESOURCES, numbers, strict=True)
                text = ", ".join(f"{name} {number:,}" for name, number in named)
                yield f"{kernel} {str(dtype).removeprefix('torch.')} n {n:,}", text


def main() -> None:
    """Write each as soon as it is known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--journal", type=Path, required=True)
    path: Path = parser.parse_args().journal
    for name, value in facts():
        journal.write(path, plan.ENVIRONMENT_GROUP, fact=name, value=value)
        print(f"{name}: {value}", flush=True)


if __name__ == "__main__":
    main()
