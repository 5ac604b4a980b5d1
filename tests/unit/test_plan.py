from datetime import timedelta
from typing import Any

import pytest
from tests.builders import (
    DPO,
    GGUF,
    MERGE,
    NOW,
    SFT,
    a_job,
    a_result,
    after,
    condition_of,
    done,
    failed,
    found,
    pending,
    running,
    stage_of,
    succeeded,
)

from finetune_api.stage import StageResult
from finetune_api.status import CheckpointStatus, JobStatus, Progress
from finetune_api.types import FineTuneJob
from finetune_operator.plan.children import Child, Plan
from finetune_operator.plan.jobs import child_name
from finetune_operator.plan.plan import plan
from finetune_operator.plan.retry import wait

JOB = a_job()
BRANCHES = a_job(SFT, MERGE, {"name": "dpo", "preference": {}, "from": "sft"}, GGUF | {"from": "merge"})


def planned(job: FineTuneJob = JOB, status: JobStatus | None = None, *children: Child, at: float = 10) -> Plan:
    """A plan that was checked to be settled: planned again on its own status, all else unchanged, it is the same."""
    first = plan(job, status or JobStatus(), children, after(at))
    again = plan(job, first.status, children, after(at))
    assert [c.name for c in again.create] == [c.name for c in first.create]
    assert list(again.delete) == list(first.delete)
    assert again.status == first.status
    # What is written is what is read back.
    assert JobStatus.model_validate_json(first.status.model_dump_json(by_alias=True)) == first.status
    return first


def starts(made: Plan) -> list[tuple[str, int]]:
    """Stage and attempt of what is wished for."""
    return [(child.run.stage, child.run.attempt) for child in made.create]


def states(made: Plan) -> dict[str, str]:
    """Every stage's state."""
    return {stage.name: str(stage.state) for stage in made.status.stages}


def unstarted(job: FineTuneJob, *finished: str) -> Plan:
    """The plan when these stages are done and nothing runs."""
    return planned(job, done(*finished))


# ---------------------------------------------------------------- order


ORDER: list[tuple[FineTuneJob, list[str], list[str]]] = [
    (JOB, [], ["prepare"]),
    (JOB, ["prepare"], ["baseline"]),
    (JOB, ["prepare", "baseline"], ["sft"]),
    (JOB, ["prepare", "baseline", "sft"], ["merge"]),
    (JOB, ["prepare", "baseline", "sft", "merge"], ["gguf"]),
    (JOB, ["prepare", "baseline", "sft", "merge", "gguf"], ["evaluate"]),
    (JOB, ["prepare", "baseline", "sft", "merge", "gguf", "evaluate"], ["report"]),
    (JOB, ["prepare", "baseline", "sft", "merge", "gguf", "evaluate", "report"], []),
    (BRANCHES, ["prepare", "baseline", "sft"], ["merge", "dpo"]),
    (BRANCHES, ["prepare", "baseline", "sft", "merge"], ["dpo", "gguf"]),
    (BRANCHES, ["prepare", "baseline", "sft", "merge", "gguf"], ["dpo"]),
    (a_job(SFT, evaluation={"skip": True}), ["prepare"], ["sft"]),
]


@pytest.mark.parametrize(("job", "finished", "next_stages"), ORDER, ids=[f"{len(f)} done" for _, f, _ in ORDER])
def test_a_stage_starts_when_all_that_it_waits_for_is_done(
    job: FineTuneJob, finished: list[str], next_stages: list[str]
) -> None:
    """Not before, and independent stages start together."""
    made = unstarted(job, *finished)
    assert starts(made) == [(name, 1) for name in next_stages]
    assert all(stage_of(made.status, name).state == "Pending" for name in next_stages)


def test_a_child_is_told_what_it_reads() -> None:
    """The spec, and the manifest of every stage that it waited for."""
    (child,) = unstarted(JOB, "prepare", "baseline", "sft").create
    assert child.run.spec == JOB.spec
    assert (child.run.job.namespace, child.run.job.name, child.run.job.uid) == ("team", "bot", "u-1")
    assert child.run.inputs == {n: f"{n}/manifest.json" for n in ("prepare", "baseline", "sft")}


