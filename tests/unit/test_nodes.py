"""The Job of a stage on several GPUs, and on several nodes."""

from pathlib import Path
from typing import Any

import yaml
from tests.builders import MERGE, SFT, a_job, a_result
from tests.unit.test_pods import container_of, environment_of, made, pod_of

from finetune_api.stage import StageRun
from finetune_api.status import StageStatus
from finetune_api.types import FineTuneJob
from finetune_cli.manifest import load
from finetune_operator.plan.jobs import child_name, new_child
from finetune_operator.plan.nodes import service_name
from finetune_operator.plan.pods import STAGE_ANNOTATION, PodSettings, batch_job, node_service
from finetune_operator.plan.rules import check

GOLDEN = Path(__file__).parent / "golden"
EXAMPLE = Path(__file__).parents[2] / "manifests/examples/lora-70b.yaml"
TWO: dict[str, Any] = {**SFT, "resources": {"gpus": 8, "nodes": 2}}
SETTINGS = PodSettings(
    trainer_image="registry.example/finetunejob/trainer:0.3",
    gguf_image="registry.example/finetunejob/gguf:0.3",
    progress_url="https://finetune-operator-progress.finetune-system.svc:9443/v1/progress",
)


def lora_70b(nodes: int) -> dict[str, Any]:
    """The Job of the example's training, with its stage file as an object, to be read by people."""
    job = load(EXAMPLE)
    meta = job.metadata.model_copy(update={"namespace": "team", "uid": "b3f1c9e0-5d0e-4c8e-9a55-0f5b7c1d2e3f"})
    sft = job.spec.pipeline[0]
    sft = sft.model_copy(update={"resources": sft.resources.model_copy(update={"nodes": nodes})})
    spec = job.spec.model_copy(update={"pipeline": [sft, *job.spec.pipeline[1:]]})
    job = FineTuneJob(api_version=job.api_version, kind=job.kind, metadata=meta, spec=spec)
    assert check(job, cluster=True) == []
    done = {name: StageStatus(name=name, result=a_result(name)) for name in ("prepare", "baseline")}
    done["prepare"] = StageStatus(name="prepare", result=a_result("prepare", parameters=70_553_706_496))
    stages = {**done, "sft": StageStatus(name="sft", attempt=1, job=child_name(job, "sft", 1))}
    made = batch_job(job, {"kueue.x-k8s.io/queue-name": "gpus"}, new_child(job, stages, "sft"), SETTINGS)
    annotations = made["spec"]["template"]["metadata"]["annotations"]
    run = StageRun.model_validate_json(annotations[STAGE_ANNOTATION])
    assert run.spec.model_dump() == job.spec.model_dump()
    annotations[STAGE_ANNOTATION] = "the stage file"  # other tests look into it
    return made


def test_the_training_of_70b_is_the_job_that_a_user_would_want() -> None:
    """Eight GPUs of one node, shared memory for NCCL, and what an expert would tell it: the whole Job, as it is."""
    assert lora_70b(1) == yaml.safe_load((GOLDEN / "lora-70b.yaml").read_text())


def test_the_training_of_70b_on_two_nodes() -> None:
    """The same, twice, near each other, and each pod has a name by which it is found."""
    assert lora_70b(2) == yaml.safe_load((GOLDEN / "lora-70b-two-nodes.yaml").read_text())


def test_several_nodes_are_one_job_with_a_name_for_each_pod() -> None:
    """Indexed, over as soon as the first pod is done; the first pod's name is told to all."""
    job = made(a_job(TWO, MERGE), "sft")
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (
        *("Indexed", 2, 2),
        0,
    )
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    service = node_service(a_job(TWO, MERGE))
    name = service["metadata"]["name"]
    assert pod_of(job)["subdomain"] == name
    assert environment_of(job)["FINETUNE_NODES"] == "2"
    assert environment_of(job)["FINETUNE_RENDEZVOUS"] == f"{job['metadata']['name']}-0.{name}.team.svc:29500"
    assert container_of(job)["ports"] == [{"name": "rendezvous", "containerPort": 29500}]


