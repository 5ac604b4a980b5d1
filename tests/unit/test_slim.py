"""What caches keep of objects."""

import json

from tests.builders import raw_job

from finetune_api.validate import parse
from finetune_operator import slim
from finetune_operator.kube.objects import controller_of
from finetune_operator.members import expected
from finetune_operator.observe import child_of


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
