"""What only a cluster has: queues, places that are not found, Jobs that are refused, records that expire."""

import itertools
from datetime import timedelta
from typing import Any

from tests.builders import NOW, SFT, a_job, after, condition_of, done, failed, pending, running, stage_of, succeeded

from finetune_api.status import CheckpointStatus, JobStatus, Progress, StageState, StageStatus
from finetune_operator.plan.children import Refused
from finetune_operator.plan.events import changes
from finetune_operator.plan.plan import plan

READY = done("prepare", "baseline")
WORDS = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."


def test_the_schedulers_words_stand_in_the_status() -> None:
    """In the stage's line and in the STATUS column."""
    child = pending("sft", cause="Unschedulable", message=WORDS, since=NOW)
    status = plan(a_job(), READY, [child], after(5)).status
    line = stage_of(status, "sft")
    assert (line.state, line.reason, line.message) == ("Pending", "Unschedulable", WORDS)
    assert status.summary == f"Pending sft: Unschedulable: {WORDS}"


def test_a_stage_that_a_queue_holds_is_queued() -> None:
    """And it is not Pending: no deadline runs."""
    job = a_job(pendingDeadlineSeconds=1)
    made = plan(job, READY, [pending("sft", state="Queued")], after(1000))
    assert stage_of(made.status, "sft").state == "Queued"
    assert made.status.summary == "Queued sft"
    assert made.look_again is None


def test_a_stage_that_finds_no_place_gives_up_in_time() -> None:
    """After pendingDeadlineSeconds, with the last reason; its Job is deleted. Before that it is looked at in time."""
    job = a_job(pendingDeadlineSeconds=600)
    child = pending("sft", cause="Unschedulable", message=WORDS, since=NOW)
    waits = plan(job, READY, [child], after(500))
    assert waits.look_again == timedelta(seconds=100)
    made = plan(job, waits.status, [child], after(600))
    assert list(made.delete) == ["sft-1"]
    line = stage_of(made.status, "sft")
    assert (line.state, line.reason) == ("Failed", "PendingDeadlineExceeded")
    assert WORDS in line.message
    assert condition_of(made.status, "Failed") is not None


def test_a_refused_job_is_told_and_wished_again() -> None:
    """The API server's words stand in the status until it takes the Job."""
    first = plan(a_job(), READY, [], NOW)
    (child,) = first.create
    words = 'jobs.batch "x" is forbidden: exceeded quota'
    made = plan(a_job(), first.status, [], after(1), refused={child.name: Refused(words, NOW)})
    assert [c.name for c in made.create] == [child.name]
    line = stage_of(made.status, "sft")
    assert (line.state, line.reason, line.message, line.attempt) == ("Pending", "JobRefused", words, 1)
    taken = plan(a_job(), made.status, [pending("sft", name=child.name)], after(2))
    assert (stage_of(taken.status, "sft").reason, taken.create) == ("", [])


def test_a_job_that_is_refused_for_too_long_is_given_up() -> None:
    """No place to run either: pendingDeadlineSeconds, and in the end the words of who refused it."""
    job = a_job(pendingDeadlineSeconds=600)
    first = plan(job, READY, [], NOW)
    (child,) = first.create
    refusal = {child.name: Refused("exceeded quota", NOW)}
    assert plan(job, first.status, [], after(599), refused=refusal).create
    late = plan(job, first.status, [], after(600), refused=refusal)
    assert late.create == []
    assert condition_of(late.status, "Failed") == ("True", "PendingDeadlineExceeded")
    assert stage_of(late.status, "sft").message.endswith(": JobRefused: exceeded quota")


def test_a_finished_record_expires_only_if_asked() -> None:
    """ttlSecondsAfterFinished after the end, not before; without it the record stays."""
    names = ("prepare", "baseline", "sft", "evaluate")

    def ended(**spec: int) -> tuple[bool, timedelta | None]:
        job = a_job(SFT, **spec)
        status = plan(job, done(*names), [succeeded("report")], NOW).status
        assert condition_of(status, "Complete") == ("True", "Completed")
        made = plan(job, status, [], after(60))
        return made.expired, made.look_again

    assert ended() == (False, None)
    assert ended(ttlSecondsAfterFinished=100) == (False, timedelta(seconds=40))
    assert ended(ttlSecondsAfterFinished=60) == (True, None)
    assert ended(ttlSecondsAfterFinished=0) == (True, None)


