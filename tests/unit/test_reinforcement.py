import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.types import BuiltinReward
from finetune_jobs.training import scoring
from finetune_jobs.training.grpo import GRPO, group_advantages
from finetune_jobs.training.ppo import PPO, VALUE_COEFFICIENT, estimate_advantages, token_rewards, whiten
from finetune_jobs.training.rloo import RLOO, leave_one_out
from finetune_jobs.training.rollout import Floats, Rollouts, choose, draws

MASK = np.array([[True, True, True], [True, True, False]])


def rollouts(per_prompt: int = 2, rewards: tuple[float, ...] = (1.0, -20.0), **changed: Floats) -> Rollouts:
    """Two answers of three and of two tokens."""
    found = {
        "log_probs": np.array([[-1.0, -2.0, -0.5], [-3.0, -1.0, 0.0]]),
        "reference": np.array([[-1.5, -1.0, -0.5], [-2.0, -1.0, 0.0]]),
        "values": np.array([[0.5, 1.0, -1.0], [0.25, 2.0, 0.0]]),
        **changed,
    }
    return Rollouts(MASK, found["log_probs"], found["reference"], found["values"], np.array(rewards), per_prompt)


def tensors(targets: dict[str, Floats]) -> dict[str, torch.Tensor]:
    """Of the tokens that are there, in order."""
    return {name: torch.from_numpy(found[MASK]) for name, found in targets.items()}


def test_a_token_pays_for_its_log_ratio_and_the_last_one_has_the_answers_reward() -> None:
    """By hand, at 0.1 a nat; the second answer's reward is cut to -10."""
    expected = [[-0.05, 0.1, 0.0 + 1.0], [0.1, -0.0 - 10.0, 0.0]]
    assert token_rewards(rollouts(), 0.1, 10.0) == pytest.approx(np.array(expected))


def test_advantages_by_hand() -> None:
    """gamma 0.9, lambda 0.8: deltas first, then their discounted sum; after the last token there is no value."""
    rewards = np.array([[0.0, 0.5, 1.0], [-1.0, 2.0, 0.0]])
    deltas = [
        [0.0 + 0.9 * 1.0 - 0.5, 0.5 + 0.9 * -1.0 - 1.0, 1.0 - -1.0],
        [-1.0 + 0.9 * 2.0 - 0.25, 2.0 - 2.0],
    ]
    a2 = deltas[0][2]
    a1 = deltas[0][1] + 0.72 * a2
    first = [deltas[0][0] + 0.72 * a1, a1, a2]
    second = [deltas[1][0] + 0.72 * deltas[1][1], deltas[1][1], 0.0]
    found = estimate_advantages(rewards, rollouts().values, MASK, 0.9, 0.8)
    assert found == pytest.approx(np.array([first, second]))


@given(st.lists(st.floats(-5, 5), min_size=6, max_size=6), st.lists(st.floats(-5, 5), min_size=6, max_size=6))
def test_with_lambda_1_the_returns_are_the_rewards_still_to_come(rewards: list[float], values: list[float]) -> None:
    """Whatever the values say: advantage plus value is the sum of the rewards from the token on."""
    given_rewards = np.array(rewards).reshape(2, 3) * MASK
    held = np.array(values).reshape(2, 3) * MASK
    advantages = estimate_advantages(given_rewards, held, MASK, 1.0, 1.0)
    to_come = np.flip(np.cumsum(np.flip(given_rewards, 1), 1), 1)
    assert (advantages + held)[MASK] == pytest.approx(to_come[MASK], abs=1e-9)


def test_whitened_advantages_have_mean_0_and_variance_1() -> None:
    """Over the tokens that are there; the others stay 0."""
    whitened = whiten(np.array([[1.0, 2.0, 6.0], [3.0, -2.0, 99.0]]), MASK)
    assert whitened[MASK] == pytest.approx(np.array([-1.0, 0.0, 4.0, 1.0, -4.0]) / math.sqrt(34 / 5), rel=1e-6)
    assert whitened[1, 2] == 0


