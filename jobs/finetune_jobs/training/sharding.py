"""Whether the processes share the model among them, and how: FSDP2, as transformers brings it.

Each process reads from disk and holds only its share of every tensor; a layer is put together when it is needed and
dropped again. An adapter is not shared: it, its gradients and its optimizer are whole in every process, 16 bytes a
parameter (3.3 GB for 70 billion parameters at r 16). That way gradients travel once a step instead of once a
micro-batch. With full there is nothing but what is shared: gradients are added up after every micro-batch, so that each
process keeps its share of them, and of the optimizer's state.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from finetune_api.defaults import shares_model
from finetune_api.types import Method, TrainingBlock
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
    if peers.size == 1 or not shares_model(block) or how == "ddp":
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
    except ValueError:  # a family without an estimate: as much room again as 16-bit weights for all that is not kept
        kept = 9 if block.method is Method.FULL else 2
        return kept * sum(file.stat().st_size for file in source.glob("*.safetensors")) / shards <= free
    return estimate.training_memory(model, block, shards=shards).total <= free


def loader(sharding: Sharding, source: Path, *, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """The class whose ``from_pretrained`` loads only this process's share, and what it needs to be told."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    auto: Any = AutoModelForCausalLM  # from_config has no types
    with torch.device("meta"):
        described = anatomy.load_config(source, trust_remote_code=trust_remote_code)
        model = auto.from_config(described, trust_remote_code=trust_remote_code)
    kind, config = type(model), anatomy.load_config(source, trust_remote_code=trust_remote_code)
    if model.all_tied_weights_keys:
        kind, config.base_model_fsdp_plan = _tied(kind), {}
    # transformers' own plans say ``layers``, which GPT-2 and others call otherwise.
    plan = {f"{name}.*": "free_full_weight" for name in _layers(model)}
    distributed = DistributedConfig(fsdp_size=sharding.shards, dp_replicate_size=sharding.replicas, fsdp_plan=plan)
    return kind, {"config": config, "distributed_config": distributed}


def _layers(model: Any) -> list[str]:
    """Names of the lists of blocks."""
    blocks = set(model._no_split_modules or ())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(type(child).__name__ in blocks for child in module)
    ]


def _tied(kind: Any) -> Any:
    """The same class, with a matrix that is embedding and head at once shared as one.

    transformers shares it as two and makes them one again afterwards. Where its rows do not divide equally each keeps
    a padded copy of its own, of which only one is trained.
    """

    def distribute(cls: Any, model: Any, *given: Any) -> Any:
        model.tie_weights(recompute_mapping=False)
        return kind.maybe_distribute_model.__func__(cls, model, *given)

    # What is in no plan belongs to the model as a whole: both ends, and the norm before the head.
    return type(kind.__name__, (kind,), {"_fsdp_plan": {}, "maybe_distribute_model": classmethod(distribute)})


def add_up_gradients(model: nn.Module) -> None:
    """Of all processes, where FSDP would take the mean: a sum is what the losses need."""
    for module in _shared(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def put_away(model: nn.Module) -> None:
    """Leave each process with its share alone: after a pass without a way back, both ends of the model stay whole."""
    for module in _shared(model):
        module.reshard()


def _shared(model: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    yield from (module for module in model.modules() if isinstance(module, FSDPModule))


def held(model: nn.Module) -> int:
    """Numbers of the model's parameters that are in this process's memory, packed ones (nf4) as they are stored."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(math.prod(tensor.shape) for tensor in local)
