"""A stage on several nodes: one Indexed Job, and a headless Service by which its pods find the first of them.

One Service serves all stages and attempts of a FineTuneJob: a pod's name below it holds the Job's, which is unique.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from finetune_api.types import FineTuneJob, Resources

PORT = 29500
"""Where rank 0 listens for the others; torchrun's own default."""
PORT_NAME = "rendezvous"
_TOGETHER = {
    "topology.kubernetes.io/zone": 10,
    "cloud.google.com/gce-topology-block": 50,
    "topology.k8s.aws/network-node-layer-3": 50,
    "network.topology.nvidia.com/block": 50,
}
"""Labels of nodes that are near each other, and how much that is worth: GKE's, EKS's and topograph's beside everybody's
zone. One that no node has says nothing."""


def service_name(job: FineTuneJob) -> str:
    """Of the job's Service: the same whenever asked, another for a later job of the same name."""
    meta = job.metadata
    identity = "/".join([meta.namespace, meta.name, meta.uid])
    # A Service's name begins with a letter, and a job's need not.
    return f"nodes-{meta.name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def service(job: FineTuneJob, labels: Mapping[str, str], owner: Mapping[str, Any]) -> dict[str, Any]:
    """The Service over all pods with those labels. Names resolve before a pod is ready: the first one is waited for."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": service_name(job),
            "namespace": job.metadata.namespace,
            "labels": dict(labels),
            "ownerReferences": [dict(owner)],
        },
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": dict(labels),
            "ports": [{"name": PORT_NAME, "port": PORT}],
        },
    }


def indexed(nodes: int) -> dict[str, Any]:
    """What a Job on several nodes has beside one on a single node. The first pod speaks for all: when it is done, the
    attempt is."""
    if nodes == 1:
        return {}
    return {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]},
    }


def subdomain(job: FineTuneJob, nodes: int) -> dict[str, Any]:
    """What gives each pod a name of its own in the cluster's DNS."""
    return {"subdomain": service_name(job)} if nodes > 1 else {}


def port(nodes: int) -> dict[str, Any]:
    """The container's, declared so that people can see it, and network policies name it."""
    return {"ports": [{"name": PORT_NAME, "containerPort": PORT}]} if nodes > 1 else {}


def rendezvous(job: FineTuneJob, child: str, nodes: int) -> Iterator[dict[str, Any]]:
    """What the launcher is told. Which of the nodes it is on, Kubernetes' own ``JOB_COMPLETION_INDEX`` says."""
    if nodes > 1:
        first = f"{child}-0.{service_name(job)}.{job.metadata.namespace}.svc"
        yield {"name": "FINETUNE_NODES", "value": str(nodes)}
        yield {"name": "FINETUNE_RENDEZVOUS", "value": f"{first}:{PORT}"}


def communication(wanted: Resources) -> Iterator[dict[str, Any]]:
    """What NCCL and torch are told where GPUs work together. No more than that: the interface NCCL finds, and that an
    error ends the process has been torch's default for long (TORCH_NCCL_ASYNC_ERROR_HANDLING=3)."""
    if wanted.gpus and wanted.gpus * wanted.nodes > 1:
        # Without it NCCL says nothing at all of why it failed; at WARN it is silent as long as nothing does.
        yield {"name": "NCCL_DEBUG", "value": "WARN"}
        # Sharded layers come and go in blocks of changing size: without it the gaps between them take gigabytes.
        # torch looks for PYTORCH_CUDA_ALLOC_CONF first, so a user who sets that is not overruled.
        yield {"name": "PYTORCH_ALLOC_CONF", "value": "expandable_segments:True"}


def placement(child: str, nodes: int) -> dict[str, Any]:
    """The pods of one attempt near each other, where that can be had."""
    if nodes == 1:
        return {}
    ours = {"matchLabels": {"batch.kubernetes.io/job-name": child}}
    terms = [
        {"weight": weight, "podAffinityTerm": {"topologyKey": key, "labelSelector": ours}}
        for key, weight in _TOGETHER.items()
    ]
    return {"affinity": {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": terms}}}
