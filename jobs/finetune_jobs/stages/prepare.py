"""Everything that can be found out before a GPU starts: the store, the model, the data. Then the splits are frozen.

Results: ``base.json`` (and ``model/`` if the model is of this machine), ``data/<set>/<role>.jsonl``, ``datacard.json``
and ``.txt``, ``checks.json``, ``environment.json``.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from finetune_api.defaults import sharing_processes, with_adapter
from finetune_api.pipeline import block, find, kind, named_adapters, training_block
from finetune_api.stage import File
from finetune_api.types import (
    IA3,
    KTO,
    AdapterSource,
    Bottleneck,
    FineTuneJobSpec,
    GGUFType,
    Method,
    PrefixTuning,
    Quantize,
    TrainingBlock,
)
from finetune_jobs import anatomy, estimate, headers, models
from finetune_jobs.anatomy import Anatomy
from finetune_jobs.data import card, sources
from finetune_jobs.data.encode import load_tokenizer, prompt_ids, stop_ids
from finetune_jobs.data.labels import unbalanced
from finetune_jobs.data.lengths import Counted, stage_card
from finetune_jobs.data.load import Mistakes
from finetune_jobs.data.rows import Row
from finetune_jobs.data.sets import SHARED, Builder, Sets
from finetune_jobs.data.template import syntax_error
from finetune_jobs.merging import incoming
from finetune_jobs.remote import sha256
from finetune_jobs.run import environment
from finetune_jobs.run.context import Context, Outcome
from finetune_jobs.run.digest import data_set
from finetune_jobs.run.errors import ConfigurationError, DataError, InputMissingError, StageError
from finetune_jobs.run.progress import Progress
from finetune_jobs.store.client import Store
from finetune_jobs.store.manifest import content_digest
from finetune_jobs.store.probe import probe, refuse
from finetune_jobs.training.bottleneck import places
from finetune_jobs.vocabulary import unreadable

if TYPE_CHECKING:
    from finetune_jobs.gguf.rehearsal import Rehearsal

_log = logging.getLogger("finetune.prepare")


def fingerprint(spec: FineTuneJobSpec, store: Store) -> dict[str, str]:
    """The contents of everything that the job is given, by field: equal fingerprints mean the same model and rows."""
    found: dict[str, str] = {}
    wrong: list[StageError] = []

    def look(name: str, content: Callable[[], str]) -> None:
        try:
            found[name] = content()
        except (ConfigurationError, DataError, InputMissingError) as error:
            wrong.append(error)

    look("model", lambda: models.fingerprint(spec.model, spec.storage))
    stages = [(f"pipeline.{s.name}.data", f"spec.pipeline[{n}].data", s.data) for n, s in enumerate(spec.pipeline)]
    for name, where, data in [("data", "spec.data", spec.data), *stages]:
        for role in type(data).model_fields:
            for number, source in enumerate(getattr(data, role)):
                entry = f"{role}[{number}]"
                look(f"{name}.{entry}", partial(sources.fingerprint, source, spec.storage, f"{where}.{entry}"))
    for merge, place, source, field in _from_elsewhere(spec):
        look(f"pipeline.{merge}.adapters[{place}]", partial(incoming.fingerprint, source, spec.storage, field))
    if wrong:  # all that is missing at once, under the first one's exit code
        raise type(wrong[0])("\n".join(map(str, wrong)))
    return found


def run(ctx: Context) -> Outcome:
    """Probe, resolve, read, check, freeze. Raises ConfigurationError and DataError with every mistake found so far."""
    spec, out = ctx.spec, ctx.workspace / "out"
    out.mkdir()
    pulse = _Pulse(ctx.progress)
    promises = probe(ctx.store)
    refuse(promises)
    checks = [{"name": p.name, "passed": p.kept, "words": p.words} for p in promises]
    _make_room(spec, ctx.workspace)

    base = models.resolve(
        spec.model, spec.storage, out / "model" if models.is_local(spec.model) else ctx.workspace / "base"
    )
    tokenizer, body, window = _check_model(spec, base, ctx.workspace)
    checks.append(
        {"name": "model", "passed": True, "words": f"{body.parameters:,} parameters, tokenizer and weights fit"}
    )
    _write(out / "base.json", base.record)
    outputs = _bring_adapters(spec, out)
    ctx.stop.check()

    mistakes = Mistakes()
    chat = bool(tokenizer.chat_template)
    sets = Builder(spec, ctx.workspace / "sources", chat=chat, mistakes=mistakes, report=pulse.beat).build()
    ctx.stop.check()
    lengths = Counted(sets, tokenizer, mistakes, pulse.beat)
    stages = {s.name: stage_card(spec, s, lengths) for s in spec.pipeline if training_block(s)}
    for name, roles in sets.sets.items():
        for role in roles:
            lengths.any_of(name, role)  # rows that no stage learns from must be readable too
    for role in SHARED:
        for row in sets.shared[role].rows:
            _check_prompt(row, tokenizer, mistakes)
    mistakes.refuse()
    ctx.stop.check()

    content = _card(spec, sets, lengths, stages, base.origin, tokenizer, body, pulse)
    content["warnings"] += _beyond(window, content)
    outputs |= _freeze(sets, out)
    if base.stored:
        outputs["model"] = "model"
    checks += [{"name": "data", "passed": False, "words": words} for words in content["warnings"]]
    _write(out / "datacard.json", content)
    (out / "datacard.txt").write_text(card.as_text(content), encoding="utf-8")
    predicted = _estimate(spec, base.directory, content["stages"])
    if predicted.get("diskBytes", 0) > (free := shutil.disk_usage(ctx.workspace).free):
        words = (
            f"all stages together may take {predicted['diskBytes'] / 2**30:.1f} GiB; here are {free / 2**30:.1f} free"
        )
        checks.append({"name": "disk", "passed": False, "words": words})
    _write(out / "checks.json", {"checks": checks, "estimate": predicted})
    # No output: later stages must not run anew because the same data were prepared on another machine.
    _write(out / "environment.json", {"environment": environment.record()})
    outputs |= {"base": "base.json", "datacard": "datacard.json", "checks": "checks.json"}
    counts = {f"{role}Rows": len(frozen.rows) for role, frozen in sets.sets["default"].items()}
    figures: dict[str, float | int | str] = {
        **counts,
        "parameters": body.parameters,
        "warnings": len(content["warnings"]),
    }
    artifacts = {"datacard.json": "datacard.json", "datacard.txt": "datacard.txt"}
    return Outcome(out, outputs, artifacts, figures)


def _from_elsewhere(spec: FineTuneJobSpec) -> Iterator[tuple[str, int, AdapterSource, str]]:
    """The merge, the entry's number, the entry and its field, of adapters that no stage of this job trains."""
    for number, stage in enumerate(spec.pipeline):
        for place, source in enumerate(named_adapters(stage)):
            if source.uri is not None:
                yield stage.name, place, source, f"spec.pipeline[{number}].merge.adapters[{place}]"


