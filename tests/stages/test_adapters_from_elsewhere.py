"""Adapters of other jobs and of folders: brought by ``prepare``, verified, and merged with a job's own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.stages.test_several_adapters import A, added
from tests.stages.training_job import Job, JobMaker, chat_rows, write_model
from tests.unit.test_combining import delta

from finetune_api.stage import JobRef, Manifest
from finetune_api.types import API_VERSION, KIND, FineTuneJob, Metadata
from finetune_cli.export import Wish, of_job
from finetune_cli.manifest import load_text
from finetune_jobs.run.errors import ConfigurationError, InputMissingError
from finetune_jobs.store import manifest
from finetune_jobs.store.adapters import Elsewhere
from finetune_jobs.store.calls import CorruptObjectError

Started = Callable[..., Job]


@pytest.fixture
def start(make_job: JobMaker, tiny_model: Path, tmp_path: Path) -> Started:
    """A job of that name whose ``prepare`` is to run yet, in the bucket's one prefix."""
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in chat_rows(40)))

    def begin(name: str, *pipeline: dict[str, Any], model: Path = tiny_model, **spec: Any) -> Job:
        given = {"model": {"source": f"file://{model}"}, "data": {"train": [{"source": f"file://{rows}"}]}, **spec}
        job = make_job({"train": chat_rows(1)}, pipeline=list(pipeline))
        job.spec = type(job.spec).model_validate_json(
            json.dumps({**job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True), **given})
        )
        job.ref, job.inputs = JobRef(namespace="default", name=name, uid=name), {}
        return job

    return begin


def uri_of(job: Job, result: Manifest) -> str:
    """As ``finetune get --json`` shows it."""
    return f"s3://{job.store.bucket}/{job.inputs[result.stage].removesuffix('/manifest.json')}"


def merging(*adapters: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A merge on the base in float32."""
    return {"name": "merge", "from": "base", "merge": {"dtype": "float32", "adapters": list(adapters), **settings}}


def trained(start: Started, name: str = "first", **settings: Any) -> tuple[Job, Manifest]:
    """Another job with an adapter."""
    job = start(name, A, **settings)
    job.run("prepare")
    return job, job.run("sft-a")


def test_another_jobs_adapter_is_merged(start: Started, tiny_model: Path, tmp_path: Path) -> None:
    """By the address of its result or of that result's manifest, a checkpoint of it, and a folder of PEFT's: all become
    part of ``prepare``'s result, which is another when they are, and what is merged is their sum."""
    other, result = trained(start)
    uri, folder = uri_of(other, result), other.files(result) / "adapter"
    adapters = [{"uri": uri}, {"uri": f"{uri}/manifest.json", "weight": 2, "checkpoint": 4}]
    job = start("second", merging(*adapters, {"uri": f"file://{folder}", "weight": -0.5}))
    prepared = job.run("prepare")
    assert [name for name in prepared.outputs if name.startswith("adapters/")] == [
        f"adapters/merge/{place}" for place in range(3)
    ]
    brought = [job.files(prepared) / f"adapters/merge/{place}" for place in range(3)]
    merged = job.run("merge")
    for module, got in added(tiny_model, job.files(merged) / "model").items():
        parts = [delta(path, module) for path in brought]
        wanted = sum(weight * part for weight, part in zip((1, 2, -0.5), parts, strict=True) if part is not None)
        assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)

    (folder / "adapter_config.json").write_text((folder / "adapter_config.json").read_text() + "\n")
    assert job.run("prepare").digest != prepared.digest


def test_export_of_an_adapter_merges_it_from_where_it_lies(start: Started, tiny_model: Path) -> None:
    """``finetune export`` of a job that has no merge stage: its base, and what its adapter adds to it."""
    other, result = trained(start)
    meta = {"name": "first", "namespace": "default"}
    job = FineTuneJob(api_version=API_VERSION, kind=KIND, metadata=Metadata(**meta), spec=other.spec)
    export = of_job(job, [manifest.load(other.store, key) for key in other.inputs.values()], Wish(safetensors=True))
    assert export.artifacts == ["merge"]
    other.spec = load_text(export.yaml, Path("/")).spec
    other.run("prepare")
    exported = added(tiny_model, other.files(other.run("merge")) / "model")
    for module, got in exported.items():
        wanted = delta(other.files(result) / "adapter", module)
        assert wanted is not None
        assert np.linalg.norm(got - wanted) <= 5e-2 * np.linalg.norm(wanted)  # the merge is in 16 bits


