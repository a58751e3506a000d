"""The checks of a GPU, checked without one: what dies, hangs or is cut off leaves what it knew."""

from __future__ import annotations

import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks.gpu import check, device, figures, journal, pack, picture, summary

ROOT = Path(__file__).parent.parent

needs_process_groups = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="Popen(process_group=...) is of Python 3.11"
)

FAILING = """
import os, time
import pytest

def test_good():
    pass

@pytest.mark.parametrize("case", [1.5, 2.5])
def test_bad(case):
    assert case == 3, "off"

@pytest.mark.skipif(True, reason="not here")
def test_skipped():
    pass

def test_crashing():
    os._exit(9)

def test_hanging():
    time.sleep(600)

def test_losing_the_device(monkeypatch):
    from benchmarks.gpu import device
    device.lost = lambda: "CUDA error: an illegal memory access was encountered"
    assert False, "illegal access"

def test_good_again():
    pass
"""


def runner(output: Path, seconds: float = 60) -> check.Runner:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PCOHERENCE_REMEMBERED": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return check.Runner(output, environment, time.monotonic(), seconds)


def checks(output: Path, text: str, *options: str, hang: float = 6.0) -> check.Group:
    """A group of checks in a file of their own."""
    file = output / "test_checks.py"
    file.write_text(text)
    command = [sys.executable, "-m", "pytest", str(file), "-p", "benchmarks.gpu.journal"]
    command += ["-o", "addopts=", "--rootdir", str(output), "-p", "no:cacheprovider"]
    command += ["--journal", str(output / "journal.jsonl"), "--group", "checks", *options]
    return check.Group("checks", command, hang=hang)


@needs_process_groups
def test_checks_go_on_behind_one_that_kills_its_process(tmp_path: Path) -> None:
    run = runner(tmp_path)
    run.run([checks(tmp_path, FAILING)], 60)
    events = journal.read(tmp_path / "journal.jsonl")
    found = {e["check"].partition("::")[2]: e["outcome"] for e in events if "check" in e}
    assert found == {
        "test_good": "passed",
        "test_bad[1.5]": "failed",
        "test_bad[2.5]": "failed",
        "test_skipped": "skipped",
        "test_crashing": "died (9)",
        "test_hanging": "hung for 6 s",
        "test_losing_the_device": "failed",
        "test_good_again": "passed",
    }
    assert [e["selected"] for e in events if "selected" in e] == [8]
    text = (tmp_path / "summary.txt").read_text()
    assert "!  checks                    2 of 8 passed, 5 failed, 1 skipped" in text
    assert text.count("test_bad") == 1
    assert "test_bad 1.5: AssertionError: off assert 1.5 == 3 (and 1 more alike)" in text
    assert "illegal memory access" in text
    assert not summary.succeeded(events)


@needs_process_groups
def test_what_is_cut_off_says_so(tmp_path: Path) -> None:
    run = runner(tmp_path)
    slow = "import time\n\ndef test_good():\n    pass\n\ndef test_slow():\n    time.sleep(60)\n"
    begun = time.monotonic()
    run.run([checks(tmp_path, slow, hang=60)], 12)
    assert time.monotonic() - begun < 40
    text = (tmp_path / "summary.txt").read_text()
    assert "?  checks                    1 of 2 passed, 1 not reached, cut off at 12 s" in text
    assert not summary.succeeded(journal.read(tmp_path / "journal.jsonl"))


@needs_process_groups
def test_shards_have_all_checks_once(tmp_path: Path) -> None:
    many = "import pytest\n\n@pytest.mark.parametrize('i', range(7))\ndef test_it(i):\n    pass\n"
    for shard in range(3):
        run = runner(tmp_path)
        run.run([checks(tmp_path, many, "--shard", f"{shard}/3", "-k", "not 6")], 60)
        # The next one is another group.
        events = journal.read(tmp_path / "journal.jsonl")
        (tmp_path / "journal.jsonl").rename(tmp_path / f"{shard}.jsonl")
        assert summary.succeeded(events)
    found = [
        event["check"]
        for shard in range(3)
        for event in journal.read(tmp_path / f"{shard}.jsonl")
        if "check" in event
    ]
    assert len(found) == len(set(found)) == 6


