"""``quantize``: the merged model as GGUFs, and for transformers, each held against the model before it counts."""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_api.defaults import resolve_imatrix, uses_imatrix
from finetune_api.pipeline import LORA, lora_ggufs, model_before
from finetune_api.types import BASE, IMATRIX_TYPES, AdapterSource, GGUFType, Imatrix, Quantize
from finetune_jobs import anatomy, bnb
from finetune_jobs.data.encode import load_tokenizer, stop_ids
from finetune_jobs.gguf import convert, imatrix, lora, metadata, parity
from finetune_jobs.gguf.engine import GGUFModel
from finetune_jobs.gguf.imatrix import ImportanceMatrix
from finetune_jobs.gguf.modelfile import modelfile, turns
from finetune_jobs.gguf.parity import BOUNDS, Parity, Reference
from finetune_jobs.gguf.quantize import BITS, quantize
from finetune_jobs.merging.combine import Change
from finetune_jobs.merging.files import set_chat_template
from finetune_jobs.merging.merge import changes_of
from finetune_jobs.merging.weights import Weights
from finetune_jobs.run import environment
from finetune_jobs.run.context import Context, Outcome
from finetune_jobs.run.errors import ConfigurationError, InputMissingError, StageError

_log = logging.getLogger("finetune.quantize")
_BYTES = {"bf16": 2, "f16": 2, "f32": 4}


def run(ctx: Context) -> Outcome:
    """Convert once, without loss; write and compare every type; leaves the GGUFs, ``Modelfile`` and ``quantize.json``.

    Raises ConfigurationError for a type that must not be used: the same inputs would give it again.
    """
    assert ctx.stage is not None
    assert ctx.stage.quantize is not None
    before = model_before(ctx.spec, ctx.stage.name)
    if before.adapter is not None:
        raise ConfigurationError(
            f"{_field(ctx)}: stage {before.adapter} leaves an adapter; put a merge stage before this one"
        )
    kinds = [str(kind) for kind in ctx.stage.quantize.gguf]
    model = ctx.model_dir(before.weights)
    tokenizer = load_tokenizer(model, ctx.spec.model.chat_template, trust_remote_code=ctx.spec.model.trust_remote_code)
    precision = convert.lossless_type(model)
    config = anatomy.load_config(model, trust_remote_code=ctx.spec.model.trust_remote_code)
    packed = [bnb.BITS[kind] for kind in ctx.stage.quantize.bitsandbytes]
    _check_disk(ctx.workspace, model, precision, kinds, packed, vocabulary=config.get_text_config().vocab_size)
    result = ctx.workspace / "result"
    result.mkdir()
    wanted = resolve_imatrix(ctx.stage.quantize)
    loras = lora_ggufs(ctx.spec, ctx.stage.name)
    if ctx.stage.quantize.lora_gguf and not loras:
        raise ConfigurationError(f"{_field(ctx)}.loraGGUF: no adapter of this job was merged before; leave it out")
    steps = _Steps(
        ctx,
        2 + (wanted is not None) + 2 * len(kinds) + len(loras) + len(ctx.stage.quantize.bitsandbytes),
    )

    clock = time.monotonic()
    whole = ctx.workspace / "whole.gguf"
    name = ctx.run.job.name
    log: dict[str, Any] = {"environment": environment.record(), "weights": before.weights}
    if kinds:
        convert.convert(_with_template(ctx, model, tokenizer), whole, name=name, precision=precision)
        log["conversion"] = {"type": precision, "seconds": _since(clock), "sizeBytes": whole.stat().st_size}
    steps.done()
    matrix = None
    if wanted is not None:
        matrix, log["imatrix"] = _imatrix(ctx, wanted, model, tokenizer, whole)
        imatrix.write(result / "imatrix.gguf", matrix)
        steps.done()
    known, log["reference"] = _reference(ctx, model, tokenizer, ctx.workspace)
    steps.done()

    files = {kind: f"{name}-{kind}.gguf" for kind in kinds}
    paths = {kind: result / file for kind, file in files.items()}
    types = log["types"] = _write_types(ctx, paths, _Source(whole, precision, matrix), known, steps)

    outputs = {f"gguf/{kind}": file for kind, file in files.items()} | {"log": "quantize.json"}
    if matrix is not None:
        outputs["imatrix"] = "imatrix.gguf"
    if ctx.stage.quantize.lora_gguf:
        whole_base = _whole_base(ctx, before.weights, tokenizer)
        for label, source in loras.items():
            path = result / f"{name}-{label}.gguf"
            files[label] = outputs["lora" + label.removeprefix(LORA).replace("-", "/", 1)] = path.name
            told = _write_lora(ctx, label, source, whole_base, path, tokenizer, known)
            log["lora"] = told if label == LORA else log.get("lora", {}) | {label: told}
            steps.done()
        whole_base.path.unlink()

    if ctx.stage.quantize.bitsandbytes:
        log["bitsandbytes"] = {}
    for way in ctx.stage.quantize.bitsandbytes:
        outputs[f"bitsandbytes/{way}"] = bnb.folder(way)
        log["bitsandbytes"][way] = _write_bitsandbytes(ctx, way, model, result / bnb.folder(way), known)
        steps.done({f"kl {way}": log["bitsandbytes"][way]["kl"]})

    text = json.dumps(log, indent=2, ensure_ascii=False, allow_nan=False)
    (result / "quantize.json").write_text(text + "\n", encoding="utf-8")
    if kinds:
        text = _modelfile(result, [files[kind] for kind in kinds], tokenizer)
        (result / "Modelfile").write_text(text, encoding="utf-8")
        files["Modelfile"] = "Modelfile"
    figures = {f"kl{kind}": types[kind]["kl"] for kind in kinds}
    return Outcome(result, outputs, files, figures)


