"""The local runner with a stand-in for the stages: faults, signals, kills at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from finetune_api.status import JobStatus, StageState
from finetune_api.types import Storage
from finetune_cli import runner, runs
from finetune_cli.display import PlainView
from finetune_cli.errors import CommandError
from finetune_cli.ledger import JobLedger
from finetune_cli.runner import Runner
from finetune_operator.plan.status import condition, holds

HERE = Path(__file__).parent
STAND_IN = (sys.executable, "-S", "-E", str(HERE / "stand_in.py"))
SECONDS = 120
"""For whatever ends by itself: the machine may be busy."""
STAGES = ["prepare", "baseline", "sft", "pref", "merge", "gguf", "evaluate", "report"]
YAML = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: tiny}
spec:
  model: {source: file://model}
  data:
    train: [{source: file://train.jsonl}]
    preference: [{source: file://train.jsonl}]
  storage: {bucket: finetune, endpoint: "http://127.0.0.1:9"}
  pipeline:
  - {name: sft, sft: {training: {maxSteps: 4}}}
  - {name: pref, preference: {}}
  - {name: merge, merge: {}}
  - {name: gguf, quantize: {gguf: [Q8_0]}}
"""


class World:
    """A folder in which the stand-in works, and the job that it works on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.processes: list[subprocess.Popen[str]] = []
        for folder in ("world/committed", "world/checkpoints", "world/faults", "world/steps", "yaml/model"):
            (root / folder).mkdir(parents=True)
        (root / "yaml/train.jsonl").write_text("{}\n")
        (root / "yaml/model/config.json").write_text('{"model_type": "stand-in"}')
        (root / "yaml/model/model.safetensors").touch()
        self.home = root / "home"
        self.file = root / "yaml" / "tiny.yaml"
        self.file.write_text(YAML)
        self.environment = {
            **os.environ,
            "WORLD": str(root / "world"),
            "FINETUNE_HOME": str(self.home),
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
        }

    def fault(self, stage: str, *faults: int | str | None) -> None:
        """What the stage's next starts shall do."""
        (self.root / "world/faults" / stage).write_text(json.dumps(faults))

    def steps(self, count: int, *stages: str) -> None:
        """How long the stages take."""
        for stage in stages:
            (self.root / "world/steps" / stage).write_text(str(count))

    def events(self, kind: str = "") -> list[list[str]]:
        """What the stand-in did, all or of one kind."""
        path = self.root / "world/events"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if not kind or line[0] == kind]

    def starts(self) -> list[str]:
        """The stages in the order of starting."""
        return [event[1] for event in self.events("start")]

    @property
    def ledger(self) -> JobLedger:
        """The job's."""
        return JobLedger(self.home, "default", "tiny")

    def run(self, **options: Any) -> JobStatus:
        """The whole job in this process, on a clock that runs fast enough to wait for nothing."""
        job = runs.load_job(self.file)
        began = datetime.now(UTC)
        with self.ledger.locked():
            job, status, _ = self.ledger.adopt(job, self.file)
            runner = Runner(
                self.ledger,
                job,
                status,
                storage=Storage(bucket="finetune", endpoint="http://127.0.0.1:9"),
                environment=self.environment,
                view=PlainView(sys.stderr),
                command=STAND_IN,
                clock=lambda: began + 200 * (datetime.now(UTC) - began),
                **options,
            )
            return runner.run()

    def start(self, **environment: str) -> "subprocess.Popen[str]":
        """The whole job as a command."""
        process = subprocess.Popen(
            [sys.executable, str(HERE / "run_stand_in.py"), str(self.file)],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        return process

    def await_event(self, *event: str, seconds: float = SECONDS) -> None:
        """Wait until the stand-in did that."""
        deadline = time.monotonic() + seconds
        while not any(e[: len(event)] == list(event) for e in self.events()):
            assert time.monotonic() < deadline, f"{event} did not come after {self.events()[-3:]}"
            time.sleep(0.01)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A world in which afterwards nothing of ours may be running."""
    made = World(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.wait()
    pids = [int(event[-1]) for event in made.events() if event[0] in ("start", "leak")]
    assert not [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    """The process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def states(status: JobStatus) -> dict[str, StageState]:
    """Of every stage."""
    return {stage.name: stage.state for stage in status.stages}


def test_runs_every_stage_once_in_order(world: World) -> None:
    """A job without trouble starts every stage once, one after the other, and is Complete."""
    status = world.run()
    assert holds(status, "Complete")
    assert world.starts() == STAGES
    assert set(states(status).values()) == {StageState.COMPLETE}
    assert world.ledger.status() == status


def test_leaves_no_scratch_but_every_log(world: World) -> None:
    """After the end the workspaces are gone and each attempt's output is in its log."""
    world.fault("sft", 70)
    world.run()
    assert not list((world.home / "work").rglob("*/tiny-*"))
    logs = {path.name: path.read_text() for path in world.ledger.logs()}
    assert set(logs) == {f"{stage}-1.log" for stage in STAGES} | {"sft-2.log"}
    assert "merge says hello" in logs["merge-1.log"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(69, "StorageUnavailable"), (70, "StageError"), ("kill", "Killed"), ("none", "NoResult")],
    ids=["69 storage", "70 bug", "killed", "0 without a result"],
)
def test_retries_what_the_stage_broke(world: World, fault: int | str, reason: str) -> None:
    """A failure that another attempt may mend is retried and counted, and the job completes."""
    world.fault("sft", fault, fault)
    status = world.run()
    sft = next(s for s in status.stages if s.name == "sft")
    assert holds(status, "Complete")
    assert world.starts().count("sft") == 3
    assert (sft.attempt, sft.failures) == (3, 2)


