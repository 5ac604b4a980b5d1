import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.fakes import Answer, FakeServer, cuts, fake_server, real_time, refuses, says, streams, until

from finetune_operator.kube import Client, HTTPSettings, Reflector, ReflectorSettings, Resource
from finetune_operator.kube.objects import Object, controller_uid

PODS = Resource("", "v1", "pods")
QUICK = ReflectorSettings(first_wait=0.01, longest_wait=0.05, resync=0)


def pod(name: str, version: int, uid: str = "", **more: Any) -> Object:
    """As the apiserver would send it."""
    metadata = {"namespace": "n", "name": name, "uid": uid or name, "resourceVersion": str(version)}
    return {"kind": "Pod", "metadata": metadata, **more}


def listed(version: int, *pods: Object, following: str = "") -> Answer:
    """A page of a list as of that version."""
    metadata = {"resourceVersion": str(version), "continue": following}
    return says({"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": list(pods)})


def event(kind: str, obj: Object) -> dict[str, Any]:
    """A line of a watch."""
    return {"type": kind, "object": obj}


GONE = event("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"})
IDLE = streams(then="hang")


@dataclass
class Seen:
    """What the handler was told: name, version before, version after."""

    server: FakeServer
    reflector: Reflector
    client: Client
    changes: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    last: dict[str, Object] = field(default_factory=dict)
    """The last state of each deleted one."""

    def versions(self) -> dict[str, str]:
        """What the store holds."""
        return {obj["metadata"]["name"]: obj["metadata"]["resourceVersion"] for obj in self.reflector.store}

    def restarts(self, cause: str) -> float:
        """How often a watch ended so."""
        labels = {"resource": "pods", "cause": cause}
        found = self.client.transport.metrics.registry.get_sample_value("watch_restarts_total", labels)
        return found or 0.0


@asynccontextmanager
async def reflecting(
    directory: Path,
    lists: list[Answer],
    watches: list[Answer],
    settings: ReflectorSettings = QUICK,
    silence: float = 30,
    **more: Any,
) -> AsyncIterator[Seen]:
    """A reflector at work on a server with those answers."""
    http = HTTPSettings(attempts=1, watch_silence=silence)
    async with fake_server() as server, await Client.connect(server.kubeconfig(directory), settings=http) as client:
        server.on("GET", *lists)
        server.on("WATCH", *watches)

        def on_change(old: Object | None, new: Object | None) -> None:
            some = new or old
            assert some is not None
            seen.changes.append(
                (
                    some["metadata"]["name"],
                    old and old["metadata"]["resourceVersion"],
                    new and new["metadata"]["resourceVersion"],
                )
            )
            if new is None:
                seen.last[some["metadata"]["name"]] = some

        reflector = Reflector(client, PODS, "n", "app=x", on_change, settings=settings, **more)
        seen = Seen(server, reflector, client)
        task = asyncio.create_task(reflector.run())
        try:
            yield seen
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.wait([task])


@real_time
async def test_pages_then_changes(tmp_path: Path) -> None:
    """The list is taken in page by page, the watch goes on from its version, each change is told once, the last state
    of a deleted object is the one that came with its deletion.
    """
    lists = [listed(10, pod("a", 1), pod("b", 2), following="x"), listed(10, pod("c", 3))]
    watch = streams(
        event("MODIFIED", pod("a", 11)),
        event("ADDED", pod("d", 12)),
        event("DELETED", pod("b", 13, status={"exitCode": 75})),
        event("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": "20"}}),
    )
    async with reflecting(tmp_path, lists, [watch, IDLE]) as seen:
        assert not seen.reflector.synced
        await seen.reflector.wait_synced()
        await until(lambda: len(seen.server.seen("WATCH")) == 2)
        assert seen.versions() == {"a": "11", "c": "3", "d": "12"}
        assert seen.changes == [
            ("a", None, "1"),
            ("b", None, "2"),
            ("c", None, "3"),
            ("a", "1", "11"),
            ("d", None, "12"),
            ("b", "13", None),
        ]
        assert seen.last["b"]["status"] == {"exitCode": 75}
        first, second = seen.server.seen("WATCH")
        assert first.query["resourceVersion"] == "10"
        assert second.query["resourceVersion"] == "20", "a bookmark moves the place on"
        assert 300 <= int(first.query["timeoutSeconds"]) <= 600
        assert {r.query["labelSelector"] for r in seen.server.requests} == {"app=x"}
        assert seen.restarts("ended") == 1


