"""A way from this machine to a service inside the cluster: ``kubectl port-forward`` beside the command."""

import logging
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from finetune_cli.errors import CommandError

_log = logging.getLogger("finetune.portforward")
_AGAIN_SECONDS = 1.0
_STOP_SECONDS = 5.0
_READY = re.compile(rb"Forwarding from 127\.0\.0\.1:(\d+) ->")


@contextmanager
def forwarded(kubectl: Sequence[str], namespace: str, service: str, port: int) -> Iterator[int]:
    """The loopback port that leads to the service's while the block lasts; kubectl chooses a free one.

    kubectl ends when its pod does, in the middle of a download: it is then started anew on the same port. Raises
    CommandError with kubectl's own words if it does not get there at first.
    """
    program = shutil.which("kubectl")
    if program is None:
        raise CommandError(
            f"the store is the service {service} in the cluster, and kubectl, which leads there, is not on the PATH; "
            "or name another way with --store-endpoint"
        )
    target = [*kubectl, f"--namespace={namespace}", "port-forward", "--address=127.0.0.1", f"service/{service}"]
    # As it is now: kubectl may need the user's own AWS settings to log in, and the store's take their place later.
    environment = dict(os.environ)
    running = _start([program, *target, f":{port}"], environment)
    line = _first_line(running)
    if (found := _READY.search(line)) is None:
        running.kill()
        said = running.communicate()[1].decode(errors="replace").strip()
        raise CommandError(
            f"the store is the service {service} in the cluster's namespace {namespace}, and `kubectl port-forward` "
            f"does not get there: {said or line.decode(errors='replace') or 'it said nothing'}; "
            "--store-endpoint names another way"
        )
    here = int(found[1])
    keeper = _Keeper(running, lambda: _start([program, *target, f"{here}:{port}"], environment))
    try:
        yield here
    finally:
        keeper.stop()


def _start(command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    none, pipe = subprocess.DEVNULL, subprocess.PIPE
    return subprocess.Popen(command, stdin=none, stdout=pipe, stderr=pipe, env=environment)


def _first_line(process: "subprocess.Popen[bytes]") -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


class _Keeper:
    """Reads what kubectl says, so that it never waits for a full pipe, and starts it again when it ends."""

    def __init__(self, process: "subprocess.Popen[bytes]", again: "Callable[[], subprocess.Popen[bytes]]") -> None:
        self._process = process
        self._again = again
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="port-forward", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while True:
            _, said = self._process.communicate()
            if self._stopping.wait(_AGAIN_SECONDS):
                return
            _log.debug("kubectl port-forward ended: %s", said.decode(errors="replace").strip())
            with self._lock:
                if self._stopping.is_set():
                    return
                self._process = self._again()

    def stop(self) -> None:
        """End it; on return it is gone."""
        self._stopping.set()
        with self._lock:
            self._process.terminate()
        self._thread.join(_STOP_SECONDS)
        if self._thread.is_alive():
            self._process.kill()
            self._thread.join()
