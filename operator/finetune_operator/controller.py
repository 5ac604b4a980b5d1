"""The cluster's shell round ``plan()``: it reads caches, writes one status, then makes and deletes Jobs as planned.

The status is recorded before anything is done for it, guarded by ``resourceVersion``: a controller whose cache lags, or
that should no longer lead, fails there and does nothing. All that it keeps in memory may be lost at any moment.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from finetune_api.status import CheckpointStatus, JobStatus, Progress, StageState
from finetune_api.types import API_VERSION, KIND, FineTuneJob
from finetune_api.validate import InvalidSpec, parse
from finetune_operator.cache import Cache
from finetune_operator.kube.client import Client, Resource
from finetune_operator.kube.errors import AlreadyExistsError, ForbiddenError, InvalidError, NotFoundError
from finetune_operator.kube.objects import Object, key_of
from finetune_operator.metrics import JobMetrics
from finetune_operator.observe import child_of, gone
from finetune_operator.plan.children import Child, NewChild, Plan
from finetune_operator.plan.events import changes
from finetune_operator.plan.plan import plan
from finetune_operator.plan.pods import JOB_LABEL, PodSettings, batch_job
from finetune_operator.plan.status import holds, invalid

_log = logging.getLogger("finetune.controller")

FINETUNEJOBS = Resource("finetune.dev", "v1alpha1", "finetunejobs")
JOBS = Resource("batch", "v1", "jobs")
PODS = Resource("", "v1", "pods")
EVENTS = Resource("", "v1", "events")
OWNER = "owner"
"""The index by ``controller_uid``."""
PROGRESS_SECONDS = 10.0
"""Between two status writes that only say how far a stage is."""
_BEHIND_SECONDS = 1.0
_REFUSED_SECONDS = (5.0, 60.0)
"""Before a Job that the API server refused is tried again: at first, and at most."""
_LOOK_SECONDS = (2.0, 10.0, 60.0)
"""An attempt that does not start has its Events read after the first, and again after the second while it is younger
than the third, then after the third."""


@dataclass
class Refusal:
    """A Job that the API server would not make."""

    words: str
    again: datetime
    tries: int = 1


@dataclass(frozen=True)
class Reported:
    """What a stage's pod said last of how far it is."""

    progress: Progress | None = None
    checkpoint: CheckpointStatus | None = None


class Recorder(Protocol):
    """Where Events go."""

    def record(self, about: Object, type: str, reason: str, message: str) -> None:
        """Tell; never fails, never waits."""


class Memory:
    """What the controller remembers of a job between two looks. Losing it costs words, never work."""

    def __init__(self) -> None:
        self.written = ""
        """resourceVersion of our last status write."""
        self.progress_at = datetime.min.replace(tzinfo=UTC)
        """When a status was last written."""
        self.refused: dict[str, Refusal] = {}
        self.gone: dict[str, Child] = {}
        """Attempts whose Jobs were deleted, until the status has taken them in."""
        self.pods: dict[str, dict[str, Object]] = {}
        """Deleted pods in their last state, by Job uid and own uid."""
        self.warnings: dict[str, tuple[datetime, str]] = {}
        """By Job uid: when its Events were read, and the latest warning."""


def _now() -> datetime:
    return datetime.now(UTC)


