"""What a schema cannot say about a job: one function for each rule, one list of them.

The operator refuses a breach with Accepted=False before any pod is made; ``finetune plan`` prints the same words. A
rule yields a ``FieldError`` whose message ends with the mend. A rule that needs to know what a stage starts from keeps
silent where the pipeline itself is broken: the rules on names, blocks and ``from`` speak about that.
"""

import re
from collections.abc import Callable, Iterator

from finetune_api.types import FineTuneJob, FineTuneJobSpec
from finetune_api.validate import FieldError
from finetune_operator.plan.rules import (
    data,
    evaluation,
    guidance,
    merging,
    pipeline,
    pods,
    preference,
    rewards,
    storage,
    tokens,
    training,
)

Rule = Callable[[FineTuneJobSpec], Iterator[FieldError]]

WITHOUT_PIPELINE: list[Rule] = [
    data.addresses,
    data.endings,
    data.columns,
    storage.endpoint,
    storage.bucket,
    storage.prefix,
]
"""Those that hold whatever the stages do."""

RULES: list[Rule] = [
    pipeline.one_block,
    pipeline.stage_names,
    pipeline.earlier_parent,
    pipeline.adapter_to_merge,
    pipeline.dequantized_after_qlora,
    pipeline.whole_model_to_quantize,
    pipeline.full_after_adapter,
    pipeline.adapter_to_fold,
    pipeline.nodes_to_train,
    pipeline.something_to_write,
    pipeline.types_once,
    pipeline.rows_for_imatrix,
    pipeline.adapter_for_gguf,
    merging.earlier_adapters,
    merging.one_adapter,
    merging.own_combination,
    merging.same_base,
    merging.two_matrices_for_svd,
    merging.reached_checkpoint,
    merging.addresses,
    tokens.different_tokens,
    tokens.learned_tokens,
    training.own_block_only,
    training.trained_on,
    training.scaled_once,
    training.own_row_for_each,
    training.loadable_reward_model,
    training.placed_once,
    training.continued_adapter,
    training.shared_model,
    training.target_modules,
    training.saved_modules,
    training.variant_on_base,
    training.rounded_as_stored,
    training.within_unsloth,
    training.noise_free_preference,
    training.batch_split,
    training.resume_before_the_end,
    preference.own_fields_only,
    preference.labels_for_kto,
    preference.enough_for_kto,
    rewards.earlier_rewards,
    rewards.one_reward,
    rewards.own_algorithm,
    rewards.answers_to_compare,
    rewards.room_for_prompts,
    rewards.scored_by_whole_models,
    rewards.something_to_score,
    data.shared_roles,
    data.training_rows,
    data.test_rows,
    evaluation.measured_gates,
    evaluation.one_node,
    evaluation.metrics_once,
    *WITHOUT_PIPELINE,
]

ON_A_CLUSTER: list[Rule] = [data.reachable_from_pods, merging.reachable_from_pods, pods.task_fits]
"""Those that only pods are subject to."""

WITHOUT_A_CLUSTER: list[Rule] = [data.reachable_from_here]

_TOP = ("spec.model", "spec.data", "spec.storage", "spec.evaluation", "spec.pipeline")


def check(job: FineTuneJob, *, cluster: bool = False, pipeline: bool = True) -> list[FieldError]:
    """Every breach, in the order of the spec; empty for a job that may run.

    With ``cluster``, what pods cannot read or be told is refused, else what only pods can read. Without ``pipeline``,
    rules on what the stages do keep silent: for a job whose pipeline is too broken to judge.
    """
    rules = [*(RULES if pipeline else WITHOUT_PIPELINE), *(ON_A_CLUSTER if cluster else WITHOUT_A_CLUSTER)]
    return sorted((breach for rule in rules for breach in rule(job.spec)), key=_in_order)


def warnings(job: FineTuneJob) -> list[FieldError]:
    """What runs, but hardly as it was meant; for a job without breaches."""
    return sorted((advice for rule in guidance.ADVICE for advice in rule(job.spec)), key=_in_order)


def _in_order(breach: FieldError) -> tuple[int, list[int]]:
    top = next((i for i, name in enumerate(_TOP) if breach.path.startswith(name)), len(_TOP))
    return top, [int(n) for n in re.findall(r"\[(\d+)\]", breach.path)]
