import asyncio
import json
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tests.fakes import FakeServer, cuts, fake_server, hangs, real_time, refuses, says, streams, text

from finetune_operator.kube import Client, HTTPSettings, Metrics, Resource
from finetune_operator.kube.errors import (
    AlreadyExistsError,
    ConflictError,
    CredentialsError,
    ForbiddenError,
    GoneError,
    InvalidError,
    KubeError,
    NotFoundError,
    NotLeadingError,
    ServerError,
    SilentError,
    ThrottledError,
    UnauthorizedError,
    UnreachableError,
)

JOBS = Resource("batch", "v1", "jobs")
NODES = Resource("", "v1", "nodes", namespaced=False)
QUICK = HTTPSettings(attempts=3, first_wait=0.01, longest_wait=0.05, request_timeout=20, watch_silence=20)
JOB: dict[str, Any] = {"kind": "Job", "metadata": {"name": "a", "namespace": "n"}}


async def connect(server: FakeServer, directory: Path, settings: HTTPSettings = QUICK, **user: str) -> Client:
    """A client of that server."""
    return await Client.connect(server.kubeconfig(directory, **user), settings=settings)


def test_paths_are_those_of_the_api() -> None:
    """Core and named groups, namespaces, names, subresources; odd characters cannot leave their place."""
    assert JOBS.path("n", "a", "status") == "/apis/batch/v1/namespaces/n/jobs/a/status"
    assert JOBS.path(None) == "/apis/batch/v1/jobs"
    assert NODES.path(None, "x") == "/api/v1/nodes/x"
    assert JOBS.path("n", "../b?c") == "/apis/batch/v1/namespaces/n/jobs/..%2Fb%3Fc"
    assert (str(JOBS), str(NODES)) == ("jobs.batch", "nodes")
    with pytest.raises(ValueError, match="namespace"):
        JOBS.path(None, "a")


@real_time
async def test_verbs_say_what_they_mean(tmp_path: Path) -> None:
    """Methods, paths, bodies, content types and the deletion's options, as the API wants them."""
    async with fake_server() as server, await connect(server, tmp_path, token="secret") as client:
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            server.on(method, says(JOB))
        assert await client.create(JOBS, "n", JOB) == JOB
        await client.replace(JOBS, "n", "a", JOB)
        await client.replace_status(JOBS, "n", "a", JOB)
        await client.patch(JOBS, "n", "a", {"spec": {}}, subresource="scale")
        await client.delete(JOBS, "n", "a", uid="u")
        base = "/apis/batch/v1/namespaces/n/jobs"
        wanted = [
            ("POST", base, "application/json", JOB),
            ("PUT", f"{base}/a", "application/json", JOB),
            ("PUT", f"{base}/a/status", "application/json", JOB),
            ("PATCH", f"{base}/a/scale", "application/merge-patch+json", {"spec": {}}),
            (
                "DELETE",
                f"{base}/a",
                "application/json",
                {
                    "apiVersion": "v1",
                    "kind": "DeleteOptions",
                    "propagationPolicy": "Foreground",
                    "preconditions": {"uid": "u"},
                },
            ),
        ]
        got = [(r.method, r.path, r.headers["Content-Type"], json.loads(r.body)) for r in server.requests]
        assert got == wanted
        assert {r.headers["Authorization"] for r in server.requests} == {"Bearer secret"}
        assert await client.namespace() == "here"


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (400, "BadRequest", InvalidError),
        (403, "Forbidden", ForbiddenError),
        (404, "NotFound", NotFoundError),
        (409, "Conflict", ConflictError),
        (409, "AlreadyExists", AlreadyExistsError),
        (410, "Expired", GoneError),
        (413, "RequestEntityTooLarge", InvalidError),
        (415, "UnsupportedMediaType", InvalidError),
        (422, "Invalid", InvalidError),
    ],
)
def test_refusals_are_typed_and_final(tmp_path: Path, code: int, reason: str, kind: type[KubeError]) -> None:
    """Each has its class and the server's words, and is not asked again."""

    @real_time
    async def scenario() -> None:
        async with fake_server() as server, await connect(server, tmp_path) as client:
            server.on("GET", refuses(code, reason, "so it is"))
            with pytest.raises(kind, match="GET /apis/batch/v1/namespaces/n/jobs/a: so it is") as caught:
                await client.get(JOBS, "n", "a")
            assert type(caught.value) is kind
            assert len(server.requests) == 1

    scenario()


@real_time
async def test_an_invalid_object_names_its_fields(tmp_path: Path) -> None:
    """What the server lists as causes is kept, for whoever puts it into a condition."""
    cause = {"field": "spec.x", "message": "must be 1", "reason": "FieldValueInvalid"}
    async with fake_server() as server, await connect(server, tmp_path) as client:
        server.on("POST", says({"code": 422, "message": "invalid", "details": {"causes": [cause]}}, 422))
        with pytest.raises(InvalidError) as caught:
            await client.create(JOBS, "n", JOB)
        assert caught.value.causes == (cause,)