@pytest.mark.parametrize("in_stream", [True, False])
def test_410_lists_again_and_tells_the_difference(tmp_path: Path, in_stream: bool) -> None:
    """What changed, came, went or was replaced meanwhile is told; what stayed is not."""

    @real_time
    async def scenario() -> None:
        before = listed(10, pod("same", 1), pod("changed", 2), pod("deleted", 3), pod("recreated", 4, "old"))
        after = listed(50, pod("same", 1), pod("changed", 40), pod("recreated", 41, "new"), pod("new", 42))
        async with reflecting(
            tmp_path, [before, after], [streams(GONE) if in_stream else refuses(410, "Expired"), IDLE]
        ) as seen:
            await until(lambda: len(seen.server.seen("WATCH")) == 2)
            assert seen.changes[4:] == [
                ("changed", "2", "40"),
                ("recreated", "4", None),
                ("recreated", None, "41"),
                ("new", None, "42"),
                ("deleted", "3", None),
            ]
            assert seen.server.seen("WATCH")[1].query["resourceVersion"] == "50"
            assert seen.restarts("gone") == 1

    scenario()


@real_time
async def test_broken_streams_go_on_where_they_were(tmp_path: Path) -> None:
    """Cut, torn or ended: no second list, no event twice, none lost."""
    watches = [
        streams(event("ADDED", pod("a", 11)), '{"type": "ADDED", "obj'),
        cuts(),
        refuses(503),
        streams(event("ADDED", pod("b", 12))),
        IDLE,
    ]
    async with reflecting(tmp_path, [listed(10)], watches) as seen:
        await until(lambda: len(seen.server.seen("WATCH")) == 5)
        assert seen.changes == [("a", None, "11"), ("b", None, "12")]
        versions = [r.query["resourceVersion"] for r in seen.server.seen("WATCH")]
        assert versions == ["10", "11", "11", "11", "12"]
        assert len(seen.server.seen("GET")) == 1
        assert seen.restarts("unreachable") >= 1
        assert seen.restarts("refused") == 1


@real_time
async def test_a_version_that_the_server_stumbles_over_again_and_again_is_given_up(tmp_path: Path) -> None:
    """An error in the stream that is not 410 may repeat for ever at the same version: then only a new list helps."""
    broken = streams(event("ERROR", {"code": 500, "message": "unable to decode"}))
    watches = [broken, broken, broken, broken, IDLE]
    async with reflecting(tmp_path, [listed(10), listed(30, pod("a", 29))], watches) as seen:
        await until(lambda: len(seen.server.seen("WATCH")) == 5)
        assert seen.versions() == {"a": "29"}
        assert [r.query["resourceVersion"] for r in seen.server.seen("WATCH")] == ["10", "10", "10", "10", "30"]


@real_time
async def test_a_half_open_watch_is_opened_anew_at_once(tmp_path: Path) -> None:
    """Silence is noticed by itself, is no failure, and the next watch goes on from the same place."""
    settings = ReflectorSettings(first_wait=3600, longest_wait=3600, resync=0)
    watches = [IDLE, IDLE, streams(event("ADDED", pod("a", 11)), then="hang")]
    async with reflecting(tmp_path, [listed(10)], watches, settings, silence=0.5) as seen:
        await until(lambda: seen.changes)
        assert {r.query["resourceVersion"] for r in seen.server.seen("WATCH")[:3]} == {"10"}
        assert seen.restarts("silent") >= 2
        assert len(seen.server.seen("GET")) == 1


