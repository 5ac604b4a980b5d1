"""Preference optimization: learn to prefer the chosen answers to the rejected ones (DPO).

The reference is the model as it came in. Its log-probabilities are computed once, before the first step, and kept with
the checkpoints: no second model is held, and a resumed run compares with the same reference.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from finetune_jobs.data.encode import Dropped, EncodedPair, encode_pairs
from finetune_jobs.data.rows import Row
from finetune_jobs.run.context import Context, Outcome
from finetune_jobs.run.errors import ConfigurationError
from finetune_jobs.training import memory, schedule, session, snapshots
from finetune_jobs.training.collators import Example, pair
from finetune_jobs.training.distributed import peer_errors
from finetune_jobs.training.limits import memory_errors
from finetune_jobs.training.loop import Loop, Sets
from finetune_jobs.training.losses import DPO, reference_log_probs
from finetune_jobs.training.model import Policy, disable_dropout


def run(ctx: Context) -> Outcome:
    """Train on the pairs of ``preference``, watch those of ``preferenceEval``, and leave an adapter or a model."""
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
    training = settings.training

    def encode(rows: list[Row]) -> Iterable[EncodedPair | Dropped]:
        return encode_pairs(rows, begun.tokenizer, max_length=training.max_length, overlong=training.overlong)

    train = begun.examples("preference", encode, pair)
    evaluation = begun.examples("preferenceEval", encode, pair)
    session.check_sets(begun, train, evaluation)
    with memory_errors(settings.path), peer_errors():
        policy = session.load_policy(begun)
        disable_dropout(policy.model)  # like the noise, it would be taken for a change against the reference
        plan = memory.plan(policy, training, train + evaluation, settings.path, begun.peers)
        steps = schedule.plan(len(train), training, settings.seed)
        start = snapshots.start(ctx, settings.checkpoint.resume_from, begun.peers)
        if start is not None:
            reference = snapshots.read_extras(start)
        else:
            first_epoch = [steps.batch(step) for step in range(min(steps.total_steps, steps.steps_per_epoch))]
            reference = {
                "train": _reference(begun, policy, train, first_epoch, plan),
                "eval": _reference(begun, policy, evaluation, [range(len(evaluation))] if evaluation else [], plan),
            }
        sets = Sets(_with(train, reference["train"]), _with(evaluation, reference["eval"]), extras=reference)
        loop = Loop(ctx, settings, policy, DPO(block.beta), sets, steps, plan.layout, begun.peers)
        loop.fit(start)
    return session.finish(begun, loop, plan)


def _reference(
    begun: session.Session, policy: Policy, examples: list[Example], steps: Iterable[Iterable[int]], plan: memory.Plan
) -> npt.NDArray[np.float32]:
    ordered = [list(step) for step in steps]
    return reference_log_probs(policy, examples, ordered, plan.layout, begun.peers, begun.ctx.stop)


def _with(pairs: list[Example], reference: npt.NDArray[np.float32]) -> list[Example]:
    return [one.with_reference(map(float, row)) for one, row in zip(pairs, reference, strict=True)]
