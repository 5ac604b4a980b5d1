"""Results of earlier runs: ``prepare`` finds them by digest, and no child starts for their stages."""

from collections.abc import Sequence

from finetune_api.pipeline import order
from finetune_api.stage import StageResult
from finetune_api.status import StageState, StageStatus
from finetune_api.types import FineTuneJobSpec
from finetune_operator.plan.children import Child


def reuse(spec: FineTuneJobSpec, stages: dict[str, StageStatus], children: Sequence[Child]) -> dict[str, StageStatus]:
    """With every unstarted stage Reused whose result was found.

    Also one that would wait for a stage that has to run again: its result was found by the contents of all that it
    reads, so it reads nothing of that stage.
    """
    prepare = stages["prepare"]
    reports = [c.termination for c in children if c.name == prepare.job and prepare.state.done]
    found = {result.stage: result for report in reports if report for result in report.found}
    stages = dict(stages)
    for name in order(spec):
        stage = stages[name]
        if name in found and stage.state is StageState.WAITING:
            result = StageResult(**{**found[name].model_dump(exclude={"stage"}), "reused": True})
            done = {"state": StageState.REUSED, "result": result, "completion_time": prepare.completion_time}
            stages[name] = stage.model_copy(update=done)
    return stages
