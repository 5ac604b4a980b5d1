"""Reinforcement learning: answer the prompts, be rewarded, and answer so more or less often.

The reference of the KL penalty is the model as it came in: what is trained is put aside at the start, and put back for
the reference's passes. No second model is held for it, nor for the critic of ppo, which is a head on the policy's own
hidden states.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from finetune_api import types
from finetune_api.defaults import answers_per_prompt, kl_coefficient
from finetune_api.pipeline import find, model_after
from finetune_api.types import Rl
from finetune_jobs.data.encode import OVERLONG, Dropped, prompt_ids, reference
from finetune_jobs.data.rows import Row
from finetune_jobs.run.context import Context, Outcome
from finetune_jobs.training import memory, schedule, scoring, session, snapshots
from finetune_jobs.training.collators import Example, Tokens
from finetune_jobs.training.distributed import peer_errors
from finetune_jobs.training.grpo import GRPO
from finetune_jobs.training.limits import memory_errors
from finetune_jobs.training.model import Policy, disable_dropout, new_head
from finetune_jobs.training.ppo import PPO
from finetune_jobs.training.reinforcement import Algorithm, Reinforcement, Sampling
from finetune_jobs.training.reward import load_judge
from finetune_jobs.training.rloo import RLOO
from finetune_jobs.training.scoring import Prompt


def run(ctx: Context) -> Outcome:
    """Train on the ``prompts``, watch the rewards on ``promptsEval``, and leave an adapter or a model."""
    assert ctx.stage is not None
    block = ctx.stage.rl
    assert block is not None
    begun = session.begin(ctx, block)
    settings = begun.settings
    answer = block.generation.max_new_tokens
    room = settings.training.max_length - answer

    def encode(rows: Sequence[Row]) -> Iterable[Prompt | Dropped]:
        for row in rows:
            ids = prompt_ids(row, begun.tokenizer)
            yield Prompt(ids, reference(row)) if len(ids) <= room else Dropped(OVERLONG)

    prompts = {
        name: begun.examples(role, encode, _same) for name, role in (("train", "prompts"), ("eval", "promptsEval"))
    }
    session.check_sets(begun, prompts["train"], prompts["eval"])
    with memory_errors(settings.path), peer_errors():
        policy = session.load_policy(begun)
        disable_dropout(policy.model)  # it would be taken for a change against the reference
        rewards = [_reward(begun, block, n, policy) for n in range(len(block.rewards))]
        algorithm = algorithm_of(block)
        if algorithm.critic:
            policy = replace(policy, head=new_head(policy.base, policy.device, bias=True))
        longest = max((prompt for some in prompts.values() for prompt in some), key=lambda prompt: len(prompt.ids))
        plan = memory.plan(policy, settings.training, [_whole(longest, answer)], settings.path, begun.peers)
        steps = schedule.plan(len(prompts["train"]), settings.training, settings.seed)
        start = snapshots.start(ctx, settings.checkpoint.resume_from, begun.peers)
        sampling = Sampling(answer, block.generation.temperature, answers_per_prompt(block))
        loop = Reinforcement(
            ctx,
            settings,
            policy,
            algorithm,
            prompts,
            rewards,
            sampling,
            kl_coefficient(block),
            begun.tokenizer,
            steps,
            plan.layout,
            begun.peers,
        )
        loop.fit(start)
    return session.finish(begun, loop, plan, _facts(block))


def algorithm_of(block: Rl) -> Algorithm:
    """The algorithm that the block asks for."""
    match block.algorithm:
        case "ppo":
            own = block.ppo or types.PPO()
            return PPO(
                clip_range=own.clip_range,
                value_clip_range=own.value_clip_range,
                gamma=own.gamma,
                lam=own.lambda_,
                epochs=own.epochs,
                reward_clip=own.reward_clip,
                kl_target=block.kl.target,
            )
        case "grpo":
            return GRPO(kl_coefficient(block))
        case "rloo":
            return RLOO()


def _same(prompt: Prompt) -> Prompt:
    return prompt


def _whole(prompt: Prompt, answer: int) -> Example:
    """The longest that the model may have to read: prompt and answer."""
    length = len(prompt.ids) + answer
    ids = np.resize(np.asarray(prompt.ids, np.int32), length)
    return Example((Tokens(ids, np.arange(length) >= len(prompt.ids)),))


def _reward(begun: session.Session, block: Rl, number: int, policy: Policy) -> scoring.Reward:
    source = block.rewards[number]
    if source.builtin is not None:
        return scoring.builtin(source.builtin, source.weight)
    assert source.stage is not None
    name, ctx = source.stage, begun.ctx
    made, judge = model_after(ctx.spec, name), find(ctx.spec, name).reward
    assert judge is not None
    reward = begun.peers.share_on_node(lambda: ctx.fetch(name, "reward"))
    weights = begun.peers.share_on_node(lambda: ctx.model_dir(made.weights)) if made.adapter else reward
    loaded = load_judge(
        judge,
        weights,
        reward,
        compute=policy.compute,
        device=policy.device,
        trust_remote_code=ctx.spec.model.trust_remote_code,
    )
    return scoring.judged(name, source.weight, loaded)


def _facts(block: Rl) -> dict[str, object]:
    return {
        "objective": {
            "algorithm": block.algorithm,
            "rewards": [r.model_dump(mode="json", by_alias=True, exclude_none=True) for r in block.rewards],
            "kl": {"coefficient": kl_coefficient(block), "target": block.kl.target},
            "ppo": (block.ppo or types.PPO()).model_dump(mode="json", by_alias=True)
            if block.algorithm == "ppo"
            else None,
            "perPrompt": answers_per_prompt(block),
            **block.generation.model_dump(mode="json", by_alias=True, exclude={"per_prompt"}),
        }
    }
