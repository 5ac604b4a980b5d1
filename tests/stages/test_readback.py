import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.stages.gguf_models import random_gguf as random_gguf
from tests.stages.gguf_models import random_model as random_model
from tests.stages.gguf_models import smollm2 as smollm2
from tests.stages.gguf_models import smollm2_gguf, write_random
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto import tokenization_auto

from finetune_jobs.gguf import metadata, readback
from finetune_jobs.gguf.convert import convert, lossless_type
from finetune_jobs.gguf.engine import GGUFModel
from finetune_jobs.gguf.library import token_ids_of
from finetune_jobs.gguf.quantize import quantize
from finetune_jobs.gguf.tokenizer import PROBES
from finetune_jobs.run.errors import ConfigurationError, InputMissingError

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_smollm2_has_its_published_shape(smollm2: Path) -> None:
    """The configuration says what SmolLM2-135M-Instruct's own says, numbers rounded as they were meant."""
    config = json.loads((smollm2 / "config.json").read_text())
    published = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {name: config[name] for name in published} == published
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == 134_515_008


def test_smollm2_says_what_its_gguf_says(smollm2: Path, tmp_path: Path) -> None:
    """On a conversation the logits are those of the GGUF with its weights dequantized, but for rounding to bf16."""
    whole = tmp_path / "f32.gguf"
    convert(smollm2, whole, name="x", precision="bf16")
    assert metadata.read(whole).fields["tokenizer.ggml.pre"] == "smollm"
    original = metadata.read(smollm2_gguf())
    converted = metadata.read(whole)
    for name in original.tensors:
        difference = abs(original.values(name) - converted.values(name))
        assert (difference <= 2.0**-8 * abs(original.values(name))).all(), name  # bf16 keeps 8 bits
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with GGUFModel(whole) as gguf:
        prompt = gguf.tokenize(gguf.render([{"role": "user", "content": "What is the capital of France?"}]))
        answer = tokenizer("The capital of France is Paris.<|im_end|>")["input_ids"]
        (found,) = gguf.answer_logprobs([(prompt, answer)])
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :].double()
    wanted = logits.log_softmax(-1)
    divergence = (wanted.exp() * (wanted - torch.from_numpy(found).double())).sum(-1).mean()
    assert float(divergence) < 1e-3  # practice.md section 5: BF16


