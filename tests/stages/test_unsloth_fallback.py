"""``training.backend: unsloth`` where there is no GPU. With one: tests/gpu/test_unsloth.py."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.training_job import JobMaker, chat_rows, sha256

from finetune_api.types import Training
from finetune_jobs.training import unsloth

WEIGHTS = "adapter/adapter_model.safetensors"
LLAMA = {"model_type": "llama", "max_position_embeddings": 2048}


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    """The answer is kept for the life of a process."""
    unsloth.start.cache_clear()
    yield
    unsloth.start.cache_clear()


def pipeline(backend: str) -> list[dict[str, Any]]:
    """One stage of four steps."""
    training = {"backend": backend, "maxSteps": 4, "batchSize": 4, "precision": "auto", "loggingSteps": 1}
    return [{"name": "train", "sft": {"training": training}}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_transformers_trains(make_job: JobMaker, caplog: pytest.LogCaptureFixture) -> None:
    """The same bits as if it had been asked for, a warning that says why, and the same in the log of the training."""
    roles = {"train": chat_rows(8)}
    asked, plain = (make_job(roles, pipeline=pipeline(backend)) for backend in ("unsloth", "transformers"))
    with caplog.at_level(logging.WARNING, "finetune"):
        result = asked.run("train")
    words = "spec.pipeline[0].sft.training.backend: transformers trains, for Unsloth cannot: there is no GPU"
    assert words in [record.message for record in caplog.records]
    log = asked.log(result)
    assert (log["backend"], log["fallback"]) == ("transformers", "there is no GPU")
    expected = plain.run("train")
    assert sha256(result, WEIGHTS) == sha256(expected, WEIGHTS)
    assert (plain.log(expected)["backend"], plain.log(expected)["fallback"]) == ("transformers", None)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"model_type": "gemma2"}, "its kernels are used for llama, mistral, qwen2, qwen3, and this model is gemma2"),
        ({"quantization_config": {}}, "the model is stored quantized"),
        ({"max_position_embeddings": 1024}, "maxLength is 2048, and the model knows 1024 positions"),
    ],
)
def test_it_is_for_some_models(changed: dict[str, Any], words: str | None) -> None:
    """What is read from the model's own configuration, before anything is loaded."""
    assert unsloth.unfit({**LLAMA, **changed}, Training()) == words


def test_what_keeps_it_from_starting_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old GPU, no package, and transformers that was imported already, as it is here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old one")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    assert unsloth.start() == "an old one has a compute capability below 7.0"
    unsloth.start.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(unsloth, "find_spec", lambda name: None)
    assert unsloth.start() == "it is not installed here; the image trainer-unsloth has it"
    unsloth.start.cache_clear()
    monkeypatch.setattr(unsloth, "find_spec", lambda name: object())
    assert unsloth.start() == "transformers was loaded before it"


def test_it_is_imported_before_transformers_and_not_from_afar(tmp_path: Path) -> None:
    """A stand-in in its place finds a process without transformers, and told to count nobody and fetch nothing."""
    package = tmp_path / "unsloth"
    package.mkdir()
    checks = (
        "import os, sys",
        "assert 'transformers' not in sys.modules and 'peft' not in sys.modules",
        "assert os.environ['UNSLOTH_DISABLE_STATISTICS'] == os.environ['HF_HUB_DISABLE_TELEMETRY'] == '1'",
        "raise RuntimeError('CUDA 9 is too old\\nand more')",
    )
    (package / "__init__.py").write_text("\n".join(checks))
    program = (
        "import torch; torch.cuda.is_available = lambda: True; torch.cuda.get_device_capability = lambda: (9, 0)\n"
        "from finetune_jobs.run import lifecycle\n"
        "from finetune_jobs.training import unsloth\n"
        "print(unsloth.start())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "it cannot be imported: CUDA 9 is too old", done.stderr
