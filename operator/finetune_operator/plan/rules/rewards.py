"""Rules on reward models and reinforcement learning."""

from collections.abc import Iterator

from finetune_api.defaults import answers_per_prompt
from finetune_api.types import FineTuneJobSpec, Rl
from finetune_api.validate import FieldError, suggest
from finetune_operator.plan.rules.walk import stages, trainings


def earlier_rewards(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """``rewards`` names earlier reward stages."""
    names = [stage.name for stage in spec.pipeline]
    for index, (path, stage) in enumerate(stages(spec)):
        made = [earlier.name for earlier in spec.pipeline[:index] if earlier.reward]
        for number, reward in enumerate(stage.rl.rewards if stage.rl else []):
            if reward.stage is not None and reward.stage not in made:
                yield FieldError(f"{path}.rl.rewards[{number}].stage", _wrong_reward(reward.stage, made, names))


def _wrong_reward(name: str, made: list[str], names: list[str]) -> str:
    mend = f"name one of {', '.join(made)}" if made else "put one before, as in `- {name: judge, reward: {}}`"
    if name in names:
        return f"`{name}` is no earlier reward stage: {mend}"
    return f"there is no stage `{name}`{suggest(name, made) or f': {mend}'}"


def one_reward(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Each entry of ``rewards`` is a stage's or a built-in one, and stands there once."""
    for path, block in _reinforced(spec):
        seen: list[str] = []
        for number, reward in enumerate(block.rewards):
            where = f"{path}.rewards[{number}]"
            if (reward.stage is None) == (reward.builtin is None):
                yield FieldError(where, "needs exactly one of stage, builtin: make it two entries, or name one")
                continue
            name = reward.stage or str(reward.builtin)
            if name in seen:
                yield FieldError(where, f"{name} is listed twice: remove one, and double the weight of the other")
            seen.append(name)


def own_algorithm(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """``ppo`` and ``kl.target`` stand only with the algorithm that reads them."""
    for path, block in _reinforced(spec):
        if block.ppo is not None and block.algorithm != "ppo":
            yield FieldError(f"{path}.ppo", f"is only for algorithm ppo, got {block.algorithm}: remove it")
        if block.kl.target is None:
            continue
        if block.algorithm != "ppo":
            words = f"is only for algorithm ppo, got {block.algorithm}: remove it, and set kl.coefficient"
            yield FieldError(f"{path}.kl.target", words)
        elif block.kl.coefficient == 0:
            words = "moves the coefficient by a share of itself, and 0 stays 0: write a kl.coefficient above 0"
            yield FieldError(f"{path}.kl.target", words)


def answers_to_compare(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """grpo and rloo compare the answers to one prompt."""
    for path, block in _reinforced(spec):
        if block.algorithm != "ppo" and answers_per_prompt(block) < 2:
            words = f"{block.algorithm} compares the answers to a prompt, got 1: write 2 or more"
            yield FieldError(f"{path}.generation.perPrompt", words)


def room_for_prompts(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Prompt and answer fit ``maxLength``, and no prompt is cut."""
    for path, block in _reinforced(spec):
        new, longest = block.generation.max_new_tokens, block.training.max_length
        if new >= longest:
            words = f"must be less than training.maxLength, {longest}, prompt and answer together, got {new}"
            yield FieldError(f"{path}.generation.maxNewTokens", f"{words}: lower it, or raise maxLength")
        if block.training.overlong == "truncate":
            words = "a prompt that is cut asks something else: leave it out, and longer prompts are dropped"
            yield FieldError(f"{path}.training.overlong", words)


def scored_by_whole_models(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Methods and layouts that a head on the hidden states, or sampling, cannot do with."""
    for path, stage, block in trainings(spec):
        if not (stage.reward or stage.rl):
            continue
        if block.training.distributed == "fsdp":
            words = "each GPU holds the whole model here: write ddp, or `method: qlora` where memory is short"
            yield FieldError(f"{path}.training.distributed", words)
        if stage.reward and block.training.packing is True:
            yield FieldError(f"{path}.training.packing", "a reward is read at the end of each row: leave it out")


def something_to_score(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """An evaluation needs a model that answers."""
    if all(stage.reward for stage in spec.pipeline) and not spec.evaluation.skip:
        words = "a reward model gives no answers, and no other stage leaves a model to score: write `skip: true`"
        yield FieldError("spec.evaluation.skip", words)


def _reinforced(spec: FineTuneJobSpec) -> Iterator[tuple[str, Rl]]:
    for path, _, block in trainings(spec):
        if isinstance(block, Rl):
            yield path, block
