"""Did a preference stage succeed? On rows that it did not train on, and on the scores before and after it. Pure."""

from collections.abc import Mapping
from typing import Any

from finetune_api.defaults import resolve_beta
from finetune_api.pipeline import ModelRef, find, model_after, model_before, targets
from finetune_api.types import BASE, FineTuneJobSpec

Json = dict[str, Any]
LEAST_ACCURACY = 0.8
MOST_NATS = 1.0
"""By which the log-probability of chosen answers may fall: more, and the model forgets them too."""
MOST_FALL = 0.05
"""Of exactMatch."""
_WITH_REFERENCE = ("dpo", "ipo", "kto")


def held_out(spec: FineTuneJobSpec, log: Mapping[str, Any], scores: Mapping[str, Mapping[str, float]]) -> Json:
    """A preference stage at the step that is its result: how often the chosen answer is preferred (for kto: a reward is
    on its label's side), by how many nats its log-probability moved from the reference's, and whether all this is
    success; empty without held-out rows. What the job does not measure has no value.
    """
    at = next((e for e in log["evaluations"] if e["step"] == log["resultStep"]), None)
    preference = find(spec, log["stage"]).preference
    if at is None or preference is None or "eval/rewards/accuracies" not in at:
        return {}
    good = at.get("eval/rewards/desirable" if preference.loss == "kto" else "eval/rewards/chosen")
    compared = preference.loss in _WITH_REFERENCE and good is not None
    # A reward is beta times the change of the log-probability.
    moved = good / resolve_beta(preference) if compared else None
    before, after = _exact_match(spec, log["stage"], scores)
    fall = before - after if before is not None and after is not None else None
    accuracy = at["eval/rewards/accuracies"]
    return {
        "loss": preference.loss,
        "rewardAccuracy": accuracy,
        "rewardMargin": at.get("eval/rewards/margins"),
        "chosenLogProbChange": moved,
        "pairs": log["examples"]["eval"],
        "success": [
            _criterion("reward accuracy", accuracy, f"at least {LEAST_ACCURACY}", accuracy >= LEAST_ACCURACY),
            _criterion(
                "change of the chosen answers' log-probability, nats",
                moved,
                f"above -{MOST_NATS:g}",
                None if moved is None else moved > -MOST_NATS,
            ),
            _criterion("fall of exactMatch", fall, f"below {MOST_FALL}", None if fall is None else fall < MOST_FALL),
        ],
    }


def _criterion(name: str, value: float | None, bound: str, passed: bool | None) -> Json:
    return {"name": name, "value": value, "bound": bound, "passed": passed}


def _exact_match(
    spec: FineTuneJobSpec, stage: str, scores: Mapping[str, Mapping[str, float]]
) -> tuple[float | None, float | None]:
    """Of the model that came in and of the one that the stage left, where they, or merges of them, are scored."""

    def score(model: ModelRef) -> float | None:
        if model == ModelRef(BASE):
            return scores.get(BASE, {}).get("exactMatch")
        for target in targets(spec):
            merge = find(spec, target.stage).merge
            merged = merge is not None and not merge.adapters and model_before(spec, target.stage) == model
            if target.quantized is None and (merged or model_after(spec, target.stage) == model):
                return scores.get(target.name, {}).get("exactMatch")
        return None

    return score(model_before(spec, stage)), score(model_after(spec, stage))
