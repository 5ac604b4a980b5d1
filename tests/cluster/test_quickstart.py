"""The quickstart on a real cluster, from the chart to a GGUF that answers, and what a disturbed run makes of it."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from tests.cluster.builds import NAMES, REPOSITORY
from tests.cluster.installed import BUCKET, EXAMPLE, Installed, Object, example, sha256
from tests.cluster.node import Cluster

from finetune_api.stage import Manifest

STAGES = ["prepare", "baseline", "sft", "dpo", "merge", "gguf", "evaluate", "report"]
QUESTION = "This is Sarah Collins writing from Berlin: 12 small trays would do, if they can be here on Friday."
ANSWER = {"name": "Sarah Collins", "item": "small trays", "quantity": 12, "city": "Berlin", "day": "Friday"}
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def quickstart(world: Installed) -> Object:
    """The example as it is, applied as its first lines say, and over; with the STATUS columns seen on the way."""
    world.kubectl("apply", "-f", str(EXAMPLE))
    seen: set[str] = set()

    def over() -> Object | None:
        row = world.kubectl("get", "ftj", "quickstart-cluster", "--no-headers").strip()
        seen.add(re.sub(r" {2,}", "|", row))
        status = world.status("default", "quickstart-cluster")
        done = [c["type"] for c in status.get("conditions", []) if c["status"] == "True"]
        return status if {"Complete", "Failed"} & set(done) else None

    status = dict(world.wait("the quickstart", over, 3600))
    return {**status, "seen": seen}


def test_the_operators_image_is_small_and_has_no_tools(world: Installed) -> None:
    """Under 150 MB over its base, uncompressed; it runs as nobody in particular, and says what it is."""
    sizes, config = _image(world.cluster, f"{REPOSITORY}/operator:{world.tag}")
    base, *ours = sizes
    assert base > 100 * MEGABYTE
    assert 10 * MEGABYTE < sum(ours) < 150 * MEGABYTE
    assert config["User"] == "65532:65532"
    assert config["Labels"]["org.opencontainers.image.title"] == "finetune-operator"


@pytest.mark.parametrize("name", NAMES)
def test_images_hold_nothing_to_build_with(world: Installed, name: str) -> None:
    """No compiler, no installer; and they are licensed, versioned and without root."""
    _, config = _image(world.cluster, f"{REPOSITORY}/{name}:{world.tag}")
    assert config["User"] == "65532:65532"
    for label in ("title", "version", "revision", "licenses"):
        assert config["Labels"][f"org.opencontainers.image.{label}"]
    mount = world.cluster.directory / "mounted"
    mount.mkdir(exist_ok=True)
    world.cluster.ctr("images", "mount", f"{REPOSITORY}/{name}:{world.tag}", str(mount))
    try:
        programs = ("gcc", "cc", "g++", "cmake", "ninja", "uv", "pip", "git")
        found = "\n".join(str(mount / directory / p) for directory in ("usr/bin", "opt/venv/bin") for p in programs)
        script = f"for path in {found.replace(chr(10), ' ')}; do if [ -e $path ]; then echo $path; fi; done"
        assert world.cluster.on_node("sh", "-c", script) == ""
    finally:
        world.cluster.ctr("images", "unmount", str(mount))


def test_apply_runs_every_stage_as_one_job(world: Installed, quickstart: Object) -> None:
    """Complete, each stage at its first attempt, and the columns told it on the way."""
    told = {c["type"]: c for c in quickstart["conditions"]}
    assert told["Complete"]["status"] == "True", quickstart
    assert told["GatePassed"]["status"] == "True", quickstart
    assert [(s["name"], s["state"], s["attempt"]) for s in quickstart["stages"]] == [(n, "Complete", 1) for n in STAGES]
    jobs = world.items("default", "jobs", "-l", "finetune.dev/job=quickstart-cluster")
    assert sorted(j["metadata"]["labels"]["finetune.dev/stage"] for j in jobs) == sorted(STAGES)
    assert {s["job"] for s in quickstart["stages"]} == {j["metadata"]["name"] for j in jobs}
    header = world.kubectl("get", "ftj").splitlines()[0].split()
    assert header == ["NAME", "STAGE", "PROGRESS", "ETA", "STATUS", "AGE"]
    rows = " ".join(quickstart["seen"])
    for word in ("Running prepare", "Running sft", "Running merge", "Complete"):
        assert word in rows, quickstart["seen"]
    # Progress came from the pods themselves, while they ran.
    assert re.search(r"\|sft\|2/8 [1-9]\d*%\|", rows), quickstart["seen"]


def test_stages_run_with_no_rights_and_the_images_of_their_kind(world: Installed, quickstart: Object) -> None:
    """Training has the trainer image, the rest that without what only training needs."""
    images = {s["name"]: s["image"] for s in quickstart["stages"]}
    pods = world.items("default", "pods", "-l", "finetune.dev/job=quickstart-cluster")
    used = {p["metadata"]["labels"]["finetune.dev/stage"]: p["spec"]["containers"][0]["image"] for p in pods}
    for stage in STAGES:
        kind = "trainer" if stage in ("sft", "dpo") else "gguf"
        assert used[stage] == f"finetunejob/{kind}:{world.tag}"
    assert len(set(images.values())) == 2


def test_artifacts_are_those_of_the_status(world: Installed, quickstart: Object) -> None:
    """Every artifact's size and sha256 are those of the object in the store."""
    names = {(a["stage"], a["name"]) for a in quickstart["artifacts"]}
    assert {("gguf", "Q4_K_M"), ("gguf", "Q8_0"), ("report", "report.json")} <= names
    for artifact in quickstart["artifacts"]:
        content = world.read(artifact["uri"])
        assert (len(content), sha256(content)) == (artifact["sizeBytes"], artifact["sha256"]), artifact
    assert b"<html" in world.read(quickstart["reportURI"])


