"""A stage as a process of this machine, such that none is ever lost.

The process holds a file lock for as long as it, or any process that it forked, lives, and writes its process id into
that file before anything else. So whoever comes later, a runner after a crash too, can tell without doubt whether a
stage still runs, and may signal it: as long as the lock is held the process id, or at least its group, is its own.
Should the runner die, the kernel sends the stage SIGTERM, upon which it saves and ends.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded before any fork: nothing may be imported between fork and exec
_POLL_SECONDS = 0.02


class Running:
    """A stage that this process started. Use it from the thread that started it, which must outlive it: the kernel
    counts the end of that thread as the end of the parent."""

    def __init__(self, command: Sequence[str], *, lock: Path, log: Path, environment: Mapping[str, str]) -> None:
        """Start the command in a session of its own, its output going to ``log``."""
        lock.parent.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

        def before_exec() -> None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            os.write(descriptor, str(os.getpid()).encode())
            if os.getppid() != parent:  # it died before the line above the last
                os._exit(128 + signal.SIGTERM)

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    start_new_session=True,
                    pass_fds=(descriptor,),
                    preexec_fn=before_exec,
                )
        finally:
            os.close(descriptor)

    def wait(self, seconds: float) -> int | None:
        """Its exit code if it ends within that time (128 + signal when one killed it), else None.

        The signals that come meanwhile cut the wait short by nothing more than a poll. Processes that the stage left
        behind in its group are killed.
        """
        deadline = time.monotonic() + seconds
        while os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_SECONDS)
        self.kill()  # not yet reaped, so the group's number cannot belong to another
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def terminate(self) -> None:
        """Ask it to save and end. Only the first process is told: it tells its own."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and all processes of its group at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def survivor(lock: Path) -> int | None:
    """The process id of a stage that an earlier runner started and that still lives, else None."""
    try:
        with lock.open("rb+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0)
    except FileNotFoundError:
        pass
    return None


def await_survivor(lock: Path, seconds: float) -> None:
    """Wait until a stage of an earlier runner has saved and ended; after ``seconds`` kill it."""
    deadline = time.monotonic() + seconds
    while survivor(lock) is not None and time.monotonic() < deadline:  # the kernel has sent it SIGTERM
        time.sleep(_POLL_SECONDS)
    if pid := survivor(lock):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        while survivor(lock) is not None:
            time.sleep(_POLL_SECONDS)
