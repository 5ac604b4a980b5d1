"""``plan`` under every misfortune: a shell of our own carries out its wishes while things go wrong at random."""

from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.builders import DPO, GGUF, MERGE, NOW, SFT, a_job, a_result, condition_of, found, stage_of

from finetune_api.pipeline import order, waits_for
from finetune_api.stage import StageRun, Termination
from finetune_api.status import JobStatus
from finetune_api.types import FineTuneJob
from finetune_operator.plan.children import Child
from finetune_operator.plan.plan import plan
from finetune_operator.plan.retry import judge

RETRIES = 2
PIPELINES = {
    "line": [SFT, DPO, MERGE, GGUF],
    "branches": [SFT, MERGE, {**DPO, "from": "sft"}, {"name": "m2", "merge": {}}, {**GGUF, "from": "merge"}],
    "separate": [SFT, {"name": "other", "sft": {}, "from": "base"}, {"name": "third", "sft": {}, "from": "base"}],
}
BAD_CODES = [1, 64, 65, 66, 69, 70, 75, 76, 137, 143, -9, -15, None]


class Shell:
    """Does what plans say, as badly as it is told to: loses status writes and wishes, kills and forgets children."""

    def __init__(self, job: FineTuneJob) -> None:
        self.job = job
        self.status = JobStatus()
        self.children: dict[str, Child] = {}
        self.now: datetime = NOW
        self.recorded: set[str] = set()
        """Stages whose result a status write that was not lost has recorded."""
        self.ended = False

    # -- what the shell does

    def turn(self, *, lose_write: bool = False, start: int = 9, stop: int = 9) -> None:
        """Plan once; ``start`` and ``stop`` say how many wishes are carried out before the shell dies."""
        made = plan(self.job, self.status, list(self.children.values()), self.now)
        self._check([child.run for child in made.create], made.status)
        if not lose_write:
            self.status = made.status
            self.recorded |= {s.name for s in made.status.stages if s.state.done}
        for name in list(made.delete)[:stop]:
            self.children[name] = replace(self.children[name], deleting=True)
        for child in list(made.create)[:start]:
            if child.name not in self.children:
                run = child.run
                self.children[child.name] = Child(
                    name=child.name, stage=run.stage, attempt=run.attempt, state="Pending"
                )

    def _check(self, wished: list[StageRun], status: JobStatus) -> None:
        over = condition_of(status, "Complete") or condition_of(status, "Failed")
        assert not (over and wished), "a finished job wishes for children"
        if self.ended:
            assert over, "a finished job came back to life"
        live = {c.stage for c in self.children.values() if not c.ended}
        for run in wished:
            assert run.stage not in self.recorded, f"{run.stage} is recorded as done and would run again"
            assert run.stage not in live, f"two attempts of {run.stage} at a time"
            assert not self.job.spec.suspend, "a suspended job starts something"
            for earlier in waits_for(self.job.spec, run.stage):
                assert stage_of(status, earlier).state.done, f"{run.stage} before {earlier}"
                assert run.inputs[earlier] == f"{earlier}/manifest.json"
        for stage in status.stages:
            assert stage.failures <= RETRIES + 1
            assert stage.name not in self.recorded or stage.state.done, f"{stage.name} was done"

    # -- what happens to children

    def begin(self, child: Child) -> None:
        """It gets its machine."""
        if child.state == "Pending":
            self.children[child.name] = replace(child, state="Running", start=self.now)

    def succeed(self, child: Child, *, says: bool = True, finds: tuple[str, ...] = ()) -> None:
        """It ends well; without ``says`` it leaves no word of it."""
        message = Termination(result=a_result(child.stage), found=found(*finds)) if says else None
        self.children[child.name] = replace(child, state="Succeeded", exit_code=0, end=self.now, termination=message)

    def fail(self, child: Child, code: int | None, cause: str = "") -> None:
        """It ends without a result."""
        self.children[child.name] = replace(child, state="Failed", exit_code=code, cause=cause, end=self.now)

    def vanish(self, child: Child) -> None:
        """Never a success that is not yet recorded: its Job stays until then (TTL, a careful user)."""
        if child.state != "Succeeded" or child.stage in self.recorded:
            del self.children[child.name]

    def settled(self) -> bool:
        """Complete or Failed was recorded."""
        self.ended = bool(condition_of(self.status, "Complete") or condition_of(self.status, "Failed"))
        return self.ended

    def suspend(self, value: bool) -> None:
        """The user writes ``suspend``."""
        meta = self.job.metadata.model_copy(update={"generation": self.job.metadata.generation + 1})
        spec = self.job.spec.model_copy(update={"suspend": value})
        self.job = self.job.model_copy(update={"spec": spec, "metadata": meta})

    def calm_down(self) -> None:
        """From here on everything works; the job must come to an end in a bounded number of turns."""
        self.suspend(False)
        for _ in range(60):
            if self.settled():
                return
            self.turn()
            for child in list(self.children.values()):
                if not child.ended and child.deleting:
                    self.fail(child, 75)
                elif not child.ended:
                    self.begin(child)
                    self.succeed(self.children[child.name])
            self.now += timedelta(minutes=6)
        raise AssertionError(f"never ended: {self.status.summary}")