def _bring_adapters(spec: FineTuneJobSpec, out: Path) -> dict[str, str]:
    """Adapters from elsewhere become part of the result, all mistakes told at once; ``out`` has the ``base.json``."""
    written = out / "base.json"
    base = File(path=written.name, key="", size_bytes=written.stat().st_size, sha256=sha256(written))
    digest = content_digest([base], under=written.name)
    outputs: dict[str, str] = {}
    wrong: list[str] = []
    for merge, place, source, field in _from_elsewhere(spec):
        path = f"adapters/{merge}/{place}"
        try:
            incoming.bring(source, spec.storage, spec.model, digest, out / path, field)
            combination = find(spec, merge).merge
            incoming.check(out / path, combination.combination if combination else "linear", field)
        except ConfigurationError as error:
            wrong.append(str(error))
        outputs[path] = path
    if wrong:
        raise ConfigurationError("\n".join(wrong))
    return outputs


def _make_room(spec: FineTuneJobSpec, workspace: Path) -> None:
    """Refuse to start what the disk cannot hold."""
    needed = models.bytes_to_copy(spec.model, workspace)
    free = shutil.disk_usage(workspace).free
    if needed > free:
        raise StageError(
            f"the workspace {workspace} has {free / 2**30:.1f} GiB free, but the model alone takes "
            f"{needed / 2**30:.1f} GiB: "
            "free space or give it more"
        )


