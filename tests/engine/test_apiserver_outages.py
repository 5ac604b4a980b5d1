import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.cluster import processes
from tests.cluster.binaries import MissingToolError
from tests.cluster.controlplane import ControlPlane, running_control_plane
from tests.cluster.fixtures import cannot_run
from tests.engine.test_apiserver import CONFIGMAPS, configmap, running
from tests.fakes import real_time, until

from finetune_operator.kube import Client, HTTPSettings, Metrics, Reflector, ReflectorSettings, Resource
from finetune_operator.kube.errors import GoneError, RetryableError
from finetune_operator.kube.objects import Object

LEASES = Resource("coordination.k8s.io", "v1", "leases")
IMPATIENT = HTTPSettings(request_timeout=5, connect_timeout=2, watch_silence=3)
QUICK = ReflectorSettings(first_wait=0.1, longest_wait=0.5, resync=0)
REPLICA = Path(__file__).with_name("replica.py")


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane to be ill-treated."""
    try:
        with running_control_plane(tmp_path_factory.mktemp("outages")) as made:
            yield made
    except MissingToolError as missing:
        cannot_run(str(missing))


def etcd(plane: ControlPlane, call: str, **body: object) -> dict[str, object]:
    """etcd's own API, behind the apiserver's back."""
    url = f"http://127.0.0.1:{plane.etcd_port}/v3/{call}"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=30) as answer:
        found: dict[str, object] = json.load(answer)
        return found


def delete_in_etcd(plane: ControlPlane, namespace: str, name: str) -> int:
    """Delete a ConfigMap where no apiserver notices, and make etcd forget all history; the revision afterwards."""
    key = base64.b64encode(f"/registry/configmaps/{namespace}/{name}".encode()).decode()
    deleted = etcd(plane, "kv/deleterange", key=key)
    assert deleted["deleted"] == "1"
    header = deleted["header"]
    assert isinstance(header, dict)
    revision = int(header["revision"])
    etcd(plane, "kv/compaction", revision=revision, physical=True)
    return revision


async def insist(client: Client, namespace: str, name: str) -> None:
    """Create it as soon as the server takes it."""
    while True:
        with suppress(RetryableError):
            await client.create(CONFIGMAPS, namespace, configmap(name))
            return
        await asyncio.sleep(0.2)


@real_time
async def test_a_killed_apiserver_and_a_compacted_etcd_are_outlived(plane: ControlPlane) -> None:
    """SIGKILL, an object that vanishes meanwhile, history compacted, a new server: the store is true again, the lost
    deletion is told with its last state, and what comes afterwards arrives.
    """
    metrics = Metrics()
    deleted: list[Object] = []

    def on_change(old: Object | None, new: Object | None) -> None:
        if new is None and old is not None:
            deleted.append(old)

    async with await Client.connect(plane.kubeconfig, settings=IMPATIENT, metrics=metrics) as client:
        for number in range(20):
            await client.create(CONFIGMAPS, "default", configmap(f"kill-{number}", n=str(number)))
        reflector = Reflector(client, CONFIGMAPS, "default", on_change=on_change, settings=QUICK)
        async with running(reflector):
            assert reflector.store.get("default", "kill-7") is not None
            plane.kill("kube-apiserver")
            delete_in_etcd(plane, "default", "kill-7")
            labels = {"resource": "configmaps", "cause": "unreachable"}
            await until(lambda: metrics.registry.get_sample_value("watch_restarts_total", labels))
            assert reflector.store.get("default", "kill-7") is not None, "an outage empties no cache"
            plane.start("kube-apiserver")
            await insist(client, "default", "after-kill")
            await until(lambda: reflector.store.get("default", "after-kill"))
            await until(lambda: deleted)
            assert [obj["data"] for obj in deleted] == [{"n": "7"}]
            assert reflector.store.get("default", "kill-7") is None
            truth = {obj["metadata"]["name"] for obj in await client.list(CONFIGMAPS, "default")}
            assert {obj["metadata"]["name"] for obj in reflector.store} == truth
            assert metrics.registry.get_sample_value("reflector_lists_total", {"resource": "configmaps"}) >= 2
            with pytest.raises(GoneError, match="too old resource version"):
                await anext(client.watch(CONFIGMAPS, "default", resource_version="1"))


@real_time
async def test_a_frozen_apiserver_is_noticed_and_outlived(plane: ControlPlane) -> None:
    """SIGSTOP: connections stay open and silent. The watch is given up for half-open; after SIGCONT all goes on."""
    metrics = Metrics()
    async with await Client.connect(plane.kubeconfig, settings=IMPATIENT, metrics=metrics) as client:
        reflector = Reflector(client, CONFIGMAPS, "default", settings=QUICK)
        async with running(reflector):
            pid = processes.started(plane.directory, "kube-apiserver")
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            try:
                labels = {"resource": "configmaps", "cause": "unreachable"}
                await until(lambda: metrics.registry.get_sample_value("watch_restarts_total", labels))
            finally:
                os.kill(pid, signal.SIGCONT)
            await insist(client, "default", "after-freeze")
            await until(lambda: reflector.store.get("default", "after-freeze"))


class Replica:
    """A process of ``replica.py``."""

    def __init__(self, plane: ControlPlane, namespace: str, identity: str) -> None:
        command = [sys.executable, str(REPLICA), str(plane.kubeconfig), namespace, identity]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.identity = identity

    async def says(self, word: str) -> None:
        """Wait until it says so."""
        assert self.process.stdout is not None
        while (line := await asyncio.to_thread(self.process.stdout.readline)) != f"{word}\n":
            assert line, f"{self.identity} ended without saying {word}"

    def end(self) -> None:
        """Whatever state it is in."""
        self.process.kill()
        self.process.wait()


@real_time
async def test_a_frozen_leader_writes_nothing_once_it_thaws(plane: ControlPlane) -> None:
    """Of two processes the leader is stopped past its lease, the other takes over, the first is let go: after the
    takeover there is not one write of its, though it had four on their way at every moment; it ends with 1.
    """
    writes: list[tuple[int, str]] = []
    taken: dict[str, int] = {}
    """At which version each replica became the holder."""
    async with await Client.connect(plane.kubeconfig) as client:
        await client.create(CONFIGMAPS, "kube-public", configmap("counter"))

        def on_change(old: Object | None, new: Object | None) -> None:
            assert new is not None
            writes.append((int(new["metadata"]["resourceVersion"]), new.get("data", {}).get("writer", "")))

        def on_lease(old: Object | None, new: Object | None) -> None:
            assert new is not None
            taken.setdefault(new["spec"].get("holderIdentity", ""), int(new["metadata"]["resourceVersion"]))

        async with (
            running(Reflector(client, CONFIGMAPS, "kube-public", on_change=on_change, settings=QUICK)),
            running(Reflector(client, LEASES, "kube-public", on_change=on_lease, settings=QUICK)),
        ):
            for round_ in range(2):
                first = Replica(plane, "kube-public", f"first-{round_}")
                second = None
                try:
                    await first.says("leads")
                    await until(lambda first=first: writes[-1][1] == first.identity)
                    second = Replica(plane, "kube-public", f"second-{round_}")
                    os.kill(first.process.pid, signal.SIGSTOP)
                    await second.says("leads")
                    await until(lambda second=second: writes[-1][1] == second.identity)
                    os.kill(first.process.pid, signal.SIGCONT)
                    await first.says("lost")
                    assert await asyncio.to_thread(first.process.wait) == 1
                    # Whatever the thawed one had sent would be among these.
                    count = len(writes)
                    await until(lambda count=count: len(writes) > count + 20)
                    since = taken[second.identity]
                    assert {writer for version, writer in writes if version > since} == {second.identity}
                    assert any(writer == first.identity for _, writer in writes)
                    second.process.terminate()
                    await second.says("stopped")
                finally:
                    first.end()
                    if second is not None:
                        second.end()
                writes[:] = writes[-1:]
