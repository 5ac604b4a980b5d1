"""Rules on scores and gates."""

from collections.abc import Iterator

from finetune_api.types import FineTuneJobSpec, Gates, Metric
from finetune_api.validate import FieldError, suggest


def measured_gates(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Gates stand on what is measured."""
    path, evaluation = "spec.evaluation.gates", spec.evaluation
    if evaluation.skip:
        if evaluation.gates != Gates():
            yield FieldError(path, "with `skip: true` nothing is measured: remove the gates, or skip")
        return
    for metric in evaluation.gates.min_score:
        if metric is Metric.LOSS:
            yield FieldError(f"{path}.minScore.loss", "a lower loss is better, and this is a lowest score: use another")
        elif metric not in evaluation.metrics:
            yield FieldError(f"{path}.minScore.{metric}", f"is not measured: add {metric} to spec.evaluation.metrics")
    made = [str(name) for stage in spec.pipeline if stage.quantize for name in stage.quantize.gguf]
    for name in evaluation.gates.max_gguf_divergence:
        if name not in made:
            hint = suggest(name, list(dict.fromkeys(made))) or "; it makes none at all"
            yield FieldError(f"{path}.maxGGUFDivergence.{name}", f"the pipeline makes no GGUF of this type{hint}")


def one_node(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Scores are taken on one node."""
    resources = spec.evaluation.resources
    if resources is not None and resources.nodes > 1:
        words = f"only stages that train run on several nodes, got {resources.nodes}: leave it out"
        yield FieldError("spec.evaluation.resources.nodes", words)


def metrics_once(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Each metric is named once."""
    metrics = spec.evaluation.metrics
    for index, metric in enumerate(metrics):
        if metric in metrics[:index]:
            yield FieldError(f"spec.evaluation.metrics[{index}]", f"{metric} is listed twice: remove one")
