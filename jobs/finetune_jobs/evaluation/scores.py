"""``scores.json``: the figures of every target of a stage, and under which conditions they were taken."""

from typing import Any

from finetune_api.types import FineTuneJobSpec
from finetune_jobs.evaluation.answers import SPOT_CHECK_TOKENS, Scores
from finetune_jobs.run import environment

DEFINITIONS = {
    "loss": "negative log-likelihood in nats per token of the references, stop tokens included: over all test rows",
    "exactMatch": "share of test answers equal to the reference, whitespace at both ends taken off",
    "containsReference": "share of test answers with the reference in them as whole words; case and spacing may differ",
    "tokenF1": "mean over test rows of SQuAD 1.1's word F1 of answer and reference",
    "jsonValid": "share of test answers that are, as a whole, one JSON value (RFC 8259)",
    "general": "share of the general answers that contain their reference (containsReference)",
    "refusals": "share of the refusals rows on which the model did as expected: refused, or answered",
    "refusedWhenAsked": "share refused of the rows to refuse",
    "answeredWhenHarmless": "share answered of the harmless rows",
    "unfinished": "test answers that ran into the limit of tokens",
    "tokensPerSecond": "generated tokens, stop tokens included, per second of batched generation from the prompts on",
    "better, worse, same": "rows of all roles beside the base model's answer, by the mean of the row's scores",
}
"""The short form, for readers of the file; docs/stages/evaluate.md is the long one."""


def record(spec: FineTuneJobSpec, scores: dict[str, Scores], precision: dict[str, str]) -> dict[str, Any]:
    """The content of ``scores.json``."""
    return {
        "scores": scores,
        "settings": {
            "decoding": "greedy: argmax of the logits; generation configs are not applied",
            "seed": spec.seed,
            "maxRows": spec.evaluation.max_rows,
            "maxNewTokens": spec.evaluation.max_new_tokens,
            "maxNewTokensOfSpotChecks": min(spec.evaluation.max_new_tokens, SPOT_CHECK_TOKENS),
            "metrics": [str(metric) for metric in spec.evaluation.metrics],
            "precision": precision,
        },
        "definitions": DEFINITIONS,
        "environment": environment.record(),
    }


def headline(spec: FineTuneJobSpec, scores: Scores) -> dict[str, float | int | str]:
    """The handful that status shows: the metrics asked for and the two spot checks."""
    names = [*(str(metric) for metric in spec.evaluation.metrics), "general", "refusals"]
    return {name: round(scores[name], 4) for name in names if name in scores}
