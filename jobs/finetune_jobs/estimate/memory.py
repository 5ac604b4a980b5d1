"""Memory of one training process, with its parts: what a GPU must hold.

Every process holds the whole model (DDP) unless it is shared (FSDP): with lora the frozen weights, with full all that
is trained. Sources: 16 bytes a parameter for weights, gradients and Adam's moments in float32 (as many as ZeRO,
arXiv:1910.02054, section 3.1, counts in mixed precision);
activations tensor by tensor in the manner of Korthikanti et al. (arXiv:2205.05198, section 4), for a gated MLP without
stored attention matrices; 4.127 and 4.5 bits a weight for nf4 with and without double quantization (QLoRA,
arXiv:2305.14314, section 3).
"""

from dataclasses import dataclass, fields

from finetune_api.defaults import (
    answers_per_prompt,
    resolve_added,
    resolve_lora,
    resolve_qat,
    resolve_quantization,
    resolve_training,
)
from finetune_api.types import Bottleneck, Method, Preference, PrefixTuning, PromptTuning, Reward, Rl, TrainingBlock
from finetune_jobs.estimate.architecture import Architecture, adapted_weights, lora_parameters, trained_parameters

CACHED_TOKENS = 65_536
"""Of prompts and answers in one batch of sampling, at most."""
TOLERANCE = 0.2
"""The real peak lies within this share of the total: libraries' workspaces and the allocator's gaps differ."""
NF4_BITS = {True: 4.127, False: 4.5}
"""A weight in nf4 or fp4: with and without double quantization."""
_OPTIMIZER = {"adamw": 8, "adamw8bit": 2, "pagedAdamw8bit": 2}
"""Bytes a trainable parameter: two moments."""
_LOGITS = 14
"""Bytes a logit: 16-bit, its float32 copy, log-softmax, gradient."""
_CONTEXT = 1 << 30
"""CUDA context, kernels and library handles."""


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for."""

    weights: int
    """The model: frozen in 16 bits (lora) or 4 (qlora), float32 where it is trained (full)."""
    adapter: int
    """float32, whatever the precision."""
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass."""
    logits: int
    workspace: int
    """Copies in the precision of the arithmetic: all weights (full), the largest layer (qlora), what qat rounds. Of
    weights that are shared what is gathered at a time, with its copies and gradients."""
    context: int
    rewards: int = 0
    """rl: the reward models that it reads, in 16 bits."""

    @property
    def total(self) -> int:
        """Within ``TOLERANCE`` of the peak."""
        return sum(int(getattr(self, part.name)) for part in fields(self))


