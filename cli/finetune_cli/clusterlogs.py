"""What the stages of a cluster's job wrote: their pods tell it, and when those are gone, the object store."""

import json
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_api.pipeline import order
from finetune_api.status import JobStatus, StageState
from finetune_cli.errors import CommandError
from finetune_cli.job import LogLine
from finetune_cli.objects import reference
from finetune_cli.podlogs import PODS, Attempt, Speaking, lines_of, state_of
from finetune_operator.kube.errors import RetryableError
from finetune_operator.kube.objects import Object
from finetune_operator.plan.pods import ATTEMPT_LABEL, INDEX_LABEL, JOB_LABEL, STAGE_LABEL
from finetune_operator.plan.sizes import resources_of

if TYPE_CHECKING:
    from finetune_cli.cluster import ClusterJob

_LOOK_SECONDS = 1.0
"""Between two looks for attempts that have begun."""
_OPEN = (StageState.QUEUED, StageState.PENDING, StageState.RUNNING)


def log_lines(job: "ClusterJob", stage: str, *, follow: bool, node: int = 0) -> Iterator[LogLine]:
    """The lines of every attempt of a stage, or of all, in the order of the stages.

    With ``follow`` those of stages that run beside each other come as they are written; the end of the job is the end.
    A running pod whose container has not started yet has nothing to say without it. ``node``: other than the first,
    of the stages that have so many.
    """
    known = [s.name for s in job.status().stages]
    if stage and stage not in known:
        raise CommandError(f"no stage {stage!r} in {job.name}; its stages: {', '.join(known) or 'none yet'}")
    wanted = _Wanted(_with_node(job, stage, node), node)
    if follow:
        yield from _following(job, wanted)
        return
    for one in _new(job, wanted, set()):
        yield LogLine(one.title)
        yield from map(LogLine, one.lines)
        if one.pod is not None:
            yield from map(LogLine, job.cluster.stream(lines_of(job.cluster.client, one.pod, follow=False)))


@dataclass(frozen=True)
class _Wanted:
    """Whose log."""

    stages: Collection[str]
    """Empty: of all that there are or will be."""
    node: int


def _with_node(job: "ClusterJob", stage: str, node: int) -> list[str]:
    """The stages that have that node: the one that is asked for, or of all those on several nodes."""
    asked = [stage] if stage else []
    if node == 0:
        return asked
    spec = job.definition().spec
    nodes = {name: resources_of(spec, name).nodes for name in asked or order(spec)}
    if node >= (most := max(nodes.values())):
        raise CommandError(f"--node {node}: {stage or job.name} runs on {most} at most, counted from 0")
    return [name for name, count in nodes.items() if node < count]


def _following(job: "ClusterJob", wanted: _Wanted) -> Iterator[LogLine]:
    speaking = Speaking(job.cluster)
    shown: set[Attempt] = set()
    last: Attempt | None = None
    try:
        while True:
            for one in _new(job, wanted, shown):
                last = one.attempt
                yield LogLine(one.title)
                yield from map(LogLine, one.lines)
                if one.pod is not None:
                    speaking.begin(one.attempt, one.pod)
            if job.ended and not len(speaking):
                return
            look = time.monotonic() + _LOOK_SECONDS
            while (left := look - time.monotonic()) > 0 and (said := speaking.next(left)) is not None:
                attempt, line = said
                alone = len(speaking) == 1 and attempt == last  # then it stands below its title
                yield LogLine(line, "" if alone else _name(attempt))
            with suppress(RetryableError):
                job.look_again()
    finally:
        speaking.close()


@dataclass(frozen=True)
class _Begun:
    """An attempt that has something to say: by its pod, or in lines that are there already."""

    attempt: Attempt
    title: str
    pod: Object | None = None
    lines: Sequence[str] = ()


def _new(job: "ClusterJob", wanted: _Wanted, shown: set[Attempt]) -> Iterator[_Begun]:
    """Those that were not shown yet; they are now."""
    status = job.status()
    new = [one for one in _attempts(status, wanted.stages) if one not in shown]
    pods = _pods(job, wanted.node) if new else {}
    gone = [one for one in new if one not in pods and one not in _coming(status)]
    stored, trouble = ({}, "and the store has no log but the first node's") if wanted.node else _stored(job, gone)
    for one in new:
        name = f"{_name(one)}, node {wanted.node}" if wanted.node else _name(one)
        title = f"==> {name} <=="
        if one in pods and _has_started(pods[one]):
            begun = _Begun(one, title, pods[one])
        elif one in stored:
            begun = _Begun(one, title, lines=stored[one])
        elif one in gone:
            why = trouble or "and it left no log in the store"
            begun = _Begun(one, f"==> {name}: its pod is gone, {why} <==")
        else:
            continue
        shown.add(one)
        yield begun


def _name(attempt: Attempt) -> str:
    return f"{attempt[0]}-{attempt[1]}"


def _attempts(status: JobStatus, stages: Collection[str]) -> list[Attempt]:
    return [(s.name, n) for s in status.stages if not stages or s.name in stages for n in range(1, s.attempt + 1)]


def _coming(status: JobStatus) -> set[Attempt]:
    """The attempts that are not over: their pods may be yet to come."""
    return {(s.name, s.attempt) for s in status.stages if s.state in _OPEN}


def _pods(job: "ClusterJob", node: int) -> dict[Attempt, Object]:
    """The youngest pod of every attempt on that node; not those of an earlier job of this name."""
    found = job.cluster.do(
        job.cluster.client.list(PODS, job.cluster.namespace, label_selector=f"{JOB_LABEL}={job.name}")
    )
    pods: dict[Attempt, Object] = {}
    for pod in sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"])):
        labels = pod["metadata"]["labels"]
        ours = pod["metadata"]["creationTimestamp"] >= job.created and STAGE_LABEL in labels
        if ours and labels.get(INDEX_LABEL, "0") == str(node):
            pods[labels[STAGE_LABEL], int(labels.get(ATTEMPT_LABEL, 0))] = pod
    return pods


def _has_started(pod: Object) -> bool:
    return bool(state_of(pod).keys() & {"running", "terminated"})


def _stored(job: "ClusterJob", wanted: Iterable[Attempt]) -> tuple[dict[Attempt, list[str]], str]:
    """The logs of those attempts that left one in the store; if it cannot be read, why."""
    from finetune_jobs.run.errors import StageError
    from finetune_jobs.store import layout

    found: dict[Attempt, list[str]] = {}
    wanted = list(wanted)
    if not wanted:
        return {}, ""
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
