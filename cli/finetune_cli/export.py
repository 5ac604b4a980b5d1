"""``finetune export``: other files of a model that is there, made by a pipeline of its own. Pure but for one check.

Nothing is quantized or merged here: what is asked for becomes a job's manifest, with one stage (two where an adapter
must be merged first), which runs as any other.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune_api.pipeline import model_after
from finetune_api.stage import Manifest
from finetune_api.types import API_VERSION, BASE, KIND, FineTuneJob
from finetune_cli.errors import INVALID, CommandError
from finetune_jobs.store import layout

BUCKET = "finetune"
"""Of models that belong to no job."""
_LONGEST_NAME = 40
_SUFFIX = "-export"
_STAGE, _MERGE = "export", "merge"


@dataclass(frozen=True)
class Wish:
    """What to make."""

    gguf: Sequence[str] = ()
    bitsandbytes: Sequence[str] = ()
    safetensors: bool = False

    def check(self) -> None:
        """CommandError (64) if that is nothing."""
        if not (self.gguf or self.bitsandbytes or self.safetensors):
            raise CommandError("say what to make: --gguf TYPE, --bnb int8|nf4 or --safetensors", INVALID)


@dataclass(frozen=True)
class Export:
    """How a wish is granted."""

    manifest: dict[str, Any] | None
    """The job to run; None where all is there already."""
    artifacts: list[str]
    """What to pull then, as ``results.select`` takes it: from that job, or, where there is none, from the job asked."""

    @property
    def yaml(self) -> str:
        """The job, as a file."""
        return yaml.safe_dump(self.manifest, sort_keys=False, allow_unicode=True)


def of_job(job: FineTuneJob, manifests: Sequence[Manifest], wish: Wish, name: str = "") -> Export:
    """Of the last model that a job left. ``manifests``: of its finished stages, in the order of running.

    The rows, the seed and so the locked test rows are the job's own. CommandError (64) where there is no such model, or
    it is an adapter that only its own pipeline can merge.
    """
    wish.check()
    done = {manifest.stage: manifest for manifest in manifests}
    stages = [stage for stage in job.spec.pipeline if not stage.reward]
    last = next((stage.name for stage in reversed(stages) if stage.name in done and not stage.quantize), BASE)
    model = model_after(job.spec, last)
    if model.adapter is None and wish.safetensors and not (wish.gguf or wish.bitsandbytes):
        if model.weights == BASE:
            raise CommandError(f"{job.metadata.name} has changed no weights: its base model is what it was", INVALID)
        return Export(None, [model.weights])
    spec = job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    pipeline: list[dict[str, Any]] = []
    if model.adapter is not None:
        if model.weights != BASE:
            words = f"{model.adapter} left an adapter of {model.weights}'s model: put a merge stage behind it, and run"
            raise CommandError(f"{words} the job again, which starts with that", INVALID)
        made, storage = done[model.adapter], job.spec.storage
        result = layout.result_prefix(storage.prefix.strip("/"), made.job, made.stage, made.digest)
        pipeline = [{"name": _MERGE, "merge": {"adapters": [{"uri": f"s3://{storage.bucket}/{result}"}]}}]
    elif model.weights != BASE:
        spec["model"] = {**spec["model"], "source": _weights(job, done[model.weights])}
        spec["model"].pop("secretRef", None)  # the hub's
    kept: dict[str, Any] = {key: spec[key] for key in ("model", "data", "storage", "seed", "template") if key in spec}
    meta = {"name": name or _name(job.metadata.name), "namespace": job.metadata.namespace}
    return _export(meta, kept, pipeline, wish)


def of_model(source: str, data: str, wish: Wish, name: str = "") -> Export:
    """Of a base model's source. ``data``: rows (a source too) for importance matrices and to hold files against."""
    wish.check()
    if wish.safetensors:
        raise CommandError(f"--safetensors is for a job; {source} is what it is", INVALID)
    rows = {"train": [{"source": data}]} if data else {}
    spec = {"model": {"source": source}, "data": rows, "storage": {"bucket": BUCKET}}
    path = source.partition("://")[2].partition("@")[0].strip("/").removesuffix(".gguf")
    return _export({"name": name or _name(path.rpartition("/")[2])}, spec, [], wish)


def source_of(model: str) -> str:
    """A source, if that is what the user named: a URL, or a path (a folder is ``./folder``). Empty: it names a job.

    CommandError (64) for a path where nothing is.
    """
    if "://" in model:
        return model
    path = Path(model)
    if "/" not in model and not path.suffix:
        return ""
    if not path.exists():
        raise CommandError(f"there is no {model}", INVALID)
    return f"file://{path.resolve()}"


def _export(meta: dict[str, str], spec: dict[str, Any], pipeline: list[dict[str, Any]], wish: Wish) -> Export:
    artifacts = [_MERGE] if wish.safetensors and pipeline else []
    if wish.gguf or wish.bitsandbytes:
        block = {"gguf": list(wish.gguf), "bitsandbytes": list(wish.bitsandbytes)}
        pipeline = [*pipeline, {"name": _STAGE, "quantize": {key: value for key, value in block.items() if value}}]
        artifacts += [*wish.gguf, *(["Modelfile"] if wish.gguf else [])]
        artifacts += [f"{_STAGE}/bitsandbytes-{kind}" for kind in wish.bitsandbytes]
    return Export(
        {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": meta,
            "spec": {**spec, "evaluation": {"skip": True}, "pipeline": pipeline},
        },
        artifacts,
    )


def _weights(job: FineTuneJob, manifest: Manifest) -> str:
    config = next((file for file in manifest.files if file.path.rpartition("/")[2] == "config.json"), None)
    if config is None:
        raise CommandError(f"{manifest.stage} of {job.metadata.name} left no model", INVALID)
    return f"s3://{job.spec.storage.bucket}/{config.key.rpartition('/')[0]}"


def _name(of: str) -> str:
    """A name that the API takes."""
    plain = re.sub(r"[^a-z0-9]+", "-", of.lower()).strip("-") or "model"
    return plain[: _LONGEST_NAME - len(_SUFFIX)].rstrip("-") + _SUFFIX
