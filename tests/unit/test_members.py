"""An attempt of several pods: when it runs, what keeps it, and which of them is believed when it has failed."""

import json
from typing import Any

import pytest
from tests.unit.test_observe import DISRUPTED, RESULT, T1, T2, UNSCHEDULABLE, a_batch_job, a_pod, ended, over, waiting

from finetune_operator import waiting as waits
from finetune_operator.members import all_have_ended
from finetune_operator.observe import child_of, gone
from finetune_operator.plan.retry import judge

Object = dict[str, Any]
RUNNING = {"running": {"startedAt": T1}}
LATER = "2026-01-01T12:00:40Z"
LATEST = "2026-01-01T12:02:30Z"


def two(*conditions: Object, **more: Any) -> Object:
    """A Job on two nodes."""
    job = a_batch_job(*conditions, **more)
    job["spec"]["completions"] = 2
    return job


def member(index: int, pod: Object, made: str = "") -> Object:
    """That pod, on that node."""
    label = {"batch.kubernetes.io/job-completion-index": str(index)}
    pod["metadata"] |= {"name": f"p-{index}", "uid": f"p-{index}{made}", "labels": label}
    pod["metadata"] |= {"creationTimestamp": made} if made else {}
    return pod


def ended_at(when: str, code: int, message: str = "", reason: str = "Error") -> Object:
    """A container's state after its end at that time."""
    state = ended(code, message, reason)
    state["terminated"]["finishedAt"] = when
    return state


def test_it_runs_once_all_of_it_does() -> None:
    """One that is still to be placed, or made, keeps the attempt Pending; its time begins with the last of them."""
    late = member(1, a_pod("Running", {"running": {"startedAt": LATER}}))
    first = member(0, a_pod("Running", RUNNING))
    assert child_of(two(), [first]).state == "Pending"
    stuck = child_of(two(), [first, member(1, a_pod("Pending", None, UNSCHEDULABLE))])
    assert (stuck.state, stuck.cause, stuck.start) == ("Pending", "Unschedulable", None)
    assert stuck.message == f"pod 1 of 2: {UNSCHEDULABLE['message']}"
    runs = child_of(two(), [late, first])
    assert (runs.state, runs.start and runs.start.second) == ("Running", 40)


@pytest.mark.parametrize(
    ("states", "cause", "about"),
    [
        ([("Running", RUNNING), ("Pending", waiting("ImagePullBackOff"))], "ImagePull", "p-1"),
        ([("Pending", waiting("ContainerCreating")), ("Pending", waiting("ErrImagePull"))], "ImagePull", "p-1"),
        ([("Pending", waiting("CreateContainerConfigError")), ("Pending", None)], "SecretMissing", "p-0"),
        ([("Pending", waiting("ContainerCreating"))], "PodRefused", "bot-sft-2-x"),
    ],
    ids=["one runs", "one only starts", "one waits for a secret", "one cannot be made"],
)
def test_what_somebody_has_to_mend_is_told(states: list[Any], cause: str, about: str) -> None:
    """Of several pods the one that will not start by itself; its Events are those that are asked for."""
    pods = [member(index, a_pod(phase, state)) for index, (phase, state) in enumerate(states)]
    child = child_of(two(), pods, warning="exceeded quota")
    assert (child.state, child.cause) == ("Pending", cause)
    assert waits.holds_up(two(), pods)["metadata"]["name"] == about


def test_the_first_speaks_where_all_went_well() -> None:
    """Its message is the result, its image the attempt's; the others may have been stopped on the way out."""
    pods = [
        member(0, a_pod("Succeeded", ended(0, json.dumps(RESULT)))),
        member(1, a_pod("Failed", ended_at(LATER, 143))),
    ]
    child = child_of(two(over("Complete")), pods)
    assert (child.state, child.exit_code) == ("Succeeded", 0)
    assert child.termination is not None
    assert child.termination.result is not None