def test_a_job_runs_to_its_end() -> None:
    """Success by success: every stage once, Complete at the end, artifacts and report recorded, nothing left to do."""
    status, ran = JobStatus(), []
    for _ in range(20):
        made = planned(JOB, status)
        assert condition_of(made.status, "Complete") is None or not made.create
        if not made.create:
            break
        (child,) = made.create
        ran.append(child.run.stage)
        names = {"gguf": ["Q4_K_M", "Q8_0"], "report": ["report.json", "index.html"]}.get(child.run.stage, [])
        result = a_result(child.run.stage, artifacts=names)
        status = planned(JOB, made.status, succeeded(child.run.stage, name=child.name, result=result)).status
    assert ran == ["prepare", "baseline", "sft", "merge", "gguf", "evaluate", "report"]
    assert condition_of(status, "Complete") == ("True", "Completed")
    assert condition_of(status, "Accepted") == ("True", "Valid")
    assert condition_of(status, "Failed") is None
    assert [(a.stage, a.name) for a in status.artifacts] == [
        ("gguf", "Q4_K_M"),
        ("gguf", "Q8_0"),
        ("report", "report.json"),
        ("report", "index.html"),
    ]
    assert status.report_uri == "s3://b/report/index.html"
    assert (status.summary, status.progress, status.stage) == ("Complete", "7/7", "")


def test_a_recorded_stage_never_runs_again() -> None:
    """Whether its child is still there, has vanished, or an odd second one turns up."""
    status = done("prepare", "baseline", "sft")
    for children in ([], [succeeded("sft")], [failed("sft", 2)]):
        assert starts(planned(JOB, status, *children)) == [("merge", 1)]
    made = planned(JOB, status, running("sft", 2))
    assert list(made.delete) == ["sft-2"]
    assert stage_of(made.status, "sft").attempt == 1


# ---------------------------------------------------------------- how attempts end


READY = done("prepare", "baseline")
ENDS: list[tuple[str, Child, str, int, int]] = [
    # id, child, reason, failures, seconds until the next attempt (-1: none, final)
    ("preempted, saved", failed("sft", code=75), "Preempted", 0, 0),
    ("SIGTERM not handled", failed("sft", code=143), "Preempted", 0, 0),
    ("killed by SIGTERM, locally", failed("sft", code=-15), "Preempted", 0, 0),
    ("node drained", failed("sft", code=137, cause="DisruptionTarget"), "Preempted", 0, 0),
    ("bad configuration", failed("sft", code=64, words="spec.x: no"), "BadConfiguration", 1, -1),
    ("bad data", failed("sft", code=65, words="train.jsonl:3: no"), "BadData", 1, -1),
    ("input missing", failed("sft", code=66, words="gone"), "InputMissing", 1, -1),
    ("store away", failed("sft", code=69, words="503"), "StorageUnavailable", 1, 10),
    ("a bug", failed("sft", code=70, words="KeyError"), "StageError", 1, 10),
    ("a peer lost", failed("sft", code=76), "PeerLost", 1, 10),
    ("unknown code", failed("sft", code=1), "StageError", 1, 10),
    ("no code at all", failed("sft", code=None), "StageError", 1, 10),
    ("killed", failed("sft", code=137), "Killed", 1, 10),
    ("killed, locally", failed("sft", code=-9, words="step 7 of 16"), "Killed", 1, 10),
    ("OOMKilled with another code", failed("sft", code=1, cause="OOMKilled"), "OutOfMemory", 1, 10),
    ("evicted", failed("sft", code=137, cause="Evicted"), "DiskFull", 1, 10),
    ("exit 0 without result", running("sft", state="Succeeded", exit_code=0, end=after(10)), "NoResult", 1, 10),
    ("no code, no result", running("sft", state="Succeeded", end=after(10)), "NoResult", 1, 10),
    ("killed after being asked to stop", failed("sft", code=137, deleting=True), "Killed", 0, 0),
    ("bad data while being stopped", failed("sft", code=65, words="no rows", deleting=True), "BadData", 1, -1),
]


