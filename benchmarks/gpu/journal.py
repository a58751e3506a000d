"""What is known so far: a line of JSON for each event, flushed at once, from several processes.

Lines have a "group", and one of
    selected   how many checks a group has
    begin      the name of a check, or with "measures" of a measurement, and when
    end        the name of a measurement
    check      its name again, with outcome, seconds, and a message where it did not pass
    figure     something measured, see figures.py
    fact       about the machine, with a value
    time       where a call's time goes, see figures.py
    lost       why the device serves the process no more
    status, cut, missing    how the group ended: exit status, second, why it could not run

As a pytest plugin (-p benchmarks.gpu.journal --journal FILE --group NAME) it writes checks. Those
that the file has already are left out: a process that died goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FILE = "journal.jsonl"

LOST = 70
"""Exit status of a process whose device serves it no more."""

MESSAGE = 300
"""Characters of a failure that are kept: three lines of a terminal. The log has all of it."""


def write(path: Path, group: str, **event: Any) -> None:
    """Append one line; a line at a time is whole, whoever else writes."""
    line = json.dumps({"group": group, **event}) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All events, and how many lines are broken; a last one that is being written is neither."""
    if not path.exists():
        return [], 0
    events, broken = [], 0
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        if line.endswith("\n"):
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:  # a full disk, a process that was killed
                broken += 1
    return events, broken


def unfinished(events: list[dict[str, Any]], group: str) -> dict[str, Any] | None:
    """The last event with which a group began something, if that has not ended."""
    own = [event for event in events if event["group"] == group]
    ended = {event["check"] for event in own if "check" in event}
    ended |= {event["end"] for event in own if "end" in event}
    begun = [event for event in own if "begin" in event]
    return begun[-1] if begun and begun[-1]["begin"] not in ended else None


def finish(path: Path, group: str, begun: dict[str, Any], died: str) -> None:
    """Say what became of what a process had begun when it died."""
    if begun.get("measures"):
        write(path, group, figure=begun["begin"], value=None, unit="", message=died)
        write(path, group, end=begun["begin"])
    else:
        write(path, group, check=begun["begin"], outcome=died, seconds=0.0)


# ---------------------------------------------------------------- as a pytest plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to write, and as whom."""
    parser.addoption("--journal", type=Path)
    parser.addoption("--group", default="checks")
    parser.addoption("--shard", default="0/1", help="I/K: every K-th of the checks, from the I-th")


def pytest_configure(config: pytest.Config) -> None:
    """Start writing, in a process that runs checks itself."""
    path = config.getoption("--journal")
    if path is not None:
        config.pluginmanager.register(_Writer(path, config))


class _Writer:
    """Writes what becomes of every check."""

    def __init__(self, path: Path, config: pytest.Config) -> None:
        self._path, self._config = path, config
        self._group: str = config.getoption("--group")
        self._seconds, self._outcome, self._message = 0.0, "", ""

    @pytest.hookimpl(trylast=True)  # after -k
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        """Take this process's share, and leave out what has been begun before."""
        part, parts = map(int, config.getoption("--shard").split("/"))
        items[:] = items[part::parts]
        events, _ = read(self._path)
        own = [event for event in events if event["group"] == self._group]
        if not any("selected" in event for event in own):
            write(self._path, self._group, selected=len(items))
        begun = {event["begin"] for event in own if "begin" in event}
        items[:] = [item for item in items if item.nodeid not in begun]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """One check, with its set-up and what follows."""
        from pcoherence import remembered

        write(self._path, self._group, begin=item.nodeid, at=time.time())
        self._seconds, self._outcome, self._message = 0.0, "passed", ""
        before = remembered.computed
        result = yield
        event = {"check": item.nodeid, "outcome": self._outcome, "seconds": round(self._seconds, 3)}
        if self._message:
            event["message"] = self._message
        if remembered.computed > before:
            event["computed"] = remembered.computed - before
        write(self._path, self._group, **event)
        if self._outcome == "failed":
            self._leave_if_lost()
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One of its phases."""
        self._seconds += report.duration
        if report.outcome == "failed":  # at once: who is cut off writes no report at its end
            terminal = self._config.get_terminal_writer()
            terminal.line(report.longreprtext)
            for title, text in report.sections:
                terminal.line(f"--- {title}\n{text}")
            terminal.flush()
        if report.outcome == "passed" or self._outcome == "failed":
            return
        self._outcome = report.outcome
        self._message = _short(report)

    def _leave_if_lost(self) -> None:
        from benchmarks.gpu import device

        why = device.lost()
        if why is not None:
            write(self._path, self._group, lost=why)
            os._exit(LOST)


def _short(report: pytest.TestReport) -> str:
    """The line that says why."""
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        return str(report.longrepr[2])[:MESSAGE]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else crash.message
    return " ".join(text.split())[:MESSAGE]
