"""Rules on the training blocks."""

from collections.abc import Iterator

from finetune_api.defaults import as_saved, resolve_lora, shares_base
from finetune_api.pipeline import training_block
from finetune_api.types import FineTuneJobSpec, Lora, Method, Sft
from finetune_api.validate import FieldError
from finetune_operator.plan.rules.walk import MERGE_BETWEEN, origin, trainings

_EMBEDDINGS = ("lm_head", "embed_tokens")


def own_block_only(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """``lora`` and ``quantization`` stand only with a method that reads them."""
    for path, _, training in trainings(spec):
        if training.lora is not None and training.method is Method.FULL:
            mend = "remove it, or write `method: lora`"
            yield FieldError(f"{path}.lora", f"method full trains all weights and has no adapter: {mend}")
        if training.quantization is not None and training.method is not Method.QLORA:
            mend = "remove it, or write `method: qlora`"
            yield FieldError(f"{path}.quantization", f"is only for method qlora, got {training.method}: {mend}")


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
    """GPUs share what lora leaves frozen, and nothing else."""
    for path, _, block in trainings(spec):
        if block.training.distributed == "fsdp" and block.method is not Method.LORA:
            mend = "write `method: lora`, or ddp"
            yield FieldError(f"{path}.training.distributed", f"fsdp is for method lora, got {block.method}: {mend}")


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
        if training.method is Method.LORA and training.training.distributed == "fsdp" and not shares_base(training):
            words = "fsdp shares the frozen weights, which variant, bias or modulesToSave of `lora` need whole"
            yield FieldError(f"{path}.training.distributed", f"{words}: write ddp, or leave them out")


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
