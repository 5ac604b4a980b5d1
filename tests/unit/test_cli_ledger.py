"""What is remembered of jobs: names, locks, half-written files, the cache's bound."""

import multiprocessing
import os
import resource
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from finetune_api.stage import JobRef, StageRun
from finetune_api.status import JobStatus
from finetune_api.types import FineTuneJob
from finetune_cli import cache
from finetune_cli.checks import unusable_files
from finetune_cli.errors import CommandError
from finetune_cli.ledger import JobLedger, all_jobs, find_job, home, write_atomic
from finetune_cli.look import truthful

JOB = FineTuneJob.model_validate(
    {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "bot"},
        "spec": {
            "model": {"source": "hf://a/b"},
            "data": {"train": [{"source": "s3://x/y.jsonl"}]},
            "storage": {"bucket": "finetune"},
            "pipeline": [{"name": "sft", "sft": {"training": {"learningRate": 1e-5}}}],
        },
    },
    strict=False,
)


def adopted(root: Path, name: str, namespace: str = "default") -> JobLedger:
    """A job of that name that has run."""
    ledger = JobLedger(root, namespace, name)
    with ledger.locked():
        ledger.adopt(
            JOB.model_copy(update={"metadata": JOB.metadata.model_copy(update={"name": name})}), Path("x.yaml")
        )
    return ledger


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """$FINETUNE_HOME, else the XDG data directory, else its default."""
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("FINETUNE_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert home() == tmp_path / "finetune"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".local/share/finetune"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("suport-bot", "did you mean support-bot"),
        ("zzzzz", "known: other, support-bot"),
        ("elsewhere", "there is one in the namespace team: -n team"),
    ],
)
def test_an_unknown_name_gets_the_nearest(tmp_path: Path, name: str, words: str) -> None:
    """A name that no job has is answered with what was probably meant."""
    for known in ("support-bot", "other"):
        adopted(tmp_path, known)
    adopted(tmp_path, "elsewhere", namespace="team")
    with pytest.raises(CommandError, match=words):
        find_job(tmp_path, "default", name)
    assert [ledger.name for ledger in all_jobs(tmp_path, "default")] == ["other", "support-bot"]


def test_no_job_yet(tmp_path: Path) -> None:
    """In an empty home the answer is how to start."""
    with pytest.raises(CommandError, match="finetune run FILE"):
        find_job(tmp_path, "default", "x")


def test_what_is_recorded_comes_back(tmp_path: Path) -> None:
    """Job, status and attempt are read as they were written."""
    ledger = adopted(tmp_path, "bot")
    record = ledger.record()
    assert record.job.spec == JOB.spec
    assert record.job.metadata.uid
    run = StageRun(job=JobRef(namespace="default", name="bot", uid="u"), stage="sft", attempt=3, spec=JOB.spec)
    ledger.add("bot-sft-3", run)
    [attempt] = ledger.attempts()
    assert (attempt.name, attempt.run, attempt.log.name) == ("bot-sft-3", run, "sft-3.log")
    attempt.remove()
    assert ledger.attempts() == []


@pytest.mark.parametrize("file", ["job.json", "status.json"])
def test_a_damaged_record_is_told_with_its_path(tmp_path: Path, file: str) -> None:
    """Half a file leads to words that name it and the way out, not to a traceback."""
    ledger = adopted(tmp_path, "bot")
    (ledger.directory / file).write_text('{"job": {"half')
    with pytest.raises(CommandError, match=f"cannot read .*{file}"):
        ledger.record() if file == "job.json" else ledger.status()


def test_the_last_word_wins_not_the_half_written(tmp_path: Path) -> None:
    """A crash while writing leaves the old file: the new one appears as a whole."""
    ledger = adopted(tmp_path, "bot")
    ledger.save_status(JobStatus(summary="old"))
    (ledger.directory / ".status.json.1").write_text('{"summary": "ne')
    assert ledger.status().summary == "old"


def _hold(directory: str, pipe: Connection) -> None:
    with JobLedger(Path(directory), "default", "bot").locked():
        pipe.send(os.getpid())
        pipe.recv()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """A lock that another process holds is refused with its process id, and is free again when that process is gone."""
    ledger = adopted(tmp_path, "bot")
    ours, theirs = multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=_hold, args=(str(tmp_path), theirs))
    other.start()
    pid = ours.recv()
    assert ledger.running
    with pytest.raises(CommandError, match=f"process {pid}"), ledger.locked():
        pass
    other.kill()
    other.join()
    assert not ledger.running
    with ledger.locked():
        assert ledger.running