@pytest.mark.parametrize(("child", "reason", "failures", "seconds"), [e[1:] for e in ENDS], ids=[e[0] for e in ENDS])
def test_what_an_exit_leads_to(child: Child, reason: str, failures: int, seconds: int) -> None:
    """The table of DESIGN.md: counted or not, retried at once, later or never, with the stage's own words."""
    made = planned(JOB, READY, child, at=10)
    stage = stage_of(made.status, "sft")
    assert stage.failures == failures
    if seconds < 0:
        assert (stage.state, stage.reason) == ("Failed", reason)
        assert made.create == []
        assert condition_of(made.status, "Failed") == ("True", "StageFailed")
        assert child.termination is not None
        (words,) = [c.message for c in made.status.conditions if c.type == "Failed"]
        assert words == f"stage sft failed ({reason}): {child.termination.error}"
        return
    if seconds == 0:
        assert starts(made) == [("sft", 2)]
        return
    assert (stage.state, stage.reason) == ("Retrying", reason)
    assert (made.create, made.look_again) == ([], timedelta(seconds=seconds))
    assert starts(planned(JOB, made.status, child, at=10 + seconds - 1)) == []
    assert starts(planned(JOB, made.status, child, at=10 + seconds)) == [("sft", 2)]


def test_waiting_doubles_up_to_five_minutes() -> None:
    """10, 20, 40, 80, 160, 300, 300 seconds, however many failures."""
    assert [wait(n).total_seconds() for n in (1, 2, 3, 4, 5, 6, 7, 100)] == [10, 20, 40, 80, 160, 300, 300, 300]


def test_retries_run_out() -> None:
    """With ``retries: 1`` the second counted failure is the end; preemptions between do not count."""
    job = a_job({**SFT, "retries": 1}, MERGE)
    ends = [failed("sft", 1), failed("sft", 2, code=75), failed("sft", 3), failed("sft", 4, words="disk on fire")]
    assert stage_of(planned(job, READY, *ends[:2]).status, "sft").failures == 1
    made = planned(job, READY, *ends)  # the fourth, which nobody wished for, changes nothing
    stage = stage_of(made.status, "sft")
    assert (stage.state, stage.failures, stage.attempt) == ("Failed", 2, 3)
    assert condition_of(made.status, "Failed") == ("True", "RetriesExhausted")
    assert "failed 2 times, retries: 1" in stage.message


def test_ends_count_once_however_often_they_are_seen() -> None:
    """A recorded end is not counted again, and ends whose recording was lost are all taken in."""
    one = planned(JOB, READY, failed("sft", 1))
    two = planned(JOB, one.status, failed("sft", 1), running("sft", 2))
    assert (stage_of(two.status, "sft").failures, stage_of(two.status, "sft").state) == (1, "Running")
    # Both status writes lost: the same is worked out from the children.
    lost = planned(JOB, READY, failed("sft", 1), running("sft", 2))
    assert (stage_of(lost.status, "sft").failures, stage_of(lost.status, "sft").attempt) == (1, 2)
    assert stage_of(lost.status, "sft").running_seconds == 10


def test_an_attempt_whose_recording_was_lost_is_not_started_twice() -> None:
    """The child is there though the status does not know it: it is followed, not doubled."""
    made = planned(JOB, READY, running("sft", 1))
    assert (starts(made), stage_of(made.status, "sft").state) == ([], "Running")


def test_a_wish_that_was_not_carried_out_is_wished_again_under_the_same_name() -> None:
    """The shell died between recording the status and starting the child."""
    first = unstarted(JOB, "prepare", "baseline")
    again = planned(JOB, first.status, at=60)
    assert [c.name for c in again.create] == [c.name for c in first.create]


def test_a_running_child_that_vanished_was_preempted() -> None:
    """No trace, no blame: a new attempt at once, not counted."""
    status = planned(JOB, READY, running("sft", 1)).status
    made = planned(JOB, status)
    assert starts(made) == [("sft", 2)]
    assert stage_of(made.status, "sft").failures == 0


def test_of_two_live_children_of_a_stage_only_the_newest_stays() -> None:
    """One attempt of a stage runs at a time."""
    made = planned(JOB, READY, running("sft", 1), running("sft", 2))
    assert (list(made.delete), starts(made)) == (["sft-1"], [])


# ---------------------------------------------------------------- names


def test_names_are_deterministic_unique_and_short() -> None:
    """The same for the same attempt, whatever else of the job changed; another for another uid, stage or attempt; never
    too long.
    """
    long = {"name": "s" * 32, "sft": {}}
    job = a_job(long)
    job = job.model_copy(update={"metadata": job.metadata.model_copy(update={"name": "j" * 40})})
    assert child_name(JOB, "sft", 1) == child_name(a_job(generation=2, suspend=True), "sft", 1)
    assert child_name(JOB, "sft", 1).startswith("bot-sft-1-")
    other_uid = JOB.model_copy(update={"metadata": JOB.metadata.model_copy(update={"uid": "u-2"})})
    names = [
        child_name(JOB, "sft", 1),
        child_name(JOB, "sft", 2),
        child_name(JOB, "merge", 1),
        child_name(other_uid, "sft", 1),
        child_name(job, "s" * 32, 1000),
        child_name(job, "s" * 31, 1000),
    ]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 60 and not name.startswith("-") and "--" not in name[-14:] for name in names)