def test_changes_are_told_once() -> None:
    """As Events: each new state with its reason; nothing when nothing changed."""
    start = plan(a_job(), JobStatus(), [], NOW).status
    assert [(t.type, t.reason) for t in changes(JobStatus(), start)] == [("Normal", "StagePending")]
    assert list(changes(start, start)) == []
    name = stage_of(start, "prepare").job
    stuck = plan(a_job(), start, [pending("prepare", name=name, cause="Unschedulable", message=WORDS)], after(1)).status
    (told,) = changes(start, stuck)
    assert (told.type, told.reason) == ("Warning", "Unschedulable")
    assert WORDS in told.message
    ended = plan(a_job(), stuck, [succeeded("prepare", name=name)], after(11)).status
    assert [(t.type, t.reason) for t in changes(stuck, ended)] == [
        ("Normal", "StageComplete"),
        ("Normal", "StagePending"),
    ]


def test_the_end_is_told() -> None:
    """A failed job as a Warning, with the stage's words."""
    child = pending("sft", cause="Unschedulable", message=WORDS, since=NOW)
    before = plan(a_job(pendingDeadlineSeconds=1), READY, [], NOW).status
    failed = plan(a_job(pendingDeadlineSeconds=1), before, [child], after(5)).status
    told = list(changes(before, failed))
    assert [(t.type, t.reason) for t in told] == [
        ("Warning", "PendingDeadlineExceeded"),
        ("Warning", "PendingDeadlineExceeded"),
    ]
    assert WORDS in told[-1].message


def test_a_stage_that_is_shoved_aside_at_once_waits_ever_longer() -> None:
    """Not counted, but not a flood of attempts either; one that worked for a while, or was stopped, goes on at once."""

    def waits(attempt: int, seconds: float, **more: Any) -> float | None:
        child = failed("sft", attempt, code=75, start=after(0), end=after(seconds), **more)
        line = READY.model_copy(
            update={"stages": [*READY.stages, StageStatus(name="sft", state=StageState.RUNNING, attempt=attempt)]}
        )
        stage = stage_of(plan(a_job(), line, [child], after(seconds)).status, "sft")
        assert stage.failures == 0
        return (stage.retry_time - after(seconds)).total_seconds() if stage.retry_time else None

    assert [waits(1, 1), waits(2, 1), waits(9, 1)] == [10, 20, 300]
    assert [waits(1, 60), waits(9, 400), waits(9, 1, deleting=True)] == [None, None, None]


def test_a_wait_that_a_wrong_clock_wrote_is_over() -> None:
    """No wait is longer than five minutes."""
    line = StageStatus(name="sft", state=StageState.RETRYING, attempt=1, retry_time=after(3600))
    made = plan(a_job(), READY.model_copy(update={"stages": [*READY.stages, line]}), [], NOW)
    assert [child.run.attempt for child in made.create] == [2]


def test_what_is_due_but_must_wait_for_a_stray_makes_no_haste() -> None:
    """The end of the stray is told; until then nobody looks again and again."""
    line = StageStatus(name="sft", state=StageState.RETRYING, attempt=2, retry_time=after(1))
    stray = pending("sft", 1, deleting=True)
    made = plan(a_job(), READY.model_copy(update={"stages": [*READY.stages, line]}), [stray], after(60))
    assert (made.create, made.look_again) == ([], None)


def test_an_attempt_that_was_in_a_queue_and_is_gone_is_not_made_again() -> None:
    """It was there: the next attempt has another number."""
    line = StageStatus(name="sft", state=StageState.QUEUED, attempt=1, job="sft-1")
    made = plan(a_job(), READY.model_copy(update={"stages": [*READY.stages, line]}), [], NOW)
    assert [child.run.attempt for child in made.create] == [2]


def test_who_was_only_interrupted_goes_on_at_once_after_a_suspension() -> None:
    """A failure's wait goes on."""

    def waits(reason: str) -> object:
        line = StageStatus(name="sft", state=StageState.RETRYING, attempt=1, reason=reason, retry_time=after(200))
        status = READY.model_copy(update={"stages": [*READY.stages, line]})
        return stage_of(plan(a_job(suspend=True), status, [], NOW).status, "sft").retry_time

    assert (waits("Preempted"), waits("StageError")) == (None, after(200))


def test_each_step_of_a_suspension_is_told_once() -> None:
    """In words that say what happens, and what to do."""
    began = plan(a_job(), READY, [running("sft")], NOW).status
    stopping = plan(a_job(suspend=True), began, [running("sft", deleting=True)], NOW).status
    stopped = plan(a_job(suspend=True), stopping, [failed("sft", code=75, deleting=True)], NOW).status
    resumed = plan(a_job(), stopped, [], NOW).status
    told = [
        [event.message for event in changes(a, b)] for a, b in itertools.pairwise([began, stopping, stopped, resumed])
    ]
    assert told == [
        ["sft is Running: saving its state, then stopping"],
        ["sft is Suspended", "nothing runs: set spec.suspend to false to go on"],
        ["sft is Pending, attempt 2", "goes on from the last checkpoint"],
    ]


