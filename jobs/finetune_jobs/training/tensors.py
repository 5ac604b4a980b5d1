"""Tensors on disk: whole in the files, however the processes share them in memory, and one after the other."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from finetune_jobs.merging.weights import ShardWriter, TensorSpec, Weights

_FILE_BYTES = 4 << 30


@torch.no_grad()
def save(tensors: Mapping[str, Tensor], directory: Path | None, dtype: torch.dtype | None = None) -> None:
    """Write them as safetensors, those of floating point as ``dtype`` if one is given.

    All processes that share them must call this; the one that writes gives the ``directory``, which is made. No process
    holds more than one whole tensor at a time.
    """
    types = {name: dtype if dtype and t.is_floating_point() else t.dtype for name, t in tensors.items()}
    if directory is None:
        for tensor in tensors.values():
            _whole(tensor)
        return
    directory.mkdir(parents=True)
    specs = {name: TensorSpec(types[name], tuple(t.shape)) for name, t in tensors.items()}
    with ShardWriter(directory, specs, _FILE_BYTES) as writer:
        for name, tensor in tensors.items():
            writer.write(name, 0, _whole(tensor).to("cpu", types[name]))


@torch.no_grad()
def fill(tensor: Tensor, saved: Weights, name: str) -> None:
    """Give it the values of the saved one, or of those its share, which is all that is read."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(saved[name])
        return
    own = tensor.to_local()
    if len(own):
        mesh, place = tensor.device_mesh, tensor.device_mesh.get_coordinate()
        assert place is not None
        first = place[-1] * -(-tensor.shape[0] // mesh.shape[-1])  # rows are dealt as by torch.chunk
        own.copy_(saved.rows(name, first, first + len(own)))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
