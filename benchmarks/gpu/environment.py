"""The machine: versions, what the device can hold, and what each row kernel takes of it.

python -m benchmarks.gpu.environment --journal FILE
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.gpu import device, journal, modules, plan

LENGTHS = (256, 1024, 4096, 8192, 65536)
"""Candidates of a row for which the driver is asked how many blocks a multiprocessor holds."""

RESOURCES = ("threads", "blocks", "shared", "workspace", "registers", "local", "resident")
"""What torch.ops.pcoherence_cuda.resources returns."""


def facts() -> dict[str, Any]:
    """Versions, and the device's own numbers."""
    found: dict[str, Any] = {**measure.environment(), "cores": os.cpu_count()}
    found["glibc"] = platform.libc_ver()[1]
    try:
        found["triton"] = importlib.import_module("triton").__version__
    except ImportError as error:
        found["triton"] = str(error)
    if device.REHEARSAL:
        return {**found, "device": "none: a rehearsal on the CPU", "capability": "9.0"}
    properties = torch.cuda.get_device_properties(0)
    for name in dir(properties):
        if not name.startswith("_"):
            found[name] = str(getattr(properties, name))
    found["device"] = properties.name
    found["capability"] = f"{properties.major}.{properties.minor}"
    found["cuda"] = torch.version.cuda
    found["driver"] = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["nvcc"] = printed("nvcc", "--version").rpartition("\n")[2]
    return found


def printed(*command: str) -> str:
    """What a command says, or why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout.strip()


def imported(name: str) -> str:
    """Import an extension: LOADED, or why it cannot be."""
    try:
        importlib.import_module(f"pcoherence.{name}")
    except (ImportError, OSError) as error:
        return " ".join(str(error).split())[: journal.MESSAGE]
    return modules.LOADED


def resources() -> dict[str, str]:
    """Of each row kernel, for rows of some lengths."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        like = torch.empty(0, dtype=dtype, device=device.DEVICE)
        for n in LENGTHS:
            for kernel in ("rows", "soft_rank"):
                numbers = torch.ops.pcoherence_cuda.resources(like, kernel, n, n, "auto").tolist()
                text = ", ".join(
                    f"{name} {x:,}" for name, x in zip(RESOURCES, numbers, strict=True)
                )
                found[f"{kernel} {str(dtype).removeprefix('torch.')} n {n:,}"] = text
    return found


def main() -> None:
    """Write them, the cheapest first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--journal", type=Path, required=True)
    path: Path = parser.parse_args().journal

    def write(found: dict[str, Any]) -> None:
        for name, value in found.items():
            journal.write(path, plan.ENVIRONMENT_GROUP, fact=name, value=value)
            print(f"{name}: {value}", flush=True)

    write(facts())
    write({modules.CPU_FACT: imported("_C")})
    module = imported("_C_cuda")
    write({modules.CUDA_FACT: module})
    if module == modules.LOADED and not device.REHEARSAL:
        write(resources())


if __name__ == "__main__":
    main()