@real_time
async def test_a_missing_kind_is_answered_in_plain_text(tmp_path: Path) -> None:
    """A server that does not know the resource says 404 without a Status object."""
    async with fake_server() as server, await connect(server, tmp_path) as client:
        server.on("GET", text("404 page not found\n", 404))
        with pytest.raises(NotFoundError, match="404 page not found"):
            await client.get(JOBS, "n", "a")


@real_time
async def test_reads_are_tried_again_after_any_passing_failure(tmp_path: Path) -> None:
    """A 500, a cut connection, a torn answer: the next attempt may do; after the last its error is raised."""
    settings = HTTPSettings(attempts=5, first_wait=0.01, longest_wait=0.02)
    async with fake_server() as server, await connect(server, tmp_path, settings) as client:
        server.on("GET", refuses(500), cuts(), text('{"torn": '), refuses(504), says(JOB))
        assert await client.get(JOBS, "n", "a") == JOB
        server.requests.clear()
        server.on("GET", refuses(503, message="etcd is away"))
        with pytest.raises(ServerError, match="etcd is away"):
            await client.get(JOBS, "n", "a")
        assert len(server.requests) == 5
        server.requests.clear()
        with pytest.raises(ServerError):
            await client.without_retries().get(JOBS, "n", "a")
        assert len(server.requests) == 1


@real_time
async def test_writes_are_not_tried_again_where_they_may_have_happened(tmp_path: Path) -> None:
    """After a 500 or a lost answer nobody knows: the caller decides, having looked."""
    async with fake_server() as server, await connect(server, tmp_path) as client:
        server.on("POST", refuses(500))
        with pytest.raises(ServerError):
            await client.create(JOBS, "n", JOB)
        server.on("POST", cuts())
        with pytest.raises(UnreachableError):
            await client.create(JOBS, "n", JOB)
        assert len(server.requests) == 2


@real_time
async def test_a_throttled_write_is_tried_again_when_the_server_says(tmp_path: Path) -> None:
    """429 was not carried out; Retry-After is waited for, within the client's own patience."""
    settings = HTTPSettings(attempts=3, first_wait=0.01, longest_wait=5)
    async with fake_server() as server, await connect(server, tmp_path, settings) as client:
        server.on("POST", refuses(429, headers={"Retry-After": "1"}), says(JOB))
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await client.create(JOBS, "n", JOB) == JOB
        assert loop.time() - began >= 1
        server.on("POST", refuses(429))
        with pytest.raises(ThrottledError):
            await client.create(JOBS, "n", JOB)
        assert len(server.requests) == 5


@real_time
async def test_a_refused_connection_is_tried_again_even_for_writes(tmp_path: Path) -> None:
    """Nobody listened, so nothing happened; in the end the error says where."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = FakeServer(url=f"http://127.0.0.1:{port}")
    metrics = Metrics()
    async with await Client.connect(server.kubeconfig(tmp_path), settings=QUICK, metrics=metrics) as client:
        with pytest.raises(UnreachableError, match=str(port)):
            await client.create(JOBS, "n", JOB)
    labels = {"method": "POST", "code": "ClientConnectorError"}
    assert metrics.registry.get_sample_value("rest_client_requests_total", labels) == 3


@real_time
async def test_a_hanging_server_is_given_up(tmp_path: Path) -> None:
    """No answer within the request's time is an UnreachableError."""
    settings = HTTPSettings(attempts=2, first_wait=0.01, request_timeout=0.3)
    async with fake_server() as server, await connect(server, tmp_path, settings) as client:
        server.on("GET", hangs())
        with pytest.raises(UnreachableError):
            await client.get(JOBS, "n", "a")
        assert len(server.requests) == 2


@real_time
async def test_a_rejected_token_is_read_again_at_once(tmp_path: Path) -> None:
    """A rotated token file is noticed by the 401; a second 401 is the caller's."""
    token = tmp_path / "token"
    token.write_text("old\n")
    async with fake_server() as server, await connect(server, tmp_path, tokenFile=str(token)) as client:
        server.on("GET", refuses(401), says(JOB))
        token.write_text("new\n")
        assert await client.get(JOBS, "n", "a") == JOB
        assert [r.headers["Authorization"] for r in server.requests] == ["Bearer old", "Bearer new"]
        server.on("GET", refuses(401, message="Unauthorized"))
        with pytest.raises(UnauthorizedError):
            await client.get(JOBS, "n", "a")
        assert len(server.requests) == 4


