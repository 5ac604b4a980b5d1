"""Which attempts a job has: by the caches, and by the API server itself where a cache that lags would mislead.

Two watches are two clocks: a Job may be over before its pod's last state has come, and be there without having been
shown. Before an attempt counts as lost, or as ended without a word, the API server is asked.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from finetune_api.pipeline import order
from finetune_api.status import CheckpointStatus, JobStatus, Progress, StageStatus
from finetune_api.types import KIND, FineTuneJob
from finetune_operator import slim, waiting
from finetune_operator.cache import Cache
from finetune_operator.kube.client import Client, Resource
from finetune_operator.kube.errors import KubeError, NotFoundError
from finetune_operator.kube.objects import Object, controller_of, controller_uid, uid_of
from finetune_operator.members import alive, all_have_ended, finished, first, interruption
from finetune_operator.observe import child_of, gone
from finetune_operator.plan.attempts import OPEN, accounted
from finetune_operator.plan.children import Child
from finetune_operator.plan.jobs import child_name
from finetune_operator.plan.pods import JOB_LABEL

JOBS = Resource("batch", "v1", "jobs")
PODS = Resource("", "v1", "pods")
EVENTS = Resource("", "v1", "events")
OWNER = "owner"
"""The index by ``controller_uid``."""
_BEHIND = timedelta(seconds=1)
_LOOK_SECONDS = (2.0, 10.0, 60.0)
"""An attempt that does not start has its Events read after the first, and again after the second while it is younger
than the third, then after the third."""


@dataclass(frozen=True)
class Reported:
    """What a stage's pod said last of how far it is."""

    progress: Progress | None = None
    checkpoint: CheckpointStatus | None = None


@dataclass(slots=True)
class Seen:
    """What caches showed of a job's attempts and show no more, until the status has taken it in."""

    jobs: dict[str, Object] = field(default_factory=dict)
    """Deleted Jobs in their last state, by name."""
    pods: dict[str, dict[str, Object]] = field(default_factory=dict)
    """Deleted pods in their last state, by Job uid and own uid."""
    warnings: dict[str, tuple[datetime, str]] = field(default_factory=dict)
    """By Job uid: when its Events were read, and the latest warning."""

    def forget(self, taken: "Attempts") -> None:
        """Drop what the status has taken in."""
        for child in taken.children:
            job = taken.jobs[child.name]
            for pod in taken.replaced.get(child.name, ()):
                self.pods.get(uid_of(job), {}).pop(uid_of(pod), None)
            if child.ended:
                self.pods.pop(uid_of(job), None)
                if self.jobs.get(child.name) is job:
                    del self.jobs[child.name]
            if child.state != "Pending":
                self.warnings.pop(uid_of(job), None)


@dataclass(frozen=True)
class Attempts:
    """All that there are, ended ones too."""

    children: list[Child]
    jobs: Mapping[str, Object]
    """The Job of each, by name."""
    look_again: list[timedelta]
    """When to look again at those that do not tell by themselves."""
    replaced: Mapping[str, list[Object]] = field(default_factory=dict)
    """By the Job's name: deleted pods whose time was shown, and is not to be shown again."""


