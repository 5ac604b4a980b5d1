"""What the API server itself checks about a spec beyond types and bounds, in CEL.

Few: exactly one block in a stage, a method's own blocks, names, ``from``, and that a job is not changed under its own
results. All else is in ``plan/rules`` of the operator, which says all of these but the last too.
"""

from collections.abc import Iterator
from typing import Any, get_args

from finetune_api.crd_schema import VALIDATIONS, Schema
from finetune_api.pipeline import Block
from finetune_api.types import BASE, DERIVED_STAGES, Model, Preference, Stage, TrainingBlock

MUTABLE = ("suspend", "ttlSecondsAfterFinished", "pendingDeadlineSeconds")
"""Fields of the spec that may change while a job exists."""
OWN_BLOCKS = {
    "lora": ("lora", "qlora"),
    "quantization": ("qlora",),
    "prefixTuning": ("prefixTuning",),
    "promptTuning": ("promptTuning",),
    "ia3": ("ia3",),
    "bottleneck": ("bottleneck",),
}
"""Blocks of a training block to the methods that read them."""
QAT_METHODS = ("lora", "full")
"""Methods that ``sft.qat`` is for."""
OWN_LOSS = {"simpo": ("simpo", ""), "kto": ("kto", ""), "labelSmoothing": ("dpo", " || self.labelSmoothing == 0.0")}
"""Fields of ``preference`` to the loss that reads them, and what else lets them stand."""
OWN_COMBINATION = {"density": ("ties", "dareTies"), "rank": ("svd",)}
"""Fields of ``merge`` to the combinations that read them."""

_Rule = dict[str, Any]


def blocks(kind: type = Model) -> list[str]:
    """Names of a stage's blocks of that kind, in the order of the type."""
    wanted = {block for block in get_args(Block) if issubclass(block, kind)}
    return [name for name, field in Stage.model_fields.items() if wanted.intersection(get_args(field.annotation))]


def add_rules(spec: Schema) -> None:
    """Put every rule into the schema of ``spec``, where it belongs; KeyError if a place is not there."""
    stages = spec["properties"]["pipeline"]
    stage = stages["items"]
    _add(spec, _immutable(spec))
    reinforced = stage["properties"]["rl"]
    rewards = reinforced["properties"]["rewards"]
    merge = stage["properties"]["merge"]
    adapters = merge["properties"]["adapters"]
    _add(
        stages,
        [
            _earlier_parent(stages["maxItems"]),
            _earlier_reward(stages["maxItems"], rewards["maxItems"]),
            _earlier_adapter(stages["maxItems"], adapters["maxItems"]),
        ],
    )
    _add(stage["properties"]["name"], [_free_name()])
    _add(stage, [_one_block()])
    _add(stage["properties"]["preference"], _own_losses())
    _add(reinforced, [_own_algorithm()])
    _add(rewards["items"], [_one_reward()])
    _add(adapters["items"], [_one_adapter(), _weighty_adapter()])
    _add(merge, _own_combination())
    _add(stage["properties"]["sft"], [_own_methods("qat", QAT_METHODS)])
    _add(stage["properties"]["quantize"], [_something_to_write()])
    for name in blocks(TrainingBlock):
        _add(stage["properties"][name], _own_blocks(stage["properties"][name]))


def _add(schema: Schema, rules: list[_Rule]) -> None:
    schema.setdefault(VALIDATIONS, []).extend(rules)


def _immutable(spec: Schema) -> list[_Rule]:
    def same(name: str) -> Iterator[str]:
        # `self == oldSelf` on the field itself would let it be added and removed.
        if name not in spec["required"]:
            yield f"has(self.{name}) == has(oldSelf.{name})"
        equal = f"self.{name} == oldSelf.{name}"
        yield equal if name in spec["required"] else f"(!has(self.{name}) || {equal})"
        if name == "pipeline":  # a map by name to the server: equality does not see the order
            yield "self.pipeline.map(s, s.name) == oldSelf.pipeline.map(s, s.name)"

    return [
        _forbidden(name, " && ".join(same(name)), "is immutable, for results depend on it: make a job of another name")
        for name in spec["properties"]
        if name not in MUTABLE
    ]


def _forbidden(name: str, unless: str, message: str) -> _Rule:
    return {"rule": unless, "fieldPath": f".{name}", "reason": "FieldValueForbidden", "message": message}


def _earlier_parent(most: int) -> _Rule:
    # A rule of the list alone sees the other stages; which of them is wrong can only be said in words, and of several
    # the first. The numbers are written out since `string(i)`, like `join`, is reckoned as if it were text without end.
    wrong = f"has(s.from) && s.from != '{BASE}' && !self.exists(j, t, j < i && t.name == s.from)"
    numbers = f"[{', '.join(repr(str(n)) for n in range(most))}]"
    words = f"'spec.pipeline[' + {numbers}[i] + '].from: there is no earlier stage `' + s.from + '`'"
    return {
        "rule": f"!self.exists(i, s, {wrong})",
        "message": f"from names {BASE} or an earlier stage",
        "messageExpression": f"self.transformList(i, s, {wrong}, {words})[0]",
    }


