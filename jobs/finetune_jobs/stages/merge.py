"""``merge``: fold the adapter, or several as one, into the 16-bit base, and prove that the result is what it should be.

After qlora there are two bases: the original weights, and those that training saw, quantized and raised again. The
second is the one that the adapter fits; the first has lost nothing. Which is better only a trial tells.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from finetune_api.crd_rules import OWN_COMBINATION
from finetune_api.defaults import base_quantization, resolve_density
from finetune_api.pipeline import model_before
from finetune_api.types import BASE, AdapterSource, Merge, Quantization
from finetune_jobs import anatomy
from finetune_jobs.data.encode import Dropped, encode, load_tokenizer
from finetune_jobs.merging import files, parity
from finetune_jobs.merging.blend import Blend, write_adapter
from finetune_jobs.merging.combine import Combination
from finetune_jobs.merging.dequantize import write_dequantized
from finetune_jobs.merging.merge import merge
from finetune_jobs.merging.weights import Weights
from finetune_jobs.run import environment
from finetune_jobs.run.context import Context, Outcome
from finetune_jobs.run.errors import ConfigurationError
from finetune_jobs.store.adapters import FOLDER

_log = logging.getLogger("finetune.merge")
_ROWS = 4
_SCORED_ROWS = 32
_MAX_LENGTH = 1024
_NO_ROWS = f"no eval or test row of at most {_MAX_LENGTH} tokens"
_MEMORY_SHARE = 0.8


def run(ctx: Context) -> Outcome:
    """Merge, check every module, compare the logits where memory allows; leaves ``model/`` and ``merge.json``."""
    assert ctx.stage is not None
    assert ctx.stage.merge is not None
    before = model_before(ctx.spec, ctx.stage.name)
    if before.adapter is None and not ctx.stage.merge.adapters:
        raise ConfigurationError(
            f"{_field(ctx)}: no adapter comes before it; drop it, or train with lora or qlora first"
        )
    settings = ctx.stage.merge
    dtype: torch.dtype = getattr(torch, settings.dtype)
    base_dir = ctx.model_dir(before.weights)
    adapter, told = _incoming(ctx, settings)
    quantization = base_quantization(ctx.spec, ctx.stage.name)
    bases = {"original": base_dir}
    if quantization is not None and settings.base != "original":
        bases["dequantized"] = _dequantized(ctx, base_dir, quantization)
        if settings.base == "dequantized":
            del bases["original"]

    def on_tensor(done: int, total: int) -> None:
        ctx.stop.check()
        ctx.progress.report(done, total)

    merges = {name: ctx.workspace / "merged" / name for name in bases}
    logs: dict[str, dict[str, Any]] = {}
    for name, directory in merges.items():
        directory.mkdir(parents=True)
        logs[name] = merge(bases[name], adapter, directory, dtype, _bytes(settings.max_shard_size), on_tensor)
        if ctx.spec.model.chat_template:
            files.set_chat_template(directory, ctx.spec.model.chat_template)
    losses, reason = _losses(ctx, merges) if len(merges) > 1 else ({}, "")
    kept = min(losses, key=losses.__getitem__) if losses else next(iter(merges))
    result = ctx.workspace / "result"
    result.mkdir()
    merged_dir = merges[kept].rename(result / "model")
    shutil.rmtree(ctx.workspace / "merged")

    log: dict[str, Any] = {"environment": environment.record(), "weights": before.weights, **told}
    log |= logs[kept] | {"base": {"kept": kept, "evalLoss": losses, **({"notScored": reason} if reason else {})}}
    log["logits"] = _compare_logits(ctx, dtype, bases[kept], adapter, merged_dir)
    (result / "merge.json").write_text(json.dumps(log, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    figures = {"mergedModules": log["modules"]["count"], "moduleError": log["modules"]["largestError"]}
    if quantization is not None:
        figures["base"] = kept
        figures |= {f"evalLoss{name.capitalize()}": loss for name, loss in losses.items()}
    if "relativeL2" in log["logits"]:
        figures |= {"logitsRelativeL2": log["logits"]["relativeL2"], "logitsKL": log["logits"]["kl"]}
    outputs = {"model": "model", "log": "merge.json"}
    if isinstance(adapter, Blend):
        figures |= {"adapters": len(adapter.adapters), "combination": settings.combination}
        if settings.combination == "svd":
            figures["largestLossOfRank"] = log["svd"]["largestLoss"]
            write_adapter(adapter, result / FOLDER)
            outputs[FOLDER] = FOLDER
    return Outcome(result, outputs, figures=figures)


def _incoming(ctx: Context, settings: Merge) -> tuple[Path | Blend, dict[str, Any]]:
    """The adapter that comes before, or those that are named; and what ``merge.json`` says of them."""
    if not settings.adapters:
        before = model_before(ctx.spec, ctx.run.stage).adapter
        assert before is not None
        return ctx.adapter_dir(before), {"adapter": before}
    combination = Combination(
        settings.combination,
        density=resolve_density(settings) if settings.combination in OWN_COMBINATION["density"] else 1.0,
        rank=settings.rank,
        seed=ctx.spec.seed,
    )
    adapters, told = [], []
    for place, source in enumerate(settings.adapters):
        directory, step = _brought(ctx, place, source)
        adapters.append((f"{_field(ctx)}.adapters[{place}]", directory, source.weight))
        told.append(source.model_dump(mode="json", exclude_none=True) | ({} if step is None else {"step": step}))
    return Blend(adapters, combination), {
        "adapters": told,
        "combination": settings.combination,
        **({"density": combination.density} if combination.density < 1 else {}),
        **({"seed": combination.seed} if settings.combination == "dareTies" else {}),
    }


def _brought(ctx: Context, place: int, source: AdapterSource) -> tuple[Path, int | None]:
    """An adapter that is named, here, and the step of its checkpoint. One from elsewhere came with ``prepare``."""
    if source.stage is None:
        return ctx.fetch("prepare", f"adapters/{ctx.run.stage}/{place}"), None
    return ctx.trained_adapter(source.stage, source.checkpoint, f"{_field(ctx)}.adapters[{place}]")


def _dequantized(ctx: Context, base_dir: Path, quantization: Quantization) -> Path:
    """The base as the adapter saw it in training, on the disk."""
    trust = ctx.spec.model.trust_remote_code
    body = anatomy.anatomy(anatomy.load_config(base_dir, trust_remote_code=trust), trust_remote_code=trust)
    directory = ctx.workspace / "dequantized"
    assert ctx.stage is not None
    assert ctx.stage.merge is not None
    shard = _bytes(ctx.stage.merge.max_shard_size)
    write_dequantized(base_dir, directory, quantization, body.linear, shard, ctx.stop.check, body.turned)
    return directory


def _losses(ctx: Context, merges: Mapping[str, Path]) -> tuple[dict[str, float], str]:
    """Each merged model's loss on eval rows, or nothing and why."""
    directories = list(merges.values())
    if reason := _too_large(directories[:1]):
        return {}, reason
    examples = _examples(ctx, directories[0], _SCORED_ROWS)
    if not examples:
        return {}, _NO_ROWS
    trust = ctx.spec.model.trust_remote_code
    losses = {n: parity.answer_loss(d, examples, trust, on_row=ctx.stop.check) for n, d in merges.items()}
    _log.info("loss on %d rows by base: %s", len(examples), losses)
    return losses, ""


