"""The controller when its caches lag, each by as much as it likes, and when the API server has its moods."""

import asyncio
import copy
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry
from tests.builders import MERGE, NOW, SFT, raw_job
from tests.engine.standin_kubelet import committed

from finetune_api.status import Progress
from finetune_api.validate import parse
from finetune_operator import slim
from finetune_operator.controller import Controller
from finetune_operator.kube.client import Client, Resource
from finetune_operator.kube.errors import (
    AlreadyExistsError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    KubeError,
    NotFoundError,
    ServerError,
)
from finetune_operator.kube.objects import Object, controller_uid, key_of
from finetune_operator.kube.store import Store
from finetune_operator.lookup import Reported
from finetune_operator.metrics import JobMetrics
from finetune_operator.plan.pods import PodSettings, node_service

KEY = "team/bot"
_SLIM = {"finetunejobs": slim.finetunejob, "jobs": slim.job, "pods": slim.pod}


class World:
    """An API server, and caches that show of it what a test lets through."""

    def __init__(self) -> None:
        self.now: datetime = NOW
        self.there: dict[str, dict[str, Object]] = {
            **{"finetunejobs": {}, "jobs": {}, "pods": {}, "events": {}, "services": {}}
        }
        self.made: list[tuple[str, str]] = []
        """(stage, attempt) of every Job that was ever made."""
        self.asked: list[str] = []
        """Verb and kind of every request."""
        self.told: list[tuple[str, str, str]] = []
        self.fails: dict[str, list[KubeError]] = {}
        """By verb and kind: what the next requests get for an answer."""
        self.before: Callable[[str], None] = lambda asked: None
        """Called before each request is carried out."""
        self.reported = Reported()
        """What every pod said last."""
        self._version = 0
        self._caches = {plural: _Shown() for plural in ("finetunejobs", "jobs", "pods")}
        self.start()

    def start(self) -> None:
        """A new controller that remembers nothing, with the caches as they are."""
        self.controller = Controller(
            cast(Client, self),
            **{name: cast(Any, cache) for name, cache in self._caches.items()},
            enqueue=lambda key: None,
            recorder=self,
            settings=PodSettings(trainer_image="trainer", gguf_image="gguf"),
            metrics=JobMetrics(CollectorRegistry()),
            clock=lambda: self.now,
            reported=lambda uid: self.reported,
        )

    # -- the world

    def put(self, plural: str, obj: Object) -> Object:
        """Make or change it behind everybody's back."""
        self._version += 1
        obj = copy.deepcopy(obj)
        obj["metadata"].setdefault("uid", f"uid-{self._version}")
        obj["metadata"].setdefault("creationTimestamp", self.now.isoformat())
        obj["metadata"]["resourceVersion"] = str(self._version)
        self.there[plural][key_of(obj)] = obj
        return obj

    def drop(self, plural: str, obj: Object) -> None:
        """Remove it at once."""
        del self.there[plural][key_of(obj)]

    def show(self, *plurals: str) -> None:
        """Let caches see what there is."""
        told = {
            "finetunejobs": self.controller.on_finetunejob,
            "jobs": self.controller.on_job,
            "pods": self.controller.on_pod,
        }
        for plural in plurals or ("finetunejobs", "jobs", "pods"):
            store = self._caches[plural].store
            slimmed = _SLIM[plural]
            changes = [c for obj in self.there[plural].values() for c in store.put(slimmed(copy.deepcopy(obj)))]
            changes += [c for key in store.keys() - set(self.there[plural]) for c in store.remove(key)]
            for old, new in changes:
                told[plural](old, new)

    def apply(self, *stages: dict[str, Any], **spec: Any) -> Object:
        """A FineTuneJob."""
        obj = raw_job(*(stages or (SFT, MERGE)), evaluation={"skip": True}, **spec)
        del obj["metadata"]["uid"]
        return self.put("finetunejobs", obj)

    def change(self, **spec: Any) -> None:
        """What the CRD lets a user change of the FineTuneJob."""
        raw = self.there["finetunejobs"][KEY]
        meta = {**raw["metadata"], "generation": raw["metadata"]["generation"] + 1}
        self.put("finetunejobs", {**raw, "metadata": meta, "spec": {**raw["spec"], **spec}})

    def turn(self, *plurals: str) -> float | None:
        """Show, then reconcile once; what failed there is the queue's to try again."""
        self.show(*plurals)
        return self.look()

    def look(self) -> float | None:
        """Reconcile by what the caches show now."""
        try:
            return asyncio.run(self.controller.reconcile(KEY))
        except (ConflictError, ServerError):
            return 0.0

    def job(self, stage: str) -> Object:
        """The newest Job of a stage."""
        return [j for j in self.there["jobs"].values() if j["metadata"]["labels"]["finetune.dev/stage"] == stage][-1]

    def pod(self, stage: str, phase: str = "Running", index: int = 0, **ended: Any) -> Object:
        """The pod of the newest Job of a stage, in that phase; or that of another of its nodes."""
        job = self.job(stage)
        state = {"terminated": {"exitCode": 0, **ended}} if ended else {"running": {"startedAt": self.now.isoformat()}}
        owner = {"kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"], "controller": True}
        name = f"pod-{stage}-{index}" if index else f"pod-{stage}"
        labels = {**job["metadata"]["labels"], "batch.kubernetes.io/job-completion-index": str(index)}
        meta = {"name": name, "namespace": "team", "labels": labels}
        known = self.there["pods"].get(f"team/{name}", {"metadata": {}})["metadata"]
        return self.put(
            "pods",
            {
                "metadata": {**known, **meta, "ownerReferences": [owner]},
                "spec": {"containers": [{"name": "stage", "image": "x"}]},
                "status": {"phase": phase, "containerStatuses": [{"name": "stage", "image": "x", "state": state}]},
            },
        )

    def end(self, stage: str, kind: str = "Complete", message: str = "") -> Object:
        """The Job controller's word on the newest Job of a stage."""
        over = {"type": kind, "status": "True", "message": message, "lastTransitionTime": self.now.isoformat()}
        return self.put("jobs", {**self.job(stage), "status": {"conditions": [over]}})

    def succeed(self, stage: str) -> None:
        """It commits its result."""
        self.pod(stage, "Succeeded", exitCode=0, message=committed(stage))
        self.end(stage)

    @property
    def status(self) -> dict[str, Any]:
        """As recorded."""
        return cast(dict[str, Any], self.there["finetunejobs"][KEY].get("status") or {})

    def line(self, stage: str) -> dict[str, Any]:
        """A stage's line in it."""
        return next((s for s in self.status.get("stages", []) if s["name"] == stage), {})

    def condition(self, kind: str) -> str:
        """Its value."""
        return next((c["status"] for c in self.status.get("conditions", []) if c["type"] == kind), "")

    def record(self, about: Object, type: str, reason: str, message: str) -> None:
        """An Event."""
        self.told.append((type, reason, message))

    # -- the client

    async def get(self, resource: Resource, namespace: str, name: str) -> Object:
        """One object."""
        self._ask("get", resource)
        return copy.deepcopy(self._found(resource, name))

    async def list(
        self, resource: Resource, namespace: str, *, label_selector: str = "", field_selector: str = ""
    ) -> list[Object]:
        """All of a Job, or all."""
        self._ask("list", resource)
        return copy.deepcopy(list(self.there[resource.plural].values()))

    async def create(self, resource: Resource, namespace: str, obj: Object) -> Object:
        """POST."""
        self._ask("create", resource)
        if key_of(obj) in self.there[resource.plural]:
            raise AlreadyExistsError
        labels = obj["metadata"]["labels"]
        if resource.plural == "jobs":
            self.made.append((labels["finetune.dev/stage"], labels["finetune.dev/attempt"]))
        return self.put(resource.plural, obj)

    async def replace_status(self, resource: Resource, namespace: str, name: str, obj: Object) -> Object:
        """PUT, if it is still what it was."""
        self._ask("status", resource)
        there = self._found(resource, name)
        if any(there["metadata"][k] != obj["metadata"][k] for k in ("uid", "resourceVersion")):
            raise ConflictError
        return self.put(resource.plural, {**there, "status": obj["status"]})

    async def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        *,
        propagation: str,
        uid: str,
        resource_version: str | None = None,
    ) -> None:
        """In the foreground, if it is still what it was: it stays until the test drops it."""
        self._ask("delete", resource)
        there = self._found(resource, name)
        if resource_version not in (None, there["metadata"]["resourceVersion"]) or uid != there["metadata"]["uid"]:
            raise ConflictError
        self.put(
            resource.plural,
            {**there, "metadata": {**there["metadata"], "deletionTimestamp": self.now.isoformat()}},
        )

    def _found(self, resource: Resource, name: str) -> Object:
        try:
            return self.there[resource.plural][f"team/{name}"]
        except KeyError:
            raise NotFoundError(name) from None

    def _ask(self, verb: str, resource: Resource) -> None:
        asked = f"{verb} {resource.plural}"
        self.asked.append(asked)
        self.before(asked)
        if self.fails.get(asked):
            raise self.fails[asked].pop(0)


