"""An attempt of a stage as a Kubernetes Job: a pod for each node, tried once, whatever it needs and nothing more.

The Job is created by POST and never changed. Its pod passes the "restricted" Pod Security standard, mounts no token of
its service account, and finds its whole task in an annotation of its own: immutable with the Job, no ConfigMap.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_api.pipeline import training_block
from finetune_api.types import Data, EnvVar, FineTuneJob, FineTuneJobSpec, Resources, Template
from finetune_operator.plan import nodes
from finetune_operator.plan.children import NewChild
from finetune_operator.plan.sizes import Sizes, resources_of, sizes

GROUP = "finetune.dev"
JOB_LABEL = f"{GROUP}/job"
STAGE_LABEL = f"{GROUP}/stage"
ATTEMPT_LABEL = f"{GROUP}/attempt"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
"""Kubernetes' own: which of an attempt's pods it is."""
STAGE_ANNOTATION = f"{GROUP}/stage.json"
MANAGED_BY = "finetune-operator"
CONTAINER = "stage"
PROGRESS_AUDIENCE = f"{GROUP}/progress"
"""Of the token with which a stage tells its progress: it is good for nothing else."""
PROGRESS_CONFIG_MAP = "finetune-progress"
"""In each namespace with jobs: whom a stage may tell it."""
PROGRESS_CA_KEY = "ca.pem"
_KUEUE = "kueue.x-k8s.io/"
_VOLUME_GROUP = 65532
"""The images' own: a volume that a storage class made is root's otherwise."""
_GRACE_SECONDS = 120
_TASK = "/etc/finetune"
_CONFIG_MAPS = "/etc/finetune-data"
"""``configmap://name/key`` is the file ``name/key`` there (``data/sources.py`` of the stages)."""
_CA = "/etc/finetune-ca"
_WORKSPACE = "/workspace"
_PROGRESS = "/var/run/finetune"
_PASSED_ON = {
    "image_pull_secrets",
    "service_account_name",
    "node_selector",
    "tolerations",
    "affinity",
    "priority_class_name",
    "runtime_class_name",
}
"""What of a template stands in a pod under the same name."""
_SHARED_MEMORY = "8Gi"
"""NCCL and data loaders use /dev/shm; the runtime's own is 64 MiB."""


@dataclass(frozen=True, kw_only=True)
class PodSettings:
    """What the operator gives every stage's pod."""

    trainer_image: str
    """For stages that train or have GPUs."""
    gguf_image: str
    """For the others: no CUDA in it."""
    unsloth_image: str = ""
    """For stages whose backend is unsloth; empty: the trainer's, where transformers trains in its place."""
    image_pull_policy: str = "IfNotPresent"
    progress_url: str = ""
    """Where a stage tells how far it is; empty: nowhere."""


def batch_job(job: FineTuneJob, labels: Mapping[str, str], child: NewChild, settings: PodSettings) -> dict[str, Any]:
    """The Job for an attempt. ``labels``: of the FineTuneJob; Kueue's are passed on."""
    run = child.run
    template = _template(job, run.stage)
    own = {
        JOB_LABEL: run.job.name,
        STAGE_LABEL: run.stage,
        ATTEMPT_LABEL: str(run.attempt),
        "app.kubernetes.io/managed-by": MANAGED_BY,
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": child.name,
            "namespace": run.job.namespace,
            "labels": {**{k: v for k, v in labels.items() if k.startswith(_KUEUE)}, **own},
            "ownerReferences": [_owner(job)],
        },
        "spec": {
            **nodes.indexed(resources_of(job.spec, run.stage).nodes),
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _failure_rules()},
            "template": {
                "metadata": {
                    "labels": {**(template.labels or {}), **own},
                    "annotations": {
                        **(template.annotations or {}),
                        STAGE_ANNOTATION: run.model_dump_json(by_alias=True, exclude_unset=True),
                    },
                },
                "spec": _pod(job, child, template, settings),
            },
        },
    }


def node_service(job: FineTuneJob) -> dict[str, Any]:
    """The Service by which the pods of the job's stages on several nodes find each other."""
    labels = {JOB_LABEL: job.metadata.name, "app.kubernetes.io/managed-by": MANAGED_BY}
    return nodes.service(job, labels, _owner(job))


