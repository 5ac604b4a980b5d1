"""The operator on a real API server, with the real Job controller and garbage collector; the kubelet is a stand-in."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.builders import DPO, GGUF, MERGE, SFT, raw_job
from tests.cluster.controlplane import ControlPlane
from tests.cluster.definitions import serve_finetunejobs
from tests.engine.operators import operators
from tests.engine.standin_kubelet import PODS, End, Kubelet, committed

from finetune_operator.__main__ import operate
from finetune_operator.controller import FINETUNEJOBS
from finetune_operator.kube.client import STRATEGIC_PATCH, Client, Resource
from finetune_operator.kube.errors import NotFoundError
from finetune_operator.kube.lease import LEASES
from finetune_operator.kube.metrics import Metrics
from finetune_operator.lookup import EVENTS, JOBS
from finetune_operator.plan.pods import PodSettings
from finetune_operator.replicas import CONFIG_MAPS
from finetune_operator.settings import Settings

SECONDS = 90
"""For anything to happen on a machine that is busy with other tests."""
SMALL = (SFT, MERGE)
ALL = ["prepare", "baseline", "sft", "merge", "evaluate", "report"]
POD_SETTINGS = PodSettings(trainer_image="trainer:1", gguf_image="gguf:1")


@pytest.fixture(scope="module")
def plane(control_plane_with_controllers: ControlPlane) -> ControlPlane:
    """A control plane that serves FineTuneJobs."""
    serve_finetunejobs(control_plane_with_controllers)
    return control_plane_with_controllers


@pytest.fixture
def namespace(plane: ControlPlane) -> str:
    """A namespace of this test's own, with its default service account."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    plane.kubectl("create", "namespace", name)
    plane.kubectl("-n", name, "wait", "--for=create", "--timeout=120s", "serviceaccount/default")
    return name


def settings(namespace: str, identity: str = "one") -> Settings:
    """An operator of one namespace, on free ports."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(3)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        health, metrics, progress = (probe.getsockname()[1] for probe in probes)
    return Settings(
        progress_names=("localhost",),
        progress_port=progress,
        pods=POD_SETTINGS,
        namespaces=(namespace,),
        namespace=namespace,
        identity=identity,
        health_port=health,
        metrics_port=metrics,
    )


class World:
    """A namespace with what a test needs to look at it."""

    def __init__(self, client: Client, namespace: str, kubelet: Kubelet) -> None:
        self.client, self.namespace, self.kubelet = client, namespace, kubelet

    async def apply(self, obj: dict[str, Any]) -> None:
        """Create the job in our namespace."""
        meta = {"name": obj["metadata"]["name"], "namespace": self.namespace}
        meta |= {k: v for k, v in obj["metadata"].items() if k == "labels"}
        await self.client.create(FINETUNEJOBS, self.namespace, {**obj, "metadata": meta})

    async def job(self, name: str = "bot") -> dict[str, Any]:
        """The FineTuneJob."""
        return await self.client.get(FINETUNEJOBS, self.namespace, name)

    async def patch(self, spec: dict[str, Any]) -> None:
        """Change its spec."""
        await self.client.patch(FINETUNEJOBS, self.namespace, "bot", {"spec": spec})

    async def until(self, true: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """The FineTuneJob, once that holds of it."""
        job: dict[str, Any] = {}

        async def holds() -> bool:
            nonlocal job
            job = await self.job()
            return bool(true(job))

        await eventually(holds, lambda: json.dumps(job.get("status"), indent=1))
        return job

    async def jobs(self) -> list[dict[str, Any]]:
        """All attempts' Jobs."""
        return await self.client.list(JOBS, self.namespace)

    async def pods(self) -> list[dict[str, Any]]:
        """All pods."""
        return await self.client.list(PODS, self.namespace)

    async def make(self, resource: Resource, obj: dict[str, Any]) -> None:
        """Create something else."""
        await self.client.create(resource, self.namespace, obj)


