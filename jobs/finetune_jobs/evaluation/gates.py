"""What the finished models must reach: ``spec.evaluation.gates`` against the figures. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from finetune_api.pipeline import ModelRef, Target, model_after
from finetune_api.types import BASE, FineTuneJobSpec, Metric
from finetune_jobs.evaluation.answers import Scores

_ROUNDING = 1e-9
"""1 - 0.95 is more than 0.05 in floating point; a fall by exactly the bound passes."""


@dataclass(frozen=True)
class Gate:
    """One bound and how a target stands to it."""

    gate: str
    """``minScore.exactMatch``, ``maxRegression.general``, ``maxGGUFDivergence``."""
    target: str
    value: float | None
    """None: was not measured, which fails."""
    bound: float
    passed: bool

    @property
    def name(self) -> str:
        """For one line: ``minScore.exactMatch of gguf/Q4_K_M``."""
        return f"{self.gate} of {self.target}"


def judge(
    spec: FineTuneJobSpec, tuned: Sequence[Target], scores: Mapping[str, Scores], divergence: Mapping[str, float]
) -> list[Gate]:
    """Every gate of the spec for every tuned target, and for GGUFs of the base the one that is not about tuning.

    ``divergence``: mean KL divergence of each GGUF, in nats.
    """
    own = [target for target in tuned if model_after(spec, target.stage) != ModelRef(BASE)]
    return [*_min_score(spec, own, scores), *_regression(spec, own, scores), *_divergence(spec, tuned, divergence)]


def _min_score(spec: FineTuneJobSpec, tuned: Sequence[Target], scores: Mapping[str, Scores]) -> Iterator[Gate]:
    for metric, bound in spec.evaluation.gates.min_score.items():
        for target in tuned:
            value = scores[target.name].get(metric)
            # A loss is good when it is small: there the bound is the highest.
            gap = None if value is None else (bound - value if metric is Metric.LOSS else value - bound)
            passed = gap is not None and gap >= -_ROUNDING
            yield Gate(f"minScore.{metric}", target.name, value, bound, passed)


def _regression(spec: FineTuneJobSpec, tuned: Sequence[Target], scores: Mapping[str, Scores]) -> Iterator[Gate]:
    bound = spec.evaluation.gates.max_regression
    for role in ("general", "refusals"):
        before = scores[BASE].get(role)
        if before is None:  # the job has no such rows
            continue
        for target in tuned:
            after = scores[target.name].get(role)
            fall = None if after is None else before - after
            passed = fall is not None and fall <= bound + _ROUNDING
            yield Gate(f"maxRegression.{role}", target.name, fall, bound, passed)


def _divergence(spec: FineTuneJobSpec, tuned: Sequence[Target], divergence: Mapping[str, float]) -> Iterator[Gate]:
    for target in tuned:
        bound = spec.evaluation.gates.max_gguf_divergence.get(target.gguf or "")
        if bound is not None:
            value = divergence.get(target.name)
            yield Gate("maxGGUFDivergence", target.name, value, bound, value is not None and value <= bound)