def _owner(job: FineTuneJob) -> dict[str, Any]:
    return {
        "apiVersion": job.api_version,
        "kind": job.kind,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def _failure_rules() -> list[dict[str, Any]]:
    """Every rule fails the Job: they only make its condition carry the cause, which outlives the pod."""
    codes = [("In", [64, 65, 66]), ("In", [75, 143]), ("NotIn", [0])]
    return [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        *(
            {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": how, "values": values}}
            for how, values in codes
        ),
    ]


def _template(job: FineTuneJob, name: str) -> Template:
    """The stage's template over the job's, field by field."""
    own = next((stage.template for stage in job.spec.pipeline if stage.name == name), Template())
    written = {field: value for field in Template.model_fields if (value := getattr(own, field)) is not None}
    return job.spec.template.model_copy(update=written)


def _needs_bitsandbytes(spec: FineTuneJobSpec, name: str) -> bool:
    """The stage makes or scores models that only the trainer image can load."""
    makers = [stage for stage in spec.pipeline if stage.quantize and stage.quantize.bitsandbytes]
    return any(name in (stage.name, "evaluate") for stage in makers)


def _image(spec: FineTuneJobSpec, name: str, settings: PodSettings) -> str:
    block = next((training_block(stage) for stage in spec.pipeline if stage.name == name), None)
    if block is not None and block.training.backend == "unsloth" and settings.unsloth_image:
        return settings.unsloth_image
    trains = block is not None or resources_of(spec, name).gpus > 0 or _needs_bitsandbytes(spec, name)
    return settings.trainer_image if trains else settings.gguf_image


def _pod(job: FineTuneJob, child: NewChild, template: Template, settings: PodSettings) -> dict[str, Any]:
    stage = child.run.stage
    wanted = resources_of(job.spec, stage)
    needed = sizes(job.spec, stage, child.parameters)
    volumes = [*_volumes(job, wanted, needed), *_progress_volumes(settings)]
    volumes += _row_volumes(job) if stage == "prepare" else []
    container = {
        "name": CONTAINER,
        "image": template.image or _image(job.spec, stage, settings),
        "imagePullPolicy": template.image_pull_policy or settings.image_pull_policy,
        "args": [f"{_TASK}/stage.json"],
        "env": _environment(job, child, wanted, settings, template.env),
        **nodes.port(wanted.nodes),
        "resources": _resources(wanted, needed),
        "volumeMounts": [{"name": volume["name"], "mountPath": path} for volume, path in volumes],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }
    return {
        **nodes.placement(child.name, wanted.nodes),
        **template.model_dump(mode="json", by_alias=True, include=_PASSED_ON, exclude_none=True, exclude_defaults=True),
        **nodes.subdomain(job, wanted.nodes),
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": template.termination_grace_period_seconds or _GRACE_SECONDS,
        # Which user is the image's, or the namespace's, to say: OpenShift gives each namespace a range of its own.
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}, **_group(wanted)},
        "containers": [container],
        "volumes": [volume for volume, _ in volumes],
    }


def _group(wanted: Resources) -> dict[str, Any]:
    if not wanted.workspace.storage_class_name:
        return {}
    return {"fsGroup": _VOLUME_GROUP, "fsGroupChangePolicy": "OnRootMismatch"}


def _environment(
    job: FineTuneJob, child: NewChild, wanted: Resources, settings: PodSettings, own: Sequence[EnvVar] | None
) -> list[dict[str, Any]]:
    """Ours, and over them the user's."""
    ours = (
        *_storage_environment(job),
        *_progress_environment(settings),
        *nodes.rendezvous(job, child.name, wanted.nodes),
        *nodes.communication(wanted),
        *([{"name": "FINETUNE_CONFIG_MAPS", "value": _CONFIG_MAPS}] if child.run.stage == "prepare" else []),
    )
    theirs = [variable.model_dump(mode="json", by_alias=True, exclude_none=True) for variable in own or ()]
    # Each name once: of two the kubelet takes the last, but the API server warns whoever made the Job.
    return list({variable["name"]: variable for variable in (*ours, *theirs)}.values())


def _storage_environment(job: FineTuneJob) -> Iterator[dict[str, Any]]:
    yield {"name": "FINETUNE_WORKSPACE", "value": f"{_WORKSPACE}/stage"}
    # Whose objects are whose: a pod that should be dead cannot overwrite its successor's.
    yield {"name": "FINETUNE_WRITER", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}
    yield {"name": "HOME", "value": _WORKSPACE}  # the root file system is read-only, and libraries keep caches
    yield {"name": "TMPDIR", "value": "/tmp"}
    yield {"name": "HF_HUB_DISABLE_TELEMETRY", "value": "1"}
    yield {"name": "TOKENIZERS_PARALLELISM", "value": "false"}
    storage = job.spec.storage
    if storage.secret_ref is not None:
        yield _secret("AWS_ACCESS_KEY_ID", storage.secret_ref.name)
        yield _secret("AWS_SECRET_ACCESS_KEY", storage.secret_ref.name)
        yield _secret("AWS_SESSION_TOKEN", storage.secret_ref.name, optional=True)
    if job.spec.model.secret_ref is not None:
        yield _secret("HF_TOKEN", job.spec.model.secret_ref.name)
    if storage.ca_bundle is not None:
        yield {"name": "AWS_CA_BUNDLE", "value": f"{_CA}/ca.pem"}


