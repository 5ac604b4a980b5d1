"""The pipeline as a graph: who starts from whom, who is rewarded by whom, in which order, which models are scored.

Pure functions over a spec. They do not judge it (the operator's rules do): on a spec whose ``from``, ``rewards`` or
``adapters`` names nothing or goes in a circle they raise ``ValueError``.
"""

from dataclasses import dataclass

from finetune_api.types import (
    BASE,
    AdapterSource,
    Data,
    FineTuneJobSpec,
    Merge,
    Method,
    Preference,
    Quantize,
    Reward,
    Rl,
    Sft,
    Stage,
    TrainingBlock,
)

Block = Sft | Preference | Reward | Rl | Merge | Quantize
BLOCKS = ("sft", "preference", "reward", "rl", "merge", "quantize")
"""Names of the same fields of a stage."""
LORA = "LoRA"
"""An adapter as a GGUF of its own."""
TRAINING = ("sft", "preference", "reward", "rl")
"""Those that train, and so run on several GPUs and keep checkpoints."""


@dataclass(frozen=True)
class ModelRef:
    """A model as stages leave it: 16-bit weights of ``base`` or of a stage, and maybe an adapter on them."""

    weights: str
    adapter: str | None = None


@dataclass(frozen=True)
class Target:
    """A model that is scored: ``base``, a stage's model, or one GGUF or bitsandbytes model of a quantize stage."""

    stage: str
    gguf: str | None = None
    bitsandbytes: str | None = None

    @property
    def quantized(self) -> str | None:
        """The type; None for a model of 16 bits."""
        return self.gguf or self.bitsandbytes

    @property
    def name(self) -> str:
        """``merge`` or ``gguf/Q4_K_M``."""
        return f"{self.stage}/{self.quantized}" if self.quantized else self.stage


def find(spec: FineTuneJobSpec, name: str) -> Stage:
    """The pipeline's stage of that name."""
    for stage in spec.pipeline:
        if stage.name == name:
            return stage
    raise ValueError(f"no stage {name!r} in the pipeline")


def block(stage: Stage) -> Block:
    """The one block that the stage has."""
    written: list[Block] = [b for name in BLOCKS if (b := getattr(stage, name)) is not None]
    if len(written) != 1:
        raise ValueError(f"stage {stage.name!r} has {len(written)} blocks, not one")
    return written[0]


def training_block(stage: Stage) -> TrainingBlock | None:
    """The stage's block if it trains."""
    return stage.sft or stage.preference or stage.reward or stage.rl


def kind(spec: FineTuneJobSpec, name: str) -> str:
    """Which code runs the stage: a block's name, or a derived stage's own."""
    for stage in spec.pipeline:
        if stage.name == name:
            return type(block(stage)).__name__.lower()
    return name


def parent(spec: FineTuneJobSpec, name: str) -> str:
    """The model that a stage of the pipeline starts from: ``base`` or a stage's name.

    A reward model is a branch: nothing starts from it unless ``from`` says so, which the rules refuse.
    """
    previous = BASE
    for stage in spec.pipeline:
        if stage.name == name:
            return stage.from_ or previous
        previous = previous if stage.reward else stage.name
    raise ValueError(f"no stage {name!r} in the pipeline")


def reward_stages(stage: Stage) -> list[str]:
    """The stages whose models reward this one's answers."""
    return [reward.stage for reward in stage.rl.rewards if reward.stage is not None] if stage.rl else []


def named_adapters(stage: Stage) -> list[AdapterSource]:
    """The adapters that a merge names; none of any other stage."""
    return (stage.merge.adapters or []) if stage.merge else []


def adapter_stages(stage: Stage) -> list[str]:
    """The stages whose adapters this one merges by name."""
    return [adapter.stage for adapter in named_adapters(stage) if adapter.stage is not None]


def merged_adapters(spec: FineTuneJobSpec, name: str) -> list[AdapterSource]:
    """What a merge stage folds in: the adapters that it names, else the one that comes before it."""
    stage = find(spec, name)
    if named := named_adapters(stage):
        return named
    before = model_before(spec, name).adapter
    return [] if stage.merge is None or before is None else [AdapterSource(stage=before)]


def model_after(spec: FineTuneJobSpec, name: str) -> ModelRef:
    """The model that a stage (or ``base``) leaves behind; a quantize stage leaves the model it read.

    A reward stage's is the model that scores, not one that answers.
    """
    if name == BASE:
        return ModelRef(BASE)
    seen = {name}
    chain = [name]
    while (previous := parent(spec, chain[-1])) != BASE:
        if previous in seen:
            raise ValueError(f"stage {previous!r} starts from itself")
        seen.add(previous)
        chain.append(previous)
    model = ModelRef(BASE)
    for stage in reversed(chain):
        match block(find(spec, stage)):
            case Merge() | TrainingBlock(method=Method.FULL):
                model = ModelRef(stage)
            case TrainingBlock(start="merge") if model.adapter is not None:
                model = ModelRef(stage, stage)
            case TrainingBlock():
                model = ModelRef(model.weights, stage)
            case Quantize():
                pass
    return model