def test_adapter_of_another_base_is_refused_before_anything_trains(start: Started, tmp_path: Path) -> None:
    """By the digest of the base, with both jobs' words; also one that a stage made on weights of its own."""
    other, result = trained(start, model=write_model(tmp_path / "untied", tied=False))
    job = start("second", A, merging({"stage": "sft-a"}, {"uri": uri_of(other, result)}))
    with pytest.raises(ConfigurationError, match=r"adapters\[1\]\.uri: default/first trained this adapter on another"):
        job.run("prepare")


def test_the_base_of_an_adapter_is_known_only_if_all_weights_that_it_read_are_one(start: Started) -> None:
    """A reward model on other weights leaves open to which of the two it belongs; a folded model is its own."""
    other, result = trained(start)
    base = manifest.load(other.store, other.inputs["prepare"]).outputs["base"]
    assert Elsewhere(other.store, "", result).bases == {base}
    two = result.model_copy(update={"inputs": {**result.inputs, "merge:model": "m"}})
    assert Elsewhere(other.store, "", two).bases == {base, "m"}
    folded = result.model_copy(update={"outputs": {**result.outputs, "model": "f"}})
    assert Elsewhere(other.store, "", folded).bases == {"f"}


def test_what_is_not_there_is_told(start: Started) -> None:
    """No result at the address, one without an adapter, a step that is not there: all at once, each with its field."""
    other, result = trained(start)
    prepared = f"s3://{other.store.bucket}/{other.inputs['prepare'].removesuffix('/manifest.json')}"
    nothing, where = "s3://finetune-tests/nothing/here", "spec.pipeline[0].merge.adapters"
    job = start(
        "second",
        merging(
            {"uri": nothing},
            {"uri": prepared},
            {"uri": uri_of(other, result), "checkpoint": 3},
        ),
    )
    with pytest.raises(InputMissingError) as told:
        job.run("prepare")
    first, second, third = str(told.value).splitlines()
    assert first.startswith(f"{where}[0].uri: no result is committed at {nothing}")
    assert second.startswith(f"{where}[1]: stage prepare left ")
    assert second.endswith(", no adapter; name one that trains one")
    assert third.startswith(f"{where}[2].checkpoint: stage sft-a has no whole checkpoint of step 3")


def test_damaged_object_is_not_merged(start: Started) -> None:
    """An adapter whose bytes are not those that its manifest names."""
    other, result = trained(start)
    file = next(f for f in result.files if f.path == "adapter/adapter_model.safetensors")
    data = bytearray(other.store.get_bytes(file.key))
    data[-1] ^= 1
    other.store.put_bytes(file.key, bytes(data))
    job = start("second", merging({"uri": uri_of(other, result)}))
    with pytest.raises(CorruptObjectError):
        job.run("prepare")


def test_folder_that_cannot_be_merged_is_refused(start: Started, tmp_path: Path) -> None:
    """A DoRA for svd, an adapter of a kind that weights cannot take in, one that names another model of the hub."""
    dora = {**A, "sft": {**A["sft"], "lora": {"r": 4, "variant": "dora"}}}
    other = start("first", dora)
    other.run("prepare")
    folder = other.files(other.run("sft-a")) / "adapter"
    with pytest.raises(ConfigurationError, match=r"adapters\[0\]: the adapter is not of A and B alone, and svd is"):
        start("second", merging({"uri": f"file://{folder}"}, combination="svd")).run("prepare")
    config = json.loads((folder / "adapter_config.json").read_text())
    strange = shutil.copytree(folder, tmp_path / "strange")
    (strange / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))
    with pytest.raises(ConfigurationError, match=r"adapters\[0\]: adapter_config.json: peft_type is LOHA"):
        start("third", merging({"uri": f"file://{strange}"})).run("prepare")
