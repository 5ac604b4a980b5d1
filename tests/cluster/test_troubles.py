"""What goes wrong on a real cluster is told in STATUS and by an Event, at once, in words that a user can act on."""

import json
import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.images import write_image
from tests.cluster.installed import BUCKET, Installed, Object, example

SECONDS = 600
"""Until a trouble is there: the machine starts several stages at once."""
TOLD = timedelta(seconds=15)
"""From then on, until STATUS and an Event say so: by the times that are in the API, which have whole seconds."""
QUIET = "docker.io/local/quiet:1"
"""An image whose container does nothing, and ends with exit code 0 when it is told to."""


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
    """The job is Failed within 15 s of its pod's end, and says which stage, why, and what to do."""
    status = world.wait_until_over(troubled, job)
    (failed,) = [c for c in status["conditions"] if (c["type"], c["status"]) == ("Failed", "True")]
    told = next(entry for entry in status["stages"] if entry["name"] == stage)
    assert (told["state"], told["reason"]) == ("Failed", reason), told
    assert re.search(words, told["message"]), told
    assert stage in failed["message"]
    assert status["summary"] == f"Failed: {stage}: {reason}"
    (pod,) = world.items(troubled, "pods", "-l", f"finetune.dev/job={job},finetune.dev/stage={stage}")
    ended = time(pod["status"]["containerStatuses"][0]["state"]["terminated"]["finishedAt"])
    assert time(failed["lastTransitionTime"]) - ended <= TOLD
    event = world.wait(f"{job}: an Event", lambda: first_told(world, troubled, job, reason, words))
    assert event - ended <= TOLD


@pytest.mark.parametrize(
    ("stage", "reason", "words", "changed"),
    [
        ("prepare", "SecretMissing", r'secret "nowhere" not found', {"storage": {"secretRef": {"name": "nowhere"}}}),
        ("prepare", "ImagePull", r"finetunejob/nothing:1", {"template": {"image": "finetunejob/nothing:1"}}),
        ("prepare", "PodRefused", r"serviceaccount.*nobody", {"template": {"serviceAccountName": "nobody"}}),
        ("sft", "Unschedulable", r"Insufficient nvidia\.com/gpu", {"resources": {"gpus": 4}}),
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
    check_waiting(world, troubled, job, stage, reason, words)
    world.kubectl("-n", troubled, "delete", f"ftj/{job}")  # what it asks for is wanted by the next


def test_a_quota_that_is_used_up_is_told(world: Installed, spec: Object) -> None:
    """In the API server's words, which name the quota."""
    world.make_namespace("crowded")
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "no-pods"}}
    world.apply("crowded", {**quota, "spec": {"hard": {"pods": "0"}}})
    world.wait("the quota", lambda: "used" in world.get("crowded", "resourcequota/no-pods").get("status", {}))
    world.apply("crowded", make(spec, "quota"))
    check_waiting(world, "crowded", "quota", "prepare", "PodRefused", r"exceeded quota: no-pods")


def test_a_pod_that_ends_with_zero_when_deleted_has_no_result(
    world: Installed, troubled: str, spec: Object, tmp_path: Path
) -> None:
    """Exit code 0 alone is no success: STATUS and an Event say so, and the stage is tried again."""
    busybox = world.node.on_node("which", "busybox").strip()
    script = "trap 'exit 0' TERM; while true; do sleep 1 & wait; done"
    command = ["/bin/sh", "-c", script]
    links = {"/bin/sh": "busybox", "/bin/sleep": "busybox"}
    write_image(tmp_path / "quiet.tar", QUIET, {"/bin/busybox": Path(busybox)}, command, links)
    world.node.load_image(tmp_path / "quiet.tar")
    world.apply(troubled, make(spec, "quiet", template={"image": QUIET}))

    def running() -> Object | None:
        pods = world.items(troubled, "pods", "-l", "finetune.dev/job=quiet")
        return next((pod for pod in pods if pod["status"]["phase"] == "Running"), None)

    name = world.wait("quiet: a pod", running)["metadata"]["name"]
    deleted = datetime.now().astimezone().replace(microsecond=0)
    world.kubectl("-n", troubled, "delete", "pod", name, "--wait=false")
    words = r"exit code 0.*no result"
    event = world.wait("quiet: NoResult", lambda: first_told(world, troubled, "quiet", "NoResult", words), SECONDS)
    assert event - deleted <= TOLD
    told = world.stage(troubled, "quiet", "prepare")
    assert (told["state"], told["failures"]) in (("Retrying", 1), ("Pending", 1), ("Running", 1)), told
    world.kubectl("-n", troubled, "delete", "ftj/quiet")


