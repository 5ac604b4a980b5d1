"""The processes of a cluster: each carries its cluster's directory in its environment, so that none is ever lost.

The process table is the record: it also holds what a crashed test left behind, and never names a stranger.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "FINETUNEJOB_CLUSTER"
OWNER = "FINETUNEJOB_CLUSTER_OWNER"
"""The process that the cluster shall not outlive; ``0`` for a cluster that a person started."""


def start(directory: Path, name: str, command: list[str], owner: int) -> int:
    """Start a daemon of the cluster in ``directory``, its output in ``logs/<name>.log``; returns its process id."""
    logs = directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # users' often lacks the directories of administration
    marked = {**os.environ, "PATH": path, MARK: str(directory), OWNER: str(owner)}
    with (logs / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=directory, env=marked, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    (logs / f"{name}.pid").write_text(str(process.pid))
    # Nobody waits for it here: it may outlive this process, and ``kill`` reaps it if it does not.
    process.returncode = 0
    # For a moment after exec the kernel shows no environment yet, and the process would look like a stranger.
    while MARK not in _environment(process.pid) and _runs(process.pid):
        time.sleep(0.001)
    return process.pid


def of(directory: Path) -> list[int]:
    """Every process of that cluster that still runs, whoever started it."""
    return [pid for pid, environment in _marked() if environment[MARK] == str(directory)]


def started(directory: Path, name: str) -> int | None:
    """The process id of a daemon of that cluster, if it still runs."""
    path = directory / "logs" / f"{name}.pid"
    pid = int(path.read_text()) if path.exists() else 0
    return pid if _environment(pid).get(MARK) == str(directory) else None


def children(pid: int) -> list[int]:
    """The processes that this one started and that still run."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def clusters(*, orphaned: bool = False) -> list[Path]:
    """The directories of all clusters with processes on this machine, or of those whose test run is gone."""
    found = set()
    for _, environment in _marked():
        owner = int(environment.get(OWNER, "0"))
        if not orphaned or (owner and not Path(f"/proc/{owner}").exists()):
            found.add(Path(environment[MARK]))
    return sorted(found)


def kill(pids: list[int], number: signal.Signals = signal.SIGKILL, seconds: float = 30) -> None:
    """Send them the signal and wait until all are gone.

    Raises:
        TimeoutError: some are still there after so many seconds.
    """
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if _runs(pid)]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"still running after {number.name}: {left}")
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # a child of ours stays in the table until it is reaped
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def _marked() -> Iterator[tuple[int, dict[str, str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and MARK in (environment := _environment(int(entry.name))):
            yield int(entry.name), environment


def _environment(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:  # gone, or another user's
        return {}
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)
