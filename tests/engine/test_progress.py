"""Progress against a real API server: its tokens, keys and ConfigMaps, with no more rights than the operator has."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.builders import a_job
from tests.cluster.controlplane import ControlPlane
from tests.fakes import real_time, until
from tests.unit.progress_parts import UPDATE, a_pod, encoded, post

from finetune_api.stage import JobRef, StageRun
from finetune_jobs.run.poster import Poster
from finetune_operator.certificates import OwnCertificate
from finetune_operator.jwt import InvalidTokenError, unverified_claims
from finetune_operator.kube.client import Client
from finetune_operator.kube.errors import ForbiddenError
from finetune_operator.kube.reflector import Reflector
from finetune_operator.lookup import PODS
from finetune_operator.plan.children import NewChild
from finetune_operator.plan.pods import PROGRESS_AUDIENCE, PodSettings, batch_job
from finetune_operator.progress import ProgressServer
from finetune_operator.replicas import REPLICAS, Replicas, url_of
from finetune_operator.tokens import PodIdentity, SigningKeys, TokenReviews, Verifier
from finetune_operator.trust import Trust

# As the chart's role has them.
RULES = [
    ("create,patch", "configmaps", REPLICAS),
    ("list,watch", "configmaps", ""),
    ("get,create,patch", "configmaps", "finetune-progress"),
    ("list,watch", "pods", ""),
]


def make_pod(plane: ControlPlane, namespace: str, name: str, account: str = "default") -> str:
    """A stage's pod that no node runs; its uid."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": a_pod()["metadata"]["labels"]},
        "spec": {
            "serviceAccountName": account,
            "automountServiceAccountToken": False,
            "containers": [{"name": "stage", "image": "none.invalid/none"}],
        },
    }
    made = plane.kubectl("-n", namespace, "create", "-o", "json", "-f", "-", stdin=json.dumps(pod))
    return str(json.loads(made)["metadata"]["uid"])


def token(plane: ControlPlane, namespace: str, pod: str = "", audience: str = PROGRESS_AUDIENCE) -> str:
    """What the kubelet asks for and projects."""
    bound = ["--bound-object-kind=Pod", f"--bound-object-name={pod}"] if pod else []
    command = ["-n", namespace, "create", "token", "default", f"--audience={audience}", "--duration=1h", *bound]
    return plane.kubectl(*command).strip()


@pytest.fixture
def operator_config(control_plane: ControlPlane, namespace: str) -> Path:
    """The kubeconfig of somebody who may do in one namespace what the operator may, and nothing elsewhere."""
    control_plane.kubectl("-n", namespace, "create", "serviceaccount", "default")
    user = f"operator-{namespace}"
    for number, (verbs, resource, name) in enumerate(RULES):
        named = [f"--resource-name={name}"] if name else []
        control_plane.kubectl(
            "-n", namespace, "create", "role", f"r{number}", f"--verb={verbs}", f"--resource={resource}", *named
        )
        control_plane.kubectl(
            "-n", namespace, "create", "rolebinding", f"r{number}", f"--role=r{number}", f"--user={user}"
        )
    # As every service account is.
    return control_plane.kubeconfig_for(user, "system:serviceaccounts")


@real_time
async def test_a_pods_token_is_believed_and_no_other(
    control_plane: ControlPlane, namespace: str, operator_config: Path
) -> None:
    """By review and by the cluster's keys alike; not with another audience, nor bound to no pod, nor changed."""
    uid = make_pod(control_plane, namespace, "bot-sft-1")
    mine = token(control_plane, namespace, "bot-sft-1")
    others = [
        token(control_plane, namespace, "bot-sft-1", "https://kubernetes.default.svc"),
        token(control_plane, namespace, "bot-sft-1", f"{PROGRESS_AUDIENCE}/more"),
        token(control_plane, namespace),
        mine[:-20] + "A" * 20,
        f"{mine.split('.')[0]}.{others_claims(mine)}.{mine.split('.')[2]}",
    ]
    async with (
        await Client.connect(control_plane.kubeconfig) as admin,
        await Client.connect(operator_config) as client,
    ):
        verifiers: list[Verifier] = [TokenReviews(admin), SigningKeys(client)]
        for verifier in verifiers:
            assert await verifier.verify(mine) == PodIdentity(namespace, "bot-sft-1", uid)
            for other in others:
                with pytest.raises(InvalidTokenError):
                    await verifier.verify(other)
        with pytest.raises(ForbiddenError):  # in one namespace only, nobody may be asked
            await TokenReviews(client).verify(mine)


