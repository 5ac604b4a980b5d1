"""A base model's sizes, as far as they can be had at once: from its ``config.json``, or the head of a GGUF."""

import json
import os
import socket
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune_api.types import ModelSource
from finetune_cli.checks import located
from finetune_jobs.estimate import Architecture, read

_TIMEOUT_SECONDS = 5.0


class UnknownModelError(Exception):
    """The sizes cannot be told now; the message says why."""


def architecture(model: ModelSource) -> Architecture:
    """The model's sizes. Nothing but a ``config.json`` is ever downloaded, and only from the hub."""
    try:
        return read(_config(model.source))
    except OSError as error:
        raise UnknownModelError(f"{error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise UnknownModelError(str(error)) from error


def _config(source: str) -> dict[str, Any]:
    if source.startswith("hf://"):
        return _parsed(_from_hub(source.removeprefix("hf://")))
    path = located(source)
    if path is None:
        raise UnknownModelError("prepare reads the configuration of such a model")
    return _from_gguf(path) if path.suffix == ".gguf" else _parsed(path / "config.json")


def _parsed(path: Path) -> dict[str, Any]:
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise UnknownModelError(f"{path} is no model's configuration")
    return config


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import constants, hf_hub_download
    except ImportError:  # whoever only looks after jobs of a cluster need not have it
        raise UnknownModelError("the hub's client is not installed here: `pip install huggingface_hub`") from None

    repository, _, revision = name.partition("@")
    online = _reachable(constants.ENDPOINT)
    try:
        return Path(
            hf_hub_download(
                repository,
                "config.json",
                revision=revision or None,
                etag_timeout=_TIMEOUT_SECONDS,
                local_files_only=not online,
                token=os.environ.get("HF_TOKEN") or None,
            )
        )
    except Exception as error:  # offline, private, misspelt: the hub's client has a class for each
        first = str(error).strip().partition("\n")[0] if online else "there is no network"
        raise UnknownModelError(f"the hub does not give {repository}'s configuration: {first}") from error


def _reachable(url: str) -> bool:
    """Whether the host's name resolves, or a proxy sees to that. Without network the hub's client tries for 20 s."""
    if urllib.request.getproxies().get("https"):
        return True
    try:
        socket.getaddrinfo(urlsplit(url).hostname, 443)
    except OSError:
        return False
    return True


def _from_gguf(path: Path) -> dict[str, Any]:
    from finetune_jobs.gguf.metadata import read as read_head
    from finetune_jobs.run.errors import StageError

    try:
        head = read_head(path)
    except StageError as error:
        raise UnknownModelError(str(error)) from error
    family = str(head.fields.get("general.architecture"))

    def field(name: str) -> Any:
        return head.fields.get(f"{family}.{name}")

    config = {
        "model_type": family,
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": field("attention.key_length"),
        "vocab_size": head.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in head.tensors else None,
        "tie_word_embeddings": "output.weight" not in head.tensors,
        "attention_bias": "blk.0.attn_q.bias" in head.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in head.tensors,
    }
    return {name: value for name, value in config.items() if value is not None}
