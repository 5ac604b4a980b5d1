"""Preference optimization: learn to prefer the chosen answers to the rejected ones, or desirable to undesirable ones.

The reference of dpo, ipo and kto is the model as it came in. Its log-probabilities are computed once, before the first
step, and kept with the checkpoints: no second model is held, and a resumed run compares with the same reference. orpo
and simpo have none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt

from finetune_api import types
from finetune_api.defaults import resolve_beta
from finetune_jobs.data.encode import encode_pairs
from finetune_jobs.data.labels import encode_answers
from finetune_jobs.run.context import Context, Outcome
from finetune_jobs.run.errors import ConfigurationError
from finetune_jobs.training import memory, schedule, session, snapshots
from finetune_jobs.training.collators import Example, judged, pair
from finetune_jobs.training.distributed import peer_errors
from finetune_jobs.training.limits import memory_errors
from finetune_jobs.training.loop import Loop, Sets
from finetune_jobs.training.losses import reference_log_probs
from finetune_jobs.training.losses.dpo import DPO
from finetune_jobs.training.losses.ipo import IPO
from finetune_jobs.training.losses.kto import KTO, mismatched
from finetune_jobs.training.losses.orpo import ORPO
from finetune_jobs.training.losses.simpo import SimPO
from finetune_jobs.training.model import Policy, disable_dropout
from finetune_jobs.training.schedule import Schedule

Reference = dict[str, npt.NDArray[np.float32]]


def run(ctx: Context) -> Outcome:
    """Train on the rows of ``preference``, watch those of ``preferenceEval``, and leave an adapter or a model."""
    assert ctx.stage is not None
    block = ctx.stage.preference
    assert block is not None
    if block.training.neftune_noise_alpha is not None:
        raise ConfigurationError(
            f"{session.path_of(ctx)}.training.neftuneNoiseAlpha: "
            "noise would be taken for a change against the reference; remove it"
        )
    begun = session.begin(ctx, block)
    settings = begun.settings
    train, evaluation = (_examples(begun, block, role) for role in ("preference", "preferenceEval"))
    session.check_sets(begun, train, evaluation)
    objective = objective_of(block)
    with memory_errors(settings.path), peer_errors():
        policy = session.load_policy(begun)
        disable_dropout(policy.model)  # like the noise, it would be taken for a change against the reference
        plan = memory.plan(policy, settings.training, train + evaluation, settings.path, begun.peers)
        steps = schedule.plan(len(train), settings.training, settings.seed)
        start = snapshots.start(ctx, settings.checkpoint.resume_from, begun.peers)
        reference: Reference = {}
        if not isinstance(objective, ORPO | SimPO):
            found = snapshots.read_extras(start) if start is not None else None
            reference = found or _reference(begun, policy, plan, block, train, evaluation, steps)
        sets = _sets(train, evaluation, steps, reference)
        loop = Loop(ctx, settings, policy, objective, sets, steps, plan.layout, begun.peers)
        loop.fit(start)
    constants = {name: value for name, value in asdict(objective).items() if name != "metrics"}
    return session.finish(begun, loop, plan, {"objective": {"loss": block.loss, **constants}})


def objective_of(block: types.Preference) -> DPO | IPO | KTO | ORPO | SimPO:
    """The loss that the block asks for."""
    beta = resolve_beta(block)
    match block.loss:
        case "dpo":
            return DPO(beta, block.label_smoothing)
        case "ipo":
            return IPO(beta)
        case "kto":
            weights = block.kto or types.KTO()
            return KTO(beta, weights.desirable_weight, weights.undesirable_weight)
        case "orpo":
            return ORPO(beta)
        case "simpo":
            return SimPO(beta, (block.simpo or types.SimPO()).gamma)


def _examples(begun: session.Session, block: types.Preference, role: str) -> list[Example]:
    """Pairs, or for kto the single answers of pairs and of rows with a label."""
    tokenizer, training = begun.tokenizer, block.training
    length, overlong = training.max_length, training.overlong
    if block.loss == "kto":
        return begun.examples(
            role, lambda rows: encode_answers(rows, tokenizer, max_length=length, overlong=overlong), judged
        )
    return begun.examples(role, lambda rows: encode_pairs(rows, tokenizer, max_length=length, overlong=overlong), pair)


def _reference(
    begun: session.Session,
    policy: Policy,
    plan: memory.Plan,
    block: types.Preference,
    train: Sequence[Example],
    evaluation: Sequence[Example],
    steps: Schedule,
) -> Reference:
    """By set, the log-probabilities under the model as it is now; for kto also of what its divergence is estimated
    from, which differs by step.
    """

    def of(examples: Sequence[Example], groups: Iterable[Sequence[int]]) -> npt.NDArray[np.float32]:
        return reference_log_probs(policy, examples, groups, plan.layout, begun.peers, begun.ctx.stop)

    def whole(examples: Sequence[Example]) -> npt.NDArray[np.float32]:
        return of(examples, [range(len(examples))] if examples else [])

    first_epoch = [list(steps.batch(step)) for step in range(min(steps.total_steps, steps.steps_per_epoch))]
    found = {"train": of(train, first_epoch), "eval": whole(evaluation)}
    if block.loss == "kto":
        found["mismatched"] = np.zeros((steps.total_steps, steps.batch_size), np.float32)
        for step in range(steps.total_steps):
            others = mismatched([train[i] for i in steps.batch(step)])
            if others:
                found["mismatched"][step, : len(others)] = whole(others)[:, 0]
        found["mismatchedEval"] = whole(mismatched(evaluation))
    return found


def _sets(train: list[Example], evaluation: list[Example], steps: Schedule, reference: Reference) -> Sets:
    if not reference:
        return Sets(train, evaluation)
    compared = Sets(_with(train, reference["train"]), _with(evaluation, reference["eval"]), extras=reference)
    if "mismatched" not in reference:
        return compared

    def others(step: int) -> list[Example]:
        made = mismatched([train[i] for i in steps.batch(step)])
        return _with(made, reference["mismatched"][step, : len(made), None])

    watched = _with(mismatched(evaluation), reference["mismatchedEval"])
    return replace(compared, mismatched=others, mismatched_eval=watched)


def _with(examples: Sequence[Example], reference: npt.NDArray[np.float32]) -> list[Example]:
    return [one.with_reference(map(float, row)) for one, row in zip(examples, reference, strict=True)]
