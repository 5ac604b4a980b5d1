"""How much one process can hold at a time, and whether sequences may share a row."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from finetune_api.types import Training
from finetune_jobs.estimate import architecture
from finetune_jobs.estimate.memory import activation_bytes, gathered_bytes
from finetune_jobs.run.errors import ConfigurationError
from finetune_jobs.training.collators import Example, Layout, Tokens, collate
from finetune_jobs.training.distributed import Peers
from finetune_jobs.training.losses import token_log_probs
from finetune_jobs.training.model import Policy, count, is_adapter, keeps_cache, save_memory, uses_dora, virtual_tokens

_CPU_TOKENS = 1024
"""More in one row is slower on a CPU: the products gain nothing and attention grows with the square."""
_GPU_TOKENS = 8192
_LOGIT_BYTES = 14
"""16-bit, its float32 copy, log-softmax, gradient."""
_SHARE = 0.85
"""Of the free memory; the rest goes to the allocator's gaps."""


@dataclass(frozen=True)
class Plan:
    """How micro-batches lie, and whether activations are computed twice."""

    layout: Layout
    gradient_checkpointing: bool


def plan(policy: Policy, training: Training, examples: Sequence[Example], path: str, peers: Peers) -> Plan:
    """Choose what the user left to us, the same in every process: their micro-batches must fit together.

    ``examples``: all that will be seen, so that the longest fits.
    """
    packed = _packed(policy, training, path)
    longest = max(e.tokens for e in examples)
    wanted = max(longest, _CPU_TOKENS if policy.device.type == "cpu" else _GPU_TOKENS)
    recompute = training.gradient_checkpointing
    if keeps_cache(policy):  # which a layer that is computed twice is not given
        recompute = False
    if recompute == "auto":
        recompute = peers.least(_room(policy, recompute=False)) < longest
    if recompute:
        save_memory(policy)
    if training.micro_batch_size != "auto":
        return Plan(Layout(packed, tokens=None, examples=training.micro_batch_size), recompute)
    room = peers.least(_room(policy, recompute=recompute))
    shortest = min(e.shortest for e in examples)
    room *= shortest / (shortest + virtual_tokens(policy.model))  # as much of it as the texts may take
    return Plan(Layout(packed, tokens=int(max(1, min(wanted, room)))), recompute)


def _room(policy: Policy, *, recompute: bool) -> float:
    """Tokens whose activations and logits fit beside model, gradients and optimizer. A CPU's memory is not rationed."""
    if policy.device.type == "cpu":
        return math.inf
    config = policy.base.config.get_text_config()
    try:
        model = architecture.read(config.to_dict())
    except ValueError:  # an architecture without an estimate: one example at a time, and recomputed
        return 1
    full = not is_adapter(policy.model)
    counts = count(policy.model)
    later = 12 * counts.trainable // (policy.shards if policy.divided else 1)
    if full and not (policy.divided and recompute):
        later += policy.compute.itemsize * counts.total
    if policy.sharded:
        later += gathered_bytes(model, policy.compute.itemsize, full=full)
    free = _SHARE * torch.cuda.mem_get_info(policy.device)[0] - later
    dora = uses_dora(policy.model)
    token = activation_bytes(model, policy.compute.itemsize, full=full, recomputed=recompute, dora=dora)
    return free / (token + _LOGIT_BYTES * model.vocabulary)


def _packed(policy: Policy, training: Training, path: str) -> bool:
    if training.packing is False or virtual_tokens(policy.model):  # a text with vectors before it has its own row
        return False
    isolated = keeps_apart(policy)
    if training.packing is True and not isolated:
        raise ConfigurationError(
            f"{path}.training.packing: in this architecture sequences of one row see each other; write false or auto"
        )
    return isolated


def keeps_apart(policy: Policy) -> bool:
    """Whether sequences that share a row are read as if each were alone: tried, no list of architectures is right.

    The second sequence's probabilities must not change with the first one. Convolutions and state-space layers fail.
    """
    if "position_ids" not in inspect.signature(policy.base.forward).parameters:
        return False
    policy.model.eval()
    found = []
    for first in (1, 2):
        before, after = (_sequence(policy, factor, learned) for factor, learned in ((first, False), (3, True)))
        batch = collate([Example((before, after))], packed=True).to(policy.device)
        with torch.no_grad():
            found.append(token_log_probs(policy, batch))
    return torch.allclose(found[0], found[1], atol=1e-4)


def _sequence(policy: Policy, factor: int, learned: bool) -> Tokens:
    ids = (factor * np.arange(7, 31)) % int(policy.base.config.get_text_config().vocab_size)
    return Tokens(ids.astype(np.int32), np.full(len(ids), learned))
