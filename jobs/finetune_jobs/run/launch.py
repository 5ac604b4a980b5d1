"""Several processes of one stage, one for each GPU of this node, and on as many nodes as the operator says.

Ours and not torchrun, which turns every exit code into 1: the exit code is our contract with the operator.
"""

import ctypes
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.pipeline import TRAINING, kind
from finetune_api.stage import StageRun, Termination
from finetune_jobs.run.errors import ConfigurationError, PeerLostError, PreemptedError
from finetune_jobs.run.lifecycle import termination_path, write_termination
from finetune_jobs.run.preemption import SIGNALS, Stop

_log = logging.getLogger("finetune.launch")
LAST_WORDS_SECONDS = 10.0
"""How long the other workers have, once one failed, to end by themselves and say why."""
_WAIT_SECONDS = 1.0
"""Between two tries to reach the first node."""
_ENDED_WELL = (0, PreemptedError.exit_code)
_PR_SET_PDEATHSIG = 1


def processes(run: StageRun, environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> int:
    """One process for each GPU that the stage asks for and this machine has; FINETUNE_PROCESSES overrides."""
    if kind(run.spec, run.stage) not in TRAINING:
        return 1
    if wished := environment.get("FINETUNE_PROCESSES"):
        if not wished.isdecimal() or int(wished) < 1:
            raise ConfigurationError(f"FINETUNE_PROCESSES: must be a number from 1, got {wished!r}")
        return int(wished)
    asked = next(s.resources.gpus for s in run.spec.pipeline if s.name == run.stage)
    # Counted without torch: importing it here would take seconds from every stage.
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        here = len([device for device in visible.split(",") if device.strip() and device.strip() != "-1"])
    else:
        here = sum(1 for device in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", device.name))
    if here < asked:
        if _nodes(environment) > 1:
            raise ConfigurationError(f"resources.gpus: {asked} GPUs of each node were asked for, this one has {here}")
        # Legal: the number of GPUs changes speed, never what is learned.
        _log.warning("%d GPUs asked for, %d here: training with %s", asked, here, here or "the CPU")
    return max(1, min(asked, here))


@dataclass(frozen=True)
class Place:
    """This node among those of the stage, and where all processes meet."""

    nodes: int
    index: int
    host: str
    """Of the first node, as this one reaches it."""
    port: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Place":
        """As the operator says in the pod's environment (``plan/pods.py``); alone on this machine otherwise."""
        if (nodes := _nodes(environment)) == 1:
            with socket.socket() as free:  # should another process be faster than rank 0, this attempt fails and counts
                free.bind(("127.0.0.1", 0))
                return cls(1, 0, "127.0.0.1", free.getsockname()[1])
        index = int(environment["JOB_COMPLETION_INDEX"])
        host, _, port = environment["FINETUNE_RENDEZVOUS"].rpartition(":")
        return cls(nodes, index, host if index else "127.0.0.1", int(port))


def _nodes(environment: Mapping[str, str]) -> int:
    return int(environment.get("FINETUNE_NODES", "1"))


def needed(n: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether there are several processes, ``n`` of them here, and this one is not yet one of them."""
    return "RANK" not in environment and n * _nodes(environment) > 1


def run(stage_json: Path, n: int, stop: Stop) -> int:
    """Run the stage as ``n`` workers here and return the exit code of the stage; a stop is passed on to all of them.

    0 if all ended well, 75 if all saved and stopped, else the code of the worker that failed first for a reason of its
    own; 76 if a worker was killed. No worker outlives this process, however it dies. The message is that of the first
    node where all ends well.
    """
    place = Place.of(os.environ)
    scratch = Path(tempfile.mkdtemp(prefix="finetune-launch-"))
    command = [sys.executable, "-m", "finetune_jobs", str(stage_json)]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        _await_first(place, stop)
        for rank in range(n):
            environment = _environment(os.environ, rank, n, place, scratch)
            workers.append(subprocess.Popen(command, env=environment, preexec_fn=_before_exec(os.getpid())))
        code, chosen = _outcome(_codes(workers, stop), told=stop.requested)
        if (message := termination_path()) is not None and not (code == 0 and place.index > 0):
            who = f"worker {chosen} of {n}" + (f" on node {place.index} of {place.nodes}" if place.nodes > 1 else "")
            _write_words(scratch / f"termination-{chosen}", message, who, workers[chosen].returncode)
        return code
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def _await_first(place: Place, stop: Stop) -> None:
    """Wait until the first node answers: it may still be pulling its image, or have no place to run yet."""
    if place.index == 0:
        return
    began = said = time.monotonic()
    while True:
        stop.check()
        try:
            socket.create_connection((place.host, place.port), timeout=5).close()
        except OSError as error:
            if time.monotonic() - said >= 30:
                said = time.monotonic()
                _log.info("waiting for %s:%d since %d s: %s", place.host, place.port, said - began, error)
            time.sleep(_WAIT_SECONDS)
        else:
            return


def _environment(own: Mapping[str, str], rank: int, n: int, place: Place, scratch: Path) -> dict[str, str]:
    """Of the worker with that local rank."""
    cores = len(os.sched_getaffinity(0))
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // n)),
        "OMP_WAIT_POLICY": "passive",  # threads that spin take the cores from the other workers
        **own,
        "RANK": str(place.index * n + rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(place.nodes * n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": place.host,
        "MASTER_PORT": str(place.port),
        # Each its own: only one of the messages becomes the stage's.
        "FINETUNE_TERMINATION_LOG": str(scratch / f"termination-{rank}"),
    }
    if rank > 0 or place.index > 0:
        environment.pop("FINETUNE_PROGRESS_FILE", None)
    return environment


def _before_exec(parent: int) -> Callable[[], None]:
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        # Until the worker has its handler a stop must wait, not kill; `preemption.install` lets it through.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(PeerLostError.exit_code)

    return prepare


def _codes(workers: Sequence[subprocess.Popen[bytes]], stop: Stop) -> dict[int, int]:
    """Wait for all; exit codes by rank in the order of ending. After a failure the others have seconds to end."""
    ended: dict[int, int] = {}
    told = False
    deadline: float | None = None
    while len(ended) < len(workers):
        if stop.requested and not told:
            told = True
            for worker in workers:
                worker.terminate()
        for rank, worker in enumerate(workers):
            if rank not in ended and (code := worker.poll()) is not None:
                ended[rank] = code
                if code not in _ENDED_WELL and deadline is None:
                    _log.error("worker %d ended with %d", rank, code)
                    deadline = time.monotonic() + LAST_WORDS_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for rank, worker in enumerate(workers):
                if rank not in ended:
                    worker.kill()  # most likely waits for the dead one inside a collective operation
                    worker.wait()
                    ended[rank] = PeerLostError.exit_code
        time.sleep(0.05)
    return ended


def _outcome(codes: Mapping[int, int], *, told: bool) -> tuple[int, int]:
    """The stage's exit code, and the worker whose message tells why. ``told``: all were told to stop."""
    reasons = [
        (code, rank) for rank, code in codes.items() if code > 0 and code not in (*_ENDED_WELL, PeerLostError.exit_code)
    ]
    if reasons:
        return reasons[0]
    saved = [rank for rank, code in codes.items() if code == PreemptedError.exit_code]
    if told and saved:  # before the training began, the first to obey is the lost peer of the others
        return PreemptedError.exit_code, saved[0]
    killed = [rank for rank, code in codes.items() if code < 0]
    lost = [rank for rank, code in codes.items() if code == PeerLostError.exit_code]
    if killed or lost:
        return PeerLostError.exit_code, (killed or lost)[0]
    return (PreemptedError.exit_code, saved[0]) if saved else (0, 0)


def _write_words(left: Path, message: Path, who: str, code: int) -> None:
    if left.exists():
        shutil.copyfile(left, message)
    else:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with {code} without a word"
        write_termination(Termination(error=f"{who} {how}; killed by 9 usually means: out of memory"), message)
