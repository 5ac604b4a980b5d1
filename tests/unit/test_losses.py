import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from finetune_jobs.training.collators import Example, MicroBatch, Tokens, collate
from finetune_jobs.training.losses.dpo import DPO
from finetune_jobs.training.losses.ipo import IPO
from finetune_jobs.training.losses.kto import KTO, mismatched
from finetune_jobs.training.losses.orpo import ORPO, log_odds
from finetune_jobs.training.losses.simpo import SimPO

LENGTHS = (2, 5, 3, 3, 7, 1)
"""Tokens of the answers: chosen and rejected by turns."""
RNG = np.random.default_rng(0)
TOKENS = [-RNG.exponential(0.7, length) for length in LENGTHS]
"""Their log-probabilities, token by token."""
REFERENCE = np.array([t.sum() for t in TOKENS]) + RNG.normal(0, 2, len(LENGTHS))
ANSWERS = np.array([t.sum() for t in TOKENS])
MEANS = np.array([t.mean() for t in TOKENS])
LABELS = (True, False, True, True, False, False)


def sequence(prompt: list[int], answer: list[int]) -> Tokens:
    """Of which only the answer counts."""
    return Tokens(np.array(prompt + answer, np.int32), np.arange(len(prompt + answer)) >= len(prompt))


def pairs() -> MicroBatch:
    """Three pairs."""
    answers = [sequence([1, 2], [3] * length) for length in LENGTHS]
    examples = [
        Example((answers[i], answers[i + 1]), reference=tuple(REFERENCE[i : i + 2])) for i in range(0, len(LENGTHS), 2)
    ]
    return collate(examples, packed=True)


def judged(kl: float = 0.0) -> MicroBatch:
    """The same answers, each for itself."""
    examples = [
        Example((sequence([1, 2], [3] * length),), reference=(REFERENCE[i],), desirable=LABELS[i])
        for i, length in enumerate(LENGTHS)
    ]
    return replace(collate(examples, packed=True), kl=kl)


def log_probs() -> torch.Tensor:
    """Of all tokens, as a leaf of the graph."""
    return torch.tensor(np.concatenate(TOKENS), dtype=torch.float64, requires_grad=True)


def log_sigmoid(x: float) -> float:
    """By its definition."""
    return math.log(1 / (1 + math.exp(-x)))


def each_pair(values: np.ndarray) -> list[tuple[float, float]]:
    """(chosen, rejected) of each pair."""
    return [(values[i], values[i + 1]) for i in range(0, len(values), 2)]


def odds_loss(chosen: float, rejected: float, beta: float) -> float:
    """ORPO's equations 2 to 7 with probabilities, not their logarithms."""
    (p, q) = math.exp(chosen), math.exp(rejected)
    ratio = (p / (1 - p)) / (q / (1 - q))
    return -chosen - beta * log_sigmoid(math.log(ratio))


