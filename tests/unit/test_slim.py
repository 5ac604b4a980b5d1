"""What caches keep of objects."""

import json
from datetime import timedelta

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.builders import NOW, SFT, a_job, raw_job
from tests.engine.standin_kubelet import committed

from finetune_api.stage import JobRef, StageRun
from finetune_api.status import JobStatus
from finetune_api.validate import parse
from finetune_operator import slim
from finetune_operator.kube.objects import Object, controller_of
from finetune_operator.kube.store import Store
from finetune_operator.members import expected
from finetune_operator.observe import child_of, gone
from finetune_operator.plan.children import NewChild
from finetune_operator.plan.plan import plan
from finetune_operator.plan.pods import PodSettings, batch_job


def test_a_finetunejob_is_kept_without_its_annotations() -> None:
    """`kubectl apply` leaves the whole spec there once more; all that a controller needs is there still."""
    raw = raw_job()
    raw["metadata"] |= {"annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"}}
    raw["metadata"] |= {"labels": {"kueue.x-k8s.io/queue-name": "q"}, "resourceVersion": "7", "deletionTimestamp": "t"}
    kept = slim.finetunejob(raw)
    assert "annotations" not in kept["metadata"]
    assert kept["metadata"].items() >= {"labels": raw["metadata"]["labels"], "resourceVersion": "7"}.items()
    assert kept["metadata"]["deletionTimestamp"] == "t"
    assert parse(kept).model_dump() == parse(raw).model_dump()


def test_a_job_is_judged_by_what_is_kept_of_it() -> None:
    """The attempt is the same as by the whole object, and most of that is gone."""
    over = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "lastProbeTime": "2026-01-01T12:00:00Z"}
    over |= {"message": "Container stage for pod team/p failed with exit code 70 matching FailJob rule at index 3"}
    controls = {"kind": "FineTuneJob", "name": "bot", "uid": "u", "controller": True}
    owner = {"apiVersion": "finetune.dev/v1alpha1", **controls, "blockOwnerDeletion": True}
    labels = {"finetune.dev/stage": "sft", "finetune.dev/attempt": "2", "kueue.x-k8s.io/queue-name": "q"}
    whole = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "j", "namespace": "team", "uid": "j", "labels": labels, "ownerReferences": [owner]},
        "spec": {"template": {"spec": {}}, "backoffLimit": 0, "completions": 2},
        "status": {"startTime": "2026-01-01T12:00:00Z", "failed": 1, "conditions": [over]},
    }
    kept = slim.job(whole)
    assert child_of(kept, []) == child_of(whole, [])
    assert (child_of(kept, []).exit_code, expected(kept)) == (70, 2)
    assert controller_of(kept) == controls
    assert len(json.dumps(kept)) < 0.7 * len(json.dumps(whole))


TIMES = st.sampled_from(["2026-01-01T12:00:00Z", "2026-01-01T12:00:05Z", "2026-01-01T12:01:05Z"])
WORDS = st.sampled_from(
    [
        "",
        "Container stage for pod team/p0 failed with exit code 70 matching FailJob rule at index 3",
        "Container stage for pod team/p9 failed with exit code 64 matching FailJob rule at index 1",
        "Pod team/p1 has condition DisruptionTarget matching FailJob rule at index 0",
        *("Evicted", "OOMKilled", "ImagePullBackOff", "CreateContainerConfigError", "DeletionByTaintManager"),
    ]
)


def conditions(*kinds: str) -> st.SearchStrategy[list[Object]]:
    """Of a Job or a pod, with all that the API server writes into them."""
    fields = {"type": st.sampled_from(kinds), "status": st.sampled_from(["True", "False"]), "reason": WORDS}
    return st.lists(
        st.fixed_dictionaries({**fields, "message": WORDS, "lastTransitionTime": TIMES, "lastProbeTime": TIMES}),
        max_size=3,
    )


ENDS = st.fixed_dictionaries(
    {
        "exitCode": st.sampled_from([0, 64, 70, 75, 137, 143]),
        "reason": WORDS,
        "message": st.sampled_from(["", "Killed", committed("sft")]),
        "startedAt": TIMES,
        "finishedAt": TIMES,
    }
)
STATES = st.one_of(
    st.fixed_dictionaries({"waiting": st.fixed_dictionaries({"reason": WORDS, "message": WORDS})}),
    st.fixed_dictionaries({"running": st.fixed_dictionaries({"startedAt": TIMES})}),
    st.fixed_dictionaries({"terminated": ENDS}),
)