async def eventually(true: Callable[[], Awaitable[bool]], told: Callable[[], str] = lambda: "") -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + SECONDS
    while not await true():
        assert time.monotonic() < deadline, f"not in {SECONDS} s: {told()}"
        await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def world(
    plane: ControlPlane, namespace: str, *, operator: bool = True, **ends: list[End]
) -> AsyncIterator[World]:
    """A stand-in kubelet and, unless told otherwise, an operator in this process."""
    async with await Client.connect(plane.kubeconfig) as client, await Client.connect(plane.kubeconfig) as own:
        kubelet = Kubelet(own, namespace, ends)
        stop = asyncio.Event()
        tasks = [asyncio.create_task(kubelet.run())]
        if operator:
            tasks.append(asyncio.create_task(operate(settings(namespace), client, CollectorRegistry(), stop)))
        try:
            yield World(own, namespace, kubelet)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            stop.set()
            if operator:
                await asyncio.wait({tasks[1]}, timeout=SECONDS)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def condition(job: dict[str, Any], kind: str) -> tuple[str, str] | None:
    """(status, reason)."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return next(((c["status"], c["reason"]) for c in conditions if c["type"] == kind), None)


def line(job: dict[str, Any], stage: str) -> dict[str, Any]:
    """That stage's line."""
    stages = (job.get("status") or {}).get("stages") or []
    return next((s for s in stages if s["name"] == stage), {})


def is_(kind: str) -> Callable[[dict[str, Any]], bool]:
    """The condition is True."""
    return lambda job: (condition(job, kind) or ("", ""))[0] == "True"


def test_a_job_runs_to_its_end(plane: ControlPlane, namespace: str) -> None:
    """One Job for each stage, in order; artifacts and report in the status; few writes; Events tell of it."""

    async def scenario() -> None:
        ends = {
            "gguf": [End(message=committed("gguf", "Q4_K_M", "Q8_0"))],
            "report": [End(message=committed("report", "index.html"))],
        }
        async with world(plane, namespace, **ends) as here:
            await here.apply(raw_job(SFT, MERGE, GGUF))
            job = await here.until(is_("Complete"))
            order = ["prepare", "baseline", "sft", "merge", "gguf", "evaluate", "report"]
            assert here.kubelet.started == [(stage, 1) for stage in order]
            assert [j["metadata"]["name"] for j in sorted(await here.jobs(), key=lambda j: j["metadata"]["name"])] == (
                sorted(line(job, stage)["job"] for stage in order)
            )
            assert [(a["stage"], a["name"]) for a in job["status"]["artifacts"]] == [
                ("gguf", "Q4_K_M"),
                ("gguf", "Q8_0"),
                ("report", "index.html"),
            ]
            assert job["status"]["reportURI"] == "s3://b/report/index.html"
            assert job["status"]["summary"] == "Complete"
            assert all(line(job, stage)["state"] == "Complete" for stage in order)
            # A condition for each of: started, running, ended; a stage that ends and the next that starts share one.
            assert job["metadata"]["generation"] == 1

            async def told() -> bool:
                events = await here.client.list(EVENTS, namespace, field_selector="involvedObject.kind=FineTuneJob")
                reasons = {event["reason"] for event in events}
                return {"StagePending", "StageRunning", "StageComplete", "Completed"} <= reasons

            await eventually(told)

    asyncio.run(scenario())


def test_writes_are_few(plane: ControlPlane, namespace: str) -> None:
    """At most three for each stage and three more, Jobs and statuses together, with several jobs side by side."""

    async def scenario() -> None:
        async with world(plane, namespace) as here:
            names = ["one", "two", "three"]
            version = [page.resource_version async for page in here.client.pages(FINETUNEJOBS, namespace)][-1]
            for name in names:
                await here.apply({**raw_job(*SMALL), "metadata": {"name": name}})

            async def all_complete() -> bool:
                return all([is_("Complete")(await here.job(name)) for name in names])

            await eventually(all_complete)
            events = here.client.watch(FINETUNEJOBS, namespace, resource_version=version, timeout=2)
            writes = Counter([obj["metadata"]["name"] async for kind, obj in events if kind == "MODIFIED"])
            made = Counter([job["metadata"]["ownerReferences"][0]["name"] for job in await here.jobs()])
            for name in names:
                assert made[name] == len(ALL)
                assert len(ALL) < writes[name] + made[name] <= 3 * len(ALL) + 3

    asyncio.run(scenario())