def test_preemption_is_not_counted(world: World) -> None:
    """Exit code 75 gets a new attempt that does not count against retries, however often."""
    world.fault("sft", *[75] * 6)
    status = world.run()
    sft = next(s for s in status.stages if s.name == "sft")
    assert holds(status, "Complete")
    assert (sft.attempt, sft.failures) == (7, 0)


@pytest.mark.parametrize("code", [64, 65, 66])
def test_final_codes_fail_at_once(world: World, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad configuration, bad data and a missing input fail the job at the first attempt, with the stage's words."""
    world.fault("pref", code)
    status = world.run()
    assert holds(status, "Failed")
    assert world.starts() == STAGES[:4]
    failed = condition(status, "Failed")
    assert failed is not None
    assert f"was told to fail with {code}" in failed.message
    said = capsys.readouterr().err
    assert f"pref, attempt 1, ended with exit code {code}: spec.pipeline: the stand-in" in said
    assert "pref says hello" in said


def test_a_failed_job_starts_another_round(world: World) -> None:
    """The same command after a failure keeps what is done, numbers attempts on and forgets the failures."""
    world.fault("merge", *[70] * 4)
    assert holds(world.run(), "Failed")
    assert world.starts().count("merge") == 4
    status = world.run()
    merge = next(s for s in status.stages if s.name == "merge")
    assert holds(status, "Complete")
    assert not holds(status, "Failed")
    assert (merge.attempt, merge.failures) == (5, 0)
    assert world.starts() == [*STAGES[:4], *["merge"] * 5, *STAGES[5:]]


def test_a_complete_job_is_left_alone(world: World) -> None:
    """The same command after the end starts nothing and exits with 0."""
    world.run()
    before = world.events()
    process = world.start()
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert "the job is complete already" in said
    assert world.events() == before


def test_a_changed_spec_is_a_new_generation(world: World) -> None:
    """Another spec under the same name starts anew under the same uid, and finds what was committed."""
    world.run()
    first = world.ledger.record().job
    world.file.write_text(YAML.replace("maxSteps: 4", "maxSteps: 5"))
    (world.root / "world/committed/sft").unlink()
    (world.root / "world/checkpoints/sft").unlink(missing_ok=True)
    status = world.run()
    second = world.ledger.record().job
    assert (second.metadata.uid, second.metadata.generation) == (first.metadata.uid, 2)
    assert status.observed_generation == 2
    assert states(status) == {s: StageState.COMPLETE if s == "sft" else StageState.REUSED for s in STAGES}
    assert len(world.events("committed")) == len(STAGES) + 1
    assert {s.attempt for s in status.stages} == {2}


def test_changed_data_is_a_new_generation_too(world: World) -> None:
    """Other rows under the same name start anew, from prepare on; nothing that is found again works twice."""
    world.run()
    (world.root / "yaml/train.jsonl").write_text('{"another": "row"}\n')
    status = world.run()
    assert holds(status, "Complete")
    assert status.observed_generation == 2
    assert world.starts() == STAGES * 2
    assert len(world.events("committed")) == len(STAGES)
    process = world.start()
    said, _ = process.communicate(timeout=SECONDS)
    assert "the job is complete already" in said


def test_suspend_in_the_file_runs_nothing(world: World) -> None:
    """With suspend: true nothing starts, and the exit code is not 0; false goes on."""
    world.file.write_text(YAML.replace("  pipeline:", "  suspend: true\n  pipeline:"))
    process = world.start()
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "spec.suspend is true" in said
    assert world.events() == []
    world.file.write_text(YAML)
    assert holds(world.run(), "Complete")
    assert world.ledger.record().job.metadata.generation == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_the_same_command_goes_on(world: World, number: int, code: int) -> None:
    """After one signal the stage saves, the job is Suspended, and the next run continues from that step."""
    world.steps(400, "sft")
    process = world.start()
    world.await_event("step", "sft", "3")
    process.send_signal(number)
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == code
    assert "the same command goes on" in said
    status = world.ledger.status()
    assert holds(status, "Suspended")
    assert states(status)["sft"] is StageState.SUSPENDED
    [[_, _, saved]] = world.events("saved")
    world.steps(int(saved) + 3, "sft")
    assert holds(world.run(), "Complete")
    steps = [int(event[2]) for event in world.events("step") if event[1] == "sft"]
    assert steps == list(range(1, int(saved) + 4))


def test_a_second_ctrl_c_kills(world: World) -> None:
    """A stage that does not heed the first Ctrl-C is killed by the second, which counts as no failure."""
    world.fault("baseline", "hang")
    process = world.start()
    world.await_event("step", "baseline")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert "baseline is killed" in said
    status = world.run()
    assert holds(status, "Complete")
    assert sum(s.failures for s in status.stages) == 0


def test_the_grace_period_ends_with_a_kill(world: World) -> None:
    """A stage that does not stop within the grace period is killed, and the runner ends."""
    world.fault("baseline", "hang")
    job = runs.load_job(world.file)
    with world.ledger.locked():
        job, status, _ = world.ledger.adopt(job, world.file)
        runner = Runner(
            world.ledger,
            job,
            status,
            storage=job.spec.storage,
            environment=world.environment,
            view=PlainView(sys.stderr),
            command=STAND_IN,
            grace=0.3,
        )
        # The test plays the terminal: the signal comes once baseline works.
        waiting = subprocess.Popen(
            [sys.executable, "-c", WAIT_AND_SIGNAL, str(world.root / "world/events"), str(os.getpid())]
        )
        status = runner.run()
        waiting.wait(timeout=SECONDS)
    assert runner.interrupted == signal.SIGINT
    assert holds(status, "Suspended")


WAIT_AND_SIGNAL = """
import os, pathlib, signal, sys, time
events = pathlib.Path(sys.argv[1])
while not events.exists() or "step baseline" not in events.read_text():
    time.sleep(0.01)
os.kill(int(sys.argv[2]), signal.SIGINT)
"""


def test_what_a_stage_leaves_behind_is_killed(world: World) -> None:
    """Processes that a stage started and forgot are gone when the stage is."""
    world.fault("prepare", "leak")
    world.run()
    [[_, pid]] = world.events("leak")
    assert not alive(int(pid))


def test_a_second_run_of_the_same_job_is_refused(world: World) -> None:
    """While a job runs, another run of it says so, with the process that has it, and changes nothing."""
    world.steps(400, "prepare")
    process = world.start(STEP_SECONDS="0.1")  # so that it outlasts the other's start
    world.await_event("step", "prepare")
    with pytest.raises(CommandError, match=f"already running here .process {process.pid}."), world.ledger.locked():
        pass
    second = world.start()
    said, _ = second.communicate(timeout=SECONDS)
    assert second.returncode != 0
    assert f"process {process.pid}" in said
    assert world.starts() == ["prepare"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=SECONDS)


def test_killed_at_any_moment_the_same_command_goes_on(world: World) -> None:
    """SIGKILL of the runner at 20 random moments: no finished stage works again, no step is lost or done twice."""
    dice = random.Random(20)
    world.steps(40, *STAGES)  # seconds of work, of which a run that is killed so soon does a part
    kills = 0
    while kills < 20:
        process = world.start(STEP_SECONDS="0.04")
        time.sleep(dice.uniform(0.2, 1.3))
        if process.poll() is not None:
            break
        process.kill()
        process.communicate(timeout=SECONDS)
        kills += 1
    process = world.start(STEP_SECONDS="0.04")
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert kills >= 10, "the job was over too soon to be killed often"
    committed = [event[1] for event in world.events("committed")]
    assert committed == STAGES
    status = world.ledger.status()
    assert sum(s.failures for s in status.stages) == 0
    done: set[str] = set()
    for event in world.events():
        if event[0] == "committed":
            done.add(event[1])
        assert event[0] != "step" or event[1] not in done, f"{event[1]} worked after it was committed"
    for stage in STAGES:
        assert [int(e[2]) for e in world.events("step") if e[1] == stage] == list(range(1, 41))


def test_no_two_attempts_of_a_job_run_at_once(world: World) -> None:
    """The runner that comes after a SIGKILL waits until the orphan has saved and ended."""
    world.steps(400, "sft")
    process = world.start()
    world.await_event("step", "sft", "2")
    process.kill()
    process.communicate(timeout=SECONDS)
    world.steps(2, "sft")
    world.run()
    order = [event[0] for event in world.events() if event[0] in ("start", "saved") and event[1] == "sft"]
    assert order == ["start", "saved", "start"]


def test_a_stage_that_finished_unwatched_is_taken_over(world: World) -> None:
    """A stage that committed after its runner was killed is recorded as done, and not started again."""
    world.run()
    ledger = world.ledger
    before = len(world.starts())
    # As after a SIGKILL between the end of `report` and the runner's noting it.
    report = next(a for a in ledger.attempts() if a.run.stage == "report")
    report.exit.unlink()
    status = ledger.status()
    stages = [
        s.model_copy(update={"state": StageState.RUNNING, "result": None}) if s.name == "report" else s
        for s in status.stages
    ]
    conditions = [c for c in status.conditions if c.type != "Complete"]
    ledger.save_status(status.model_copy(update={"stages": stages, "conditions": conditions}))
    assert holds(world.run(), "Complete")
    assert len(world.starts()) == before


@pytest.fixture
def small_home(world: World) -> Iterator[Path]:
    """A $FINETUNE_HOME on a file system of 400 KiB."""
    world.home.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(world.home)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs privileges that this process lacks")
    yield world.home
    subprocess.run(["umount", "-l", str(world.home)], check=True)


def test_a_full_disk_is_told_and_freed_space_is_enough_to_go_on(
    world: World, small_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When nothing can be written any more, the runner says which disk is full, though the stage could not."""
    world.fault("merge", "fill")
    with pytest.raises(OSError, match="No space left") as caught:
        world.run()
    assert caught.value.filename is not None
    assert str(caught.value.filename).startswith(str(small_home))
    said = capsys.readouterr().err
    assert "merge, attempt 1, ended with exit code 69: it left no message" in said
    assert f"the disk of {small_home} is full (0 bytes free): free space there" in said
    with pytest.raises(OSError, match=f"No space left on device: '{small_home}"):
        world.run()
    (small_home / "filler").unlink()
    assert holds(world.run(), "Complete")
    assert world.starts() == [*STAGES[:5], *STAGES[4:]]


def test_the_store_is_looked_after_while_a_stage_runs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever keeps the store alive is called while stages run and while a retry is waited for."""
    monkeypatch.setattr(runner, "_REVIVE_SECONDS", 0.0)
    world.steps(100, "sft")
    world.fault("merge", 70)
    seen: list[str] = []
    world.run(revive=lambda: seen.append(world.events()[-1][1] if world.events() else ""))
    assert {"sft", "merge"} <= set(seen)


def test_waits_between_retries(world: World) -> None:
    """The runner keeps to the time that the plan wants between two attempts."""
    world.fault("sft", 70)
    world.run()
    status = world.ledger.status()
    sft = next(s for s in status.stages if s.name == "sft")
    assert sft.start_time is not None
    assert sft.completion_time is not None
    assert sft.completion_time - sft.start_time >= timedelta(seconds=10)