def test_a_stages_job_with_all_of_it_is_accepted(control_plane: ControlPlane, namespace: str) -> None:
    """Token, optional certificates and variables, checked by the server field by field."""
    job = a_job()
    run = StageRun(job=JobRef(namespace=namespace, name="bot", uid="u-1"), stage="sft", attempt=1, spec=job.spec)
    settings = PodSettings(
        trainer_image="t", gguf_image="g", progress_url="https://operator.finetune.svc:9443/v1/progress"
    )
    made = json.dumps(batch_job(job, {}, NewChild("bot-sft-1", run), settings))
    command = ["-n", namespace, "create", "--dry-run=server", "--validate=strict", "-o", "json", "-f", "-"]
    pod = json.loads(control_plane.kubectl(*command, stdin=made))["spec"]["template"]["spec"]
    [token_source, trust_source] = next(v for v in pod["volumes"] if v["name"] == "progress")["projected"]["sources"]
    assert token_source["serviceAccountToken"]["audience"] == PROGRESS_AUDIENCE
    assert trust_source["configMap"]["optional"] is True


def others_claims(text: str) -> str:
    """The claims of a token as another pod's."""
    claims = unverified_claims(text)
    claims["kubernetes.io"]["pod"]["name"] = "another"
    return encoded(claims)


@real_time
async def test_a_review_knows_that_a_pod_is_gone(
    control_plane: ControlPlane, namespace: str, operator_config: Path
) -> None:
    """A token ends with its pod; where that is not asked, the operator's own cache knows."""
    make_pod(control_plane, namespace, "bot-sft-1")
    mine = token(control_plane, namespace, "bot-sft-1")
    control_plane.kubectl("-n", namespace, "delete", "pod", "bot-sft-1", "--grace-period=0", "--force")
    async with await Client.connect(control_plane.kubeconfig) as client:

        async def refused() -> bool:
            try:
                await TokenReviews(client).verify(mine)
            except InvalidTokenError:
                return True
            return False

        while not await refused():  # the API server remembers for ten seconds, too
            await asyncio.sleep(0.5)


class Replica:
    """An operator's pod, as far as progress goes."""

    def __init__(self, client: Client, namespace: str, name: str, leader: str) -> None:
        self.name = name
        self.namespace = namespace
        self.client = client
        self.leads = name == leader
        self.told: list[str] = []
        self.own = OwnCertificate(["finetune-operator-progress.finetune.svc"], "127.0.0.1", datetime.now(UTC))
        self.pods = Reflector(client, PODS, namespace, "app.kubernetes.io/managed-by=finetune-operator", self.on_pod)
        self.server = ProgressServer(
            SigningKeys(client),
            pod=self.pods.store.get,
            enqueue=self.told.append,
            leading=lambda: self.leads,
            leader=lambda: self.replicas.get(leader),
        )
        self.replicas: Replicas
        self.trust: Trust

    def on_pod(self, old: dict[str, Any] | None, new: dict[str, Any] | None) -> None:
        """As the controller does."""
        self.server.on_pod(old, new)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        """Its port, for as long as it runs."""
        async with self.server.serving("127.0.0.1", 0, self.own.tls) as port:
            url = url_of("127.0.0.1", port)
            self.replicas = Replicas(self.client, self.namespace, self.name, url, self.own)
            self.trust = Trust(self.client, self.replicas)
            parts = [self.pods.run(), self.replicas.reflector.run(), self.replicas.run()]
            if self.leads:
                self.trust.want(self.namespace)
                parts.append(self.trust.run())
            tasks = [asyncio.create_task(part) for part in parts]
            try:
                yield port
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)