def test_only_trouble_is_a_warning() -> None:
    """Starting is none, a node that is lost is."""

    def told(**line: Any) -> list[tuple[str, str]]:
        stage = StageStatus(name="sft", attempt=1, **line)
        return [(event.type, event.reason) for event in changes(JobStatus(), JobStatus(stages=[stage]))]

    assert told(state="Pending", reason="Starting") == [("Normal", "Starting")]
    assert told(state="Pending", reason="Starting", message="no volume") == [("Warning", "Starting")]
    assert told(state="Running", reason="NodeLost", message="node n") == [("Warning", "NodeLost")]
    assert told(state="Running") == [("Normal", "StageRunning")]


def test_why_an_attempt_ended_is_told_though_the_next_starts_at_once() -> None:
    """A pod that was deleted leaves no trace in the status, where the next attempt stands already: an Event tells."""
    name = plan(a_job(), READY, [], NOW).create[0].name
    before = plan(a_job(), READY, [running("sft", name=name)], after(1)).status
    lost = failed("sft", name=name, code=75, cause="DisruptionTarget", message="bot-sft-1 was deleted", end=after(60))
    made = plan(a_job(), before, [lost], after(61))
    assert stage_of(made.status, "sft").attempt == 2
    assert [(t.type, t.reason, t.message) for t in changes(before, made.status, made.passed)] == [
        ("Warning", "Preempted", "sft is Retrying: bot-sft-1 was deleted"),
        ("Normal", "StagePending", "sft is Pending, attempt 2"),
    ]
    again = plan(a_job(), made.status, [lost], after(62))
    assert list(changes(made.status, again.status, again.passed)) == []


def test_a_wait_before_the_next_attempt_is_told_once() -> None:
    """The status has it while it lasts, and nothing is told twice."""
    before = plan(a_job(), READY, [running("sft")], after(1)).status
    broken = failed("sft", code=70, words="KeyError: 1")
    waits = plan(a_job(), before, [broken], after(11))
    assert [t.reason for t in changes(before, waits.status, waits.passed)] == ["StageError"]
    goes_on = plan(a_job(), waits.status, [broken], after(60))
    assert [t.reason for t in changes(waits.status, goes_on.status, goes_on.passed)] == ["StagePending"]


def test_an_attempt_does_not_show_the_progress_of_the_one_before() -> None:
    """Neither when it starts nor while it has not reported; the checkpoint stays, since it goes on from there."""
    far = Progress(step=90, total_steps=100, percent=90)
    saved = CheckpointStatus(step=80, uri="s3://b/80")
    before = plan(a_job(), READY, [running("sft", progress=far, checkpoint=saved)], after(1)).status
    lost = failed("sft", code=75, end=after(600))
    made = plan(a_job(), before, [lost], after(601)).status
    runs = plan(a_job(), made, [lost, running("sft", 2, start=after(602))], after(603)).status
    unseen = plan(a_job(), before, [lost, running("sft", 2, start=after(602))], after(603)).status
    for status in (made, runs, unseen):
        line = stage_of(status, "sft")
        assert (line.attempt, line.progress, line.checkpoint) == (2, None, saved)


def test_of_ended_attempts_the_last_is_kept() -> None:
    """For its pod's log; earlier ones go, also when the stage is done, or the whole job."""
    one, two = failed("sft", 1, code=75, end=after(60)), failed("sft", 2, code=75, end=after(120))
    assert plan(a_job(), READY, [one], after(61)).forget == []
    assert plan(a_job(), READY, [one, running("sft", 2)], after(61)).forget == []
    status = plan(a_job(), READY, [one, two, running("sft", 3)], after(121))
    assert status.forget == ["sft-1"]
    finished = plan(a_job(SFT, evaluation={"skip": True}), READY, [one, two, succeeded("sft", 3)], after(200))
    assert condition_of(finished.status, "Complete") == ("True", "Completed")
    assert finished.forget == ["sft-1", "sft-2"]
    late = plan(a_job(SFT, evaluation={"skip": True}), finished.status, [two, succeeded("sft", 3)], after(201))
    assert late.forget == ["sft-2"]
    assert plan(a_job(), READY, [failed("sft", 1, deleting=True), two], after(121)).forget == []
