"""How the replicas' certificates get to each other and to the stages; tests/engine/test_progress.py has a real API."""

import asyncio
import copy
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from tests.fakes import virtual_time

from finetune_operator.certificates import LIFE, OwnCertificate, trusting
from finetune_operator.kube.client import Client
from finetune_operator.kube.errors import ConflictError, ForbiddenError, KubeError, NotFoundError
from finetune_operator.replicas import MOST, REPLICAS, Replicas
from finetune_operator.trust import Trust

START = datetime(2026, 1, 1, tzinfo=UTC)
OURS = ("finetune", REPLICAS)


class ConfigMaps:
    """A cluster's, in memory; all replicas see a change of theirs at once."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.writes: list[tuple[str, str, str]] = []
        self.reads = 0
        self.refuse: dict[str, KubeError] = {}
        """By namespace."""
        self.replicas: list[Replicas] = []

    @property
    def client(self) -> Client:
        """In place of a real one."""
        return cast(Client, self)

    async def get(self, resource: object, namespace: str, name: str) -> dict[str, Any]:
        """One of them."""
        self.reads += 1
        self._check(namespace)
        if (namespace, name) not in self.objects:
            raise NotFoundError(name)
        return copy.deepcopy(self.objects[namespace, name])

    async def apply(self, resource: object, namespace: str, obj: dict[str, Any], manager: str) -> None:
        """A new one, or more keys in one that is there."""
        self._check(namespace)
        name = obj["metadata"]["name"]
        changed = copy.deepcopy(obj)
        changed["data"] = {**self.objects.get((namespace, name), {}).get("data", {}), **obj["data"]}
        self._write("apply", namespace, name, changed)

    async def patch(self, resource: object, namespace: str, name: str, patch: dict[str, Any]) -> None:
        """Merge."""
        self._check(namespace)
        if (namespace, name) not in self.objects:
            raise NotFoundError(name)
        changed = copy.deepcopy(self.objects[namespace, name])
        data = {**changed.get("data", {}), **patch["data"]}
        changed["data"] = {key: value for key, value in data.items() if value is not None}
        self._write("patch", namespace, name, changed)

    def _check(self, namespace: str) -> None:
        if namespace in self.refuse:
            raise self.refuse[namespace]

    def _write(self, verb: str, namespace: str, name: str, obj: dict[str, Any]) -> None:
        old = self.objects.get((namespace, name))
        self.objects[namespace, name] = obj
        self.writes.append((verb, namespace, name))
        if (namespace, name) == OURS:
            self.tell(old, obj)

    def tell(self, old: dict[str, Any] | None, new: dict[str, Any] | None) -> None:
        """As the watches do."""
        for replicas in self.replicas:
            replicas._on_change(old, new)

    def bundle(self, namespace: str) -> str:
        """What the stages there trust."""
        return str(self.objects[namespace, "finetune-progress"]["data"]["ca.pem"])


class World:
    """A cluster and its clock: virtual seconds since ``START``."""

    def __init__(self) -> None:
        self.maps = ConfigMaps()
        self.loop = asyncio.get_running_loop()
        self.began = self.loop.time()

    def now(self) -> datetime:
        """What all machines' clocks say."""
        return START + timedelta(seconds=self.loop.time() - self.began)

    def replica(self, number: int) -> Replicas:
        """One of the operator's pods."""
        own = OwnCertificate(["finetune-operator-progress.finetune.svc"], f"10.0.0.{number}", self.now())
        made = Replicas(
            self.maps.client,
            "finetune",
            f"pod-{number}",
            f"https://10.0.0.{number}:9443",
            own,
            clock=self.now,
            ticks=self.loop.time,
        )
        made.reflector.store.synced = True
        self.maps.replicas.append(made)
        made._on_change(None, self.maps.objects.get(OURS, {"metadata": {"name": REPLICAS}}))
        return made

    def trust(self, replicas: Replicas) -> Trust:
        """The leader's."""
        return Trust(self.maps.client, replicas, ticks=self.loop.time)


@asynccontextmanager
async def running(*parts: Replicas | Trust) -> AsyncIterator[None]:
    """Let them run, and end them in order."""
    tasks = [asyncio.create_task(part.run()) for part in parts]
    try:
        yield
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@pytest.fixture
def days(monkeypatch: pytest.MonkeyPatch) -> None:
    """Days pass in seconds: everybody looks every ten minutes, not every second."""
    for module in ("replicas", "trust"):
        monkeypatch.setattr(f"finetune_operator.{module}._LOOK_SECONDS", 600.0)


