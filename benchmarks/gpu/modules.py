"""The extension on a GPU machine: as it was packed elsewhere, where that fits, or built there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tarfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.groups import ROOT

PACK = ROOT / ".gpu-pack"
MANIFEST = "manifest.json"
CUDA_MODULE = "_C_cuda.abi3.so"

CPU_FACT, CUDA_FACT = "cpu module", "cuda module"
LOADED = "loaded"
"""Facts of the environment: whether the extensions can be imported, or why not."""


def sources() -> str:
    """A hash of what the extension is built from."""
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
    """Why the modules of a pack cannot serve here; None: they can."""
    said = manifest(pack)
    if not said:
        return f"there is no {pack.name}, or it is not whole"
    if said.get("sources") != sources():
        return f"{pack.name} was built from other sources"
    own = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    missing = [name for name in (CUDA_MODULE, own) if not (pack / name).exists()]
    return f"{pack.name} has no {', '.join(missing)}" if missing else None


def use(pack: Path, package: Path) -> str | None:
    """Put a pack's modules where Python finds them; why not, or None."""
    why = unfit(pack)
    if why is None:
        install(pack, package)
    return why


def install(folder: Path, package: Path) -> list[str]:
    """Put the modules in a folder where Python finds them, and no older one; their names."""
    modules = sorted(folder.glob("_C*.so"))
    for module in modules:
        # A name with this Python's own suffix would be found before abi3.
        for other in ("abi3.so", f"{sysconfig.get_config_var('SOABI')}.so"):
            (package / f"{module.name.partition('.')[0]}.{other}").unlink(missing_ok=True)
        part = package / f"{module.name}.part"  # a process may have mapped the old one
        shutil.copyfile(module, part)
        part.replace(package / module.name)
    return [module.name for module in modules]


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