@real_time
async def test_outages_at_the_start_are_outlived(tmp_path: Path) -> None:
    """Refused lists, a kind not installed yet, a page token that expired half-way: it tries until it is synced."""
    lists = [
        refuses(500),
        refuses(404, message="404 page not found"),
        refuses(403, "Forbidden"),
        listed(10, pod("a", 1), following="x"),
        refuses(410, "Expired"),
        listed(20, pod("b", 15)),
    ]
    async with reflecting(tmp_path, lists, [IDLE]) as seen:
        await seen.reflector.wait_synced()
        assert seen.versions() == {"b": "15"}
        assert seen.changes == [("a", None, "1"), ("b", None, "15"), ("a", "1", None)]


@real_time
async def test_waits_grow_while_nothing_arrives_and_start_anew_with_an_event(tmp_path: Path) -> None:
    """A server that ends each watch at once is not hammered; one event, and the next failure is a first one."""
    settings = ReflectorSettings(first_wait=0.01, longest_wait=100, resync=0)
    ends = streams()
    watches = [ends, ends, ends, streams(event("ADDED", pod("a", 11)), then="hang")]
    async with reflecting(tmp_path, [listed(10)], watches, settings) as seen:
        await until(lambda: len(seen.server.seen("WATCH")) == 3)
        await until(lambda: seen.reflector._backoff.failures == 3)
        await until(lambda: seen.changes)
        assert seen.reflector._backoff.failures == 0
        assert seen.restarts("brief") == 3


@real_time
async def test_a_list_that_works_is_no_reason_to_hurry(tmp_path: Path) -> None:
    """If every list succeeds and every watch is refused, the waits grow all the same: no hot loop."""
    settings = ReflectorSettings(first_wait=0.01, longest_wait=100, resync=0)
    async with reflecting(tmp_path, [listed(10)], [streams(GONE)], settings) as seen:
        await until(lambda: seen.reflector._backoff.failures >= 5)
        assert seen.restarts("gone") >= 5


@real_time
async def test_resync_hands_out_everything_from_memory(tmp_path: Path) -> None:
    """Handlers see each object again, unchanged, and the server is not asked."""
    settings = ReflectorSettings(first_wait=0.01, resync=0.2)
    async with reflecting(tmp_path, [listed(10, pod("a", 1), pod("b", 2))], [IDLE], settings) as seen:
        await until(lambda: len(seen.changes) >= 6)
        first, second = seen.changes[2:4], seen.changes[4:6]  # each in an order of its own
        assert sorted(first) == sorted(second) == [("a", "1", "1"), ("b", "2", "2")]
        assert len(seen.server.requests) == 2


@real_time
async def test_objects_are_stripped_and_indexed_as_they_enter(tmp_path: Path) -> None:
    """managedFields go, the caller's transform is applied to lists and events, indexes see what is left."""

    def transform(obj: Object) -> Object:
        obj.pop("spec", None)
        return obj

    heavy = {"spec": {"x": 1}}
    first, second = pod("a", 1, **heavy), pod("b", 11, **heavy)
    for obj in (first, second):
        obj["metadata"]["managedFields"] = [{"manager": "kubectl"}]
        obj["metadata"]["ownerReferences"] = [{"uid": "owner", "controller": True}]
    async with reflecting(
        tmp_path,
        [listed(10, first)],
        [streams(event("ADDED", second)), IDLE],
        transform=transform,
        indexes={"owner": lambda obj: [controller_uid(obj)]},
    ) as seen:
        await until(lambda: len(seen.changes) == 2)
        found = seen.reflector.store.by_index("owner", "owner")
        assert [obj["metadata"]["name"] for obj in found] == ["a", "b"]
        assert all("spec" not in obj and "managedFields" not in obj["metadata"] for obj in found)
        assert found[0]["kind"] == "Pod"
