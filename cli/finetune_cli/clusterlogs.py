"""What the stages of a cluster's job wrote: their pods tell it, and when those are gone, the object store."""

import json
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import TYPE_CHECKING

from finetune_api.status import JobStatus, StageState
from finetune_cli.errors import CommandError
from finetune_cli.objects import reference
from finetune_operator.kube.client import Resource
from finetune_operator.kube.errors import InvalidError, NotFoundError, RetryableError
from finetune_operator.kube.objects import Object
from finetune_operator.plan.pods import ATTEMPT_LABEL, CONTAINER, JOB_LABEL, STAGE_LABEL

if TYPE_CHECKING:
    from finetune_cli.cluster import ClusterJob

PODS = Resource("", "v1", "pods")
Attempt = tuple[str, int]
"""Stage and number."""
_SILENCE_SECONDS = 600.0
"""A log that says nothing for so long may hang on a dead connection; it is then opened anew where it was."""
_AGAIN_SECONDS = 1.0
_OPEN = (StageState.QUEUED, StageState.PENDING, StageState.RUNNING)
_INDEX = "batch.kubernetes.io/job-completion-index"
"""Of the pods of one attempt the first speaks for all."""


def log_lines(job: "ClusterJob", stage: str, *, follow: bool) -> Iterator[str]:
    """The lines of every attempt of a stage, or of all, in the order of the stages.

    With ``follow`` each is read to its end before the next; the end of the job is the end. A running pod whose
    container has not started yet has nothing to say without it.
    """
    known = [s.name for s in job.status().stages]
    if stage and stage not in known:
        raise CommandError(f"no stage {stage!r} in {job.name}; its stages: {', '.join(known) or 'none yet'}")
    shown: set[Attempt] = set()
    for status in job.updates() if follow else [job.status()]:
        pods = _pods(job)
        new = [one for one in _attempts(status, stage) if one not in shown]
        gone = [one for one in new if one not in pods and one not in _coming(status)]
        stored, trouble = _stored(job, gone) if gone else ({}, "")
        for one in new:
            title = f"{one[0]}-{one[1]}"
            if one in pods:
                if not _has_started(pods[one]):
                    continue
                yield f"==> {title} <=="
                yield from _of_pod(job, pods[one], follow=follow)
            elif one in stored:
                yield f"==> {title} <=="
                yield from stored[one]
            elif one in gone:
                yield f"==> {title}: its pod is gone, {trouble or 'and it left no log in the store'} <=="
            else:
                continue
            shown.add(one)


def _attempts(status: JobStatus, stage: str) -> list[Attempt]:
    return [(s.name, n) for s in status.stages if stage in ("", s.name) for n in range(1, s.attempt + 1)]


def _coming(status: JobStatus) -> set[Attempt]:
    """The attempts that are not over: their pods may be yet to come."""
    return {(s.name, s.attempt) for s in status.stages if s.state in _OPEN}


def _pods(job: "ClusterJob") -> dict[Attempt, Object]:
    """The youngest pod of every attempt; not those of an earlier job of this name."""
    found = job.cluster.do(
        job.cluster.client.list(PODS, job.cluster.namespace, label_selector=f"{JOB_LABEL}={job.name}")
    )
    pods: dict[Attempt, Object] = {}
    for pod in sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"])):
        labels = pod["metadata"]["labels"]
        ours = pod["metadata"]["creationTimestamp"] >= job.created and STAGE_LABEL in labels
        if ours and labels.get(_INDEX, "0") == "0":
            pods[labels[STAGE_LABEL], int(labels.get(ATTEMPT_LABEL, 0))] = pod
    return pods


def _state(pod: Object) -> dict[str, object]:
    """Of the stage's container: ``waiting``, ``running`` or ``terminated``; empty before the kubelet knows it."""
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return next((dict(s.get("state", {})) for s in statuses if s["name"] == CONTAINER), {})


def _has_started(pod: Object) -> bool:
    return bool(_state(pod).keys() & {"running", "terminated"})


def _of_pod(job: "ClusterJob", pod: Object, *, follow: bool) -> Iterator[str]:
    """To the end of what there is, or of the container; a broken connection is gone on with where it broke."""
    stamp = ""
    while True:
        resumed = stamp
        try:
            for line in job.cluster.stream(_request(job, pod, since=stamp, follow=follow)):
                stamp, _, text = line.decode(errors="replace").partition(" ")
                if stamp > resumed:  # sinceTime knows only whole seconds; the stamps have nine digits each
                    yield text
        except (NotFoundError, InvalidError):  # gone meanwhile, or nothing of its log is left
            return
        except RetryableError:
            if not follow:
                raise
        if not follow or _is_over(job, pod):
            return
        time.sleep(_AGAIN_SECONDS)


def _request(job: "ClusterJob", pod: Object, *, since: str, follow: bool) -> AsyncGenerator[bytes, None]:
    meta = pod["metadata"]
    params = {"container": CONTAINER, "timestamps": "true", "follow": "true" if follow else "false"}
    if since:
        params["sinceTime"] = since
    path = PODS.path(meta["namespace"], meta["name"], "log")
    return job.cluster.client.transport.lines(path, params, _SILENCE_SECONDS)


def _is_over(job: "ClusterJob", pod: Object) -> bool:
    meta = pod["metadata"]
    try:
        now = job.cluster.do(job.cluster.client.get(PODS, meta["namespace"], meta["name"]))
    except NotFoundError:
        return True
    return now["metadata"]["uid"] != meta["uid"] or "running" not in _state(now)


def _stored(job: "ClusterJob", wanted: Iterable[Attempt]) -> tuple[dict[Attempt, list[str]], str]:
    """The logs of those attempts that left one in the store; if it cannot be read, why."""
    from finetune_jobs.run.errors import StageError
    from finetune_jobs.store import layout

    found: dict[Attempt, list[str]] = {}
    wanted = list(wanted)
    try:
        with job.store(None) as store:
            for stage in dict.fromkeys(stage for stage, _ in wanted):
                below = layout.stage_prefix(store.prefix, reference(job.definition()), stage)
                for item in store.list(f"{below}/"):
                    attempt = layout.attempt_of_log(item.key)
                    if attempt is None or (stage, attempt[0]) not in wanted:
                        continue
                    lines = store.get_bytes(item.key).decode(errors="replace").splitlines()
                    # An earlier job of this name left logs under the same numbers.
                    if job.created[:19] <= _begun(lines) >= _begun(found.get((stage, attempt[0]), [])):
                        found[stage, attempt[0]] = lines
    except (CommandError, StageError) as error:
        return found, f"and the store cannot be read: {error}"
    return found, ""


def _begun(lines: list[str]) -> str:
    """The time in the first line, to the second; empty if there is none."""
    try:
        return str(json.loads(lines[0])["time"])[:19]
    except (ValueError, LookupError, TypeError):
        return ""
