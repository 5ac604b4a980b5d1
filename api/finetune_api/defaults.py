"""Defaults that depend on the block or the method: one table, read by the stages, the estimate and ``plan``."""

from finetune_api.pipeline import block, find, merged_adapters, trained_on, training_block
from finetune_api.types import (
    IA3,
    IMATRIX_TYPES,
    Bottleneck,
    FineTuneJobSpec,
    GGUFType,
    Imatrix,
    Lora,
    Merge,
    Method,
    Preference,
    PrefixTuning,
    PromptTuning,
    Quantization,
    Quantize,
    Reward,
    Rl,
    Sft,
    Stage,
    Training,
    TrainingBlock,
)

_EPOCHS = {Sft: 3.0, Preference: 1.0, Reward: 1.0, Rl: 1.0}
_LEARNING_RATE = {  # (adapters, full): reference/practice.md section 2
    Sft: (2e-4, 1e-5),
    Reward: (1e-4, 1e-5),
    Rl: (1e-5, 1e-6),
}
_PREFERENCE_RATE = {
    "dpo": (1e-5, 5e-7),
    "ipo": (1e-5, 5e-7),
    "kto": (1e-5, 1e-6),
    "orpo": (5e-5, 5e-6),
    "simpo": (1e-5, 1e-6),
}
_METHOD_RATE = {Method.IA3: 5e-3, Method.PREFIX_TUNING: 1e-2, Method.PROMPT_TUNING: 3e-2, Method.BOTTLENECK: 1e-4}
"""Those that need others than LoRA, whatever the block."""
LOW_RANK = (Method.LORA, Method.QLORA)
"""Methods that train one and the same kind of adapter."""
FOLDED = (*LOW_RANK, Method.IA3)
"""Methods whose adapters ``merge`` can fold into the weights."""
PROMPTED = (Method.PREFIX_TUNING, Method.PROMPT_TUNING)
"""Methods that put learned vectors before every text."""
_BETA = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}
_ANSWERS = {"ppo": 1, "grpo": 8, "rloo": 4}
_DENSITY = 0.2
_KL = {"ppo": 0.05, "grpo": 0.04, "rloo": 0.05}


def resolve_training(block: TrainingBlock) -> Training:
    """The block's hyper-parameters with ``epochs``, ``learningRate`` and ``optimizer`` filled in."""
    rates = _PREFERENCE_RATE[block.loss] if isinstance(block, Preference) else _LEARNING_RATE[type(block)]
    adapter, full = rates
    training = block.training
    optimizer = training.optimizer
    if optimizer == "auto":
        optimizer = "pagedAdamw8bit" if block.method is Method.QLORA else "adamw"
    return training.model_copy(
        update={
            "epochs": training.epochs or _EPOCHS[type(block)],
            "learning_rate": training.learning_rate
            or (full if block.method is Method.FULL else _METHOD_RATE.get(block.method, adapter)),
            "optimizer": optimizer,
        }
    )


def resolve_beta(block: Preference) -> float:
    """``beta`` as written, else the loss's own."""
    return _BETA[block.loss] if block.beta is None else block.beta


def answers_per_prompt(block: Rl) -> int:
    """To each prompt of a step."""
    return block.generation.per_prompt or _ANSWERS[block.algorithm]


def kl_coefficient(block: Rl) -> float:
    """At the first step; where ``kl.target`` is written it moves on from there."""
    return _KL[block.algorithm] if block.kl.coefficient is None else block.kl.coefficient


def resolve_lora(block: TrainingBlock) -> Lora | None:
    """The adapter's settings with ``alpha`` filled in; None for a method without LoRA."""
    if block.method not in LOW_RANK:
        return None
    lora = block.lora or Lora()
    return lora if lora.alpha is not None else lora.model_copy(update={"alpha": 2.0 * lora.r})


def resolve_added(block: TrainingBlock) -> PrefixTuning | PromptTuning | IA3 | Bottleneck | None:
    """The settings of what a method other than lora, qlora and full puts beside the weights; None for those."""
    match block.method:
        case Method.IA3:
            return block.ia3 or IA3()
        case Method.PREFIX_TUNING:
            return block.prefix_tuning or PrefixTuning()
        case Method.PROMPT_TUNING:
            return block.prompt_tuning or PromptTuning()
        case Method.BOTTLENECK:
            return block.bottleneck or Bottleneck()
        case _:
            return None


