"""Figures about jobs and stages, beside the engine's own. Labels are bounded: no names of jobs or namespaces."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from finetune_api.pipeline import kind
from finetune_api.status import JobStatus, StageStatus
from finetune_api.types import FineTuneJob
from finetune_operator.kube.objects import Object
from finetune_operator.plan.sizes import resources_of

_DURATIONS = (10, 30, 60, 300, 900, 1800, 3600, 3 * 3600, 6 * 3600, 12 * 3600, 24 * 3600, 72 * 3600)
_STATES = ("Complete", "Failed", "Suspended")


class JobMetrics:
    """One set of figures in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._durations = Histogram(
            "finetune_stage_duration_seconds",
            "Running time of a finished stage, over all its attempts",
            ["kind"],
            buckets=_DURATIONS,
            registry=registry,
        )
        self._gpu_seconds = Counter(
            "finetune_gpu_seconds", "GPUs held by ended attempts, in seconds", registry=registry
        )

    def observe(self, job: FineTuneJob | None, before: JobStatus, after: JobStatus) -> None:
        """Count what a status write records. An attempt that ended stands in exactly one such write."""
        if job is None:
            return
        earlier = {stage.name: stage for stage in before.stages}
        for stage in after.stages:
            old = earlier.get(stage.name, StageStatus(name=stage.name))
            ran = stage.running_seconds - old.running_seconds
            held = resources_of(job.spec, stage.name)
            self._gpu_seconds.inc(max(0.0, ran) * held.gpus * held.nodes)
            if stage.state.done and not old.state.done and stage.running_seconds:
                self._durations.labels(kind(job.spec, stage.name)).observe(stage.running_seconds)


class JobStates(Collector):
    """``finetune_jobs{state}``, counted when asked for."""

    def __init__(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """``counts``: how many jobs are in each ``state``."""
        self._counts = counts

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """As Prometheus wants it."""
        family = GaugeMetricFamily("finetune_jobs", "FineTuneJobs by state", labels=["state"])
        for name, count in sorted(self._counts().items()):
            family.add_metric([name], count)
        yield family


def state(job: Object) -> str:
    """A FineTuneJob's, in one word."""
    conditions = (job.get("status") or {}).get("conditions") or ()
    true = {c["type"] for c in conditions if c["status"] == "True"}
    ended = next((known for known in _STATES if known in true), None)
    if ended is not None:
        return ended
    stages = (job.get("status") or {}).get("stages") or ()
    return "Running" if any(stage.get("state") == "Running" for stage in stages) else "Waiting"