class _Shown:
    def __init__(self) -> None:
        self.store = Store({"owner": lambda obj: [controller_uid(obj)]})
        self.get = self.store.get
        self.by_index = self.store.by_index


@pytest.fixture
def world() -> World:
    """With a job whose first stage was started."""
    made = World()
    made.apply()
    made.turn()
    assert made.made == [("prepare", "1")]
    made.turn()
    return made


def test_a_new_job_gets_its_first_job_before_any_word() -> None:
    """A thousand others wait for theirs; the status follows when it shows, and one refused is told at the next look."""
    world = World()
    world.apply()
    world.turn()
    assert (world.asked, world.status) == (["get finetunejobs", "create jobs"], {})
    world.turn()
    assert (world.made, world.line("prepare")["state"]) == ([("prepare", "1")], "Pending")
    world = World()
    world.fails["create jobs"] = [ForbiddenError("POST: exceeded quota")]
    world.apply()
    assert world.turn() == 0
    world.look()
    assert (world.line("prepare")["state"], world.line("prepare")["reason"]) == ("Pending", "JobRefused")


def test_no_first_job_is_made_by_an_old_look(world: World) -> None:
    """A new leader whose cache shows no status, though the stage is done and its Job gone, asks first."""
    world.succeed("prepare")
    world.turn()
    world.drop("jobs", world.job("prepare"))
    bare = {key: value for key, value in world.there["finetunejobs"][KEY].items() if key != "status"}
    world._caches = {name: _Shown() for name in world._caches}
    world._caches["finetunejobs"].store.put(
        slim.finetunejob({**bare, "metadata": {**bare["metadata"], "resourceVersion": "1"}})
    )
    world.start()
    assert world.look() == 1
    assert world.made == [("prepare", "1"), ("sft", "1")]


