import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.builders import a_job

from finetune_api.stage import JobRef, StageRun
from finetune_cli.embedded import EmbeddedStore
from finetune_jobs.run.logs import Kept
from finetune_jobs.store import layout
from finetune_jobs.store.client import Store


@pytest.fixture
def said() -> Iterator[Callable[[Kept, str], None]]:
    """Says something through a handler, as a stage does."""
    logger = logging.getLogger("finetune.test")
    logger.setLevel(logging.INFO)
    logger.propagate = False

    def say(kept: Kept, text: str) -> None:
        logger.handlers[:] = [kept]
        logger.info(text)

    yield say
    logger.handlers.clear()


def test_the_end_of_a_long_log_is_kept(store: Store, said: Callable[[Kept, str], None]) -> None:
    """Whole lines, the last ones, no more than the bound; the object is where it was last said to belong."""
    kept = Kept(limit=100)
    kept.belongs_at(store, f"{store.prefix}/early.jsonl")
    kept.belongs_at(store, f"{store.prefix}/late.jsonl")
    for number in range(50):
        said(kept, f"line {number}")
    assert kept.upload(60)
    assert [item.key for item in store.list(f"{store.prefix}/")] == [f"{store.prefix}/late.jsonl"]
    lines = store.get_bytes(f"{store.prefix}/late.jsonl").decode().splitlines()
    assert lines == [f"line {number}" for number in range(38, 50)]


def test_nothing_is_brought_where_there_is_no_place(said: Callable[[Kept, str], None]) -> None:
    """An attempt that ended before it knew its store leaves no log, and no error."""
    kept = Kept()
    said(kept, "a word")
    assert not kept.upload(60)


def test_a_store_that_does_not_answer_is_given_up(
    connect: Callable[..., Store], said: Callable[[Kept, str], None]
) -> None:
    """The wait is bounded although a request that hangs cannot be broken off."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        kept = Kept()
        kept.belongs_at(connect(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}"), "x/log.jsonl")
        said(kept, "a word")
        assert not kept.upload(0.2)


def test_an_attempt_that_fails_leaves_its_words(
    store: Store, store_server: EmbeddedStore, prefix: str, tmp_path: Path
) -> None:
    """The log of a real stage is in the store whatever its exit code, to the last line, under attempt and writer."""
    storage = {"bucket": store.bucket, "prefix": prefix, "endpoint": store_server.endpoint}
    job = a_job(model={"source": f"s3://{store.bucket}/nothing"}, storage=storage)
    reference = JobRef(namespace="team", name="bot", uid="u-1")
    run = StageRun(job=reference, stage="prepare", attempt=2, spec=job.spec)
    (tmp_path / "stage.json").write_text(run.model_dump_json(by_alias=True, exclude_unset=True))
    environment = {
        **os.environ,
        **store_server.environment(),
        "FINETUNE_WRITER": "w-1",
        "FINETUNE_TERMINATION_LOG": str(tmp_path / "termination"),
    }
    command = [sys.executable, "-m", "finetune_jobs", str(tmp_path / "stage.json")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 66, ended.stderr
    found = [item.key for item in store.list(f"{layout.stage_prefix(prefix, reference, 'prepare')}/")]
    logs = [key for key in found if layout.attempt_of_log(key) == (2, "w-1")]
    assert len(logs) == 1, found
    lines = store.get_bytes(logs[0]).decode().splitlines()
    assert lines == [line for line in ended.stderr.splitlines() if line.startswith("{")]
    assert json.loads(lines[-1])["level"] == "error"
    assert json.loads((tmp_path / "termination").read_text())["error"] == json.loads(lines[-1])["message"]
