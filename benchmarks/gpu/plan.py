"""What is run on a GPU machine, in which order, and for how long."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import journal
from benchmarks.gpu.groups import Group

FOUND = 9
"""Exit status of compute-sanitizer where it found errors: none that pytest has."""

SANITIZED_HANG = 120.0
"""Seconds as HANG, under compute-sanitizer, which slows kernels down a hundredfold."""


class Stage(NamedTuple):
    """Groups side by side, until a share of all seconds is over."""

    steps: Sequence[str]
    until: float


FIRST_SECONDS, EVERYTHING_SECONDS = 170.0, 400.0
"""With two starts of a machine, of 90 s each, less than 15 minutes: what a loan may last."""

ENVIRONMENT_GROUP = "environment"

USUAL_CAPABILITY = "9.0"
"""Of the GPUs at hand, where the environment had no time to say what there is."""

ENVIRONMENT_SHARE = 0.15
"""Share of the seconds in which the machine has to have said what it is."""

FIRST = (
    Stage(("compile", "rows", "values", "modes"), 0.5),
    Stage(("speed cuda",), 0.67),
    Stage(("speed triton",), 0.83),
    Stage(("memcheck",), 1.0),
)
"""Seconds 0 to 25 of 170, to 85, to 114, to 141, and the rest; a stage that is done ends early."""

EVERYTHING = (
    Stage(("compile", "rows", "small", "tests"), 0.4),
    Stage(("speed cuda",), 0.49),
    Stage(("choices",), 0.58),
    Stage(("speed triton",), 0.67),
    Stage(("large",), 0.72),
    Stage(("compiled",), 0.82),
    Stage(("picture",), 0.84),
    Stage(("memcheck", "racecheck"), 1.0),
)

SHARDS = 12
"""Processes for all tests. Each holds a CUDA context, of about half a GiB, and a core."""

SMALL_SHARDS = 4
"""Processes for Triton's small batches, beside those: the pack has kernels of a few calls, these
tests mix options, so that nearly each of them compiles one, or several.
"""

COMPILING_HANG = 120.0
"""Seconds as HANG, of a test that compiles half a dozen such kernels, each of 10 s and more."""


class Plan:
    """The steps, and the groups of each."""

    def __init__(self, output: Path, expression: str, capability: str) -> None:
        self.journal = output / journal.FILE
        self._expression = expression
        self._capability = capability

    def groups(self, step: str) -> list[Group]:
        """What a step runs."""
        found: dict[str, Callable[[], list[Group]]] = {
            "environment": self._environment,
            "compile": self._compile,
            "rows": self._rows,
            "small": self._small,
            "values": lambda: self._of_gpu("values", "test_values"),
            "modes": lambda: self._of_gpu("modes", "test_mode"),
            "tests": self._tests,
            "speed cuda": lambda: [self._figures("cuda", "speed", "accuracy")],
            "speed triton": lambda: [self._figures("triton", "speed", "accuracy")],
            "choices": lambda: [self._figures("cuda", "choices")],
            "large": lambda: [self._figures(name, "large") for name in ("cuda", "triton")],
            "compiled": lambda: [self._figures("cuda", "compiled")],
            "picture": self._picture,
            "memcheck": lambda: self._sanitizer("memcheck", ["--report-api-errors", "no"]),
            "racecheck": lambda: self._sanitizer("racecheck", []),
        }
        return found[step]()

    def _environment(self) -> list[Group]:
        module = [sys.executable, "-m", "benchmarks.gpu.environment"]
        return [Group(ENVIRONMENT_GROUP, [*module, "--journal", str(self.journal)])]

    def _compile(self) -> list[Group]:
        """Triton's kernels into its cache, by all cores, before anybody needs them one by one."""
        command = [sys.executable, "-m", "benchmarks.gpu.offline", self._capability, "--all"]
        return [Group("compile triton", command, {"TRITON_INTERPRET": "0"})]

    def _pytest(
        self,
        name: str,
        file: str,
        expression: str = "",
        shard: tuple[int, int] = (0, 1),
        needs_build: bool = False,
        blocking: bool = True,
    ) -> Group:
        command = [sys.executable, "-m", "pytest", f"tests/{file}", "-p", "benchmarks.gpu.journal"]
        # Not the project's addopts: with -q a run that is cut off leaves nothing but dots.
        command += ["-o", "addopts=", "--strict-markers", "-v", "--tb=short"]
        command += ["-p", "no:cacheprovider"]
        command += ["--journal", str(self.journal), "--group", name]
        command += ["--shard", f"{shard[0]}/{shard[1]}"]
        wanted = " and ".join(f"({part})" for part in (expression, self._expression) if part)
        if wanted:
            command += ["-k", wanted]
        # A launch that fails is then reported by the test that launched it; but streams that do
        # not wait for each other cannot be seen.
        waits = {"CUDA_LAUNCH_BLOCKING": "1"}
        return Group(
            name,
            command,
            variables=waits if blocking else {},
            again=waits,
            checks=True,
            needs_build=needs_build,
            tells=True,
        )

    def _rows(self) -> list[Group]:
        """Every kernel alone, but for Triton's of small batches."""
        triton = [self._pytest(f"triton rows {i}", "test_triton.py", "", (i, 2)) for i in (0, 1)]
        return [self._pytest("cuda rows", "test_cuda_rows.py", needs_build=True), *triton]

    def _small(self) -> list[Group]:
        """Those: what they do with default options, "values" and "modes" see first."""
        groups = [
            self._pytest(f"triton small {i}", "test_triton_small.py", "", (i, SMALL_SHARDS))
            for i in range(SMALL_SHARDS)
        ]
        return [group._replace(hang=COMPILING_HANG) for group in groups]

    def _of_gpu(self, name: str, tests: str) -> list[Group]:
        """Tests of test_gpu.py whose names begin so, by backend."""
        return [
            self._pytest(
                f"{backend} {name}",
                "test_gpu.py",
                f"{tests} and [{backend}",
                needs_build=backend == "cuda",
                blocking=name != "modes",
            )
            for backend in ("cuda", "triton")
        ]

    def _tests(self) -> list[Group]:
        """All of test_gpu.py."""
        half = SHARDS // 2
        return [
            self._pytest(
                f"{backend} tests {i}",
                "test_gpu.py",
                of_backend,
                (i, half),
                needs_build=backend == "cuda",
                blocking=False,
            )
            for backend, of_backend in (("cuda", "not [triton"), ("triton", "[triton"))
            for i in range(half)
        ]

    def _figures(self, backend: str, *parts: str) -> Group:
        name = f"{parts[0]} {backend}"
        command = [sys.executable, "-m", "benchmarks.gpu.figures", "--journal", str(self.journal)]
        command += ["--group", name, "--backend", backend, "--part", *parts]
        return Group(name, command, needs_build=backend == "cuda", tells=True)

    def _picture(self) -> list[Group]:
        command = [sys.executable, "-m", "benchmarks.gpu.picture", str(self.journal)]
        command += [str(self.journal.with_name("time.png"))]
        return [Group("picture", command)]

    def _sanitizer(self, tool: str, options: list[str]) -> list[Group]:
        """The tests that are for it, under a tool of compute-sanitizer."""
        tests = "test_small_for_the_sanitizer and [cuda"
        group = self._pytest(f"{tool} cuda", "test_gpu.py", tests, needs_build=True)
        missing = shutil.which("compute-sanitizer") is None
        sanitizer = ["compute-sanitizer", "--tool", tool, *options]
        sanitizer += ["--error-exitcode", str(FOUND)]
        return [
            group._replace(
                command=[*sanitizer, *group.command],
                # In torch's cache, an access out of bounds would hit another tensor unseen.
                variables={**group.variables, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                hang=SANITIZED_HANG,
                missing="there is no compute-sanitizer" if missing else None,
                statuses={FOUND: f"{tool} found errors, see log.txt"},
            )
        ]


STEPS = tuple(dict.fromkeys(step for stage in (*FIRST, *EVERYTHING) for step in stage.steps))
"""All but the environment, which is always asked."""
