"""The cluster's shell round ``plan()``: it reads caches, writes one status, then makes and deletes Jobs as planned.

The status is recorded before anything is done for it, guarded by ``resourceVersion``: a controller whose cache lags, or
that should no longer lead, fails there and does nothing. One exception: a job without any status gets its first Jobs
before it, so that one of thousands of new ones does not wait for words; names are deterministic, so none is made twice.
All that is kept in memory may be lost at any moment.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Protocol

from finetune_api.status import JobStatus, Reason, StageState, StageStatus
from finetune_api.types import API_VERSION, KIND, FineTuneJob
from finetune_api.validate import InvalidSpec, parse
from finetune_operator.cache import Cache
from finetune_operator.creation import Refusals, create
from finetune_operator.kube.client import Client, Resource
from finetune_operator.kube.errors import InvalidError, NotFoundError
from finetune_operator.kube.objects import Object, key_of, uid_of
from finetune_operator.lookup import JOBS, Attempts, Lookup, Reported
from finetune_operator.metrics import JobMetrics
from finetune_operator.plan.children import Plan, Refused
from finetune_operator.plan.events import changes
from finetune_operator.plan.plan import plan
from finetune_operator.plan.pods import PodSettings
from finetune_operator.plan.status import holds, invalid, read

_log = logging.getLogger("finetune.controller")

FINETUNEJOBS = Resource("finetune.dev", "v1alpha1", "finetunejobs")
PROGRESS_SECONDS = 10.0
"""Between two status writes that only say how far a stage is, or say the same in other words."""
_BEHIND_SECONDS = 1.0
_REFUSED_SECONDS = 60.0
"""Before a status that the API server refused is tried again."""
_NEVER = datetime.min.replace(tzinfo=UTC)


class Recorder(Protocol):
    """Where Events go."""

    def record(self, about: Object, type: str, reason: str, message: str) -> None:
        """Tell; never fails, never waits."""


@dataclass(slots=True)
class Memory:
    """What the controller remembers of a job between two looks. Losing it costs words, never work."""

    written: str = ""
    """resourceVersion of our last status write."""
    written_at: datetime = _NEVER
    begun: bool = False
    """Its first Jobs were asked for, ahead of its first status."""
    refused: Refusals = field(default_factory=dict)


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
        self._lookup = Lookup(client, finetunejobs=finetunejobs, jobs=jobs, pods=pods, reported=reported)
        self._enqueue = enqueue
        self._recorder = recorder
        self._settings = settings
        self._metrics = metrics
        self._active = active
        self._clock = clock
        self._memory: dict[str, Memory] = {}
        """By uid."""

    @property
    def remembered(self) -> int:
        """How many jobs something is kept in memory of, beside the caches."""
        return len(self._memory.keys() | self._lookup.remembered)

    # ------------------------------------------------------------ what changed

    def on_finetunejob(self, old: Object | None, new: Object | None) -> None:
        """A FineTuneJob came, changed or went."""
        self._lookup.on_finetunejob(old, new)
        if new is None and old is not None:
            self._memory.pop(uid_of(old), None)
        self._enqueue(key_of(new or old or {}))

    def on_job(self, old: Object | None, new: Object | None) -> None:
        """An attempt's Job came, changed or went; of one that went the end is kept until it is recorded."""
        if (key := self._lookup.on_job(old, new)) is not None:
            self._enqueue(key)

    def on_pod(self, old: Object | None, new: Object | None) -> None:
        """A stage's pod came, changed or went; of one that went the last state holds its exit code."""
        if (key := self._lookup.on_pod(old, new)) is not None:
            self._enqueue(key)

    # ------------------------------------------------------------ reconcile

    async def reconcile(self, key: str) -> float | None:
        """Bring one job on its way; seconds until it must be looked at again even if nothing changes."""
        namespace, _, name = key.partition("/")
        raw = self._finetunejobs.get(namespace, name)
        if raw is None or "deletionTimestamp" in raw["metadata"]:
            return None  # the garbage collector takes its Jobs
        memory = self._memory.setdefault(uid_of(raw), Memory())
        if memory.written and _version(raw) < int(memory.written):
            return _BEHIND_SECONDS  # our own write has not come back: what we see is older than what we know
        try:
            return await self._bring_on(raw, memory, self._clock())
        except NotFoundError as error:
            _log.info("%s is gone: %s", key, error)
        except InvalidError as error:
            _log.error("%s: %s", key, error)
            self._recorder.record(raw, "Warning", "StatusRefused", str(error))
            return _REFUSED_SECONDS
        return None

    async def _bring_on(self, raw: Object, memory: Memory, now: datetime) -> float | None:
        status, unreadable = read(raw.get("status"))
        if unreadable:
            _log.warning("left out, since it cannot be read: %s", ", ".join(unreadable), extra={"job": key_of(raw)})
        attempts = await self._lookup.attempts(raw, status, now)
        look = list(attempts.look_again)
        try:
            job = parse(raw)
        except InvalidSpec as error:
            if not holds(status, "Failed"):
                wrong = invalid(raw["metadata"].get("generation", 0), status, error.errors, now)
                await self._write(raw, None, status, wrong, memory, now)
            for child in attempts.children:
                if not child.ended and not child.deleting:
                    await self._delete(JOBS, attempts.jobs[child.name], "Foreground")
            return None
        refused = {name: Refused(refusal.words, refusal.since) for name, refusal in memory.refused.items()}
        planned = plan(job, status, attempts.children, now, cluster=True, refused=refused)
        new = not raw.get("status")
        if new and job.spec.suspend and not attempts.children and await self._lookup.has_begun(job):
            return _BEHIND_SECONDS  # "nothing runs" would not be true
        first = new and planned.create and not memory.begun
        if planned.status != status and not first:
            wait = _left(memory.written_at, timedelta(seconds=PROGRESS_SECONDS), now)
            if _calm(planned.status) == _calm(status) and wait > timedelta() and not (planned.create or planned.delete):
                look.append(wait)
            else:
                await self._write(raw, job, status, planned.status, memory, now, planned.passed)
        elif planned.create and not await self._is_current(raw):
            return _BEHIND_SECONDS
        memory.begun = True  # its first status follows when the Jobs show up, or are refused
        self._lookup.taken(raw, attempts)
        if planned.create or any(not child.ended for child in attempts.children):
            self._active(job.metadata.namespace)
        look += await self._act(job, raw, planned, attempts, memory, now)
        if planned.look_again is not None:
            look.append(planned.look_again)
        return min(look).total_seconds() if look else None

    async def _is_current(self, raw: Object) -> bool:
        """What we see is what is. A status write would tell; to start an attempt without one by an old status might
        be to start what is done."""
        meta = raw["metadata"]
        there = await self._client.get(FINETUNEJOBS, meta["namespace"], meta["name"])
        return bool(there["metadata"]["resourceVersion"] == meta["resourceVersion"])

    async def _write(
        self,
        raw: Object,
        job: FineTuneJob | None,
        before: JobStatus,
        after: JobStatus,
        memory: Memory,
        now: datetime,
        passed: Sequence[StageStatus] = (),
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
        memory.written_at = now
        self._metrics.observe(job, before, after)
        for told in changes(before, after, passed):
            self._recorder.record(raw, told.type, told.reason, told.message)

    async def _act(
        self, job: FineTuneJob, raw: Object, planned: Plan, attempts: Attempts, memory: Memory, now: datetime
    ) -> list[timedelta]:
        for name in planned.delete:
            await self._delete(JOBS, attempts.jobs[name], "Foreground")
        for name in planned.forget:
            await self._delete(JOBS, attempts.jobs[name], "Background")
        labels = raw["metadata"].get("labels") or {}
        waits = await create(self._client, job, labels, planned, self._settings, memory.refused, now)
        if planned.expired:
            _log.info("time to live is over: deleted", extra={"job": key_of(raw)})
            await self._delete(FINETUNEJOBS, raw, "Background")
        return waits

    async def _delete(self, resource: Resource, obj: Object, propagation: str) -> None:
        meta = obj["metadata"]
        with contextlib.suppress(NotFoundError):  # somebody else was faster
            # As we saw it: what a lagging cache shows at work may be over by now, and keeps its log.
            await self._client.delete(
                resource,
                meta["namespace"],
                meta["name"],
                propagation=propagation,
                uid=meta["uid"],
                resource_version=meta["resourceVersion"],
            )


def _calm(status: JobStatus) -> JobStatus:
    """Without what changes all the time while a stage runs or waits. In other words, but not in another state."""
    return status.model_copy(
        update={"stages": [_calmed(stage) for stage in status.stages], "progress": "", "eta": "", "summary": ""}
    )


def _calmed(stage: StageStatus) -> StageStatus:
    if stage.state is StageState.RUNNING:
        return stage.model_copy(update={"progress": None, "checkpoint": None, "message": ""})
    if stage.state is StageState.PENDING:
        reason = "" if stage.reason == Reason.STARTING else stage.reason  # most start within seconds
        return stage.model_copy(update={"reason": reason, "message": "", "image": ""})
    return stage


def _left(since: datetime, span: timedelta, now: datetime) -> timedelta:
    """What is left of a span; nothing if the clock was put back since."""
    return since + span - now if since <= now else timedelta()


def _version(obj: Object) -> int:
    return int(obj["metadata"]["resourceVersion"])