def test_ppo_targets_by_hand() -> None:
    """At lambda 1 returns are the rewards to come, and what is whitened is their surplus over the values."""
    targets = PPO(lam=1.0).targets(rollouts(rewards=(1.0, 2.0)), 0.1)
    returns = np.array([[1.05, 1.1, 1.0], [2.1, 2.0, 0.0]])
    assert targets["returns"][MASK] == pytest.approx(returns[MASK])
    assert targets["advantages"] == pytest.approx(whiten(returns - rollouts().values, MASK))


def test_ppo_losses_by_hand() -> None:
    """Ratios 1.5, 1.5, 0.5, 0.5, 1: whatever has moved too far in the wished direction has no gradient any more."""
    ratios, advantages = np.array([1.5, 1.5, 0.5, 0.5, 1.0]), np.array([1.0, -1.0, 1.0, -1.0, 2.0])
    old = np.log(np.array([0.2, 0.2, 0.4, 0.4, 0.3]))
    tokens = {
        "log_probs": torch.from_numpy(old),
        "advantages": torch.from_numpy(advantages),
        "values": torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]).double(),
        "returns": torch.tensor([1.0, 1.0, -1.0, 1.0, 3.0]).double(),
    }
    log_probs = torch.from_numpy(old + np.log(ratios)).requires_grad_()
    values = torch.tensor([0.1, 0.5, 0.5, 1.5, 2.5]).double().requires_grad_()
    loss, metrics = PPO().loss(log_probs, values, tokens)
    policy = -1.2 + 1.5 - 0.5 + 0.8 - 2.0
    value = 0.5 * (0.9**2 + max(0.5**2, 0.8**2) + max(1.5**2, 1.2**2) + max(0.5**2, 0.2**2) + max(0.5**2, 1.8**2))
    assert loss.item() == pytest.approx(policy + VALUE_COEFFICIENT * value)
    assert metrics.tolist() == pytest.approx([policy, value, 2.0])
    loss.backward()  # type: ignore[no-untyped-call]
    assert log_probs.grad is not None
    assert values.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0, -2.0])
    assert (values.grad / VALUE_COEFFICIENT).tolist() == pytest.approx([-0.9, 0.0, 1.5, 0.5, 0.0])


def test_the_price_of_a_nat_follows_the_divergence() -> None:
    """A tenth of the relative error, which counts for a fifth at most; without a target it stays."""
    controlled = PPO(kl_target=4.0)
    assert controlled.next_kl(0.05, 4.4) == pytest.approx(0.05 * 1.01)
    assert controlled.next_kl(0.05, 100.0) == pytest.approx(0.05 * 1.02)
    assert controlled.next_kl(0.05, 0.0) == pytest.approx(0.05 * 0.98)
    assert PPO().next_kl(0.05, 100.0) == 0.05


def test_grpo_by_hand() -> None:
    """Advantages in standard deviations of the group; the mean over answers of their means over tokens; k3."""
    seen = rollouts(rewards=(1.0, 3.0))
    deviation = math.sqrt(2)
    advantages = [-1 / (deviation + 1e-4), 1 / (deviation + 1e-4)]
    assert group_advantages(seen) == pytest.approx(np.array(advantages))
    algorithm = GRPO(kl=0.04)
    log_probs = torch.tensor([-1.0, -1.5, -0.5, -3.0, -1.3]).double()
    loss, metrics = algorithm.loss(log_probs, torch.zeros(5), tensors(algorithm.targets(seen, 0.0)))
    ratios = [1.0, math.exp(0.5), 1.0, 1.0, math.exp(-0.3)]
    terms = []
    for n, (ratio, reference, log_prob) in enumerate(
        zip(ratios, seen.reference[MASK], log_probs.tolist(), strict=True)
    ):
        advantage = advantages[0] if n < 3 else advantages[1]
        clipped = min(max(ratio, 0.8), 1.2)
        policy = -min(ratio * advantage, clipped * advantage)
        difference = reference - log_prob
        terms.append((policy, policy + 0.04 * (math.exp(difference) - difference - 1)))
    means = [sum(t[1] for t in terms[:3]) / 3, sum(t[1] for t in terms[3:]) / 2]
    assert loss.item() == pytest.approx(sum(means))
    assert metrics[0].item() == pytest.approx(sum(t[0] for t in terms[:3]) / 3 + sum(t[0] for t in terms[3:]) / 2)
    assert algorithm.weight(seen) == 2


