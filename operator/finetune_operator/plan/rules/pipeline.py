"""Rules on the pipeline as a whole: blocks, names, ``from``, and what may follow what."""

from collections.abc import Iterator

from finetune_api.defaults import FOLDED, PROMPTED, base_quantization, resolve_imatrix, resolve_lora
from finetune_api.pipeline import BLOCKS, adapter_stages, find, kind, merged_adapters, training_block
from finetune_api.types import BASE, DERIVED_STAGES, IMATRIX_TYPES, FineTuneJobSpec, Method, Stage
from finetune_api.validate import FieldError, suggest
from finetune_operator.plan.rules.walk import MERGE_BETWEEN, after, before, origin, stages, trainings


def one_block(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Every stage has exactly one block."""
    for path, stage in stages(spec):
        written = [name for name in BLOCKS if getattr(stage, name) is not None]
        if not written:
            known = ", ".join(BLOCKS)
            yield FieldError(path, f"needs exactly one of {known}; a block without fields is written `merge: {{}}`")
        elif len(written) > 1:
            mend = f"make it {len(written)} stages"
            yield FieldError(path, f"has {' and '.join(written)}, but a stage does one thing: {mend}")


def stage_names(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Names are unique, and not those that every job has already."""
    seen: dict[str, str] = {}
    for path, stage in stages(spec):
        if stage.name in (*DERIVED_STAGES, BASE):
            yield FieldError(f"{path}.name", f"`{stage.name}` is reserved: write `my-{stage.name}`, say")
        elif stage.name in seen:
            yield FieldError(f"{path}.name", f"`{stage.name}` is the name of {seen[stage.name]} too: rename one")
        seen.setdefault(stage.name, path)


def earlier_parent(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """``from`` names ``base`` or an earlier stage that leaves a model."""
    names = [stage.name for stage in spec.pipeline]
    for index, (path, stage) in enumerate(stages(spec)):
        if stage.from_ is not None and stage.from_ != BASE:
            wrong = _wrong_parent(spec, stage.from_, stage.name, names[:index], names)
            if wrong:
                yield FieldError(f"{path}.from", wrong)


def _wrong_parent(spec: FineTuneJobSpec, name: str, own: str, earlier: list[str], names: list[str]) -> str:
    if name in earlier:
        if spec.pipeline[earlier.index(name)].reward is not None:
            mend = f"read it in an rl stage as `rewards: [{{stage: {name}}}]`, and start from a model that answers"
            return f"`{name}` leaves a reward model, which scores answers and gives none: {mend}"
        if spec.pipeline[earlier.index(name)].quantize is None:
            return ""
        model = after(spec, name)
        mend = f"write `from: {model.adapter or model.weights}`" if model else "start from a stage before it"
        return f"`{name}` leaves GGUF files, which nothing can start from: {mend}"
    if name == own:
        return f"a stage cannot start from itself: name one of {', '.join([BASE, *earlier])}"
    if name in names:
        return f"`{name}` is written after this stage: move it before"
    if name in DERIVED_STAGES:
        return f"`{name}` leaves no model: name one of {', '.join([BASE, *earlier])}"
    return f"there is no stage `{name}`{suggest(name, [BASE, *earlier])}"


def adapter_to_merge(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A merge has an adapter before it, unless it names some."""
    for path, stage in stages(spec):
        model = before(spec, stage)
        if stage.merge is None or model is None or stage.merge.adapters:
            continue
        if model.adapter is not None:
            if kept := _unfolded(spec, model.adapter):
                yield FieldError(f"{path}.merge", f"{kept}: pull `{model.adapter}/adapter` as it is, {_USE_LORA}")
            continue
        if model.weights == BASE:
            words = "there is no adapter to merge: put an sft, preference or rl stage before it"
        elif kind(spec, model.weights) == "merge":
            words = f"`{model.weights}` has merged the adapter already: remove this stage"
        else:
            words = f"`{model.weights}` trains with method full, which leaves no adapter to merge: remove this stage"
        yield FieldError(f"{path}.merge", words)


def dequantized_after_qlora(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """The dequantized base is that of an adapter that qlora trained; of several, that of all of them."""
    for path, stage in stages(spec):
        model = before(spec, stage)
        if stage.merge is None or model is None or stage.merge.base != "dequantized":
            continue
        if stage.merge.adapters:
            known = set(adapter_stages(stage)) <= {other.name for other in spec.pipeline}
            if known and base_quantization(spec, stage.name) is None:
                words = "the adapters did not all train beside one and the same quantized base: leave it out"
                yield FieldError(f"{path}.merge.base", words)
        elif model.adapter is not None and base_quantization(spec, stage.name) is None:
            words = f"`{model.adapter}` trained on the original weights: leave it out, or write `method: qlora` there"
            yield FieldError(f"{path}.merge.base", words)


def whole_model_to_quantize(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A quantize stage starts from whole weights, not from an adapter."""
    for path, stage in stages(spec):
        model = before(spec, stage)
        if stage.quantize is not None and model is not None and model.adapter is not None:
            words = f"`{model.adapter}` leaves an adapter, and a GGUF needs whole weights: {MERGE_BETWEEN}"
            if kept := _unfolded(spec, model.adapter):
                words = f"{kept}, so there can be no GGUF: remove this stage, {_USE_LORA}"
            yield FieldError(f"{path}.quantize", words)


_USE_LORA = "or train with `method: lora`"


def _unfolded(spec: FineTuneJobSpec, name: str) -> str:
    """Why what the stage trained is no change of the weights; empty if it is."""
    training = training_block(find(spec, name))
    if training is None or training.method in FOLDED:
        return ""
    if training.method in PROMPTED:
        return f"`{name}` learned vectors that stand before every text ({training.method}), not weights"
    return f"`{name}` added networks of its own to the model ({training.method}), which no weight can take in"


def full_after_adapter(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Method full does not start from an adapter."""
    for path, stage, training in trainings(spec):
        model = before(spec, stage)
        if training.start == "merge":
            continue
        if training.method is Method.FULL and model is not None and model.adapter is not None:
            mend = f"{MERGE_BETWEEN}, or write `method: lora` to train the adapter on"
            if _unfolded(spec, model.adapter):
                mend = f"write `from: base`, {_USE_LORA} before it"
            yield FieldError(f"{path}.method", f"full cannot train the adapter that `{model.adapter}` leaves: {mend}")


def adapter_to_fold(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """With ``start: merge`` an adapter comes in, and one that can be folded into weights."""
    for path, stage, training in trainings(spec):
        model = before(spec, stage)
        if training.start != "merge" or model is None:
            continue
        if model.adapter is None:
            yield FieldError(f"{path}.start", "there is no adapter to fold in: leave it out")
        elif kept := _unfolded(spec, model.adapter):
            yield FieldError(f"{path}.start", f"{kept}: write `from: base`, {_USE_LORA} before it")


def nodes_to_train(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Only training is spread over nodes: nothing else exchanges anything while it runs."""
    for path, stage in stages(spec):
        if stage.resources.nodes > 1 and (stage.merge is not None or stage.quantize is not None):
            words = f"only stages that train run on several nodes, got {stage.resources.nodes}: leave it out"
            yield FieldError(f"{path}.resources.nodes", words)


def something_to_write(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A quantize stage writes a file; an importance matrix is for one."""
    for path, stage in stages(spec):
        if stage.quantize is None or stage.quantize.gguf:
            continue
        if not stage.quantize.bitsandbytes:
            yield FieldError(f"{path}.quantize.gguf", "is required: name a type, or write `bitsandbytes`")
        elif stage.quantize.imatrix is not None:
            yield FieldError(f"{path}.quantize.imatrix", "is for GGUF types, and there are none: leave it out")


def types_once(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A quantize stage names each type once."""
    for path, stage in stages(spec):
        for field in ("gguf", "bitsandbytes"):
            types = getattr(stage.quantize, field, [])
            for index, name in enumerate(types):
                if name in types[:index]:
                    yield FieldError(f"{path}.quantize.{field}[{index}]", f"{name} is listed twice: remove one")


def rows_for_imatrix(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """An importance matrix is measured on train rows."""
    for path, stage in stages(spec):
        block = stage.quantize
        if block is None or resolve_imatrix(block) is None or stage.data.train or spec.data.train:
            continue
        if block.imatrix is not None:
            yield FieldError(f"{path}.quantize.imatrix", "is measured on train rows: give some under spec.data.train")
        for index, name in enumerate(block.gguf):
            if name in IMATRIX_TYPES:
                words = f"{name} needs an importance matrix, which is measured on train rows"
                yield FieldError(f"{path}.quantize.gguf[{index}]", f"{words}: give some, or use another type")


def adapter_for_gguf(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """``loraGGUF`` writes the adapter that was merged, if the format can hold it: A and B, and nothing else."""
    for path, stage in stages(spec):
        model = before(spec, stage)
        if stage.quantize is None or not stage.quantize.lora_gguf or model is None or model.adapter is not None:
            continue
        where = f"{path}.quantize.loraGGUF"
        merged = find(spec, model.weights) if model.weights != BASE else None
        if merged is None or merged.merge is None:
            yield FieldError(where, "there is no merged adapter before it: leave it out, or train with lora and merge")
            continue
        names = [adapter.stage for adapter in merged_adapters(spec, merged.name)] if before(spec, merged) else []
        for adapter in (find(spec, name) for name in names if name in {other.name for other in spec.pipeline}):
            maker = origin(spec, adapter) or adapter
            yield from _unfit_for_gguf(where, maker)
        if merged.merge.adapters and not any(names):
            yield FieldError(where, f"all adapters of `{merged.name}` are from elsewhere: leave it out")


def _unfit_for_gguf(where: str, maker: Stage) -> Iterator[FieldError]:
    block = training_block(maker)
    lora = resolve_lora(block) if block else None
    if block is None or lora is None:
        if block is not None and block.method is Method.IA3:
            words = f"`{maker.name}` trains with ia3, whose factors an adapter in GGUF cannot hold"
            yield FieldError(where, f"{words}: leave one of the two out")
        return
    unfit = {
        "variant: dora": lora.variant == "dora",
        f"bias: {lora.bias}": lora.bias != "none",
        "modulesToSave": bool(lora.modules_to_save),
    }
    for name in (name for name, written in unfit.items() if written):
        words = f"`{maker.name}` trains with `{name}`, which an adapter in GGUF cannot hold"
        yield FieldError(where, f"{words}: leave one of the two out")
