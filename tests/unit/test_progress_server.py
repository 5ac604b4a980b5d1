"""The progress server, over real TLS: who may say what, what it keeps, and how a follower helps."""

import json
import socket
import ssl
import threading
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.progress_parts import API, DOWN, UPDATE, Signer, a_pod, own_certificate, post, running

from finetune_operator.certificates import valid_until
from finetune_operator.lookup import Reported
from finetune_operator.progress import BODY_BYTES, PASSED_ON, ProgressServer
from finetune_operator.replicas import Replica
from finetune_operator.tokens import PodIdentity, TokenReviews

AT = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Names:
    """A verifier for which a token is the pod's name; the uid follows from it."""

    async def verify(self, token: str) -> PodIdentity:
        """Everybody is who they say."""
        return PodIdentity("team", token, f"uid-{token}")


class Operator:
    """One replica, and what surrounds it."""

    def __init__(self, *, leads: bool = True, verifier: Any = None) -> None:
        self.leads = leads
        self.leader: Replica | None = None
        self.pods = {"a": a_pod("a", "uid-a")}
        self.told: list[str] = []
        self.ticks = 1000.0
        self.own = own_certificate()
        self.server = ProgressServer(
            verifier or Names(),
            pod=lambda namespace, name: self.pods.get(name) if namespace == "team" else None,
            enqueue=self.told.append,
            leading=lambda: self.leads,
            leader=lambda: self.leader,
            clock=lambda: AT,
            ticks=lambda: self.ticks,
        )

    def started(self, stack: ExitStack) -> int:
        """Its port, for the length of the stack."""
        return stack.enter_context(running(self.server, self.own))

    @property
    def bundle(self) -> str:
        """What its clients trust."""
        return "".join(self.own.published)

    def as_replica(self, port: int) -> Replica:
        """As it would publish itself."""
        return Replica(f"https://127.0.0.1:{port}", tuple((pem, valid_until(pem)) for pem in self.own.published))


def body(**changes: Any) -> bytes:
    """An update as a stage sends it, with something else in it."""
    return json.dumps({**json.loads(UPDATE), **changes}).encode()


def test_an_update_is_kept_and_the_job_is_looked_at() -> None:
    """Progress and checkpoint stand for the pod's uid, with the server's time; the job's key is told once."""
    operator = Operator()
    checkpoint = {"step": 2, "uri": "s3://b/team/bot/sft/1/checkpoints/step-2"}
    sent = body(checkpoint=checkpoint, updatedTime="2001-01-01T00:00:00", etaSeconds=90, newer="field")
    with ExitStack() as stack:
        assert post(operator.started(stack), operator.bundle, sent, "a") == (204, "")
    kept = operator.server.reported("uid-a")
    assert kept.progress is not None
    assert kept.checkpoint is not None
    assert (kept.progress.step, kept.progress.total_steps, kept.progress.eta_seconds) == (3, 12, 90)
    assert kept.progress.metrics[0].value == "1.3"
    assert kept.progress.updated_time == AT
    assert (kept.checkpoint.step, kept.checkpoint.uri) == (2, checkpoint["uri"])
    assert operator.told == ["team/bot"]


def test_nothing_is_known_of_a_pod_that_said_nothing() -> None:
    """The controller gets an empty answer, not an error."""
    assert Operator().server.reported("uid-a") == Reported()


@pytest.mark.parametrize(
    ("pods", "words"),
    [
        ({}, "pod team/a is no stage that runs"),
        ({"a": a_pod("a", "uid-of-a-later-one")}, "pod team/a is no stage that runs"),
        ({"a": {"metadata": {"name": "a", "uid": "uid-a"}}}, "pod team/a is no stage that runs"),
        ({"a": a_pod("a", "uid-a", **{"app.kubernetes.io/managed-by": "somebody"})}, "is not the operator's"),
    ],
    ids=["gone", "another-of-that-name", "no-labels", "not-ours"],
)
def test_only_a_stage_of_ours_may_report(pods: dict[str, Any], words: str) -> None:
    """A token that is good, but of a pod that the operator does not have: 403, and nothing is kept."""
    operator = Operator()
    operator.pods = pods
    with ExitStack() as stack:
        status, said = post(operator.started(stack), operator.bundle, UPDATE, "a")
    assert status == 403
    assert words in said
    assert (operator.server.kept, operator.told) == (0, [])


