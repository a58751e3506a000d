"""What is known so far: a line of JSON for each event, flushed at once, from several processes.

Lines have a "group", and one of
    selected   how many checks a group has
    begin      the name of a check
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


def read(path: Path) -> list[dict[str, Any]]:
    """All events; a last line that is being written is not one yet."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def unfinished(events: list[dict[str, Any]], group: str) -> str | None:
    """The check that a group began and did not end."""
    own = [event for event in events if event["group"] == group]
    ended = {event["check"] for event in own if "check" in event}
    begun = [event["begin"] for event in own if "begin" in event]
    return begun[-1] if begun and begun[-1] not in ended else None


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
        config.pluginmanager.register(_Writer(path, config.getoption("--group")))


class _Writer:
    """Writes what becomes of every check."""

    def __init__(self, path: Path, group: str) -> None:
        self._path, self._group = path, group
        self._seconds, self._outcome, self._message = 0.0, "", ""

    @pytest.hookimpl(trylast=True)  # after -k
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        """Take this process's share, and leave out what has been begun before."""
        part, parts = map(int, config.getoption("--shard").split("/"))
        items[:] = items[part::parts]
        events = read(self._path)
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
