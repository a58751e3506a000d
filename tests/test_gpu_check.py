"""The checks of a GPU, checked without one: what dies, hangs or is cut off leaves what it knew."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark.expression import Expression

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import measure
from benchmarks.gpu import (
    check,
    choices,
    device,
    figures,
    groups,
    journal,
    modules,
    pack,
    picture,
    plan,
)
from benchmarks.gpu import summary as summaries
from benchmarks.recipe import recipe
from pcoherence import library
from pcoherence.backends import clouds, pipeline, products

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


def runner(output: Path, seconds: float = 60) -> groups.Runner:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PCOHERENCE_REMEMBERED": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return groups.Runner(output, environment, time.monotonic(), seconds)


def checks(output: Path, text: str, *options: str, hang: float = 60.0) -> groups.Group:
    """A group of checks in a file of their own."""
    file = output / "test_checks.py"
    file.write_text(text)
    command = [sys.executable, "-m", "pytest", str(file), "-p", "benchmarks.gpu.journal"]
    command += ["-o", "addopts=", "--rootdir", str(output), "-p", "no:cacheprovider"]
    command += ["--journal", str(output / "journal.jsonl"), "--group", "checks", *options]
    return groups.Group("checks", command, checks=True, tells=True, hang=hang)


@needs_process_groups
def test_checks_go_on_behind_one_that_kills_its_process(tmp_path: Path) -> None:
    run = runner(tmp_path)
    # Longer than a process takes to start where others keep the cores busy.
    run.run([checks(tmp_path, FAILING, hang=15)], 120)
    events, _ = journal.read(tmp_path / "journal.jsonl")
    found = {e["check"].partition("::")[2]: e["outcome"] for e in events if "check" in e}
    assert found == {
        "test_good": "passed",
        "test_bad[1.5]": "failed",
        "test_bad[2.5]": "failed",
        "test_skipped": "skipped",
        "test_crashing": "died (9)",
        "test_hanging": "hung for 15 s",
        "test_losing_the_device": "failed",
        "test_good_again": "passed",
    }
    assert [e["selected"] for e in events if "selected" in e] == [8]
    text = (tmp_path / "summary.txt").read_text()
    assert "!  checks                    2 of 8 passed, 5 failed, 1 skipped" in text
    assert text.count("test_bad") == 1
    assert "test_bad 1.5: AssertionError: off assert 1.5 == 3 (and 1 more alike)" in text
    assert "illegal memory access" in text
    assert not summaries.succeeded(events)


MEASURING = """
import sys, time
from pathlib import Path
from benchmarks.gpu import journal

path = Path(sys.argv[1])
begun = {event.get("begin") for event in journal.read(path)[0]}
for name in ("hanging", "good"):
    if name not in begun:
        journal.write(path, "speed", begin=name, measures=True, at=time.time())
        time.sleep(600 if name == "hanging" else 0)
        journal.write(path, "speed", figure=name, value=1.0, unit="ms")
        journal.write(path, "speed", end=name)
"""


BEGINNING = """
import sys, time
from pathlib import Path
from benchmarks.gpu import journal

path = Path(sys.argv[1])
while not any("figure" in event and event["value"] for event in journal.read(path)[0]):
    journal.write(path, "other", begin="again", at=time.time())
    journal.write(path, "other", end="again")
    time.sleep(0.5)