def test_a_stage_reports_itself_whatever_it_says() -> None:
    """Whom an update is about is the token's to say, not the body's."""
    operator = Operator()
    operator.pods["b"] = a_pod("b", "uid-b", job="other")
    with ExitStack() as stack:
        sent = body(pod="b", uid="uid-b", namespace="other", job="other", stage="sft")
        assert post(operator.started(stack), operator.bundle, sent, "a")[0] == 204
    assert operator.server.reported("uid-b") == Reported()
    assert operator.told == ["team/bot"]


def test_without_a_good_token_nothing_is_taken() -> None:
    """No header, another scheme, a token that the API server does not know: 401. If it cannot be asked: 503."""
    api = API()
    operator = Operator(verifier=TokenReviews(api.client))
    with ExitStack() as stack:
        port = operator.started(stack)
        assert post(port, operator.bundle, UPDATE)[0] == 401
        assert post(port, operator.bundle, UPDATE, headers={"Authorization": "Basic eDp5"})[0] == 401
        assert post(port, operator.bundle, UPDATE, "nonsense")[0] == 401
        token = "e30.e30.e30"
        assert post(port, operator.bundle, UPDATE, token)[0] == 401
        good = Signer(ec.generate_private_key(ec.SECP256R1())).token(exp=time.time() + 3600)
        api.down = DOWN
        assert post(port, operator.bundle, UPDATE, good)[0] == 503
        api.down = None
        api.accept(good, "a", "uid-a")
        assert post(port, operator.bundle, UPDATE, good)[0] == 204
    assert operator.server.kept == 1


def test_one_update_a_second_is_taken() -> None:
    """More often is 429, which changes nothing and disturbs no other pod."""
    operator = Operator()
    operator.pods["b"] = a_pod("b", "uid-b")
    with ExitStack() as stack:
        port = operator.started(stack)
        assert post(port, operator.bundle, body(step=1), "a")[0] == 204
        operator.ticks += 0.9
        assert post(port, operator.bundle, body(step=2), "a") == (429, "one update a second")
        assert post(port, operator.bundle, body(step=3), "b")[0] == 204
        operator.ticks += 0.1
        assert post(port, operator.bundle, body(step=4), "a")[0] == 204
    assert operator.server.reported("uid-a").progress.step == 4  # type: ignore[union-attr]
    assert len(operator.told) == 3


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"", "Invalid JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"[" * 10_000, "Invalid JSON"),
        (body(step=-1), "step: "),
        (body(step=2**63), "step: "),
        (body(step="many"), "step: "),
        (body(percent=101), "percent: "),
        (body(etaSeconds=10**30), "etaSeconds: "),
        (body(tokensPerSecond=1.5), "tokensPerSecond: "),
        (body(metrics=[{"name": "m", "value": "1"}] * 17), "metrics: "),
        (body(metrics=[{"name": "m" * 257, "value": "1"}]), "metrics.0.name: "),
        (body(checkpoint={"step": -1, "uri": "s3://b/k"}), "checkpoint.step: "),
        (body(checkpoint={"step": 1, "uri": "s" * 2049}), "checkpoint.uri: "),
        (body(checkpoint={"step": 1}), "checkpoint.uri: "),
    ],
)
def test_an_update_that_a_status_could_not_hold_is_refused(sent: bytes, words: str) -> None:
    """One number that the API server refused would keep a job's whole status from being written; the field is named."""
    operator = Operator()
    with ExitStack() as stack:
        status, said = post(operator.started(stack), operator.bundle, sent, "a")
    assert status == 400
    assert words in said
    assert operator.server.reported("uid-a") == Reported()
    assert operator.told == []


def test_a_body_is_read_up_to_its_bound() -> None:
    """16 KiB are taken, one byte more is 413; the server goes on."""
    operator = Operator()
    full = body(comment="")
    with ExitStack() as stack:
        port = operator.started(stack)
        fits = body(comment="x" * (BODY_BYTES - len(full)))
        assert len(fits) == BODY_BYTES
        assert post(port, operator.bundle, fits + b" ", "a")[0] == 413
        assert post(port, operator.bundle, fits, "a")[0] == 204


