"""A training on two nodes: two pods that find each other by the cluster's DNS, lose one, and go on with both.

The test cluster has one node, which makes no difference to either: each pod has its own address, name and disk.
"""

import re
from typing import Any

import pytest
from tests.cluster.installed import BUCKET, Installed, Object, example

STEP = re.compile(r"step (\d+) of 16: loss (\d+\.\d+)")


def training(name: str, **resources: Any) -> Object:
    """The quickstart's sft alone, with checkpoints on the way, on so many nodes."""
    sft = next(stage for stage in example("x")["spec"]["pipeline"] if stage["name"] == "sft")
    sft["sft"]["checkpoint"] = {"steps": 4, "best": False}
    sft["resources"] = {"cpu": "500m", "memory": "5Gi", **resources}  # two of them fit on a node of two cores
    return example(name, pipeline=[sft], evaluation={"skip": True})


@pytest.fixture(scope="module")
def on_one(world: Installed) -> dict[int, float]:
    """The losses of an undisturbed training on one node, by step."""
    # Each in a namespace of its own: on how many nodes it ran does not keep a result from being reused.
    world.make_namespace("one-node")
    world.apply("one-node", training("one"))
    status = world.wait_until_over("one-node", "one")
    assert status["summary"] == "Complete", status
    return losses(world, "one-node", 1)


@pytest.fixture(scope="module")
def on_two(world: Installed) -> tuple[Object, dict[int, float]]:
    """The same training on two nodes, in the middle of which the second one's processes were killed: how it ended, and
    the losses up to then."""
    world.make_namespace("two-nodes")
    world.apply("two-nodes", training("two", nodes=2))

    def committed() -> list[str]:
        listed = world.s3.list_objects_v2(Bucket=BUCKET, Prefix="two-nodes/two/sft/").get("Contents", [])
        return [o["Key"] for o in listed if re.search(r"checkpoints/step-\d+/manifest.json$", o["Key"])]

    world.wait("a checkpoint", committed)
    second = pods(world, "two-nodes", 1)[1]["metadata"]["name"]
    # All but PID 1, which no process of its own container can kill.
    world.kubectl("-n", "two-nodes", "exec", second, "--", "python", "-c", "import os; os.kill(-1, 9)")
    world.wait("the second attempt", lambda: world.stage("two-nodes", "two", "sft").get("attempt") == 2)
    before = losses(world, "two-nodes", 1)  # once the second one has ended, the first one's Job is deleted
    return dict(world.wait_until_over("two-nodes", "two")), before


def test_two_pods_train_as_one(world: Installed, on_two: tuple[Object, dict[int, float]]) -> None:
    """One attempt is two pods, which were told the first one's name; one Service serves all attempts."""
    assert on_two[0]["summary"] == "Complete", on_two
    attempt = pods(world, "two-nodes", 2)
    assert [pod["spec"]["subdomain"] for pod in attempt] == [
        service["metadata"]["name"] for service in world.items("two-nodes", "services")
    ] * 2
    variables = {v["name"]: v.get("value") for v in attempt[1]["spec"]["containers"][0]["env"]}
    assert variables["FINETUNE_RENDEZVOUS"].startswith(f"{attempt[0]['spec']['hostname']}.")
    assert not STEP.search(log(world, "two-nodes", attempt[1]))  # one of them tells


def test_a_lost_pod_ends_the_attempt_and_both_go_on(world: Installed, on_two: tuple[Object, dict[int, float]]) -> None:
    """Counted once, from the checkpoint, and not from the beginning."""
    sft = next(stage for stage in on_two[0]["stages"] if stage["name"] == "sft")
    assert (sft["state"], sft["attempt"], sft["failures"]) == ("Complete", 2, 1), sft
    assert re.search(r"going on from step [1-9]\d* of 16", log(world, "two-nodes", pods(world, "two-nodes", 2)[0]))


def test_it_learns_what_one_node_learns(
    world: Installed, on_one: dict[int, float], on_two: tuple[Object, dict[int, float]]
) -> None:
    """Step by step the same loss, but for the order in which numbers are added, over both attempts."""
    found = {**on_two[1], **losses(world, "two-nodes", 2)}
    assert sorted(on_one) == sorted(found) == list(range(1, 17))
    assert found == pytest.approx(on_one, rel=0.02, abs=2e-3)


def pods(world: Installed, namespace: str, attempt: int) -> list[Object]:
    """Those of an attempt of the training, by index."""
    found = world.items(namespace, "pods", "-l", f"finetune.dev/stage=sft,finetune.dev/attempt={attempt}")
    index = "batch.kubernetes.io/job-completion-index"
    return sorted(found, key=lambda pod: int(pod["metadata"]["labels"].get(index, 0)))


def log(world: Installed, namespace: str, pod: Object) -> str:
    """All that it said."""
    return world.kubectl("-n", namespace, "logs", pod["metadata"]["name"])


def losses(world: Installed, namespace: str, attempt: int) -> dict[int, float]:
    """By step, as the first pod told them."""
    said = log(world, namespace, pods(world, namespace, attempt)[0])
    return {int(step): float(loss) for step, loss in STEP.findall(said)}