def _estimate(spec: FineTuneJobSpec, directory: Path, used: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes that the job will take, by stage; empty for a family of models that the estimate does not know."""
    try:
        model = estimate.read(anatomy.read_config(directory))
    except ValueError as error:
        _log.info("%s", error)
        return {}
    disk = estimate.disk(model, spec)
    stages = {}
    for stage in spec.pipeline:
        if training_block(stage):
            trains = with_adapter(spec, stage.name)
            memory = estimate.training_memory(
                model,
                trains,
                on_gpu=stage.resources.gpus > 0,
                tokens=used[stage.name]["longest"] or None,
                shards=sharing_processes(stage) if trains.training.distributed == "fsdp" else 1,
            )
            trained = estimate.trained_parameters(model, trains)
            stages[stage.name] = {"memoryBytes": memory.total, "trainableParameters": trained}
    return {"diskBytes": disk.total, "stages": stages}


def _check_model(
    spec: FineTuneJobSpec, base: models.Base, workspace: Path
) -> tuple[PreTrainedTokenizerBase, Anatomy, int | None]:
    trust = spec.model.trust_remote_code
    config = anatomy.load_config(base.directory, trust_remote_code=trust)
    body = anatomy.anatomy(config, trust_remote_code=trust)
    tokenizer = load_tokenizer(base.directory, trust_remote_code=trust)
    _check_template(tokenizer, spec.model.chat_template)
    anatomy.check_tokenizer(tokenizer, base.directory, body)
    if base.stored:
        anatomy.check_weights(base.directory, body.parameters)
    wrong = list(unreadable(tokenizer, spec.model.add_tokens))
    for number, stage in enumerate(spec.pipeline):
        where = f"spec.pipeline[{number}].{kind(spec, stage.name)}"
        match block(stage):
            case TrainingBlock(lora=lora) if lora is not None:
                wrong += anatomy.wrong_targets(lora.target_modules, body, f"{where}.lora.targetModules")
                wrong += anatomy.wrong_modules(lora.modules_to_save, body, f"{where}.lora.modulesToSave")
                wrong += anatomy.wrong_bias(lora, body, f"{where}.lora.bias")
            case TrainingBlock(method=Method.PREFIX_TUNING, prefix_tuning=prefix):
                wrong += anatomy.wrong_prefix(prefix or PrefixTuning(), body, f"{where}.prefixTuning.virtualTokens")
            case TrainingBlock(method=Method.IA3):
                ia3 = with_adapter(spec, stage.name).ia3 or IA3()
                wrong += anatomy.wrong_targets(ia3.target_modules, body, f"{where}.ia3.targetModules")
                try:
                    estimate.scaled_modules(body.linear, ia3)
                except ValueError as error:
                    wrong.append(f"{where}.ia3.targetModules: {error}")
            case TrainingBlock(method=Method.BOTTLENECK, bottleneck=settings):
                try:
                    places(body.modules, (settings or Bottleneck()).placement)
                except ConfigurationError as error:
                    wrong.append(f"{where}.{error}")
            case Quantize(gguf=types, lora_gguf=adapters):
                wrong += _unfit_types(base.directory, types, f"{where}.gguf")
                if adapters and body.turned:
                    wrong.append(
                        f"{where}.loraGGUF: the model keeps {body.turned[0]} as (in, out), which llama.cpp's converter "
                        "turns round and with it an adapter's two halves; leave out loraGGUF, the merged model's GGUF "
                        "has the adapter in it"
                    )
            case _:
                pass
    converting = [s.quantize is not None and bool(s.quantize.gguf or s.quantize.lora_gguf) for s in spec.pipeline]
    stages = [f"spec.pipeline[{number}].quantize" for number, converts in enumerate(converting) if converts]
    found = _rehearse(spec, base, tokenizer, workspace) if stages else None
    wrong += [f"{stages[0]}.gguf: {words}" for words in (found.refusals if found else ())]
    if wrong:
        raise ConfigurationError("\n".join(wrong))
    return tokenizer, body, found.window if found else None


def _unfit_types(directory: Path, types: Sequence[GGUFType], where: str) -> list[str]:
    try:
        model = estimate.read(anatomy.read_config(directory))
    except ValueError:  # a family that the estimate does not know: llama.cpp will tell
        return []
    return [f"{where}[{n}]: {words}" for n, kind in enumerate(types) if (words := estimate.unfit(model, kind))]


def _rehearse(
    spec: FineTuneJobSpec, base: models.Base, tokenizer: PreTrainedTokenizerBase, workspace: Path
) -> "Rehearsal":
    from finetune_jobs.gguf import convert, rehearsal

    config = anatomy.read_config(base.directory)
    if not convert.supported(config):
        kind = (config.get("architectures") or ["this model"])[0]
        words = f"llama.cpp's converter does not know {kind}, so there can be no GGUF of it"
        return rehearsal.Rehearsal([f"{words}; leave the stage out, or choose another model"])
    found = headers.fetch(base, spec.storage)
    return rehearsal.rehearse(base.directory, tokenizer, workspace / "rehearsal", spec.model.add_tokens, found)


def _beyond(window: int | None, content: Mapping[str, Any]) -> list[str]:
    """A warning where rows are longer than a window that llama.cpp does not know."""
    roles = [role for roles in content["sets"].values() for role in roles.values()]
    longest = max((role["tokens"]["max"] for role in roles if role.get("tokens")), default=0)
    if window is None or longest <= window:
        return []
    return [
        f"the model looks {window} tokens back, llama.cpp to the beginning: on longer texts (the longest row has "
        f"{longest}) its GGUFs answer otherwise than the model"
    ]


def _check_template(tokenizer: PreTrainedTokenizerBase, own: str) -> None:
    template = tokenizer.chat_template
    if isinstance(template, str) and (words := syntax_error(template)):
        field = "spec.model.chatTemplate:" if own else f"{anatomy.FIELD}: the model's chat template"
        raise ConfigurationError(f"{field} {words}{'' if own else ', or write spec.model.chatTemplate'}")


class _Pulse:
    """Progress of reading and counting: how many rows so far; how many there will be nobody knows."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._rows, self._last = progress, 0, time.monotonic()

    def beat(self, _: int = 0) -> None:
        self._rows += 1
        if time.monotonic() - self._last >= 1:
            self._last = time.monotonic()
            self._progress.report(self._rows, 0, {"rows": self._rows})


def _check_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, mistakes: Mistakes) -> None:
    try:
        prompt_ids(row, tokenizer)
    except DataError as error:
        mistakes.add(str(error))