@pytest.fixture(scope="module")
def fuzzed() -> Any:
    """A server for thousands of requests."""
    operator = Operator()
    with ExitStack() as stack:
        yield operator, operator.started(stack)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ["step", "totalSteps", "percent", "etaSeconds", "tokensPerSecond", "metrics", "updatedTime", "checkpoint"]


@settings(max_examples=60, deadline=None)
@given(
    sent=st.binary(max_size=300) | st.dictionaries(st.sampled_from(FIELDS), JSON).map(lambda d: json.dumps(d).encode())
)
def test_no_body_harms_the_server(fuzzed: tuple[Operator, int], sent: bytes) -> None:
    """Taken or refused in words; what is kept is something that a status can hold."""
    operator, port = fuzzed
    operator.ticks += 1
    status, _ = post(port, operator.bundle, sent, "a")
    assert status in (204, 400)
    kept = operator.server.reported("uid-a")
    if kept.progress is not None:
        shown = json.loads(kept.progress.model_dump_json(by_alias=True))
        assert all(0 <= shown[name] < 2**54 for name in ("step", "totalSteps", "percent"))
        assert shown["updatedTime"] == "2026-01-01T12:00:00Z"


@settings(max_examples=30, deadline=None)
@given(token=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=200))
def test_no_token_harms_the_server(fuzzed: tuple[Operator, int], token: str) -> None:
    """Whatever stands in the header, the answer is a refusal."""
    operator, port = fuzzed
    for words in (token, f"Bearer {token}x"):
        assert post(port, operator.bundle, UPDATE, headers={"Authorization": words})[0] in (401, 403)


def test_pods_that_are_gone_are_forgotten_and_the_rest_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deleted pod leaves nothing; of too many the one that was silent longest goes."""
    monkeypatch.setattr("finetune_operator.progress.PODS", 3)
    operator = Operator()
    operator.pods = {name: a_pod(name, f"uid-{name}") for name in "abcd"}
    with ExitStack() as stack:
        port = operator.started(stack)
        for name in "abcad":
            assert post(port, operator.bundle, UPDATE, name)[0] == 204
            operator.ticks += 1
    kept = [name for name in "abcd" if operator.server.reported(f"uid-{name}") != Reported()]
    assert kept == ["a", "c", "d"]
    operator.server.on_pod(operator.pods["c"], operator.pods["c"])
    assert operator.server.kept == 3
    operator.server.on_pod(operator.pods["c"], None)
    operator.server.on_pod(operator.pods["b"], None)
    assert [name for name in "abcd" if operator.server.reported(f"uid-{name}") != Reported()] == ["a", "d"]


def test_a_client_that_trusts_another_certificate_is_not_served() -> None:
    """A stage never shows its token to a server that the operator did not vouch for."""
    operator = Operator()
    with ExitStack() as stack:
        port = operator.started(stack)
        with pytest.raises(ssl.SSLCertVerificationError):
            post(port, own_certificate().published[0], UPDATE, "a")
    assert operator.server.kept == 0


def test_idle_and_slow_connections_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """More connections than are allowed, some without a word: the old are closed, a stage still gets through."""
    monkeypatch.setattr("finetune_operator.progress.CONNECTIONS", 10)
    operator = Operator()
    with ExitStack() as stack:
        port = operator.started(stack)
        context = ssl.create_default_context(cadata=operator.bundle)
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(10)]
        open_ones = [
            context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="127.0.0.1")
            for _ in range(30)
        ]
        for connection in [*idle, *open_ones]:
            stack.callback(connection.close)
        for connection in open_ones[:5]:
            connection.sendall(
                b"POST /v1/progress HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a\r\nContent-Length: 99\r\n\r\n"
            )
        assert post(port, operator.bundle, UPDATE, "a")[0] == 204
        for connection in open_ones[:20]:
            connection.settimeout(60)
            assert connection.recv(1000) == b""  # swept away


def test_a_follower_passes_updates_on_to_the_leader() -> None:
    """The leader keeps it, the follower nothing; the leader's own answer comes back, refusals too."""
    leader, follower = Operator(), Operator(leads=False)
    leader.pods["b"] = a_pod("b", "uid-b")
    del leader.pods["a"]
    with ExitStack() as stack:
        follower.leader = leader.as_replica(leader.started(stack))
        port = follower.started(stack)
        assert post(port, follower.bundle, UPDATE, "b") == (204, "")
        assert post(port, follower.bundle, UPDATE, "b") == (429, "one update a second")
        assert post(port, follower.bundle, UPDATE, "a") == (403, "pod team/a is no stage that runs")
        leader.ticks += 1
        assert post(port, follower.bundle, b"{", "b")[0] == 400
    assert leader.server.reported("uid-b").progress.step == 3  # type: ignore[union-attr]
    assert leader.told == ["team/bot"]
    assert (follower.server.kept, follower.told) == (0, [])


