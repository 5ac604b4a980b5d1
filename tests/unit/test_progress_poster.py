"""A stage's side of progress: it tells the operator, and whatever the operator does, the stage goes on."""

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.unit.progress_parts import Server, own_certificate

from finetune_jobs.run.launch import Place, _environment
from finetune_jobs.run.poster import Poster, pause
from finetune_jobs.run.progress import Progress


class Stage:
    """The files that the kubelet mounts, and a poster that is not as patient as in life."""

    def __init__(self, directory: Path, server: Server) -> None:
        self.token, self.ca = directory / "token", directory / "ca.pem"
        self.token.write_text("one\n")
        self.ca.write_text("".join(server.own.published))
        self.server = server

    def poster(self, interval: float = 0.05, timeout: float = 5.0, url: str = "") -> Poster:
        """One that is told everything by the test."""
        return Poster(url or self.server.url, self.token, self.ca, interval=interval, timeout=timeout)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """With a server that answers."""
    server = Server(own_certificate())
    with server.running():
        yield Stage(tmp_path, server)


def wait_for(true: Callable[[], bool]) -> None:
    """Until it is; a minute at most."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def update(step: int) -> bytes:
    """An update as bytes."""
    return json.dumps({"step": step}).encode()


def test_an_update_arrives_with_the_token(stage: Stage) -> None:
    """What ``Progress`` writes to its file is what it posts, with the token as bearer."""
    path = stage.token.with_name("progress.json")
    progress = Progress(path, stage.poster())
    progress.checkpoint(2, "s3://b/k")
    progress.report(4, 4, {"loss": 1.25})
    progress.close()
    bearer, body = stage.server.posts[-1]
    assert bearer == "Bearer one"
    assert body == json.loads(path.read_text())
    assert (body["step"], body["totalSteps"], body["percent"], body["checkpoint"]["step"]) == (4, 4, 100, 2)
    assert body["metrics"] == [{"name": "loss", "value": "1.25"}]


def test_without_an_operator_the_file_is_all_there_is(tmp_path: Path) -> None:
    """Closing costs nothing then."""
    progress = Progress(tmp_path / "progress.json")
    progress.report(1, 1)
    progress.close()
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 1
    Progress(None).close()


def test_a_thousand_updates_are_few_posts(stage: Stage) -> None:
    """The first and the last arrive; those that a later one overtakes within the interval are never sent."""
    poster = stage.poster(interval=3600)
    for step in range(1000):
        poster.offer(update(step))
        if step == 0:
            wait_for(lambda: stage.server.steps == [0])
    poster.close()
    wait_for(lambda: len(stage.server.steps) == 2)
    assert stage.server.steps == [0, 999]


def test_updates_go_on_in_the_order_of_their_making(stage: Stage) -> None:
    """Each that has time to is sent; none twice, none after a later one."""
    poster = stage.poster(interval=0.001)
    for step in range(5):
        poster.offer(update(step))
        wait_for(lambda expected=step: stage.server.steps[-1:] == [expected])
    poster.close()
    assert stage.server.steps == [0, 1, 2, 3, 4]


def test_the_token_is_read_anew_for_each_post(stage: Stage) -> None:
    """The kubelet replaces it hourly."""
    poster = stage.poster()
    poster.offer(update(1))
    wait_for(lambda: len(stage.server.posts) == 1)
    stage.token.write_text("two")
    poster.offer(update(2))
    wait_for(lambda: len(stage.server.posts) == 2)
    poster.close()
    assert [bearer for bearer, _ in stage.server.posts] == ["Bearer one", "Bearer two"]


@pytest.mark.parametrize("before", ["", "no certificate", None, "another's"])
def test_the_trusted_certificates_are_read_anew_for_each_post(stage: Stage, before: str | None) -> None:
    """Before the operator's are there nothing is sent, no token above all; once they are, the latest update is."""
    good = stage.ca.read_text()
    if before is None:
        stage.ca.unlink()
    else:
        stage.ca.write_text("".join(own_certificate().published) if before == "another's" else before)
    poster = stage.poster()
    poster.offer(update(1))
    wait_for(lambda: poster._failures >= 2)
    assert stage.server.posts == []
    stage.ca.write_text(good)
    wait_for(lambda: stage.server.steps == [1])
    poster.close()


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_an_update_that_was_not_taken_is_sent_again_unless_there_is_a_later_one(stage: Stage, status: int) -> None:
    """The operator may be starting, may not know the pod yet, or may have no leader."""
    answers = iter([status, status, status])
    stage.server.answer = lambda: next(answers, 204)
    poster = stage.poster(interval=0.01)
    poster.offer(update(1))
    wait_for(lambda: len(stage.server.posts) >= 2)
    poster.offer(update(2))
    wait_for(lambda: stage.server.steps[-1] == 2 and len(stage.server.posts) >= 4)
    poster.close()
    assert set(stage.server.steps) == {1, 2}
    assert stage.server.steps == sorted(stage.server.steps)


