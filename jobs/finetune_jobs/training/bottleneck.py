"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247): a small network
behind the attention and the MLP of every layer, before their outputs are added to the residual stream.

``h + W_up f(W_down h)`` with ``W_down`` from ``d`` to ``b = max(1, d // reductionFactor)`` numbers: ``2 d b + d + b``
parameters a place. It begins as the identity, for ``W_up`` begins as zero. ``load`` needs nothing but a transformers
model and this file.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from finetune_api.types import Bottleneck
from finetune_jobs.run.errors import ConfigurationError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TYPE = "BOTTLENECK"
_CHILD = "bottleneck"
"""Under which name an adapter is a child of the module that it stands behind."""
_MODULES = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe"),
}
"""How architectures call them; directly inside of a numbered layer."""
_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
_DEVIATION = 0.01
"""Of ``W_down`` at the start, cut at two deviations (arXiv:1902.00751, section 3.6)."""


class Adapter(nn.Module):
    """The network at one place, in float32 whatever the model is in."""

    def __init__(self, width: int, inner: int, non_linearity: str) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        self.function = _FUNCTIONS[non_linearity]
        nn.init.trunc_normal_(self.down.weight, std=_DEVIATION, a=-2 * _DEVIATION, b=2 * _DEVIATION)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., width) to the same, in the type of ``hidden``."""
        change: Tensor = self.up(self.function(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + change.to(hidden.dtype)


def inner_width(width: int, reduction_factor: int) -> int:
    """Numbers that a hidden state is squeezed into."""
    return max(1, width // reduction_factor)


def places(names: Iterable[str], placement: Iterable[str]) -> list[str]:
    """Those of a model's module ``names`` behind which an adapter stands, so many in every layer.

    Raises ConfigurationError, whose words begin with the field, for an architecture where one is not found.
    """
    names, found = list(names), []
    for where in placement:
        matched = [n for n in names if re.search(rf"(^|\.)\d+\.({'|'.join(_MODULES[where])})$", n)]
        if not matched:
            other = "mlp" if where == "attention" else "attention"
            raise ConfigurationError(
                f"bottleneck.placement: the model's layers have no {where} as a module of its own; "
                f"write [{other}], or `method: lora`"
            )
        found += matched
    return found


def add(model: nn.Module, settings: Bottleneck) -> None:
    """Put fresh adapters, drawn with torch's random numbers, into a transformers model, whose outputs stay the same.

    Raises ConfigurationError for an architecture whose attention or MLP is not found.
    """
    config: Any = model.config
    width = config.get_text_config().hidden_size
    for name in places((name for name, _ in model.named_modules()), settings.placement):
        module = model.get_submodule(name)
        # Drawn on the CPU, so that they are the same wherever the model is.
        adapter = Adapter(width, inner_width(width, settings.reduction_factor), settings.non_linearity)
        module.add_module(_CHILD, adapter.to(next(module.parameters()).device))
        module.register_forward_hook(_apply)


def _apply(module: nn.Module, _: object, output: Any) -> Any:
    """What the module gives, its first part changed by the adapter."""
    adapter = module.get_submodule(_CHILD)
    if isinstance(output, tuple):
        return (adapter(output[0]), *output[1:])
    return adapter(output)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of all adapters, by their names in the model; empty for a model without."""
    return {name: p for name, p in model.named_parameters() if f".{_CHILD}." in name}


def save(model: nn.Module, settings: Bottleneck, directory: Path, *, base: str) -> None:
    """The adapters in float32, with a config; ``base`` is how the world calls the model that they belong to."""
    directory.mkdir(parents=True)
    own = {name: p.detach().cpu().contiguous() for name, p in parameters(model).items()}
    save_file(own, directory / WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": TYPE, "base_model_name_or_path": base, **settings.model_dump(mode="json")}
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_settings(directory: Path) -> Bottleneck:
    """Of saved adapters."""
    config = json.loads((directory / CONFIG).read_text())
    return Bottleneck.model_validate({name: config[name] for name in Bottleneck.model_fields})


def load(model: nn.Module, directory: Path) -> Bottleneck:
    """Put what ``save`` left into a transformers model, and give its settings.

    Raises ConfigurationError for adapters of another model.
    """
    settings = read_settings(directory)
    add(model, settings)
    saved, own = load_file(directory / WEIGHTS), parameters(model)
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in own.items()}:
        raise ConfigurationError(f"{directory}: these bottleneck adapters are of another model; give them their own")
    for name, parameter in own.items():
        parameter.data.copy_(saved[name])
    return settings