def test_failures_are_retried_and_counted(plane: ControlPlane, namespace: str) -> None:
    """A bug is tried again after a while, a preemption at once and without being counted."""

    async def scenario() -> None:
        ends = [End(code=75), End(code=70, message='{"error": "KeyError: 1"}')]
        async with world(plane, namespace, sft=ends) as here:
            await here.apply(raw_job(*SMALL))
            job = await here.until(lambda j: line(j, "sft").get("state") == "Retrying" and line(j, "sft")["failures"])
            assert (line(job, "sft")["reason"], line(job, "sft")["message"]) == ("StageError", "KeyError: 1")
            job = await here.until(is_("Complete"))
            assert (line(job, "sft")["attempt"], line(job, "sft")["failures"]) == (3, 1)
            assert [a for s, a in here.kubelet.started if s == "sft"] == [1, 2, 3]

    asyncio.run(scenario())


def test_bad_data_is_final_and_stops_the_siblings(plane: ControlPlane, namespace: str) -> None:
    """The stage's own words stand in the status; the other branch is stopped and nothing new starts."""

    async def scenario() -> None:
        branches = [SFT, DPO | {"name": "a", "from": "sft"}, DPO | {"name": "b", "from": "sft"}]
        words = "s3://data/pairs.jsonl:3: chosen equals rejected"
        ends = {"a": [End(code=65, message=json.dumps({"error": words}))], "b": [End(waits=True)]}
        async with world(plane, namespace, **ends) as here:
            await here.apply(raw_job(*branches))
            job = await here.until(is_("Failed"))
            assert condition(job, "Failed") == ("True", "StageFailed")
            assert (line(job, "a")["state"], line(job, "a")["reason"], line(job, "a")["message"]) == (
                "Failed",
                "BadData",
                words,
            )

            async def stopped() -> bool:
                return not [p for p in await here.pods() if p["status"]["phase"] == "Running"]

            await eventually(stopped)
            assert {stage for stage, _ in here.kubelet.started} <= {"prepare", "baseline", "sft", "a", "b"}

    asyncio.run(scenario())


def test_an_invalid_spec_makes_no_pod(plane: ControlPlane, namespace: str) -> None:
    """What only our rules can see is told with its path and its mend."""

    async def scenario() -> None:
        async with world(plane, namespace) as here:
            await here.apply(raw_job(MERGE))
            job = await here.until(is_("Failed"))
            assert condition(job, "Accepted") == ("False", "InvalidSpec")
            (failed,) = [c for c in job["status"]["conditions"] if c["type"] == "Failed"]
            assert "spec.pipeline[0].merge: there is no adapter to merge" in failed["message"]
            assert await here.jobs() == []

    asyncio.run(scenario())