def _earlier_reward(most: int, most_rewards: int) -> _Rule:
    message = "rewards names earlier reward stages"
    return _earlier("rl.rewards", "has(t.reward)", "with a reward block", message, most, most_rewards)


def _earlier(field: str, fit: str, lack: str, message: str, most: int, most_named: int) -> _Rule:
    """What a stage lists in ``field`` names earlier stages that are fit: ``fit``, of a stage ``t``."""
    wrong = f"has(n.stage) && !self.exists(j, t, j < i && ({fit}) && t.name == n.stage)"
    stages, named = (f"[{', '.join(repr(str(n)) for n in range(count))}]" for count in (most, most_named))
    place = f"'spec.pipeline[' + {stages}[i] + '].{field}[' + {named}[k] + '].stage: '"
    words = f"{place} + 'there is no earlier stage `' + n.stage + '` {lack}'"
    first = f"s.{field}.transformList(k, n, {wrong}, {words})[0]"
    block = field.partition(".")[0]
    concerned = f"has(s.{block}) && has(s.{field}) && s.{field}.exists(n, {wrong})"
    return {
        "rule": f"!self.exists(i, s, {concerned})",
        "message": message,
        "messageExpression": f"self.transformList(i, s, {concerned}, {first})[0]",
    }


def _one_reward() -> _Rule:
    return {"rule": "has(self.stage) != has(self.builtin)", "message": "needs exactly one of stage, builtin"}


def _earlier_adapter(most: int, most_adapters: int) -> _Rule:
    training = " || ".join(f"has(t.{name})" for name in blocks(TrainingBlock) if name != "reward")
    message = "adapters names earlier stages that train one"
    return _earlier("merge.adapters", training, "that trains an adapter", message, most, most_adapters)


def _one_adapter() -> _Rule:
    return {"rule": "has(self.stage) != has(self.uri)", "message": "needs exactly one of stage, uri"}


def _weighty_adapter() -> _Rule:
    return {
        "rule": "!has(self.weight) || self.weight != 0.0",
        "fieldPath": ".weight",
        "message": "0 leaves nothing of the adapter: remove the entry",
    }


def _own_combination() -> list[_Rule]:
    rules = [
        _forbidden(
            "combination",
            "has(self.adapters) || !has(self.combination) || self.combination == 'linear'",
            "is for adapters that are named: name them under adapters, or remove it",
        )
    ]
    for name, combinations in OWN_COMBINATION.items():
        allowed = f"has(self.combination) && self.combination in [{', '.join(repr(one) for one in combinations)}]"
        rules.append(
            _forbidden(
                name,
                f"!has(self.{name}) || {allowed}",
                f"is only for combination {' or '.join(combinations)}: remove it",
            )
        )
    return rules


def _own_algorithm() -> _Rule:
    return _forbidden(
        "ppo",
        "!has(self.ppo) || !has(self.algorithm) || self.algorithm == 'ppo'",
        "is only for algorithm ppo: remove it",
    )


def _something_to_write() -> _Rule:
    written = " || ".join(f"(has(self.{name}) && self.{name}.size() > 0)" for name in ("gguf", "bitsandbytes"))
    return {"rule": written, "fieldPath": ".gguf", "message": "is required: name a type, or write `bitsandbytes`"}


def _free_name() -> _Rule:
    reserved = (*DERIVED_STAGES, BASE)
    return {
        "rule": f"!(self in [{', '.join(repr(name) for name in reserved)}])",
        "message": f"{', '.join(reserved)} are reserved: write `my-{DERIVED_STAGES[0]}`, say",
    }


def _one_block() -> _Rule:
    written = ", ".join(f"has(self.{name})" for name in blocks())
    return {
        "rule": f"[{written}].filter(written, written).size() == 1",
        "message": f"needs exactly one of {', '.join(blocks())}; a block without fields is written `merge: {{}}`",
    }


def _own_losses() -> list[_Rule]:
    default = Preference.model_fields["loss"].default
    rules = []
    for name, (loss, written) in OWN_LOSS.items():
        is_loss = f"{'!has(self.loss) ||' if loss == default else 'has(self.loss) &&'} self.loss == '{loss}'"
        rules.append(
            _forbidden(
                name,
                f"!has(self.{name}){written} || {is_loss}",
                f"is only for loss {loss}: remove it, or write `loss: {loss}`",
            )
        )
    return rules


def _own_blocks(block: Schema) -> list[_Rule]:
    if unknown := [name for name in OWN_BLOCKS if name not in block["properties"]]:
        raise KeyError(unknown[0])
    return [_own_methods(name, methods) for name, methods in OWN_BLOCKS.items()]


def _own_methods(name: str, methods: tuple[str, ...]) -> _Rule:
    default = TrainingBlock.model_fields["method"].default
    allowed = f"self.method in [{', '.join(repr(method) for method in methods)}]"
    read = f"!has(self.method) || {allowed}" if default in methods else f"has(self.method) && {allowed}"
    return _forbidden(
        name,
        f"!has(self.{name}) || {read}",
        f"is only for method {' or '.join(methods)}: remove it, or write `method: {methods[0]}`",
    )
