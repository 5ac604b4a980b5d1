import json
from dataclasses import replace
from typing import Any

import pytest
from tests.builders import DPO, GGUF, MERGE, NOW, SFT, a_job, a_result, done, stage_of

from finetune_api.stage import StageRun
from finetune_api.types import FineTuneJob
from finetune_operator.plan.jobs import new_child
from finetune_operator.plan.plan import plan
from finetune_operator.plan.pods import STAGE_ANNOTATION, PodSettings, batch_job

SETTINGS = PodSettings(trainer_image="trainer:1", gguf_image="gguf:1")
EARLIER = ("prepare", "baseline", "sft", "dpo", "merge", "gguf", "evaluate")


def made(
    job: FineTuneJob, stage: str, *, parameters: int | None = None, settings: PodSettings = SETTINGS, **labels: str
) -> dict[str, Any]:
    """The Job for the stage's first attempt, all others done."""
    status = plan(job, done(*(s for s in EARLIER if s != stage)), [], NOW, cluster=True).status
    stages = {s.name: s for s in status.stages}
    stages[stage] = stage_of(status, stage).model_copy(update={"attempt": 1, "job": f"bot-{stage}-1"})
    if parameters is not None and stage != "prepare":
        result = a_result("prepare", parameters=parameters)
        stages["prepare"] = stages["prepare"].model_copy(update={"result": result})
    return batch_job(job, labels, new_child(job, stages, stage), settings)


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    """Its pod's spec."""
    return job["spec"]["template"]["spec"]


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    """Its only container."""
    (container,) = pod_of(job)["containers"]
    return container


def environment_of(job: dict[str, Any]) -> dict[str, Any]:
    """Its variables: values, or where they come from."""
    return {v["name"]: v.get("value", v.get("valueFrom")) for v in container_of(job)["env"]}


def test_rows_of_config_maps_are_mounted_where_they_are_read() -> None:
    """By ``prepare`` alone, each ConfigMap once with the keys that are asked for, whichever stage asks."""
    rows = ["configmap://rows/b.jsonl", "configmap://rows/a.csv", "s3://data/t.jsonl", "configmap://more/x.jsonl"]
    own = {**DPO, "data": {"preference": [{"source": "configmap://rows/pairs.jsonl"}]}}
    job = a_job(SFT, own, MERGE, GGUF, data={"train": [{"source": source} for source in rows]})
    prepare = made(job, "prepare")
    keys = {
        v["configMap"]["name"]: [i["key"] for i in v["configMap"]["items"]]
        for v in pod_of(prepare)["volumes"]
        if v["name"].startswith("rows")
    }
    assert keys == {"more": ["x.jsonl"], "rows": ["a.csv", "b.jsonl", "pairs.jsonl"]}
    mounts = {m["mountPath"] for m in container_of(prepare)["volumeMounts"] if m["name"].startswith("rows")}
    where = environment_of(prepare)["FINETUNE_CONFIG_MAPS"]
    assert mounts == {f"{where}/more", f"{where}/rows"}
    assert not [v for v in pod_of(made(job, "sft"))["volumes"] if v["name"].startswith("rows")]