def test_suspend_saves_and_resume_goes_on(plane: ControlPlane, namespace: str) -> None:
    """The Job is deleted in the foreground, Suspended is True only once nothing runs, finished stages stay finished."""

    async def scenario() -> None:
        async with world(plane, namespace, sft=[End(waits=True)]) as here:
            await here.apply(raw_job(*SMALL))
            await here.until(lambda j: line(j, "sft").get("state") == "Running")
            await asyncio.sleep(1.1)  # the API server keeps whole seconds
            await here.patch({"suspend": True})
            job = await here.until(is_("Suspended"))
            assert [p for p in await here.pods() if p["status"]["phase"] == "Running"] == []
            assert (line(job, "sft")["state"], line(job, "prepare")["state"]) == ("Suspended", "Complete")
            await here.patch({"suspend": False})
            job = await here.until(is_("Complete"))
            assert condition(job, "Suspended") == ("False", "Resumed")
            assert (line(job, "sft")["attempt"], line(job, "sft")["failures"]) == (2, 0)
            assert line(job, "sft")["runningSeconds"] != "0.0"  # the deleted attempt's time is counted
            assert here.kubelet.started.count(("prepare", 1)) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("obstacle", "template", "state", "reason", "words"),
    [
        ({"pods": "0"}, {}, "Pending", "PodRefused", "exceeded quota"),
        ({"count/jobs.batch": "0"}, {}, "Pending", "JobRefused", "exceeded quota"),
        (None, {"serviceAccountName": "nobody"}, "Pending", "PodRefused", "nobody"),
        (None, {"priorityClassName": "none-such"}, "Pending", "PodRefused", "none-such"),
        (None, {"nodeSelector": {"not a key": "x"}}, "Pending", "JobRefused", "not a key"),
    ],
    ids=["quota of pods", "quota of Jobs", "no service account", "no priority class", "a template that is wrong"],
)
def test_what_keeps_a_pod_from_being_made_is_told(
    plane: ControlPlane,
    namespace: str,
    obstacle: dict[str, str] | None,
    template: dict[str, Any],
    state: str,
    reason: str,
    words: str,
) -> None:
    """In the words of who refused it; once the obstacle is gone the job goes on by itself."""

    async def scenario() -> None:
        quotas = Resource("", "v1", "resourcequotas")
        async with world(plane, namespace) as here:
            if obstacle:
                quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "q"}}
                await here.make(quotas, quota | {"spec": {"hard": obstacle}})

                async def counted() -> bool:
                    return "used" in (await here.client.get(quotas, namespace, "q")).get("status", {})

                await eventually(counted)
            await here.apply(raw_job(*SMALL, template=template))
            job = await here.until(lambda j: line(j, "prepare").get("reason") == reason)
            assert line(job, "prepare")["state"] == state
            assert words in line(job, "prepare")["message"]
            assert f"Pending prepare: {reason}: " in job["status"]["summary"]
            if obstacle:
                await here.client.delete(quotas, namespace, "q")
                await here.until(lambda j: line(j, "prepare").get("state") == "Complete")

    asyncio.run(scenario())


def test_the_schedulers_words_reach_the_status(plane: ControlPlane, namespace: str) -> None:
    """As the pod's condition has them."""

    async def scenario() -> None:
        words = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."
        unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
        async with world(plane, namespace) as here:
            task = here.kubelet
            task.ends = {"prepare": [End(waits=True)]}
            await here.apply(raw_job(*SMALL))
            await here.until(lambda j: line(j, "prepare").get("state") == "Running")
            (pod,) = await here.pods()
            status = {"status": {"phase": "Pending", "conditions": [unplaced]}}
            await here.client.patch(
                PODS,
                namespace,
                pod["metadata"]["name"],
                status,
                subresource="status",
                content_type=STRATEGIC_PATCH,
            )
            job = await here.until(lambda j: line(j, "prepare").get("reason") == "Unschedulable")
            assert job["status"]["summary"] == f"Pending prepare: Unschedulable: {words}"

    asyncio.run(scenario())


def test_deleting_a_job_deletes_its_children(plane: ControlPlane, namespace: str) -> None:
    """Jobs and pods go; one of the same name that is made at once starts from the beginning with Jobs of its own."""

    async def scenario() -> None:
        async with world(plane, namespace, sft=[End(waits=True)]) as here:
            await here.apply(raw_job(*SMALL))
            job = await here.until(lambda j: line(j, "sft").get("state") == "Running")
            before = {j["metadata"]["uid"] for j in await here.jobs()}
            here.kubelet.ends = {}
            await here.client.delete(FINETUNEJOBS, namespace, "bot", propagation="Background")
            await here.apply(raw_job(*SMALL))
            again = await here.until(is_("Complete"))
            assert again["metadata"]["uid"] != job["metadata"]["uid"]

            async def old_ones_gone() -> bool:
                return not before & {j["metadata"]["uid"] for j in await here.jobs()}

            await eventually(old_ones_gone)
            names = {line(again, stage)["job"] for stage in ALL}
            assert names == {j["metadata"]["name"] for j in await here.jobs()}

    asyncio.run(scenario())