"""


@needs_process_groups
def test_measurements_go_on_behind_one_that_hangs(tmp_path: Path) -> None:
    """Whatever another group begins meanwhile."""
    run = runner(tmp_path)
    speed, other = (
        groups.Group(name, [sys.executable, "-c", program, str(run.journal)], tells=True, hang=10)
        for name, program in (("speed", MEASURING), ("other", BEGINNING))
    )
    run.run([speed, other], 60)
    events, _ = journal.read(run.journal)
    found = {event["figure"]: event["value"] for event in events if "figure" in event}
    assert found == {"hanging": None, "good": 1.0}
    assert "speed: hanging : hung for 10 s" in (tmp_path / "summary.txt").read_text()


@needs_process_groups
def test_the_log_has_a_failure_at_once(tmp_path: Path) -> None:
    text = (
        "import os\n\ndef test_bad():\n    print('said')\n    assert 1 == 2, 'why'\n\n"
        "def test_crash():\n    os._exit(9)\n"
    )
    run = runner(tmp_path)
    run.run([checks(tmp_path, text)], 30)
    log = (tmp_path / "log.txt").read_text()
    assert "AssertionError: why" in log
    assert "said" in log


@needs_process_groups
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    nap = f"61.{os.getpid()}"
    program = (
        "import os, time\nfrom pathlib import Path\nfrom benchmarks.gpu import groups\n"
        f"run = groups.Runner(Path({str(tmp_path)!r}), os.environ, time.monotonic(), 60)\n"
        f"run.start(groups.Group('nap', ['sleep', {nap!r}]))\nos._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT)
    give_up = time.monotonic() + 10
    while alive(nap) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert not alive(nap)


@needs_process_groups
def test_what_is_cut_off_says_so(tmp_path: Path) -> None:
    run = runner(tmp_path)
    slow = "import time\n\ndef test_good():\n    pass\n\ndef test_slow():\n    time.sleep(60)\n"
    begun = time.monotonic()
    run.run([checks(tmp_path, slow, hang=60)], 12)
    assert time.monotonic() - begun < 40
    text = (tmp_path / "summary.txt").read_text()
    assert "?  checks                    1 of 2 passed, 1 not reached, cut off at 12 s" in text
    assert not summaries.succeeded(journal.read(tmp_path / "journal.jsonl")[0])


@needs_process_groups
def test_shards_have_all_checks_once(tmp_path: Path) -> None:
    many = "import pytest\n\n@pytest.mark.parametrize('i', range(7))\ndef test_it(i):\n    pass\n"
    parts = []
    for shard in range(3):
        group = checks(tmp_path, many, "--shard", f"{shard}/3", "-k", "not 6")
        command = [f"checks {shard}" if part == "checks" else part for part in group.command]
        parts.append(group._replace(name=f"checks {shard}", command=command))
    run = runner(tmp_path)
    run.run(parts, 60)
    events, _ = journal.read(run.journal)
    assert summaries.succeeded(events)
    found = [event["check"] for event in events if "check" in event]
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
    group = groups.Group("nap", ["bash", "-c", script])
    runner(tmp_path).run([group], 2)
    assert "begun" in (tmp_path / "log.txt").read_text().splitlines()
    give_up = time.monotonic() + 10  # its signal is sent; that it has acted is not waited for
    while alive(nap) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert not alive(nap)


@needs_process_groups
@pytest.mark.parametrize("status", [0, 1])
def test_checks_of_cuda_wait_for_the_build(status: int, tmp_path: Path) -> None:
    """Into the next stage, and are missing by name where it fails."""
    run = runner(tmp_path)
    build = groups.Group("build", ["bash", "-c", f"sleep 3; exit {status}"])
    installed: list[bool] = []
    run.build = groups.Build(run.start(build), lambda: installed.append(True))
    marks = [str(tmp_path / name) for name in ("cuda", "triton")]
    both = [
        groups.Group("cuda", ["touch", marks[0]], needs_build=True),
        groups.Group("triton", ["touch", marks[1]]),
    ]
    run.run(both, 1.5)
    assert [Path(mark).exists() for mark in marks] == [False, True]
    run.run([], 30)
    run.end()
    assert installed == [True] * (status == 0)
    assert [Path(mark).exists() for mark in marks] == [status == 0, True]
    events, _ = journal.read(tmp_path / "journal.jsonl")
    assert summaries.succeeded(events) == (status == 0)
    if status != 0:
        text = (tmp_path / "summary.txt").read_text()
        assert "!  cuda                      no CUDA module: building it failed (1)" in text


def test_every_plan_has_groups_that_exist(tmp_path: Path) -> None:
    steps = plan.Plan(tmp_path, "", "90")
    for stages in (plan.FIRST, plan.EVERYTHING):
        assert [stage.until for stage in stages] == sorted(stage.until for stage in stages)
        assert stages[-1].until == 1
        for stage in stages:
            found = [group for step in stage.steps for group in steps.groups(step)]
            assert len({group.name for group in found}) == len(found)
            for argument in (argument for group in found for argument in group.command):
                if argument.startswith("tests/"):
                    assert (ROOT / argument).is_file()


def test_checks_are_in_every_list_of_them(tmp_path: Path) -> None:
    """In that of truths that are carried, and in what CONTRIBUTING.md says."""
    steps = plan.Plan(tmp_path, "", "90")
    every = [group for step in plan.STEPS for group in steps.groups(step)]
    run = {argument for group in every for argument in group.command if "tests/" in argument}
    kernels = (path for path in (ROOT / "tests").glob("test_triton*.py"))
    assert {f"tests/{path.name}" for path in kernels if "DEVICE" in path.read_text()} <= run
    assert run == set(pack.TRUTHS)
    (said,) = re.findall(
        r"\*A check\*(.*?); `--first`", (ROOT / "CONTRIBUTING.md").read_text(), re.S
    )
    assert {f"tests/{name}" for name in re.findall(r"`(test_\w+\.py)`", said)} == run


@needs_process_groups
def test_every_group_of_checks_selects_some(tmp_path: Path) -> None:
    """And those of its backend alone."""
    steps = plan.Plan(tmp_path, "", "90")
    wanted = {
        group.command[group.command.index("-k") + 1]: group.name.split()
        for step in plan.STEPS
        for group in steps.groups(step)
        if "tests/test_gpu.py" in group.command
    }
    assert len(wanted) >= 7
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-o", "addopts="]
    done = subprocess.run(
        [*command, "--collect-only", "-q"],
        cwd=ROOT,
        env={**os.environ, "PCOHERENCE_REHEARSAL": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    names = [line for line in done.stdout.splitlines() if "::" in line]
    for expression, group in wanted.items():
        compiled = Expression.compile(expression)
        found = [name for name in names if compiled.evaluate(lambda part, name=name: part in name)]
        assert any("[cuda" in name for name in found) == ("cuda" in group)
        assert any("[triton" in name for name in found) == ("triton" in group)


@needs_process_groups
def test_a_group_that_cannot_run_is_a_failure_by_name(tmp_path: Path) -> None:
    run = runner(tmp_path)
    run.run([groups.Group("memcheck", ["true"], missing="there is no compute-sanitizer")], 10)
    assert not summaries.succeeded(journal.read(tmp_path / "journal.jsonl")[0])
    assert "!  memcheck                  there is no" in (tmp_path / "summary.txt").read_text()


@needs_process_groups
def test_a_sanitizer_that_finds_something_says_so(tmp_path: Path) -> None:
    run = runner(tmp_path)
    command = ["bash", "-c", f"exit {plan.FOUND}"]
    statuses = {plan.FOUND: "memcheck found errors"}
    run.run([groups.Group("memcheck", command, statuses=statuses)], 10)
    assert not summaries.succeeded(journal.read(tmp_path / "journal.jsonl")[0])
    assert "memcheck found errors" in (tmp_path / "summary.txt").read_text()


def test_results_go_where_out_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["check", "--first"])
    monkeypatch.setenv("OUT", str(tmp_path))
    assert check.parsed().output == tmp_path
    assert check.parsed().seconds == 170
    monkeypatch.delenv("OUT")
    assert check.parsed().output == ROOT / "benchmarks" / "results" / "gpu"
    monkeypatch.setattr(sys, "argv", ["check", "--rehearse"])
    assert check.parsed().output == ROOT / ".benchmarks" / "rehearsal"


def test_earlier_results_are_kept(tmp_path: Path) -> None:
    (tmp_path / "summary.txt").write_text("earlier")
    check.keep_earlier(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.txt.previous"]


# ---------------------------------------------------------------- what is said


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    begin = {"group": "a", "begin": "one", "at": 1.0}
    journal.write(path, "a", begin="one", at=1.0)
    with path.open("a") as file:
        file.write('{"group": "a", "che\n{"group": "a", "check": "one"')
    assert journal.read(path) == ([begin], 1)
    assert journal.unfinished([begin], "a") == begin
    assert "! 1 lines of the journal cannot be read" in summaries.text(([begin], 1), 1, 2)


def events_of(*events: dict[str, Any], status: int = 0) -> list[dict[str, Any]]:
    """A group to which this happened, and how it ended."""
    return [{"group": "speed", **one} for one in (*events, {"status": status})]


def test_summary_says_what_was_measured() -> None:
    good = {"backend": "cuda", **figures.figure("n 2: eager", 2.0, "ms")}
    time = {"time": "n 2", "kernels": [["row_kernel", 0.5, 3]]}
    events = events_of(good, time)
    text = summaries.text((events, 0), 3, 170)
    assert summaries.succeeded(events)
    assert "ok speed                     1 measured" in text
    assert "row_kernel" in text
    assert "row_kernel" not in summaries.text((events, 0), 3, 170, brief=True)


def test_what_misses_its_bar_has_failed() -> None:
    for bar, value, met in (("at most 1", 2.0, False), ("at least 5", 9.0, True)):
        events = events_of({**figures.figure("eager", value, "x"), "bar": bar, "met": met})
        text = summaries.text((events, 0), 3, 170)
        assert summaries.succeeded(events) == met
        assert f"{bar}{'' if met else '  MISSED'}\n" in text


def test_what_could_not_be_measured_has_failed() -> None:
    assert not summaries.succeeded([])
    assert not summaries.succeeded(events_of(figures.figure("large", float("nan"), "ms")))
    events = events_of({"figure": "large", "value": None, "unit": "", "message": "no memory"})
    assert not summaries.succeeded(events)
    assert "speed: large : no memory" in summaries.text((events, 0), 3, 170)


def test_a_group_of_which_all_was_skipped_has_failed() -> None:
    skipped = {"check": "a", "outcome": "skipped", "seconds": 0.0}
    passed = {"check": "b", "outcome": "passed", "seconds": 0.0}
    assert not summaries.succeeded(events_of({"selected": 1}, skipped))
    assert summaries.succeeded(events_of({"selected": 2}, skipped, passed))


@pytest.mark.parametrize("backend", device.BACKENDS)
def test_figures_are_held_to_their_bars(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "REHEARSAL", False)
    of_both = figures.figure("float32: error of the loss", 1.0, "")
    assert figures.held(backend, of_both)["met"] is False
    for name, value in (
        *((name, 1e9) for name in figures.AT_MOST_CUDA),
        *((name, 0.1) for name in figures.AT_LEAST_CUDA),
    ):
        event = figures.held(backend, figures.figure(name, value, "x"))
        assert event.get("met", True) == (backend != "cuda")
    monkeypatch.setattr(device, "REHEARSAL", True)
    assert "met" not in figures.held(backend, of_both)


def test_bars_are_of_figures_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names are written twice."""
    monkeypatch.setattr(figures, "scaled", lambda n: n)
    monkeypatch.setattr(figures, "step", lambda *_: lambda: (torch.zeros(()),))
    monkeypatch.setattr(figures, "products", lambda *_: lambda: None)
    monkeypatch.setattr(figures, "points", lambda *_: torch.ones(2, 1))
    monkeypatch.setattr(figures, "milliseconds", lambda *calls, repeats: [[1.0]] * len(calls))
    monkeypatch.setattr(device, "captured", lambda call: (call, None))
    monkeypatch.setattr(measure, "device_peak_memory", lambda call, device: 1)
    monkeypatch.setattr(measure, "seconds_of", lambda call, device: 1e-3)
    measured = [event for n, d in figures.SIZES for event in figures.at_size("cuda", n, d)]
    measured += [*figures.large("cuda"), *figures.compiled("cuda")]
    names = {event["figure"] for event in measured}
    wanted = {*figures.AT_MOST, *figures.AT_MOST_CUDA, *figures.AT_LEAST_CUDA}
    errors = {name for name in wanted if "error of" in name}
    assert wanted - errors <= names
    assert errors == {f"float32: error of the {what}" for what in ("loss", "gradient")}


