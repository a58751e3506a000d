"""The documentation: it builds without a warning, and everything that it shows runs."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from documentation import DOCS, build, run

import pcoherence

pytestmark = pytest.mark.usefixtures("cpu_backend")  # it shows the library with its extension


def test_pages_build_without_warnings(site: Path) -> None:
    pages = {path.stem for path in DOCS.glob("*.rst")}
    assert pages <= {path.stem for path in site.glob("*.html")}
    reference = (site / "api.html").read_text()
    for name in pcoherence.__all__:
        assert (
            f'id="pcoherence.{name}"' in reference or f'id="module-pcoherence.{name}"' in reference
        )
    adapters = (site / "adapters.html").read_text()
    for path in (DOCS.parent / "pcoherence" / "adapters").glob("[a-z]*.py"):
        assert f'id="module-pcoherence.adapters.{path.stem}"' in adapters
    first = (site / "index.html").read_text()
    assert pcoherence.__version__ in first
    readme = (DOCS.parent / "README.md").read_text()
    measured = re.findall(r"^\| (.*: times the four products .*) \| (.*) \| .* \|$", readme, re.M)
    assert len(measured) == 2
    for figure, value in measured:
        assert f"<p>{figure}</p>" in first
        assert f"<p>{value}</p>" in first


def test_examples_run(tmp_path: Path) -> None:
    build("doctest", tmp_path)
    (output,) = (tmp_path / "doctest").glob("output.txt")
    pages = "".join(page.read_text() for page in DOCS.glob("*.rst"))
    shown = pages.count(".. testcode::")
    if importlib.util.find_spec("torchdistill") is None:
        shown -= pages.count(":skipif:")
    counted = re.search(r"(\d+) tests\n.* 0 failures in tests", output.read_text(), re.DOTALL)
    assert counted is not None
    assert int(counted[1]) >= shown


def test_every_block_of_python_is_run() -> None:
    """Python that is only shown would not be noticed when it stops working."""
    for page in DOCS.glob("*.rst"):
        found = re.findall(r"^\.\. (?:code-block|code|sourcecode)::.*$", page.read_text(), re.M)
        assert not found, f"{page.name}: {found}; use testcode"


def test_the_loss_takes_a_slot_of_repdistiller(tmp_path: Path) -> None:
    """The file of three lines, beside stand-ins for the two files that it needs."""
    recipe = (DOCS / "recipes.rst").read_text()
    found = re.search(r"changes::\n\n((?:    .*\n)+)", recipe)
    assert found is not None
    (tmp_path / "coherence.py").write_text(textwrap.dedent(found[1]))
    (tmp_path / "distiller_zoo.py").write_text("PKT = None")
    (tmp_path / "train_student.py").write_text(
        "import torch\n"
        "from distiller_zoo import PKT\n"
        "if __name__ == '__main__':\n"
        "    print(PKT()(torch.randn(8, 3), torch.randn(8, 4)).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "coherence.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "torch.Size([])\n", done.stderr


# Not by tests/processes.py, which imports early what the script must.
ENDED = f"""
import runpy
from pathlib import Path
import torch.distributed as dist

def threads():
    return [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]

def destroy():
    assert "pt_gloo_runloop" in threads()
    really_destroy()
    assert "pt_gloo_runloop" not in threads()

really_destroy, dist.destroy_process_group = dist.destroy_process_group, destroy
runpy.run_path({str(DOCS / "two_processes.py")!r}, run_name="__main__")
"""


def test_two_processes(tmp_path: Path) -> None:
    """They agree, and leave no thread of the group, which could abort them as they end."""
    (tmp_path / "ended.py").write_text(ENDED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = run(*launcher, str(tmp_path / "ended.py"))
    assert "2 processes: the same loss and gradient" in found


def test_version_comes_from_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Sphinx: what conf.py says is what pcoherence says."""
    monkeypatch.setattr(pcoherence, "__version__", "1.2.3.test")
    found = runpy.run_path(str(DOCS / "conf.py"))
    assert found["release"] == found["version"] == "1.2.3.test"


def test_files_that_contributing_names_exist() -> None:
    """The map of the code is of this code."""
    root = DOCS.parent
    text = (root / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`([\w./-]+/[\w.]+\.(?:py|h|cpp|cu|inc|rst|md|toml))`", text))
    named = {name for name in named if "NAME" not in name}
    assert len(named) >= 40
    roots = [root / part for part in ("", "pcoherence", "csrc", "tests", "benchmarks")]
    assert [n for n in sorted(named) if not any((place / n).is_file() for place in roots)] == []
