"""Quantization-aware training: the model answers with the weights that a GGUF would have, and learns its own.

Between updates every weight holds what llama.cpp would keep of it (``rounding.py``); its own numbers lie beside it, and
are what gradients change: the straight-through estimator (arXiv:1308.3432, arXiv:1712.05877). Under an adapter it is
base and adapter together that are rounded, W + s B A, as the merged file will have them: first to bfloat16, as merge
writes them. Each tensor gets the type that llama.cpp would give it in a file of the type that is trained for.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune_api.types import GGUFType
from finetune_jobs import estimate
from finetune_jobs.run.errors import ConfigurationError
from finetune_jobs.training.adapters import TRAINED
from finetune_jobs.training.rounding import rounded

_MERGED = "BF16"
"""What merge, and full training, write; all that becomes of norms and biases."""


@dataclass
class _Weight:
    """A weight that changes, in itself or by an adapter."""

    parameter: nn.Parameter
    own: Tensor
    """Its numbers before rounding; while they are lifted, the rounded ones."""
    kind: str
    layer: Any = None
    """PEFT's, where it has an adapter."""


class Rounding:
    """Keeps a model's weights rounded. A frozen weight without an adapter is rounded once and for all."""

    def __init__(self, network: PreTrainedModel, kind: GGUFType, field: str) -> None:
        """``network`` may have LoRA's layers in it. Raises ConfigurationError for an architecture whose tensors are not
        known; ``field`` is named then.
        """
        kinds = _tensor_types(network, kind, field)
        self.types = Counter(kinds.values())
        """Numbers of tensors by llama.cpp's types."""
        layers: list[Any] = [module for module in network.modules() if hasattr(module, "lora_A")]
        adapted = {id(layer.get_base_layer().weight): layer for layer in layers}
        self._weights: list[_Weight] = []
        for name, parameter in network.named_parameters():
            layer, kind_of = adapted.get(id(parameter)), kinds.get(name, _MERGED)
            if layer is not None or (parameter.requires_grad and ".lora_" not in name):
                self._weights.append(_Weight(parameter, parameter.data, kind_of, layer))
                parameter.data = torch.empty_like(parameter.data)
            elif not parameter.requires_grad:
                parameter.data = _as_stored(parameter.data, kind_of).to(parameter.dtype)
        for layer in adapted.values():
            layer.forward = partial(_straight_through, layer)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """The weights, or their adapters, have changed."""
        for weight in self._weights:
            moved = weight.own
            if (layer := weight.layer) is not None:
                a, b = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
                moved = torch.addmm(moved.float(), b, a, alpha=layer.scaling[TRAINED])
            weight.parameter.data.copy_(_as_stored(moved, weight.kind))

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Within, the weights are their own."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for weight in self._weights:
            weight.parameter.data, weight.own = weight.own, weight.parameter.data


def _straight_through(layer: Any, x: Tensor) -> Tensor:
    """The rounded layer's output. A and B get the gradients that they would have beside it, x those of the rounded
    weight alone, which the adapter is a part of.
    """
    a, b = layer.lora_A[TRAINED], layer.lora_B[TRAINED]
    moved = b(a(x.detach().to(a.weight.dtype))) * layer.scaling[TRAINED]
    output: Tensor = layer.get_base_layer()(x)
    output = output + (moved - moved.detach()).to(output.dtype)
    return output


def _as_stored(weight: Tensor, kind: str) -> Tensor:
    return rounded(weight.to(torch.bfloat16), kind)


def _tensor_types(network: PreTrainedModel, kind: GGUFType, field: str) -> dict[str, str]:
    """llama.cpp's types of the matrices, by the names of the parameters; norms and biases are not quantized."""
    try:
        model = estimate.read(network.config.get_text_config().to_dict())
    except ValueError as error:
        raise ConfigurationError(f"{field}: how llama.cpp would store the tensors is not known: {error}") from None
    linears = {linear.name: linear for linear in model.linears}
    found, blocks = {}, 0
    for name, parameter in network.named_parameters():
        *path, module, last = name.replace(".base_layer.", ".").split(".")
        if last != "weight" or parameter.dim() != 2:
            continue
        if module == "embed_tokens":
            found[name] = estimate.embedding_type(model, kind)
        elif module == "lm_head":
            found[name] = estimate.head_type(model, kind)
        elif module in linears:
            layer = next(int(part) for part in path if part.isdigit())
            found[name] = estimate.linear_type(model, kind, linears[module], layer)
            blocks += 1
    if blocks != model.layers * len(linears):
        raise ConfigurationError(
            f"{field}: of {model.layers * len(linears)} linear layers that llama.cpp would quantize, {blocks} are in "
            "the model under their names; leave it out"
        )
    return found
