"""A reward model: learn to give the chosen answers of the pairs more than the rejected ones.

Its result is no model that answers: ``rl`` reads it, and transformers loads it as a sequence classifier.
"""

from collections.abc import Iterable

from finetune_jobs.data.encode import Dropped, EncodedPair, encode_pairs
from finetune_jobs.data.rows import Row
from finetune_jobs.run.context import Context, Outcome
from finetune_jobs.training import memory, schedule, session, snapshots
from finetune_jobs.training.collators import pair
from finetune_jobs.training.distributed import peer_errors
from finetune_jobs.training.limits import memory_errors
from finetune_jobs.training.loop import Loop, Sets
from finetune_jobs.training.reward import BradleyTerry, begin_head, pad_token, sequence_rewards, without_padding


def run(ctx: Context) -> Outcome:
    """Train on the pairs of ``preference``, watch those of ``preferenceEval``, and leave a sequence classifier."""
    assert ctx.stage is not None
    block = ctx.stage.reward
    assert block is not None
    begun = session.begin(ctx, block)
    settings = begun.settings
    training = settings.training

    def encode(rows: list[Row]) -> Iterable[EncodedPair | Dropped]:
        return encode_pairs(rows, begun.tokenizer, max_length=training.max_length, overlong=training.overlong)

    train = begun.examples("preference", encode, pair)
    evaluation = begun.examples("preferenceEval", encode, pair)
    session.check_sets(begun, train, evaluation)
    with memory_errors(settings.path), peer_errors():
        policy = session.load_policy(begun, scores=True)
        begin_head(policy, settings.seed)
        pad = pad_token(policy)
        train = [without_padding(one, pad) for one in train]
        evaluation = [without_padding(one, pad) for one in evaluation]
        padded = training.model_copy(update={"packing": False})  # a reward is read at the end of its own row
        plan = memory.plan(policy, padded, train + evaluation, settings.path, begun.peers)
        steps = schedule.plan(len(train), training, settings.seed)
        start = snapshots.start(ctx, settings.checkpoint.resume_from, begun.peers)
        objective, sets = BradleyTerry(block.center_rewards_coefficient), Sets(train, evaluation)
        loop = Loop(ctx, settings, policy, objective, sets, steps, plan.layout, begun.peers, read=sequence_rewards)
        loop.fit(start)
    return session.finish(begun, loop, plan)
