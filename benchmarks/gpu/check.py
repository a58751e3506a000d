"""One command for a GPU machine: check that the kernels are right, and measure.

    make gpu-check [GPU_ARGS="..."]         (or python3 -m benchmarks.gpu.check ...)

    --first             the most telling first, in 170 s: meant to be cut off at any second
    (nothing)           everything: all GPU tests, figures, sanitisers, in 400 s
    --only STEP ...     some steps alone; -k EXPRESSION some of their tests
    --seconds S         for all of it

Needs no network: that machine's own Python (3.11 or newer), torch and triton are used, nothing is
installed. What `make gpu-pack` built elsewhere is used where it loads; otherwise the extension is
built in the background, and CUDA's checks begin when it is there.

Results go to the folder that OUT names in the environment, otherwise to benchmarks/results/gpu:
journal.jsonl, a line for each event as it happens; summary.txt, rewritten every second; log.txt,
all that was printed; time.png, with the figures. PCOHERENCE_COMMIT says which commit this is, for
copies without .git. With --rehearse the CPU plays the device, which checks the checks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import journal, summary

ROOT = Path(__file__).resolve().parent.parent.parent
PACK = ROOT / ".gpu-pack"
BUILD = "build"

HANG = 45.0
"""Seconds after which a check is taken to hang. The longest compiles, and takes a few.