@virtual_time
async def test_each_replica_learns_of_the_others() -> None:
    """Two that start at once on an empty namespace: one ConfigMap, an entry of each, the same bundle at both."""
    world = World()
    one, two = world.replica(1), world.replica(2)
    async with running(one, two):
        await asyncio.sleep(20)
        for seen in (one, two):
            found = seen.get("pod-2")
            assert found is not None
            assert found.url == "https://10.0.0.2:9443"
            assert seen.get("pod-3") is None
        assert one.bundle() == two.bundle()
        assert one.bundle().count("BEGIN CERTIFICATE") == 2
        assert "PRIVATE" not in json.dumps(world.maps.objects[OURS])
        writes = len(world.maps.writes)
        await asyncio.sleep(1000)
        assert len(world.maps.writes) == writes  # nothing is written for nothing
    assert world.maps.objects[OURS]["data"] == {}  # who goes in order leaves nothing behind


@virtual_time
async def test_an_entry_that_somebody_spoiled_is_written_again() -> None:
    """The ConfigMap is deleted, or our key changed: seconds later it is right, without a storm of writes."""
    world = World()
    one = world.replica(1)
    async with running(one):
        await asyncio.sleep(10)
        right = world.maps.objects[OURS]["data"]["pod-1"]
        world.maps.tell(world.maps.objects.pop(OURS), None)
        assert one.get("pod-1") is None
        await asyncio.sleep(10)
        assert world.maps.objects[OURS]["data"]["pod-1"] == right
        await world.maps.patch(None, *OURS, {"data": {"pod-1": "nonsense"}})
        await asyncio.sleep(10)
        assert world.maps.objects[OURS]["data"]["pod-1"] == right
        assert len(world.maps.writes) <= 4


@virtual_time
async def test_certificates_change_without_a_gap(days: None) -> None:
    """For twelve days every certificate that is shown is trusted by every stage, and was for an hour before."""
    world = World()
    one, two = world.replica(1), world.replica(2)
    trust = world.trust(one)
    trusted_before: list[str] = []
    async with running(one, two, trust):
        await asyncio.sleep(1200)
        for _ in range(12 * 24 * 2):
            trust.want("team")
            await asyncio.sleep(1800)
            bundle = world.maps.bundle("team")
            for replica in (one, two):
                assert replica._own._shown.pem in bundle
                assert not trusted_before or replica._own._shown.pem in trusted_before[-1]
            trusted_before.append(bundle)
            assert 2 <= bundle.count("BEGIN CERTIFICATE") <= 4
    assert trusting(bundle).cert_store_stats()["x509"] == bundle.count("BEGIN CERTIFICATE")
    assert len([w for w in world.maps.writes if w[1] == "team"]) <= 1 + 2 * 2 * 2


@virtual_time
async def test_a_namespace_gets_its_certificates_once(days: None) -> None:
    """However many jobs ask: one read and one write; then a read an hour, as long as somebody asks."""
    world = World()
    one = world.replica(1)
    trust = world.trust(one)
    async with running(one, trust):
        for _ in range(5000):
            trust.want("team")
        await asyncio.sleep(1200)
        assert world.maps.bundle("team") == one.bundle()
        assert [w for w in world.maps.writes if w[1] == "team"] == [("apply", "team", "finetune-progress")]
        assert world.maps.reads == 1
        await asyncio.sleep(24 * 3600)
        assert world.maps.reads == 2
        assert len(trust._namespaces) == 0


@virtual_time
async def test_what_somebody_else_wrote_there_is_put_right() -> None:
    """A ConfigMap of that name keeps its other keys; a deleted one comes back with the hourly look."""
    world = World()
    one = world.replica(1)
    trust = world.trust(one)
    other = {"metadata": {"name": "finetune-progress"}, "data": {"ca.pem": "old", "notes": "mine"}}
    world.maps.objects["team", "finetune-progress"] = other
    async with running(one, trust):
        trust.want("team")
        await asyncio.sleep(60)
        assert world.maps.objects["team", "finetune-progress"]["data"] == {"ca.pem": one.bundle(), "notes": "mine"}
        del world.maps.objects["team", "finetune-progress"]
        trust.want("team")
        await asyncio.sleep(3600)
        assert world.maps.bundle("team") == one.bundle()