@real_time
async def test_a_stage_reports_through_any_replica(
    control_plane: ControlPlane, namespace: str, operator_config: Path, tmp_path: Path
) -> None:
    """Two replicas with nothing but a namespace's rights find each other; a stage's own poster reaches the leader."""
    uid = make_pod(control_plane, namespace, "bot-sft-1")
    (tmp_path / "token").write_text(token(control_plane, namespace, "bot-sft-1"))
    async with (
        await Client.connect(operator_config) as client,
        await Client.connect(operator_config) as other,
    ):
        leader, follower = Replica(client, namespace, "pod-a", "pod-a"), Replica(other, namespace, "pod-b", "pod-a")
        async with leader.running(), follower.running() as port:
            await until(lambda: follower.replicas.get("pod-a") and leader.replicas.get("pod-b"))
            await until(lambda: leader.pods.store.get(namespace, "bot-sft-1"))
            bundle = leader.replicas.bundle()
            assert bundle == follower.replicas.bundle()
            assert bundle.count("BEGIN CERTIFICATE") == 2

            def mounted() -> str:
                found = ["-n", namespace, "get", "configmap", "finetune-progress", "--ignore-not-found", "-o", "json"]
                text = control_plane.kubectl(*found)
                return str(json.loads(text)["data"]["ca.pem"]) if text else ""

            while await asyncio.to_thread(mounted) != bundle:
                await asyncio.sleep(0.1)
            (tmp_path / "ca.pem").write_text(bundle)
            url = f"https://127.0.0.1:{port}/v1/progress"
            poster = await asyncio.to_thread(Poster, url, tmp_path / "token", tmp_path / "ca.pem", interval=0.5)
            poster.offer(UPDATE)
            await until(lambda: leader.server.reported(uid).progress)
            await asyncio.to_thread(poster.close)
            assert leader.told == [f"{namespace}/bot"]
            assert follower.server.kept == 0
            control_plane.kubectl("-n", namespace, "delete", "pod", "bot-sft-1", "--grace-period=0", "--force")
            await until(lambda: leader.server.kept == 0)
            mine = (tmp_path / "token").read_text()
            status, words = await asyncio.to_thread(post, port, bundle, UPDATE, mine)
            assert (status, words) == (403, f"pod {namespace}/bot-sft-1 is no stage that runs")
        left = json.loads(control_plane.kubectl("-n", namespace, "get", "configmap", REPLICAS, "-o", "json"))
        assert not left.get("data")


@real_time
async def test_a_replaced_pod_of_the_same_name_is_another(
    control_plane: ControlPlane, namespace: str, operator_config: Path
) -> None:
    """The token of the deleted one counts no more, though the name is in the cache again."""
    make_pod(control_plane, namespace, "bot-sft-1")
    old = token(control_plane, namespace, "bot-sft-1")
    async with await Client.connect(operator_config) as client:
        replica = Replica(client, namespace, "pod-a", "pod-a")
        async with replica.running() as port:
            control_plane.kubectl("-n", namespace, "delete", "pod", "bot-sft-1", "--grace-period=0", "--force")
            uid = make_pod(control_plane, namespace, "bot-sft-1")
            await until(lambda: _uid(replica.pods, namespace) == uid)
            new = token(control_plane, namespace, "bot-sft-1")
            bundle = replica.replicas.bundle()
            assert (await asyncio.to_thread(post, port, bundle, UPDATE, old))[0] == 403
            assert (await asyncio.to_thread(post, port, bundle, UPDATE, new))[0] == 204


def _uid(pods: Reflector, namespace: str) -> str:
    found = pods.store.get(namespace, "bot-sft-1")
    return str(found["metadata"]["uid"]) if found else ""