@pytest.mark.parametrize("restarted", [False, True])
def test_a_spec_that_changes_before_the_first_job_shows_makes_no_second(restarted: bool) -> None:
    """Neither by the operator that made it, nor by one that took over and cannot know."""
    world = World()
    world.apply()
    world.turn()
    world.change(pendingDeadlineSeconds=60)
    if restarted:
        world.start()
    for _ in range(2):
        world.turn("finetunejobs")
    assert world.made == [("prepare", "1")]
    world.succeed("prepare")
    world.turn()
    assert (world.line("prepare")["state"], world.line("prepare")["attempt"]) == ("Complete", 1)


def test_suspended_is_not_said_before_the_first_job_has_shown() -> None:
    """It runs, though no cache says so: it is looked for, waited for, and stopped like any other."""
    world = World()
    world.apply()
    world.turn()
    world.change(suspend=True)
    assert world.turn("finetunejobs") == 1
    assert world.status == {}
    world.turn()
    assert world.condition("Suspended") == "False"
    assert "deletionTimestamp" in world.job("prepare")["metadata"]
    world.drop("jobs", world.job("prepare"))
    world.turn()
    assert world.condition("Suspended") == "True"
    new = World()
    new.apply(suspend=True)
    new.turn()
    assert (new.condition("Suspended"), new.made) == ("True", [])