RATIOS = each_pair(ANSWERS - REFERENCE)
PAIR_LOSSES: dict[str, tuple[Any, float]] = {
    "dpo": (DPO(0.3), sum(-log_sigmoid(0.3 * (c - r)) for c, r in RATIOS)),
    "cdpo": (
        DPO(0.3, 0.1),
        sum(-0.9 * log_sigmoid(0.3 * (c - r)) - 0.1 * log_sigmoid(0.3 * (r - c)) for c, r in RATIOS),
    ),
    "ipo": (IPO(0.2), sum((c - r - 2.5) ** 2 for c, r in RATIOS)),
    "simpo": (SimPO(2.0, 0.7), sum(-log_sigmoid(2 * c - 2 * r - 0.7) for c, r in each_pair(MEANS))),
    "orpo": (ORPO(0.4), sum(odds_loss(c, r, 0.4) for c, r in each_pair(MEANS))),
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_loss_of_pairs_is_its_paper_s(name: str) -> None:
    """The sum over the pairs, each by the paper's formula from the tokens' log-probabilities."""
    objective, expected = PAIR_LOSSES[name]
    loss, _ = objective.loss(log_probs(), pairs())
    assert loss.item() == pytest.approx(expected, rel=1e-6)


REWARDS: dict[str, np.ndarray] = {
    "dpo": 0.3 * (ANSWERS - REFERENCE),
    "ipo": 0.2 * (ANSWERS - REFERENCE),
    "simpo": 2 * MEANS,
    "orpo": 0.4 * (MEANS - np.log(1 - np.exp(MEANS))),
}


@pytest.mark.parametrize("name", REWARDS)
def test_metrics_of_pairs_follow_from_each_loss_s_rewards(name: str) -> None:
    """Sums over pairs; log-probabilities are of whole answers for every loss."""
    objective, _ = PAIR_LOSSES[name]
    _, sums = objective.loss(log_probs(), pairs())
    chosen, rejected = REWARDS[name][0::2], REWARDS[name][1::2]
    assert dict(zip(objective.metrics, sums.tolist(), strict=True)) == pytest.approx(
        {
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/accuracies": (chosen > rejected).sum(),
            "rewards/margins": (chosen - rejected).sum(),
            "logps/chosen": ANSWERS[0::2].sum(),
            "logps/rejected": ANSWERS[1::2].sum(),
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("name", ["dpo", "cdpo", "simpo", "orpo"])
def test_gradients_raise_the_chosen_and_lower_the_rejected_answer(name: str) -> None:
    """Every token of the one, every token of the other."""
    objective, _ = PAIR_LOSSES[name]
    given = log_probs()
    objective.loss(given, pairs())[0].backward()
    assert given.grad is not None
    chosen = np.repeat([i % 2 == 0 for i in range(len(LENGTHS))], LENGTHS)
    assert (given.grad.numpy()[chosen] < 0).all()
    assert (given.grad.numpy()[~chosen] > 0).all()


def test_ipo_draws_a_pair_back_that_went_too_far() -> None:
    """Beyond 1 / (2 beta) the gradient turns round: that is what keeps it from overfitting."""
    batch = replace(pairs(), reference=torch.tensor([-99.0, 0.0] * 3))
    given = log_probs()
    IPO(0.2).loss(given, batch)[0].backward()
    assert given.grad is not None
    assert given.grad[0] > 0
    assert given.grad[LENGTHS[0]] < 0


@pytest.mark.parametrize(("kl", "z0"), [(0.8, 0.8), (-0.5, 0.0)], ids=["estimate", "clamped"])
def test_kto_is_its_paper_s(kl: float, z0: float) -> None:
    """Weight less value of each answer, measured from the estimate, which is no less than 0."""
    objective = KTO(0.3, desirable_weight=1.5, undesirable_weight=0.5)
    given = log_probs()
    loss, sums = objective.loss(given, judged(kl))
    ratios = ANSWERS - REFERENCE
    expected = 0.0
    for ratio, good in zip(ratios, LABELS, strict=True):
        weight, margin = (1.5, ratio - z0) if good else (0.5, z0 - ratio)
        expected += weight - weight / (1 + math.exp(-0.3 * margin))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    means = dict(zip(objective.metrics, (sums / len(LENGTHS)).tolist(), strict=True))
    good = np.array(LABELS)
    right = np.where(good, ratios > z0, ratios < z0)
    assert objective.figures(means) == pytest.approx(
        {
            "kl": z0,
            "rewards/accuracies": right.mean(),
            "rewards/desirable": 0.3 * ratios[good].mean(),
            "rewards/undesirable": 0.3 * ratios[~good].mean(),
            "rewards/margins": 0.3 * (ratios[good].mean() - ratios[~good].mean()),
            "logps/desirable": ANSWERS[good].mean(),
            "logps/undesirable": ANSWERS[~good].mean(),
        },
        rel=1e-6,
    )
    loss.backward()
    assert given.grad is not None
    up = np.repeat(LABELS, LENGTHS)
    assert (given.grad.numpy()[up] < 0).all()
    assert (given.grad.numpy()[~up] > 0).all()


def test_kto_s_first_loss_is_half_the_mean_weight() -> None:
    """Where the policy is its reference."""
    batch = replace(judged(), reference=torch.tensor(ANSWERS, dtype=torch.float64))
    loss, _ = KTO(0.1, desirable_weight=3.0, undesirable_weight=2.0).loss(log_probs(), batch)
    assert loss.item() / len(LENGTHS) == pytest.approx(0.5 * np.where(LABELS, 3.0, 2.0).mean(), rel=1e-6)


def test_kto_shows_no_figure_of_answers_that_are_not_there() -> None:
    """A step of desirable answers only has no reward of undesirable ones."""
    means = dict.fromkeys(KTO(0.1).metrics, 1.0)
    assert KTO(0.1).figures(means).keys() == {"kl", "rewards/accuracies", "rewards/desirable", "logps/desirable"}


def answers(*prompts_and_lengths: tuple[int, int]) -> list[Example]:
    """Answers (all of tokens equal to their number from 100) to prompts of that one token."""
    return [Example((sequence([p, p], [100 + i] * n),)) for i, (p, n) in enumerate(prompts_and_lengths)]


def read(examples: list[Example]) -> list[tuple[int, list[int]]]:
    """(prompt, answer) of each."""
    return [(int(e.sequences[0].ids[0]), e.sequences[0].ids[e.sequences[0].supervised].tolist()) for e in examples]


MISMATCHES: dict[str, tuple[list[Example], list[tuple[int, list[int]]]]] = {
    "the next, and the first after the last": (
        answers((1, 1), (2, 2), (3, 2)),
        [(1, [101, 101]), (2, [102, 102]), (3, [100])],
    ),
    "not another answer to the same prompt": (
        answers((1, 1), (1, 1), (2, 1), (2, 1)),
        [(1, [102]), (1, [102]), (2, [100]), (2, [100])],
    ),
    "across the end": (answers((1, 1), (2, 1), (1, 1)), [(1, [101]), (2, [102]), (1, [101])]),
    "one prompt only": (answers((1, 1), (1, 1)), [(1, [101]), (1, [100])]),
    "no longer than the longest": (
        [Example((sequence([1] * 5, [100]),)), Example((sequence([2], [101] * 4),))],
        [(1, [101]), (2, [100])],
    ),
    "a single one": (answers((1, 3)), []),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatched_answers(name: str) -> None:
    """Each prompt with an answer to another one."""
    examples, expected = MISMATCHES[name]
    assert read(mismatched(examples)) == expected


def test_odds_of_a_certain_answer_are_finite() -> None:
    """A model that has learned an answer by heart has no infinite loss, nor a gradient that is no number."""
    given = torch.tensor([0.0, -1e-9, -50.0], requires_grad=True)
    odds = log_odds(given)
    odds.sum().backward()
    assert torch.isfinite(odds).all()
    assert given.grad is not None
    assert torch.isfinite(given.grad).all()


@pytest.mark.parametrize("probability", [0.5, 1e-4, 0.9999])
def test_odds(probability: float) -> None:
    """Against the definition."""
    assert log_odds(torch.tensor(math.log(probability), dtype=torch.float64)).item() == pytest.approx(
        math.log(probability / (1 - probability)), rel=1e-9
    )
