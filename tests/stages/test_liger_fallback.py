"""Liger's kernels where there is no GPU. With one: tests/gpu/test_liger.py."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.stages.training_job import JobMaker, chat_rows
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from finetune_jobs.training import liger

SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    """The answer is kept for the life of a process."""
    liger.unusable.cache_clear()
    yield
    liger.unusable.cache_clear()


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("llama", {}, "there is no GPU"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu, and theirs silu"),
        ("gemma2", {"hidden_activation": "gelu"}, "its activation is gelu, and theirs gelu_pytorch_tanh"),
        (
            "mixtral",
            {},
            "they are used for llama, mistral, qwen2, qwen3, phi3, gemma2, gemma3_text, and this model is mixtral",
        ),
    ],
)
def test_they_are_for_some_models(monkeypatch: pytest.MonkeyPatch, kind: str, more: dict[str, Any], words: str) -> None:
    """Those that were compared with transformers, where they compute what the configuration asks for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.for_model(kind, **SHAPE, **more))
    assert liger.use(model) == words


def test_code_of_a_model_s_own_is_left_alone() -> None:
    """Whatever it derives from: its layers may be others."""
    config = LlamaConfig(**SHAPE)
    with torch.device("meta"):
        own = type("Mine", (LlamaForCausalLM,), {"__module__": "transformers_modules.mine"})(config)
    assert liger.use(own) == "the model brings code of its own"


def test_what_keeps_them_from_running_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package, and whatever Triton says when the first of them is tried."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    assert liger.unusable() == "liger-kernel is not installed"
    liger.unusable.cache_clear()

    def fail(name: str) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease")

    monkeypatch.setattr(liger, "find_spec", lambda name: object())
    monkeypatch.setattr(liger.importlib, "import_module", fail)
    assert liger.unusable() == "they do not run here: Failed to find C compiler."


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_log_tells_whose_computed(make_job: JobMaker) -> None:
    """On a CPU nothing is tried, and transformers computes all."""
    block = {"training": {"maxSteps": 1, "batchSize": 1}}
    job = make_job({"train": chat_rows(1)}, pipeline=[{"name": "train", "sft": block}])
    assert job.log(job.run("train"))["liger"] is False
