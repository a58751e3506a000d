"""Processes that check or measure: what dies or hangs goes on, what is late is cut off."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import journal, summary

ROOT = Path(__file__).resolve().parent.parent.parent

HANG = 45.0
"""Seconds after which a check is taken to hang. The longest compiles, and takes a few."""

RESTARTS = 8
"""How often a group whose process died goes on behind the check that killed it."""

POLL, REFRESH = 0.1, 1.0
"""Seconds between looks at the processes, and between summaries."""

ENDED = (0, 1, 5)
"""Exit statuses with which pytest ends by itself: all passed, some failed, nothing was left."""

KILLED = 5.0
"""Seconds in which a killed process ends, unless the driver holds it."""


class Group(NamedTuple):
    """A process of its own: after an illegal access CUDA refuses all that a process asks."""

    name: str
    command: Sequence[str]
    variables: Mapping[str, str] = {}
    again: Mapping[str, str] = {}  # variables that a process gets which goes on behind another
    checks: bool = False  # its exit statuses are pytest's
    needs_build: bool = False  # the CUDA extension, which may still be building
    tells: bool = False  # writes into the journal what it begins, so that another can go on
    hang: float = HANG
    missing: str | None = None  # why it cannot run at all
    statuses: Mapping[int, str] = {}  # exit statuses of its own, in words


@dataclass
class Running:
    """A group whose process has been started."""

    group: Group
    process: subprocess.Popen[bytes]
    begun: float  # time.time()
    restarts: int = 0


@dataclass
class Build:
    """What is being built in the background, and what to do once it is there."""

    process: subprocess.Popen[bytes]
    install: Callable[[], object]
    for_all: bool = False  # whether every check needs it, since there is no CPU extension either
    ready: bool = False

    def keeps(self, group: Group) -> str | None:
        """What keeps a group from starting: "wait", why it will never start, or None."""
        needed = group.needs_build or (self.for_all and group.tells)
        return self.poll() if needed else None

    def poll(self) -> str | None:
        """Where it stands, as `keeps`; installs what was built as soon as it is there."""
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
    known: Sequence[Mapping[str, Any]] = ()  # events, when the summary was last written
    postponed: list[Group] = field(default_factory=list)  # until the build is done

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
                preexec_fn=end_with_parent,
            )

    def run(self, groups: Sequence[Group], until: float) -> None:
        """Groups side by side until all have ended, or `until` seconds have passed.

        Those that still wait for the build then are left to the next call.
        """
        waiting = [*self.postponed, *groups]
        self.postponed = []
        running: list[Running] = []
        try:
            while (waiting or running) and self.elapsed() < until:
                if self.build is not None:
                    self.build.poll()
                waiting = [group for group in waiting if not self._begin(group, running)]
                running = [one for one in running if not self._ended(one)]
                self.refresh()
                time.sleep(POLL)
            for one in running:
                self._write(one.group, cut=round(self.elapsed()))
            self.postponed = waiting
        finally:  # also where this program is interrupted
            for one in running:
                kill(one.process)
        self.refresh(True)

    def end(self) -> None:
        """Say what has never begun, and stop building."""
        for group in self.postponed:
            self._write(group, missing="no time was left for it")
        if self.build is not None:
            kill(self.build.process)
        self.refresh(True)

    def _write(self, group: Group, **event: object) -> None:
        journal.write(self.journal, group.name, **event)

    def _begin(self, group: Group, running: list[Running]) -> bool:
        """Start a group unless it has to wait; whether there is nothing to wait for."""
        why = group.missing
        if why is None and self.build is not None:
            why = self.build.keeps(group)
        if why == "wait":
            return False
        if why is not None:
            self._write(group, missing=why)
            return True
        running.append(Running(group, self.start(group), time.time()))
        return True

    def _ended(self, one: Running) -> bool:
        """Whether a group is done; one that died or hangs goes on in another process."""
        group, status = one.group, one.process.poll()
        if status is None:
            if not self._hangs(one):
                return False
            died = f"hung for {group.hang * self.patience:.0f} s"
            if not kill(one.process):
                self._write(group, missing=f"it {died}, and could not be killed")
                return True
        elif status in group.statuses:
            self._write(group, status=status, missing=group.statuses[status])
            return True
        elif status in (ENDED if group.checks else (0, 1)):
            self._write(group, status=0 if status == 5 else status)
            return True
        else:
            died = "lost the device" if status == journal.LOST else f"died ({status})"
        last = journal.unfinished(journal.read(self.journal)[0], group.name)
        if last is not None:
            journal.finish(self.journal, group.name, last, died)
        # Without something to leave out, another process would die of the same.
        if one.restarts == RESTARTS or (last is None and status != journal.LOST):
            self._write(group, status=-1, missing=f"the process {died}")
            return True
        one.restarts += 1
        again = group._replace(variables={**group.variables, **group.again})
        one.process, one.begun = self.start(again), time.time()
        return False

    def _hangs(self, one: Running) -> bool:
        """Whether nothing has been begun for too long: a check, a measurement, the process."""

        def silent(events: Sequence[Mapping[str, Any]]) -> bool:
            own = (e["at"] for e in events if e["group"] == one.group.name and "begin" in e)
            return time.time() - max([one.begun, *own]) > one.group.hang * self.patience

        # What the summary knows is a second old, but need not be read for each group.
        return one.group.tells and silent(self.known) and silent(journal.read(self.journal)[0])

    def refresh(self, now: bool = False) -> None:
        """Rewrite the summary, once a second."""
        if not now and self.elapsed() - self.refreshed < REFRESH:
            return
        self.refreshed = self.elapsed()
        found = journal.read(self.journal)
        self.known = found[0]
        part = self.output / "summary.part"
        part.write_text(summary.text(found, self.elapsed(), self.seconds))
        part.replace(self.output / "summary.txt")


def end_with_parent() -> None:
    """In a child: end when the process that started it ends, however that does."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def kill(process: subprocess.Popen[bytes]) -> bool:
    """End a process and all that it has started; whether it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(KILLED)
        except subprocess.TimeoutExpired:  # in the driver, with a kernel that does not end
            return False
    return True
