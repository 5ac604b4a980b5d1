"""What the operator is told by its environment, as the chart sets it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from finetune_operator.plan.pods import PodSettings


class SettingsError(ValueError):
    """A variable is missing or wrong; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One operator's."""

    pods: PodSettings
    """What stages' pods get (FINETUNE_TRAINER_IMAGE, FINETUNE_GGUF_IMAGE, FINETUNE_UNSLOTH_IMAGE,
    FINETUNE_IMAGE_PULL_POLICY)."""
    namespaces: tuple[str, ...] = ()
    """Which are served (FINETUNE_NAMESPACES, with commas); none: all."""
    namespace: str = "default"
    """Our own, where the Lease is (POD_NAMESPACE)."""
    identity: str = "operator"
    """Of this replica; no other has the same (POD_NAME)."""
    lease_name: str = "finetune-operator"
    """By which replicas elect their leader (FINETUNE_LEASE_NAME)."""
    workers: int = 16
    """Jobs reconciled at once (FINETUNE_WORKERS). They mostly wait for the API server."""
    health_port: int = 8081
    """Of /healthz and /readyz, in plain HTTP (FINETUNE_HEALTH_PORT)."""
    metrics_port: int = 8080
    """Of /metrics (FINETUNE_METRICS_PORT)."""
    progress_names: tuple[str, ...] = ()
    """DNS names by which stages reach us (FINETUNE_PROGRESS_SERVICE, the first of them); none: they say nothing of
    their progress."""
    progress_port: int = 9443
    """Of the progress server, in HTTPS, and of its Service (FINETUNE_PROGRESS_PORT)."""
    pod_ip: str = "127.0.0.1"
    """By which other replicas reach us (POD_IP)."""
    log_level: str = "INFO"
    """FINETUNE_LOG_LEVEL."""


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Raises SettingsError."""
    service = environment.get("FINETUNE_PROGRESS_SERVICE", "")
    return Settings(
        pods=PodSettings(
            trainer_image=_required(environment, "FINETUNE_TRAINER_IMAGE"),
            gguf_image=_required(environment, "FINETUNE_GGUF_IMAGE"),
            unsloth_image=environment.get("FINETUNE_UNSLOTH_IMAGE") or PodSettings.unsloth_image,
            image_pull_policy=environment.get("FINETUNE_IMAGE_PULL_POLICY") or PodSettings.image_pull_policy,
        ),
        namespaces=tuple(
            name.strip() for name in environment.get("FINETUNE_NAMESPACES", "").split(",") if name.strip()
        ),
        namespace=environment.get("POD_NAMESPACE") or Settings.namespace,
        identity=environment.get("POD_NAME") or os.uname().nodename,
        lease_name=environment.get("FINETUNE_LEASE_NAME") or Settings.lease_name,
        workers=_number(environment, "FINETUNE_WORKERS", Settings.workers),
        health_port=_number(environment, "FINETUNE_HEALTH_PORT", Settings.health_port),
        metrics_port=_number(environment, "FINETUNE_METRICS_PORT", Settings.metrics_port),
        progress_names=(service, f"{service}.cluster.local") if service else (),
        progress_port=_number(environment, "FINETUNE_PROGRESS_PORT", Settings.progress_port),
        pod_ip=environment.get("POD_IP") or Settings.pod_ip,
        log_level=environment.get("FINETUNE_LOG_LEVEL", "").upper() or Settings.log_level,
    )


def _required(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    if not value:
        raise SettingsError(f"{name}: is required, for example finetunejob/trainer:0.1.0")
    return value


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise SettingsError(f"{name}: must be a number from 1, got {text!r}")
    return int(text)
