"""Whether the processes share the frozen weights among them, and how: FSDP2, as transformers brings it.

Each process reads from disk and holds only its share of every tensor; a layer is put together when it is needed and
dropped again. The adapter is not shared: it, its gradients and its optimizer are whole in every process, 16 bytes a
parameter (3.3 GB for 70 billion parameters at r 16). That way gradients travel once a step instead of once a
micro-batch, and checkpoints, optimizers and adapter files are the same however the model is held.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from finetune_api.defaults import shares_base
from finetune_api.types import Reward, Rl, TrainingBlock
from finetune_jobs import anatomy, estimate
from finetune_jobs.training.distributed import Peers

_SHARE = 0.85
"""Of the free memory, that an estimate may fill."""


@dataclass(frozen=True)
class Sharding:
    """``shards`` processes hold the model once; ``replicas`` such groups see different examples."""

    shards: int
    replicas: int


def choose(block: TrainingBlock, source: Path, device: torch.device, peers: Peers) -> Sharding | None:
    """As ``training.distributed`` says, the same in every process; None: each holds all of the model.

    Among the processes of one node where their memory is enough together, else among all: what is shared travels three
    times a step, and between nodes that is slow.
    """
    how = block.training.distributed
    if peers.size == 1 or not shares_base(block) or how == "ddp" or isinstance(block, Reward | Rl):
        return None

    def fits(shards: int) -> bool:
        return bool(peers.least(_fits(block, source, device, shards)))

    if how == "auto" and fits(1):
        return None
    within = peers.local_size if peers.local_size > 1 and fits(peers.local_size) else peers.size
    return Sharding(within, peers.size // within)


def _fits(block: TrainingBlock, source: Path, device: torch.device, shards: int) -> bool:
    if device.type == "cpu":  # its memory is not rationed
        return True
    free = _SHARE * torch.cuda.mem_get_info(device)[0]
    try:
        model = estimate.read(anatomy.read_config(source))
    except ValueError:  # a family without an estimate: half the room for all but the weights
        return 2 * sum(file.stat().st_size for file in source.glob("*.safetensors")) / shards <= free
    return estimate.training_memory(model, block, shards=shards).total <= free


def load_settings(sharding: Sharding, source: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    """What ``from_pretrained`` needs to load only this process's share."""
    from transformers.distributed.configuration_utils import DistributedConfig

    layers = _layers(source, trust_remote_code=trust_remote_code)
    plan = {f"{name}.*": "free_full_weight" for name in layers}
    config = DistributedConfig(fsdp_size=sharding.shards, dp_replicate_size=sharding.replicas, fsdp_plan=plan)
    return {"distributed_config": config}


def _layers(source: Path, *, trust_remote_code: bool) -> list[str]:
    """Names of the lists of blocks. transformers' own plans say ``layers``, which GPT-2 and others call otherwise."""
    from transformers import AutoModelForCausalLM

    config = anatomy.load_config(source, trust_remote_code=trust_remote_code)
    auto: Any = AutoModelForCausalLM  # from_config has no types
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=trust_remote_code)
    blocks = set(model._no_split_modules or ())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(type(child).__name__ in blocks for child in module)
    ]


def held(model: nn.Module) -> int:
    """Numbers of the model's parameters that are in this process's memory, packed ones (nf4) as they are stored."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(math.prod(tensor.shape) for tensor in local)