def _card(
    spec: FineTuneJobSpec,
    sets: Sets,
    lengths: Counted,
    stages: Mapping[str, Any],
    origin: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    body: Anatomy,
    pulse: _Pulse,
) -> dict[str, Any]:
    cards: dict[str, dict[str, Any]] = {}
    locked = {name: role for name, role in sets.sets["default"].items() if name == "test"}
    for name, roles in sets.sets.items():
        cards[name] = {role: card.role_card(content, lengths.any_of(name, role)) for role, content in roles.items()}
        for role, watched in (("train", "eval"), ("preference", "preferenceEval"), ("prompts", "promptsEval")):
            if role in roles:
                against = {**locked, **({"eval": roles[watched]} if watched in roles else {})}
                cards[name][role] |= card.near_duplicates(roles[role], against, pulse.beat)
    warnings = card.warnings(sets.sets, cards, str(tokenizer.chat_template or ""))
    for stage in spec.pipeline:
        if stage.preference is not None and stage.preference.loss == "kto":
            rows = sets.sets[data_set(spec, stage.name)]["preference"].rows
            if words := unbalanced(rows, stage.preference.kto or KTO()):
                warnings.append(f"{stage.name}: {words}")
    if tokenizer.chat_template is None:
        warnings.append("the model has no chat template: instructions become prompts of plain text")
    return {
        "seed": spec.seed,
        "model": {
            **origin,
            "parameters": body.parameters,
            "tiedEmbeddings": body.tied,
            "vocabulary": body.vocabulary,
            "stopTokens": [str(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids(tokenizer)],
            "chatTemplate": "the job's own"
            if spec.model.chat_template
            else "the tokenizer's"
            if tokenizer.chat_template
            else "none",
        },
        "warnings": warnings,
        "sets": cards,
        **{role: card.role_card(sets.shared[role], None) for role in SHARED},
        "stages": dict(stages),
    }


def _freeze(sets: Sets, out: Path) -> dict[str, str]:
    """Write every role; the logical output of each file."""
    outputs: dict[str, str] = {}
    frozen = {f"data/{name}/{role}": r for name, roles in sets.sets.items() for role, r in roles.items()}
    frozen |= {f"data/{role}": r for role, r in sets.shared.items()}
    for logical, role in frozen.items():
        path = out / f"{logical}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in role.rows)
        outputs[logical] = f"{logical}.jsonl"
    return outputs


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
