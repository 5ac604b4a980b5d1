"""Supervised fine-tuning: learn to give the answers of the training rows."""

from collections.abc import Iterable

from finetune_jobs.data.encode import Dropped, Encoded, encode_rows
from finetune_jobs.data.rows import Row
from finetune_jobs.run.context import Context, Outcome
from finetune_jobs.training import memory, schedule, session, snapshots
from finetune_jobs.training.collators import example
from finetune_jobs.training.distributed import peer_errors
from finetune_jobs.training.limits import memory_errors
from finetune_jobs.training.loop import Loop, Sets
from finetune_jobs.training.losses import Supervised


def run(ctx: Context) -> Outcome:
    """Train on the rows of ``train``, watch the loss on those of ``eval``, and leave an adapter or a model."""
    assert ctx.stage is not None
    assert ctx.stage.sft is not None
    begun = session.begin(ctx, ctx.stage.sft)
    settings = begun.settings
    training = settings.training

    def encode(rows: list[Row]) -> Iterable[Encoded | Dropped]:
        return encode_rows(
            rows,
            begun.tokenizer,
            loss_on=training.loss_on,
            max_length=training.max_length,
            overlong=training.overlong,
        )

    train = begun.examples("train", encode, example)
    evaluation = begun.examples("eval", encode, example)
    session.check_sets(begun, train, evaluation)
    with memory_errors(settings.path), peer_errors():
        policy = session.load_policy(begun)
        plan = memory.plan(policy, training, train + evaluation, settings.path, begun.peers)
        start = snapshots.start(ctx, settings.checkpoint.resume_from, begun.peers)
        steps = schedule.plan(len(train), training, settings.seed)
        loop = Loop(ctx, settings, policy, Supervised(), Sets(train, evaluation), steps, plan.layout, begun.peers)
        loop.fit(start)
    return session.finish(begun, loop, plan)
