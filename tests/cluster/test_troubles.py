"""What goes wrong on a real cluster is told in STATUS and by an Event, in words that a user can act on."""

import json
import re
from typing import Any

import pytest
from tests.cluster.installed import BUCKET, Installed, Object, example

SECONDS = 600
"""Until a trouble is told: the machine starts several stages at once."""


@pytest.fixture(scope="module")
def spec() -> Object:
    """A job of one small training, that may not be tried twice."""
    spec = dict(example("x")["spec"])
    sft = next(stage for stage in spec["pipeline"] if stage["name"] == "sft")
    return spec | {"pipeline": [{**sft, "retries": 0}], "evaluation": {"skip": True}}


@pytest.fixture(scope="module")
def troubled(world: Installed, spec: Object) -> str:
    """A namespace with one job for each trouble that ends it; they run beside each other."""
    namespace = "troubled"
    world.make_namespace(namespace)
    wrong = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "wrong"}}
    keys = {"AWS_ACCESS_KEY_ID": world.credentials["AWS_ACCESS_KEY_ID"], "AWS_SECRET_ACCESS_KEY": "x" * 40}
    world.apply(namespace, {**wrong, "stringData": keys})
    rows = b'{"prompt": "a", "completion": "b"}\n{"prompt": \n'
    world.s3.put_object(Bucket=BUCKET, Key="inputs/bad.jsonl", Body=rows)
    world.apply(
        namespace,
        make(spec, "credentials", storage={**spec["storage"], "secretRef": {"name": "wrong"}}),
        make(spec, "bad-data", data={"train": [{"source": f"s3://{BUCKET}/inputs/bad.jsonl"}]}),
        make(spec, "memory", resources={"memory": "200Mi"}),
        make(spec, "disk", resources={"workspace": {"size": "20Mi"}}),
    )
    return namespace


@pytest.mark.parametrize(
    ("job", "stage", "reason", "words"),
    [
        ("credentials", "prepare", "BadConfiguration", r"s3-credentials|secret|AWS_SECRET_ACCESS_KEY|credentials"),
        ("bad-data", "prepare", "BadData", r"bad\.jsonl.*2"),
        ("memory", "sft", "OutOfMemory", r"resources\.memory"),
        ("disk", "sft", "DiskFull", r"resources\.workspace\.size"),
    ],
)
def test_a_stage_that_cannot_be_done_fails_the_job(
    world: Installed, troubled: str, job: str, stage: str, reason: str, words: str
) -> None:
    """The job is Failed, and says which stage, why, and what to do."""
    status = world.wait_until_over(troubled, job)
    (failed,) = [c for c in status["conditions"] if (c["type"], c["status"]) == ("Failed", "True")]
    told = next(entry for entry in status["stages"] if entry["name"] == stage)
    assert (told["state"], told["reason"]) == ("Failed", reason), told
    assert re.search(words, told["message"]), told
    assert stage in failed["message"]
    assert status["summary"] == f"Failed: {stage}: {reason}"
    assert any(event["reason"] == reason and re.search(words, event["message"]) for event in _events(world, job))


@pytest.mark.parametrize(
    ("stage", "reason", "words", "changed"),
    [
        ("prepare", "SecretMissing", r'secret "nowhere" not found', {"storage": {"secretRef": {"name": "nowhere"}}}),
        ("prepare", "ImagePull", r"finetunejob/nothing:1", {"template": {"image": "finetunejob/nothing:1"}}),
        ("prepare", "PodRefused", r"serviceaccount.*nobody", {"template": {"serviceAccountName": "nobody"}}),
        ("sft", "Unschedulable", r"Insufficient nvidia\.com/gpu", {"resources": {"gpus": 1}}),
    ],
)
def test_a_stage_that_cannot_start_says_what_it_waits_for(
    world: Installed, troubled: str, spec: Object, stage: str, reason: str, words: str, changed: Object
) -> None:
    """STATUS names what is missing, while the job goes on waiting for it."""
    job = f"waits-{reason.lower()}"
    if "storage" in changed:
        changed = {"storage": spec["storage"] | changed["storage"]}
    world.apply(troubled, make(spec, job, **changed))

    def told() -> Object | None:
        entry = world.stage(troubled, job, stage)
        return entry if entry.get("reason") == reason else None

    entry = world.wait(f"{job}: {reason}", told, SECONDS)
    assert entry["state"] == "Pending"
    assert re.search(words, entry["message"]), entry
    summary = world.status(troubled, job)["summary"]
    assert reason in summary
    assert re.search(words, summary), summary
    assert any(event["reason"] == reason and re.search(words, event["message"]) for event in _events(world, job))
    world.kubectl("-n", troubled, "delete", f"ftj/{job}")  # what it asks for is wanted by the next


def test_a_deleted_job_takes_all_its_children_along(world: Installed, troubled: str) -> None:
    """Jobs and pods go, the objects in the store stay."""
    world.kubectl("-n", troubled, "delete", "ftj", "--all")
    world.wait("no Job", lambda: not world.items(troubled, "jobs,pods"), SECONDS)
    listed = world.s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{troubled}/memory/prepare/")
    assert any(entry["Key"].endswith("manifest.json") for entry in listed["Contents"])


def make(spec: Object, name: str, *, resources: Object | None = None, **changed: Any) -> Object:
    """A job of that spec, with other resources for its training, or other parts."""
    (sft,) = spec["pipeline"]
    pipeline = [sft | ({"resources": resources} if resources else {})]
    return example(name, **(spec | {"pipeline": pipeline} | changed))


def _events(world: Installed, job: str) -> list[Object]:
    text = world.kubectl("-n", "troubled", "get", "events.v1.events.k8s.io", "-o", "json")
    said = []
    for event in json.loads(text)["items"]:
        about = event["regarding"]
        if (about["kind"], about["name"]) == ("FineTuneJob", job):
            said.append({"reason": event["reason"], "message": event.get("note", "")})
    return said
