"""``training.backend: unsloth`` on a GPU: the same steps as transformers takes them, by other kernels.

Ours run here. Unsloth must be imported before transformers, so its stages are processes of their own.

python -m pytest tests/gpu/test_unsloth.py -s
"""

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.test_launch import words
from tests.stages.training_job import Job, JobMaker, StopAfter, chat_rows, pair_rows
from tests.tinymodel import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_api.types import FineTuneJobSpec
from finetune_jobs.run.errors import PreemptedError
from finetune_jobs.training.unsloth import ARCHITECTURES

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed"),
]

ROLES = {
    "train": chat_rows(16),
    "eval": chat_rows(4, seed=1),
    "preference": pair_rows(12),
    "preferenceEval": pair_rows(4, seed=1),
}
TRAINING = {"batchSize": 8, "loggingSteps": 1, "maxSteps": 8, "learningRate": 2e-3, "warmupRatio": 0}
NOISE = 0.005
"""What bf16 leaves of a difference between two ways to compute the same, relative to the figure."""


def model(directory: Path, kind: str) -> Path:
    """A random one of 2 layers that reads bytes; a window shorter than the rows where the architecture has one."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(str(directory))
    window = {"sliding_window": 24} if kind == "mistral" else {}
    config = AutoConfig.for_model(
        kind,
        vocab_size=352,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.05,
        tie_word_embeddings=kind != "llama",
        eos_token_id=tokenizer.eos_token_id,
        **window,
    )
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM
    made.from_config(config).save_pretrained(directory)
    return directory


def block(backend: str, **written: Any) -> dict[str, Any]:
    """With the hyper-parameters of all here."""
    training = {**TRAINING, **written.pop("training", {}), "backend": backend}
    return {**written, "training": training, "checkpoint": {"steps": 4}}


def as_process(job: Job, stage: str, tmp_path: Path) -> dict[str, Any]:
    """The log of a stage that ran with Unsloth's kernels."""
    said = tmp_path / f"{stage}-termination"
    environment = {**os.environ, "FINETUNE_TERMINATION_LOG": str(said), "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "finetune_jobs", str(job.write(stage))], env=environment, timeout=300)
    log = job.log(job.committed(stage, words(said)))
    assert (log["backend"], log["fallback"]) == ("unsloth", None)
    assert log["precision"] == "bfloat16"
    return log


def curves(log: dict[str, Any], figure: str) -> list[float]:
    """That figure by step, and at evaluations."""
    return [point[figure] for point in log["curve"]] + [e["evalLoss"] for e in log["evaluations"] if figure == "loss"]


def agree(theirs: dict[str, Any], ours: dict[str, Any], *figures: str) -> None:
    """At every step but for noise."""
    for figure in figures:
        print(f"\n{figure}, unsloth and transformers: {curves(theirs, figure)} {curves(ours, figure)}")
        assert curves(theirs, figure) == pytest.approx(curves(ours, figure), rel=NOISE, abs=NOISE / 10)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ARCHITECTURES},
    "qlora": ("llama", {"method": "qlora"}),
    "padded": ("llama", {"training": {"packing": False}}),
    "padded, with a window": ("mistral", {"training": {"packing": False}}),
    "recomputed": ("llama", {"training": {"gradientCheckpointing": True, "microBatchSize": 2}}),
}


@pytest.mark.parametrize("case", CASES)
def test_supervised(make_job: JobMaker, tmp_path: Path, case: str) -> None:
    """Losses and gradients are those of transformers, in training and in evaluation, and so is what is learned."""
    kind, written = CASES[case]
    base = model(tmp_path / "model", kind)
    logs = []
    for backend in ("transformers", "unsloth"):
        job = make_job(ROLES, model=base, pipeline=[{"name": "train", "sft": block(backend, **written)}])
        logs.append(job.log(job.run("train")) if backend == "transformers" else as_process(job, "train", tmp_path))
    ours, theirs = logs
    assert theirs["parameters"]["trainable"] == ours["parameters"]["trainable"]
    assert theirs["batch"] == ours["batch"]
    agree(theirs, ours, "loss", "gradNorm")
    assert ours["curve"][-1]["loss"] < ours["curve"][0]["loss"] - 0.05  # or there would be nothing to compare


def test_preference(make_job: JobMaker, tmp_path: Path) -> None:
    """The first loss is ln 2, for the reference is computed by the same kernels."""
    base = model(tmp_path / "model", "llama")
    written = {"training": {"learningRate": 5e-4}}
    ours = make_job(ROLES, model=base, pipeline=[{"name": "train", "preference": block("transformers", **written)}])
    theirs = make_job(ROLES, model=base, pipeline=[{"name": "train", "preference": block("unsloth", **written)}])
    log = as_process(theirs, "train", tmp_path)
    assert log["curve"][0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    agree(log, ours.log(ours.run("train")), "loss")
    assert log["curve"][-1]["loss"] < log["curve"][0]["loss"]


def test_one_goes_on_from_the_other(make_job: JobMaker, tmp_path: Path) -> None:
    """Begun by transformers, ended by Unsloth, then trained on by transformers and merged: one kind of adapter."""
    base = model(tmp_path / "model", "llama")
    pipeline = [
        {"name": "train", "sft": block("transformers")},
        {"name": "more", "sft": block("transformers")},
        {"name": "merge", "merge": {}},
    ]
    plain = make_job(ROLES, model=base, pipeline=pipeline)
    expected = plain.log(plain.run("train"))
    job = make_job(ROLES, model=base, pipeline=pipeline)
    with pytest.raises(PreemptedError):
        job.run("train", StopAfter(12))
    written = job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    written["pipeline"][0]["sft"]["training"]["backend"] = "unsloth"
    job.spec = FineTuneJobSpec.model_validate(written, strict=False)
    log = as_process(job, "train", tmp_path)
    assert log["resumedFrom"], "it began anew"
    agree(log, expected, "loss")
    for stage in ("more", "merge"):
        job.run(stage)
    assert job.inputs.keys() >= {"more", "merge"}
