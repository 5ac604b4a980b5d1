"""AdamW in its three forms, with clipping and, for fp16, loss scaling."""

import math
from typing import Any

import torch
from torch import Tensor

from finetune_api.types import Training
from finetune_jobs.training.model import Policy


class Optimizer:
    """Over the trainable parameters of a policy; the learning rate is given with each step."""

    def __init__(self, policy: Policy, training: Training) -> None:
        # As everywhere: biases and norms are not pulled towards 0.
        matrices = [p for p in policy.trainable if p.dim() >= 2]
        others = [p for p in policy.trainable if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._parameters = policy.trainable
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
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm))
        if not math.isfinite(norm) and not self._scaler.is_enabled():
            return None
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._scaler.step(self._adam)
        self._scaler.update()
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on besides the weights and their gradients."""
        return {"adam": self._adam.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self._adam.load_state_dict(state["adam"])
        self._scaler.load_state_dict(state["scaler"])


def _adam(groups: list[dict[str, Any]], name: str) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    eight_bit: Any = {"adamw8bit": AdamW8bit, "pagedAdamw8bit": PagedAdamW8bit}[name]
    optimizer: torch.optim.Optimizer = eight_bit(groups, lr=0.0)
    return optimizer
