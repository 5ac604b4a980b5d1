"""What rules look at: stages with their paths, and what each starts from."""

from collections.abc import Iterator

from finetune_api.pipeline import TRAINING, ModelRef, find, model_after, parent, trained_on
from finetune_api.types import BASE, FineTuneJobSpec, Stage, TrainingBlock

MERGE_BETWEEN = "put `- {name: merge, merge: {}}` between"


def stages(spec: FineTuneJobSpec) -> Iterator[tuple[str, Stage]]:
    """Every stage with its path."""
    for index, stage in enumerate(spec.pipeline):
        yield f"spec.pipeline[{index}]", stage


def trainings(spec: FineTuneJobSpec) -> Iterator[tuple[str, Stage, TrainingBlock]]:
    """Every training block with its path and its stage."""
    for path, stage in stages(spec):
        for name in TRAINING:
            if (block := getattr(stage, name)) is not None:
                yield f"{path}.{name}", stage, block


def after(spec: FineTuneJobSpec, name: str) -> ModelRef | None:
    """The model that the stage leaves; None where the pipeline up to it is broken."""
    names = [stage.name for stage in spec.pipeline]
    if len(set(names)) < len(names):
        return None
    try:
        return model_after(spec, name)
    except ValueError:
        return None


def before(spec: FineTuneJobSpec, stage: Stage) -> ModelRef | None:
    """The model that the stage starts from; None where the pipeline up to it, itself included, is broken."""
    if after(spec, stage.name) is None:
        return None
    start = parent(spec, stage.name)
    if start != BASE and find(spec, start).reward:  # which nothing can start from
        return None
    return after(spec, start)


def origin(spec: FineTuneJobSpec, stage: Stage) -> Stage | None:
    """The stage that made the adapter which this one trains on; None if it makes its own."""
    found = None
    while before(spec, stage) is not None and (maker := trained_on(spec, stage.name)) is not None:
        found = stage = find(spec, maker)
    return found