def test_the_service_finds_the_jobs_pods_before_they_are_ready() -> None:
    """Headless, owned by the FineTuneJob, and its selector is among the pods' labels."""
    service = node_service(a_job(TWO, MERGE))
    (owner,) = service["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("FineTuneJob", "u-1", True)
    spec = service["spec"]
    assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", True)
    labels = made(a_job(TWO, MERGE), "sft")["spec"]["template"]["metadata"]["labels"]
    assert spec["selector"].items() <= labels.items()


def test_the_services_name_is_the_jobs_own() -> None:
    """A label of the DNS whatever the job is called; another job of the same name has another."""

    def named(name: str, uid: str) -> str:
        job = a_job(TWO)
        return service_name(
            job.model_copy(update={"metadata": job.metadata.model_copy(update={"name": name, "uid": uid})})
        )

    assert named("bot", "u-1") == named("bot", "u-1") != named("bot", "u-2")
    longest = named("7" * 40, "u-1")
    assert len(longest) <= 63
    assert longest[0].isalpha()


def test_a_pods_host_name_fits_the_dns() -> None:
    """The longest names of job and stage, a high attempt and the highest index."""
    job = a_job({**TWO, "name": "s" * 32})
    job = job.model_copy(update={"metadata": job.metadata.model_copy(update={"name": "j" * 40})})
    assert len(f"{child_name(job, 's' * 32, 12345)}-63") <= 63


def test_one_node_has_nothing_of_it() -> None:
    """Neither Service nor rendezvous, name or port; that is what other stages of the same job are."""
    job = made(a_job(TWO, MERGE), "merge")
    assert not {"completionMode", "completions", "parallelism", "successPolicy"} & job["spec"].keys()
    assert not {"subdomain", "affinity"} & pod_of(job).keys()
    assert "ports" not in container_of(job)
    assert not [name for name in environment_of(job) if name in ("FINETUNE_NODES", "FINETUNE_RENDEZVOUS", "NCCL_DEBUG")]


def test_scores_are_taken_on_one_node() -> None:
    """With what the largest stage has of one."""
    job = made(a_job(TWO, MERGE), "evaluate")
    assert "completions" not in job["spec"]
    assert container_of(job)["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_gpus_that_work_together_are_told_how() -> None:
    """On one node or several; a single GPU, and CPUs on several nodes, have nobody to talk to by NCCL."""
    variables = environment_of(made(a_job(SFT | {"resources": {"gpus": 2}}), "sft"))
    assert (variables["NCCL_DEBUG"], variables["PYTORCH_ALLOC_CONF"]) == ("WARN", "expandable_segments:True")
    assert "NCCL_DEBUG" in environment_of(made(a_job(SFT | {"resources": {"gpus": 1, "nodes": 2}}), "sft"))
    for alone in ({"gpus": 1}, {"nodes": 2}, {}):
        assert "NCCL_DEBUG" not in environment_of(made(a_job(SFT | {"resources": alone}), "sft"))


def test_a_users_variable_stands_over_ours() -> None:
    """Once, so that nobody has to know which of two counts."""
    mine = [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "NCCL_IB_DISABLE", "value": "1"}]
    job = made(a_job(TWO | {"template": {"env": mine}}), "sft")
    names = [variable["name"] for variable in container_of(job)["env"]]
    assert len(names) == len(set(names))
    assert environment_of(job).items() >= {"NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "1"}.items()


def test_nodes_without_gpus_have_shared_memory_too() -> None:
    """gloo and data loaders use it as NCCL does."""
    volumes = pod_of(made(a_job(SFT | {"resources": {"nodes": 2}}), "sft"))["volumes"]
    assert "shm" in [volume["name"] for volume in volumes]


def test_pods_of_one_attempt_are_placed_together_unless_the_user_says_where() -> None:
    """A wish only, for this attempt's pods alone; Kueue's own words on topology go with the pods."""
    job = made(a_job(TWO), "sft")
    terms = pod_of(job)["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert "topology.kubernetes.io/zone" in [term["podAffinityTerm"]["topologyKey"] for term in terms]
    for term in terms:
        chosen = term["podAffinityTerm"]["labelSelector"]["matchLabels"]
        assert chosen == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    topology = {"kueue.x-k8s.io/podset-required-topology": "cloud.google.com/gce-topology-block"}
    own = {"affinity": {"nodeAffinity": {}}, "annotations": topology}
    job = made(a_job(TWO | {"template": own}), "sft")
    assert pod_of(job)["affinity"] == {"nodeAffinity": {}}
    assert job["spec"]["template"]["metadata"]["annotations"].items() >= topology.items()


def test_a_service_is_wished_for_with_what_needs_it() -> None:
    """The attempt on several nodes names it, and no other."""
    job = a_job(TWO, MERGE)
    stages = {
        name: StageStatus(name=name, attempt=1, job=f"bot-{name}-1", result=a_result(name))
        for name in ("prepare", "baseline", "sft", "merge")
    }
    assert new_child(job, stages, "sft").service == service_name(job)
    assert new_child(job, stages, "merge").service == ""