A rehearsal waits four times as long: there a few cores do all.
"""

SANITIZED_HANG = 120.0
"""The same under compute-sanitizer, which slows kernels down a hundredfold."""

RESTARTS = 8
"""How often a group whose process died goes on behind the check that killed it."""

POLL, REFRESH = 0.1, 1.0
"""Seconds between looks at the processes, and between summaries."""


class Group(NamedTuple):
    """A process, and what it is. After an illegal access CUDA refuses all that it asks."""

    name: str
    command: list[str]
    variables: Mapping[str, str] = {}
    checks: bool = True  # its tests are in the journal, so that another process can go on
    needs_cuda: bool = False  # the CUDA extension, which may still be building
    hang: float = HANG


class Stage(NamedTuple):
    """Groups side by side, until a share of all seconds is over."""

    steps: Sequence[str]
    until: float


FIRST = (
    Stage(("environment",), 0.15),
    Stage(("compile", "rows", "values", "modes"), 0.5),
    Stage(("speed cuda",), 0.67),
    Stage(("speed triton",), 0.83),
    Stage(("memcheck",), 1.0),
)
"""Seconds 0 to 25 of 170, to 85, to 114, to 141, and the rest; a stage that is done ends early."""

EVERYTHING = (
    Stage(("environment",), 0.06),
    Stage(("compile", "rows", "tests"), 0.42),
    Stage(("speed cuda",), 0.52),
    Stage(("speed triton",), 0.62),
    Stage(("large",), 0.68),
    Stage(("compiled",), 0.8),
    Stage(("picture",), 0.82),
    Stage(("memcheck", "racecheck"), 1.0),
)

SHARDS = 12
"""Processes for all tests. Each holds a CUDA context, of about half a GiB, and a core."""


class Plan:
    """The steps, and the groups of each."""

    def __init__(self, output: Path, expression: str, capability: str) -> None:
        self.journal = output / "journal.jsonl"
        self._expression = expression
        self._capability = capability

    def groups(self, step: str) -> list[Group]:
        """What a step runs."""
        found: dict[str, Callable[[], list[Group]]] = {
            "environment": self._environment,
            "compile": self._compile,
            "rows": self._rows,
            "values": lambda: self._of_gpu("values", "test_values"),
            "modes": lambda: self._of_gpu("modes", "test_mode"),
            "tests": self._tests,
            "speed cuda": lambda: [self._figures("cuda", "speed", "accuracy")],
            "speed triton": lambda: [self._figures("triton", "speed", "accuracy")],
            "large": lambda: [self._figures(name, "large") for name in ("cuda", "triton")],
            "compiled": lambda: [self._figures("cuda", "compiled")],
            "picture": self._picture,
            "memcheck": lambda: self._sanitizer("memcheck", ["--report-api-errors", "no"]),
            "racecheck": lambda: self._sanitizer("racecheck", []),
        }
        return found[step]()

    def _environment(self) -> list[Group]:
        module = [sys.executable, "-m", "benchmarks.gpu.environment"]
        return [Group("environment", [*module, "--journal", str(self.journal)], checks=False)]

    def _compile(self) -> list[Group]:
        """Triton's kernels into its cache, by all cores, before anybody needs them one by one."""
        command = [sys.executable, "-m", "pcoherence.kernels.offline", self._capability, "--all"]
        return [Group("compile triton", command, {"TRITON_INTERPRET": "0"}, checks=False)]

    def _pytest(
        self, name: str, file: str, expression: str = "", shard: tuple[int, int] = (0, 1)
    ) -> Group:
        command = [sys.executable, "-m", "pytest", f"tests/{file}", "-p", "benchmarks.gpu.journal"]
        # Not the project's addopts: with -q a run that is cut off leaves nothing but dots.
        command += ["-o", "addopts=", "--strict-markers", "-v", "--tb=short"]
        command += ["-p", "no:cacheprovider", "-p", "no:randomly"]
        command += ["--journal", str(self.journal), "--group", name]
        command += ["--shard", f"{shard[0]}/{shard[1]}"]
        wanted = " and ".join(f"({part})" for part in (expression, self._expression) if part)
        if wanted:
            command += ["-k", wanted]
        # A launch that fails is then reported by the test that launched it.
        return Group(name, command, {"CUDA_LAUNCH_BLOCKING": "1"}, needs_cuda="cuda" in name)

    def _rows(self) -> list[Group]:
        """Every kernel alone."""
        triton = [self._pytest(f"triton rows {i}", "test_triton.py", "", (i, 2)) for i in (0, 1)]
        return [self._pytest("cuda rows", "test_cuda_rows.py"), *triton]

    def _of_gpu(self, name: str, tests: str) -> list[Group]:
        """Tests of test_gpu.py, by backend."""
        return [
            self._pytest(f"{backend} {name}", "test_gpu.py", f"{tests} and [{backend}")
            for backend in ("cuda", "triton")
        ]

    def _tests(self) -> list[Group]:
        """All of test_gpu.py."""
        half = SHARDS // 2
        return [
            self._pytest(f"{backend} tests {i}", "test_gpu.py", of_backend, (i, half))
            for backend, of_backend in (("cuda", "not [triton"), ("triton", "[triton"))
            for i in range(half)
        ]

    def _figures(self, backend: str, *parts: str) -> Group:
        name = f"{parts[0]} {backend}"
        command = [sys.executable, "-m", "benchmarks.gpu.figures", "--journal", str(self.journal)]
        command += ["--group", name, "--backend", backend, "--part", *parts]
        return Group(name, command, checks=False, needs_cuda=backend == "cuda")

    def _picture(self) -> list[Group]:
        command = [sys.executable, "-m", "benchmarks.gpu.picture", str(self.journal)]
        command += [str(self.journal.with_name("time.png"))]
        return [Group("picture", command, checks=False)]

    def _sanitizer(self, tool: str, options: list[str]) -> list[Group]:
        if shutil.which("compute-sanitizer") is None:
            journal.write(self.journal, f"{tool} cuda", missing="there is no compute-sanitizer")
            return []
        group = self._pytest(
            f"{tool} cuda", "test_gpu.py", "test_small_for_the_sanitizer and [cuda"
        )
        sanitizer = ["compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "9"]
        # In torch's cache, an access out of bounds would hit another tensor unseen.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return [
            group._replace(
                command=[*sanitizer, *group.command], variables=variables, hang=SANITIZED_HANG
            )
        ]


STEPS = tuple(dict.fromkeys(step for stage in (*FIRST, *EVERYTHING) for step in stage.steps))