def test_a_finished_record_is_deleted_if_asked(plane: ControlPlane, namespace: str) -> None:
    """ttlSecondsAfterFinished: 1."""

    async def scenario() -> None:
        async with world(plane, namespace) as here:
            await here.apply(raw_job(SFT, ttlSecondsAfterFinished=1, evaluation={"skip": True}))

            async def gone() -> bool:
                try:
                    await here.job()
                except NotFoundError:
                    return True
                return False

            await eventually(gone)
            assert [stage for stage, _ in here.kubelet.started] == ["prepare", "sft"]

    asyncio.run(scenario())


def test_kueues_labels_are_passed_on_and_its_word_is_obeyed(plane: ControlPlane, namespace: str) -> None:
    """A Job that is held back is Queued; we never write its ``suspend``."""

    async def scenario() -> None:
        async with world(plane, namespace) as here:
            here.kubelet.ends = {"prepare": [End(waits=True)]}
            job = raw_job(SFT, evaluation={"skip": True})
            job["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "gpus"}
            await here.apply(job)
            await here.until(lambda j: line(j, "prepare").get("state") == "Running")
            (child,) = await here.jobs()
            assert child["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
            assert child["spec"]["suspend"] is False
            await asyncio.sleep(1.1)  # the API server keeps whole seconds
            await here.client.patch(JOBS, namespace, child["metadata"]["name"], {"spec": {"suspend": True}})
            await here.until(lambda j: line(j, "prepare").get("state") == "Queued")
            await here.until(lambda j: float(line(j, "prepare").get("runningSeconds", 0)) >= 1)  # it counts already
            here.kubelet.ends = {}
            await here.client.patch(JOBS, namespace, child["metadata"]["name"], {"spec": {"suspend": False}})
            await here.until(is_("Complete"))

    asyncio.run(scenario())


def test_what_a_stage_reports_stands_in_the_status(plane: ControlPlane, namespace: str) -> None:
    """Posted by the stage's own code, with the pod's own token and the certificates that the operator published."""

    async def scenario() -> None:
        async with world(plane, namespace, sft=[End(waits=True)]) as here:
            await here.apply(raw_job(*SMALL))
            await here.until(lambda j: line(j, "sft").get("state") == "Running")
            (pod,) = [p for p in await here.pods() if p["metadata"]["labels"]["finetune.dev/stage"] == "sft"]
            container = pod["spec"]["containers"][0]
            url = next(v["value"] for v in container["env"] if v["name"] == "FINETUNE_PROGRESS_URL")
            bound = {"kind": "Pod", "apiVersion": "v1", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
            request = {"spec": {"audiences": ["finetune.dev/progress"], "boundObjectRef": bound}}
            answer = await here.client.transport.request(
                "POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/default/token", body=request
            )

            async def published() -> bool:
                with contextlib.suppress(NotFoundError):
                    await here.client.get(CONFIG_MAPS, namespace, "finetune-progress")
                    return True
                return False

            await eventually(published)
            trusted = await here.client.get(CONFIG_MAPS, namespace, "finetune-progress")

            async def told() -> bool:
                """As often as it takes: the operator's cache may not have the pod yet."""
                code = await asyncio.to_thread(post, url, answer["status"]["token"], trusted["data"]["ca.pem"])
                return code == 204

            await eventually(told)
            job = await here.until(lambda j: line(j, "sft").get("checkpoint"))
            assert line(job, "sft")["progress"]["step"] == 3
            assert line(job, "sft")["checkpoint"] == {"step": 2, "uri": "s3://b/checkpoint"}
            assert job["status"]["progress"] == "2/6 30%"
            assert job["status"]["eta"] == "1m"

    asyncio.run(scenario())


def post(url: str, token: str, authority: str) -> int:
    """What the stage's poster sends; the answer's code."""
    body = {
        "step": 3,
        "totalSteps": 10,
        "percent": 30,
        "etaSeconds": 70,
        "checkpoint": {"step": 2, "uri": "s3://b/checkpoint"},
    }
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    )
    context = ssl.create_default_context(cadata=authority)
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_follower_queues_nothing(plane: ControlPlane, namespace: str) -> None:
    """Nobody would take it: for months the keys of all jobs that ever were would only become more."""

    async def scenario() -> None:
        registry = CollectorRegistry()
        async with await Client.connect(plane.kubeconfig, metrics=Metrics(registry)) as client:
            leader = {"holderIdentity": "somebody else", "leaseDurationSeconds": 3600, "leaseTransitions": 0}
            lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "finetune-operator"}}
            await client.create(LEASES, namespace, {**lease, "spec": leader})
            stop = asyncio.Event()
            operator = asyncio.create_task(operate(settings(namespace), client, registry, stop))
            here = World(client, namespace, Kubelet(client, namespace))
            await here.apply(raw_job(*SMALL))

            async def seen() -> bool:
                return registry.get_sample_value("finetune_jobs", {"state": "Waiting"}) == 1

            await eventually(seen)
            assert not registry.get_sample_value("workqueue_adds_total", {"name": "finetunejobs"})
            stop.set()
            await operator

    asyncio.run(scenario())