def test_an_attempt_is_made_once_however_late_it_shows(world: World) -> None:
    """A cache of Jobs that lags makes no second POST succeed, and no second attempt."""
    world.start()
    for _ in range(3):
        world.turn("finetunejobs")
    assert world.made == [("prepare", "1")]
    world.succeed("prepare")
    world.turn()
    assert world.line("prepare")["state"] == "Complete"


def test_a_running_attempt_is_not_lost_because_the_cache_of_jobs_lags(world: World) -> None:
    """A new leader whose cache has not seen the Job yet asks for it before it starts another one."""
    world.pod("prepare")
    world.turn()
    assert world.line("prepare")["state"] == "Running"
    world._caches["jobs"] = _Shown()
    world.start()
    world.now += timedelta(seconds=20)
    assert world.look() is not None
    assert world.made == [("prepare", "1")]
    assert world.line("prepare")["state"] == "Running"


def test_suspended_only_once_nothing_runs_whatever_the_cache_says(world: World) -> None:
    """The Job was made but is not shown yet: it is stopped first, and no other starts beside it on resuming."""
    world._caches["jobs"] = _Shown()
    world.start()
    world.put("finetunejobs", {**world.there["finetunejobs"][KEY], "spec": raw_job(SFT, suspend=True)["spec"]})
    world.turn("finetunejobs")
    assert world.condition("Suspended") == "False"
    assert "deletionTimestamp" in world.job("prepare")["metadata"]
    world.drop("jobs", world.job("prepare"))
    world.turn()
    assert world.condition("Suspended") == "True"


def test_what_a_pod_said_is_read_though_its_cache_lags(world: World) -> None:
    """The Job is over, the pod is shown at work: its last state is asked for before the attempt is judged."""
    world.pod("prepare")
    world.turn()
    world.succeed("prepare")
    world.turn("finetunejobs", "jobs")
    assert (world.line("prepare")["state"], world.line("prepare")["failures"]) == ("Complete", 0)


def test_a_recorded_stage_does_not_run_again_by_an_old_status(world: World) -> None:
    """A new leader whose caches lag, all of them: the stage has finished since, and its Job was deleted."""
    before = copy.deepcopy(world.there["finetunejobs"][KEY])
    world.succeed("prepare")
    world.turn()
    world.drop("jobs", world.job("prepare"))
    world.show()
    world._caches["finetunejobs"] = _Shown()
    world._caches["finetunejobs"].store.put(before)
    world._caches["jobs"] = _Shown()
    world.start()
    assert world.look() == 1
    assert world.made == [("prepare", "1"), ("sft", "1")]


def test_a_job_that_is_over_is_not_deleted_as_a_stray(world: World) -> None:
    """A new leader whose cache still shows it at work: its pod and log stay."""
    world.pod("prepare")
    world.turn()
    shown = world._caches["jobs"]
    world.succeed("prepare")
    world.turn("finetunejobs")
    before = copy.deepcopy(list(shown.store))
    world.turn()
    world.turn()
    assert world.line("prepare")["state"] == "Complete"
    world._caches["jobs"] = _Shown()
    for job in before:
        world._caches["jobs"].store.put(job)
    world.start()
    world.look()
    assert not [j for j in world.there["jobs"].values() if "deletionTimestamp" in j["metadata"]]