@dataclass
class Running:
    """A group whose process has been started."""

    group: Group
    process: subprocess.Popen[bytes]
    begun: float
    restarts: int = 0


@dataclass
class Runner:
    """Runs stages, and keeps the summary."""

    output: Path
    environment: Mapping[str, str]
    begun: float
    seconds: float
    build: subprocess.Popen[bytes] | None = None
    refreshed: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def journal(self) -> Path:
        """Where all that is known goes."""
        return self.output / "journal.jsonl"

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
                journal.write(self.journal, one.group.name, cut=round(self.elapsed()))
            for group in waiting:
                journal.write(self.journal, group.name, missing="the build took too long")
        finally:  # also where this program is interrupted
            for one in running:
                kill(one.process)
        self.refresh(True)

    def _begin(self, group: Group, running: list[Running]) -> bool:
        """Start a group unless it has to wait; whether there is nothing to wait for."""
        if group.needs_cuda and self.build is not None:
            status = self.build.poll()
            if status is None:
                return False
            if status != 0:
                why = f"no CUDA module: building it failed ({status}), see log.txt"
                journal.write(self.journal, group.name, missing=why)
                return True
        running.append(Running(group, self.start(group), self.elapsed()))
        return True

    def _ended(self, one: Running) -> bool:
        """Whether a group is done; one that died or hangs goes on in another process."""
        status = one.process.poll()
        if status is None:
            if not self._hangs(one):
                return False
            kill(one.process)
            died = f"hung for {one.group.hang:.0f} s"
        elif status in (0, 1, 5) or not one.group.checks:  # of pytest: passed, failed, none
            journal.write(self.journal, one.group.name, status=status)
            return True
        else:
            died = "lost the device" if status == journal.LOST else f"died ({status})"
        name = journal.unfinished(journal.read(self.journal), one.group.name)
        if name is not None:
            journal.write(self.journal, one.group.name, check=name, outcome=died, seconds=0.0)
        lost = status == journal.LOST
        if one.restarts == RESTARTS or (name is None and not lost):
            journal.write(self.journal, one.group.name, status=-1, missing=f"the process {died}")
            return True
        one.restarts += 1
        one.process, one.begun = self.start(one.group), self.elapsed()
        return False

    def _hangs(self, one: Running) -> bool:
        hang = one.group.hang * (4 if "PCOHERENCE_REHEARSAL" in self.environment else 1)
        if not one.group.checks or self.elapsed() - one.begun < hang:
            return False
        events = [e for e in journal.read(self.journal) if e["group"] == one.group.name]
        begun = [event["at"] for event in events if "begin" in event]
        if journal.unfinished(events, one.group.name) is None:
            return False
        return time.time() - begun[-1] > hang

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


def toolkit(dryrun: str) -> str | None:
    """The toolkit's folder, as `nvcc --dryrun` prints it."""
    top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
    return os.path.realpath(top[1].strip()) if top else None