@dataclass(frozen=True)
class _Source:
    """What every type is made from."""

    whole: Path
    """The conversion, in which nothing is lost."""
    precision: str
    """Its type."""
    matrix: ImportanceMatrix | None


class _Steps:
    """Counts the parts of the work, and is a place to stop at after each."""

    def __init__(self, ctx: Context, total: int) -> None:
        self._ctx, self._total, self._step = ctx, total, 0
        ctx.progress.report(0, total)

    def done(self, metrics: dict[str, float] | None = None) -> None:
        self._step += 1
        self._ctx.progress.report(self._step, self._total, metrics)
        self._ctx.stop.check()


def _reference(
    ctx: Context,
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    changes: Mapping[str, Change] | None = None,
) -> tuple[Reference, dict[str, Any]]:
    """What every type is held against, and what ``quantize.json`` says of it."""
    clock = time.monotonic()
    test = ctx.rows("test", of=BASE)[: ctx.spec.evaluation.max_rows]
    known = parity.reference(
        model,
        tokenizer,
        parity.rows_for(test),
        scratch,
        changes=changes,
        trust_remote_code=ctx.spec.model.trust_remote_code,
        tick=ctx.stop.check,
    )
    return known, {
        "precision": "float32",
        "rows": len(known.examples),
        "answerTokens": len(known.logprobs),
        "source": "test rows" if test else "built-in texts, since the job has no test rows",
        "seconds": _since(clock),
    }


