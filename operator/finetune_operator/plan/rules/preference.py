"""Rules on preference stages: what belongs to which loss."""

from collections.abc import Iterator

from finetune_api.pipeline import data_of
from finetune_api.types import DataFormat, FineTuneJobSpec, Preference
from finetune_api.validate import FieldError
from finetune_operator.plan.rules.walk import trainings

FEWEST = 4
"""Answers of a step from which kto estimates its KL divergence."""


def own_fields_only(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """``simpo``, ``kto`` and ``labelSmoothing`` stand only with the loss that reads them."""
    for path, _, block in trainings(spec):
        if not isinstance(block, Preference):
            continue
        written = {"simpo": block.simpo is not None, "kto": block.kto is not None, "dpo": block.label_smoothing > 0}
        for loss, there in written.items():
            if there and block.loss != loss:
                name = "labelSmoothing" if loss == "dpo" else loss
                words = f"is only for loss {loss}, got {block.loss}: remove it, or write `loss: {loss}`"
                yield FieldError(f"{path}.{name}", words)


def labels_for_kto(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Single answers with a label teach kto only; all other losses compare two answers."""
    for path, stage, block in trainings(spec):
        if not isinstance(block, Preference) or block.loss == "kto":
            continue
        # Looked up alone: names may be doubled, and each of the two stages has its own data.
        rows = data_of(spec.model_copy(update={"pipeline": [stage]}), stage.name).preference
        if any(entry.format is DataFormat.LABELS for entry in rows):
            words = f"{block.loss} compares two answers, but the rows are single ones with a label"
            yield FieldError(f"{path}.loss", f"{words}: write `loss: kto`, or give pairs")


def enough_for_kto(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """The estimate of the KL divergence needs several answers: that of two is mostly noise, that of one is none."""
    for path, _, block in trainings(spec):
        if isinstance(block, Preference) and block.loss == "kto" and block.training.batch_size < FEWEST:
            words = f"kto estimates its KL divergence from the answers of a step, got {block.training.batch_size}"
            yield FieldError(f"{path}.training.batchSize", f"{words}: write {FEWEST} or more")