def test_the_rule_takes_what_is_quicker_and_as_exact() -> None:
    default = choices.Measured(*choices.DEFAULT, 1.0, 1.0, 1.0)
    quick = choices.Measured("float16 parts", "10 MiB", 0.5, 1.2, 1.1)
    assert choices.chosen([default, quick]) == ("float16 parts", "10 MiB")
    assert choices.chosen([default, quick._replace(gradient_error=1.3)]) == choices.DEFAULT
    assert choices.chosen([default, quick._replace(loss_error=float("nan"))]) == choices.DEFAULT
    assert choices.chosen([default, quick._replace(time=0.96)]) == choices.DEFAULT
    quicker = choices.Measured("bfloat16 parts", "at once", 0.4, 1.0, 1.0)
    assert choices.chosen([default, quick, quicker]) == ("bfloat16 parts", "at once")


def test_every_way_is_measured_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    used = lambda: (products.SPLIT, pipeline.BLOCK_BYTES, clouds.SYMMETRIC_BYTES)  # noqa: E731
    before, replayed = used(), []
    monkeypatch.setattr(choices, "ROWS", {"at once": None, "few": 7})

    def replays() -> Callable[[], None]:
        replayed.append(used())
        return lambda: None

    found = list(
        choices.compare(
            replays,
            lambda: (2.0 if products.SPLIT is None else 3.0, 1.0),
            lambda *calls, repeats: [[1.0], [0.5]],
            1,
        )
    )
    assert used() == before
    assert [(way.products, way.rows) for way in found] == choices.ways()
    assert found[0][:2] == choices.DEFAULT
    assert all(way.time == 0.5 for way in found)
    assert {way.loss_error for way in found if way.products == "float32"} == {1.0}
    assert {way.loss_error for way in found if way.products != "float32"} == {1.5}
    ways = {(choices.PRODUCTS[product], rows) for product, rows in choices.ways()}
    assert {(split, "few" if size == 7 else "at once") for split, size, _ in replayed} == ways
    assert all(symmetric == 0 for _, size, symmetric in replayed if size == 7)


