"""The benchmark suite: it runs, refuses wrong results, and makes rows of failures."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import gpu_check, gpu_figures, measure, page, report, run, verify
from benchmarks.__main__ import main
from benchmarks.cases import CASES, find
from benchmarks.contestants import SAME
from benchmarks.rows import OK, SKIPPED, Row, Spread, load, save

ROOT = Path(__file__).parent.parent

PLUGIN = """
import os, signal, time
import torch
from pcoherence import reference
from benchmarks.contestants import SAME, Contestant

def contestant(name, spoil):
    def build(case):
        def loss(student, teacher, weights):
            value = reference.perception_coherence_loss(student, teacher, anchor_weights=weights)
            return spoil(value)
        return loss
    return Contestant(name=name, note="for a test", build=build, check=SAME)

def wait(value):
    time.sleep(0.5)  # forward, and forward and backward, three times each at least
    return value

CONTESTANTS = [
    contestant("off", lambda value: value * 1.001),
    contestant("raising", lambda value: value.no_such_attribute),
    contestant("crashing", lambda value: os.kill(os.getpid(), signal.SIGSEGV)),
    contestant("slow", wait),
    contestant("greedy", lambda value: value + torch.empty(2**40).sum()),
]
"""


def command(*arguments: object) -> str:
    """What `python -m benchmarks` prints."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