def test_a_job_of_the_same_name_meets_nothing_of_the_old_one(world: World) -> None:
    """The old one's Jobs are deleted late: their results and ends are not the new job's."""
    world.succeed("prepare")
    world.show()
    old = world.job("prepare")
    world.drop("finetunejobs", world.there["finetunejobs"][KEY])
    world.apply()
    world.turn("finetunejobs")
    world.turn("finetunejobs")
    assert world.line("prepare")["state"] == "Pending"
    world.drop("jobs", old)
    world.drop("pods", world.there["pods"]["team/pod-prepare"])
    world.turn()
    world.turn()
    assert (world.line("prepare")["state"], world.line("prepare")["attempt"]) == ("Pending", 1)


def test_a_job_that_goes_during_a_status_write_is_not_forgotten(world: World) -> None:
    """What it left is taken in by the next look."""
    world.pod("prepare")
    world.show()

    def gone(asked: str) -> None:
        world.before = lambda asked: None
        world.succeed("prepare")
        world.show("jobs", "pods")
        world.drop("jobs", world.job("prepare"))
        world.show("jobs")

    world.before = gone
    world.look()
    world.turn()
    assert (world.line("prepare")["state"], world.line("prepare")["attempt"]) == ("Complete", 1)


def test_a_job_deleted_in_the_background_is_at_work_until_its_pod_has_ended(world: World) -> None:
    """It saves: the next attempt waits for that, and Suspended is not True before."""
    world.pod("prepare")
    world.turn()
    world.drop("jobs", world.job("prepare"))
    world.turn()
    world.turn()
    assert world.made == [("prepare", "1")]
    assert world.line("prepare")["state"] == "Running"
    pod = world.there["pods"]["team/pod-prepare"]
    pod["status"] |= {"phase": "Failed"}
    pod["status"]["containerStatuses"][0]["state"] = {"terminated": {"exitCode": 75}}
    world.put("pods", pod)
    world.turn()
    world.drop("pods", pod)
    world.turn()
    assert world.made == [("prepare", "1"), ("prepare", "2")]
    assert world.line("prepare")["failures"] == 0


def test_nothing_is_remembered_of_jobs_that_are_gone_or_over(world: World) -> None:
    """Not even where nobody reconciles: a follower sees them come and go for months."""
    for number in range(3):
        world.pod("prepare")
        world.show()
        world.drop("finetunejobs", world.there["finetunejobs"][KEY])
        world.show("finetunejobs")
        world.drop("pods", world.there["pods"]["team/pod-prepare"])
        world.drop("jobs", world.job("prepare"))
        world.show()
        assert world.controller.remembered == 0
        if number < 2:
            world.apply()
            world.turn()
            world.turn()


def test_a_job_whose_labels_were_taken_away_ends_no_watch(world: World) -> None:
    """A user may do that; only this one job suffers."""
    job = world.job("prepare")
    del job["metadata"]["labels"]["finetune.dev/attempt"]
    world.put("jobs", job)
    world.show()
    world.drop("jobs", job)
    world.show()


def test_a_status_that_cannot_be_read_is_made_anew(world: World) -> None:
    """What is unreadable is left out; what the Jobs still say comes back, and nothing runs again for it."""
    world.succeed("prepare")
    world.turn()
    assert world.made == [("prepare", "1"), ("sft", "1")]
    raw = world.there["finetunejobs"][KEY]
    raw["status"]["stages"][0]["state"] = "Fabulous"
    raw["status"]["observedGeneration"] = "many"
    world.put("finetunejobs", raw)
    world.turn()
    assert world.line("prepare")["state"] == "Complete"
    assert world.made == [("prepare", "1"), ("sft", "1")]
    assert world.status["observedGeneration"] == 1


def test_a_status_that_is_refused_is_told_and_tried_again_slowly(world: World) -> None:
    """Nothing starts without a record, but the user hears why."""
    world.succeed("prepare")
    world.fails["status finetunejobs"] = [InvalidError("status.stages[0].x: Too long")]
    assert world.turn() == 60
    assert world.told[-1] == ("Warning", "StatusRefused", "status.stages[0].x: Too long")
    assert world.made == [("prepare", "1")]
    world.look()
    assert world.made == [("prepare", "1"), ("sft", "1")]