def test_choices_are_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "step", lambda *_: lambda: None)
    monkeypatch.setattr(figures, "errors", lambda *_: (1e-6, 1e-5))
    monkeypatch.setattr(device, "captured", lambda call: (call, None))
    monkeypatch.setattr(figures, "milliseconds", lambda *calls, repeats: [[2.0], [1.0]])
    names = [event["figure"] for event in figures.by_choice("cuda", 64, 8)]
    assert len(names) == 3 * len(choices.ways()) + 1
    assert names[-1].endswith("choice: float32, at once")


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
        {"backend": backend, **figures.figure(f"n {n:,}, d 512: {what}", n / 256, "ms")}
        for backend in ("cuda", "triton")
        for n in (256, 1024)
        for what in ("eager", "as a graph", "the four products", "the reference", "kernels")
    ]
    lines = picture.series(events)
    assert list(lines) == [name for name in picture.STYLES if not name.startswith("torch.compile")]
    assert lines["cuda, eager"] == {(256, 512): 1.0, (1024, 512): 4.0}
    sizes = []
    for name, given in (("empty.png", []), ("time.png", events)):
        picture.draw(given, tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[1] > 1.2 * sizes[0]


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
    modules.install_triton(tmp_path, tmp_path / "cache")
    read = json.loads((tmp_path / "cache" / "KEY" / "__grp__kernel.json").read_text())
    (path,) = read["child_paths"].values()
    assert path == str(tmp_path / "cache" / "KEY" / "kernel.cubin")
    assert Path(path).read_bytes() == b"code"


def test_libraries_are_installed(tmp_path: Path) -> None:
    assert tuple(library.path(device).name for device in ("cpu", "cuda")) == modules.LIBRARIES
    packed, package = tmp_path / "pack", tmp_path / "package"
    packed.mkdir()
    package.mkdir()
    assert modules.install(packed, package) == []
    name = modules.LIBRARIES[1]
    (packed / name).write_bytes(b"new")
    (package / name).write_bytes(b"old")
    assert modules.install(packed, package) == [name]
    assert (package / name).read_bytes() == b"new"


def test_a_pack_fits_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not whole" in str(modules.unfit(tmp_path))
    cpu, cuda = modules.LIBRARIES
    (tmp_path / cuda).touch()
    (tmp_path / modules.MANIFEST).write_text(json.dumps({"sources": modules.sources()}))
    assert f"has no {cpu}" in str(modules.unfit(tmp_path))
    (tmp_path / cpu).touch()
    assert modules.unfit(tmp_path) is None
    monkeypatch.setattr(modules, "ROOT", tmp_path)  # where setup.py and csrc are others
    (tmp_path / "setup.py").touch()
    assert "other sources" in str(modules.unfit(tmp_path))


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({}, None),
        ({"capability": None, "cpu library": None}, None),  # no time to ask
        ({"capability": "10.0"}, ".gpu-pack is for 90, the device has 100"),
        ({"cpu library": "no such file"}, "cpu library: no such file"),
        ({"cuda library": "undefined symbol"}, "cuda library: undefined symbol"),
    ],
)
def test_what_does_not_fit_is_built(
    facts: dict[str, str | None], why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "manifest", lambda pack: {"capability": "90"})
    told = {"capability": "9.0", "cpu library": "loaded", "cuda library": "loaded"} | facts
    events = [{"fact": name, "value": value} for name, value in told.items() if value is not None]
    assert check.wants_build(events, None) == why
    assert check.wants_build(events, "there is no pack") == "there is no pack"


