import json
from typing import Any

import pytest

from finetune_operator.observe import child_of, gone
from finetune_operator.plan.retry import judge

T0, T1, T2 = "2026-01-01T12:00:00Z", "2026-01-01T12:00:05Z", "2026-01-01T12:01:05Z"
RESULT = {"result": {"digest": "d", "manifest": "m/manifest.json"}}


def a_batch_job(*conditions: dict[str, Any], suspend: bool = False, **metadata: Any) -> dict[str, Any]:
    """A Job of stage sft, attempt 2."""
    return {
        "metadata": {
            "name": "bot-sft-2-x",
            "namespace": "team",
            "uid": "j",
            "creationTimestamp": T0,
            "labels": {"finetune.dev/stage": "sft", "finetune.dev/attempt": "2"},
            **metadata,
        },
        "spec": {"suspend": suspend},
        "status": {"conditions": list(conditions), **({} if suspend else {"startTime": T0})},
    }


def over(kind: str, message: str = "") -> dict[str, Any]:
    """A condition by which a Job is over."""
    return {"type": kind, "status": "True", "message": message, "lastTransitionTime": T2}


def a_pod(
    phase: str = "Running", state: dict[str, Any] | None = None, *conditions: dict[str, Any], **status: Any
) -> dict[str, Any]:
    """Its pod."""
    containers = [{"name": "stage", "image": "trainer:1", "imageID": "sha256:1", "state": state}] if state else []
    return {
        "metadata": {"name": "p", "uid": "p", "creationTimestamp": T0, **status.pop("metadata", {})},
        "spec": {"nodeName": "node-7", "containers": [{"name": "stage", "image": "trainer:1"}]},
        "status": {"phase": phase, "conditions": list(conditions), "containerStatuses": containers, **status},
    }


def ended(code: int, message: str = "", reason: str = "Error") -> dict[str, Any]:
    """A container's state after its end."""
    return {"terminated": {"exitCode": code, "reason": reason, "message": message, "startedAt": T1, "finishedAt": T2}}


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    """A container's state before its beginning."""
    return {"waiting": {"reason": reason, "message": message}}


UNSCHEDULABLE = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/4 nodes are available: 4 Insufficient nvidia.com/gpu.",
}

WAITING: list[tuple[str, list[dict[str, Any]], str, str, str]] = [
    # id, pods, warning, cause, words
    ("just made", [], "", "", ""),
    ("quota", [], 'pods "x" is forbidden: exceeded quota', "PodRefused", "exceeded quota"),
    ("no GPU", [a_pod("Pending", None, UNSCHEDULABLE)], "", "Unschedulable", "4 Insufficient nvidia.com/gpu"),
    ("no image", [a_pod("Pending", waiting("ImagePullBackOff", "not found"))], "", "ImagePull", "trainer:1: not found"),
    ("never pulled", [a_pod("Pending", waiting("ErrImageNeverPull"))], "", "ImagePull", "ErrImageNeverPull"),
    (
        "no secret",
        [a_pod("Pending", waiting("CreateContainerConfigError", 'secret "s3" not found'))],
        "",
        "SecretMissing",
        'secret "s3" not found: create it',
    ),
    ("starting", [a_pod("Pending", waiting("ContainerCreating"))], "", "Starting", ""),
    (
        "no volume",
        [a_pod("Pending", waiting("ContainerCreating"))],
        'configmap "ca" not found',
        "Starting",
        'configmap "ca" not found',
    ),
]


@pytest.mark.parametrize(
    ("pods", "warning", "cause", "words"), [row[1:] for row in WAITING], ids=[r[0] for r in WAITING]
)
def test_why_an_attempt_waits(pods: list[dict[str, Any]], warning: str, cause: str, words: str) -> None:
    """The state is Pending, with Kubernetes' own words and what to do."""
    child = child_of(a_batch_job(), pods, warning=warning)
    assert (child.state, child.cause) == ("Pending", cause)
    assert words in child.message
    assert child.since is not None
    assert child.start is None


def test_a_job_that_kueue_holds_back_is_queued() -> None:
    """Waiting for quota is no waiting for a place."""
    child = child_of(a_batch_job(suspend=True), [])
    assert (child.state, child.since) == ("Queued", None)


def test_an_attempt_at_work() -> None:
    """Since its container runs; what it runs is told by digest."""
    child = child_of(a_batch_job(), [a_pod("Running", {"running": {"startedAt": T1}})])
    assert (child.stage, child.attempt, child.state, child.image) == ("sft", 2, "Running", "sha256:1")
    assert child.start is not None
    assert child.start.second == 5


def test_a_pod_that_ended_is_the_job_controllers_to_judge() -> None:
    """Until the Job is over the attempt is not."""
    child = child_of(a_batch_job(), [a_pod("Succeeded", ended(0, json.dumps(RESULT)))])
    assert child.state == "Running"


def test_a_result() -> None:
    """The termination message is the result."""
    child = child_of(a_batch_job(over("Complete")), [a_pod("Succeeded", ended(0, json.dumps(RESULT)))])
    assert (child.state, child.exit_code) == ("Succeeded", 0)
    assert child.termination is not None
    assert child.termination.result is not None
    assert child.termination.result.digest == "d"


