"""What the operator counts of jobs."""

from prometheus_client import CollectorRegistry
from tests.builders import SFT, a_job

from finetune_api.status import JobStatus, StageState, StageStatus
from finetune_operator.metrics import JobMetrics


def test_gpus_are_counted_on_every_node() -> None:
    """For as long as an attempt held them; and the stage's whole time once it is done."""
    registry = CollectorRegistry()
    job = a_job(SFT | {"resources": {"gpus": 8, "nodes": 2}})

    def ran(seconds: float, state: StageState) -> JobStatus:
        return JobStatus(stages=[StageStatus(name="sft", state=state, running_seconds=seconds)])

    before, lost, done = JobStatus(), ran(10, StageState.RETRYING), ran(25, StageState.COMPLETE)
    metrics = JobMetrics(registry)
    metrics.observe(job, before, lost)
    assert registry.get_sample_value("finetune_gpu_seconds_total") == 160
    metrics.observe(job, lost, done)
    metrics.observe(job, done, done)
    assert registry.get_sample_value("finetune_gpu_seconds_total") == 400
    assert registry.get_sample_value("finetune_stage_duration_seconds_sum", {"kind": "sft"}) == 25
