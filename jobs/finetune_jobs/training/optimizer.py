"""AdamW in its three forms, with clipping and, for fp16, loss scaling."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from finetune_api.types import Training
from finetune_jobs.merging.weights import Weights
from finetune_jobs.training import tensors
from finetune_jobs.training.model import Policy

_NUMBERS = "numbers.json"


class Optimizer:
    """Over the trainable parameters of a policy; the learning rate is given with each step."""

    def __init__(self, policy: Policy, training: Training) -> None:
        # As everywhere: biases and norms are not pulled towards 0.
        matrices = [p for p in policy.trainable if p.dim() >= 2]
        others = [p for p in policy.trainable if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._policy, self._parameters = policy, policy.trainable
        self._max_norm = training.max_grad_norm
        self._adam = _adam([g for g in groups if g["params"]], training.optimizer)
        self._scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.compute is torch.float16)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to what there is."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> float | None:
        """Clip, step, forget the gradients. The norm before clipping; None, and no step, where it is no number.

        With fp16 an infinite gradient is the scaler's business: it skips the step and lowers its scale.
        """
        self._scaler.unscale_(self._adam)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        if isinstance(total, DTensor):  # of what is shared, which is clipped by the norm of all of it
            total = total.full_tensor()
        torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_norm, total)
        norm = float(total)
        if not math.isfinite(norm) and not self._scaler.is_enabled():
            return None
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        with self._policy.own_weights():
            self._scaler.step(self._adam)
        self._policy.changed()
        self._scaler.update()
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._adam.zero_grad(set_to_none=True)

    @property
    def size_bytes(self) -> int:
        """Of its state in this process."""
        own = (t.to_local() if isinstance(t, DTensor) else t for _, t in _tensors(self._adam.state_dict()))
        return sum(t.numel() * t.itemsize for t in own)

    def save(self, directory: Path | None) -> None:
        """Write down all that the next step depends on besides the weights and their gradients, the same however it is
        shared. None: only help the process that writes (``Policy.divided``).
        """
        adam = self._adam.state_dict()
        tensors.save(dict(_tensors(adam)), directory)
        if directory is not None:
            rest = {"adam": _without_tensors(adam), "scaler": self._scaler.state_dict()}
            (directory / _NUMBERS).write_text(json.dumps(rest))

    def load(self, directory: Path) -> None:
        """Go on from what ``save`` wrote."""
        rest = json.loads((directory / _NUMBERS).read_text())
        adam = rest["adam"]
        adam["state"] = {int(number): state for number, state in adam["state"].items()}
        ordered = [p for group in self._adam.param_groups for p in group["params"]]
        saved = Weights(directory)
        for name, spec in saved.specs.items():
            *path, last = name.split("/")
            parameter = ordered[int(path[1])]
            if isinstance(parameter, DTensor) and spec.shape == parameter.shape:
                value: Tensor = torch.empty_like(parameter)
            else:
                value = torch.empty(spec.shape, dtype=spec.dtype, device=parameter.device)
            tensors.fill(value, saved, name)
            place: Any = adam["state"].setdefault(int(path[1]), {})
            for key in path[2:]:
                place = place.setdefault(key, {})
            place[last] = value
        self._adam.load_state_dict(adam)
        self._scaler.load_state_dict(rest["scaler"])


def _tensors(state: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All in a nested state, each under its path: ``state/3/exp_avg``."""
    for key, value in state.items():
        where = f"{path}/{key}" if path else str(key)
        if isinstance(value, Tensor):
            yield where, value
        elif isinstance(value, Mapping):
            yield from _tensors(value, where)


def _without_tensors(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The rest of it, which is numbers and words."""
    return {
        key: _without_tensors(value) if isinstance(value, Mapping) else value
        for key, value in state.items()
        if not isinstance(value, Tensor)
    }


def _adam(groups: list[dict[str, Any]], name: str) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    eight_bit: Any = {"adamw8bit": AdamW8bit, "pagedAdamw8bit": PagedAdamW8bit}[name]
    optimizer: torch.optim.Optimizer = eight_bit(groups, lr=0.0)
    return optimizer