# ---------------------------------------------------------------- branches and failure


def test_a_branch_that_fails_for_good_stops_the_others() -> None:
    """Running siblings are deleted, nothing new starts, and Failed names the stage and its words."""
    status = done("prepare", "baseline", "sft")
    made = planned(BRANCHES, status, running("merge"), failed("dpo", code=65, words="pairs.jsonl:7: same answers"))
    assert (list(made.delete), made.create) == (["merge-1"], [])
    assert states(made)["merge"] == "Waiting"
    assert stage_of(made.status, "merge").reason == "SiblingFailed"
    (message,) = [c.message for c in made.status.conditions if c.type == "Failed"]
    assert message == "stage dpo failed (BadData): pairs.jsonl:7: same answers"
    assert made.status.summary == "Failed: dpo: BadData"
    later = planned(BRANCHES, made.status, running("merge", deleting=True), failed("dpo", code=65))
    assert (list(later.delete), later.create, states(later)) == ([], [], states(made))


def test_a_branch_that_waits_for_another_try_does_not_hold_up_the_others() -> None:
    """dpo backs off; merge is done, so gguf starts."""
    made = planned(BRANCHES, done("prepare", "baseline", "sft", "merge"), failed("dpo", code=69))
    assert starts(made) == [("gguf", 1)]
    assert made.look_again == timedelta(seconds=10)


def test_success_is_recorded_in_the_plan_that_also_sees_a_failure() -> None:
    """A sibling's result that came in time is kept, so that the next try need not make it again."""
    made = planned(BRANCHES, done("prepare", "baseline", "sft"), succeeded("merge"), failed("dpo", code=64))
    assert states(made)["merge"] == "Complete"


# ---------------------------------------------------------------- suspend


SUSPENDED = a_job(suspend=True)


def test_suspend_stops_what_runs_and_resume_goes_on_with_the_next_attempt() -> None:
    """Suspended=True only once nothing runs; the stop does not count as a failure."""
    status = planned(JOB, READY, running("sft")).status
    asked = planned(SUSPENDED, status, running("sft"))
    assert (list(asked.delete), asked.create) == (["sft-1"], [])
    assert condition_of(asked.status, "Suspended") == ("False", "Suspended")
    assert asked.status.summary == "Suspending sft"
    stopping = planned(SUSPENDED, asked.status, running("sft", deleting=True))
    assert (list(stopping.delete), condition_of(stopping.status, "Suspended")) == ([], ("False", "Suspended"))
    for last in ([failed("sft", code=75, deleting=True)], [failed("sft", code=137, deleting=True)], []):
        gone = planned(SUSPENDED, stopping.status, *last)
        assert condition_of(gone.status, "Suspended") == ("True", "Suspended")
        assert (states(gone)["sft"], gone.create, gone.status.summary) == ("Suspended", [], "Suspended")
        resumed = planned(JOB, gone.status, *last, at=500)
        assert starts(resumed) == [("sft", 2)]
        assert stage_of(resumed.status, "sft").failures == 0
        assert condition_of(resumed.status, "Suspended") == ("False", "Resumed")


def test_a_suspended_job_starts_nothing() -> None:
    """Not even its first stage; the children of a wish that was being carried out are stopped when they show up."""
    made = planned(SUSPENDED)
    assert (made.create, condition_of(made.status, "Suspended")) == ([], ("True", "Suspended"))
    wished = unstarted(JOB, "prepare", "baseline")
    held = planned(SUSPENDED, wished.status)
    assert states(held)["sft"] == "Suspended"
    late = pending("sft", name=wished.create[0].name)
    seen = planned(SUSPENDED, held.status, late)
    assert (list(seen.delete), condition_of(seen.status, "Suspended")) == ([late.name], ("False", "Suspended"))
    back = planned(JOB, seen.status, late)
    assert (list(back.delete), starts(back), states(back)["sft"]) == ([late.name], [], "Suspended")
    assert starts(planned(JOB, back.status)) == [("sft", 2)]