@settings(max_examples=25, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"]), min_size=1, max_size=60))
def test_any_text_has_the_ids_of_llama_cpp(smollm2: Path, text: str) -> None:
    """Whatever the text, the tokenizer that was read back and llama.cpp give the same ids."""
    assert [_loaded(smollm2)(text)["input_ids"]] == token_ids_of(smollm2_gguf(), [text])


@cache
def _loaded(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


def test_tokenizer_survives_a_round_through_transformers(smollm2: Path, tmp_path: Path) -> None:
    """Saved by transformers, as the merge stage does, it still tokenizes and renders the same."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    expected = token_ids_of(smollm2_gguf(), PROBES)
    assert [again(text)["input_ids"] for text in PROBES] == expected
    assert (
        again.chat_template
        == tokenizer.chat_template
        == metadata.read(smollm2_gguf()).fields["tokenizer.chat_template"]
    )
    assert tokenizer.decode(expected[0]) == PROBES[0]


@pytest.mark.parametrize(
    ("model_type", "changed"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 4}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}),
        ("qwen3", {"tie_word_embeddings": False}),
    ],
    ids=["llama", "llama-3.2", "llama-biases", "qwen2", "qwen3"],
)
def test_there_and_back_changes_nothing(
    smollm2: Path, tmp_path: Path, model_type: str, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted to GGUF and read back, every weight is bit for bit the same and the model computes the same."""
    # transformers would load SmolLM2's tokenizer beside a Qwen model as Qwen's, whatever its files say.
    monkeypatch.setattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set())
    model = write_random(tmp_path / "model", smollm2, model_type, **changed)
    convert(model, tmp_path / "model.gguf", name="x", precision=lossless_type(model))
    readback.read_back(tmp_path / "model.gguf", tmp_path / "back")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ids = torch.randint(0, 49152, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, second = (
            AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32)(ids).logits for d in (model, tmp_path / "back")
        )
    assert torch.equal(first, second)


def test_large_models_are_split_into_shards(
    random_gguf: Path, random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the size of a shard the weights go into several files with an index, and load the same."""
    monkeypatch.setattr(readback, "_SHARD_BYTES", 1 << 20)
    readback.read_back(random_gguf, tmp_path / "back")
    files = sorted(tmp_path.glob("back/*.safetensors"))
    assert len(files) > 2
    # The embedding is larger than a shard and has one to itself.
    assert all(f.stat().st_size < 1.1 * (1 << 20) or len(load_file(f)) == 1 for f in files)
    one, many = (AutoModelForCausalLM.from_pretrained(d).state_dict() for d in (random_model, tmp_path / "back"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_quantized_weights_are_dequantized(random_gguf: Path, tmp_path: Path) -> None:
    """K types are read too, with the error that they have."""
    quantize(random_gguf, tmp_path / "q.gguf", "Q4_K_M")
    whole, small = metadata.read(random_gguf), metadata.read(tmp_path / "q.gguf")
    name = "blk.0.ffn_up.weight"
    assert small.tensors[name].type == "Q4_K"
    readback.read_back(tmp_path / "q.gguf", tmp_path / "back")
    weight = load_file(tmp_path / "back" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float().numpy()
    error = ((weight - whole.values(name)) ** 2).mean() / (whole.values(name) ** 2).mean()
    assert 1e-4 < error < 1e-2


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def _replace(old: bytes, new: bytes) -> Any:
    def change(path: Path) -> None:
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (_cut, InputMissingError, "ends after the end of the file"),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(100)), InputMissingError, "not a whole GGUF"),
        (_replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0mamba"), ConfigurationError, "architecture 'mamba'"),
        (_replace(b"smollm", b"tiktok"), ConfigurationError, "pre-tokenizer 'tiktok'"),
        (_replace(b"\4\0\0\0\0\0\0\0gpt2", b"\4\0\0\0\0\0\0\0bert"), ConfigurationError, "tokenizer of kind 'bert'"),
        (_replace(b"blk.1.attn_v.weight", b"blk.1.attn_x.weight"), ConfigurationError, "lacks blk.1.attn_v.weight"),
        (_replace(b"blk.1.attn_v.weight", b"blk.0.attn_x.weight"), ConfigurationError, "not a plain llama model"),
    ],
    ids=["cut", "zip", "architecture", "pre-tokenizer", "tokenizer", "missing", "unknown"],
)
def test_what_cannot_be_read_back_is_refused(
    random_gguf: Path, tmp_path: Path, change: Any, error: type[Exception], words: str
) -> None:
    """A damaged or unknown file ends with the words that name it, never with a model that is slightly wrong."""
    path = tmp_path / "changed.gguf"
    path.write_bytes(random_gguf.read_bytes())
    change(path)
    with pytest.raises(error, match=words) as caught:
        readback.read_back(path, tmp_path / "back")
    assert "changed.gguf" in str(caught.value) or "spec.model.source" in str(caught.value)


def test_wrong_split_rules_are_noticed(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a pre-tokenizer's rule written down wrongly, the comparison with llama.cpp would refuse the file."""
    from finetune_jobs.gguf import tokenizer

    monkeypatch.setattr(tokenizer, "_DIGITS_THEN_GPT2", set())
    monkeypatch.setattr(tokenizer, "_GPT2", {"smollm"})
    with pytest.raises(ConfigurationError, match=r"gives \[.*in llama.cpp"):
        readback.read_back(smollm2_gguf(), tmp_path)