def test_equal_answers_teach_grpo_nothing() -> None:
    """No reward above another, no gradient of it."""
    assert group_advantages(rollouts(rewards=(0.7, 0.7))).tolist() == [0.0, 0.0]


def test_rloo_by_hand() -> None:
    """An answer is compared with the mean of the others, each less the price of its log-ratio."""
    shape = (6, 3)
    log_probs, reference = np.zeros(shape), np.zeros(shape)
    log_probs[0], reference[0] = [-1.0, -2.0, -0.5], [-1.5, -1.0, -0.5]  # log-ratio -0.5
    seen = Rollouts(np.ones(shape, bool), log_probs, reference, np.zeros(shape), np.array([1.0, 2, 3, 0, 0, 6]), 3)
    first, second, third = 1.0 + 0.1 * 0.5, 2.0, 3.0
    expected = [
        first - (second + third) / 2,
        second - (first + third) / 2,
        third - (first + second) / 2,
        *(0 - 3.0, 0 - 3.0, 6.0 - 0),
    ]
    assert leave_one_out(seen, 0.1) == pytest.approx(np.array(expected))
    two = rollouts(rewards=(1.0, 3.0))
    targets = tensors(RLOO().targets(two, 0.0))
    loss, _ = RLOO().loss(torch.from_numpy(two.log_probs[MASK]), torch.zeros(5), targets)
    assert loss.item() == pytest.approx(-(-2.0 * -3.5 + 2.0 * -4.0))


def test_leave_one_out_adds_up_to_nothing() -> None:
    """Over the answers to a prompt, whatever they are worth: so no prompt is preferred to another."""
    found = leave_one_out(rollouts(rewards=(5.0, -7.0)), 0.3)
    assert found.sum() == pytest.approx(0.0)


def test_a_token_is_chosen_as_often_as_it_is_likely() -> None:
    """The numbers from 0 to 1 are shared among the tokens by their probability at the temperature."""
    logits = torch.tensor([0.0, math.log(3.0), -1e9, math.log(4.0)]).repeat(1000, 1)
    numbers = torch.linspace(0, 1, 1001)[:-1].double()
    assert torch.bincount(choose(logits, numbers, 1.0), minlength=4).tolist() == pytest.approx(
        [125, 375, 0, 500], abs=1
    )
    cooler = np.array([1.0, 9.0, 0.0, 16.0])
    counts = torch.bincount(choose(logits, numbers, 0.5), minlength=4).numpy()
    assert counts == pytest.approx(1000 * cooler / cooler.sum(), abs=1)


def test_draws_follow_from_their_name() -> None:
    """The same for the same seed and name, others for others, evenly spread."""
    assert draws(1, "3/7/0", 5).tolist() == draws(1, "3/7/0", 9)[:5].tolist()
    assert len({draws(seed, name, 1)[0] for seed in (1, 2) for name in ("3/7/0", "3/7/1", "eval/7")}) == 6
    assert np.histogram(draws(1, "many", 10_000), bins=10, range=(0, 1))[0] == pytest.approx(1000, abs=150)


@pytest.mark.parametrize(
    ("which", "text", "tokens", "expected"),
    [
        ("exactMatch", " 42\n", 2, 1.0),
        ("exactMatch", "42.", 2, 0.0),
        ("jsonValid", '{"a": [1]}', 5, 1.0),
        ("jsonValid", "{a: 1}", 5, 0.0),
        ("length", "whatever", 6, 0.75),
    ],
)
def test_built_in_rewards(which: str, text: str, tokens: int, expected: float) -> None:
    """Each from 0 to 1, of the answer's text or its number of tokens."""
    answer = scoring.Answer(scoring.Prompt([1], "42"), [0] * tokens, text, 8)
    assert scoring.BUILTIN[BuiltinReward(which)](answer) == expected
