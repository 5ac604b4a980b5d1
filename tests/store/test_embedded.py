import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_api.types import Storage
from finetune_cli import embedded
from finetune_cli.access import opened
from finetune_cli.embedded import EmbeddedStore
from finetune_jobs.run.errors import StorageError
from finetune_jobs.store.client import Store

HOLDER = """
import sys
from pathlib import Path
from finetune_cli.embedded import EmbeddedStore
with EmbeddedStore(Path(sys.argv[1]), "bucket-of-another") as store:
    print(store.endpoint, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A ``$FINETUNE_HOME`` of the test's own."""
    return tmp_path / "home"


def holder(home: Path) -> subprocess.Popen[str]:
    """Another run that uses the store until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    return process


def server(home: Path) -> int | None:
    """The process that serves this home."""
    found = embedded._find(home / "store")
    return found[0] if found else None


def connect(store: EmbeddedStore, bucket: str) -> Store:
    """A client."""
    return Store(
        bucket=bucket,
        endpoint=store.endpoint,
        access_key=store.access_key,
        secret_key=store.secret_key,
        retry_seconds=5,
    )


def listening(process: int) -> set[str]:
    """The addresses at which a process listens, in the kernel's hexadecimal."""
    sockets = set()
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        target = os.readlink(descriptor)
        if target.startswith("socket:["):
            sockets.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in sockets:
                found.add(words[1].partition(":")[0])
    return found


def test_life_of_a_server(home: Path) -> None:
    """It answers on loopback only, with credentials of its own, keeps the data from one run to the next, and stops."""
    with EmbeddedStore(home, "one") as store:
        process = server(home)
        assert process is not None
        assert listening(process) == {"0100007F"}
        # Ctrl-C goes to the terminal's foreground session: not this one.
        assert os.getsid(process) == process != os.getsid(0)
        environment = dict(
            item.split("=", 1) for item in Path(f"/proc/{process}/environ").read_text().split("\0") if item
        )
        assert environment["HOME"] == str(home / "store")
        assert b"-master.telemetry=false" in Path(f"/proc/{process}/cmdline").read_bytes()
        assert store.environment() == {
            "AWS_ACCESS_KEY_ID": store.access_key,
            "AWS_SECRET_ACCESS_KEY": store.secret_key,
            "AWS_SESSION_TOKEN": "",
        }
        secret = home / "store" / "credentials"
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        assert stat.S_IMODE((home / "store").stat().st_mode) == 0o700
        connect(store, "one").put_bytes("key", b"kept")
    assert server(home) is None
    with EmbeddedStore(home, "two") as again:
        assert (again.access_key, again.secret_key, again.endpoint) == (
            store.access_key,
            store.secret_key,
            store.endpoint,
        )
        assert connect(again, "one").get_bytes("key") == b"kept"
        connect(again, "two").put_bytes("key", b"other")
        os.kill(server(home) or 0, signal.SIGKILL)
    with EmbeddedStore(home, "two") as third:
        assert connect(third, "two").get_bytes("key") == b"other"
    assert server(home) is None


def test_runs_share_a_server(home: Path) -> None:
    """Runs at once use one server: who leaves, fails or is killed leaves it to the others; the last one stops it."""
    with EmbeddedStore(home, "one") as store:
        process = server(home)
        other = holder(home)
        assert server(home) == process
        other.communicate("")
        assert other.returncode == 0
        assert server(home) == process
        with EmbeddedStore(home, "one"):
            assert server(home) == process
        with pytest.raises(StorageError, match="CreateBucket"), EmbeddedStore(home, "NOT A BUCKET"):
            pass
        killed = holder(home)
        killed.kill()
        killed.communicate()
        assert server(home) == process
        connect(store, "one").put_bytes("key", b"1")
        last = holder(home)
    assert server(home) == process
    last.communicate("")
    assert server(home) is None


def test_killed_run_leaves_no_claim(home: Path) -> None:
    """A run that was killed does not keep the server alive for ever: the next run takes it over, and stops it."""
    killed = holder(home)
    process = server(home)
    assert process is not None
    killed.kill()
    killed.communicate()
    assert server(home) == process  # nobody was left to stop it
    with EmbeddedStore(home, "one") as store:
        assert server(home) == process
        connect(store, "one").put_bytes("key", b"1")
    assert server(home) is None


def test_server_that_is_killed_is_revived(home: Path) -> None:
    """The access that a run holds starts a killed server anew, at the same address and with its data."""
    with opened(Storage(bucket="bucket-of-another"), home) as access:
        store = EmbeddedStore(home, "bucket-of-another")
        with store:
            connect(store, "bucket-of-another").put_bytes("key", b"kept")
        killed = server(home)
        access.revive()
        assert server(home) == killed
        os.kill(killed or 0, signal.SIGKILL)
        os.waitpid(killed or 0, 0)
        access.revive()
        assert server(home) not in (None, killed)
        assert access.storage.endpoint == store.endpoint
        assert connect(store, "bucket-of-another").get_bytes("key") == b"kept"
    assert server(home) is None


def test_server_that_cannot_be_revived_in_place(home: Path) -> None:
    """Where another program has taken the address meanwhile, the run is told, for its stages know only the old one."""
    with EmbeddedStore(home, "one") as store:
        process = server(home)
        os.kill(process or 0, signal.SIGKILL)
        os.waitpid(process or 0, 0)
        port = int(store.endpoint.rpartition(":")[2])
        with (
            socket.create_server(("127.0.0.1", port)),
            pytest.raises(StorageError, match=f"its address {store.endpoint} is taken"),
        ):
            store.revive()


def test_runs_that_start_at_once(home: Path) -> None:
    """Two runs that start at the same moment get one server."""
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    endpoints = {process.stdout.readline() for process in holders if process.stdout}
    assert len(endpoints) == 1
    assert server(home) is not None
    for process in holders:
        process.communicate("")
    assert [process.returncode for process in holders] == [0, 0]
    assert server(home) is None


def test_server_that_hangs_is_replaced(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is there but does not answer, stopped by a debugger, say, is started anew with its data."""
    orphan = holder(home)
    orphan.kill()
    orphan.communicate()
    hung = server(home)
    assert hung is not None
    os.kill(hung, signal.SIGSTOP)
    monkeypatch.setattr(embedded, "_HUNG_SECONDS", 1.5)
    monkeypatch.setattr(embedded, "_STOP_SECONDS", 0.5)
    monkeypatch.setattr(embedded, "_ANSWER_SECONDS", 1.0)
    with EmbeddedStore(home, "one") as store:
        assert server(home) not in (None, hung)
        connect(store, "bucket-of-another").put_bytes("key", b"1")


def test_taken_ports_are_left_alone(home: Path) -> None:
    """When the port of last time is taken by another program, others are used."""
    with EmbeddedStore(home, "one") as store:
        port = int(store.endpoint.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)), EmbeddedStore(home, "one") as store:
        assert not store.endpoint.endswith(f":{port}")


def test_server_that_cannot_start(home: Path) -> None:
    """When the server does not come up, its own last words are in the error, and nothing keeps running."""
    (home / "store").mkdir(parents=True)
    (home / "store" / "data").write_text("a file where the directory should be")
    with (
        pytest.raises(StorageError, match=r"did not start; the end of .*weed\.log:\n.*data") as caught,
        EmbeddedStore(home, "one"),
    ):
        pass
    assert caught.value.exit_code == 69
    assert server(home) is None