@real_time
async def test_a_token_file_is_read_again_before_the_token_ends(tmp_path: Path) -> None:
    """Without any refusal, once it is older than ``refresh``; if the file is away for a moment, the old one serves."""
    token = tmp_path / "token"
    token.write_text("old")
    settings = HTTPSettings(refresh=0)
    async with fake_server() as server, await connect(server, tmp_path, settings, tokenFile=str(token)) as client:
        server.on("GET", says(JOB))
        await client.get(JOBS, "n", "a")
        token.write_text("new")
        await client.get(JOBS, "n", "a")
        token.unlink()
        await client.get(JOBS, "n", "a")
        assert [r.headers["Authorization"] for r in server.requests] == ["Bearer old", "Bearer new", "Bearer new"]


@pytest.mark.parametrize(
    ("expiry", "tokens"),
    [
        ("", ["t1", "t1", "t1", "t2"]),
        ("2999-01-01T00:00:00Z", ["t1", "t1", "t1", "t2"]),
        ("2001-01-01T00:00:00Z", ["t2", "t3", "t4", "t5"]),
    ],
)
def test_an_exec_plugin_runs_when_its_token_ends_or_is_rejected(tmp_path: Path, expiry: str, tokens: list[str]) -> None:
    """It may ask a person for a password: its token is used for as long as it said, or until the server refuses it."""
    plugin = tmp_path / "plugin"
    status = '\\"token\\": \\"t$n\\"' + (f', \\"expirationTimestamp\\": \\"{expiry}\\"' if expiry else "")
    plugin.write_text(
        '#!/bin/sh\necho run >> "$(dirname "$0")/runs"\n'
        'n=$(wc -l < "$(dirname "$0")/runs")\n'
        'echo "{\\"apiVersion\\": \\"client.authentication.k8s.io/v1\\", \\"kind\\": \\"ExecCredential\\",'
        f' \\"status\\": {{{status}}}}}"\n'
    )
    plugin.chmod(plugin.stat().st_mode | stat.S_IXUSR)

    @real_time
    async def scenario() -> None:
        user: Any = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin)}}
        settings = HTTPSettings(refresh=0)
        async with fake_server() as server, await connect(server, tmp_path, settings, **user) as client:
            server.on("GET", says(JOB), says(JOB), refuses(401), says(JOB))
            for _ in range(3):
                await client.get(JOBS, "n", "a")
            assert [r.headers["Authorization"] for r in server.requests] == [f"Bearer {token}" for token in tokens]

    scenario()


@real_time
async def test_a_configuration_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    """No file, no such context, a failing exec plugin: CredentialsError with the file's name."""
    with pytest.raises(CredentialsError, match=r"missing.*name a kubeconfig"):
        await Client.connect(tmp_path / "missing")
    server = FakeServer(url="http://127.0.0.1:1")
    with pytest.raises(CredentialsError, match="other"):
        await Client.connect(server.kubeconfig(tmp_path), "other")
    user: Any = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "/bin/false"}}
    with pytest.raises(CredentialsError, match="exec plugin"):
        await Client.connect(server.kubeconfig(tmp_path, **user))