LOST = '{"error": "lost a peer"}'
FAILED: list[tuple[str, str, Object, Object, str, bool, str]] = [
    # id, the Job's message, how the first ended, how the second did, reason, counted, words
    (
        "the second had bad data",
        "",
        a_pod("Failed", ended_at(LATER, 76, LOST)),
        a_pod("Failed", ended_at(T2, 65, '{"error": "row 3"}')),
        *("BadData", True, "row 3"),
    ),
    (
        "the second was out of memory",
        "",
        a_pod("Failed", ended_at(T2, 76, LOST)),
        a_pod("Failed", ended_at(T2, 137, reason="OOMKilled")),
        *("OutOfMemory", True, "resources.memory"),
    ),
    (
        "the first took the loss for a bug",
        "",
        a_pod("Failed", ended_at(T2, 70, '{"error": "gloo: closed"}')),
        a_pod("Failed", ended_at(T2, 137, reason="OOMKilled")),
        *("OutOfMemory", True, "resources.memory"),
    ),
    (
        "the second's disk was full",
        "",
        a_pod("Failed", ended_at(LATEST, 76, LOST)),
        a_pod("Failed", ended_at(LATER, 137), reason="Evicted", message="exceeds the limit 8Gi"),
        *("DiskFull", True, "exceeds the limit 8Gi"),
    ),
    (
        "the second was preempted",
        "",
        a_pod("Failed", ended_at(LATER, 76, LOST)),
        a_pod("Failed", ended_at(T2, 143), DISRUPTED),
        *("Preempted", False, "shoved"),
    ),
    (
        "the first had failed before the second was preempted",
        "",
        a_pod("Failed", ended_at("2026-01-01T12:00:10Z", 70, '{"error": "KeyError"}')),
        a_pod("Failed", ended_at(T2, 143), DISRUPTED),
        *("StageError", True, "KeyError"),
    ),
    (
        "the second was deleted, and saved",
        "",
        a_pod("Failed", ended_at(LATEST, 76, LOST)),
        a_pod("Failed", ended_at(LATER, 75, '{"error": "stopped, saved"}')),
        *("Preempted", False, "saved"),
    ),
    (
        "the second had done its part",
        "",
        a_pod("Failed", ended_at(LATEST, 75, '{"error": "stopped, saved"}')),
        a_pod("Succeeded", ended_at(LATER, 0)),
        *("Preempted", False, "saved"),
    ),
    (
        "the second's training was killed",
        "",
        a_pod("Failed", ended_at(LATEST, 76, LOST)),
        a_pod("Failed", ended_at(LATER, 76, '{"error": "killed by signal 9"}')),
        *("PeerLost", True, "signal 9"),
    ),
    (
        "the second was deleted by force",
        "Container stage for pod team/p-0 failed with exit code 76 matching FailJob rule at index 3",
        a_pod("Failed", ended_at(LATER, 76, LOST)),
        a_pod("Running", RUNNING, metadata={"deletionTimestamp": T1}),
        *("Preempted", False, "was deleted"),
    ),
]


@pytest.mark.parametrize(
    ("said", "first", "second", "reason", "counted", "words"), [row[1:] for row in FAILED], ids=[r[0] for r in FAILED]
)
def test_the_one_that_failed_first_by_itself_is_believed(
    said: str, first: Object, second: Object, reason: str, counted: bool, words: str
) -> None:
    """And not those that only lost it; whichever node it was on."""
    for pods in ([member(0, first), member(1, second)], [member(1, first), member(0, second)]):
        named = said.replace("p-0", first["metadata"]["name"])
        verdict = judge(child_of(two(over("Failed", named)), pods))
        assert (verdict.reason, verdict.counted) == (reason, counted)
        assert words in verdict.message


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Container stage for pod team/p-1 failed with exit code 65 matching FailJob rule at index 1", "BadData"),
        ("Pod team/p-1 has condition DisruptionTarget matching FailJob rule at index 0", "Preempted"),
        ("Container stage for pod team/p-1 failed with exit code 76 matching FailJob rule at index 3", "PeerLost"),
    ],
)
def test_one_that_is_gone_is_known_by_the_jobs_own_words(said: str, reason: str) -> None:
    """The Job keeps what its rule matched, also where only a pod is left that lost the other."""
    child = child_of(two(over("Failed", said)), [member(0, a_pod("Failed", ended_at(LATER, 76, LOST)))])
    assert judge(child).reason == reason


def test_while_it_is_being_ended_it_runs() -> None:
    """Its failure is decided, pods go one by one: it does not look as if it were to begin."""
    target = {"type": "FailureTarget", "status": "True", "lastTransitionTime": T2}
    assert child_of(two(target), [member(0, a_pod("Failed", ended(76)))]).state == "Running"


def test_all_must_have_ended_for_nothing_to_be_learnt_any_more() -> None:
    """A pod that was never seen may tell more than those that were."""
    first, second = member(0, a_pod("Failed", ended(76))), member(1, a_pod("Failed", ended(70)))
    assert not all_have_ended(two(), [first])
    assert not all_have_ended(two(), [first, member(1, a_pod("Running", RUNNING))])
    assert all_have_ended(two(), [first, second])


def test_a_node_that_does_not_answer_is_told_whichever_it_is() -> None:
    """The other pods may still run."""
    evicted = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
    lost = a_pod("Running", RUNNING, evicted, metadata={"deletionTimestamp": T2})
    child = child_of(two(), [member(0, a_pod("Running", RUNNING)), member(1, lost)])
    assert (child.state, child.cause) == ("Running", "NodeLost")
    assert "node-7" in child.message


def test_a_pod_that_was_replaced_is_not_asked() -> None:
    """A queue took the place away and gave another: the youngest of each index is the one."""
    old = [member(index, a_pod("Failed", ended(143)), made=T1) for index in (0, 1)]
    new = [member(index, a_pod("Running", {"running": {"startedAt": LATER}}), made=T2) for index in (0, 1)]
    child = child_of(two(), [*new, *old])
    assert (child.state, child.start and child.start.second) == ("Running", 40)


def test_a_deleted_job_of_several_pods() -> None:
    """Over, with what the first left, if it had committed."""
    done = member(0, a_pod("Succeeded", ended(0, json.dumps(RESULT))))
    job = two(deletionTimestamp=T1)
    assert gone(job, [done, member(1, a_pod("Failed", ended(143)))]).state == "Succeeded"
    saved = gone(job, [member(0, a_pod("Failed", ended(75))), member(1, a_pod("Failed", ended(75)))])
    assert (saved.state, judge(saved).counted) == ("Failed", False)