def _imatrix(
    ctx: Context, wanted: Imatrix, model: Path, tokenizer: PreTrainedTokenizerBase, whole: Path
) -> tuple[ImportanceMatrix, dict[str, Any]]:
    """The importance matrix, and what ``quantize.json`` says of it."""
    clock = time.monotonic()
    rows = ctx.rows("train")
    if not rows:
        raise ConfigurationError(
            f"{_field(ctx)}.imatrix: there are no train rows to measure an importance matrix on; give some under "
            "spec.data.train, or leave out imatrix and the types that need one"
        )
    count = min(wanted.rows, len(rows))
    matrix = imatrix.measure(
        model,
        tokenizer,
        [rows[i * len(rows) // count] for i in range(count)],  # evenly, for sources may lie one after the other
        whole,
        trust_remote_code=ctx.spec.model.trust_remote_code,
        tick=ctx.stop.check,
    )
    return matrix, {
        "rows": matrix.rows,
        "tokens": matrix.tokens,
        "tensors": len(matrix.squares),
        "without": imatrix.lacking(whole, matrix),
        "file": "imatrix.gguf",
        "seconds": _since(clock),
    }


def _write_types(
    ctx: Context, paths: Mapping[str, Path], source: _Source, known: Reference, steps: _Steps
) -> dict[str, Any]:
    """Write and compare every type; what ``quantize.json`` says of each.

    Raises ConfigurationError with all that is wrong with any of them.
    """
    assert ctx.stage is not None
    assert ctx.stage.quantize is not None
    block = ctx.stage.quantize
    types: dict[str, Any] = {}
    refused: list[str] = []
    shown = _compared_without(block)
    for index, (kind, path) in enumerate(paths.items()):
        clock = time.monotonic()
        weighed = uses_imatrix(block, GGUFType(kind))
        if kind.lower() == source.precision:
            os.link(source.whole, path)
        else:
            quantize(source.whole, path, kind, source.matrix if weighed else None)
        made = _since(clock)
        steps.done()
        clock = time.monotonic()
        field = f"{_field(ctx)}.gguf[{index}]: {kind}"
        try:
            found = parity.compare(path, known, max_new_tokens=ctx.spec.evaluation.max_new_tokens, tick=ctx.stop.check)
        except InputMissingError as error:  # its converter knows the model, llama.cpp itself this kind of it not
            raise ConfigurationError(f"{field} {error}; leave the stage out, or choose another model") from error
        types[kind] = _describe(ctx, kind, path, found) | {"seconds": {"write": made, "compare": _since(clock)}}
        types[kind]["imatrix"] = weighed
        if kind == shown:
            types[kind]["withoutImatrix"] = _without_imatrix(ctx, kind, source, known)
        words = [*found.failures(kind), *_user_gate(ctx, kind, found)]
        refused += [f"{field} {word}" for word in words]
        steps.done({f"kl {kind}": found.kl})
    if refused:
        raise ConfigurationError("\n".join([*refused, "choose a type with more bits, or mend what the words name"]))
    return types


def _compared_without(block: Quantize) -> str | None:
    """The one type that is made without the importance matrix too, to show what that brings: Q4_K_M, or the first that
    llama.cpp makes without one."""
    able = [kind for kind in block.gguf if uses_imatrix(block, kind) and kind not in IMATRIX_TYPES]
    return str(GGUFType.Q4_K_M if GGUFType.Q4_K_M in able else able[0]) if able else None


def _without_imatrix(ctx: Context, kind: str, source: _Source, known: Reference) -> dict[str, float]:
    path = ctx.workspace / "without-imatrix.gguf"
    quantize(source.whole, path, kind)
    found = parity.compare(path, known, max_new_tokens=0, tick=ctx.stop.check)
    path.unlink()
    return {"kl": found.kl, "klStandardError": found.kl_error, "top1": found.top1}


@dataclass(frozen=True)
class _WholeBase:
    """What adapters are laid over to be compared."""

    model: Path
    name: str
    path: Path
    """Its conversion, in which nothing is lost."""


def _whole_base(ctx: Context, merged: str, tokenizer: PreTrainedTokenizerBase) -> _WholeBase:
    name = model_before(ctx.spec, merged).weights
    base, whole = ctx.model_dir(name), ctx.workspace / "base.gguf"
    convert.convert(_with_template(ctx, base, tokenizer), whole, name="base", precision=convert.lossless_type(base))
    return _WholeBase(base, name, whole)


def _write_lora(
    ctx: Context,
    label: str,
    source: AdapterSource,
    base: _WholeBase,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    known: Reference,
) -> dict[str, Any]:
    """An adapter that was merged, over its base held against the model that it makes; what ``quantize.json`` says.

    That is ``known`` where it alone was merged; else the base computes with the adapter's change.
    """
    assert source.stage is not None
    clock = time.monotonic()
    adapter, _ = ctx.trained_adapter(source.stage, source.checkpoint, f"{_field(ctx)}.loraGGUF")
    count = lora.convert(adapter, base.model, path, name=ctx.run.job.name)
    if label != LORA:
        scratch = ctx.workspace / f"reference-{label}"
        scratch.mkdir()
        known, _ = _reference(ctx, base.model, tokenizer, scratch, changes_of(adapter, base.model))
    found = parity.compare(
        base.path, known, lora=path, max_new_tokens=ctx.spec.evaluation.max_new_tokens, tick=ctx.stop.check
    )
    if words := found.failures(LORA):
        which = f"the adapter of {source.stage} over its base"
        raise ConfigurationError("\n".join(f"{_field(ctx)}.loraGGUF: {which}: {w}" for w in words))
    return {"base": base.name, "modules": count, "seconds": _since(clock)} | _describe(ctx, LORA, path, found)


def _write_bitsandbytes(ctx: Context, kind: str, model: Path, directory: Path, known: Reference) -> dict[str, Any]:
    """One bitsandbytes model, compared; what ``quantize.json`` says of it."""
    clock = time.monotonic()
    trust = ctx.spec.model.trust_remote_code
    bnb.export(model, directory, kind, trust_remote_code=trust)
    if ctx.spec.model.chat_template:
        set_chat_template(directory, ctx.spec.model.chat_template)
    kl, error, top1 = bnb.compare(directory, known, trust_remote_code=trust, tick=ctx.stop.check)
    size, parameters = sum(path.stat().st_size for path in directory.glob("*.safetensors")), _parameters(model)
    return {
        "folder": directory.name,
        "sizeBytes": size,
        "parameters": parameters,
        "bitsPerWeight": round(8 * size / parameters, 3),
        "kl": kl,
        "klStandardError": error,
        "top1": top1,
        "seconds": _since(clock),
    }


def _parameters(model: Path) -> int:
    return sum(prod(spec.shape) for spec in Weights(model).specs.values())


def _with_template(ctx: Context, model: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The model directory, changed where the converter would find another chat template in it than ``tokenizer`` has:
    the job has one of its own, or two files disagree, of which transformers and the converter prefer different ones.
    """
    template, config = model / "chat_template.jinja", model / "tokenizer_config.json"
    wanted = tokenizer.chat_template
    stands = template.read_text(encoding="utf-8") if template.is_file() else None
    if config.is_file():
        stands = json.loads(config.read_text(encoding="utf-8")).get("chat_template", stands)
    if not isinstance(wanted, str) or stands == wanted:
        return model
    copy = ctx.workspace / "with-template" / model.parent.name
    copy.mkdir(parents=True)
    for path in model.iterdir():
        if path == config:
            shutil.copyfile(path, copy / path.name)  # it is written to
        elif path.is_file() and path != template:
            (copy / path.name).symlink_to(path.resolve())
    set_chat_template(copy, wanted)
    return copy


def _check_disk(
    workspace: Path, model: Path, precision: str, kinds: list[str], packed: list[float], *, vocabulary: int
) -> None:
    # Not the files' sizes: of mixed types, all is converted to the widest.
    parameters = _parameters(model)
    files = parameters * (
        _BYTES[precision] + sum(1.1 * bits / 8 for bits in [*(BITS[kind] for kind in kinds), *packed])
    )
    needed = files + parity.reference_bytes(vocabulary)
    free = shutil.disk_usage(workspace).free
    if needed > free:
        raise StageError(
            f"the workspace has {free / 2**30:.1f} GiB free and {', '.join(kinds)} of this model need "
            f"{needed / 2**30:.1f} GiB: free space, give it more, or ask for fewer types"
        )


def _describe(ctx: Context, kind: str, path: Path, found: Parity) -> dict[str, Any]:
    file = metadata.read(path)
    with path.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    kl, top1 = BOUNDS.get(kind, (None, None))
    return {
        "file": path.name,
        "sizeBytes": path.stat().st_size,
        "sha256": sha256,
        **file.summary(),
        "tensorTypes": {name: tensor.type for name, tensor in file.tensors.items()},
        "kl": found.kl,
        "klStandardError": found.kl_error,
        "top1": found.top1,
        "top1Sure": found.top1_sure,
        "bounds": {"kl": kl, "top1Sure": top1, "maxGGUFDivergence": _user_bound(ctx, kind)},
        "rows": found.rows,
        "answerTokens": found.tokens,
        "prompts": found.prompts if found.prompts else "the model has no chat template",
        "texts": found.texts,
        "differences": found.differences,
        "stop": {
            "token": found.stop_token,
            "endsGeneration": found.stop_known,
            "places": found.stops_expected,
            "stopped": found.stops,
            "answers": found.generated,
            "finished": found.finished,
        },
    }


def _user_bound(ctx: Context, kind: str) -> float | None:
    return ctx.spec.evaluation.gates.max_gguf_divergence.get(kind)


def _user_gate(ctx: Context, kind: str, found: Parity) -> list[str]:
    bound = _user_bound(ctx, kind)
    if bound is None or found.kl <= bound:
        return []
    words = f"mean KL divergence {found.kl:.2e}, at most {bound:g} by spec.evaluation.gates.maxGGUFDivergence"
    if ctx.spec.evaluation.gates.fail_job:
        return [words]
    _log.warning("%s: %s", kind, words)  # not fatal: it becomes GatePassed=False
    return []


def _modelfile(result: Path, files: list[str], tokenizer: PreTrainedTokenizerBase) -> str:
    with GGUFModel(result / files[0]) as model:
        stops = [model.token_text(token) for token in stop_ids(tokenizer)]
        # A BOS that the server adds has no place in the template; one that nobody adds must stay there.
        bos = model.token_text(model.bos) if model.adds_bos else ""
        found = turns(model.render, bos, stops[0]) if model.chat_template else None
        return modelfile(files, found, stops, model.context_length)


def _since(clock: float) -> float:
    return round(time.monotonic() - clock, 2)


def _field(ctx: Context) -> str:
    index = [stage.name for stage in ctx.spec.pipeline].index(ctx.run.stage)
    return f"spec.pipeline[{index}].quantize"
