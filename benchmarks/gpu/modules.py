"""The libraries on a GPU machine: as packed elsewhere, where that fits, or built there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.groups import ROOT

PACK = ROOT / ".gpu-pack"
MANIFEST = "manifest.json"
LIBRARIES = ("libpcoherence_cpu.so", "libpcoherence_cuda.so")
"""As pcoherence/library.py names them; to import that here would load those that are to go."""

CPU_FACT, CUDA_FACT = "cpu library", "cuda library"
LOADED = "loaded"
"""Facts of the environment: whether the libraries can be loaded, or why not."""


def sources() -> str:
    """A hash of what the libraries are built from."""
    found = hashlib.sha256((ROOT / "setup.py").read_bytes())
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def manifest(pack: Path) -> dict[str, Any]:
    """What a pack was built from; empty where there is none."""
    path = pack / MANIFEST
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def unfit(pack: Path) -> str | None:
    """Why the libraries of a pack cannot serve here; None: they can."""
    said = manifest(pack)
    if not said:
        return f"there is no {pack.name}, or it is not whole"
    if said.get("sources") != sources():
        return f"{pack.name} was built from other sources"
    missing = [name for name in LIBRARIES if not (pack / name).exists()]
    return f"{pack.name} has no {', '.join(missing)}" if missing else None


def use(pack: Path, package: Path) -> str | None:
    """Put a pack's libraries where the package finds them; why not, or None."""
    why = unfit(pack)
    if why is None:
        install(pack, package)
    return why


def install(folder: Path, package: Path) -> list[str]:
    """Put the libraries in a folder where the package finds them; their names."""
    libraries = [folder / name for name in LIBRARIES if (folder / name).exists()]
    for file in libraries:
        part = package / f"{file.name}.part"  # a process may have mapped the old one
        shutil.copyfile(file, part)
        part.replace(package / file.name)
    return [file.name for file in libraries]


def install_triton(pack: Path, cache: Path) -> None:
    """Put Triton's compiled kernels into its cache; another Triton does not find them there."""
    archive = pack / "triton.tar.xz"
    if not archive.exists():
        return
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as file:
        file.extractall(cache, filter="data")
    # Triton keeps absolute paths.
    for group in cache.glob("*/__grp__*.json"):
        content = json.loads(group.read_text())
        children = {name: str(group.parent / name) for name in content["child_paths"]}
        group.write_text(json.dumps({**content, "child_paths": children}))


def toolkit(dryrun: str) -> str | None:
    """The toolkit's folder, as `nvcc --dryrun` prints it."""
    top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
    return os.path.realpath(top[1].strip()) if top else None


def toolkit_folder() -> str:
    """Where CUDA's toolkit is, or usually would be."""
    told = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return told or cuda_home().get("CUDA_HOME", "/usr/local/cuda")


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
