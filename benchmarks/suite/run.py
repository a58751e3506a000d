"""Run the cases: one process for each contestant, its failure a row like any other."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import measure
from . import contestants
from .cases import CASES, Case
from .contestants import OTHER, Contestant
from .rows import OK, SKIPPED, Row, Spread, load, save
from .worker import BUILD_SECONDS, Job

ROOT = Path(__file__).parents[2]

QUICK = ("products", "cdist", "reference", "cpu auto", "triton auto", "cuda auto")
"""Contestants of a quick run: nothing that compiles for half a minute."""

TRUTH_SECONDS = 300
"""For a truth; the longest takes some 10 s on an idle machine."""

REMEMBERED = ("out of memory", "timeout")
"""Failures that larger cases of the same family would only repeat."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run, and how.

    Attributes:
        output: the file of the results.
        device: "cpu" or "cuda".
        quick, full: fewer cases or all of them.
        only: regular expression that "case contestant" contains.
        time_limit: seconds of a contestant on a case, once built and warm.
        memory_limit: GiB above what the libraries take.
        budget: seconds of measuring a row, beyond the fewest rounds.
        resume: keep the rows that the output already has.
        plugin: Python file that defines more CONTESTANTS, for every case.
    """

    output: Path
    device: str = "cpu"
    quick: bool = False
    full: bool = False
    only: str = ""
    time_limit: float = 60.0
    memory_limit: float = 8.0
    budget: float = 1.0
    resume: bool = False
    plugin: Path | None = None


def selected(options: Options) -> list[tuple[Case, Contestant]]:
    """Cases and contestants of a run, in order."""
    chosen = []
    for case in CASES:
        if options.quick and not case.quick:
            continue
        if options.device in case.full_on and not options.full:
            continue
        for contestant in contestants.of_case(case, options.plugin):
            added = contestant.name not in contestants.known()
            if options.quick and contestant.name not in QUICK and not added:
                continue
            if re.search(options.only, f"{case.name} {contestant.name}"):
                chosen.append((case, contestant))
    return chosen


def run(options: Options) -> list[Row]:
    """Measure; the output holds every row that is done, also after Ctrl-C."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("run: device cuda, but torch finds no GPU")
    chosen = selected(options)
    if not chosen:
        raise SystemExit(f"run: no case and contestant matches {options.only!r}")
    kept = load(options.output) if options.resume and options.output.exists() else []
    done = {row.key: row for row in kept}
    machine = _machine(options.device)
    failed: dict[tuple[str, str], Row] = {}
    with tempfile.TemporaryDirectory(prefix="pcoherence-benchmarks-") as folder:
        bar = tqdm(chosen, unit="row", dynamic_ncols=True, disable=None)
        for case, contestant in bar:
            bar.set_description(f"{case.name} {contestant.name}")
            key = (case.name, contestant.name, machine["device"])
            row = done.get(key) or _row(case, contestant, options, machine, failed, Path(folder))
            done[key] = row
            if row.status in REMEMBERED:
                failed.setdefault((case.family, contestant.name), row)
            save(options.output, list(done.values()))
            if row.status not in (OK, SKIPPED):
                bar.write(f"{case.name} {contestant.name}: {row.status}, {row.reason}")
    return list(done.values())


def _row(
    case: Case,
    contestant: Contestant,
    options: Options,
    machine: dict[str, str],
    failed: dict[tuple[str, str], Row],
    folder: Path,
) -> Row:
    """By measurement, unless there is a reason not to."""
    before = failed.get((case.family, contestant.name))
    if options.device not in contestant.devices:
        outcome: dict[str, Any] = {
            "status": SKIPPED,
            "reason": f"runs on {' or '.join(contestant.devices)}",
        }
        if not torch.cuda.is_available() and "cuda" in contestant.devices:
            outcome["reason"] += ", and no GPU is here"
    elif before is not None and before.n < case.n:
        reason = f"{before.status} at n {before.n:,}: {before.reason}"
        outcome = {"status": "not run", "reason": reason}
    else:
        outcome = _measure(case, contestant, options, folder)
    return Row(
        case=case.name,
        family=case.family,
        n=case.n,
        d=case.d,
        dtype=case.dtype,
        objective=case.objective,
        tau=case.tau,
        contestant=contestant.name,
        **(outcome | machine),
    )


def _measure(case: Case, contestant: Contestant, options: Options, folder: Path) -> dict[str, Any]:
    """Start the processes: of the truth, once for a case, and of the contestant."""
    truth = folder / f"{case.name}.pt"
    job = Job(
        case=case.name,
        contestant=contestant.name,
        device=options.device,
        budget=options.budget,
        time_limit=options.time_limit,
        memory_limit=int(options.memory_limit * 2**30),
        truth=str(truth),
        plugin=str(options.plugin.resolve()) if options.plugin else None,
    )
    if contestant.check != OTHER and not truth.exists():
        for old in folder.glob("*.pt"):
            old.unlink()
        asked = Job(**{**vars(job), "contestant": "", "plugin": None})
        outcome = _process(asked, folder, TRUTH_SECONDS)
        if outcome:
            reason = f"no truth to compare with: {outcome['status']}, {outcome['reason']}"
            return {"status": "failed", "reason": reason}
    outcome = _process(job, folder, BUILD_SECONDS + options.time_limit)
    for name in ("forward", "step", "times_limit"):
        if name in outcome:
            outcome[name] = Spread(*outcome[name])
    return outcome


def _process(job: Job, folder: Path, seconds: float) -> dict[str, Any]:
    """The outcome of a job, or of what became of its process."""
    asked, answered, said = (folder / name for name in ("job", "outcome", "stderr"))
    answered.unlink(missing_ok=True)
    job.save(asked)
    command = [sys.executable, "-m", "benchmarks.suite.worker", str(asked), str(answered)]
    with said.open("w") as errors, _group(command, errors) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = -signal.SIGALRM
    if answered.exists():
        outcome: dict[str, Any] = json.loads(answered.read_text())
        return outcome
    if code == -signal.SIGALRM:
        return {"status": "timeout", "reason": f"more than {job.time_limit:g} s"}
    if code < 0:
        return {"status": "crashed", "reason": signal.Signals(-code).name}
    lines = said.read_text(errors="replace").strip().splitlines()
    return {"status": "crashed", "reason": f"exit status {code}: {(lines or [''])[-1][:160]}"}


@contextlib.contextmanager
def _group(command: Sequence[str], errors: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process with those that it starts (compilers); none of them outlives this block."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
        env=environment,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _machine(device: str) -> dict[str, str]:
    """The last fields of a row."""
    if device == "cuda":
        return measure.environment() | {"device": torch.cuda.get_device_name()}
    if shutil.which("g++") is None:
        tqdm.write("no g++ on the path: KeOps and torch.compile will fail")
    return measure.environment() | {"device": "cpu"}
