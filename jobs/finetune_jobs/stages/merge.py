"""``merge``: fold the adapter into the 16-bit base, and prove that the result is the model that was trained."""

import json
import logging
from pathlib import Path
from typing import Any

import psutil
import torch

from finetune_api.pipeline import model_before
from finetune_api.types import BASE
from finetune_jobs.data.encode import Dropped, encode, load_tokenizer
from finetune_jobs.merging import files, parity
from finetune_jobs.merging.merge import merge
from finetune_jobs.merging.weights import Weights
from finetune_jobs.run import environment
from finetune_jobs.run.context import Context, Outcome
from finetune_jobs.run.errors import ConfigurationError

_log = logging.getLogger("finetune.merge")
_ROWS = 4
_MAX_LENGTH = 1024
_MEMORY_SHARE = 0.8


def run(ctx: Context) -> Outcome:
    """Merge, check every module, compare the logits where memory allows; leaves ``model/`` and ``merge.json``."""
    assert ctx.stage is not None
    assert ctx.stage.merge is not None
    before = model_before(ctx.spec, ctx.stage.name)
    if before.adapter is None:
        raise ConfigurationError(
            f"{_field(ctx)}: no adapter comes before it; drop it, or train with lora or qlora first"
        )
    dtype: torch.dtype = getattr(torch, ctx.stage.merge.dtype)
    base_dir, adapter_dir = ctx.model_dir(before.weights), ctx.adapter_dir(before.adapter)
    result = ctx.workspace / "result"
    merged_dir = result / "model"
    merged_dir.mkdir(parents=True)

    def on_tensor(done: int, total: int) -> None:
        ctx.stop.check()
        ctx.progress.report(done, total)

    log: dict[str, Any] = {"environment": environment.record(), "weights": before.weights, "adapter": before.adapter}
    log |= merge(base_dir, adapter_dir, merged_dir, dtype, _bytes(ctx.stage.merge.max_shard_size), on_tensor)
    if ctx.spec.model.chat_template:
        files.set_chat_template(merged_dir, ctx.spec.model.chat_template)
    log["logits"] = _compare_logits(ctx, dtype, base_dir, adapter_dir, merged_dir)
    (result / "merge.json").write_text(json.dumps(log, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    figures = {"mergedModules": log["modules"]["count"], "moduleError": log["modules"]["largestError"]}
    if "relativeL2" in log["logits"]:
        figures |= {"logitsRelativeL2": log["logits"]["relativeL2"], "logitsKL": log["logits"]["kl"]}
    return Outcome(result, {"model": "model", "log": "merge.json"}, figures=figures)


def _compare_logits(
    ctx: Context, dtype: torch.dtype, base_dir: Path, adapter_dir: Path, merged_dir: Path
) -> dict[str, Any]:
    """The comparison's part of the log; ``skipped`` with the reason where it was not made."""
    needed = Weights(base_dir).size_bytes + Weights(merged_dir).size_bytes
    if needed > (room := _MEMORY_SHARE * _available_memory()):
        reason = f"base and merged model take {needed / 2**30:.1f} GiB of the {room / 2**30:.1f} GiB of memory to spare"
        _log.info("logits are not compared: %s", reason)
        return {"skipped": reason}
    examples = _examples(ctx, merged_dir)
    if not examples:
        return {"skipped": f"no eval or test row of at most {_MAX_LENGTH} tokens"}
    distance = parity.compare(
        base_dir, adapter_dir, merged_dir, examples, ctx.spec.model.trust_remote_code, on_row=ctx.stop.check
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


def _examples(ctx: Context, tokenizer_dir: Path) -> list[parity.Example]:
    model = ctx.spec.model
    tokenizer = load_tokenizer(tokenizer_dir, model.chat_template, trust_remote_code=model.trust_remote_code)
    examples: list[parity.Example] = []
    for row in ctx.rows("eval") or ctx.rows("test", of=BASE):
        encoded = encode(row, tokenizer, loss_on="auto", max_length=_MAX_LENGTH, overlong="drop")
        if isinstance(encoded, Dropped):
            continue
        if answer := [at for at, learned in enumerate(encoded.supervised) if learned and at > 0]:
            examples.append(parity.Example(encoded.input_ids, answer))
        if len(examples) == _ROWS:
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