def training_memory(
    model: Architecture, block: TrainingBlock, *, on_gpu: bool = True, tokens: int | None = None, shards: int = 1
) -> Memory:
    """What a process of this stage needs.

    Where the block leaves the micro-batch or checkpointing to us, the least that the stage can make do with: one
    example at a time, activations computed twice. ``tokens``: of the longest example, by default ``maxLength``.
    ``shards``: processes that share the frozen weights (lora), or all with gradients and optimizer (full).
    """
    training, lora, quantization = resolve_training(block), resolve_lora(block), resolve_quantization(block)
    compute = 4 if training.precision == "fp32" or not on_gpu else 2
    full = block.method is Method.FULL
    trained, added = trained_parameters(model, block), resolve_added(block)
    adapter = 0 if full else trained
    examples = 1 if training.micro_batch_size == "auto" else training.micro_batch_size
    # A pair is two sequences; kto judges answers one by one.
    pairs = isinstance(block, Reward) or (isinstance(block, Preference) and block.loss != "kto")
    longest = (tokens or training.max_length) + (added.virtual_tokens if isinstance(added, PromptTuning) else 0)
    rows = examples * longest * (2 if pairs else 1)
    once = training.gradient_checkpointing is False or isinstance(added, PrefixTuning)
    dora = lora is not None and lora.variant == "dora"
    token = activation_bytes(model, compute, full=full, recomputed=not once, dora=dora)
    if isinstance(added, Bottleneck):  # a place's input, and its own layer before and after the non-linearity
        inner = max(1, model.hidden // added.reduction_factor)
        kept = len(added.placement) * compute * (model.hidden + 3 * inner)
        token += kept * (model.layers if once else 1)
    largest = max(linear.inputs * linear.outputs for linear in model.linears)
    if quantization is not None:
        bits = 8 if quantization.type == "int8" else NF4_BITS[quantization.double_quant]
        packed = int(model.linear_parameters * bits / 8)
        weights = packed + compute * (model.parameters - model.linear_parameters)
    else:
        weights = (4 if full else compute) * model.parameters // shards
    copies = compute * (largest if quantization else 0)
    if full and compute == 2 and (shards == 1 or once):
        copies += compute * model.parameters
    if resolve_qat(block) is not None:  # the rounded weights stand beside those that they are made of
        copies += (
            4 * model.parameters if full else compute * adapted_weights(model, lora.target_modules if lora else [])
        )
    if dora:  # B A by way of a unit matrix, and the weight with it, in float32
        copies += max(4 * x.inputs * (x.inputs + 3 * x.outputs) for x in model.linears)
    if lora and lora.variant == "pissa":  # what the adapter began as
        copies += 4 * lora_parameters(model, lora.r, lora.target_modules)
    activations, logits = rows * token, 0 if isinstance(block, Reward) else rows * _LOGITS * model.vocabulary
    judges = 0
    if isinstance(block, Rl):
        judges = sum(reward.stage is not None for reward in block.rewards)
        copies += 4 * trained  # the incoming model, which is the reference
        answers = training.batch_size * answers_per_prompt(block)
        cache = 2 * compute * model.layers * model.keys * min(CACHED_TOKENS, answers * longest)
        copies += max(0, cache - activations - logits)  # answers are given before anything is learned from them
    held = trained // shards if full else trained
    return Memory(
        weights=weights,
        adapter=4 * adapter,
        gradients=4 * held,
        optimizer=_OPTIMIZER[training.optimizer] * held,
        activations=activations,
        logits=logits,
        workspace=copies + (gathered_bytes(model, compute, full=full) if shards > 1 else 0),
        context=_CONTEXT if on_gpu else 0,
        rewards=judges * compute * model.parameters,
    )


def gathered_bytes(model: Architecture, compute: int, *, full: bool) -> int:
    """What a process holds whole at a time where weights are shared: two blocks, for the next one is fetched while one
    is computed, and the output head. With full in float32, with a copy of block and head for the arithmetic, and
    gradients of head or block twice, for what is sent stands beside it.
    """
    block, head = model.linear_parameters // model.layers, model.vocabulary * model.hidden
    if not full:
        return compute * (2 * block + head)
    return 4 * (2 * block + max(2 * block, 3 * head)) + (compute * (block + head) if compute == 2 else 0)


def activation_bytes(model: Architecture, compute: int, *, full: bool, recomputed: bool, dora: bool = False) -> int:
    """A token's activations over all blocks; ``recomputed``: each block's input, and one block in full.

    ``compute``: bytes of a number in the arithmetic. Measured on the autograd graph by ``tests/unit/test_estimate.py``.
    """
    # RMSNorm works on float32 copies; its own weight's gradient needs the normalised ones too.
    norms = (4 if full else 2) * 4 * model.hidden
    attention = (2 * model.queries + 2 * model.keys) * compute  # q, k, v and the output
    mlp = 3 * model.intermediate * compute  # gate, its activation, up
    if compute == 2:  # every layer casts its input for itself, whether autocast or PEFT asks for it
        inputs = compute * sum(linear.inputs for linear in model.linears)
    else:
        inputs = compute * (2 * model.hidden + model.intermediate)
    # Its magnitudes scale what base and adapter say of a token, and their gradients need both.
    said = 2 * compute * sum(linear.outputs for linear in model.linears) if dora else 0
    block = norms + attention + mlp + inputs + said
    if not recomputed:
        return model.layers * block
    return model.layers * model.hidden * (4 if full else compute) + block