def alive(argument: str) -> bool:
    """Whether a process has this argument; one that has ended but is not waited for has none."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if argument.encode() in path.read_bytes().split(b"\0"):
                return True
        except OSError:  # it ended meanwhile
            continue
    return False


@needs_process_groups
def test_a_group_that_is_cut_off_takes_its_children_along(tmp_path: Path) -> None:
    nap = f"60.{os.getpid()}"  # nobody else's
    script = f"sleep {nap} & until grep -qsz {nap} /proc/$!/cmdline; do :; done; echo begun; wait"
    group = check.Group("nap", ["bash", "-c", script], checks=False)
    runner(tmp_path).run([group], 2)
    assert "begun" in (tmp_path / "log.txt").read_text().splitlines()
    give_up = time.monotonic() + 10  # its signal is sent; that it has acted is not waited for
    while alive(nap) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert not alive(nap)


@needs_process_groups
@pytest.mark.parametrize("status", [0, 1])
def test_checks_of_cuda_wait_for_the_build(status: int, tmp_path: Path) -> None:
    """And are missing by name where it fails."""
    run = runner(tmp_path)
    build = check.Group("build", ["bash", "-c", f"sleep 1; exit {status}"], checks=False)
    run.build = run.start(build)
    marks = [str(tmp_path / name) for name in ("cuda", "triton")]
    groups = [
        check.Group("cuda", ["touch", marks[0]], checks=False, needs_cuda=True),
        check.Group("triton", ["touch", marks[1]], checks=False),
    ]
    run.run(groups, 30)
    assert [Path(mark).exists() for mark in marks] == [status == 0, True]
    events = journal.read(tmp_path / "journal.jsonl")
    assert summary.succeeded(events) == (status == 0)
    if status != 0:
        text = (tmp_path / "summary.txt").read_text()
        assert "!  cuda                      no CUDA module: building it failed (1)" in text


def test_every_plan_has_groups_that_exist(tmp_path: Path) -> None:
    plan = check.Plan(tmp_path, "", "90")
    for stages in (check.FIRST, check.EVERYTHING):
        assert [stage.until for stage in stages] == sorted(stage.until for stage in stages)
        assert stages[-1].until == 1
        for stage in stages:
            groups = [group for step in stage.steps for group in plan.groups(step)]
            assert len({group.name for group in groups}) == len(groups)
            for argument in (argument for group in groups for argument in group.command):
                if argument.startswith("tests/"):
                    assert (ROOT / argument).is_file()


def test_results_go_where_out_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["check", "--first"])
    monkeypatch.setenv("OUT", str(tmp_path))
    assert check.parsed().output == tmp_path
    assert check.parsed().seconds == 170
    monkeypatch.delenv("OUT")
    assert check.parsed().output == ROOT / "benchmarks" / "results" / "gpu"


# ---------------------------------------------------------------- what is said


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal.write(path, "a", begin="one", at=1.0)
    with path.open("a") as file:
        file.write('{"group": "a", "check": "one"')
    events = journal.read(path)
    assert events == [{"group": "a", "begin": "one", "at": 1.0}]
    assert journal.unfinished(events, "a") == "one"


def test_summary_says_what_was_measured() -> None:
    events: list[dict[str, Any]] = [
        {"group": "environment", "fact": "device", "value": "a card"},
        {"group": "speed", "backend": "cuda", **figures.figure("n 2: eager", 2.0, "ms", 1.0)},
        {"group": "speed", "backend": "cuda", **figures.figure("n 2: faster", 9.0, "x", 5, True)},
        {"group": "speed", "figure": "large", "value": None, "unit": "", "message": "no memory"},
        {"group": "speed", "time": "n 2", "kernels": [["row_kernel", 0.5, 3]]},
        {"group": "speed", "status": 1},
    ]
    text = summary.text(events, 3, 170)
    assert (
        "!  speed                     3 measured, 1 could not be measured, 1 missed the bar" in text
    )
    assert "at most 1  MISSED" in text
    assert "at least 5\n" in text
    assert "large: no memory" in text or "large no memory" in text or "no memory" in text
    assert "row_kernel" in text
    assert "row_kernel" not in summary.text(events, 3, 170, brief=True)


def test_a_figure_that_fails_is_an_event() -> None:
    def bad() -> Iterator[dict[str, Any]]:
        yield figures.figure("good", 1.0, "x")
        raise RuntimeError("CUDA error: an illegal memory access " + "was seen " * 100)

    good, failed = figures.attempt("bad", bad())
    assert good["value"] == 1
    assert failed["value"] is None
    assert failed["message"].startswith("RuntimeError('CUDA error")
    assert len(failed["message"]) < 200


def test_the_picture_shows_what_was_measured(tmp_path: Path) -> None:
    events = [
        {"group": "g", "backend": backend, "figure": f"n {n:,}, d 512: {what}", "value": n / 256.0,
         "unit": "ms"}
        for backend in ("cuda", "triton")
        for n in (256, 1024)
        for what in ("eager", "as a graph", "the four products", "the reference", "kernels")
    ]  # fmt: skip
    lines = picture.series(events)
    assert list(lines) == [name for name in picture.STYLES if not name.startswith("torch.compile")]
    assert lines["cuda, eager"] == {(256, 512): 1.0, (1024, 512): 4.0}
    picture.draw(events, tmp_path / "time.png")
    assert (tmp_path / "time.png").stat().st_size > 10_000


# ---------------------------------------------------------------- what is carried


def test_triton_finds_what_was_unpacked(tmp_path: Path) -> None:
    """Its cache keeps absolute paths."""
    made = tmp_path / "made" / "KEY"
    made.mkdir(parents=True)
    (made / "kernel.cubin").write_bytes(b"code")
    children = {"child_paths": {"kernel.cubin": str(made / "kernel.cubin")}}
    (made / "__grp__kernel.json").write_text(json.dumps(children))
    with tarfile.open(tmp_path / "triton.tar.xz", "w:xz") as file:
        file.add(made.parent, ".")
    check.unpack_triton(tmp_path, tmp_path / "cache")
    read = json.loads((tmp_path / "cache" / "KEY" / "__grp__kernel.json").read_text())
    (path,) = read["child_paths"].values()
    assert path == str(tmp_path / "cache" / "KEY" / "kernel.cubin")
    assert Path(path).read_bytes() == b"code"


def test_modules_are_unpacked(tmp_path: Path) -> None:
    packed, package = tmp_path / "pack", tmp_path / "package"
    assert check.unpack(packed, package) == []
    packed.mkdir()
    package.mkdir()
    (packed / "_C_cuda.abi3.so").write_bytes(b"new")
    (package / "_C_cuda.abi3.so").write_bytes(b"old")
    assert check.unpack(packed, package) == ["_C_cuda.abi3.so"]
    assert (package / "_C_cuda.abi3.so").read_bytes() == b"new"


def test_the_pack_is_built_as_setup_builds() -> None:
    cxx, nvcc, (name, version) = pack.settings()
    assert "-O3" in cxx
    assert "-O3" in nvcc
    assert name == "TORCH_TARGET_VERSION"
    assert int(version, 16) >> 48 == (2 << 8) + 11


def test_a_python_that_is_not_there_is_said() -> None:
    assert "no-such-python" in str(pack.cpu_module(ROOT, "no-such-python"))


DRYRUN = """\
#$ _NVVM_BRANCH_=nvvm
#$ _HERE_={bin}
#$ _TARGET_DIR_=targets/x86_64-linux
#$ TOP={bin}/..
#$ CICC_PATH={bin}/../nvvm/bin
#$ cudafe++ --orig_src_file_name "/dev/null"
"""
"""Of `nvcc --dryrun`, shortened."""


def test_the_toolkit_is_what_nvcc_says(tmp_path: Path) -> None:
    toolkit, wrappers = tmp_path / "cuda-13.0", tmp_path / "wrappers"
    (toolkit / "bin").mkdir(parents=True)
    wrappers.symlink_to(toolkit)
    assert check.toolkit(DRYRUN.format(bin=wrappers / "bin")) == str(toolkit.resolve())
    assert check.toolkit("nvcc fatal   : Don't know what to do with '/dev/null'") is None
    assert check.toolkit("") is None


def test_cuda_home_is_asked_of_nvcc_only_where_nothing_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check.cuda_home() == {}
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/bin/..' >&2\n")
    nvcc.chmod(0o755)
    (tmp_path / "bin").mkdir()
    assert check.cuda_home() == {"CUDA_HOME": str(tmp_path.resolve())}
    monkeypatch.setenv("CUDA_PATH", "/elsewhere")
    assert check.cuda_home() == {}


# ---------------------------------------------------------------- the rehearsal


def test_stand_ins_have_the_methods_of_those_they_stand_for() -> None:
    for name, methods in device.BACKENDS.items():
        stand_in = device.StandIn(name)
        assert stand_in.name == name
        assert stand_in.known()["method"] == methods


@needs_process_groups
def test_a_rehearsal_passes(tmp_path: Path) -> None:
    """A few values, and the environment; what the device's tests say of the CPU backend."""
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--rehearse", "--seconds", "100"]
    command += ["--only", "values", "-k", "33 and float32 and auto", "--output", str(tmp_path)]
    group = check.Group("rehearsal", command, checks=False)
    outer = tmp_path / "outer"
    outer.mkdir()
    run = runner(outer, 120)
    run.run([group], 120)
    said = (outer / "log.txt").read_text()
    assert "ok environment" in said, said
    assert "ok cuda values               5 of 5 passed" in said, said
    assert "ok triton values             5 of 5 passed" in said, said


def test_truths_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pcoherence import remembered

    monkeypatch.setenv("PCOHERENCE_REMEMBERED", str(tmp_path))
    calls = []

    @remembered.remembered
    def doubled(x: torch.Tensor, factor: float = 2.0) -> tuple[torch.Tensor, None]:
        calls.append(factor)
        return factor * x, None

    x = torch.arange(3.0)
    first, _ = doubled(x)
    first.zero_()  # what a caller does with it changes nothing
    before = remembered.computed
    assert doubled(x)[0].tolist() == [0, 2, 4]
    assert remembered.gather(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == [remembered.FILE]
    assert doubled(x)[0].tolist() == [0, 2, 4]
    assert remembered.computed == before
    doubled(x, factor=3.0)
    doubled(x + 1)
    doubled(x.double())
    assert calls == [2.0, 3.0, 2.0, 2.0]