def test_a_broken_pack_is_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its manifest, its archive, a cache that cannot be made: the extension is built instead."""
    for name in (modules.MANIFEST, "triton.tar.xz"):
        (tmp_path / name).write_bytes(b"{")
    monkeypatch.setattr(modules, "PACK", tmp_path)
    unfit = check.attempted(lambda: modules.use(tmp_path, tmp_path))
    assert unfit is not None
    assert unfit.startswith("JSONDecodeError")
    assert check.wants_build([], unfit) == unfit
    for cache in (tmp_path / "cache", tmp_path / modules.MANIFEST / "cache"):
        failed = check.attempted(lambda cache=cache: modules.install_triton(tmp_path, cache))
        assert failed is not None


def test_the_pack_is_built_as_setup_builds() -> None:
    setup = recipe()
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.c*")}
    assert {"csrc/cuda/launch_float.cu", *setup.CUDA_SOURCES} <= there
    assert {"csrc/cpu/ops.cpp", *setup.cpu_sources()} <= there
    assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in setup.defines(setup.CUDA_MACROS)
    assert "-DUSE_CUDA" in setup.defines(setup.CUDA_MACROS)


def test_what_is_missing_is_said_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for tool in ("nvcc", "g++"):
        (tmp_path / tool).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="--python: expected a Python; got no-such-python"):
        pack.tools("no-such-python")
    (tmp_path / "nvcc").unlink()
    with pytest.raises(SystemExit, match="expected nvcc on PATH"):
        pack.tools(sys.executable)


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
    assert modules.toolkit(DRYRUN.format(bin=wrappers / "bin")) == str(toolkit.resolve())
    assert modules.toolkit("nvcc fatal   : Don't know what to do with '/dev/null'") is None
    assert modules.toolkit("") is None


def test_cuda_home_is_asked_of_nvcc_only_where_nothing_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert modules.cuda_home() == {}
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/bin/..' >&2\n")
    nvcc.chmod(0o755)
    (tmp_path / "bin").mkdir()
    assert modules.cuda_home() == {"CUDA_HOME": str(tmp_path.resolve())}
    monkeypatch.setenv("CUDA_PATH", "/elsewhere")
    assert modules.cuda_home() == {}


# ---------------------------------------------------------------- the rehearsal


def test_stand_ins_have_the_methods_of_those_they_stand_for() -> None:
    for name, methods in device.BACKENDS.items():
        stand_in = device.StandIn(name)
        assert stand_in.name == name
        assert stand_in.ported()["method"] == methods


@needs_process_groups
def test_a_rehearsal_passes(tmp_path: Path) -> None:
    """A few values, and the environment; what the device's tests say of the CPU backend."""
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--rehearse", "--seconds", "100"]
    command += ["--only", "values", "-k", "33 and float32 and auto", "--output", str(tmp_path)]
    group = groups.Group("rehearsal", command)
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
    with pytest.raises(TypeError, match="to remember"):
        doubled(x, factor=lambda: 3.0)  # type: ignore[arg-type]