def test_a_stage_that_ends_while_being_suspended_is_done() -> None:
    """Its result counts."""
    status = planned(SUSPENDED, READY, running("sft")).status
    made = planned(SUSPENDED, status, succeeded("sft", deleting=True))
    assert (states(made)["sft"], made.create) == ("Complete", [])


# ---------------------------------------------------------------- deadlines


LIMITED = a_job({**SFT, "activeDeadlineSeconds": 100}, MERGE)


def test_running_time_is_summed_over_attempts() -> None:
    """40 s in the first attempt leave 60 s for the second; waiting does not count."""
    first = failed("sft", 1, end=after(40))
    second = running("sft", 2, start=after(1000))
    made = planned(LIMITED, READY, first, second, at=1059)
    assert (stage_of(made.status, "sft").state, made.look_again) == ("Running", timedelta(seconds=1))
    over = planned(LIMITED, made.status, first, second, at=1060)
    assert (list(over.delete), states(over)["sft"]) == (["sft-2"], "Failed")
    assert condition_of(over.status, "Failed") == ("True", "DeadlineExceeded")


def test_no_attempt_starts_without_time_left() -> None:
    """An attempt that used it all up and then failed is the last."""
    made = planned(LIMITED, READY, failed("sft", end=after(100)), at=100)
    assert (made.create, stage_of(made.status, "sft").reason) == ([], "DeadlineExceeded")


def test_a_result_in_time_wins_over_the_deadline() -> None:
    """What was committed is not thrown away because the plan came late."""
    made = planned(LIMITED, READY, succeeded("sft", end=after(99)), at=500)
    assert states(made)["sft"] == "Complete"


def test_waiting_in_a_queue_costs_nothing() -> None:
    """A pending child has not begun."""
    made = planned(LIMITED, READY, pending("sft"), at=10_000)
    assert states(made)["sft"] == "Pending"


# ---------------------------------------------------------------- reuse


def test_stages_that_prepare_found_are_not_started() -> None:
    """Whatever else has to run again: their results were found by the contents of all that they read."""
    made = planned(JOB, None, succeeded("prepare", found=found("baseline", "sft")))
    assert states(made) == {
        "prepare": "Complete",
        "baseline": "Reused",
        "sft": "Reused",
        "merge": "Pending",
        "gguf": "Waiting",
        "evaluate": "Waiting",
        "report": "Waiting",
    }
    assert starts(made) == [("merge", 1)]
    assert made.create[0].run.inputs["sft"] == "sft/manifest.json"
    result = stage_of(made.status, "sft").result
    assert isinstance(result, StageResult)
    assert result.reused


def test_a_new_baseline_does_not_train_again() -> None:
    """A stage that waits for another only for the order's sake keeps its result when that other runs again."""
    made = planned(JOB, None, succeeded("prepare", found=found("sft", "merge", "gguf")))
    assert starts(made) == [("baseline", 1)]
    assert {states(made)[name] for name in ("sft", "merge", "gguf")} == {"Reused"}


def test_a_job_may_be_reused_as_a_whole() -> None:
    """Every stage found: Complete without a second child."""
    rest = ("baseline", "sft", "merge", "gguf", "evaluate", "report")
    made = planned(
        JOB,
        None,
        succeeded("prepare", result=a_result("prepare").model_copy(update={"reused": True}), found=found(*rest)),
    )
    assert set(states(made).values()) == {"Reused"}
    assert condition_of(made.status, "Complete") == ("True", "Completed")


def test_only_the_latest_prepare_is_believed() -> None:
    """What an earlier attempt of prepare found, perhaps for another spec, is not used."""
    status = planned(JOB, None, succeeded("prepare", 2)).status
    made = planned(JOB, status, succeeded("prepare", 1, found=found("baseline", "sft")), succeeded("prepare", 2))
    assert starts(made) == [("baseline", 1)]


def test_a_stage_that_found_its_own_result_is_reused() -> None:
    """Started, found, ended at once."""
    made = planned(JOB, READY, succeeded("sft", result=a_result("sft").model_copy(update={"reused": True})))
    assert states(made)["sft"] == "Reused"


# ---------------------------------------------------------------- acceptance, gates, columns


