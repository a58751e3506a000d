"""The benchmark suite: it runs, refuses wrong results, and makes rows of failures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import measure
from benchmarks.__main__ import main
from benchmarks.suite import page, report, run, verify
from benchmarks.suite.cases import CASES, find
from benchmarks.suite.contestants import SAME
from benchmarks.suite.rows import OK, SKIPPED, Row, Spread, load, save

ROOT = Path(__file__).parent.parent

PLUGIN = """
import os, signal, time
import torch
from pcoherence import reference
from benchmarks import measure
from benchmarks.suite.contestants import SAME, Contestant

def contestant(name, spoil):
    def build(case):
        def loss(student, teacher, weights):
            value = reference.perception_coherence_loss(
                student, teacher, anchor_weights=weights, **measure.PLAIN
            )
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
    assert "times the products" in text
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


def test_environment_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PCOHERENCE_COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.environment()["commit"] == "unknown"
    monkeypatch.setenv("PCOHERENCE_COMMIT", "abc123")
    assert measure.environment()["commit"] == "abc123"