def test_a_changed_definition_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pcoherence import remembered

    monkeypatch.setenv("PCOHERENCE_REMEMBERED", str(tmp_path))
    calls = []

    @remembered.remembered
    def counted(x: int) -> tuple[int]:
        calls.append(x)
        return (x,)

    counted(1)
    counted(1)
    monkeypatch.setattr(remembered, "_definitions", lambda: b"changed")
    counted(1)
    assert calls == [1, 1]
    (tmp_path / remembered.FILE).write_bytes(b"broken")
    remembered._read.cache_clear()
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert counted(1) == (1,)
    remembered._read.cache_clear()
    monkeypatch.setenv("PCOHERENCE_REMEMBERED", "/proc/nowhere")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert counted(1) == (1,)


def test_the_last_word_on_a_fact_counts() -> None:
    """A process that goes on behind another says what it finds again."""
    events = [{"fact": "a", "value": 1}, {"fact": "b", "value": 3}, {"fact": "a", "value": 2}]
    assert [check.fact(events, name) for name in ("a", "b", "c")] == ["2", "3", None]


def test_a_group_that_ends_before_all_was_reached_is_no_success() -> None:
    passed = [{"check": name, "outcome": "passed", "seconds": 0.0} for name in "ab"]
    assert not summaries.succeeded(events_of({"selected": 2}, *passed[:1]))
    assert summaries.succeeded(events_of({"selected": 2}, *passed))