def test_a_spec_that_can_never_run_fails_at_once() -> None:
    """Accepted=False and Failed=InvalidSpec with every mistake; no child."""
    job = a_job(MERGE, {"name": "gguf", "from": "nope", "quantize": {"gguf": ["F16"]}})
    made = planned(job)
    assert (made.create, made.status.stages) == ([], [])
    assert condition_of(made.status, "Accepted") == ("False", "InvalidSpec")
    assert condition_of(made.status, "Failed") == ("True", "InvalidSpec")
    (message,) = [c.message for c in made.status.conditions if c.type == "Failed"]
    assert [line.partition(":")[0] for line in message.splitlines()] == [
        "spec.pipeline[0].merge",
        "spec.pipeline[1].from",
    ]
    assert made.status.summary == "Failed: InvalidSpec (2 mistakes)"


def test_local_sources_are_a_mistake_on_a_cluster() -> None:
    """The local runner accepts what the operator refuses."""
    job = a_job(model={"source": "file:///m"})
    assert starts(planned(job)) == [("prepare", 1)]
    assert condition_of(plan(job, JobStatus(), [], NOW, cluster=True).status, "Failed") == ("True", "InvalidSpec")


ALL = ("prepare", "baseline", "sft", "merge", "gguf", "evaluate")


@pytest.mark.parametrize(
    ("passed", "fail_job", "gate", "complete", "failed_", "summary"),
    [
        (1, False, ("True", "GatesPassed"), ("True", "Completed"), None, "Complete"),
        (0, False, ("False", "GatesFailed"), ("True", "Completed"), None, "Complete, a gate failed"),
        (0, True, ("False", "GatesFailed"), None, ("True", "GatesFailed"), "Failed: GatesFailed"),
        (1, True, ("True", "GatesPassed"), ("True", "Completed"), None, "Complete"),
        (None, True, None, ("True", "Completed"), None, "Complete"),
    ],
    ids=["passed", "failed", "failed and fatal", "passed, could be fatal", "no figure"],
)
def test_gates(passed: int | None, fail_job: bool, gate: Any, complete: Any, failed_: Any, summary: str) -> None:
    """The report's figure sets GatePassed; ``failJob`` makes a failed gate fatal."""
    job = a_job(evaluation={"gates": {"failJob": fail_job}})
    figures: dict[str, Any] = {} if passed is None else {"gatesPassed": passed}
    made = planned(job, done(*ALL), succeeded("report", result=a_result("report", **figures)))
    assert condition_of(made.status, "GatePassed") == gate
    assert condition_of(made.status, "Complete") == complete
    assert condition_of(made.status, "Failed") == failed_
    assert made.status.summary == summary


def test_columns_tell_how_far_a_job_is() -> None:
    """Stage, progress, ETA and one honest line."""
    at = Progress(step=120, total_steps=400, percent=30, eta_seconds=4210)
    saved = CheckpointStatus(step=100, uri="s3://b/c")
    made = planned(JOB, READY, running("sft", progress=at, checkpoint=saved))
    status = made.status
    assert (status.stage, status.progress, status.eta, status.summary) == ("sft", "2/7 30%", "1h10m", "Running sft")
    assert stage_of(status, "sft").checkpoint == saved
    assert stage_of(status, "sft").start_time == NOW
    ended = planned(JOB, status, failed("sft", code=70, words="KeyError"))
    assert (ended.status.summary, ended.status.eta) == ("Retrying sft: StageError", "")
    assert stage_of(ended.status, "sft").checkpoint == saved


def test_a_pending_child_says_why() -> None:
    """The platform's word goes into the line."""
    made = planned(JOB, READY, pending("sft", cause="Unschedulable"))
    assert made.status.summary == "Pending sft: Unschedulable"


def test_a_condition_keeps_its_time_until_its_value_changes() -> None:
    """As Kubernetes has it."""
    first = planned(JOB, None, at=10).status
    later = plan(JOB, first, [running("prepare")], after(99)).status
    assert [c.last_transition_time for c in later.conditions if c.type == "Accepted"] == [after(10)]


def test_a_finished_job_is_left_alone() -> None:
    """Complete stays Complete whatever turns up; live strays are stopped; a changed spec does not start it again."""
    status = planned(JOB, done(*ALL, "report")).status
    made = planned(a_job(suspend=True, generation=5), status, running("sft", 9))
    assert (made.create, list(made.delete), made.look_again) == ([], ["sft-9"], None)
    assert made.status.conditions == status.conditions
    assert made.status.observed_generation == 5


def test_stages_of_dpo_continue() -> None:
    """A preference stage after sft waits for it."""
    assert starts(unstarted(a_job(SFT, DPO), "prepare", "baseline")) == [("sft", 1)]