def cuda_home() -> dict[str, str]:
    """CUDA_HOME where nothing says it: torch guesses from nvcc's path, which may be a wrapper's."""
    if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return {}
    command = ["nvcc", "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    try:
        found = toolkit(subprocess.run(command, capture_output=True, text=True).stderr)
    except OSError:  # no nvcc
        return {}
    return {"CUDA_HOME": found} if found else {}


def unpack(pack: Path, into: Path) -> list[str]:
    """Put what was built elsewhere where Python finds it; what there was."""
    modules = sorted(pack.glob("_C*.so")) if pack.is_dir() else []
    for module in modules:
        target = into / module.name
        if not target.exists() or target.read_bytes() != module.read_bytes():
            part = target.with_suffix(".part")  # a process may have mapped the old one
            shutil.copyfile(module, part)
            part.replace(target)
    return [module.name for module in modules]


def unpack_triton(pack: Path, into: Path) -> None:
    """Put Triton's compiled kernels into its cache; another Triton does not find them there."""
    archive = pack / "triton.tar.xz"
    if not archive.exists():
        return
    into.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as file:
        file.extractall(into, filter="data")
    # Triton keeps absolute paths.
    for group in into.glob("*/__grp__*.json"):
        content = json.loads(group.read_text())
        children = {name: str(group.parent / name) for name in content["child_paths"]}
        group.write_text(json.dumps({**content, "child_paths": children}))


def variables(output: Path, rehearse: bool) -> dict[str, str]:
    """The environment of every process."""
    found = {
        **os.environ,
        **cuda_home(),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PCOHERENCE_CUDA": "1",
        "PCOHERENCE_REMEMBERED": str(PACK if PACK.is_dir() else output / "truths"),
        # CUDA's compiler keeps what it makes of PTX, Triton of its kernels.
        "TRITON_CACHE_DIR": os.environ.get(
            "TRITON_CACHE_DIR", str(ROOT / ".benchmarks" / "triton")
        ),
    }
    if rehearse:
        found["PCOHERENCE_REHEARSAL"] = "1"
    return found


def fact(events: Sequence[Mapping[str, object]], name: str) -> str | None:
    """The last value of a fact."""
    found = [event["value"] for event in events if event.get("fact") == name]
    return str(found[-1]) if found else None


def stages(arguments: argparse.Namespace) -> Sequence[Stage]:
    """What was asked for."""
    if arguments.only:
        rest = [step for step in arguments.only if step != "environment"]
        share = 1 / max(1, len(rest))
        steps = [Stage((step,), 0.1 + 0.9 * share * (i + 1)) for i, step in enumerate(rest)]
        return [Stage(("environment",), 0.1), *steps]
    return FIRST if arguments.first else EVERYTHING


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("-k", default="", dest="expression", metavar="EXPRESSION")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--output", type=Path)
    found = parser.parse_args()
    if found.seconds is None:
        found.seconds = 170.0 if found.first else 400.0
    if found.output is None:
        here = ROOT / "benchmarks" / "results" / "gpu"
        found.output = Path(os.environ["OUT"]) if os.environ.get("OUT") else here
    return found


def start_build(runner: Runner, capability: str) -> None:
    """Build the extension in the background, for this device alone."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    group = Group(BUILD, command, {"TORCH_CUDA_ARCH_LIST": capability}, checks=False)
    runner.build = runner.start(group)


def results(output: Path) -> Iterator[Path]:
    """Files of an earlier run."""
    for name in ("journal.jsonl", "log.txt", "summary.txt", "time.png"):
        if (output / name).exists():
            yield output / name


def main() -> None:
    """Do all steps; the exit status says whether all succeeded."""
    begun = time.monotonic()
    arguments = parsed()
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for old in results(output):
        old.unlink()
    environment = variables(output, arguments.rehearse)
    packed = unpack(PACK, ROOT / "pcoherence")
    unpack_triton(PACK, Path(environment["TRITON_CACHE_DIR"]))
    runner = Runner(output, environment, begun, arguments.seconds)
    journal.write(
        runner.journal, "environment", fact="packed", value=", ".join(packed) or "nothing"
    )
    capability = "90"
    try:
        for stage in stages(arguments):
            plan = Plan(output, arguments.expression, capability)
            groups = [group for step in stage.steps for group in plan.groups(step)]
            runner.run(groups, stage.until * arguments.seconds)
            if "environment" in stage.steps:
                events = journal.read(runner.journal)
                said = fact(events, "capability") or "9.0"
                capability = said.replace(".", "")
                if fact(events, "cuda module") != "loaded":
                    start_build(runner, said)
    finally:
        if runner.build is not None:
            kill(runner.build)
        runner.refresh(True)
        events = journal.read(runner.journal)
        print(summary.text(events, runner.elapsed(), arguments.seconds, brief=True))
    sys.exit(int(not summary.succeeded(journal.read(runner.journal))))


if __name__ == "__main__":
    main()