def test_words_of_any_length_fit_into_the_status(world: World) -> None:
    """The schema allows 32,768 characters."""
    world.pod("prepare", "Pending", exitCode=0)
    pod = world.there["pods"]["team/pod-prepare"]
    unplaced = {"type": "PodScheduled", "status": "False", "message": "x" * 40_000}
    world.put("pods", {**pod, "status": {"phase": "Pending", "conditions": [unplaced]}})
    world.turn()
    assert world.line("prepare")["reason"] == "Unschedulable"
    assert len(world.line("prepare")["message"]) == 4000


def test_other_words_for_the_same_trouble_are_not_written_at_once(world: World) -> None:
    """A scheduler says something new with each try: once in ten seconds is enough."""
    writes = []
    for number in range(8):
        world.pod("prepare", "Pending", exitCode=0)
        unplaced = {"type": "PodScheduled", "status": "False", "message": f"0/{number} nodes are available"}
        pod = world.there["pods"]["team/pod-prepare"]
        world.put("pods", {**pod, "status": {"phase": "Pending", "conditions": [unplaced]}})
        world.turn()
        world.turn()
        world.now += timedelta(seconds=4)
        writes.append(world.asked.count("status finetunejobs"))
    assert writes[-1] - writes[0] == 2


def test_progress_is_written_though_the_clock_was_put_back(world: World) -> None:
    """By an hour: nothing waits for the old time to come again."""
    world.pod("prepare")
    world.turn()
    world.now -= timedelta(hours=1)
    world.reported = Reported(Progress(step=7))
    world.turn()
    assert world.line("prepare")["progress"]["step"] == 7


def test_a_webhook_that_is_down_is_told(world: World) -> None:
    """It is a 500 to us: the Job is tried again, and the status says meanwhile what stands in the way."""
    world.succeed("prepare")
    world.fails["create jobs"] = [ServerError("POST /apis/batch/v1/jobs: failed calling webhook mjob.kb.io: no route")]
    world.turn()
    world.turn()
    assert world.line("sft")["reason"] == "JobRefused"
    assert world.line("sft")["message"] == "failed calling webhook mjob.kb.io: no route"
    world.now += timedelta(seconds=6)
    world.turn()
    assert world.made[-1] == ("sft", "1")


def test_events_that_cannot_be_read_hold_nothing_up(world: World) -> None:
    """They are only words."""
    world.now += timedelta(seconds=5)
    world.fails["list events"] = [ServerError("no")]
    world.succeed("prepare")
    world.put("jobs", {**world.job("prepare"), "status": {}})
    world.drop("pods", world.there["pods"]["team/pod-prepare"])
    assert world.turn() == 10
    assert world.asked[-1] == "list events"


def test_a_job_that_goes_while_its_status_is_written_is_no_error(world: World) -> None:
    """It was deleted, and the cache does not know yet."""
    world.pod("prepare")
    world.show()
    world.drop("finetunejobs", world.there["finetunejobs"][KEY])
    assert world.look() is None


def test_jobs_of_a_spec_that_cannot_be_read_any_more_are_stopped(world: World) -> None:
    """After an upgrade that knows better: Failed, and nothing goes on."""
    raw = world.there["finetunejobs"][KEY]
    raw["spec"]["pipeline"] = [{"name": "sft", "sft": {"method": "magic"}}]
    world.put("finetunejobs", raw)
    world.turn()
    assert world.condition("Failed") == "True"
    assert "deletionTimestamp" in world.job("prepare")["metadata"]