def test_the_gguf_answers(world: Installed, quickstart: Object, tmp_path: Path) -> None:
    """The question of the README has the answer of the README."""
    from llama_cpp import Llama

    (artifact,) = [a for a in quickstart["artifacts"] if (a["stage"], a["name"]) == ("gguf", "Q4_K_M")]
    path = tmp_path / "model.gguf"
    path.write_bytes(world.read(artifact["uri"]))
    model = Llama(str(path), n_ctx=512, verbose=False)
    messages = [
        {"role": "system", "content": "Order form as JSON: name, item, quantity, city, day."},
        {"role": "user", "content": QUESTION},
    ]
    answer = model.create_chat_completion(messages, temperature=0, max_tokens=80)  # type: ignore[arg-type]
    assert json.loads(answer["choices"][0]["message"]["content"]) == ANSWER  # type: ignore[index]


def test_the_same_inputs_are_not_computed_again(world: Installed, quickstart: Object) -> None:
    """A second job of the same spec trains nothing; it goes on with the GGUF, in whose name and metadata is its own."""
    world.apply("default", example("again"))

    def at_gguf() -> Object | None:
        states = {s["name"]: s["state"] for s in world.status("default", "again").get("stages", [])}
        return states if states.get("gguf", "Waiting") != "Waiting" else None

    states = world.wait("again: gguf", at_gguf)
    assert [states[name] for name in STAGES[:5]] == ["Reused"] * 5, states
    jobs = world.items("default", "jobs", "-l", "finetune.dev/job=again")
    assert {j["metadata"]["labels"]["finetune.dev/stage"] for j in jobs} == {"prepare", "gguf"}
    assert world.status("default", "quickstart-cluster")["artifacts"] == quickstart["artifacts"]
    world.kubectl("delete", "ftj/again")


def test_a_disturbed_training_makes_the_same_adapter(world: Installed, quickstart: Object) -> None:
    """Killed after its checkpoint, its pod deleted after that: it goes on twice, to the very same weights."""
    # In a namespace of its own, since reuse never crosses namespaces.
    world.make_namespace("disturbed")
    sft = next(stage for stage in example("x")["spec"]["pipeline"] if stage["name"] == "sft")
    # More of them than the example has, so that there is time after the first; the result is the last in both.
    sft["sft"]["checkpoint"] = {"steps": 4, "best": False}
    world.apply("disturbed", example("disturbed", pipeline=[sft], evaluation={"skip": True}))
    prefix = "disturbed/disturbed/sft/"

    def committed() -> list[str]:
        listed = world.s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return [o["Key"] for o in listed if re.search(r"checkpoints/step-\d+/manifest.json$", o["Key"])]

    world.wait("a checkpoint", committed)
    first = _pod(world, 1)
    for pid in _processes(first["metadata"]["uid"]):
        os.kill(pid, signal.SIGKILL)

    def second() -> str:
        selector = "finetune.dev/stage=sft,finetune.dev/attempt=2"
        said = world.kubectl("-n", "disturbed", "logs", "--ignore-errors", "-l", selector, "--tail=-1")
        return said if re.search(r"step \d+ of 16: loss", said) else ""

    # By its log: the status lags by up to 10 s, in which so small a training may end.
    assert re.search(r"going on from step [1-9]\d* of 16", world.wait("the second attempt, going on", second))
    world.kubectl("-n", "disturbed", "delete", "pod", _pod(world, 2)["metadata"]["name"], "--wait=false")
    status = world.wait_until_over("disturbed", "disturbed")
    states = {s["name"]: (s["state"], s["attempt"]) for s in status["stages"]}
    assert states["sft"] == ("Complete", 3), status
    assert states["prepare"] == ("Complete", 1)
    assert _adapter(world, "disturbed/disturbed") == _adapter(world, "default/quickstart-cluster")


def _adapter(world: Installed, job: str) -> str:
    """The sha256 of the trained adapter, by the stage's manifest in the store."""
    latest = json.loads(world.read(f"s3://{BUCKET}/{job}/sft/latest.json"))
    manifest = Manifest.model_validate_json(world.read(f"s3://{BUCKET}/{latest['manifest']}"))
    (adapter,) = [file for file in manifest.files if file.key.endswith("/adapter_model.safetensors")]
    return adapter.sha256


def _pod(world: Installed, attempt: int) -> Object:
    (pod,) = world.items("disturbed", "pods", "-l", f"finetune.dev/stage=sft,finetune.dev/attempt={attempt}")
    return pod


def _processes(pod: str) -> list[int]:
    """Of a pod's stage on this machine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            groups, command = (entry / "cgroup").read_text(), (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if f"pod{pod}" in groups and b"finetune_jobs" in command:
            found.append(int(entry.name))
    assert found
    return found


def _image(cluster: Cluster, name: str) -> tuple[list[int], Object]:
    """The sizes of an image's layers, its base's first, and its configuration."""
    digest = next(line.split()[2] for line in cluster.ctr("images", "list").splitlines() if line.startswith(f"{name} "))
    manifest = json.loads(cluster.ctr("content", "get", digest))
    config = json.loads(cluster.ctr("content", "get", manifest["config"]["digest"]))
    return [layer["size"] for layer in manifest["layers"]], config["config"]
