"""Operators as processes of their own that start at once: forked from one that has imported everything.

As a program it is that one: each line of its input is a JSON object of environment variables, for which it starts an
operator and prints the process's number. SIGKILL hits such an operator as it hits any other.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune_operator.__main__ import main


class Operators:
    """Starts and kills them, one after the other."""

    def __init__(self, parent: subprocess.Popen[str]) -> None:
        self._parent = parent

    def start(self, environment: dict[str, str]) -> int:
        """The process's number."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        print(json.dumps(environment), file=self._parent.stdin, flush=True)
        return int(self._parent.stdout.readline())

    def kill(self, pid: int) -> None:
        """SIGKILL; returns once it is no more."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            while True:
                os.kill(pid, 0)
                time.sleep(0.001)


@contextmanager
def operators(log: Path) -> Iterator[Operators]:
    """What they say goes to that file; none outlives this."""
    command = [sys.executable, "-m", "tests.engine.operators"]
    with log.open("ab") as file:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file}
        parent = subprocess.Popen(command, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]
    try:
        yield Operators(parent)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()


def serve() -> None:
    """Fork an operator for each line."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps them
    for line in sys.stdin:
        if pid := os.fork():
            print(pid, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        os.environ.update(json.loads(line))
        sys.exit(main())


if __name__ == "__main__":
    serve()