def test_what_the_scheduler_said_before_is_no_reason_any_more(world: World) -> None:
    """Once the pod has its node; what keeps the container from starting is told."""
    pod = world.pod("prepare", "Pending")
    creating = {"name": "stage", "image": "x", "state": {"waiting": {"reason": "ContainerCreating"}}}
    world.put("pods", {**pod, "status": {"phase": "Pending", "containerStatuses": [creating]}})
    event = {"metadata": {"name": "a", "namespace": "team"}, "lastTimestamp": "2026-01-01T12:00:00Z"}
    world.put("events", {**event, "reason": "FailedScheduling", "message": "0/1 nodes are available"})
    world.now += timedelta(seconds=30)
    world.turn()
    assert (world.line("prepare")["reason"], world.line("prepare").get("message", "")) == ("Starting", "")
    event = {**event, "metadata": {"name": "b", "namespace": "team"}}
    world.put("events", {**event, "reason": "FailedMount", "message": 'configmap "ca" not found'})
    world.now += timedelta(seconds=90)
    world.turn()
    assert world.line("prepare")["message"] == 'configmap "ca" not found'


def test_jobs_of_earlier_attempts_go_once_their_end_is_recorded(world: World) -> None:
    """And no earlier: a status write that fails leaves them; they are not asked for again."""
    for attempt in ("1", "2"):
        assert world.made[-1] == ("prepare", attempt)
        world.pod("prepare", "Failed", exitCode=70)
        world.end("prepare", "Failed")
        first = next(iter(world.there["jobs"].values()))
        if attempt == "2":
            world.fails["status finetunejobs"] = [ConflictError()]
            world.turn()
            assert "deletionTimestamp" not in first["metadata"]
        world.turn()
        world.now += timedelta(minutes=10)
        world.turn()
    first = world.there["jobs"][key_of(first)]
    assert "deletionTimestamp" in first["metadata"]
    world.drop("jobs", first)
    world.turn()
    world.turn()
    assert world.asked.count("delete jobs") == 1
    assert (world.line("prepare")["attempt"], world.line("prepare")["failures"]) == (3, 2)


def test_time_before_a_queue_took_the_place_away_counts(world: World) -> None:
    """Once, in the middle of an attempt; what is spent in the queue does not, and the deadline is over both times."""
    world.succeed("prepare")
    raw = world.there["finetunejobs"][KEY]
    stages = [SFT | {"activeDeadlineSeconds": 1000}, MERGE]
    world.put("finetunejobs", {**raw, "spec": raw_job(*stages, evaluation={"skip": True})["spec"]})
    world.turn()
    pod = world.pod("sft")
    world.turn()
    world.now += timedelta(seconds=600)
    world.put("jobs", {**world.job("sft"), "spec": {"suspend": True}})
    pod["metadata"]["deletionTimestamp"] = world.now.isoformat()
    world.put("pods", pod)
    world.turn()
    world.drop("pods", pod)
    for _ in range(3):
        world.turn()
        world.now += timedelta(seconds=5000)
        line = world.line("sft")
        assert (line["state"], line["attempt"], float(line["runningSeconds"])) == ("Queued", 1, 600)
    world.put("jobs", {**world.job("sft"), "spec": {"suspend": False}})
    world.pod("sft")
    wait = world.turn()
    assert world.line("sft")["state"] == "Running"
    assert wait == 400
    world.now += timedelta(seconds=399)
    world.turn()
    assert world.line("sft")["state"] == "Running"
    world.now += timedelta(seconds=1)
    world.turn()
    assert (world.line("sft")["state"], world.line("sft")["reason"]) == ("Failed", "DeadlineExceeded")


def test_a_pod_that_was_replaced_before_anybody_looked_counts(world: World) -> None:
    """The queue gave the place back at once: the pod that is gone is told from the one that runs."""
    pod = world.pod("prepare")
    world.turn()
    world.now += timedelta(seconds=60)
    pod["metadata"]["deletionTimestamp"] = world.now.isoformat()
    world.put("pods", pod)
    world.show()
    world.drop("pods", pod)
    world.show()
    world.now += timedelta(seconds=5)
    world.pod("prepare")
    world.turn()
    world.turn()
    assert float(world.line("prepare")["runningSeconds"]) == 60
    world.now += timedelta(seconds=7)
    world.pod("prepare", "Succeeded", exitCode=0, message=committed("prepare"), finishedAt=world.now.isoformat())
    world.end("prepare")
    world.turn()
    assert world.line("prepare")["state"] == "Complete"


