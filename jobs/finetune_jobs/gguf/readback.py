"""A single ``.gguf`` as a base model: read back once into the Hugging Face layout that everything else starts from."""

import json
import logging
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from finetune_jobs.gguf import metadata, tokenizer
from finetune_jobs.gguf.metadata import GGUFFile
from finetune_jobs.gguf.tokenizer import unreadable

_log = logging.getLogger("finetune.gguf")
_SHARD_BYTES = 2 << 30
_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""GGUF architecture to transformers' model type: those whose tensors differ by names and the order of rows alone."""
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_REQUIRED = set(_LAYER) - {"attn_q_norm", "attn_k_norm"}
_ROPE = "rope_freqs.weight"


def read_back(source: Path, directory: Path) -> None:
    """Write ``source`` into ``directory`` as transformers reads it: bf16 safetensors, configs and tokenizer.

    Quantized weights are dequantized and rounded to bf16. Memory: one shard of 2 GiB and one tensor in float32.
    Raises InputMissingError for a damaged file, ConfigurationError (naming ``spec.model.source``) for what cannot be
    read back exactly.
    """
    file = metadata.read(source)
    architecture = str(file.fields.get("general.architecture"))
    if architecture not in _MODEL_TYPES:
        raise unreadable(
            file, f"has architecture {architecture!r}; only {', '.join(_MODEL_TYPES)} can be read back from a GGUF"
        )
    if "token_embd.weight" not in file.tensors:
        raise unreadable(file, "has no weights")
    config = _config(file, architecture)
    names = _names(file, config)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", _generation(file.fields))
    tokenizer.write(file, directory)
    tokenizer.check(file, directory)  # before the weights: it is what is most likely to be refused
    _write_weights(file, config, names, directory)
    _log.info("read %s back: %d tensors, architecture %s", source.name, len(names), architecture)


def _float(value: float) -> float:
    """The number that was meant before it was stored in 32 bits: 9.99999974e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _config(file: GGUFFile, architecture: str) -> dict[str, Any]:
    fields = file.fields

    def field(name: str, default: Any = None) -> Any:
        value = fields.get(f"{architecture}.{name}", default)
        if value is None:
            raise unreadable(file, f"does not say {architecture}.{name}")
        return value

    heads, width = field("attention.head_count"), field("embedding_length")
    head = field("attention.key_length", fields.get(f"{architecture}.rope.dimension_count", width // heads))
    theta = _float(field("rope.freq_base", 10000.0))
    model_type = _MODEL_TYPES[architecture]
    config = {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "dtype": "bfloat16",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": head,
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": _float(field("attention.layer_norm_rms_epsilon")),
        "rope_parameters": {"rope_theta": theta, **_rope(file, architecture, head, theta)},
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_token_ids(fields),
    }
    if model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    return config


def _rope(file: GGUFFile, architecture: str, head: int, theta: float) -> dict[str, Any]:
    kind = file.fields.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.fields[f"{architecture}.rope.scaling.factor"]}
    if kind != "none":
        raise unreadable(file, f"scales positions by {kind!r}, which cannot be read back")
    if _ROPE not in file.tensors:
        return {"rope_type": "default"}
    # Llama 3.1 and later: the file carries a factor per frequency, not the four numbers that they were made from.
    for factor in (8.0, 32.0):
        scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        if np.allclose(llama3_factors(head, theta, **scaling, original=8192), file.values(_ROPE), rtol=1e-4):
            return {"rope_type": "llama3", **scaling, "original_max_position_embeddings": 8192}
    raise unreadable(file, "scales positions in a way that cannot be read back")


def llama3_factors(
    head: int, theta: float, *, factor: float, low_freq_factor: float, high_freq_factor: float, original: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What Llama 3.1's rope scaling divides a frequency by: 1 for short waves, ``factor`` for long, a blend between."""
    waves = 2 * np.pi * theta ** (np.arange(0, head, 2) / head)
    smooth = np.clip((original / waves - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return np.asarray(1 / ((1 - smooth) / factor + smooth), dtype=np.float32)


def _token_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: value for name, value in ids.items() if value is not None}


def _generation(fields: Mapping[str, Any]) -> dict[str, Any]:
    ids = _token_ids(fields)
    turn = fields.get("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = [ids["eos_token_id"], turn] if "eos_token_id" in ids else turn
    return ids


def _names(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, str]:
    """Hugging Face's name to the GGUF's for every parameter; refuses a file with a tensor too many or too few."""
    blocks = {
        f"{_LAYER[part]}.{kind}": f"{part}.{kind}"
        for name in file.tensors
        if name.startswith("blk.0.") and (part := name.split(".")[2]) in _LAYER and (kind := name.split(".")[3])
    }
    names = {
        f"model.layers.{i}.{hf}": f"blk.{i}.{own}"
        for i in range(config["num_hidden_layers"])
        for hf, own in blocks.items()
    }
    names |= {hf: own for hf, own in _OUTER.items() if hf != "lm_head.weight" or not config["tie_word_embeddings"]}
    missing = [own for own in (f"blk.0.{part}.weight" for part in _REQUIRED) if own not in file.tensors]
    missing += [own for own in names.values() if own not in file.tensors]
    unknown = sorted(set(file.tensors) - set(names.values()) - {_ROPE})
    if missing or unknown:
        words = f"it lacks {missing[0]}" if missing else f"it has {unknown[0]}"
        raise unreadable(file, f"is not a plain {config['model_type']} model ({words})")
    return names


def _write_weights(file: GGUFFile, config: Mapping[str, Any], names: Mapping[str, str], directory: Path) -> None:
    sizes = {name: 2 * prod(file.tensors[own].shape) for name, own in names.items()}
    shards: list[list[str]] = [[]]
    room = _SHARD_BYTES
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(name)
        room -= size
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        where = {name: path for path, members in zip(files, shards, strict=True) for name in members}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        _write_json(directory / "model.safetensors.index.json", index)
    for path, members in zip(files, shards, strict=True):
        save_file(
            {name: _weight(file, name, names[name], config) for name in members}, directory / path, {"format": "pt"}
        )


def _weight(file: GGUFFile, name: str, own: str, config: Mapping[str, Any]) -> torch.Tensor:
    values = file.values(own)
    if config["model_type"] == "llama" and own.split(".")[-2] in ("attn_q", "attn_k"):
        # The converter interleaves each head's halves for llama.cpp's kind of rotation (conversion/llama.py, permute).
        heads = config["num_attention_heads" if ".attn_q." in own else "num_key_value_heads"]
        values = (
            values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
            .swapaxes(1, 2)
            .reshape(values.shape)
        )
    return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(torch.bfloat16)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