EVENTS = st.one_of(
    st.tuples(st.just("turn"), st.booleans(), st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.just("turn"), st.just(False), st.just(9), st.just(9)),
    st.tuples(st.just("begin"), st.integers(0, 9)),
    st.tuples(st.just("succeed"), st.integers(0, 9), st.booleans()),
    st.tuples(st.just("succeed"), st.integers(0, 9), st.just(True)),
    st.tuples(st.just("fail"), st.integers(0, 9), st.sampled_from(BAD_CODES)),
    st.tuples(st.just("disrupt"), st.integers(0, 9)),
    st.tuples(st.just("vanish"), st.integers(0, 9)),
    st.tuples(st.just("suspend"), st.booleans()),
    st.tuples(st.just("wait"), st.integers(0, 400)),
)


def happen(shell: Shell, event: tuple[object, ...], finds: tuple[str, ...]) -> None:
    """One event of the world."""
    kind, *rest = event
    if kind == "turn":
        lose, start, stop = rest
        shell.turn(lose_write=bool(lose), start=int(str(start)), stop=int(str(stop)))
    elif kind == "suspend":
        shell.suspend(bool(rest[0]))
    elif kind == "wait":
        shell.now += timedelta(seconds=int(str(rest[0])))
    elif shell.children:
        child = sorted(shell.children.values(), key=lambda c: c.name)[int(str(rest[0])) % len(shell.children)]
        if kind == "vanish":
            shell.vanish(child)
        elif kind == "begin":
            shell.begin(child)
        elif child.state == "Running" and kind == "succeed":
            shell.succeed(child, says=bool(rest[1]), finds=finds if child.stage == "prepare" else ())
        elif child.state == "Running" and kind == "fail":
            shell.fail(child, rest[1])  # type: ignore[arg-type]
        elif child.state == "Running" and kind == "disrupt":
            shell.fail(child, 137, "DisruptionTarget")
    shell.settled()


@settings(max_examples=300, deadline=None)
@given(
    pipeline=st.sampled_from(list(PIPELINES)),
    events=st.lists(EVENTS, max_size=60),
    finds=st.sampled_from(
        [(), ("baseline",), ("baseline", "sft"), ("sft", "merge"), ("baseline", "sft", "merge", "gguf")]
    ),
)
def test_whatever_happens_the_job_ends_and_nothing_runs_twice(
    pipeline: str, events: list[tuple[object, ...]], finds: tuple[str, ...]
) -> None:
    """No stage runs again once recorded, none before its inputs, one attempt at a time, and it always ends."""
    stages = [{**stage, "retries": RETRIES} for stage in PIPELINES[pipeline]]
    shell = Shell(a_job(*stages))
    for event in events:
        happen(shell, event, tuple(name for name in finds if name in order(shell.job.spec)))
    shell.calm_down()
    assert condition_of(shell.status, "Complete") or condition_of(shell.status, "Failed")
    if condition_of(shell.status, "Complete"):
        assert all(stage.state.done for stage in shell.status.stages)


@settings(max_examples=100, deadline=None)
@given(ends=st.lists(st.sampled_from([69, 70, 75, 76, 137, 143, "disrupted"]), max_size=12))
def test_counted_failures_are_those_of_the_stage_itself(ends: list[object]) -> None:
    """Over any series of ends: status holds the counted ones, and one more than ``retries`` is the end."""
    shell = Shell(a_job({**SFT, "retries": RETRIES}, evaluation={"skip": True}))
    shell.turn()
    first = next(iter(shell.children.values()))
    shell.begin(first)
    shell.succeed(shell.children[first.name])
    shell.turn()
    counted = 0
    for end in ends:
        shell.now += timedelta(minutes=6)
        shell.turn()
        child = next((c for c in shell.children.values() if not c.ended), None)
        if child is None:
            break
        shell.begin(child)
        code, cause = (137, "DisruptionTarget") if end == "disrupted" else (int(str(end)), "")
        shell.fail(shell.children[child.name], code, cause)
        counted += judge(shell.children[child.name]).counted
    shell.turn()
    assert stage_of(shell.status, "sft").failures == counted
    assert (condition_of(shell.status, "Failed") is not None) == (counted > RETRIES)
    attempts = Counter((c.stage, c.attempt) for c in shell.children.values())
    assert max(attempts.values()) == 1
