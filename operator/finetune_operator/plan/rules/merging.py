"""Rules on merges of adapters that are named."""

import re
from collections.abc import Iterator

from finetune_api.crd_rules import OWN_COMBINATION
from finetune_api.defaults import FOLDED, resolve_lora
from finetune_api.pipeline import adapter_stages, find, named_adapters, training_block
from finetune_api.types import BASE, AdapterSource, FineTuneJobSpec, Merge, Method, Stage, TrainingBlock
from finetune_api.validate import FieldError, suggest
from finetune_operator.plan.rules.walk import after, before, origin, stages


def earlier_adapters(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """``adapters`` names earlier stages that leave an adapter of a kind that weights can take in."""
    for index, (path, stage) in enumerate(stages(spec)):
        made = [earlier.name for earlier in spec.pipeline[:index] if _leaves_adapter(earlier)]
        names = [other.name for other in spec.pipeline]
        for where, adapter in _named(path, stage):
            if adapter.stage is not None and adapter.stage not in made:
                yield FieldError(f"{where}.stage", _wrong_stage(spec, adapter.stage, made, names, names[:index]))


def _leaves_adapter(stage: Stage) -> bool:
    training = training_block(stage)
    return training is not None and stage.reward is None and training.method in FOLDED


def _wrong_stage(spec: FineTuneJobSpec, name: str, made: list[str], names: list[str], earlier: list[str]) -> str:
    mend = f"name one of {', '.join(made)}" if made else "train with `method: lora` before it"
    if name not in names:
        return f"there is no stage `{name}`{suggest(name, made) or f': {mend}'}"
    if name not in earlier:
        return f"`{name}` is no earlier stage: {mend}"
    training = training_block(find(spec, name))
    if training is not None and training.method not in (*FOLDED, Method.FULL):
        return f"`{name}` trains with {training.method}, which is no change of the weights: {mend}"
    return f"`{name}` leaves no adapter that can be merged: {mend}"


def one_adapter(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Each entry is a stage's or another job's adapter, stands there once, and counts."""
    for path, stage in stages(spec):
        seen: list[tuple[object, ...]] = []
        for where, adapter in _named(path, stage):
            if (adapter.stage is None) == (adapter.uri is None):
                yield FieldError(where, "needs exactly one of stage, uri: make it two entries, or name one")
                continue
            if adapter.weight == 0:
                yield FieldError(f"{where}.weight", "0 leaves nothing of the adapter: remove the entry")
            what = (adapter.stage, adapter.uri, adapter.checkpoint)
            if what in seen:
                words = (
                    f"{adapter.stage or adapter.uri} is listed twice: remove one, and double the weight of the other"
                )
                yield FieldError(where, words)
            seen.append(what)


def own_combination(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A way to combine is for adapters that are named, and ``density`` and ``rank`` each for their own ways."""
    for path, stage in stages(spec):
        merge = stage.merge or Merge()
        if merge.combination != "linear" and not merge.adapters:
            words = f"{merge.combination} combines adapters that are named: name them under adapters, or remove it"
            yield FieldError(f"{path}.merge.combination", words)
        for name, combinations in OWN_COMBINATION.items():
            if getattr(merge, name) is not None and merge.combination not in combinations:
                words = f"is only for combination {' or '.join(combinations)}, got {merge.combination}: remove it"
                yield FieldError(f"{path}.merge.{name}", words)


def same_base(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """All adapters belong to the weights that the merge starts from, and no other adapter comes with those."""
    for index, (path, stage) in enumerate(stages(spec)):
        start = before(spec, stage)
        made_before = {earlier.name for earlier in spec.pipeline[:index] if _leaves_adapter(earlier)}
        listed = adapter_stages(stage)
        if start is None or stage.merge is None or not stage.merge.adapters or not made_before.issuperset(listed):
            continue
        if any((one.stage is None) == (one.uri is None) for one in stage.merge.adapters):
            continue
        if start.adapter is not None and start.adapter not in listed:
            mend = f"name it too, or write `from: {listed[0] if listed else start.weights}`"
            words = f"`{start.adapter}` comes before this stage, and is not one of its adapters"
            yield FieldError(f"{path}.merge.adapters", f"{words}: {mend}")
        for where, adapter in _named(path, stage):
            made = after(spec, adapter.stage) if adapter.stage is not None else None
            if made is not None and made.weights != start.weights:
                words = f"`{adapter.stage}` belongs to the weights of `{made.weights}`, this stage starts from those of"
                mend = f"write `from: {adapter.stage}`, and name adapters of one base alone"
                yield FieldError(f"{where}.stage", f"{words} `{start.weights}`: {mend}")
            if adapter.uri is not None and start.weights != BASE:
                words = f"an adapter from elsewhere belongs to the base model, this stage starts from `{start.weights}`"
                yield FieldError(f"{where}.uri", f"{words}: write `from: base`")


def two_matrices_for_svd(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """svd is of A and B, and leaves an adapter of A and B."""
    for path, stage in stages(spec):
        if stage.merge is None or stage.merge.combination != "svd":
            continue
        for where, adapter in _named(path, stage):
            maker, block = _maker(spec, adapter)
            if maker is None or block is None:
                continue
            lora = resolve_lora(block)
            other = [f"method {block.method}"] if lora is None else []
            if lora is not None:
                other += ["`variant: dora`"] if lora.variant == "dora" else []
                other += [f"`bias: {lora.bias}`"] if lora.bias != "none" else []
                other += ["`modulesToSave`"] if lora.modules_to_save else []
            for name in other:
                words = f"`{maker.name}` trains with {name}, which is not of A and B alone, and svd is"
                yield FieldError(f"{where}.stage", f"{words}: write linear or ties, or train without it")


def _maker(spec: FineTuneJobSpec, adapter: AdapterSource) -> tuple[Stage | None, TrainingBlock | None]:
    """The stage that began an adapter of this job."""
    if adapter.stage not in {stage.name for stage in spec.pipeline} or after(spec, adapter.stage) is None:
        return None, None
    named = find(spec, adapter.stage)
    maker = origin(spec, named) or named
    return maker, training_block(maker)


def reached_checkpoint(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A checkpoint's step is one that the training comes to; a folder of PEFT's has none."""
    for path, stage in stages(spec):
        for where, adapter in _named(path, stage):
            step = adapter.checkpoint
            if adapter.uri is not None and adapter.uri.startswith("file://") and step is not None:
                yield FieldError(
                    f"{where}.checkpoint", "a folder holds one adapter: leave it out, or name an s3:// uri"
                )
            named = next((other for other in spec.pipeline if other.name == adapter.stage), None)
            training = training_block(named) if named else None
            last = training.training.max_steps if training else None
            if isinstance(step, int) and last is not None and step > last:
                words = f"`{adapter.stage}` takes {last} steps, got {step}"
                yield FieldError(f"{where}.checkpoint", f"{words}: write {last}, or last")


def addresses(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """An adapter from elsewhere is in a store, or in a folder."""
    for path, stage in stages(spec):
        for where, adapter in _named(path, stage):
            if adapter.uri is not None and not re.fullmatch(r"s3://[a-z0-9][-.a-z0-9]{2,62}/.+|file://.+", adapter.uri):
                mend = f": write file://{adapter.uri}" if adapter.uri.startswith(("/", ".")) else ""
                words = f'must look like s3://bucket/.../stage/digest or file://folder, got "{adapter.uri}"'
                yield FieldError(f"{where}.uri", words + mend)


def reachable_from_pods(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Pods cannot see the user's disk."""
    for path, stage in stages(spec):
        for where, adapter in _named(path, stage):
            if adapter.uri is not None and adapter.uri.startswith("file://"):
                words = "file:// is on your machine, where no pod can read: name the result of a job in a store, s3://…"
                yield FieldError(f"{where}.uri", words)


def _named(path: str, stage: Stage) -> Iterator[tuple[str, AdapterSource]]:
    for number, adapter in enumerate(named_adapters(stage)):
        yield f"{path}.merge.adapters[{number}]", adapter