def test_status_tells_the_truth_when_the_runner_is_gone(tmp_path: Path) -> None:
    """A status that says Running is shown as stopped once nobody runs the job."""
    ledger = adopted(tmp_path, "bot")
    ledger.save_status(
        JobStatus.model_validate({"summary": "Running sft", "stages": [{"name": "sft", "state": "Running"}]})
    )
    assert truthful(ledger).summary.startswith("Stopped")
    assert truthful(ledger).stages[0].state == "Suspended"
    with ledger.locked():
        assert truthful(ledger).summary == "Running sft"


def test_logs_come_in_the_order_of_running(tmp_path: Path) -> None:
    """Not by name, and of one stage only where asked; a stage's name may end in a number."""
    ledger = adopted(tmp_path, "bot")
    folder = ledger.directory / "logs"
    folder.mkdir()
    for age, name in enumerate(["sft-2", "sft-2-1", "gguf-1", "sft-1"]):
        (folder / f"{name}.log").write_text("x")
        os.utime(folder / f"{name}.log", (1000 - age, 1000 - age))
    assert [path.stem for path in ledger.logs()] == ["sft-1", "gguf-1", "sft-2-1", "sft-2"]
    assert [path.stem for path in ledger.logs("sft")] == ["sft-1", "sft-2"]
    assert [path.stem for path in ledger.logs("sft-2")] == ["sft-2-1"]


def test_forgetting_a_job_leaves_the_others(tmp_path: Path) -> None:
    """Its records and scratch go, nothing else."""
    ledger = adopted(tmp_path, "bot")
    adopted(tmp_path, "other")
    ledger.forget()
    assert [known.name for known in all_jobs(tmp_path, "default")] == ["other"]


def test_the_cache_loses_what_was_used_longest_ago(tmp_path: Path) -> None:
    """Files go, oldest use first, until the rest fits; a use is a new hard link."""
    for name in "abcd":
        (tmp_path / name).write_bytes(b"x" * 100)
    os.link(tmp_path / "a", tmp_path.parent / f"{tmp_path.name}-user")
    cache.prune(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d"]
    assert cache.used(tmp_path) == 200
    cache.prune(tmp_path, 200)
    assert cache.used(tmp_path) == 200


@pytest.mark.parametrize(("text", "size"), [("100", 100), ("2Ki", 2048), ("3Gi", 3 * 2**30)])
def test_the_cache_bound_can_be_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, size: int) -> None:
    """$FINETUNE_CACHE_SIZE in the units of Kubernetes."""
    monkeypatch.setenv("FINETUNE_CACHE_SIZE", text)
    assert cache.bound(tmp_path) == size


def test_a_wrong_cache_bound_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is no size is refused with an example."""
    monkeypatch.setenv("FINETUNE_CACHE_SIZE", "20 gigs")
    with pytest.raises(CommandError, match=r"FINETUNE_CACHE_SIZE.*20Gi"):
        cache.bound(tmp_path)


def test_missing_sources_are_all_named_at_once(tmp_path: Path) -> None:
    """Each file or package that is not here, with the field that names it."""
    (tmp_path / "there.jsonl").write_text("{}")
    there, gone = f"file://{tmp_path}/there.jsonl", f"file://{tmp_path}/gone.jsonl"
    job = JOB.model_validate(
        {
            **JOB.model_dump(mode="json", by_alias=True, exclude_unset=True),
            "spec": {
                **JOB.spec.model_dump(mode="json", by_alias=True, exclude_unset=True),
                "model": {"source": "package://no_such_package/model.gguf"},
                "data": {"train": [{"source": there}, {"source": gone}], "test": [{"source": "hf://datasets/a/b"}]},
                "pipeline": [{"name": "sft", "sft": {}, "data": {"train": [{"source": gone}]}}],
            },
        },
        strict=False,
    )
    assert [(e.path, e.message) for e in unusable_files(job)] == [
        ("spec.model.source", "the Python package no_such_package is not installed: `pip install no-such-package`"),
        ("spec.data.train[1].source", f"no such file or directory: {tmp_path}/gone.jsonl"),
        ("spec.pipeline[0].data.train[0].source", f"no such file or directory: {tmp_path}/gone.jsonl"),
    ]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """On a full disk (here: a limit on the size of files) the error names the file, and no half of one stays."""
    path = tmp_path / "status.json"
    write_atomic(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*status\.json"):
            write_atomic(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("status.json", "old")]


def test_a_package_without_the_file(tmp_path: Path) -> None:
    """A package that is here but lacks the file is told apart from one that is not here."""
    spec = JOB.spec.model_copy(update={"model": JOB.spec.model.model_copy(update={"source": "package://json/x.gguf"})})
    [error] = unusable_files(JOB.model_copy(update={"spec": spec}))
    assert error.message == "the package json has no file 'x.gguf'"