@pytest.mark.parametrize("status", [400, 413])
def test_an_update_that_can_never_be_taken_is_dropped(stage: Stage, status: int) -> None:
    """The next one is sent all the same."""
    stage.server.answer = lambda: status if stage.server.steps == [1] else 204
    poster = stage.poster(interval=0.01)
    poster.offer(update(1))
    wait_for(lambda: stage.server.steps == [1])
    poster.offer(update(2))
    wait_for(lambda: stage.server.steps == [1, 2])
    poster.close()
    assert stage.server.steps == [1, 2]


def test_trouble_is_told_once(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """One warning with its cause; what follows is for who looks closely."""
    stage.server.answer = lambda: 500
    poster = stage.poster(interval=0.001)
    with caplog.at_level(logging.DEBUG, "finetune.progress"):
        poster.offer(update(1))
        wait_for(lambda: poster._failures >= 3)
    stage.server.answer = lambda: 204
    poster.close()
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert [r.getMessage() for r in warnings] == ["the operator was not told of the progress, the stage goes on: 500 "]
    assert sum(r.levelno == logging.DEBUG for r in caplog.records) >= 2


def test_a_server_that_is_down_does_not_hold_the_stage_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody listens: reporting and closing go on, with one warning."""
    server = Server(own_certificate())
    with server.running():
        pass
    poster = Stage(tmp_path, server).poster()
    progress = Progress(None, poster, interval=0)
    for step in range(1, 101):
        progress.report(step, 100)
    progress.close()
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) <= 1


def test_a_server_that_hangs_does_not_hold_the_stage_up(stage: Stage) -> None:
    """It takes the request and says nothing: updates are offered without waiting, and the end comes all the same."""
    hanging = threading.Event()
    stage.server.answer = lambda: 204 if hanging.wait(60) else 500
    poster = stage.poster(timeout=60)
    poster.offer(update(1))
    wait_for(lambda: stage.server.steps == [1])
    for step in range(1000):
        poster.offer(update(step))
    assert not hanging.is_set()
    poster.close(seconds=0.1)
    assert poster._thread.is_alive()  # left behind, as a daemon
    hanging.set()
    poster._thread.join(60)
    assert not poster._thread.is_alive()


def test_a_server_that_accepts_and_shakes_no_hands_is_given_up(tmp_path: Path) -> None:
    """The timeout covers the handshake, too, and the update is kept for later."""
    server = Server(own_certificate())  # listens, but nobody serves
    poster = Stage(tmp_path, server).poster(timeout=0.05)
    poster.offer(update(1))
    wait_for(lambda: poster._failures >= 1)
    with server.running():
        wait_for(lambda: server.steps[-1:] == [1])
    poster.close()


def test_the_wait_grows_while_nobody_answers() -> None:
    """A stage of days does not knock every five seconds on a door that is shut."""
    assert [pause(5, failures) for failures in (0, 1, 2, 3, 4, 5, 10_000)] == [5, 10, 20, 40, 60, 60, 60]


@pytest.mark.parametrize(
    "changes",
    [
        {"FINETUNE_PROGRESS_URL": ""},
        {"FINETUNE_PROGRESS_URL": "http://operator/v1/progress"},
        {"FINETUNE_PROGRESS_TOKEN_FILE": ""},
        {"FINETUNE_PROGRESS_CA_FILE": ""},
        {"RANK": "1"},
    ],
    ids=["nobody", "not-encrypted", "no-token", "no-ca", "not-the-first"],
)
def test_who_does_not_post(changes: dict[str, str]) -> None:
    """No thread is started where nobody is to be told, or nobody safely."""
    before = threading.active_count()
    assert Poster.of({**_GIVEN, **changes}) is None
    assert threading.active_count() == before


_GIVEN = {
    "FINETUNE_PROGRESS_URL": "https://operator/v1/progress",
    "FINETUNE_PROGRESS_TOKEN_FILE": "/var/run/finetune/token",
    "FINETUNE_PROGRESS_CA_FILE": "/var/run/finetune/ca.pem",
}


def test_of_several_processes_the_first_posts(tmp_path: Path) -> None:
    """The launcher hands the variables on; by its rank each worker knows, on whichever node it is."""
    places = [Place(2, index, "first", 29500) for index in range(2)]
    posters = [Poster.of(_environment(_GIVEN, rank, 2, place, tmp_path)) for place in places for rank in range(2)]
    assert [poster is not None for poster in posters] == [True, False, False, False]
    for poster in posters:
        if poster is not None:
            poster.close()


def test_posting_leaves_the_random_state_alone(stage: Stage) -> None:
    """A training's data order must not depend on whether somebody listens."""
    state = random.getstate()
    poster = stage.poster()
    poster.offer(update(1))
    wait_for(lambda: stage.server.steps == [1])
    poster.close()
    assert random.getstate() == state


def test_no_proxy_gets_to_see_the_token(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pod may have one for the way to the store; the operator is reached directly."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    poster = stage.poster()
    poster.offer(update(1))
    wait_for(lambda: stage.server.steps == [1])
    poster.close()