def test_a_job_is_one_attempt() -> None:
    """Nothing is retried by Kubernetes, and every FailJob rule only keeps the cause."""
    spec = made(a_job(), "sft")["spec"]
    assert (spec["backoffLimit"], spec["podReplacementPolicy"]) == (0, "Failed")
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    rules = spec["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob"] * 4
    assert rules[0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert [(r["onExitCodes"]["operator"], r["onExitCodes"]["values"]) for r in rules[1:]] == [
        ("In", [64, 65, 66]),
        ("In", [75, 143]),
        ("NotIn", [0]),
    ]
    assert "suspend" not in spec  # Kueue's to write
    assert "ttlSecondsAfterFinished" not in spec  # status is the ledger: only then may a Job vanish


def test_a_pod_is_told_its_task_by_an_annotation() -> None:
    """What stands there is read back as the very same stage run."""
    job = a_job()
    annotations = made(job, "sft")["spec"]["template"]["metadata"]["annotations"]
    run = StageRun.model_validate_json(annotations[STAGE_ANNOTATION])
    assert (run.stage, run.attempt, run.spec) == ("sft", 1, job.spec)
    assert run.inputs == {"prepare": "prepare/manifest.json", "baseline": "baseline/manifest.json"}
    (task,) = [v for v in pod_of(made(job, "sft"))["volumes"] if v["name"] == "task"]
    assert task["downwardAPI"]["items"][0]["fieldRef"]["fieldPath"] == f"metadata.annotations['{STAGE_ANNOTATION}']"
    assert container_of(made(job, "sft"))["args"] == ["/etc/finetune/stage.json"]


def test_a_job_is_owned_and_found() -> None:
    """The garbage collector and the caches know whose it is; only Kueue's labels are passed on."""
    job = made(a_job(), "sft", **{"kueue.x-k8s.io/queue-name": "gpus", "team": "x"})
    (owner,) = job["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"], owner["controller"]) == ("FineTuneJob", "bot", "u-1", True)
    labels = job["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "gpus"
    assert "team" not in labels
    assert (labels["finetune.dev/job"], labels["finetune.dev/stage"], labels["finetune.dev/attempt"]) == (
        "bot",
        "sft",
        "1",
    )
    assert labels.items() >= job["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("stage", "resources", "image", "gpus"),
    [
        ("prepare", {}, "gguf:1", None),
        ("sft", {}, "trainer:1", None),
        ("sft", {"gpus": 2}, "trainer:1", "2"),
        ("merge", {}, "gguf:1", None),
        ("merge", {"gpus": 1}, "trainer:1", "1"),
        ("gguf", {}, "gguf:1", None),
    ],
)
def test_the_image_and_the_gpus_follow_the_stage(
    stage: str, resources: dict[str, Any], image: str, gpus: str | None
) -> None:
    """Training and GPUs need the trainer's image, all else the one without CUDA."""
    pipeline = [s | ({"resources": resources} if s["name"] == stage else {}) for s in (SFT, DPO, MERGE, GGUF)]
    container = container_of(made(a_job(*pipeline), stage))
    assert container["image"] == image
    assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
    assert container["resources"]["requests"].get("nvidia.com/gpu") == gpus


@pytest.mark.parametrize(("image", "expected"), [("unsloth:1", "unsloth:1"), ("", "trainer:1")])
def test_a_stage_of_another_backend_has_an_image_of_its_own(image: str, expected: str) -> None:
    """The stage alone, and if there is none that of every training, where transformers takes its place."""
    job = a_job(SFT | {"sft": {"training": {"backend": "unsloth"}}}, DPO, MERGE)
    settings = replace(SETTINGS, unsloth_image=image)
    images = [container_of(made(job, stage, settings=settings))["image"] for stage in ("sft", "dpo", "merge")]
    assert images == [expected, "trainer:1", "gguf:1"]


def test_evaluation_runs_on_the_largest_gpus_of_the_pipeline() -> None:
    """Unless it has resources of its own; ``report`` needs none."""
    pipeline = [SFT | {"resources": {"gpus": 4}}, MERGE, GGUF]
    assert container_of(made(a_job(*pipeline), "evaluate"))["resources"]["limits"]["nvidia.com/gpu"] == "4"
    own = a_job(*pipeline, evaluation={"resources": {"gpus": 1}})
    assert container_of(made(own, "baseline"))["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in container_of(made(a_job(*pipeline), "report"))["resources"]["limits"]


def test_gpus_of_another_maker() -> None:
    """The resource's name is the user's to say."""
    resources = {"gpus": 1, "gpuResourceName": "amd.com/gpu"}
    limits = container_of(made(a_job(SFT | {"resources": resources}), "sft"))["resources"]["limits"]
    assert limits["amd.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in limits


def test_several_gpus_get_shared_memory() -> None:
    """NCCL needs more than the 64 MiB that a container has."""
    (shm,) = [v for v in pod_of(made(a_job(SFT | {"resources": {"gpus": 8}}), "sft"))["volumes"] if v["name"] == "shm"]
    assert shm["emptyDir"]["medium"] == "Memory"
    assert "shm" not in [v["name"] for v in pod_of(made(a_job(), "sft"))["volumes"]]


def test_memory_and_disk_follow_the_model() -> None:
    """A larger model asks for more, and what the user says counts before that."""

    def asks(parameters: int, **resources: Any) -> tuple[int, int]:
        job = made(a_job(SFT | {"resources": resources}, MERGE), "merge", parameters=parameters)
        memory = container_of(job)["resources"]["limits"]["memory"]
        (disk,) = [v["emptyDir"]["sizeLimit"] for v in pod_of(job)["volumes"] if v["name"] == "workspace"]
        return int(memory.removesuffix("Mi")), int(disk.removesuffix("Mi"))

    small, large = asks(135_000_000), asks(70_000_000_000)
    assert small[0] < 5_000 < 60_000 < large[0] < 90_000
    assert large[1] > 2 * 140_000_000_000 / 2**20  # both models, the base's and the merged one's
    own = SFT | {"resources": {"cpu": "500m", "memory": "1Gi", "workspace": {"size": "3Gi"}}}
    job = made(a_job(own), "sft", parameters=135_000_000)
    assert container_of(job)["resources"] == {
        "requests": {"cpu": "500m", "memory": "1Gi"},
        "limits": {"memory": "1Gi"},
    }
    (workspace,) = [v for v in pod_of(job)["volumes"] if v["name"] == "workspace"]
    assert workspace["emptyDir"] == {"sizeLimit": "3Gi"}


def test_checkpoints_of_full_training_have_room() -> None:
    """One holds weights and Adam's moments in float32, 12 bytes a parameter; four may lie there beside the model."""
    full = {"name": "sft", "sft": {"method": "full"}}
    job = made(a_job(full), "sft", parameters=8_000_000_000)
    (disk,) = [v["emptyDir"]["sizeLimit"] for v in pod_of(job)["volumes"] if v["name"] == "workspace"]
    assert int(disk.removesuffix("Mi")) * 2**20 == pytest.approx(8 * 2**30 + 8e9 * (4 * 12 + 2 * 2), rel=1e-5)


def test_a_workspace_on_a_storage_class() -> None:
    """A volume that lives as long as the pod, writable by its group."""
    disk = {"workspace": {"size": "200Gi", "storageClassName": "fast"}}
    pod = pod_of(made(a_job(SFT | {"resources": disk}), "sft"))
    (workspace,) = [v for v in pod["volumes"] if v["name"] == "workspace"]
    claim = workspace["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert (claim["storageClassName"], claim["resources"]["requests"]["storage"]) == ("fast", "200Gi")
    assert pod["securityContext"]["fsGroup"] == 65532


def test_credentials_are_named_never_read() -> None:
    """The Job names Secrets and keys; no value is ever in it, and without a Secret there is no variable."""
    job = a_job(
        storage={
            "bucket": "finetune",
            "secretRef": {"name": "s3"},
            "caBundle": {"configMap": {"name": "ca", "key": "k"}},
        },
        model={"source": "hf://org/model", "secretRef": {"name": "hub"}},
    )
    variables = environment_of(made(job, "sft"))
    assert variables["AWS_SECRET_ACCESS_KEY"] == {"secretKeyRef": {"name": "s3", "key": "AWS_SECRET_ACCESS_KEY"}}
    assert variables["AWS_SESSION_TOKEN"]["secretKeyRef"]["optional"] is True
    assert variables["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "HF_TOKEN"}}
    assert variables["AWS_CA_BUNDLE"] == "/etc/finetune-ca/ca.pem"
    (ca,) = [v for v in pod_of(made(job, "sft"))["volumes"] if v["name"] == "ca"]
    assert ca["configMap"] == {"name": "ca", "items": [{"key": "k", "path": "ca.pem"}]}
    bare = environment_of(made(a_job(), "sft"))
    assert not [name for name in bare if name.startswith(("AWS_", "HF_TOKEN"))]


def test_the_writer_is_the_pod() -> None:
    """A pod that should be dead cannot overwrite its successor's objects."""
    assert environment_of(made(a_job(), "sft"))["FINETUNE_WRITER"] == {"fieldRef": {"fieldPath": "metadata.uid"}}


def test_the_pod_is_restricted() -> None:
    """As the Pod Security standard of that name asks, and without a token of its service account."""
    job = made(a_job(), "sft")
    pod, container = pod_of(job), container_of(job)
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def test_a_stages_template_stands_over_the_jobs() -> None:
    """Field by field: what the stage leaves out is the job's, what both leave out the operator's."""
    job = a_job(
        SFT
        | {
            "template": {
                "image": "mine:2",
                "terminationGracePeriodSeconds": 600,
                "tolerations": [{"key": "spot", "operator": "Exists"}],
                "affinity": {"nodeAffinity": {}},
            }
        },
        MERGE,
        template={
            "image": "ours:1",
            "serviceAccountName": "trainer",
            "nodeSelector": {"gpu": "h100"},
            "env": [
                {"name": "WANDB_MODE", "value": "offline"},
                {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "w", "key": "k"}}},
            ],
            "labels": {"team": "nlp", "finetune.dev/job": "forged"},
            "annotations": {"note": "hi"},
            "imagePullSecrets": [{"name": "registry"}],
        },
    )
    sft, merge = made(job, "sft"), made(job, "merge")
    assert (container_of(sft)["image"], container_of(merge)["image"]) == ("mine:2", "ours:1")
    grace = [pod_of(j)["terminationGracePeriodSeconds"] for j in (sft, merge)]
    assert grace == [600, 120]
    for pod in (pod_of(sft), pod_of(merge)):
        assert pod["serviceAccountName"] == "trainer"
        assert pod["nodeSelector"] == {"gpu": "h100"}
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod_of(sft)["tolerations"] == [{"key": "spot", "operator": "Exists"}]
    assert pod_of(sft)["affinity"] == {"nodeAffinity": {}}
    assert environment_of(sft)["WANDB_MODE"] == "offline"
    assert environment_of(sft)["TOKEN"] == {"secretKeyRef": {"name": "w", "key": "k", "optional": False}}
    metadata = sft["spec"]["template"]["metadata"]
    assert metadata["labels"]["team"] == "nlp"
    assert metadata["labels"]["finetune.dev/job"] == "bot"
    assert metadata["annotations"]["note"] == "hi"


def test_the_same_attempt_is_always_the_same_job() -> None:
    """So that a controller that died half-way asks for nothing else the next time."""
    assert json.dumps(made(a_job(), "sft")) == json.dumps(made(a_job(), "sft"))
