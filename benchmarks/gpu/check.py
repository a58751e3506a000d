"""One command for a GPU machine: check that the kernels are right, and measure.

    make gpu-check [GPU_ARGS="..."]         (or python3 -m benchmarks.gpu.check ...)

Needs no network; that machine's own Python (3.11 or newer), torch, triton, numpy, scipy,
hypothesis, pytest, rich and matplotlib are used, and nothing is installed. What `make gpu-pack`
built elsewhere is used where it fits the sources and the device; otherwise the libraries are built
in the background, with nvcc, g++, ninja and setuptools, and CUDA's checks begin when they are
there.

Results go to the folder that --output or OUT names, otherwise to benchmarks/results/gpu; those of
an earlier run are kept as *.previous. journal.jsonl is a line for each event as it happens;
summary.txt is rewritten every second; log.txt has all that was printed; time.png the figures.
PCOHERENCE_COMMIT says which commit this is, for copies without .git. The exit status is 0 where
all groups are ok.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.gpu import journal, modules, plan, summary
from benchmarks.gpu.groups import ROOT, Build, Group, Runner
from benchmarks.gpu.plan import Plan, Stage

REHEARSAL_PATIENCE = 4.0
"""In a rehearsal a few cores do what a device and many do there."""


def variables(rehearse: bool) -> dict[str, str]:
    """The environment of every process."""
    kept = ROOT / ".benchmarks"
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PCOHERENCE_CUDA": "1",
        "PCOHERENCE_REHEARSAL": "1" if rehearse else "0",
        "PCOHERENCE_REMEMBERED": str(modules.PACK if modules.PACK.is_dir() else kept / "truths"),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR") or str(kept / "triton"),
    }


def fact(events: Sequence[Mapping[str, object]], name: str) -> str | None:
    """The last value of a fact."""
    found = [event["value"] for event in events if event.get("fact") == name]
    return str(found[-1]) if found else None


def stages(arguments: argparse.Namespace) -> Sequence[Stage]:
    """What was asked for, without the environment; steps that were named share the time."""
    if not arguments.only:
        return plan.FIRST if arguments.first else plan.EVERYTHING
    share = (1 - plan.ENVIRONMENT_SHARE) / len(arguments.only)
    return [
        Stage((step,), plan.ENVIRONMENT_SHARE + share * (i + 1))
        for i, step in enumerate(arguments.only)
    ]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--first",
        action="store_true",
        help="the most telling first, in 170 s, useful when cut off at any second; "
        "otherwise everything, in 400 s",
    )
    which.add_argument(
        "--only",
        nargs="+",
        choices=plan.STEPS,
        metavar="STEP",
        help="some steps alone: " + ", ".join(f'"{step}"' for step in plan.STEPS),
    )
    parser.add_argument(
        "-k", default="", dest="expression", metavar="EXPRESSION", help="of pytest, for its tests"
    )
    parser.add_argument("--seconds", type=float, help="for all of it")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="the CPU plays the device, to check the checks; results go to .benchmarks/rehearsal",
    )
    found = parser.parse_args()
    if found.seconds is None:
        found.seconds = plan.FIRST_SECONDS if found.first else plan.EVERYTHING_SECONDS
    if found.output is None:
        usual = ".benchmarks/rehearsal" if found.rehearse else "benchmarks/results/gpu"
        found.output = Path(os.environ.get("OUT") or ROOT / usual)
    return found


def keep_earlier(output: Path) -> None:
    """Rename the results of an earlier run."""
    for name in (journal.FILE, "log.txt", "summary.txt", "time.png"):
        if (output / name).exists():
            (output / name).replace(output / f"{name}.previous")


def start_build(runner: Runner, capability: str) -> Build:
    """Build the libraries in the background, for this device alone, beside those in use."""
    folder = ROOT / ".benchmarks" / "build"
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder)]
    command += ["--build-temp", str(folder / "objects")]
    group = Group("build", command, {"TORCH_CUDA_ARCH_LIST": capability})
    package = ROOT / "pcoherence"
    return Build(runner.start(group), lambda: modules.install(folder / "pcoherence", package))


def wants_build(events: Sequence[Mapping[str, object]], unfit: str | None) -> str | None:
    """Why the libraries have to be built here; None: those in the pack will do."""
    if unfit is not None:
        return unfit
    said = modules.manifest(modules.PACK)["capability"]
    has = str(fact(events, "capability") or said).replace(".", "")
    if said != has:
        return f"{modules.PACK.name} is for {said}, the device has {has}"
    for name in (modules.CPU_FACT, modules.CUDA_FACT):
        found = fact(events, name)  # None: there was no time to try
        if found not in (modules.LOADED, None):
            return f"{name}: {found}"
    return None


def attempted(step: Callable[[], str | None]) -> str | None:
    """Why a step could not be done; that it failed is a reason, and not the end."""
    try:
        return step()
    except Exception as error:  # a pack that arrived broken, a folder that cannot be written
        return " ".join(repr(error).split())[: journal.MESSAGE]


def run(arguments: argparse.Namespace, runner: Runner) -> None:
    """The environment, what the libraries need, and all stages."""
    output, cache = runner.output, Path(runner.environment["TRITON_CACHE_DIR"])

    def write(**event: object) -> None:
        journal.write(runner.journal, plan.ENVIRONMENT_GROUP, **event)

    unfit = attempted(lambda: modules.use(modules.PACK, ROOT / "pcoherence"))
    write(fact="pack", value=unfit or "used")
    failed = attempted(lambda: modules.install_triton(modules.PACK, cache))
    if failed is not None:
        write(fact="Triton's cache", value=failed)
    first = Plan(output, arguments.expression, "")
    runner.run(first.groups("environment"), plan.ENVIRONMENT_SHARE * arguments.seconds)
    events, _ = journal.read(runner.journal)
    capability = fact(events, "capability")
    if capability is None:
        if any(event.get("status") for event in events):
            write(missing="no device that torch can use: see log.txt")
            return
        capability = plan.USUAL_CAPABILITY  # it was cut off before it could say
    why_build = None if arguments.rehearse else wants_build(events, unfit)
    if why_build is not None:
        write(fact="built here", value=why_build)
        runner.build = start_build(runner, capability)
        runner.build.for_all = fact(events, modules.CPU_FACT) != modules.LOADED
    steps = Plan(output, arguments.expression, capability.replace(".", ""))
    for stage in stages(arguments):
        groups = [group for step in stage.steps for group in steps.groups(step)]
        runner.run(groups, stage.until * arguments.seconds)


def main() -> None:
    """Do all steps; the exit status says whether all succeeded."""
    begun = time.monotonic()
    arguments = parsed()
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    keep_earlier(output)
    os.environ.update(modules.cuda_home())
    # The toolkit's other tools lie beside nvcc, which may be on PATH by a link.
    os.environ["PATH"] += os.pathsep + str(Path(modules.toolkit_folder(), "bin"))
    patience = REHEARSAL_PATIENCE if arguments.rehearse else 1.0
    runner = Runner(output, variables(arguments.rehearse), begun, arguments.seconds, patience)
    for signal_number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, lambda number, _: sys.exit(128 + number))
    try:
        run(arguments, runner)
    finally:
        runner.end()
        found = journal.read(runner.journal)
        print(summary.text(found, runner.elapsed(), arguments.seconds, brief=True))
    sys.exit(int(not summary.succeeded(found[0])))


if __name__ == "__main__":
    main()