class Controller:
    """Reconciles FineTuneJobs; give ``reconcile`` keys that the ``on_*`` methods, handlers of reflectors, tell."""

    def __init__(
        self,
        client: Client,
        *,
        finetunejobs: Cache,
        jobs: Cache,
        pods: Cache,
        enqueue: Callable[[str], None],
        recorder: Recorder,
        settings: PodSettings,
        metrics: JobMetrics,
        reported: Callable[[str], Reported] = lambda pod_uid: Reported(),
        active: Callable[[str], None] = lambda namespace: None,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        """``client`` must refuse to write for a replica that does not lead; ``reported`` is asked by a pod's uid.
        ``active`` is told the namespace of each job that is at work.

        ``jobs`` and ``pods`` are indexed by the uid of their controller, as ``OWNER``.
        """
        self._client = client
        self._finetunejobs = finetunejobs
        self._jobs = jobs
        self._pods = pods
        self._enqueue = enqueue
        self._recorder = recorder
        self._settings = settings
        self._metrics = metrics
        self._reported = reported
        self._active = active
        self._clock = clock
        self._memory: dict[str, Memory] = {}

    # ------------------------------------------------------------ what changed

    def on_finetunejob(self, old: Object | None, new: Object | None) -> None:
        """A FineTuneJob came, changed or went."""
        self._enqueue(key_of(new or old or {}))

    def on_job(self, old: Object | None, new: Object | None) -> None:
        """An attempt's Job came, changed or went; of one that went the end is kept until it is recorded."""
        job = new or old or {}
        owner = _owner(job)
        if owner is None or owner["kind"] != KIND:
            return
        key = f"{job['metadata']['namespace']}/{owner['name']}"
        if new is None:
            memory = self._remember(key)
            uid = job["metadata"]["uid"]
            memory.gone[job["metadata"]["name"]] = gone(job, self._pods_of(memory, uid))
            memory.pods.pop(uid, None)
            memory.warnings.pop(uid, None)
        self._enqueue(key)

    def on_pod(self, old: Object | None, new: Object | None) -> None:
        """A stage's pod came, changed or went; of one that went the last state holds its exit code."""
        pod = new or old or {}
        owner = _owner(pod)
        name = pod["metadata"].get("labels", {}).get(JOB_LABEL)
        if owner is None or name is None:
            return
        key = f"{pod['metadata']['namespace']}/{name}"
        if new is None and self._jobs.get(pod["metadata"]["namespace"], owner["name"]) is not None:
            self._remember(key).pods.setdefault(owner["uid"], {})[pod["metadata"]["uid"]] = pod
        self._enqueue(key)

    # ------------------------------------------------------------ reconcile

    async def reconcile(self, key: str) -> float | None:
        """Bring one job on its way; seconds until it must be looked at again even if nothing changes."""
        namespace, _, name = key.partition("/")
        raw = self._finetunejobs.get(namespace, name)
        if raw is None:
            self._memory.pop(key, None)
            return None
        if "deletionTimestamp" in raw["metadata"]:
            return None  # the garbage collector takes its Jobs
        memory = self._remember(key)
        if memory.written and _version(raw) < int(memory.written):
            return _BEHIND_SECONDS  # our own write has not come back: what we see is older than what we know
        now = self._clock()
        status = JobStatus.model_validate(raw.get("status") or {})
        try:
            job = parse(raw)
        except InvalidSpec as error:
            if not holds(status, "Failed"):
                wrong = invalid(raw["metadata"].get("generation", 0), status, error.errors, now)
                await self._write(raw, None, status, wrong, memory, now)
            return None
        children, look = await self._children(raw, memory, now)
        refused = {name: refusal.words for name, refusal in memory.refused.items()}
        planned = plan(job, status, children, now, cluster=True, refused=refused)
        if planned.status != status:
            wait = memory.progress_at + timedelta(seconds=PROGRESS_SECONDS) - now
            if _calm(planned.status) == _calm(status) and wait > timedelta() and not (planned.create or planned.delete):
                look.append(wait)
            else:
                await self._write(raw, job, status, planned.status, memory, now)
        if planned.create or any(not child.ended for child in children):
            self._active(namespace)
        memory.gone.clear()
        look += await self._act(job, raw, planned, memory, now)
        if planned.look_again is not None:
            look.append(planned.look_again)
        return min(look).total_seconds() if look else None

    async def _children(self, raw: Object, memory: Memory, now: datetime) -> tuple[list[Child], list[timedelta]]:
        """Every attempt that is, or was, and when to look again at those that do not start."""
        found: dict[str, Child] = dict(memory.gone)
        look: list[timedelta] = []
        for job in self._jobs.by_index(OWNER, raw["metadata"]["uid"]):
            uid = job["metadata"]["uid"]
            pods = self._pods_of(memory, uid)
            last = self._reported(pods[-1]["metadata"]["uid"]) if pods else Reported()
            warning = ""
            child = child_of(job, pods, progress=last.progress, checkpoint=last.checkpoint)
            if child.state == "Pending" and not child.deleting and child.cause in ("", "Starting"):
                warning, wait = await self._warning(job, pods, memory, now)
                look.append(wait)
                if warning:
                    child = child_of(job, pods, warning=warning)
            found[child.name] = child
        return list(found.values()), look

    def _pods_of(self, memory: Memory, job_uid: str) -> list[Object]:
        """All pods of a Job that were ever seen, the youngest last."""
        seen = {**memory.pods.get(job_uid, {})}
        seen |= {pod["metadata"]["uid"]: pod for pod in self._pods.by_index(OWNER, job_uid)}
        return sorted(seen.values(), key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))

    async def _warning(self, job: Object, pods: list[Object], memory: Memory, now: datetime) -> tuple[str, timedelta]:
        """What the latest warning says about an attempt that does not start, and when to ask again.

        Where a Job has no pod, only an Event tells why: quota, service account, admission.
        """
        uid = job["metadata"]["uid"]
        age = (now - datetime.fromisoformat(job["metadata"]["creationTimestamp"])).total_seconds()
        first, soon, later = _LOOK_SECONDS
        if age < first:
            return "", timedelta(seconds=first)
        every = timedelta(seconds=soon if age < later else later)
        read_at, words = memory.warnings.get(uid, (now - every, ""))
        if now - read_at >= every:
            about = pods[-1]["metadata"]["uid"] if pods else uid
            words = await self._latest_warning(job["metadata"]["namespace"], about)
            read_at = now
            memory.warnings[uid] = (now, words)
        return words, max(timedelta(seconds=1), read_at + every - now)

    async def _latest_warning(self, namespace: str, uid: str) -> str:
        found = await self._client.list(EVENTS, namespace, field_selector=f"involvedObject.uid={uid},type=Warning")
        last = max(found, key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or ""), default=None)
        return str(last.get("message", "")) if last else ""

    async def _write(
        self, raw: Object, job: FineTuneJob | None, before: JobStatus, after: JobStatus, memory: Memory, now: datetime
    ) -> None:
        """The one status write; Events follow only if it succeeded. A ConflictError means: look again."""
        meta = raw["metadata"]
        written = await self._client.replace_status(
            FINETUNEJOBS,
            meta["namespace"],
            meta["name"],
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "metadata": {key: meta[key] for key in ("name", "namespace", "uid", "resourceVersion")},
                "status": after.model_dump(mode="json", by_alias=True, exclude_none=True),
            },
        )
        memory.written = written["metadata"]["resourceVersion"]
        memory.progress_at = now
        self._metrics.observe(job, before, after)
        for told in changes(before, after):
            self._recorder.record(raw, told.type, told.reason, told.message)

    async def _act(
        self, job: FineTuneJob, raw: Object, planned: Plan, memory: Memory, now: datetime
    ) -> list[timedelta]:
        namespace = job.metadata.namespace
        for name in planned.delete:
            if (attempt := self._jobs.get(namespace, name)) is not None:
                await self._delete(JOBS, attempt, "Foreground")
        waits = [await self._create(job, raw, child, memory, now) for child in planned.create]
        memory.refused = {c.name: memory.refused[c.name] for c in planned.create if c.name in memory.refused}
        if planned.expired:
            _log.info("time to live is over: %s/%s is deleted", namespace, job.metadata.name)
            await self._delete(FINETUNEJOBS, raw, "Background")
        return [wait for wait in waits if wait is not None]

    async def _create(
        self, job: FineTuneJob, raw: Object, child: NewChild, memory: Memory, now: datetime
    ) -> timedelta | None:
        """Make the Job; when to try again if it was refused."""
        refusal = memory.refused.get(child.name)
        if refusal is not None and refusal.again > now:
            return refusal.again - now
        attempt = batch_job(job, raw["metadata"].get("labels") or {}, child, self._settings)
        try:
            await self._client.create(JOBS, job.metadata.namespace, attempt)
        except AlreadyExistsError:
            there = await self._client.get(JOBS, job.metadata.namespace, child.name)
            owner = _owner(there)
            if owner is None or owner["uid"] != job.metadata.uid:
                return self._refuse(memory, child, f"a Job {child.name} that is not ours is there: delete it", now)
        except (ForbiddenError, InvalidError) as error:
            return self._refuse(memory, child, str(error), now)
        memory.refused.pop(child.name, None)
        _log.info("created", extra={"job": key_of(raw), "stage": child.run.stage, "attempt": child.run.attempt})
        return None

    def _refuse(self, memory: Memory, child: NewChild, words: str, now: datetime) -> timedelta:
        """Remember it: the next look, at once, says so in the status; the Job is tried again later."""
        first, longest = _REFUSED_SECONDS
        tries = memory.refused[child.name].tries + 1 if child.name in memory.refused else 1
        wait = timedelta(seconds=min(longest, first * 2 ** min(tries - 1, 10)))
        known = child.name in memory.refused and memory.refused[child.name].words == words
        memory.refused[child.name] = Refusal(words, now + wait, tries)
        return wait if known else timedelta()

    async def _delete(self, resource: Resource, obj: Object, propagation: str) -> None:
        meta = obj["metadata"]
        with contextlib.suppress(NotFoundError):  # somebody else was faster
            await self._client.delete(
                resource, meta["namespace"], meta["name"], propagation=propagation, uid=meta["uid"]
            )

    def _remember(self, key: str) -> Memory:
        return self._memory.setdefault(key, Memory())


def _calm(status: JobStatus) -> JobStatus:
    """Without what changes all the time while a stage runs."""
    stages = [
        stage.model_copy(update={"progress": None, "checkpoint": None}) if stage.state is StageState.RUNNING else stage
        for stage in status.stages
    ]
    return status.model_copy(update={"stages": stages, "progress": "", "eta": ""})


def _version(obj: Object) -> int:
    return int(obj["metadata"]["resourceVersion"])


def _owner(obj: Object) -> Mapping[str, Any] | None:
    """The controller among the owners."""
    return next((o for o in obj["metadata"].get("ownerReferences") or () if o.get("controller")), None)