@st.composite
def attempts(draw: st.DrawFn) -> tuple[Object, list[Object]]:
    """A Job as ours are made, and its pods: whole, in every state and in states that cannot be."""
    nodes = draw(st.sampled_from([1, 1, 2]))
    deleted = st.one_of(st.just({}), st.fixed_dictionaries({"deletionTimestamp": TIMES}))
    run = StageRun(job=JobRef(namespace="team", name="bot", uid="u-1"), stage="sft", attempt=2, spec=a_job(SFT).spec)
    images = PodSettings(trainer_image="t", gguf_image="g")
    job = batch_job(a_job(SFT), {"kueue.x-k8s.io/queue-name": "q"}, NewChild("bot-sft-2", run), images)
    job["metadata"] |= {"uid": "j", "creationTimestamp": draw(TIMES), "managedFields": [{}], **draw(deleted)}
    job["spec"] |= {"suspend": draw(st.booleans()), "completions": nodes}
    job["status"] = {"conditions": draw(conditions("Complete", "Failed", "Suspended")), "active": 1, "ready": 1}
    job["status"] |= draw(st.one_of(st.just({}), st.fixed_dictionaries({"startTime": TIMES})))
    template = job["spec"]["template"]
    pods = []
    for number in range(draw(st.integers(0, 2))):
        index = {"batch.kubernetes.io/job-completion-index": str(number % nodes)}
        container = {"name": "stage", "image": "t", "imageID": "sha256:t", "ready": True}
        state = draw(st.one_of(st.none(), STATES))
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "bot-sft-2", "uid": "j", "controller": True}
        pods.append(
            {
                "metadata": {
                    **{"name": f"p{number}", "namespace": "team", "uid": f"p{number}", "annotations": {"a": "b"}},
                    **{"creationTimestamp": draw(TIMES), "ownerReferences": [owner]},
                    **{"labels": template["metadata"]["labels"] | index},
                    **draw(deleted),
                    "deletionGracePeriodSeconds": draw(st.sampled_from([0, 30])),
                },
                "spec": {**template["spec"], "nodeName": "node-7"},
                "status": {
                    "phase": draw(st.sampled_from(["Pending", "Running", "Succeeded", "Failed"])),
                    "reason": draw(WORDS),
                    "message": draw(WORDS),
                    "conditions": draw(conditions("PodScheduled", "DisruptionTarget", "Ready")),
                    "containerStatuses": [{**container, "state": state}] if state else [],
                    "podIP": "10.0.0.1",
                },
            }
        )
    return job, pods


@settings(max_examples=300, deadline=None)
@given(attempts(), st.sampled_from(["", 'pods "x" is forbidden']))
def test_what_is_kept_leads_to_the_same_plan(attempt: tuple[Object, list[Object]], warning: str) -> None:
    """Whatever a Job and its pods say: nothing that a decision rests on is dropped, nor changed by being held."""
    job, pods = attempt
    raw = raw_job(SFT, generation=3, evaluation={"skip": True})
    raw["metadata"] |= {"annotations": {"a": "b"}, "labels": {"kueue.x-k8s.io/queue-name": "q"}}
    kept = [held(slim.finetunejob(raw)), held(slim.job(job)), *(held(slim.pod(pod)) for pod in pods)]
    for observed in (lambda job, pods: child_of(job, pods, warning=warning), gone):
        whole, slimmed = observed(job, pods), observed(kept[1], kept[2:])
        assert slimmed == whole
        at = NOW + timedelta(hours=1)
        planned = [
            plan(parse(spec), JobStatus(), [child], at, cluster=True)
            for spec, child in ((raw, whole), (kept[0], slimmed))
        ]
        assert planned[0] == planned[1]


def held(obj: Object) -> Object:
    """As a cache gives it back."""
    store = Store()
    store.put(obj)
    found = store.get("team", obj["metadata"]["name"])
    assert found is not None
    return found