@virtual_time
async def test_a_namespace_that_was_made_again_has_its_certificates_at_once() -> None:
    """Its jobs went with the old one; as long as there is another job, it is the same namespace."""

    def job(name: str) -> dict[str, Any]:
        return {"metadata": {"name": name, "namespace": "team"}}

    world = World()
    one = world.replica(1)
    trust = world.trust(one)
    async with running(one, trust):
        for name in ("a", "b"):
            trust.on_finetunejob(None, job(name))
        trust.want("team")
        await asyncio.sleep(60)
        reads = world.maps.reads
        trust.on_finetunejob(job("a"), None)
        trust.on_finetunejob(job("b"), job("b"))
        trust.want("team")
        await asyncio.sleep(60)
        assert world.maps.reads == reads
        trust.on_finetunejob(job("b"), None)
        del world.maps.objects["team", "finetune-progress"]
        trust.on_finetunejob(None, job("a"))
        trust.want("team")
        await asyncio.sleep(5)
        assert world.maps.bundle("team") == one.bundle()


@virtual_time
async def test_a_namespace_that_refuses_does_not_stop_the_others() -> None:
    """It is tried again every half minute, and has its certificates once it may."""
    world = World()
    one = world.replica(1)
    trust = world.trust(one)
    world.maps.refuse["going"] = ForbiddenError("namespace going is being terminated")
    async with running(one, trust):
        for name in ("going", "team"):
            trust.want(name)
        await asyncio.sleep(300)
        assert world.maps.bundle("team") == one.bundle()
        assert world.maps.reads <= 2 + 300 / 30
        del world.maps.refuse["going"]
        await asyncio.sleep(60)
        assert world.maps.bundle("going") == one.bundle()


@virtual_time
async def test_the_dead_are_taken_out_and_are_never_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that are over or cannot be read go; of replicas that were killed by the dozen only the latest stay."""
    world = World()
    killed = []
    for number in range(1, MOST + 10):
        replica = world.replica(number)
        task = asyncio.create_task(replica.run())
        await asyncio.sleep(10)
        killed.append(replica)
        world.maps.refuse["finetune"] = NotFoundError("killed before it could say farewell")
        task.cancel()
        await asyncio.wait([task])
        world.maps.refuse.clear()
    await world.maps.patch(None, *OURS, {"data": {"spoilt": "{"}})
    leader = world.replica(100)
    async with running(leader, world.trust(leader)):
        await asyncio.sleep(120)
        left = set(world.maps.objects[OURS]["data"])
        assert left == {f"pod-{number}" for number in range(11, MOST + 10)} | {"pod-100"}
        for module in ("replicas", "trust"):
            monkeypatch.setattr(f"finetune_operator.{module}._LOOK_SECONDS", 600.0)
        await asyncio.sleep(LIFE.total_seconds() + 3600)
        assert set(world.maps.objects[OURS]["data"]) == {"pod-100"}
        assert leader.bundle().count("BEGIN CERTIFICATE") <= 2


@virtual_time
async def test_nothing_is_told_before_everything_is_known() -> None:
    """A leader that has not seen the other replicas yet would take their certificates away from the stages."""
    world = World()
    one = world.replica(1)
    one.reflector.store.synced = False
    trust = world.trust(one)
    trust.want("team")
    async with running(one, trust):
        await asyncio.sleep(60)
        assert (world.maps.writes, world.maps.reads) == ([], 0)


@pytest.mark.parametrize("seed", range(3))
@virtual_time
async def test_trouble_with_the_api_server_passes(seed: int) -> None:
    """Whatever is refused, whenever: no task ends, and afterwards everything is as it should be."""
    world = World()
    chance = random.Random(seed)
    one, two = world.replica(1), world.replica(2)
    trust = world.trust(two)
    errors = (ForbiddenError("no"), NotFoundError("gone"), ConflictError("there"), KubeError("what"))
    async with running(one, two, trust):
        for _ in range(200):
            trust.want("team")
            world.maps.refuse = {name: chance.choice(errors) for name in ("team", "finetune") if chance.random() < 0.7}
            await asyncio.sleep(chance.uniform(1, 40))
        world.maps.refuse = {}
        await asyncio.sleep(60)
        assert set(world.maps.objects[OURS]["data"]) == {"pod-1", "pod-2"}
        assert world.maps.bundle("team") == one.bundle() == two.bundle()