def row(contestant: str = "cpu auto", milliseconds: float = 1.0, n: int = 64) -> Row:
    """As a run writes it."""
    seconds = milliseconds * 1e-3
    return Row(
        case=f"sizes-n{n}-d128",
        family="sizes",
        n=n,
        d=128,
        dtype="float32",
        objective="mse",
        tau=0.1,
        contestant=contestant,
        status=OK,
        verified="all anchors, reference",
        loss_error=1e-7,
        gradient_error=1e-6,
        forward=Spread(seconds / 2, seconds / 2, seconds / 2, 3),
        step=Spread(0.99 * seconds, seconds, 1.01 * seconds, 3),
        times_limit=Spread(1.9, 2.0, 2.1, 3),
        peak_bytes=4 * n * n,
        gflops=30.0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny run with contestants that fail in every way."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "plugin.py").write_text(PLUGIN)
    options = run.Options(
        output=folder / "cpu.json",
        quick=True,
        only="n64-.*(cpu auto|triton auto|off|raising|crashing|slow|greedy)",
        time_limit=2.0,
        budget=0.01,
        plugin=folder / "plugin.py",
    )
    run.run(options)
    return folder / "cpu.json"


def test_every_way_to_end_is_a_row(results: Path) -> None:
    rows = {row.contestant: row for row in load(results)}
    assert rows["off"].status == "wrong result"
    assert "off by 1.0e-03" in rows["off"].reason
    assert rows["off"].step is None
    assert rows["raising"].status == "failed"
    assert "no_such_attribute" in rows["raising"].reason
    assert (rows["crashing"].status, rows["crashing"].reason) == ("crashed", "SIGSEGV")
    assert rows["slow"].status == "timeout"
    assert rows["greedy"].status == "out of memory"
    assert rows["triton auto"].status == SKIPPED


@pytest.mark.usefixtures("cpu_backend")
def test_a_good_row_is_complete(results: Path) -> None:
    ours = next(row for row in load(results) if row.contestant == "cpu auto")
    assert ours.status == OK
    assert ours.verified == "all anchors, reference"
    assert ours.step is not None
    assert ours.forward is not None
    assert ours.times_limit is not None
    assert 0 < ours.step.p20 <= ours.step.p50 <= ours.step.p80
    assert ours.step.samples >= 3
    assert ours.gradient_error is not None
    assert ours.gradient_error < 2e-5
    assert ours.commit
    assert ours.torch == torch.__version__
    assert int(ours.threads) > 0


def test_command_line(
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """List, report and page; the first in a process of its own, as users call them."""

    def inside(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    assert "sizes-n64-d128" in command("list", "--quick")
    assert "rows in both, 0 changed" in inside("report", results, results)
    copy = tmp_path / "cpu.json"
    copy.write_bytes(results.read_bytes())
    inside("page", tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "times the limit" in text
    assert "**wrong result**" in text
    assert (tmp_path / "cpu-time.png").stat().st_size > 10_000


def test_resume_measures_nothing_again(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load(results)
    monkeypatch.setattr(run, "_measure", lambda *_: pytest.fail("measured again"))
    options = run.Options(output=results, quick=True, only="n64-.*cpu auto", resume=True)
    assert run.run(options) == before


def test_report_tells_changes_from_noise() -> None:
    step = Spread(0.9, 1.0, 1.1, 9)
    assert not report.Ratio.of(step, Spread(1.0, 1.1, 1.2, 9)).changed
    slower = report.Ratio.of(step, Spread(1.8, 2.0, 2.2, 9))
    assert slower.changed
    assert slower.middle == 2.0


def test_rows_survive_their_file(tmp_path: Path) -> None:
    rows = [row(), row("reference", 90.0)]
    save(tmp_path / "rows.json", rows)
    assert load(tmp_path / "rows.json") == rows


def test_exponent() -> None:
    rows = [row(milliseconds=1e-3 * n**2, n=n) for n in (64, 1024, 2048, 4096)]
    found = page.exponent(rows, lambda row: row.step and row.step.p50)
    assert found == pytest.approx(2.0)
    assert page.exponent(rows[:2], lambda row: row.peak_bytes) is None


def test_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert find(names[0]) is CASES[0]
    with pytest.raises(ValueError, match="no-such-case"):
        find("no-such-case")


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_wrong_gradients_are_refused(wrong: float) -> None:
    loss, gradient = torch.tensor(0.1), torch.ones(3, 2)
    allowed = verify.tolerances(SAME, torch.float32, (1e-7, 1e-7))
    verify.compare((loss, gradient), (loss, gradient), allowed, "batch")
    with pytest.raises(verify.WrongResultError, match="gradient of batch"):
        verify.compare((loss, wrong * gradient), (loss, gradient), allowed, "batch")


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
    assert gpu_check.toolkit(DRYRUN.format(bin=wrappers / "bin")) == str(toolkit.resolve())
    assert gpu_check.toolkit("nvcc fatal   : Don't know what to do with '/dev/null'") is None
    assert gpu_check.toolkit("") is None


def test_cuda_home_is_asked_of_nvcc_only_where_nothing_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_check.cuda_home() == {}
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/bin/..' >&2\n")
    nvcc.chmod(0o755)
    (tmp_path / "bin").mkdir()
    assert gpu_check.cuda_home() == {"CUDA_HOME": str(tmp_path.resolve())}
    monkeypatch.setenv("CUDA_PATH", "/elsewhere")
    assert gpu_check.cuda_home() == {}


needs_process_groups = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="Popen(process_group=...) is of Python 3.11"
)


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
def test_a_step_that_is_cut_off_takes_its_children_along(tmp_path: Path) -> None:
    nap = f"60.{os.getpid()}"  # nobody else's
    script = f"sleep {nap} & until grep -qsz {nap} /proc/$!/cmdline; do :; done; echo begun; wait"
    step = gpu_check.Step("nap", ["bash", "-c", script], 2)
    log = tmp_path / "log"
    assert gpu_check.run(step, log, os.environ, 60) == "CUT OFF after 2 s"
    assert "begun" in log.read_text().splitlines()
    give_up = time.monotonic() + 10  # its signal is sent; that it has acted is not waited for
    while alive(nap) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert not alive(nap)


@needs_process_groups
def test_steps_end_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "SHORTEST", 0.2)
    steps = [
        gpu_check.Step("good", ["bash", "-c", 'echo "$VALUE"'], 60, {"VALUE": "from the step"}),
        gpu_check.Step("bad", ["bash", "-c", "exit 3"], 60),
        gpu_check.Step("slow", ["sleep", "60"], 50),
        gpu_check.Step("late", ["touch", str(tmp_path / "late")], 50),
    ]
    begin = time.monotonic()
    summary = gpu_check.run_all(steps, tmp_path, os.environ, begin + 3)
    assert time.monotonic() - begin < 20
    assert summary[:2] == ["good: ok", "bad: FAILED (3)"]
    assert summary[2].startswith("slow: CUT OFF after ")
    assert summary[3] == "late: SKIPPED: no time left"
    assert not (tmp_path / "late").exists()
    assert (tmp_path / "summary.txt").read_text().splitlines() == summary
    log = (tmp_path / "gpu-check.log").read_text().splitlines()
    assert log[1] == "from the step"
    assert [line for line in log if line.startswith("=== slow: sleep")]
    assert len(list(tmp_path.iterdir())) == 2


def test_gpu_check_asks_for_tests_that_exist(tmp_path: Path) -> None:
    names = [step.name for step in gpu_check.steps(tmp_path)]
    assert len(set(names)) == len(names)
    for step in gpu_check.steps(tmp_path):
        for argument in step.command:
            if argument.startswith("tests/"):
                assert (ROOT / argument.split("::")[0]).is_file()


def test_environment_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PCOHERENCE_COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.environment()["commit"] == "unknown"
    monkeypatch.setenv("PCOHERENCE_COMMIT", "abc123")
    assert measure.environment()["commit"] == "abc123"


def test_a_figure_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = gpu_figures.row("good", 1.0, "x", 2.0, True)

    def bad() -> Iterator[dict[str, Any]]:
        yield good
        raise RuntimeError("CUDA error: [/an illegal memory access] " + "was seen " * 100)

    found = [("bad", bad()), ("good", iter([good]))]
    monkeypatch.setattr(gpu_figures, "figures", lambda backend: iter(found))
    monkeypatch.setattr(gpu_figures, "environment", lambda: {"device": "none"})
    rows = gpu_figures.run("cuda", tmp_path)
    assert [row["met"] for row in rows] == [True, None, True]
    assert rows[1]["figure"] == "cuda: bad"
    assert rows[1]["value"] is None
    assert rows[1]["bar"].startswith("RuntimeError('CUDA error")
    assert len(rows[1]["bar"]) < 200
    assert '"met": null' in (tmp_path / "figures-cuda.json").read_text()