def _progress_environment(settings: PodSettings) -> Iterator[dict[str, Any]]:
    if settings.progress_url:
        yield {"name": "FINETUNE_PROGRESS_URL", "value": settings.progress_url}
        yield {"name": "FINETUNE_PROGRESS_TOKEN_FILE", "value": f"{_PROGRESS}/token"}
        yield {"name": "FINETUNE_PROGRESS_CA_FILE", "value": f"{_PROGRESS}/{PROGRESS_CA_KEY}"}


def _secret(key: str, name: str, *, optional: bool = False) -> dict[str, Any]:
    reference: dict[str, Any] = {"name": name, "key": key}
    return {"name": key, "valueFrom": {"secretKeyRef": reference | ({"optional": True} if optional else {})}}


def _resources(wanted: Resources, needed: Sizes) -> dict[str, Any]:
    memory = wanted.memory or _mebibytes(needed.memory)
    gpus = {wanted.gpu_resource_name: str(wanted.gpus)} if wanted.gpus else {}
    # No limit on cores: throttling would only slow the stage. Memory is limited, so that it is the stage that is
    # killed when it takes too much, and not its neighbours.
    return {
        "requests": {"cpu": wanted.cpu or str(needed.cores), "memory": memory, **gpus},
        "limits": {"memory": memory, **gpus},
    }


def _volumes(job: FineTuneJob, wanted: Resources, needed: Sizes) -> Iterator[tuple[dict[str, Any], str]]:
    """Every volume with its place in the container."""
    size = wanted.workspace.size or _mebibytes(needed.workspace)
    if wanted.workspace.storage_class_name:
        claim = {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": wanted.workspace.storage_class_name,
            "resources": {"requests": {"storage": size}},
        }
        yield {"name": "workspace", "ephemeral": {"volumeClaimTemplate": {"spec": claim}}}, _WORKSPACE
    else:
        # Without a limit a full disk would evict the node's other pods, and look like a disruption.
        yield {"name": "workspace", "emptyDir": {"sizeLimit": size}}, _WORKSPACE
    yield {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}, "/tmp"
    task = {"path": "stage.json", "fieldRef": {"fieldPath": f"metadata.annotations['{STAGE_ANNOTATION}']"}}
    yield {"name": "task", "downwardAPI": {"items": [task]}}, _TASK
    if wanted.gpus > 1 or wanted.nodes > 1:
        yield {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _SHARED_MEMORY}}, "/dev/shm"
    if (bundle := job.spec.storage.ca_bundle) is not None:
        item = {"key": bundle.config_map.key, "path": "ca.pem"}
        yield {"name": "ca", "configMap": {"name": bundle.config_map.name, "items": [item]}}, _CA


def _row_volumes(job: FineTuneJob) -> Iterator[tuple[dict[str, Any], str]]:
    """The ConfigMaps with rows, which ``prepare`` alone reads."""
    data = [job.spec.data, *(stage.data for stage in job.spec.pipeline)]
    sources = [entry.source for one in data for role in Data.model_fields for entry in getattr(one, role)]
    found = (source.removeprefix("configmap://") for source in sources if source.startswith("configmap://"))
    keys: dict[str, set[str]] = {}
    for source in found:
        name, _, key = source.partition("/")
        keys.setdefault(name, set()).add(key)
    for number, name in enumerate(sorted(keys)):
        items = [{"key": key, "path": key} for key in sorted(keys[name])]
        yield {"name": f"rows-{number}", "configMap": {"name": name, "items": items}}, f"{_CONFIG_MAPS}/{name}"


def _progress_volumes(settings: PodSettings) -> Iterator[tuple[dict[str, Any], str]]:
    """The only credential of the cluster that a stage gets: it names the pod, and only our server takes it."""
    if settings.progress_url:
        token = {"audience": PROGRESS_AUDIENCE, "expirationSeconds": 3600, "path": "token"}
        keys = [{"key": PROGRESS_CA_KEY, "path": PROGRESS_CA_KEY}]
        # Optional: a stage starts without it, and the kubelet brings it, and every change of it, later.
        trust = {"name": PROGRESS_CONFIG_MAP, "optional": True, "items": keys}
        sources = [{"serviceAccountToken": token}, {"configMap": trust}]
        yield {"name": "progress", "projected": {"sources": sources}}, _PROGRESS


def _mebibytes(size: int) -> str:
    return f"{-(-size >> 20)}Mi"
