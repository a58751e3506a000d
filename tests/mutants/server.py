"""Test runs in forks of one process that has loaded what takes long to load.

    python server.py FOLDER

runs pytest in a copy of the checkout for every line of JSON that it reads, and answers with the
exit status: negative where a signal ended it, null where it took too long.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

LOADED = ("torch", "numpy", "scipy.stats", "hypothesis", "pytest")
"""What most tests import and no slip is in; it takes longer than most tests.

Nothing that loads Triton: tests/conftest.py says before whether it interprets.
"""


PARENT = os.getppid()
"""When it is gone, so is what it has asked for."""


def attempt(
    answers: Any, arguments: list[str], environment: dict[str, str], log: str, limit: float
) -> Any:
    child = os.fork()
    if child == 0:
        os.close(answers.fileno())  # its end is seen when this process ends
        work(arguments, environment, log)
    os.setpgid(child, child)
    end = time.monotonic() + limit
    try:
        while time.monotonic() < end and os.getppid() == PARENT:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                child = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        return None
    finally:  # also where this process is told to end
        if child != 0:
            os.killpg(child, signal.SIGKILL)  # it and its process group
            os.waitpid(child, 0)


def work(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """The child's part; does not return."""
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update(environment)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(target, stream)
        code = int(importlib.import_module("pytest").main(arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    folder = sys.argv[1]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.chdir(folder)
    sys.path[0] = folder  # as `python -m pytest` has it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is imported may print
    for name in LOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(attempt(answers, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