# ---------------------------------------------------------------- operators that die


def operator_environment(plane: ControlPlane, namespace: str, identity: str) -> dict[str, str]:
    """What the chart gives an operator as a process of its own."""
    given = settings(namespace, identity)
    return {
        "KUBECONFIG": str(plane.kubeconfig),
        "FINETUNE_TRAINER_IMAGE": "trainer:1",
        "FINETUNE_GGUF_IMAGE": "gguf:1",
        "FINETUNE_NAMESPACES": namespace,
        "POD_NAMESPACE": namespace,
        "POD_NAME": identity,
        "FINETUNE_HEALTH_PORT": str(given.health_port),
        "FINETUNE_METRICS_PORT": str(given.metrics_port),
        "FINETUNE_PROGRESS_SERVICE": "localhost",
        "FINETUNE_PROGRESS_PORT": str(given.progress_port),
    }


def start_operator(plane: ControlPlane, namespace: str, log: Path, identity: str = "one") -> subprocess.Popen[bytes]:
    """An operator as the image starts it."""
    environment = {**os.environ, **operator_environment(plane, namespace, identity)}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "finetune_operator"], env=environment, stdout=output, stderr=output
        )


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Operators of a test; none outlives it."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.wait()


async def attempts(here: World) -> list[tuple[str, str]]:
    """(stage, attempt) of every Job there is: each must stand there once."""
    labels = [job["metadata"]["labels"] for job in await here.jobs()]
    return sorted((found["finetune.dev/stage"], found["finetune.dev/attempt"]) for found in labels)


async def until_training(here: World) -> None:
    """A job, brought to its training by the operator that was started."""
    await here.apply(raw_job(*SMALL))
    await here.until(lambda j: line(j, "sft").get("state") == "Running")