def model_before(spec: FineTuneJobSpec, name: str) -> ModelRef:
    """The model that a stage of the pipeline starts from."""
    return model_after(spec, parent(spec, name))


def lora_ggufs(spec: FineTuneJobSpec, name: str) -> dict[str, AdapterSource]:
    """The adapters that a stage writes as GGUFs of their own, by artifact: ``LoRA``, or one for each stage that a merge
    names, such as ``LoRA-sft`` or ``LoRA-sft-best``. Those of other jobs are not written.
    """
    stage, merged = find(spec, name), model_before(spec, name).weights
    if stage.quantize is None or not stage.quantize.lora_gguf or merged == BASE:
        return {}
    merge, found = find(spec, merged).merge, {}
    for adapter in merged_adapters(spec, merged):
        if adapter.stage is not None:
            which = "" if adapter.checkpoint is None else f"-{adapter.checkpoint}"
            found[f"{LORA}-{adapter.stage}{which}" if merge and merge.adapters else LORA] = adapter
    return found


def order(spec: FineTuneJobSpec) -> list[str]:
    """Every stage, derived ones too, each after all that it waits for; the order of writing where there is a choice."""
    left = [stage.name for stage in spec.pipeline]
    sorted_names: list[str] = []
    while left:
        ready = next((n for n in left if set(_needs(spec, n)) <= set(sorted_names)), None)
        if ready is None:
            raise ValueError(f"stages {', '.join(left)} start from or wait for each other or a stage that is not there")
        left.remove(ready)
        sorted_names.append(ready)
    if spec.evaluation.skip:
        return ["prepare", *sorted_names]
    return ["prepare", "baseline", *sorted_names, "evaluate", "report"]


def waits_for(spec: FineTuneJobSpec, name: str) -> list[str]:
    """The stages that must be done before this one starts, ``prepare`` and ``baseline`` included."""
    if name == "prepare":
        return []
    if name == "baseline":
        return ["prepare"]
    names = [stage.name for stage in spec.pipeline]
    if name == "evaluate":
        return ["prepare", "baseline", *names]
    if name == "report":
        return ["prepare", "baseline", *names, "evaluate"]
    # The base model's answers are evidence only if they were taken before anything trained.
    first = ["prepare"] if spec.evaluation.skip else ["prepare", "baseline"]
    ancestors: set[str] = set()
    new = {name}
    while new := {need for one in new for need in _needs(spec, one)} - ancestors:
        if name in new:
            raise ValueError(f"stage {name!r} starts from itself or waits for itself")
        ancestors |= new
    return [*first, *(stage.name for stage in spec.pipeline if stage.name in ancestors)]


def _needs(spec: FineTuneJobSpec, name: str) -> list[str]:
    """The pipeline's stages that this one reads."""
    start = parent(spec, name)
    stage = find(spec, name)
    return [*([] if start == BASE else [start]), *reward_stages(stage), *adapter_stages(stage)]


def trained_on(spec: FineTuneJobSpec, name: str) -> str | None:
    """The stage whose adapter this one trains on, or reads; None if it begins one, or there is none."""
    begins = training_block(find(spec, name))
    return None if begins is not None and begins.start == "merge" else model_before(spec, name).adapter


def targets(spec: FineTuneJobSpec) -> list[Target]:
    """The tuned models to score beside ``base``: merged and full ones, GGUFs, adapters that nothing goes on from."""
    found: list[Target] = []
    continued = {parent(spec, s.name) for s in spec.pipeline if not s.reward and (training_block(s) or s.merge)}
    continued |= {name for stage in spec.pipeline for name in adapter_stages(stage)}
    for stage in spec.pipeline:
        match block(stage):
            case Reward():
                pass  # it answers nothing
            case Quantize(gguf=types, bitsandbytes=others):
                found.extend(Target(stage.name, str(t)) for t in types)
                found.extend(Target(stage.name, bitsandbytes=t) for t in others)
            case Merge():
                found.append(Target(stage.name))
            case _ if stage.name not in continued:
                found.append(Target(stage.name))
    return found


def data_of(spec: FineTuneJobSpec, name: str) -> Data:
    """``spec.data`` with the stage's own roles over it."""
    own = find(spec, name).data
    return spec.data.model_copy(update={role: rows for role in Data.model_fields if (rows := getattr(own, role))})
