"""Answers that the policy gives while it learns, sampled so that they are the same however they are computed.

The token at a place is drawn with a number in [0, 1) that follows from the seed, the step, the prompt and the place
alone. So answers depend neither on who else is in the batch nor on the number of processes, and a resumed run samples
what the interrupted one would have.
"""

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetune_jobs.estimate.memory import CACHED_TOKENS
from finetune_jobs.padding import left_padded
from finetune_jobs.run.preemption import Stop
from finetune_jobs.training.model import Policy

Floats = npt.NDArray[np.float64]
_LOOK = 64
"""Tokens after which a stop is looked for."""
_CPU_TOKENS = 8_192
"""Places of the cache in one batch, rows times (longest prompt + longest answer), where more is no faster."""


@dataclass(frozen=True)
class Rollouts:
    """The answers of one step, those to the same prompt side by side. Arrays are (answers, longest answer)."""

    mask: npt.NDArray[np.bool_]
    """Where there is a token."""
    log_probs: Floats
    """Of the tokens under the policy that gave the answers; 0 where there is none."""
    reference: Floats
    """Under the model as it came in."""
    values: Floats
    """What was expected at each token; all 0 without a critic."""
    rewards: Floats
    """(answers,) the weighted sum."""
    per_prompt: int

    @property
    def kl(self) -> Floats:
        """(answers,) the log-ratio of policy and reference, whose mean estimates their divergence in nats an answer."""
        summed: Floats = (self.log_probs - self.reference).sum(1)
        return summed

    def by_prompt(self, values: Floats) -> Floats:
        """(answers,) as (prompts, answers to each)."""
        return values.reshape(-1, self.per_prompt)


def draws(seed: int, purpose: str, tokens: int) -> Floats:
    """(tokens,) uniform in [0, 1), always the same for the same words."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:16])
    return np.random.Generator(np.random.Philox(key=key)).random(tokens)


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    uniform: Floats,
    temperature: float,
    stops: Sequence[int],
    stop: Stop,
) -> list[list[int]]:
    """An answer to each prompt, its stop token included; at most ``uniform.shape[1]`` tokens.

    ``uniform``: (prompts, tokens) numbers to draw with. Told to stop, those not yet given are empty.
    """
    policy.model.eval()
    answers: list[list[int]] = [[] for _ in prompts]
    for batch in _batches(prompts, uniform.shape[1], policy.device):
        if stop.requested:
            break
        found = _sample([prompts[i] for i in batch], uniform[batch], policy, temperature, set(stops), stop)
        for i, answer in zip(batch, found, strict=True):
            answers[i] = answer
    return answers


def _batches(prompts: Sequence[Sequence[int]], tokens: int, device: torch.device) -> list[list[int]]:
    """Prompts of like length together, as many as the cache may hold."""
    places = _CPU_TOKENS if device.type == "cpu" else CACHED_TOKENS
    found: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i)):
        room = places // (len(prompts[i]) + tokens)
        if found and len(found[-1]) < room:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def _sample(
    prompts: list[Sequence[int]], uniform: Floats, policy: Policy, temperature: float, stops: set[int], stop: Stop
) -> list[list[int]]:
    device = policy.device
    ids, mask, positions = left_padded(prompts, device)
    numbers = torch.from_numpy(uniform).to(device)
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(policy.base.forward).parameters else {}
    answers: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    cache: Any = None
    for place in range(uniform.shape[1]):
        if place % _LOOK == _LOOK - 1 and stop.requested:
            return [[] for _ in prompts]
        with policy.autocast():
            output = policy.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **only_last,
            )
        cache = output.past_key_values
        tokens = choose(output.logits[:, -1], numbers[active, place], temperature)
        for i, token in zip(active, tokens.tolist(), strict=True):
            answers[i].append(token)
        going = [row for row, token in enumerate(tokens.tolist()) if token not in stops]
        if not going:
            break
        if len(going) < len(active):  # rows that are done cost nothing more
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            active = [active[row] for row in going]
            mask, positions, tokens = mask[kept], positions[kept], tokens[kept]
        ids = tokens[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    return answers


def choose(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """(rows,) the first token at which the cumulated probability exceeds the row's number."""
    probabilities = (logits.double() / temperature).softmax(-1).cumsum(-1)
    # Rounding may leave the last sum below 1.
    tokens = (probabilities <= uniform[:, None]).sum(-1).clamp(max=logits.shape[-1] - 1)
    return tokens
