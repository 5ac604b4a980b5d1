"""Rules on the tokens that a job adds to its model."""

from collections.abc import Iterator

from finetune_api.defaults import LOW_RANK, resolve_lora
from finetune_api.pipeline import ModelRef
from finetune_api.types import BASE, FineTuneJobSpec, Method, Reward
from finetune_api.validate import FieldError
from finetune_operator.plan.rules.walk import before, trainings

_FIELD = "spec.model.addTokens"
_WHOLE = "[embed_tokens, lm_head]"


def different_tokens(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Each stands once."""
    tokens = spec.model.add_tokens
    for index, token in enumerate(tokens):
        if token in tokens[:index]:
            yield FieldError(f"{_FIELD}[{index}]", f"{token!r} is listed twice: remove one")


def learned_tokens(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """What trains first trains embedding and head whole: a token that nothing learns says nothing. A reward model has
    no head, and may start from the model that has learned them.
    """
    for path, stage, training in trainings(spec):
        first = before(spec, stage) == ModelRef(BASE) and not isinstance(training, Reward)
        if not spec.model.add_tokens or not first or training.method is Method.FULL:
            continue
        words = f"the tokens of {_FIELD} are learned with embedding and head alone"
        if training.method not in LOW_RANK:
            mend = f"write `method: lora` with `modulesToSave: {_WHOLE}`, or `method: full`"
            yield FieldError(f"{path}.method", f"{words}: {mend}")
            continue
        lora = resolve_lora(training)
        saved = {name.rpartition(".")[2] for name in lora.modules_to_save} if lora else set()
        if not {"embed_tokens", "lm_head"} <= saved:
            yield FieldError(f"{path}.lora.modulesToSave", f"{words}: write {_WHOLE}, or `method: full`")