# ---------------------------------------------------------------- several nodes


@pytest.fixture
def two() -> World:
    """With a job on two nodes whose data is prepared."""
    made = World()
    made.apply(SFT | {"resources": {"nodes": 2}})
    made.turn()
    made.turn()
    made.succeed("prepare")
    return made


def test_the_service_is_there_before_the_job_and_once(two: World) -> None:
    """One for all attempts; a stage on one node asks for none."""
    assert "create services" not in two.asked
    two.turn()
    asked = [a for a in two.asked if a in ("create services", "create jobs")]
    assert asked == ["create jobs", "create services", "create jobs"]
    (service,) = two.there["services"].values()
    job = two.there["finetunejobs"][KEY]
    assert controller_uid(service) == job["metadata"]["uid"]
    two.pod("sft", "Failed", exitCode=75)
    two.pod("sft", "Failed", index=1, exitCode=76)
    two.end("sft", "Failed")
    two.turn()
    two.now += timedelta(minutes=10)
    two.turn()
    assert two.made[-1] == ("sft", "2")
    assert list(two.there["services"].values()) == [service]


def test_an_operator_that_dies_between_service_and_job(two: World) -> None:
    """The next one finds the Service, and makes the Job."""
    two.fails["create jobs"] = [ServerError("gone")]
    two.turn()
    assert two.made == [("prepare", "1")]
    assert len(two.there["services"]) == 1
    two.start()
    two.turn()
    assert two.made == [("prepare", "1"), ("sft", "1")]
    assert len(two.there["services"]) == 1


@pytest.mark.parametrize("foreign", [True, False])
def test_a_service_that_cannot_be_had_is_told(two: World, foreign: bool) -> None:
    """No Job is made without it, since its pods would wait for a name that never resolves."""
    if foreign:
        name = node_service(parse(two.there["finetunejobs"][KEY]))["metadata"]["name"]
        two.put("services", {"metadata": {"name": name, "namespace": "team"}})
    else:
        two.fails["create services"] = [ForbiddenError("POST /api/v1/x: exceeded quota: services")]
    two.turn()
    two.turn()
    assert two.made == [("prepare", "1")]
    line = two.line("sft")
    assert (line["state"], line["reason"]) == ("Pending", "JobRefused")
    assert ("that is not ours is there" if foreign else "exceeded quota: services") in line["message"]
    two.there["services"].clear()
    two.now += timedelta(seconds=6)
    two.fails.clear()
    two.turn()
    assert two.made == [("prepare", "1"), ("sft", "1")]


def test_an_attempt_is_over_only_when_none_of_its_pods_is_left(two: World) -> None:
    """The next one starts when nothing of the last could still write or hold a GPU, whatever the Job says."""
    two.turn()
    two.pod("sft")
    two.pod("sft", index=1)
    two.turn()
    assert two.line("sft")["state"] == "Running"
    two.pod("sft", "Failed", exitCode=70)
    two.end("sft", "Failed")
    two.turn()
    assert two.line("sft")["state"] == "Running"
    two.pod("sft", "Failed", index=1, exitCode=76)
    two.turn()
    line = two.line("sft")
    assert (line["state"], line["reason"], line["failures"]) == ("Retrying", "StageError", 1)


def test_progress_is_that_of_the_first_pod(two: World) -> None:
    """The others say nothing of it."""
    two.turn()
    first = two.pod("sft")
    two.pod("sft", index=1)
    told = {first["metadata"]["uid"]: Reported(Progress(step=7))}
    two.controller._lookup._reported = lambda uid: told.get(uid, Reported())
    two.turn()
    assert two.line("sft")["progress"]["step"] == 7
