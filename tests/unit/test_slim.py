"""What caches keep of objects."""

from tests.builders import raw_job

from finetune_api.validate import parse
from finetune_operator import slim


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
