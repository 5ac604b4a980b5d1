"""What came of reward models and of reinforcement learning, on rows that they did not learn from. Pure."""

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]


def accuracy(log: Mapping[str, Any]) -> Json:
    """A reward stage at the step that is its result: how often it scores the chosen answer of a held-out pair higher,
    and by how much; empty without such pairs.
    """
    at = _result(log)
    if not at:
        return {}
    return {
        "accuracy": at["eval/rewards/accuracies"],
        "margin": at["eval/rewards/margins"],
        "pairs": log["examples"]["eval"],
    }


def change(log: Mapping[str, Any]) -> Json:
    """An rl stage: rewards, divergence and length of the answers in its first step and at the step that is its result,
    there on held-out prompts if there are any.
    """
    curve = log["curve"]
    at = _result(log)
    held_out = {name.removeprefix("eval/"): value for name, value in at.items() if name.startswith("eval/")}
    last = held_out or next((p for p in curve if p["step"] == log["resultStep"]), curve[-1])
    return {
        "before": _shown(curve[0]),
        "after": _shown(last),
        "prompts": log["examples"]["eval"] if held_out else log["examples"]["train"],
        "heldOut": bool(held_out),
    }


def _result(log: Mapping[str, Any]) -> Mapping[str, float]:
    return next((e for e in log["evaluations"] if e["step"] == log["resultStep"]), {})


def _shown(point: Mapping[str, float]) -> dict[str, float]:
    names = [name for name in point if name in ("reward", "kl", "length") or name.startswith("rewards/")]
    return {name: point[name] for name in names}