def test_an_update_goes_round_no_circle() -> None:
    """Two followers that take each other for the leader, or one that takes itself for it: 503 at once."""
    one, other = Operator(leads=False), Operator(leads=False)
    with ExitStack() as stack:
        ports = one.started(stack), other.started(stack)
        one.leader, other.leader = other.as_replica(ports[1]), one.as_replica(ports[0])
        assert post(ports[0], one.bundle, UPDATE, "a") == (503, "nobody leads just now")
        one.leader = one.as_replica(ports[0])
        assert post(ports[0], one.bundle, UPDATE, "a") == (503, "nobody leads just now")
        one.leader = None
        assert post(ports[0], one.bundle, UPDATE, "a") == (503, "nobody leads just now")


def test_a_leader_takes_what_was_passed_on() -> None:
    """The mark only keeps it from being passed on again."""
    leader = Operator()
    with ExitStack() as stack:
        assert post(leader.started(stack), leader.bundle, UPDATE, "a", {PASSED_ON: "1"})[0] == 204


def test_a_leader_that_is_gone_or_shows_another_certificate_is_not_told() -> None:
    """No token goes to whoever took over its address."""
    leader, follower, stranger = Operator(), Operator(leads=False), Operator()
    with ExitStack() as stack:
        port = follower.started(stack)
        with ExitStack() as short:
            follower.leader = leader.as_replica(leader.started(short))
            assert post(port, follower.bundle, UPDATE, "a")[0] == 204
        assert post(port, follower.bundle, UPDATE, "a")[0] == 503
        there = stranger.started(stack)
        follower.leader = leader.as_replica(there)
        assert post(port, follower.bundle, UPDATE, "a")[0] == 503
    assert stranger.server.kept == 0


def test_a_new_certificate_is_shown_without_a_restart() -> None:
    """Published for an hour beside the old one, then shown; a client that trusts both notices nothing."""
    operator = Operator()
    made = datetime.now(UTC) - timedelta(days=6)
    operator.own = own_certificate(made)
    old = operator.bundle
    with ExitStack() as stack:
        port = operator.started(stack)
        operator.own.renew(made + timedelta(days=5))
        both = operator.bundle
        assert both.startswith(old)
        assert len(both) > len(old)
        assert post(port, both, UPDATE, "a")[0] == 204
        assert post(port, old, UPDATE, "a")[0] == 429
        operator.own.renew(made + timedelta(days=5, hours=2))
        new = operator.bundle
        assert both == old + new
        assert post(port, both, UPDATE, "a")[0] == 429
        with pytest.raises(ssl.SSLCertVerificationError):
            post(port, old, UPDATE, "a")


def test_many_stages_at_once_are_served() -> None:
    """A hundred at the same moment: each is taken, once."""
    operator = Operator()
    operator.pods = {f"p{i}": a_pod(f"p{i}", f"uid-p{i}", job=f"j{i}") for i in range(100)}
    answers: list[int] = []
    with ExitStack() as stack:
        port = operator.started(stack)
        threads = [
            threading.Thread(target=lambda n=name: answers.append(post(port, operator.bundle, UPDATE, n)[0]))
            for name in operator.pods
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [204] * 100
    assert sorted(operator.told) == sorted(f"team/j{i}" for i in range(100))