def _compare_logits(
    ctx: Context, dtype: torch.dtype, base_dir: Path, adapter: Path | Blend, merged_dir: Path
) -> dict[str, Any]:
    """The comparison's part of the log; ``skipped`` with the reason where it was not made."""
    if reason := _too_large([base_dir, merged_dir]):
        _log.info("logits are not compared: %s", reason)
        return {"skipped": reason}
    examples = _examples(ctx, merged_dir, _ROWS)
    if not examples:
        return {"skipped": _NO_ROWS}
    distance = parity.compare(
        base_dir, adapter, merged_dir, examples, ctx.spec.model.trust_remote_code, on_row=ctx.stop.check
    )
    parity.check(distance, dtype, f"{_field(ctx)}.dtype")
    return {
        "rows": len(examples),
        "tokens": distance.tokens,
        "relativeL2": distance.relative_l2,
        "relativeL2Bound": parity.LOGIT_BOUND[dtype],
        "kl": distance.kl,
        "klBound": parity.KL_BOUND[dtype],
    }


def _too_large(directories: list[Path]) -> str:
    """Why the models cannot be run here; empty if they can."""
    needed = sum(Weights(directory).size_bytes for directory in directories)
    if needed <= (room := _MEMORY_SHARE * _available_memory()):
        return ""
    which = "base and merged model take" if len(directories) > 1 else "the merged model takes"
    return f"{which} {needed / 2**30:.1f} GiB of the {room / 2**30:.1f} GiB of memory to spare"


def _examples(ctx: Context, tokenizer_dir: Path, count: int) -> list[parity.Example]:
    model = ctx.spec.model
    tokenizer = load_tokenizer(tokenizer_dir, model.chat_template, trust_remote_code=model.trust_remote_code)
    examples: list[parity.Example] = []
    for row in ctx.rows("eval") or ctx.rows("test", of=BASE):
        encoded = encode(row, tokenizer, loss_on="auto", max_length=_MAX_LENGTH, overlong="drop")
        if isinstance(encoded, Dropped):
            continue
        if answer := [at for at, learned in enumerate(encoded.supervised) if learned and at > 0]:
            examples.append(parity.Example(encoded.input_ids, answer))
        if len(examples) == count:
            break
    return examples


def _available_memory() -> int:
    """Bytes that this process may still take: the machine's, or its control group's where that is less."""
    limit = Path("/sys/fs/cgroup/memory.max")
    words = limit.read_text().strip() if limit.is_file() else "max"
    available: int = psutil.virtual_memory().available
    return available if words == "max" else min(available, int(words))


def _bytes(size: str) -> int:
    return int(size[:-2]) << {"Mi": 20, "Gi": 30}[size[-2:]]


def _field(ctx: Context) -> str:
    index = [stage.name for stage in ctx.spec.pipeline].index(ctx.run.stage)
    return f"spec.pipeline[{index}].merge"
