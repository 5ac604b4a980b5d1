"""What a stage's pod asks for where the user says nothing: cores, memory and scratch disk, by the model's size.

The model's size is that of its parameters in 16 bits, as ``prepare`` counted them. Rough on purpose, and generous:
a limit that is too low kills the stage, one that is too high only waits for a larger node.
"""

from dataclasses import dataclass

from finetune_api.pipeline import block, find, kind
from finetune_api.types import FineTuneJobSpec, Method, Quantize, Resources, TrainingBlock

_GIB = 1 << 30
_UNKNOWN = 8_000_000_000
"""Parameters a model is taken to have before ``prepare`` has seen it."""


@dataclass(frozen=True)
class Sizes:
    """Bytes, but for the cores."""

    cores: int
    memory: int
    workspace: int


def resources_of(spec: FineTuneJobSpec, name: str) -> Resources:
    """What the spec says: the stage's own, or ``evaluation``'s, or for the stages that need no GPU nothing."""
    if any(stage.name == name for stage in spec.pipeline):
        return find(spec, name).resources
    if name in ("baseline", "evaluate"):
        largest = max((stage.resources for stage in spec.pipeline), key=lambda r: r.gpus)
        return spec.evaluation.resources or largest.model_copy(update={"nodes": 1})
    return Resources()


def sizes(spec: FineTuneJobSpec, name: str, parameters: int | None) -> Sizes:
    """The defaults for a stage. ``parameters``: of the base model; None before they are known."""
    model = 2 * (parameters or _UNKNOWN)
    gpus = resources_of(spec, name).gpus
    what = kind(spec, name)
    # Factors of the model's 16-bit size. On a GPU the weights pass through memory shard by shard; without one a
    # process holds them in float32, training ones with activations too. A merge streams: its inputs are mapped. So does
    # prepare, which runs before the size is known and must fit on the node of a small model.
    memory = {"prepare": 0.25, "report": 0, "merge": 0.5, "quantize": 2.5}.get(what, 1 if gpus else 4)
    disk = {"prepare": 3.0, "report": 0, "merge": 2.5}.get(what, 2.0)
    if any(stage.name == name for stage in spec.pipeline):
        match block(find(spec, name)):
            case Quantize(gguf=types, bitsandbytes=others, lora_gguf=lora):
                disk = 2.5 + len(types) + len(others) + lora  # an adapter is held against a conversion of its base
            case TrainingBlock(method=Method.FULL):
                # Weights and Adam's moments in float32 are six times the size, and four checkpoints may lie there: the
                # one that was gone on from, one on its way to the store, one that waits for it, and the next.
                disk += 4 * 6
    return Sizes(
        # A request, and no limit: without a GPU a stage takes what is idle, and must fit on a node of two cores.
        cores=2 + 4 * gpus if gpus else 1,
        memory=4 * _GIB + int(memory * model),
        workspace=8 * _GIB + int(disk * model),
    )