def shares_model(block: TrainingBlock) -> bool:
    """Whether GPUs can share the model among them. Of lora the frozen weights, where nothing but A and B is made of
    them, or trained; of full all that is trained, where its optimizer takes each number for itself.
    """
    if isinstance(block, Reward | Rl) or resolve_qat(block) is not None:
        return False
    if block.method is Method.FULL:
        return resolve_training(block).optimizer == "adamw"
    lora = block.lora or Lora()
    plain = lora.variant == "lora" and lora.bias == "none" and not lora.modules_to_save
    return block.method is Method.LORA and plain


def sharing_processes(stage: Stage) -> int:
    """Processes that would share a model: those of one node, or with one GPU in each those of all nodes."""
    gpus, nodes = stage.resources.gpus, stage.resources.nodes
    return gpus if gpus > 1 else max(1, nodes)


def resolve_quantization(block: TrainingBlock) -> Quantization | None:
    """How the base is stored; None unless the method is qlora."""
    return (block.quantization or Quantization()) if block.method is Method.QLORA else None


def resolve_qat(block: TrainingBlock) -> GGUFType | None:
    """The type of GGUF that is trained for; None: none in particular."""
    return GGUFType(block.qat.type) if isinstance(block, Sft) and block.qat is not None else None


def resolve_density(block: Merge) -> float:
    """As written, else the share that TIES' authors kept."""
    return _DENSITY if block.density is None else block.density


def resolve_imatrix(block: Quantize) -> Imatrix | None:
    """As written; its defaults where one of the types cannot do without; else None."""
    return block.imatrix or (Imatrix() if IMATRIX_TYPES.intersection(block.gguf) else None)


def uses_imatrix(block: Quantize, kind: GGUFType) -> bool:
    """Whether the file of that type is made with an importance matrix."""
    whole = kind in (GGUFType.F32, GGUFType.F16, GGUFType.BF16)
    return kind in IMATRIX_TYPES or (block.imatrix is not None and not whole)


def base_quantization(spec: FineTuneJobSpec, name: str) -> Quantization | None:
    """How the base was stored that the adapters of this merge were last trained on; None: it was not quantized, not
    alike for all of them, or another job trained one.
    """
    stages = [adapter.stage for adapter in merged_adapters(spec, name)]
    trainers = [training_block(find(spec, stage)) if stage is not None else None for stage in stages]
    found = [resolve_quantization(trainer) if trainer is not None else None for trainer in trainers]
    return found[0] if found and all(one == found[0] for one in found) else None


def as_saved(lora: Lora) -> Lora:
    """What a later stage finds that trains the adapter on: of PiSSA's, a plain one of twice the rank."""
    if lora.variant != "pissa":
        return lora
    alpha = (lora.alpha or 2.0 * lora.r) * 2 * (lora.r**0.5 if lora.rank_stabilized else 1)
    return lora.model_copy(update={"variant": "lora", "r": 2 * lora.r, "alpha": alpha, "rank_stabilized": False})


def with_adapter(spec: FineTuneJobSpec, name: str) -> TrainingBlock:
    """The block of a training stage with the settings of the adapter that it trains, which are those of the stage that
    began it.
    """
    stage = block(find(spec, name))
    assert isinstance(stage, TrainingBlock)
    if stage.method not in (Method.BOTTLENECK, Method.IA3):
        return stage.model_copy(update={"lora": adapter_of(spec, name)})
    while (incoming := trained_on(spec, name)) is not None:
        name = incoming
    maker = block(find(spec, name))
    assert isinstance(maker, TrainingBlock)
    return stage.model_copy(update={str(stage.method): resolve_added(maker)})


def adapter_of(spec: FineTuneJobSpec, name: str) -> Lora | None:
    """The adapter that a training stage trains: one that comes in keeps the settings of the stage that began it."""
    stage = block(find(spec, name))
    if not isinstance(stage, TrainingBlock) or stage.method is Method.FULL:
        return None
    incoming = trained_on(spec, name)
    made = adapter_of(spec, incoming) if incoming is not None else None
    return as_saved(made) if made is not None else resolve_lora(stage)