def make(spec: Object, name: str, *, resources: Object | None = None, **changed: Any) -> Object:
    """A job of that spec, with other resources for its training, or other parts."""
    (sft,) = spec["pipeline"]
    pipeline = [sft | ({"resources": resources} if resources else {})]
    return example(name, **(spec | {"pipeline": pipeline} | changed))


def check_waiting(world: Installed, namespace: str, job: str, stage: str, reason: str, words: str) -> None:
    """The stage is Pending for that reason; STATUS and an Event said so within 15 s of when the cluster itself did."""

    def told() -> Object | None:
        found = world.get(namespace, f"ftj/{job}", "--show-managed-fields")
        stages = found.get("status", {}).get("stages", [])
        entry = next((entry for entry in stages if entry["name"] == stage), {})
        return found if entry.get("reason") == reason and re.search(words, entry["message"]) else None

    found = world.wait(f"{job}: {reason}", told, SECONDS)
    entry = next(entry for entry in found["status"]["stages"] if entry["name"] == stage)
    assert entry["state"] == "Pending"
    assert reason in found["status"]["summary"]
    assert re.search(words, found["status"]["summary"]), found["status"]["summary"]
    since = min(causes(world, namespace, entry["job"], words))
    written = [f["time"] for f in found["metadata"]["managedFields"] if f.get("subresource") == "status"]
    assert time(max(written)) - since <= TOLD
    event = world.wait(f"{job}: an Event", lambda: first_told(world, namespace, job, reason, words), SECONDS)
    assert event - since <= TOLD


def causes(world: Installed, namespace: str, job: str, words: str) -> Iterator[datetime]:
    """When the cluster said that of an attempt's Job or pod: by an Event, or the scheduler by the pod's condition."""
    pods = world.items(namespace, "pods", "-l", f"batch.kubernetes.io/job-name={job}")
    for condition in (c for pod in pods for c in pod["status"].get("conditions", [])):
        if re.search(words, condition.get("message", "")):
            yield time(condition["lastTransitionTime"])
    about = {job, *(pod["metadata"]["name"] for pod in pods)}
    for event in events(world, namespace):
        warns = event["type"] == "Warning" and event["regarding"]["name"] in about
        if warns and re.search(words, event.get("note", "")):
            yield first(event)


def first_told(world: Installed, namespace: str, job: str, reason: str, words: str) -> datetime | None:
    """When an Event of the FineTuneJob said so for the first time."""
    said = [
        first(event)
        for event in events(world, namespace)
        if (event["regarding"]["kind"], event["regarding"]["name"], event["reason"]) == ("FineTuneJob", job, reason)
        and re.search(words, event.get("note", ""))
    ]
    return min(said, default=None)


def events(world: Installed, namespace: str) -> list[Object]:
    """All of a namespace."""
    text = world.kubectl("-n", namespace, "get", "events.v1.events.k8s.io", "-o", "json")
    return list(json.loads(text)["items"])


def first(event: Object) -> datetime:
    """When it was seen first."""
    return time(event.get("deprecatedFirstTimestamp") or event["eventTime"])


def time(text: str) -> datetime:
    """As the API writes it, in whole seconds."""
    return datetime.fromisoformat(text).replace(microsecond=0)
