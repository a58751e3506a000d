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
from typing import Any

LOADED = ("torch", "numpy", "scipy.stats", "hypothesis", "pytest")
"""What most tests import and no slip is in; it takes longer than most tests.

Nothing that loads Triton: tests/conftest.py says before whether it interprets.
"""


def attempt(arguments: list[str], environment: dict[str, str], log: str, limit: float) -> Any:
    child = os.fork()
    if child == 0:
        work(arguments, environment, log)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)  # it and what it has started
    os.waitpid(child, 0)
    return None


def work(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """The child's part; does not return."""
    code = 1
    try:
        os.setsid()
        os.environ.update(environment)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(target, stream)
        code = int(importlib.import_module("pytest").main(arguments))
        sys.stdout.flush()
    finally:
        os._exit(code)


def main() -> None:
    folder = sys.argv[1]
    os.chdir(folder)
    sys.path[0] = folder  # as `python -m pytest` has it
    sys.dont_write_bytecode = True  # or a slip of the same size within a second is not seen
    for name in LOADED:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")  # what is imported may print
    for line in sys.stdin:
        print(json.dumps(attempt(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
