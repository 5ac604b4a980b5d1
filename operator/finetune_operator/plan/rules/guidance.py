"""Advice: specs that run, but hardly as they were meant. Few, so that they are read."""

from collections.abc import Callable, Iterator
from itertools import pairwise

from finetune_api.defaults import resolve_beta, resolve_lora, resolve_qat, resolve_training, uses_imatrix
from finetune_api.pipeline import ModelRef, data_of, find, parent, training_block
from finetune_api.types import BASE, FineTuneJobSpec, GGUFType, Method, Preference, Reward, Rl, Stage
from finetune_api.validate import FieldError
from finetune_operator.plan.rules.walk import before, stages, trainings

_MANY_EPOCHS = 5
_LARGE_RANK = 128
_LARGE_SCALE = 16.0
"""B A is multiplied by so much at most, and at least by one part of so many. Usual is 2, rank-stabilized up to 8."""
_QUERY_AND_VALUE = {"q_proj", "v_proj"}
"""What the first paper on lora adapted, and many YAMLs since."""
_COARSE = frozenset({GGUFType.Q3_K_L, GGUFType.Q3_K_M, GGUFType.Q3_K_S, GGUFType.IQ3_M, GGUFType.IQ3_S, GGUFType.Q2_K})
"""Below 4 bits, and still made without an importance matrix."""
_NATIVE = frozenset({GGUFType.TQ2_0, GGUFType.TQ1_0, GGUFType.Q2_0, GGUFType.Q1_0})
"""For models whose weights have two or three values from the beginning."""
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


def scale(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Neither so large that the first steps overshoot nor so small that nothing is learned."""
    for path, _, block in trainings(spec):
        lora = resolve_lora(block)
        if block.lora is None or lora is None or lora.alpha is None:
            continue
        root, by = (lora.r**0.5, "sqrt(r)") if lora.rank_stabilized else (lora.r, "r")
        if not 1 / _LARGE_SCALE <= lora.alpha / root <= _LARGE_SCALE:
            words = f"multiplies the adapter by alpha / {by} = {lora.alpha / root:.3g}, where 1 to 8 is usual"
            yield FieldError(f"{path}.lora.alpha", f"{lora.alpha:g} {words}: write {2 * root:.0f}")


def targets(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """All linear layers, at a lower rank if need be (arXiv:2305.14314, section 4)."""
    for path, _, block in trainings(spec):
        if block.lora is not None and _QUERY_AND_VALUE.issuperset(block.lora.target_modules):
            words = "at the same number of parameters all linear layers learn more than these alone"
            yield FieldError(f"{path}.lora.targetModules", f"{words}: write [all-linear] and a lower r")


def dropout(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Where a model is compared with itself, dropout is off."""
    for path, _, block in trainings(spec):
        if isinstance(block, Preference | Rl) and block.lora is not None and block.lora.dropout:
            words = "is not applied: it would be taken for a change against the reference"
            yield FieldError(f"{path}.lora.dropout", f"{words}; leave it out")


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


def unsloth_without_gpu(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Its kernels are a GPU's."""
    for path, stage, block in trainings(spec):
        if block.training.backend == "unsloth" and stage.resources.gpus == 0:
            words = "without a GPU transformers trains in its place: write `resources: {gpus: 1}`, or leave it out"
            yield FieldError(f"{path}.training.backend", words)


def few_bits(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Of so few bits the importance matrix makes the most; and not every model can live with them."""
    trained = {kind for _, _, block in trainings(spec) if (kind := resolve_qat(block)) is not None}
    for path, stage in stages(spec):
        weighed = stage.quantize is not None and stage.quantize.imatrix is not None
        for index, kind in enumerate(stage.quantize.gguf if stage.quantize is not None else []):
            where = f"{path}.quantize.gguf[{index}]"
            if kind in _NATIVE:
                words = "is for models trained with two or three values a weight, others answer nonsense"
                yield FieldError(where, f"{kind} {words}: write IQ2_M or Q2_K")
            elif kind in _COARSE - trained and not weighed and data_of(spec, stage.name).train:
                words = f"{kind} loses less with an importance matrix of your train rows"
                yield FieldError(where, f"{words}: write `imatrix: {{}}`")


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
    scale,
    targets,
    dropout,
    preference_after_sft,
    beta,
    qlora_without_gpu,
    unsloth_without_gpu,
    few_bits,
    qat_for_its_file,
    qat_to_the_end,
    after_quantize,
]
