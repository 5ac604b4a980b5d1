import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.cluster.controlplane import ControlPlane
from tests.fakes import real_time, until

from finetune_operator.kube import Client, Elector, LeaseSettings, Metrics, Recorder, Reflector, Resource
from finetune_operator.kube.errors import (
    AlreadyExistsError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    NotLeadingError,
)
from finetune_operator.kube.objects import Object, controller_uid

CONFIGMAPS = Resource("", "v1", "configmaps")
EVENTS = Resource("", "v1", "events")
JOBS = Resource("batch", "v1", "jobs")
NAMESPACES = Resource("", "v1", "namespaces", namespaced=False)
MANY = 2000


def configmap(name: str, **data: str) -> Object:
    """A small object."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


@asynccontextmanager
async def running(reflector: Reflector) -> AsyncIterator[Reflector]:
    """Let it run, synced."""
    task = asyncio.create_task(reflector.run())
    try:
        await reflector.wait_synced()
        yield reflector
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])


@real_time
async def test_conflicts_and_refusals_are_typed(control_plane: ControlPlane, namespace: str) -> None:
    """What the real server answers to stale, taken, foreign, missing, wrong and forbidden requests."""
    async with await Client.connect(control_plane.kubeconfig) as client:
        made = await client.create(CONFIGMAPS, namespace, configmap("a", x="1"))
        assert (await client.get(CONFIGMAPS, namespace, "a"))["data"] == {"x": "1"}
        with pytest.raises(AlreadyExistsError, match="already exists"):
            await client.create(CONFIGMAPS, namespace, configmap("a"))
        newer = await client.replace(CONFIGMAPS, namespace, "a", {**made, "data": {"x": "2"}})
        with pytest.raises(ConflictError, match="has been modified"):
            await client.replace(CONFIGMAPS, namespace, "a", {**made, "data": {"x": "3"}})
        stale = {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"]}, "data": {"x": "4"}}
        with pytest.raises(ConflictError):
            await client.patch(CONFIGMAPS, namespace, "a", stale)
        with pytest.raises(ConflictError, match="UID"):
            await client.delete(CONFIGMAPS, namespace, "a", uid=str(uuid.uuid4()))
        with pytest.raises(InvalidError) as caught:
            await client.create(CONFIGMAPS, namespace, configmap("No Name"))
        assert caught.value.causes[0]["field"] == "metadata.name"
        with pytest.raises(NotFoundError):
            await client.list(Resource("finetune.example", "v1", "nothings"), namespace)
        await client.delete(CONFIGMAPS, namespace, "a", propagation="Background", uid=newer["metadata"]["uid"])
        with pytest.raises(NotFoundError):
            await client.get(CONFIGMAPS, namespace, "a")
    stranger = control_plane.kubeconfig_for("stranger")
    async with await Client.connect(stranger) as client:
        with pytest.raises(ForbiddenError, match="cannot get resource"):
            await client.get(CONFIGMAPS, namespace, "a")


@real_time
async def test_status_is_written_apart_and_guarded(control_plane: ControlPlane, namespace: str) -> None:
    """replace_status changes the status alone, and not on top of a version that is no longer the newest."""
    pod = {"containers": [{"name": "c", "image": "i"}], "restartPolicy": "Never"}
    job: Object = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "j"},
        "spec": {"template": {"spec": pod}},
    }
    async with await Client.connect(control_plane.kubeconfig) as client:
        made = await client.create(JOBS, namespace, job)
        wished = {**made, "spec": {**made["spec"], "suspend": True}, "status": {"startTime": "2026-01-01T00:00:00Z"}}
        written = await client.replace_status(JOBS, namespace, "j", wished)
        assert written["status"]["startTime"] == "2026-01-01T00:00:00Z"
        assert not written["spec"].get("suspend")
        with pytest.raises(ConflictError):
            await client.replace_status(JOBS, namespace, "j", wished)
        # Without a controller manager nothing ends a foreground deletion: it is asked for, and the Job says so.
        await client.delete(JOBS, namespace, "j", uid=made["metadata"]["uid"])
        assert "deletionTimestamp" in (await client.get(JOBS, namespace, "j"))["metadata"]


@real_time
async def test_thousands_are_listed_in_pages_and_followed(control_plane: ControlPlane, namespace: str) -> None:
    """2,000 objects come in twenty pages, all their changes by one watch, each of them once, in order."""
    metrics = Metrics()
    changes: list[tuple[str, bool, bool]] = []

    def on_change(old: Object | None, new: Object | None) -> None:
        some = new or old
        assert some is not None
        changes.append((some["metadata"]["name"], old is not None, new is not None))

    def owners(obj: Object) -> list[str]:
        return [controller_uid(obj)]

    async with await Client.connect(control_plane.kubeconfig, metrics=metrics) as client:
        owner = await client.create(CONFIGMAPS, namespace, configmap("a-owner"))
        reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "a-owner", "uid": owner["metadata"]["uid"]}
        limit = asyncio.Semaphore(20)

        async def make(number: int) -> None:
            obj = configmap(f"cm-{number}", n=str(number))
            obj["metadata"] |= {"labels": {"set": "many"}}
            if number % 2:
                obj["metadata"]["ownerReferences"] = [{**reference, "controller": True}]
            async with limit:
                await client.create(CONFIGMAPS, namespace, obj)

        async with asyncio.TaskGroup() as tasks:
            for number in range(MANY):
                tasks.create_task(make(number))

        def reads() -> float:
            labels = {"method": "GET", "code": "200"}
            return metrics.registry.get_sample_value("rest_client_requests_total", labels) or 0.0

        reflector = Reflector(client, CONFIGMAPS, namespace, "set=many", on_change, indexes={"owner": owners})
        async with running(reflector):
            assert len(reflector.store) == MANY
            assert reads() == 20, "pages of 100"
            assert len(reflector.store.by_index("owner", owner["metadata"]["uid"])) == MANY / 2
            one = reflector.store.get(namespace, "cm-7")
            assert one is not None
            assert (one["apiVersion"], one["kind"], one["data"]) == ("v1", "ConfigMap", {"n": "7"})
            assert "managedFields" not in one["metadata"]
            changes.clear()
            for number in range(100):
                await client.patch(CONFIGMAPS, namespace, f"cm-{number}", {"data": {"n": "new"}})
            for number in range(50):
                await client.delete(CONFIGMAPS, namespace, f"cm-{number}", propagation="Background")
            # Out of the selector is gone, back in is new.
            await client.patch(CONFIGMAPS, namespace, "cm-99", {"metadata": {"labels": {"set": "few"}}})
            await client.patch(CONFIGMAPS, namespace, "cm-99", {"metadata": {"labels": {"set": "many"}}})
            await until(lambda: len(changes) >= 152)
            assert changes == [
                *((f"cm-{number}", True, True) for number in range(100)),
                *((f"cm-{number}", True, False) for number in range(50)),
                ("cm-99", True, False),
                ("cm-99", False, True),
            ]
            assert len(reflector.store) == MANY - 50
            assert metrics.registry.get_sample_value("reflector_lists_total", {"resource": "configmaps"}) == 1


@real_time
async def test_the_same_name_anew_is_another_object(control_plane: ControlPlane, namespace: str) -> None:
    """Deleted and made again at once: the handler sees the end of the one and the beginning of the other."""
    seen: list[tuple[str | None, str | None]] = []
    async with await Client.connect(control_plane.kubeconfig) as client:

        def on_change(old: Object | None, new: Object | None) -> None:
            seen.append((old and old["metadata"]["uid"], new and new["metadata"]["uid"]))

        async with running(Reflector(client, CONFIGMAPS, namespace, "set=one", on_change)):
            obj = configmap("same")
            obj["metadata"]["labels"] = {"set": "one"}
            first = await client.create(CONFIGMAPS, namespace, obj)
            uid = first["metadata"]["uid"]
            await client.delete(CONFIGMAPS, namespace, "same", propagation="Background", uid=uid)
            second = await client.create(CONFIGMAPS, namespace, obj)
            await until(lambda: len(seen) >= 3)
            one, two = first["metadata"]["uid"], second["metadata"]["uid"]
            assert one != two
            assert seen == [(None, one), (one, None), (None, two)]


@real_time
async def test_a_cluster_scoped_kind(control_plane: ControlPlane, namespace: str) -> None:
    """Namespaces themselves: no namespace in path, key or store."""
    async with await Client.connect(control_plane.kubeconfig) as client:
        assert (await client.get(NAMESPACES, None, namespace))["metadata"]["name"] == namespace
        async with running(Reflector(client, NAMESPACES)) as reflector:
            assert reflector.store.get("", namespace) is not None


@real_time
async def test_events_are_accepted_and_counted(control_plane: ControlPlane, namespace: str) -> None:
    """The real server takes our Events, `kubectl events --for` finds them, a repetition raises the count."""
    async with await Client.connect(control_plane.kubeconfig) as client:
        about = await client.create(CONFIGMAPS, namespace, configmap("subject"))
        recorder = Recorder(client, "operator", "pod-1")
        for _ in range(3):
            recorder.record(about, "Warning", "Unschedulable", "0/4 nodes are available")
        await recorder.flush()
        (event,) = await client.list(EVENTS, namespace, field_selector=f"involvedObject.uid={about['metadata']['uid']}")
        assert (event["count"], event["reason"]) == (3, "Unschedulable")
    shown = await asyncio.to_thread(control_plane.kubectl, "events", "-n", namespace, "--for=configmap/subject")
    assert "0/4 nodes are available" in shown


@real_time
async def test_one_leader_then_the_next(control_plane: ControlPlane, namespace: str) -> None:
    """Two electors on the real server: one leads; told to stop, it hands over without the lease's running out."""
    settings = LeaseSettings(duration=60, renew_deadline=40, retry=0.5)
    leading: list[str] = []

    async def lead(identity: str) -> None:
        leading.append(identity)
        await asyncio.sleep(3600)

    async with await Client.connect(control_plane.kubeconfig) as client:
        one, two = (Elector(client, namespace, "operator", name, settings) for name in ("one", "two"))
        first = asyncio.create_task(one.run(lambda: lead("one")))
        await until(lambda: leading)
        second = asyncio.create_task(two.run(lambda: lead("two")))
        await until(lambda: two.holder == "one")
        with pytest.raises(NotLeadingError):
            await client.fenced(two.check).create(CONFIGMAPS, namespace, configmap("no"))
        await client.fenced(one.check).create(CONFIGMAPS, namespace, configmap("yes"))
        first.cancel()
        await asyncio.wait([first])
        await until(lambda: leading == ["one", "two"])
        lease = await client.get(Resource("coordination.k8s.io", "v1", "leases"), namespace, "operator")
        assert lease["spec"]["holderIdentity"] == "two"
        assert lease["spec"]["leaseTransitions"] == 1
        second.cancel()
        await asyncio.wait([second])
