"""Advice: specs that run, but hardly as they were meant. Few, so that they are read."""

from collections.abc import Callable, Iterator
from itertools import pairwise

from finetune_api.defaults import resolve_beta, resolve_qat, resolve_training, uses_imatrix
from finetune_api.pipeline import ModelRef, find, parent, training_block
from finetune_api.types import BASE, FineTuneJobSpec, Method, Preference, Reward, Stage
from finetune_api.validate import FieldError
from finetune_operator.plan.rules.walk import before, stages, trainings

_MANY_EPOCHS = 5
_LARGE_RANK = 128
_FAR = 10.0
"""So many times the default learning rate, either way, is a slip more often than a choice."""


def learning_rate(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Within a factor of ten of the default."""
    for path, _, block in trainings(spec):
        written = block.training.learning_rate
        plain = block.model_copy(update={"training": block.training.model_copy(update={"learning_rate": None})})
        usual = resolve_training(plain).learning_rate
        if written is None or usual is None or 1 / _FAR <= round(written / usual, 9) <= _FAR:
            continue
        risk = "training may diverge" if written > usual else "little may be learned"
        where = f"{path}.training.learningRate"
        yield FieldError(where, f"{written:g} is far from the usual {usual:g} for method {block.method}: {risk}")


def epochs(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Not so often over the same rows that they are learned by heart."""
    for path, _, block in trainings(spec):
        many = (block.training.epochs or 0) > _MANY_EPOCHS and block.training.max_steps is None
        if many and block.validation.early_stopping is None:
            mend = "`validation: {earlyStopping: {}}` stops it in time"
            words = f"{block.training.epochs:g} passes over the same rows tend to learn them by heart"
            yield FieldError(f"{path}.training.epochs", f"{words}: {mend}")


def rank(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A rank that earns its memory."""
    for path, _, block in trainings(spec):
        if block.lora is not None and block.lora.r > _LARGE_RANK:
            yield FieldError(f"{path}.lora.r", f"{block.lora.r} costs memory and seldom helps: 8 to 64 is usual")


def preference_after_sft(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Preferences are learned by a model that already gives such answers; orpo teaches the answers too."""
    for path, stage in stages(spec):
        model = before(spec, stage)
        after_sft = stage.preference is not None and stage.preference.loss != "orpo"
        if after_sft and model == ModelRef(BASE):
            words = "starts from the base model: an sft stage before it usually helps more than the preferences"
            yield FieldError(f"{path}.preference", words)


def beta(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Within a factor of ten of the loss's default: the losses mean different things by it."""
    for path, _, block in trainings(spec):
        if not isinstance(block, Preference) or block.beta is None:
            continue
        usual = resolve_beta(block.model_copy(update={"beta": None}))
        if not 1 / _FAR <= round(block.beta / usual, 9) <= _FAR:
            yield FieldError(f"{path}.beta", f"{block.beta:g} is far from the usual {usual:g} for loss {block.loss}")


def qlora_without_gpu(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """4-bit weights save GPU memory; a CPU only pays for them."""
    for path, stage, block in trainings(spec):
        if block.method is Method.QLORA and stage.resources.gpus == 0:
            mend = "write `resources: {gpus: 1}`, or `method: lora`"
            yield FieldError(f"{path}.method", f"qlora without a GPU is slower than lora: {mend}")


def qat_for_its_file(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """What is trained for a type becomes a file of it, rounded as in training."""
    for path, stage, block in trainings(spec):
        kind = resolve_qat(block)
        later = [(where, one.quantize) for where, one in stages(spec) if stage.name in _ancestors(spec, one)]
        files = [(where, quantize) for where, quantize in later if quantize is not None and kind in quantize.gguf]
        if kind is not None and not files:
            yield FieldError(f"{path}.qat.type", f"no quantize stage after it writes {kind}: name it in one's gguf")
        for where, quantize in files:
            if kind is not None and uses_imatrix(quantize, kind):
                words = f"rounds {kind} otherwise than `{stage.name}` was trained for: leave it out"
                yield FieldError(f"{where}.quantize.imatrix", words)


def qat_to_the_end(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Nothing is learned without qat after it."""
    for path, stage, block in trainings(spec):
        earlier = [find(spec, name) for name in _ancestors(spec, stage)]
        trained = next(((one.name, resolve_qat(b)) for one in earlier if (b := training_block(one)) is not None), None)
        if trained is not None and trained[1] is not None and not resolve_qat(block) and not isinstance(block, Reward):
            words = f"trains on without qat what `{trained[0]}` trained for {trained[1]}, which undoes some of that"
            yield FieldError(path, f"{words}: put a last sft stage with qat behind it")


def _ancestors(spec: FineTuneJobSpec, stage: Stage) -> list[str]:
    """The stages that it starts from, the nearest first; none where the pipeline is broken."""
    found: list[str] = []
    if before(spec, stage) is not None:
        while (name := parent(spec, found[-1] if found else stage.name)) != BASE:
            found.append(name)
    return found


def after_quantize(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Whoever goes on after GGUFs says from which model, since it is not from them."""
    for (_, previous), (path, stage) in pairwise(stages(spec)):
        model = before(spec, stage)
        if previous.quantize is None or stage.quantize is not None or stage.from_ is not None or model is None:
            continue
        start = model.adapter or model.weights
        words = f"`{previous.name}` leaves GGUF files, so this stage starts from `{start}`: write `from: {start}`"
        yield FieldError(f"{path}.from", words)


ADVICE: list[Callable[[FineTuneJobSpec], Iterator[FieldError]]] = [
    learning_rate,
    epochs,
    rank,
    preference_after_sft,
    beta,
    qlora_without_gpu,
    qat_for_its_file,
    qat_to_the_end,
    after_quantize,
]
