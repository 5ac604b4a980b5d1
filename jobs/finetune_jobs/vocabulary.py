"""New tokens for a base model: an id in the tokenizer's files, a row in the embedding and in the output head.

A new row begins as the mean of those there are: the output head then gives the token about the mean logit, where a
random row could give it nearly all of the probability. It is learned by training embedding and head whole.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from finetune_jobs.merging.files import changed_config
from finetune_jobs.merging.weights import INDEX, SINGLE, ShardWriter, TensorSpec, Weights
from finetune_jobs.run.errors import ConfigurationError

FIELD = "spec.model.addTokens"
_TABLES = ("embed_tokens.weight", "wte.weight", "lm_head.weight")
_BLOCK_ROWS = 8192


def add_tokens(directory: Path, tokens: Sequence[str]) -> None:
    """Give each a token of its own in the model of a directory, and rows in its weights if they are there.

    The same each time that it is done. Files that are links are replaced, never written through. Memory: a block of
    rows. Raises ConfigurationError for a token that the tokenizer has, and a tokenizer that cannot be added to.
    """
    used = _extend_tokenizer(directory, tokens)
    needed = used + len(tokens)
    config = directory / "config.json"
    _replace(config, config.read_text(encoding="utf-8"))
    with changed_config(directory) as parts:
        for part in parts:
            if "vocab_size" in part:
                part["vocab_size"] = max(part["vocab_size"], needed)
    for shard in _shards(directory):
        _extend_shard(directory / shard, used, needed)


def unreadable(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> Iterator[str]:
    """For every token that does not come back from its id: so, in words.

    A byte-level tokenizer has a letter for every byte, ``é`` for one, and takes an added token of nothing but such
    letters for bytes: ``café`` would be answered as ``caf`` and a broken byte, and llama.cpp's converter would write
    it so.
    """
    for number, token in enumerate(tokens):
        ids = tokenizer(f"x{token}x", add_special_tokens=False)["input_ids"]
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if token not in text:
            yield (
                f"{FIELD}[{number}]: the model's tokenizer would write {token!r} as {text[1:-1]!r}; write it without "
                "letters like these, or leave it out"
            )


def _extend_tokenizer(directory: Path, tokens: Sequence[str]) -> int:
    """Write the tokens into the tokenizer's files; how many ids there were before."""
    file, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not file.is_file():
        raise ConfigurationError(f"{FIELD}: the model has no tokenizer.json to add to; leave addTokens out")
    tokenizer: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    known = {**tokenizer["model"]["vocab"], **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
    for number, token in enumerate(tokens):
        if token in known:
            raise ConfigurationError(f"{FIELD}[{number}]: {token!r} is a token of the model already; leave it out")
    used = int(max(known.values())) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added = {used + number: {"content": token, **flags} for number, token in enumerate(tokens)}
    tokenizer["added_tokens"] += [{"id": i, **token} for i, token in added.items()]
    _replace(file, json.dumps(tokenizer, ensure_ascii=False))
    settings: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    settings.setdefault("added_tokens_decoder", {}).update({str(i): token for i, token in added.items()})
    _replace(config, json.dumps(settings, ensure_ascii=False, indent=2))
    return used


def _replace(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)
    file.write_text(text + "\n", encoding="utf-8")


def _shards(directory: Path) -> list[str]:
    """The files that hold embedding and head; none where the weights are not here."""
    if (directory / INDEX).is_file():
        where = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        named = {file for tensor, file in where.items() if tensor.endswith(_TABLES)}
    else:
        named = {SINGLE}
    return [file for file in sorted(named) if (directory / file).is_file()]


def _extend_shard(shard: Path, used: int, needed: int) -> None:
    """Write the file anew with rows ``used`` to ``needed`` of embedding and head as the mean of those before."""
    with tempfile.TemporaryDirectory(dir=shard.parent, prefix=".adding") as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        source.mkdir()
        target.mkdir()
        (source / SINGLE).symlink_to(shard.resolve())
        weights = Weights(source)
        taller = {name: spec for name, spec in weights.specs.items() if name.endswith(_TABLES)}
        specs = weights.specs | {
            name: TensorSpec(spec.dtype, (max(spec.shape[0], needed), *spec.shape[1:])) for name, spec in taller.items()
        }
        with ShardWriter(target, specs, 1 << 62) as writer:
            for name, spec in weights.specs.items():
                _copy(writer, name, weights[name], spec)
                if name in taller:
                    writer.write(name, used, _mean(weights[name][:used]).to(spec.dtype).expand(needed - used, -1))
        shard.unlink()
        shutil.move(target / SINGLE, shard)


def _mean(rows: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for start in range(0, rows.shape[0], _BLOCK_ROWS):
        total += rows[start : start + _BLOCK_ROWS].double().sum(0)
    return total / rows.shape[0]


def _copy(writer: ShardWriter, name: str, tensor: torch.Tensor, spec: TensorSpec) -> None:
    rows = tensor if spec.shape else tensor.reshape(1)
    for start in range(0, rows.shape[0], _BLOCK_ROWS):
        writer.write(name, start, rows[start : start + _BLOCK_ROWS])
