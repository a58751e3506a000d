"""The package as a user gets it: a wheel outside the tree, no extension, a light import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from checkout import copied
from wheel_check import SMOKE

import pcoherence

ROOT = Path(__file__).parent.parent

HIDE = """
    import torch

    def load_library(path):
        raise OSError("hidden by a test")

    torch.ops.load_library = load_library
"""


def run(
    code: str, *arguments: str, cwd: Path = ROOT, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """What Python prints for the code, in a process that has imported nothing of ours."""
    command = [sys.executable, *arguments, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0 or not check, done.stderr
    return done


def on_path(*programs: str) -> dict[str, str]:
    """The environment with the programs of this interpreter's environment first on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for program in programs:
        if shutil.which(program, path=path) is None:
            pytest.skip(f"no {program}: nothing can be built")
    return os.environ | {"PATH": path}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of what git would check out, with the files not yet added."""
    environment = on_path("git", "ninja", os.environ.get("CXX", "c++"))
    folder = tmp_path_factory.mktemp("wheel")
    try:
        tree = copied(folder / "tree")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"not a git checkout: {error.stderr}")
    # What is built is asked for, not how fast it is: half the time.
    compiler = folder / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {environment.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    environment |= {"CXX": str(compiler), "PCOHERENCE_CUDA": "0"}
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    built = subprocess.run(
        [*command, "--wheel-dir", str(folder / "dist"), str(tree)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = (folder / "dist").iterdir()
    return found


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name, times in Counter(names).items() if times > 1] == []
    inside = {name for name in names if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "py.typed", "*.pyi")
        for path in (ROOT / "pcoherence").rglob(pattern)
    } | {f"pcoherence/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert {"pcoherence/py.typed", "pcoherence/_C.pyi"} <= expected
    libraries = {name for name in inside if name.endswith((".so", ".pyd"))}
    assert inside - libraries == expected
    assert libraries == {"pcoherence/libpcoherence_cpu.so"}
    assert wheel.name.split("-")[2:4] == ["py3", "none"]  # any Python
    assert any(name.endswith("LICENSE") for name in names)


def test_wheel_works_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv.append('--compile')\n{SMOKE}"
    )
    module, extension, version = run(program, "-I", cwd=tmp_path).stdout.splitlines()
    for file in (module, extension):
        assert Path(file).is_relative_to(site)
    assert f"-{version}-" in wheel.name


@pytest.mark.parametrize("missing", ["torch", "pybind11"])
def test_building_without_what_it_needs_says_what_to_install(missing: str) -> None:
    program = (
        f"import runpy, sys; sys.modules[{missing!r}] = None; "
        "sys.argv = ['setup.py', 'build_ext', '--inplace']; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PCOHERENCE_NO_EXTENSION"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"building the libraries needs {missing}; install torch>=2.11" in done.stderr
    assert "Traceback" not in done.stderr


def test_version_is_that_of_the_metadata() -> None:
    from importlib.metadata import version

    assert version("pcoherence") == pcoherence.__version__


def test_without_extension_the_reference_serves_and_says_so_once(tmp_path: Path) -> None:
    done = run(
        f"""
        {textwrap.indent(textwrap.dedent(HIDE), " " * 8).strip()}
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import torch
            caught.clear()
            import pcoherence
            assert not caught, "importing warns"
            x, y = torch.randn(2, 5, 3, generator=torch.manual_seed(0))
            found = [pcoherence.perception_coherence_loss(x, y) for _ in range(3)]
            pcoherence.soft_rank(x)
            pcoherence.PerceptionCoherenceLoss()(x, y)
        expected = pcoherence.perception_coherence_loss(x, y, backend="reference")
        assert all(torch.equal(loss, expected) for loss in found)
        assert pcoherence.available_backends()["reference"] is None
        assert "hidden by a test" in pcoherence.available_backends()["cpu"]
        print(*[f"{{w.category.__name__}} {{w.message}}" for w in caught], sep="\\n")
        """,
        cwd=tmp_path,
    )
    (message,) = done.stdout.splitlines()
    assert message.startswith("RuntimeWarning pcoherence: ")
    assert "hidden by a test" in message
    assert done.stderr == ""


def test_without_extension_the_report_says_why(tmp_path: Path) -> None:
    code = (
        textwrap.dedent(HIDE) + "import runpy\nrunpy.run_module('pcoherence', run_name='__main__')"
    )
    lines = run(code, cwd=tmp_path).stdout.splitlines()
    states = {line[: line.index("  ")]: line.split("  ", 1)[1].strip() for line in lines}
    assert states["library"] == "not found: hidden by a test"
    assert states["backend cpu"].startswith("no: ")
    assert states["backend cpu"].endswith("hidden by a test")
    assert states["backend reference"] == "available"
    assert states["pcoherence"] == pcoherence.__version__


def test_asking_for_the_missing_extension_raises(tmp_path: Path) -> None:
    code = textwrap.dedent(HIDE) + textwrap.dedent(
        """
        import torch, pcoherence
        pcoherence.perception_coherence_loss(torch.eye(3), torch.eye(3), backend="cpu")
        """
    )
    done = run(code, cwd=tmp_path, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: backend: 'cpu' is not available")
    assert "hidden by a test" in last


def test_import_tries_nothing_heavy_and_starts_no_process(tmp_path: Path) -> None:
    done = run(
        """
        import sys, torch
        before = set(sys.modules)
        events = []
        names = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")

        def hook(event, arguments):
            if event in names:
                events.append(event)
            elif event == "import":
                events.append(f"import {arguments[0].split('.')[0]}")

        sys.addaudithook(hook)
        import pcoherence
        print(*sorted(set(events)), sep="\\n")
        """,
        cwd=tmp_path,
    )
    found = set(done.stdout.splitlines())
    assert "import pcoherence" in found  # the hook hears what happens
    heavy = (
        "triton matplotlib scipy sklearn pandas ot tqdm rich hypothesis pytest setuptools ninja "
        "lightning sentence_transformers pytorch_metric_learning timm torchmetrics"
    )
    assert found.isdisjoint(f"import {name}" for name in heavy.split())
    assert {event for event in found if not event.startswith("import ")} == set()
