"""Processes that check or measure: what dies or hangs goes on, what is late is cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import journal, summary

ROOT = Path(__file__).resolve().parent.parent.parent

HANG = 45.0
"""Seconds after which a check is taken to hang. The longest compiles, and takes a few."""

RESTARTS = 8
"""How often a group whose process died goes on behind the check that killed it."""

POLL, REFRESH = 0.1, 1.0
"""Seconds between looks at the processes, and between summaries."""

ENDED = {0: None, 1: None, 5: "no check was selected"}
"""Exit statuses with which pytest ends by itself, and what there is to say of them."""


class Group(NamedTuple):
    """A process of its own: after an illegal access CUDA refuses all that a process asks."""

    name: str
    command: Sequence[str]
    variables: Mapping[str, str] = {}
    checks: bool = True  # its tests are in the journal, so that another process can go on
    needs_build: bool = False  # the CUDA extension, which may still be building
    hang: float = HANG
    missing: str | None = None  # why it cannot run at all
    statuses: Mapping[int, str] = {}  # exit statuses of its own, in words


@dataclass
class Running:
    """A group whose process has been started."""

    group: Group
    process: subprocess.Popen[bytes]
    begun: float
    restarts: int = 0


@dataclass
class Build:
    """What is being built in the background, and what to do once it is there."""

    process: subprocess.Popen[bytes]
    install: Callable[[], object]
    ready: bool = False

    def poll(self) -> str | None:
        """What keeps those who need it: "wait", why it will never be there, or None."""
        status = self.process.poll()
        if status is None:
            return "wait"
        if status != 0:
            return f"no CUDA module: building it failed ({status}), see log.txt"
        if not self.ready:
            self.ready = True
            self.install()
        return None


@dataclass
class Runner:
    """Runs groups, and keeps the summary.

    Attributes:
        output: folder of journal.jsonl, log.txt and summary.txt.
        environment: of every process.
        begun: time.monotonic() at the beginning.
        seconds: for everything.
        patience: how many times longer than usual a check may take.
        build: what some groups wait for, if anything.
    """

    output: Path
    environment: Mapping[str, str]
    begun: float
    seconds: float
    patience: float = 1.0
    build: Build | None = None
    refreshed: float = 0.0

    @property
    def journal(self) -> Path:
        """Where all that is known goes."""
        return self.output / journal.FILE

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begun

    def start(self, group: Group) -> subprocess.Popen[bytes]:
        """Its process: a group of its own, so that all it has started ends with it."""
        with (self.output / "log.txt").open("ab") as log:
            line = " ".join(group.command).partition("\n")[0]
            log.write(f"=== {group.name}, {self.elapsed():.0f} s: {line}\n".encode())
            log.flush()
            return subprocess.Popen(
                group.command,
                cwd=ROOT,
                env={**self.environment, **group.variables},
                stdin=subprocess.DEVNULL,  # reading from the terminal would stop it
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # not setsid: whoever ends all of this would miss it
            )

    def run(self, groups: Sequence[Group], until: float) -> None:
        """Groups side by side until all have ended, or `until` seconds have passed."""
        waiting = list(groups)
        running: list[Running] = []
        try:
            while (waiting or running) and self.elapsed() < until:
                waiting = [group for group in waiting if not self._begin(group, running)]
                running = [one for one in running if not self._ended(one)]
                self.refresh()
                time.sleep(POLL)
            for one in running:
                self._write(one.group, cut=round(self.elapsed()))
            for group in waiting:
                self._write(group, missing="no time was left for it")
        finally:  # also where this program is interrupted
            for one in running:
                kill(one.process)
        self.refresh(True)

    def _write(self, group: Group, **event: object) -> None:
        journal.write(self.journal, group.name, **event)

    def _begin(self, group: Group, running: list[Running]) -> bool:
        """Start a group unless it has to wait; whether there is nothing to wait for."""
        why = group.missing
        if why is None and group.needs_build and self.build is not None:
            why = self.build.poll()
        if why == "wait":
            return False
        if why is not None:
            self._write(group, missing=why)
            return True
        running.append(Running(group, self.start(group), self.elapsed()))
        return True

    def _ended(self, one: Running) -> bool:
        """Whether a group is done; one that died or hangs goes on in another process."""
        group, status = one.group, one.process.poll()
        if status is None:
            if not self._hangs(one):
                return False
            kill(one.process)
            died = f"hung for {group.hang * self.patience:.0f} s"
        elif status in group.statuses:
            self._write(group, status=status, missing=group.statuses[status])
            return True
        elif not group.checks or status in ENDED:
            said = ENDED.get(status) if group.checks else None
            self._write(group, status=status, **({"missing": said} if said else {}))
            return True
        else:
            died = "lost the device" if status == journal.LOST else f"died ({status})"
        name = journal.unfinished(journal.read(self.journal), group.name)
        if name is not None:
            self._write(group, check=name, outcome=died, seconds=0.0)
        # Without a check to leave out, another process would die of the same.
        if one.restarts == RESTARTS or (name is None and status != journal.LOST):
            self._write(group, status=-1, missing=f"the process {died}")
            return True
        one.restarts += 1
        one.process, one.begun = self.start(group), self.elapsed()
        return False

    def _hangs(self, one: Running) -> bool:
        hang = one.group.hang * self.patience
        if not one.group.checks or self.elapsed() - one.begun < hang:
            return False
        events = [e for e in journal.read(self.journal) if e["group"] == one.group.name]
        if journal.unfinished(events, one.group.name) is None:
            return False
        return time.time() - max(event["at"] for event in events if "begin" in event) > hang

    def refresh(self, now: bool = False) -> None:
        """Rewrite the summary, once a second."""
        if not now and self.elapsed() - self.refreshed < REFRESH:
            return
        self.refreshed = self.elapsed()
        text = summary.text(journal.read(self.journal), self.elapsed(), self.seconds)
        part = self.output / "summary.part"
        part.write_text(text)
        part.replace(self.output / "summary.txt")


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