class Lookup:
    """Reads only."""

    def __init__(
        self, client: Client, *, finetunejobs: Cache, jobs: Cache, pods: Cache, reported: Callable[[str], Reported]
    ) -> None:
        self._client = client
        self._finetunejobs = finetunejobs
        self._jobs = jobs
        self._pods = pods
        self._reported = reported
        self._seen: dict[str, Seen] = {}

    @property
    def remembered(self) -> set[str]:
        """The uids of the jobs of which something is."""
        return set(self._seen)

    # ------------------------------------------------------------ what changed

    def on_finetunejob(self, old: Object | None, new: Object | None) -> None:
        """A FineTuneJob came, changed or went: of one that went, and of one that is over, nothing is remembered."""
        if old is not None and (new is None or finished(new) is not None):
            self._seen.pop(uid_of(old), None)

    def on_job(self, old: Object | None, new: Object | None) -> str | None:
        """An attempt's Job came, changed or went; whose it is, as ``namespace/name``. Never raises."""
        job = new or old or {}
        owner = controller_of(job)
        if owner is None or owner["kind"] != KIND:
            return None
        if new is None and (seen := self._remember(job["metadata"]["namespace"], owner["name"], owner["uid"])):
            seen.jobs[job["metadata"]["name"]] = job
        return f"{job['metadata']['namespace']}/{owner['name']}"

    def on_pod(self, old: Object | None, new: Object | None) -> str | None:
        """A stage's pod came, changed or went; whose it is, as ``namespace/name``. Never raises."""
        pod = new or old or {}
        owner = controller_of(pod)
        name = pod["metadata"].get("labels", {}).get(JOB_LABEL)
        if owner is None or name is None:
            return None
        namespace = pod["metadata"]["namespace"]
        if new is None and (seen := self._remember(namespace, name)):
            job = self._jobs.get(namespace, owner["name"]) or seen.jobs.get(owner["name"])
            if job is not None and uid_of(job) == owner["uid"]:
                seen.pods.setdefault(owner["uid"], {})[uid_of(pod)] = pod
        return f"{namespace}/{name}"

    def _remember(self, namespace: str, name: str, uid: str = "") -> Seen | None:
        """Where to; None if that job is not there, is another of the same name, or is over."""
        raw = self._finetunejobs.get(namespace, name)
        if raw is None or (uid and uid_of(raw) != uid) or finished(raw) is not None:
            return None
        return self._seen.setdefault(uid_of(raw), Seen())

    # ------------------------------------------------------------ look

    def taken(self, raw: Object, attempts: "Attempts") -> None:
        """The status has taken these in: what was remembered for it may go."""
        if (seen := self._seen.get(uid_of(raw))) is not None:
            seen.forget(attempts)

    async def attempts(self, raw: Object, status: JobStatus, now: datetime) -> Attempts:
        """All of a job's, each once. ``status``: what is recorded of them."""
        namespace = raw["metadata"]["namespace"]
        lines = {stage.name: stage for stage in status.stages}
        seen = Seen() if finished(raw) is not None else self._seen.setdefault(uid_of(raw), Seen())
        jobs: dict[str, Object] = dict(seen.jobs)
        jobs |= {job["metadata"]["name"]: job for job in self._jobs.by_index(OWNER, uid_of(raw))}
        look: list[timedelta] = []
        for stage in status.stages:
            if stage.state in OPEN and stage.job and stage.job not in jobs:
                there = await self._job(namespace, stage.job)
                if there is not None and controller_uid(there) == uid_of(raw):
                    jobs[stage.job] = slim.job(there)
                    look.append(_BEHIND)
        children: list[Child] = []
        replaced: dict[str, list[Object]] = {}
        for job in jobs.values():
            if seen.jobs.get(job["metadata"]["name"]) is job:
                children.append(self._deleted(job, seen))
            else:
                child, wait, replaced[child.name] = await self._child(job, seen, lines, now)
                children.append(child)
                look += wait
        return Attempts(children, jobs, look, replaced)

    async def has_begun(self, job: FineTuneJob) -> bool:
        """Whether a job without a status has its first Job, which is made ahead of that, though no cache shows it."""
        there = await self._job(job.metadata.namespace, child_name(job, order(job.spec)[0], 1))
        return there is not None and controller_uid(there) == job.metadata.uid

    def _deleted(self, job: Object, seen: Seen) -> Child:
        """An attempt whose Job is gone. Unless that was deleted in the foreground its pod may be there yet, saving."""
        pods = self._pods_of(seen, uid_of(job))
        if finished(job) is None and any(alive(pod) for pod in self._pods.by_index(OWNER, uid_of(job))):
            return replace(child_of(job, pods), deleting=True)
        return gone(job, pods)

    async def _child(
        self, job: Object, seen: Seen, lines: Mapping[str, StageStatus], now: datetime
    ) -> tuple[Child, list[timedelta], list[Object]]:
        uid = uid_of(job)
        pods = self._pods_of(seen, uid)
        speaks = first(pods)
        last = self._reported(uid_of(speaks)) if speaks is not None else Reported()
        ran, replaced = interruption(job, list(seen.pods.get(uid, {}).values()), pods)
        child = child_of(job, pods, progress=last.progress, checkpoint=last.checkpoint, interrupted=ran)
        line = lines.get(child.stage)
        if child.ended and not all_have_ended(job, pods) and (line is None or child.attempt > accounted(line)):
            there = await self._pods_there(job)
            if any(alive(pod) for pod in there.values()):  # the next attempt must not meet them
                return replace(child, state="Running", cause="", message="", end=None), [_BEHIND], replaced
            pods = sorted(({uid_of(pod): pod for pod in pods} | there).values(), key=_made)
            child = child_of(job, pods, progress=last.progress, checkpoint=last.checkpoint, interrupted=ran)
        if child.state == "Pending" and not child.deleting and child.cause in ("", "Starting"):
            warning, wait = await self._warning(job, pods, seen, now)
            return (child_of(job, pods, warning=warning, interrupted=ran) if warning else child), [wait], replaced
        return child, [], replaced

    def _pods_of(self, seen: Seen, job_uid: str) -> list[Object]:
        """All pods of a Job that were ever seen, the youngest last."""
        found = {**seen.pods.get(job_uid, {})}
        found |= {uid_of(pod): pod for pod in self._pods.by_index(OWNER, job_uid)}
        return sorted(found.values(), key=_made)

    async def _job(self, namespace: str, name: str) -> Object | None:
        try:
            return await self._client.get(JOBS, namespace, name)
        except NotFoundError:
            return None

    async def _pods_there(self, job: Object) -> dict[str, Object]:
        """Its pods as they are at this moment, by uid."""
        name = job["metadata"]["name"]
        selector = f"batch.kubernetes.io/job-name={name}"
        there = await self._client.list(PODS, job["metadata"]["namespace"], label_selector=selector)
        return {uid_of(pod): slim.pod(pod) for pod in there if controller_uid(pod) == uid_of(job)}

    async def _warning(self, job: Object, pods: list[Object], seen: Seen, now: datetime) -> tuple[str, timedelta]:
        """What the latest warning says about an attempt that does not start, and when to ask again.

        Where a Job has no pod, only an Event tells why: quota, service account, admission.
        """
        age = (now - datetime.fromisoformat(_made(job))).total_seconds()
        first, soon, later = _LOOK_SECONDS
        if age < first:
            return "", timedelta(seconds=first)
        every = timedelta(seconds=soon if age < later else later)
        read_at, words = seen.warnings.get(uid_of(job), (now - every, ""))
        if not timedelta() <= now - read_at < every:
            about = uid_of(waiting.holds_up(job, pods))
            with contextlib.suppress(KubeError):  # only words: what they are about goes on without them
                words = await self._latest_warning(job["metadata"]["namespace"], about)
            read_at = now
            seen.warnings[uid_of(job)] = (now, words)
        return words, max(timedelta(seconds=1), read_at + every - now)

    async def _latest_warning(self, namespace: str, uid: str) -> str:
        found = await self._client.list(EVENTS, namespace, field_selector=f"involvedObject.uid={uid},type=Warning")
        # The pod's own condition tells of the scheduler, and only for as long as it is true.
        told = [event for event in found if event.get("reason") != "FailedScheduling"]
        last = max(told, key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or ""), default=None)
        return str(last.get("message", "")) if last else ""


def _made(obj: Object) -> str:
    return str(obj["metadata"].get("creationTimestamp", ""))