@real_time
async def test_a_pod_uses_its_service_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kubeconfig, inside a pod: the mounted token and namespace, and the address from the environment."""
    from kubernetes.aio.config import incluster_config

    (tmp_path / "token").write_text("mounted")
    (tmp_path / "namespace").write_text("team")
    certificates = Path("/etc/ssl/certs/ca-certificates.crt")
    (tmp_path / "ca.crt").write_bytes(certificates.read_bytes())
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    async with await Client.connect() as client:
        access = await client.transport.access()
        assert (access.server, access.namespace) == ("https://[fd00::1]:443", "team")
        assert access.authorization.split() == ["bearer", "mounted"]
        assert access.tls is not None


@real_time
async def test_the_fence_holds_writes_back_and_lets_reads_pass(tmp_path: Path) -> None:
    """A fenced write does not reach the server, on its first attempt or a later one; the plain client still writes,
    on the same connections too.
    """
    leading = False

    def fence() -> None:
        if not leading:
            raise NotLeadingError("no more")

    async def throttles_while_the_lease_is_lost(request: web.Request) -> web.StreamResponse:
        nonlocal leading
        leading = False
        return await refuses(429)(request)

    async with fake_server() as server, await connect(server, tmp_path) as client:
        fenced = client.fenced(fence)
        server.on("GET", says(JOB))
        server.on("POST", says(JOB), throttles_while_the_lease_is_lost, says(JOB))
        with pytest.raises(NotLeadingError):
            await fenced.create(JOBS, "n", JOB)
        assert await fenced.get(JOBS, "n", "a") == JOB
        assert server.seen("POST") == []
        leading = True
        assert await fenced.create(JOBS, "n", JOB) == JOB
        with pytest.raises(NotLeadingError):
            await fenced.create(JOBS, "n", JOB)
        assert len(server.seen("POST")) == 2
        await client.create(JOBS, "n", JOB)
        assert len(server.seen("POST")) == 3


@pytest.mark.parametrize("at", [1, 2, 3])
def test_the_fence_is_asked_again_up_to_the_last_moment(tmp_path: Path, at: int) -> None:
    """Frozen before the request, while it waited for a connection, or just before the kernel's send: the server gets
    nothing.
    """

    @real_time
    async def scenario() -> None:
        asked = 0

        def fence() -> None:
            nonlocal asked
            asked += 1
            if asked == at:
                raise NotLeadingError("thawed too late")

        async with fake_server() as server, await connect(server, tmp_path) as client:
            server.on("PATCH", says(JOB))
            with pytest.raises(NotLeadingError, match="thawed too late"):
                await client.fenced(fence).patch(JOBS, "n", "a", {})
            assert asked == at
            await asyncio.sleep(0.1)
            assert server.requests == []

    scenario()


@real_time
async def test_lists_are_paged_and_their_items_say_what_they_are(tmp_path: Path) -> None:
    """Pages are put together; the items of built-in kinds get the kind that the server leaves out."""

    def page(names: str, following: str) -> dict[str, Any]:
        return {
            "kind": "JobList",
            "apiVersion": "batch/v1",
            "metadata": {"resourceVersion": "7", "continue": following},
            "items": [{"metadata": {"name": name}} for name in names],
        }

    async with fake_server() as server, await connect(server, tmp_path) as client:
        server.on("GET", says(page("ab", "next")), refuses(500), says(page("c", "")))
        found = await client.list(JOBS, "n", label_selector="x in (y,z)")
        assert found[0] == {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}}
        assert [item["metadata"]["name"] for item in found] == ["a", "b", "c"]
        assert server.requests[0].query == {"limit": "500", "labelSelector": "x in (y,z)"}
        assert server.requests[2].query["continue"] == "next"


EVENT = {"type": "ADDED", "object": {"metadata": {"name": "a", "resourceVersion": "5"}}}


@pytest.mark.parametrize(
    ("answer", "kind", "delivered"),
    [
        (streams(EVENT, '{"type": "MODI', then="end"), UnreachableError, ["5"]),
        (streams(EVENT, "no json\n"), UnreachableError, ["5"]),
        (streams(EVENT, '{"type": "MODIFIED"}\n'), UnreachableError, ["5"]),
        (streams(EVENT, then="hang"), SilentError, ["5"]),
        (streams(EVENT, {"type": "ERROR", "object": {"code": 410, "reason": "Expired"}}), GoneError, ["5"]),
        (streams(EVENT, {"type": "ERROR", "object": {"code": 500}}), ServerError, ["5"]),
        (streams(EVENT, {"type": "ERROR", "object": {}}), ServerError, ["5"]),
        (streams('{"type": "ADD', then="cut"), UnreachableError, []),
        (refuses(410), GoneError, []),
        (cuts(), UnreachableError, []),
        (hangs(), UnreachableError, []),
    ],
)
def test_a_watch_that_breaks_says_how(tmp_path: Path, answer: Any, kind: type[KubeError], delivered: list[str]) -> None:
    """Torn lines, cuts, silence and errors in the stream: what came before them has been delivered."""
    got = []

    async def follow(client: Client) -> None:
        async for _, obj in client.watch(JOBS, "n", resource_version="4"):
            got.append(obj["metadata"]["resourceVersion"])

    @real_time
    async def scenario() -> None:
        settings = HTTPSettings(watch_silence=1)
        async with fake_server() as server, await connect(server, tmp_path, settings) as client:
            server.on("WATCH", answer)
            with pytest.raises(kind) as caught:
                await follow(client)
            assert type(caught.value) is kind
            assert server.requests[0].query["allowWatchBookmarks"] == "true"
            assert server.requests[0].query["resourceVersion"] == "4"

    scenario()
    assert got == delivered


@real_time
async def test_a_large_event_in_many_pieces_arrives_whole(tmp_path: Path) -> None:
    """Lines may be longer than any buffer, and begin and end anywhere in what the network delivers."""
    big = {"type": "MODIFIED", "object": {"metadata": {"resourceVersion": "6"}, "data": "x" * 1_500_000}}
    line = json.dumps(big) + "\n"
    pieces = [line[i : i + 100_000] for i in range(0, len(line), 100_000)]
    async with fake_server() as server, await connect(server, tmp_path) as client:
        server.on("WATCH", streams(EVENT, *pieces, 0.05, json.dumps(EVENT), 0.05, "\n"))
        got = [event async for event in client.watch(JOBS, "n", resource_version="4")]
        assert got == [("ADDED", EVENT["object"]), ("MODIFIED", big["object"]), ("ADDED", EVENT["object"])]
