"""Rules on the training blocks."""

from collections.abc import Iterator

from finetune_api.crd_rules import OWN_BLOCKS, QAT_METHODS
from finetune_api.defaults import (
    FOLDED,
    LOW_RANK,
    PROMPTED,
    as_saved,
    resolve_lora,
    resolve_qat,
    resolve_quantization,
    resolve_training,
    shares_model,
)
from finetune_api.pipeline import training_block
from finetune_api.types import IA3, Bottleneck, FineTuneJobSpec, Lora, Method, Preference, Reward, Rl, Sft
from finetune_api.validate import FieldError
from finetune_operator.plan.rules.walk import MERGE_BETWEEN, origin, trainings

_EMBEDDINGS = ("lm_head", "embed_tokens")


def own_block_only(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A method's block stands only with a method that reads it."""
    for path, _, training in trainings(spec):
        written = {field.alias: getattr(training, name) for name, field in type(training).model_fields.items()}
        for name, methods in OWN_BLOCKS.items():
            if written[name] is not None and training.method not in methods:
                mend = f"remove it, or write `method: {methods[0]}`"
                words = f"is only for method {' or '.join(methods)}, got {training.method}: {mend}"
                yield FieldError(f"{path}.{name}", words)


def trained_on(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """What comes in is trained on by a method that can: learned vectors by none, an adapter by its own."""
    for path, stage, training in trainings(spec):
        maker = origin(spec, stage)
        first = training_block(maker) if maker else None
        if maker is None or first is None or training.method is Method.FULL:
            continue
        if first.method in PROMPTED:
            words = f"the vectors that `{maker.name}` learned before every text cannot be trained on"
            yield FieldError(f"{path}.start", f"{words}: write `from: base`, or `method: lora` in `{maker.name}`")
        elif training.method is not first.method and not {training.method, first.method} <= {*LOW_RANK}:
            mend = f"write `method: {first.method}`, or {MERGE_BETWEEN if first.method in FOLDED else '`from: base`'}"
            words = f"{training.method} cannot train the adapter that `{maker.name}` leaves"
            yield FieldError(f"{path}.method", f"{words}: {mend}")
        elif training.bottleneck is not None and training.bottleneck != (first.bottleneck or Bottleneck()):
            words = f"`{maker.name}` made the adapters that are trained on, and otherwise: leave `bottleneck` out here"
            yield FieldError(f"{path}.bottleneck", words)
        elif training.ia3 is not None and training.ia3 != (first.ia3 or IA3()):
            words = f"`{maker.name}` made the factors that are trained on, and of other layers: leave `ia3` out here"
            yield FieldError(f"{path}.ia3", words)


def scaled_once(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Inputs are scaled of layers that are scaled, each once; neither end of the model is."""
    for path, _, training in trainings(spec):
        ia3 = training.ia3 or IA3()
        for field, names in (("targetModules", ia3.target_modules), ("feedforwardModules", ia3.feedforward_modules)):
            for index, name in enumerate(names):
                where = f"{path}.ia3.{field}[{index}]"
                if name in names[:index]:
                    yield FieldError(where, f"{name} is listed twice: remove one")
                elif name.rsplit(".", 1)[-1] in (*_EMBEDDINGS, "all-linear"):
                    yield FieldError(where, f"{name} takes no factors: name linear layers, as in [k_proj, v_proj]")
                elif field == "feedforwardModules" and name not in ia3.target_modules:
                    yield FieldError(where, f"{name} is not in targetModules: name it there too")


def own_row_for_each(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A text with learned vectors before it has a row of its own; a prefix is a cache, which recomputing has not."""
    for path, _, training in trainings(spec):
        if training.method in PROMPTED and training.training.packing is True:
            words = f"{training.method} puts vectors before every text, which then needs a row of its own"
            yield FieldError(f"{path}.training.packing", f"{words}: write auto")
        if training.method is Method.PREFIX_TUNING and training.training.gradient_checkpointing is True:
            words = "the prefix is given to the layers as a cache, which recomputing does not have"
            yield FieldError(f"{path}.training.gradientCheckpointing", f"{words}: write auto")


def loadable_reward_model(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A reward model is one that transformers and PEFT load as a classifier."""
    for path, _, training in trainings(spec):
        if isinstance(training, Reward) and (training.method in PROMPTED or training.method is Method.BOTTLENECK):
            words = f"{training.method} leaves no reward model that transformers could load"
            yield FieldError(f"{path}.method", f"{words}: write lora, qlora or full")


def placed_once(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """One bottleneck adapter a place."""
    for path, _, training in trainings(spec):
        placement = training.bottleneck.placement if training.bottleneck else []
        if len(set(placement)) < len(placement):
            yield FieldError(f"{path}.bottleneck.placement[1]", f"{placement[1]} is listed twice: remove one")


def continued_adapter(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """An adapter that is trained on keeps its shape: ``lora`` is left out, or says the same. One with biases is not."""
    for path, stage, training in trainings(spec):
        maker = origin(spec, stage)
        first = training_block(maker) if maker else None
        made, written = resolve_lora(first) if first else None, resolve_lora(training)
        if maker is None or made is None or written is None:
            continue
        if made.bias != "none":
            words = f"`{maker.name}` trains biases too, and such an adapter cannot be trained on"
            yield FieldError(f"{path}.start", f"{words}: {MERGE_BETWEEN}")
            continue
        if training.lora is None:
            continue
        made = as_saved(made)
        for name, field in Lora.model_fields.items():
            old, new = getattr(made, name), getattr(written, name)
            if old != new:
                words = f"`{maker.name}` made the adapter that is trained on with {_written(old)}, got {_written(new)}"
                mend = f"leave `lora` out here, or {MERGE_BETWEEN}"
                yield FieldError(f"{path}.lora.{field.alias}", f"{words}: {mend}")


def _written(value: object) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)


def shared_model(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """GPUs share what lora leaves frozen, or all of full with its optimizer, which then is AdamW."""
    for path, _, block in trainings(spec):
        if block.training.distributed != "fsdp":
            continue
        if block.method not in (Method.LORA, Method.FULL):
            words = f"fsdp is for method lora or full, got {block.method}"
            yield FieldError(f"{path}.training.distributed", f"{words}: write `method: lora`, or ddp")
        elif block.method is Method.FULL and (optimizer := resolve_training(block).optimizer) != "adamw":
            words = f"{optimizer} packs numbers in blocks, which processes cannot share: write adamw, or ddp above"
            yield FieldError(f"{path}.training.optimizer", words)


def target_modules(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """LoRA targets linear layers other than the output head, each once; ``all-linear`` stands alone."""
    for path, _, training in trainings(spec):
        modules = training.lora.target_modules if training.lora else []
        where = f"{path}.lora.targetModules"
        if "all-linear" in modules and set(modules) != {"all-linear"}:
            yield FieldError(where, "all-linear covers every linear layer: leave the other names out")
        for index, name in enumerate(modules):
            if name in modules[:index]:
                yield FieldError(f"{where}[{index}]", f"{name} is listed twice: remove one")
            elif name.rsplit(".", 1)[-1] in _EMBEDDINGS:
                # Trained tied weights drift apart, and trainers refuse the head even untied (reference/practice.md 1).
                mend = "leave it out, or train it whole with `modulesToSave: [embed_tokens, lm_head]`"
                yield FieldError(f"{where}[{index}]", f"{name} takes no adapter: {mend}")


def saved_modules(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A module is trained whole or by an adapter, once."""
    for path, _, training in trainings(spec):
        lora = training.lora or Lora()
        for index, name in enumerate(lora.modules_to_save):
            where = f"{path}.lora.modulesToSave[{index}]"
            if name in lora.modules_to_save[:index]:
                yield FieldError(where, f"{name} is listed twice: remove one")
            elif name == "all-linear":
                yield FieldError(where, "all-linear is for targetModules: name modules, or write `method: full`")
            elif name in lora.target_modules:
                yield FieldError(where, f"{name} is in targetModules too: remove it from one of them")


def variant_on_base(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """What is made of the base's weights, or trained in them, needs them whole and unquantized."""
    for path, _, training in trainings(spec):
        lora = training.lora or Lora()
        if training.method is Method.QLORA and lora.variant == "pissa":
            words = "pissa takes the principal components of 16-bit weights"
            yield FieldError(f"{path}.lora.variant", f"{words}: write `method: lora`, or another variant")
        if training.method is Method.QLORA and lora.bias != "none":
            words = "biases of quantized layers are not trained"
            yield FieldError(f"{path}.lora.bias", f"{words}: write `method: lora`, or none")
        if isinstance(training, Reward | Rl) or resolve_qat(training):  # which share nothing, whatever the adapter
            continue
        if training.method is Method.LORA and training.training.distributed == "fsdp" and not shares_model(training):
            words = "fsdp shares the frozen weights, which variant, bias or modulesToSave of `lora` need whole"
            yield FieldError(f"{path}.training.distributed", f"{words}: write ddp, or leave them out")


def rounded_as_stored(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """What qat rounds is what the file will hold: W + s B A, or the trained weights, whole in every process."""
    for path, stage, training in trainings(spec):
        if not isinstance(training, Sft) or training.qat is None:
            continue
        if training.method not in QAT_METHODS:
            mend = f"remove it, or write `method: {QAT_METHODS[0]}`"
            words = f"is only for method {' or '.join(QAT_METHODS)}, got {training.method}: {mend}"
            yield FieldError(f"{path}.qat", words)
            continue
        if training.training.distributed == "fsdp":
            words = "qat rounds whole weights, which fsdp shares"
            yield FieldError(f"{path}.training.distributed", f"{words}: write ddp, or leave qat out")
        maker = origin(spec, stage)
        first = training_block(maker) if maker else None
        lora = (resolve_lora(first) if first else None) or resolve_lora(training)
        if lora is None:
            continue
        lora = as_saved(lora) if maker else lora
        unfit = {"variant": lora.variant != "lora", "dropout": lora.dropout > 0, "modulesToSave": lora.modules_to_save}
        for name in (name for name, written in unfit.items() if written):
            words = f"qat rounds what base and adapter make together, which is not done with `{name}`"
            if maker is not None:
                mend = f"leave qat out, or {MERGE_BETWEEN}"
                yield FieldError(f"{path}.qat", f"{words}, as `{maker.name}` made the adapter: {mend}")
            else:
                yield FieldError(f"{path}.lora.{name}", f"{words}: leave one of the two out")


def within_unsloth(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Unsloth's kernels compute plain LoRA on weights of 16 or 4 bits, all of them on one GPU."""
    for path, stage, block in trainings(spec):
        if block.training.backend != "unsloth":
            continue
        where, fits = f"{path}.training.backend", "unsloth is for sft and preference by lora or qlora, got"
        if isinstance(block, Reward | Rl) or block.method not in LOW_RANK:
            kind = f"method {block.method}" if isinstance(block, Sft | Preference) else path.rsplit(".", 1)[-1]
            yield FieldError(where, f"{fits} {kind}: write auto")
            continue
        maker = origin(spec, stage)
        first = training_block(maker) if maker else None
        made = resolve_lora(first) if first else None
        lora, quantization = as_saved(made) if made else resolve_lora(block) or Lora(), resolve_quantization(block)
        unfit = {
            "resources": stage.resources.gpus > 1 or stage.resources.nodes > 1,
            "distributed: fsdp": block.training.distributed == "fsdp",
            "precision: fp32": block.training.precision == "fp32",
            "quantization.type: int8": quantization is not None and quantization.type == "int8",
            "qat": resolve_qat(block) is not None,
            f"lora.variant: {lora.variant}": lora.variant != "lora",
            f"lora.bias: {lora.bias}": lora.bias != "none",
            "lora.modulesToSave": bool(lora.modules_to_save),
            "model.trustRemoteCode": spec.model.trust_remote_code,
        }
        words = {"resources": "one GPU of one node", "model.trustRemoteCode": "models without code of their own"}
        for name in (name for name, written in unfit.items() if written):
            wants = f"unsloth is for {words[name]}" if name in words else f"unsloth is not for `{name}`"
            yield FieldError(where, f"{wants}: write auto, or change that")


def noise_free_preference(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """NEFTune is for sft: noise on the policy alone would part it from its reference, and on a score it is noise."""
    for path, _, block in trainings(spec):
        if not isinstance(block, Sft) and block.training.neftune_noise_alpha is not None:
            yield FieldError(f"{path}.training.neftuneNoiseAlpha", "is for sft: leave it out here")


def batch_split(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A batch divides into equal shares of the processes, one for each GPU, and a share into micro-batches."""
    for path, stage, block in trainings(spec):
        gpus, nodes = stage.resources.gpus, stage.resources.nodes
        workers, batch, micro = max(1, gpus) * nodes, block.training.batch_size, block.training.micro_batch_size
        share = batch // workers
        if batch % workers:
            mend = " or ".join(str(n) for n in (share * workers, (share + 1) * workers) if n)
            devices = f"{workers} GPUs" if gpus else f"{workers} nodes"
            words = f"must be a multiple of the stage's {devices}, which take equal shares, got {batch}"
            yield FieldError(f"{path}.training.batchSize", f"{words}: write {mend}")
        elif micro != "auto" and share % micro:
            near = max(n for n in range(1, share + 1) if share % n == 0 and n <= micro)
            words = f"must divide the {share} examples that one device takes in a step, got {micro}"
            yield FieldError(f"{path}.training.microBatchSize", f"{words}: write {near}, or auto")


def resume_before_the_end(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A run is not resumed at or after its last step."""
    for path, _, block in trainings(spec):
        step, last = block.checkpoint.resume_from, block.training.max_steps
        if isinstance(step, int) and last is not None and step >= last:
            words = f"must be less than training.maxSteps, {last}, got {step}: nothing would be left to train"
            yield FieldError(f"{path}.checkpoint.resumeFrom", words)