DISRUPTED = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "shoved"}
ENDS: list[tuple[str, str, list[dict[str, Any]], str, bool, str]] = [
    # id, the Job's message, pods, reason, counted, words
    ("bad data", "", [a_pod("Failed", ended(65, '{"error": "train.jsonl:3: no"}'))], "BadData", True, "train.jsonl:3"),
    ("bug", "", [a_pod("Failed", ended(70, "Traceback ...\nKeyError: 1"))], "StageError", True, "KeyError: 1"),
    ("saved", "", [a_pod("Failed", ended(75))], "Preempted", False, ""),
    ("preempted", "", [a_pod("Failed", ended(137), DISRUPTED)], "Preempted", False, ""),
    ("out of memory", "", [a_pod("Failed", ended(137, reason="OOMKilled"))], "OutOfMemory", True, "resources.memory"),
    (
        "disk full",
        "",
        [a_pod("Failed", ended(137), reason="Evicted", message="Usage of EmptyDir volume exceeds the limit 8Gi")],
        "DiskFull",
        True,
        "exceeds the limit 8Gi",
    ),
    (
        "pod gone",
        "Container stage for pod team/p failed with exit code 70 matching FailJob rule at index 3",
        [],
        "StageError",
        True,
        "exit code 70",
    ),
    (
        "pod gone after a disruption",
        "Pod team/p has condition DisruptionTarget matching FailJob rule at index 0",
        [],
        "Preempted",
        False,
        "",
    ),
    ("shell died of SIGTERM", "", [a_pod("Failed", ended(143))], "Preempted", False, ""),
    ("pod deleted by force", "Job has reached the specified backoff limit", [], "Preempted", False, "was deleted"),
    (
        "pod deleted by force, and seen",
        "Job has reached the specified backoff limit",
        [a_pod("Running", {"running": {"startedAt": T1}}, metadata={"deletionTimestamp": T1})],
        "Preempted",
        False,
        "was deleted",
    ),
    (
        "pod deleted, and saved",
        "",
        [a_pod("Failed", ended(75, '{"error": "saved step 8"}'), metadata={"deletionTimestamp": T2})],
        "Preempted",
        False,
        "its pod was deleted: saved step 8",
    ),
    (
        "pod deleted, and killed after its grace period",
        "",
        [a_pod("Failed", ended(137), metadata={"deletionTimestamp": T2, "deletionGracePeriodSeconds": 30})],
        "Preempted",
        False,
        "grace period",
    ),
    (
        "pod deleted only after it was killed",
        "",
        [a_pod("Failed", ended(137), metadata={"deletionTimestamp": "2026-01-01T12:09:00Z"})],
        "Killed",
        True,
        "memory ran out, or by somebody",
    ),
    (
        "a node that will not take it",
        "Job has reached the specified backoff limit",
        [a_pod("Failed", None, reason="UnexpectedAdmissionError", message="Allocate failed: no nvidia.com/gpu")],
        "PodRefused",
        False,
        "UnexpectedAdmissionError: Allocate failed",
    ),
]


@pytest.mark.parametrize(
    ("message", "pods", "reason", "counted", "words"), [row[1:] for row in ENDS], ids=[row[0] for row in ENDS]
)
def test_how_an_attempt_ended(message: str, pods: list[dict[str, Any]], reason: str, counted: bool, words: str) -> None:
    """The cause comes through, also when the pod is gone."""
    child = child_of(a_batch_job(over("Failed", message)), pods)
    verdict = judge(child)
    assert (child.state, verdict.reason, verdict.counted) == ("Failed", reason, counted)
    assert words in verdict.message


def test_a_lost_node_is_told_with_the_mend() -> None:
    """Kubernetes does not replace the pod until the Node is back or gone: somebody has to act."""
    evicted = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
    pod = a_pod("Running", {"running": {"startedAt": T1}}, evicted, metadata={"deletionTimestamp": T2})
    child = child_of(a_batch_job(), [pod])
    assert (child.state, child.cause) == ("Running", "NodeLost")
    assert "kubectl delete node node-7" in child.message


def test_a_deleted_job_is_an_ended_attempt() -> None:
    """Its last pod tells how it ended; time that it ran counts, the end does not."""
    job = a_batch_job(deletionTimestamp=T1)
    child = gone(job, [a_pod("Running", ended(75))])
    assert (child.state, child.exit_code, child.deleting) == ("Failed", 75, True)
    assert child.end is not None
    assert not judge(child).counted
    unseen = gone(job, [])
    assert (unseen.state, unseen.deleting) == ("Failed", True)
    assert not judge(unseen).counted


def test_a_job_deleted_while_it_waited_was_shoved_aside() -> None:
    """What it waited for is no reason for its end."""
    verdict = judge(gone(a_batch_job(deletionTimestamp=T1), [a_pod("Pending", None, UNSCHEDULABLE)]))
    assert (verdict.reason, verdict.message, verdict.counted) == ("Preempted", "bot-sft-2-x was deleted", False)


def test_a_result_that_nobody_could_read_is_no_failure() -> None:
    """The Job is complete, and its pod was gone before anybody looked: the next attempt finds the result."""
    verdict = judge(child_of(a_batch_job(over("Complete")), []))
    assert (verdict.reason, verdict.counted) == ("Preempted", False)


def test_time_without_a_pod_is_time_of_waiting() -> None:
    """The Job controller gives a Job no startTime while it cannot make a pod; time in a queue does not count."""
    job = a_batch_job()
    del job["status"]["startTime"]
    made = child_of(job, []).since
    job["status"]["conditions"] = [{"type": "Suspended", "status": "False", "lastTransitionTime": T2}]
    resumed = child_of(job, []).since
    assert (made and made.isoformat(), resumed and resumed.isoformat()) == (
        "2026-01-01T12:00:00+00:00",
        "2026-01-01T12:01:05+00:00",
    )


def test_a_job_that_is_being_deleted_waits_for_no_place() -> None:
    """Its pod may be gone already, after hours of work: that is not to have found none."""
    child = child_of(a_batch_job(deletionTimestamp=T2), [])
    assert (child.since, child.deleting) == (None, True)
