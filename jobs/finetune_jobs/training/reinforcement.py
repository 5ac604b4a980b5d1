"""Reinforcement learning, step by step: answer some prompts, be rewarded, learn from that.

What a step needs of ppo, grpo or rloo stands in their own files, as functions of the ``Rollouts`` that are made here.
Every process answers its share of the prompts and scores its share of the answers; then all know all of them. What is
drawn at random follows from the step's number (``rollout.py``), so a run that was interrupted ends with the same
weights as one that was not.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from finetune_jobs.data.encode import stop_ids
from finetune_jobs.run.context import Context
from finetune_jobs.training.collators import Example, Layout, MicroBatch, Tokens, collate
from finetune_jobs.training.distributed import Peers
from finetune_jobs.training.losses import answer_logits
from finetune_jobs.training.model import Policy
from finetune_jobs.training.rollout import Floats, Rollouts, draws, sample
from finetune_jobs.training.schedule import Schedule
from finetune_jobs.training.scoring import Answer, Prompt, Reward
from finetune_jobs.training.trainer import Settings, Trainer, seed_everything

_KL = "klCoefficient"
_TOLD = ("reward", "kl", "length")
"""Figures that progress shows beside the loss."""


class Algorithm(Protocol):
    """What is made of a step's answers. Losses are sums over tokens, which the caller divides by ``weight``."""

    @property
    def epochs(self) -> int:
        """Updates on the answers of a step."""

    @property
    def critic(self) -> bool:
        """Whether values are learned, by a head on the policy's hidden states."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the figures that ``loss`` returns."""

    def targets(self, rollouts: Rollouts, kl: float) -> dict[str, Floats]:
        """By name, (answers, tokens): what the loss of a token is computed from. ``kl``: price of a nat."""

    def weight(self, rollouts: Rollouts) -> float:
        """What the loss is a mean over."""

    def loss(self, log_probs: Tensor, values: Tensor, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Over some tokens the sum of the loss and the sums of the ``metrics``, (m,)."""

    def next_kl(self, kl: float, measured: float) -> float:
        """The price of a nat in the next step, when answers were ``measured`` nats away in this one."""


@dataclass(frozen=True)
class Sampling:
    """How prompts are answered."""

    max_new_tokens: int
    temperature: float
    per_prompt: int


@dataclass(frozen=True)
class _Step:
    """Answers as the model reads them again, what is known of them, and their figures."""

    examples: list[Example]
    rollouts: Rollouts
    figures: dict[str, float]


class Reinforcement(Trainer):
    """A run over a set of prompts."""

    def __init__(
        self,
        ctx: Context,
        settings: Settings,
        policy: Policy,
        algorithm: Algorithm,
        prompts: Mapping[str, Sequence[Prompt]],
        rewards: Sequence[Reward],
        sampling: Sampling,
        kl: float,
        tokenizer: PreTrainedTokenizerBase,
        schedule: Schedule,
        layout: Layout,
        peers: Peers,
    ) -> None:
        """``prompts``: those of ``train`` and ``eval``; ``kl``: price of a nat at the first step."""
        counts = {name: len(some) for name, some in prompts.items()}
        super().__init__(ctx, settings, policy, schedule, layout, peers, counts, {})
        self.algorithm, self.prompts, self.rewards, self.sampling = algorithm, prompts, rewards, sampling
        self.kl, self.tokenizer = kl, tokenizer
        # The reference is the model as it is now, before any checkpoint is put into it.
        self._incoming = [p.detach().clone() for p in _own(policy)]

    def step(self) -> None:
        """Answer, be rewarded, learn. A stop drops it before the first update; from there on it is finished."""
        started = time.monotonic()
        state, algorithm = self.state, self.algorithm
        kl = state.carried.get(_KL, self.kl)
        chosen = [(i, self.prompts["train"][i]) for i in self.schedule.batch(state.step)]
        asked = [(prompt, f"{state.step}/{i}/{n}") for i, prompt in chosen for n in range(self.sampling.per_prompt)]
        seen = self._roll(asked, self.sampling.per_prompt)
        if seen is None:
            self.told_to_stop = True
            return
        targets = {
            name: torch.from_numpy(found).float() for name, found in algorithm.targets(seen.rollouts, kl).items()
        }
        sums, norms = np.zeros(1 + len(algorithm.metrics)), []
        weight = algorithm.weight(seen.rollouts)
        seed_everything(self.settings.seed, state.step, self.peers.rank)
        for _ in range(algorithm.epochs):
            loss = self._learn(seen, targets, weight)
            sums += loss / algorithm.epochs
            norms.append(self.update())
        means = dict(zip(("loss", *algorithm.metrics), map(float, sums / weight), strict=True))
        state.carried[_KL] = algorithm.next_kl(kl, seen.figures["kl"])
        figures = {**means, **seen.figures, _KL: kl}
        tokens = sum(e.tokens for e in seen.examples)
        told = {name: figures[name] for name in _TOLD}
        self.note(figures, len(asked), norms[-1], tokens, time.monotonic() - started, told)
        self.told_to_stop = self.peers.any(self.ctx.stop.requested)

    def evaluate(self) -> None:
        """The reward of an answer to each prompt that is held out, less the price of its divergence: what is learned to
        get more of. Always drawn with the same numbers, so that two evaluations differ by the policy alone.
        """
        started = time.monotonic()
        seen = self._roll([(prompt, f"eval/{i}") for i, prompt in enumerate(self.prompts["eval"])], 1)
        if seen is None:
            self.told_to_stop = True
            return
        loss = self.kl * seen.figures["kl"] - seen.figures["reward"]
        watched = {f"eval/{name}": value for name, value in seen.figures.items()}
        self.judge({"evalLoss": loss, **watched}, time.monotonic() - started)

    def _learn(self, seen: _Step, targets: Mapping[str, Tensor], weight: float) -> Floats:
        """Add the gradients of one pass over the answers, and give the sums of loss and metrics."""
        self.policy.model.train()
        sums = torch.zeros(1 + len(self.algorithm.metrics), dtype=torch.float64)
        for group, batch in self._groups(seen.examples):
            log_probs, values = token_figures(self.policy, batch, self.sampling.temperature)
            places = torch.from_numpy(seen.rollouts.mask[group])
            tokens = {name: found[group][places].to(log_probs.device) for name, found in targets.items()}
            loss, metrics = self.algorithm.loss(log_probs, values, tokens)
            self.optimizer.backward(loss / weight)
            sums += torch.cat([loss.detach().reshape(1), metrics]).double().cpu()
        added = self.peers.sum(sums.numpy())
        if not math.isfinite(added[0]):
            raise self.not_a_number("loss", added[0])
        return added

    def _roll(self, asked: Sequence[tuple[Prompt, str]], per_prompt: int) -> _Step | None:
        """Answer, score and read again; None when told to stop meanwhile. The text by a prompt names its draws."""
        answers = self._answers(asked)
        if answers is None:
            return None
        scores = self._scores(answers)
        examples = [_example(answer) for answer in answers]
        width = max(len(answer.ids) for answer in answers)
        mask = np.arange(width) < np.array([[len(answer.ids)] for answer in answers])
        log_probs, values = self._read(examples, mask)
        with self._reference():
            reference, _ = self._read(examples, mask)
        if self.peers.any(self.ctx.stop.requested):
            return None
        total: Floats = scores @ np.array([reward.weight for reward in self.rewards])
        rollouts = Rollouts(mask, log_probs, reference, values, total, per_prompt)
        stops = set(stop_ids(self.tokenizer))
        figures = {
            "reward": float(total.mean()),
            **{f"rewards/{r.name}": float(scores[:, n].mean()) for n, r in enumerate(self.rewards)},
            "kl": float(rollouts.kl.mean()),
            "length": float(mask.sum(1).mean()),
            "finished": float(np.mean([answer.ids[-1] in stops for answer in answers])),
        }
        return _Step(examples, rollouts, figures)

    def _answers(self, asked: Sequence[tuple[Prompt, str]]) -> list[Answer] | None:
        sampling, own = self.sampling, range(self.peers.rank, len(asked), self.peers.size)
        uniform = np.array([draws(self.settings.seed, asked[i][1], sampling.max_new_tokens) for i in own])
        stops = stop_ids(self.tokenizer)
        prompts = [asked[i][0].ids for i in own]
        given = sample(self.policy, prompts, uniform, sampling.temperature, stops, self.ctx.stop) if prompts else []
        ids = np.zeros((len(asked), sampling.max_new_tokens))
        for i, answer in zip(own, given, strict=True):
            ids[i, : len(answer)] = np.array(answer) + 1  # 0 where there is no token
        ids = self.peers.sum(ids)
        if self.peers.any(self.ctx.stop.requested):
            return None
        found = [[int(token) - 1 for token in row[row > 0]] for row in ids]
        decode: Callable[..., str | list[str]] = self.tokenizer.decode
        texts = [str(decode(f, skip_special_tokens=True, clean_up_tokenization_spaces=False)) for f in found]
        longest = sampling.max_new_tokens
        return [Answer(p, f, text, longest) for (p, _), f, text in zip(asked, found, texts, strict=True)]

    def _scores(self, answers: Sequence[Answer]) -> Floats:
        """(answers, rewards) not yet weighted."""
        own = range(self.peers.rank, len(answers), self.peers.size)
        scores = np.zeros((len(answers), len(self.rewards)))
        for n, reward in enumerate(self.rewards):
            scores[list(own), n] = reward.score([answers[i] for i in own], self.ctx.stop)
        return self.peers.sum(scores)

    def _read(self, examples: Sequence[Example], mask: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """(answers, tokens) log-probabilities and values under the model as it is.

        As in training, gradients included though nobody asks for them: it must be the very same arithmetic.
        """
        self.policy.model.train()
        found = np.zeros((2, *mask.shape))
        for group, batch in self._groups(examples):
            if self.ctx.stop.requested:
                break
            # Detached at once: what is kept for a way back would still be there in the next pass.
            figures = torch.stack(token_figures(self.policy, batch, self.sampling.temperature)).detach()
            rows = np.zeros((2, len(group), mask.shape[1]))
            rows[:, mask[group]] = figures.double().cpu().numpy()
            found[:, group] = rows
        added = self.peers.sum(found)
        return added[0], added[1]

    def _groups(self, examples: Sequence[Example]) -> Iterator[tuple[list[int], MicroBatch]]:
        for group in self.layout.split(examples, self.peers.rank, self.peers.size):
            yield group, collate([examples[i] for i in group], packed=self.layout.packed).to(self.policy.device)

    @contextmanager
    def _reference(self) -> Iterator[None]:
        """The incoming model, for as long as it lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for n, parameter in enumerate(_own(self.policy)):
            parameter.data, self._incoming[n] = self._incoming[n], parameter.data


def _own(policy: Policy) -> list[torch.nn.Parameter]:
    """What is trained of the model itself, without the critic."""
    return [p for p in policy.model.parameters() if p.requires_grad]


def _example(answer: Answer) -> Example:
    ids = np.asarray([*answer.prompt.ids, *answer.ids], np.int32)
    return Example((Tokens(ids, np.arange(len(ids)) >= len(answer.prompt.ids)),))


def token_figures(policy: Policy, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """(n,) log-probability of each token that counts, as it was sampled, and what is expected from there on; 0 without
    a critic.
    """
    hidden: list[Tensor] = []
    output: torch.nn.Module = policy.base.get_output_embeddings()  # type: ignore[no-untyped-call]
    hook = output.register_forward_pre_hook(lambda _, given: hidden.append(given[0]))
    try:
        logits = answer_logits(policy, batch)
    finally:
        hook.remove()
    states = hidden[-1]
    if states.dim() == 3:  # an architecture that knows no `logits_to_keep`
        states = states[batch.predicts]
    log_probs = -functional.cross_entropy(logits.float() / temperature, batch.targets, reduction="none")
    if policy.head is None:
        return log_probs, torch.zeros_like(log_probs)
    values: Tensor = policy.head(states.float()).squeeze(-1)
    return log_probs, values
