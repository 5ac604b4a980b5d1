"""A training on two nodes: two pods that find each other by the cluster's DNS, lose one, and go on with both.

The test cluster has one node, which makes no difference to either: each pod has its own address, name and disk.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import pytest
from tests.cluster.installed import BUCKET, Installed, Object, example

from finetune_api.stage import Manifest


def training(name: str, **resources: Any) -> Object:
    """The quickstart's sft alone, with checkpoints on the way, on so many nodes, which share the model.

    Checkpoints change nothing of what is learned, so the quickstart itself is the training on one node.
    """
    sft = next(stage for stage in example("x")["spec"]["pipeline"] if stage["name"] == "sft")
    sft["sft"]["checkpoint"] = {"steps": 4, "best": False}
    sft["sft"]["training"]["distributed"] = "fsdp"
    sft["resources"] = {"cpu": "500m", "memory": "5Gi", **resources}  # two of them fit on a node of two cores
    return example(name, pipeline=[sft], evaluation={"skip": True})


@dataclass(frozen=True)
class Trained:
    """What became of a training."""

    status: Object
    log: Object
    """Its ``training.json``."""
    first: list[Object]
    """The pods of the first attempt, by index, while they ran."""


@pytest.fixture(scope="module")
def on_two(world: Installed) -> Trained:
    """A training on two nodes, in the middle of which the second one's processes were killed."""
    world.make_namespace("two-nodes")
    world.apply("two-nodes", training("two", nodes=2))

    def committed() -> list[str]:
        listed = world.s3.list_objects_v2(Bucket=BUCKET, Prefix="two-nodes/two/sft/").get("Contents", [])
        return [o["Key"] for o in listed if re.search(r"checkpoints/step-\d+/manifest.json$", o["Key"])]

    world.wait("a checkpoint", committed)
    attempt = pods(world, 1)
    # All but PID 1, which no process of its own container can kill.
    kill = ("exec", attempt[1]["metadata"]["name"], "--", "python", "-c", "import os; os.kill(-1, 9)")
    world.kubectl("-n", "two-nodes", *kill)
    status = world.wait_until_over("two-nodes", "two")
    assert status["summary"] == "Complete", status
    return Trained(status, training_log(world, "two-nodes/two"), attempt)


def test_two_pods_train_as_one(world: Installed, on_two: Trained) -> None:
    """One attempt is two pods, which were told the first one's name; one Service serves all attempts."""
    (service,) = world.items("two-nodes", "services")
    assert [pod["spec"]["subdomain"] for pod in on_two.first] == [service["metadata"]["name"]] * 2
    variables = {v["name"]: v.get("value") for v in on_two.first[1]["spec"]["containers"][0]["env"]}
    assert variables["FINETUNE_RENDEZVOUS"].startswith(f"{on_two.first[0]['spec']['hostname']}.")
    assert (on_two.log["batch"]["processes"], on_two.log["batch"]["shards"]) == (2, 2)


def test_a_lost_pod_ends_the_attempt_and_both_go_on(on_two: Trained) -> None:
    """Counted once, from the checkpoint, and not from the beginning."""
    sft = next(stage for stage in on_two.status["stages"] if stage["name"] == "sft")
    assert (sft["state"], sft["attempt"], sft["failures"]) == ("Complete", 2, 1), sft
    assert len(on_two.log["resumedFrom"]) == 1
    assert on_two.log["resumedFrom"][0] >= 4


def test_it_learns_what_one_node_learns(world: Installed, quickstart: Object, on_two: Trained) -> None:
    """Step by step the quickstart's loss, but for the order in which numbers are added, over both attempts."""
    assert quickstart["summary"] == "Complete", quickstart
    alone = training_log(world, "default/quickstart-cluster")
    assert alone["batch"]["processes"] == 1
    assert sorted(losses(alone)) == sorted(losses(on_two.log)) == list(range(1, 17))
    assert losses(on_two.log) == pytest.approx(losses(alone), rel=0.02, abs=2e-3)


def training_log(world: Installed, job: str) -> Object:
    """What the job's sft left as ``training.json``: how it was laid out, where it was resumed, the losses."""
    latest = json.loads(world.read(f"s3://{BUCKET}/{job}/sft/latest.json"))
    manifest = Manifest.model_validate_json(world.read(f"s3://{BUCKET}/{latest['manifest']}"))
    (log,) = [file.key for file in manifest.files if file.key.endswith("/training.json")]
    return dict(json.loads(world.read(f"s3://{BUCKET}/{log}")))


def losses(log: Object) -> dict[int, float]:
    """By step, of all attempts."""
    return {point["step"]: point["loss"] for point in log["curve"]}


def pods(world: Installed, attempt: int) -> list[Object]:
    """Those of an attempt of the training on two nodes, by index."""
    found = world.items("two-nodes", "pods", "-l", f"finetune.dev/stage=sft,finetune.dev/attempt={attempt}")
    index = "batch.kubernetes.io/job-completion-index"
    return sorted(found, key=lambda pod: int(pod["metadata"]["labels"][index]))