def test_an_operator_that_is_killed_twenty_times(plane: ControlPlane, namespace: str, tmp_path: Path) -> None:
    """At random moments and right after a Job was made: no attempt has two, no stage runs again, the job ends well."""
    pipeline = [SFT, *(DPO | {"name": f"dpo-{number}"} for number in range(20)), MERGE]
    stages = ["prepare", "baseline", *(stage["name"] for stage in pipeline), "evaluate", "report"]
    moments = random.Random(20)

    async def scenario() -> None:
        slow = {stage: [End(seconds=0.5, message=committed(stage))] for stage in stages}
        async with world(plane, namespace, operator=False, **slow) as here:
            await here.apply(raw_job(*pipeline))
            made = asyncio.Event()
            watching = asyncio.create_task(tell_of_new_jobs(here, made))
            with operators(tmp_path / "operator.log") as all_operators:

                def start(name: str) -> int:
                    return all_operators.start(operator_environment(plane, namespace, name))

                for number in range(20):
                    made.clear()
                    pid = start(f"one-{number}")
                    if number % 2:
                        await asyncio.sleep(moments.uniform(0, 1.5))
                    else:  # between a Job and its record
                        await asyncio.wait_for(made.wait(), SECONDS)
                    await asyncio.to_thread(all_operators.kill, pid)
                    # As if the Lease had run out: nobody is there to give it back.
                    with contextlib.suppress(NotFoundError):
                        await here.client.delete(LEASES, namespace, "finetune-operator", propagation="Background")
                assert not is_("Complete")(await here.job())
                start("last")
                job = await here.until(is_("Complete"))
            watching.cancel()
            assert here.kubelet.started == [(stage, 1) for stage in stages]
            assert await attempts(here) == sorted((stage, "1") for stage in stages)
            assert all(line(job, stage)["failures"] == 0 for stage in stages)

    asyncio.run(scenario())


async def tell_of_new_jobs(here: World, made: asyncio.Event) -> None:
    """Set the event at the moment at which a Job of the namespace comes to be, until it is cancelled."""
    version = (await here.job())["metadata"]["resourceVersion"]
    async for kind, _ in here.client.watch(JOBS, here.namespace, resource_version=version, timeout=3600):
        if kind == "ADDED":
            made.set()


def test_a_leader_that_was_frozen_writes_nothing(
    plane: ControlPlane, namespace: str, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    """Stopped past its lease and thawed, it finds out before it writes, and ends; the other replica has gone on."""

    async def scenario() -> None:
        async with world(plane, namespace, operator=False, sft=[End(waits=True)]) as here:
            first = start_operator(plane, namespace, tmp_path / "first.log", "first")
            processes.append(first)
            await until_training(here)
            second = start_operator(plane, namespace, tmp_path / "second.log", "second")
            processes.append(second)
            first.send_signal(signal.SIGSTOP)

            async def second_leads() -> bool:
                lease = await here.client.get(LEASES, namespace, "finetune-operator")
                return str(lease["spec"].get("holderIdentity")).startswith("second")

            await eventually(second_leads)
            # Something to do for both, at the very moment at which the first one thaws.
            await here.patch({"suspend": True})
            first.send_signal(signal.SIGCONT)
            await here.until(is_("Suspended"))
            assert await asyncio.to_thread(first.wait, SECONDS) == 1
            written = await here.client.list(EVENTS, namespace, field_selector="involvedObject.kind=FineTuneJob")
            after = [e for e in written if e["reason"] in ("Suspended", "StageSuspended")]
            assert after
            assert {e.get("reportingInstance") or e["source"].get("host") for e in after} == {"second"}
            await here.patch({"suspend": False})
            await here.until(is_("Complete"))

    asyncio.run(scenario())


def test_an_operator_that_is_told_to_stop(
    plane: ControlPlane, namespace: str, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    """It gives the Lease back and ends with 0; stages go on meanwhile, and are found by the next operator."""

    async def scenario() -> None:
        async with world(plane, namespace, operator=False, sft=[End(waits=True)]) as here:
            first = start_operator(plane, namespace, tmp_path / "first.log", "first")
            processes.append(first)
            await until_training(here)
            first.terminate()
            assert await asyncio.to_thread(first.wait, SECONDS) == 0
            lease = await here.client.get(LEASES, namespace, "finetune-operator")
            assert not lease["spec"].get("holderIdentity")
            (running,) = [p for p in await here.pods() if p["status"]["phase"] == "Running"]
            processes.append(start_operator(plane, namespace, tmp_path / "second.log", "second"))
            await here.patch({"suspend": True})
            job = await here.until(is_("Suspended"))
            assert line(job, "sft")["attempt"] == 1
            assert running["metadata"]["uid"] not in {p["metadata"]["uid"] for p in await here.pods()}

    asyncio.run(scenario())
