"""The chart on a real API server: what it makes is accepted, may do what it must and no more, and can be taken back.

There are no nodes, so pods stay pending; that they are made at all says that Pod Security admits them.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from tests.chart import CHART, NAME, NAMESPACE, ROOT, Object, environment, flags, helm, kustomize, template
from tests.cluster.binaries import MissingToolError
from tests.cluster.controlplane import ControlPlane, running_control_plane
from tests.cluster.fixtures import cannot_run

from finetune_api.status import JobStatus
from finetune_cli.manifest import load
from finetune_operator.plan.plan import plan
from finetune_operator.plan.pods import PodSettings, batch_job

TEAM, OTHER = "team-a", "team-b"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{NAME}"
EXAMPLE = ROOT / "manifests/examples/quickstart-cluster.yaml"
EVERYTHING: Object = {
    "devObjectStore.enabled": True,
    "devObjectStore.secretNamespaces": [TEAM],
    "metrics.serviceMonitor.enabled": True,
    "metrics.serviceMonitor.labels": {"release": "prometheus"},
    "metrics.dashboard.enabled": True,
    "networkPolicy.apiServerCIDRs": ["10.0.0.1/32"],
    "networkPolicy.metricsFrom": [{"namespaceSelector": {"matchLabels": {"team": "monitoring"}}}],
    "images.pullSecrets": ["pull"],
    "operator.nodeSelector": {"kubernetes.io/os": "linux"},
    "operator.tolerations": [{"key": "infra", "operator": "Exists"}],
    "operator.priorityClassName": "system-cluster-critical",
    "operator.podAnnotations": {"a": "b"},
    "serviceAccount.annotations": {"a": "b"},
}
NAMESPACED: Object = {"scope.namespaces": [TEAM]}
MONITORS = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: servicemonitors.monitoring.coreos.com}
spec:
  group: monitoring.coreos.com
  scope: Namespaced
  names: {kind: ServiceMonitor, listKind: ServiceMonitorList, plural: servicemonitors, singular: servicemonitor}
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
"""
"""As much of the Prometheus operator's as it takes to accept one."""


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane for the chart alone, which is the whole cluster's; with controllers and three namespaces."""
    try:
        with running_control_plane(tmp_path_factory.mktemp("chart"), controllers=True) as plane:
            for namespace in (NAMESPACE, TEAM, OTHER):
                plane.kubectl("create", "namespace", namespace)
                plane.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
            plane.kubectl("apply", "-f", "-", stdin=MONITORS)
            yield plane
    except MissingToolError as missing:
        cannot_run(str(missing))


def run_helm(plane: ControlPlane, *arguments: str) -> str:
    """Helm on that cluster, in the chart's namespace."""
    return helm(*arguments, f"--namespace={NAMESPACE}", kubeconfig=plane.kubeconfig)


@pytest.fixture
def install(plane: ControlPlane) -> Iterator[Object]:
    """Values to install with: change them before the test asks for ``installed``; all is taken back afterwards."""
    yield {}
    run_helm(plane, "uninstall", NAME, "--ignore-not-found", "--wait")
    plane.kubectl("delete", "crd", "finetunejobs.finetune.dev", "--ignore-not-found")
    plane.kubectl("-n", NAMESPACE, "wait", "--for=delete", "pod", "--all", "--timeout=120s")


def installed(plane: ControlPlane, changed: Object) -> str:
    """Install or upgrade; what helm says to the user."""
    said = run_helm(plane, "upgrade", "--install", NAME, str(CHART), *flags(changed))
    plane.kubectl("wait", "--for=condition=Established", "crd/finetunejobs.finetune.dev", "--timeout=120s")
    return said


@pytest.mark.parametrize(
    "changed",
    [
        {},
        EVERYTHING,
        NAMESPACED,
        {**EVERYTHING, **NAMESPACED, "devObjectStore.persistence.enabled": False},
        {"progress.enabled": False, "networkPolicy.enabled": False, "podDisruptionBudget.enabled": False},
        {"serviceAccount.create": False, "crd.install": False, "rbac.aggregatedRoles": False},
    ],
    ids=["default", "everything", "namespaced", "namespaced-everything", "least", "nothing-of-the-cluster"],
)
def test_the_api_server_accepts_what_helm_makes(plane: ControlPlane, changed: Object) -> None:
    """Every object is valid, without a field that the API server does not know."""
    made = yaml.safe_dump_all(template(changed))
    said = plane.kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", stdin=made)
    assert len(said.splitlines()) == len(template(changed))


@pytest.mark.parametrize("directory", ["base", "overlays/namespaced"])
def test_the_api_server_accepts_what_kustomize_makes(plane: ControlPlane, directory: str) -> None:
    """The same for the manifests without Helm."""
    made = yaml.safe_dump_all(kustomize(directory))
    plane.kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", stdin=made)


def test_pods_pass_pod_security(plane: ControlPlane, install: Object) -> None:
    """In a namespace that enforces "restricted" both replicas and the dev object store get their pods."""
    install |= {"devObjectStore.enabled": True, "devObjectStore.persistence.enabled": False}
    installed(plane, install)
    made = "--for=jsonpath={.status.replicas}"  # the controllers count pods that there are
    for workload, count in (("deployment/finetune-operator", 2), ("statefulset/finetune-operator-object-store", 1)):
        plane.kubectl("-n", NAMESPACE, "wait", f"{made}={count}", workload, "--timeout=120s")
    assert len(plane.kubectl("-n", NAMESPACE, "get", "pods", "-o", "name").split()) == 3


def test_stages_pass_pod_security(plane: ControlPlane) -> None:
    """A stage's Job, and a pod of its template, are accepted where "restricted" is enforced."""
    job = load(EXAMPLE)
    meta = job.metadata.model_copy(update={"namespace": TEAM, "uid": "00000000-0000-0000-0000-000000000001"})
    job = job.model_copy(update={"metadata": meta})
    [first] = plan(job, JobStatus(), [], datetime.now(UTC), cluster=True).create
    made = batch_job(
        job, {}, first, PodSettings(trainer_image="trainer:1", gguf_image="gguf:1", progress_url="https://a:9443")
    )
    template_ = made["spec"]["template"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template_["metadata"], "name": "stage", "namespace": TEAM},
        "spec": template_["spec"],
    }
    for obj in (made, pod):
        said = plane.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", stdin=json.dumps(obj))
        assert "created" in said


CLUSTER_WIDE = {
    "finetunejobs.finetune.dev": {"get", "list", "watch", "delete"},
    "finetunejobs.finetune.dev/status": {"update"},
    "finetunejobs.finetune.dev/finalizers": {"update"},
    "jobs.batch": {"get", "list", "watch", "create", "delete"},
    "pods": {"get", "list", "watch"},
    "services": {"get", "create"},
    "events": {"list", "create", "patch"},
    "configmaps finetune-progress": {"get", "create", "patch"},
}
UNSCOPED = {
    "tokenreviews.authentication.k8s.io": {"create"},
    "customresourcedefinitions.apiextensions.k8s.io finetunejobs.finetune.dev": {"get"},
}
OWN = {
    "configmaps": {"list", "watch"},
    "configmaps finetune-operator-replicas": {"create", "patch"},
    "leases.coordination.k8s.io": {"create"},
    "leases.coordination.k8s.io finetune-operator": {"get", "update"},
}


def test_the_operator_may_do_what_is_listed_and_no_more(plane: ControlPlane, install: Object) -> None:
    """In any namespace the rights are these, in its own these more; none is about Secrets."""
    installed(plane, install)
    everywhere = {**CLUSTER_WIDE, **UNSCOPED}
    assert rights(plane, TEAM) == rights(plane, OTHER) == everywhere
    assert rights(plane, NAMESPACE) == {**everywhere, **OWN}
    assert "yes" not in may(plane, "get", "secrets", TEAM) + may(plane, "list", "secrets", NAMESPACE)


def test_with_a_scope_it_may_do_nothing_elsewhere(plane: ControlPlane, install: Object) -> None:
    """With ``scope.namespaces`` the rights are in those namespaces, its own has the lease, and others have none."""
    install |= NAMESPACED
    installed(plane, install)
    assert rights(plane, TEAM) == CLUSTER_WIDE
    assert rights(plane, NAMESPACE) == OWN
    assert rights(plane, OTHER) == {}


def rights(plane: ControlPlane, namespace: str) -> dict[str, set[str]]:
    """What the operator's account may do there beyond any other account, by resource and, where limited, name."""
    granted: list[set[tuple[str, ...]]] = []
    for account in (ACCOUNT, f"system:serviceaccount:{OTHER}:nobody"):
        groups = ["--as-group=system:authenticated", "--as-group=system:serviceaccounts"]
        said = plane.kubectl("auth", "can-i", "--list", "-n", namespace, f"--as={account}", *groups)
        rows = [re.fullmatch(r"(\S*) +\[(.*?)\] +\[(.*?)\] +\[(.*?)\]", line) for line in said.splitlines()[1:]]
        assert all(rows)
        granted.append({row.groups() for row in rows if row is not None})
    found: dict[str, set[str]] = {}
    for resource, urls, names, verbs in granted[0] - granted[1]:
        assert not urls
        for name in names.split() or [""]:
            found.setdefault(f"{resource} {name}".strip(), set()).update(verbs.split())
    return found


def may(plane: ControlPlane, verb: str, resource: str, namespace: str) -> str:
    """``yes`` or ``no``: kubectl fails for the latter."""
    try:
        return plane.kubectl("auth", "can-i", verb, resource, "-n", namespace, f"--as={ACCOUNT}")
    except RuntimeError as refused:
        return str(refused).rpartition(": ")[2] or "no"


def test_people_get_their_rights_by_the_usual_roles(plane: ControlPlane, install: Object) -> None:
    """Who may view a namespace sees its FineTuneJobs, who may edit it makes them, and nobody of them writes status."""
    installed(plane, install)
    for role in ("view", "edit"):
        plane.kubectl("-n", TEAM, "create", "rolebinding", f"chart-{role}", f"--clusterrole={role}", f"--user={role}er")
    viewer, editor = plane.kubeconfig_for("viewer"), plane.kubeconfig_for("editer")
    until_allowed(plane, viewer, "list")
    until_allowed(plane, editor, "delete")
    job = ["-n", TEAM, "create", "-f", str(EXAMPLE)]
    with pytest.raises(RuntimeError, match='cannot create resource "finetunejobs"'):
        plane.kubectl(*job, kubeconfig=viewer)
    plane.kubectl(*job, kubeconfig=editor)
    assert "quickstart-cluster" in plane.kubectl("-n", TEAM, "get", "ftj", kubeconfig=viewer)
    status = ["patch", "ftj", "quickstart-cluster", "--subresource=status", "--type=merge", "-p", '{"status": {}}']
    with pytest.raises(RuntimeError, match=r'cannot \w+ resource "finetunejobs/status"'):
        plane.kubectl("-n", TEAM, *status, kubeconfig=editor)
    plane.kubectl("-n", TEAM, "delete", "ftj", "quickstart-cluster", kubeconfig=editor)


def until_allowed(plane: ControlPlane, kubeconfig: Path, verb: str) -> None:
    """Return once the controller has put our rules into the usual roles, which takes it a moment."""
    deadline = time.monotonic() + 120
    while True:
        try:
            plane.kubectl("auth", "can-i", verb, "finetunejobs.finetune.dev", "-n", TEAM, kubeconfig=kubeconfig)
            return
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_uninstalling_keeps_the_jobs_and_installing_finds_them(plane: ControlPlane, install: Object) -> None:
    """Helm takes away all of its objects but the CustomResourceDefinition, and a new installation takes that over."""
    installed(plane, install)
    plane.kubectl("-n", TEAM, "create", "-f", str(EXAMPLE))
    run_helm(plane, "uninstall", NAME, "--wait")
    kinds = "all,sa,role,rolebinding,clusterrole,clusterrolebinding,networkpolicy,pdb"
    ours = ["-A", "-l", f"app.kubernetes.io/name={NAME}"]
    assert plane.kubectl("get", kinds, *ours, "-o", "jsonpath={.items[*].metadata.name}") == ""
    assert "quickstart-cluster" in plane.kubectl("-n", TEAM, "get", "ftj")
    installed(plane, install)
    assert "quickstart-cluster" in plane.kubectl("-n", TEAM, "get", "ftj")


def test_an_upgrade_upgrades_the_crd(plane: ControlPlane, install: Object, tmp_path: Path) -> None:
    """A release that was made with an older schema gets the new one by ``helm upgrade``."""
    older = shutil.copytree(CHART, tmp_path / "chart")
    schema = older / "files/finetunejobs.yaml"
    schema.write_text(schema.read_text().replace("    shortNames:\n    - ftj\n", ""))
    run_helm(plane, "install", NAME, str(older))
    names = ["get", "crd", "finetunejobs.finetune.dev", "-o", "jsonpath={.spec.names.shortNames}"]
    assert plane.kubectl(*names) == ""
    installed(plane, install)
    assert plane.kubectl(*names) == '["ftj"]'


def test_an_upgrade_keeps_the_stores_credentials(plane: ControlPlane, install: Object) -> None:
    """The dev object store's secret is made once, with the same content in each namespace."""
    install |= {"devObjectStore.enabled": True, "devObjectStore.secretNamespaces": [TEAM]}
    installed(plane, install)
    first = secret(plane, NAMESPACE)
    assert first == secret(plane, TEAM)
    assert [len(value) for value in first.values()] == [28, 56]  # 20 and 40 characters, in base64
    installed(plane, {**install, "operator.workers": 9})
    assert secret(plane, NAMESPACE) == secret(plane, TEAM) == first


def secret(plane: ControlPlane, namespace: str) -> dict[str, str]:
    """The content of the store's."""
    return dict(json.loads(plane.kubectl("-n", namespace, "get", "secret", "s3-credentials", "-o", "json"))["data"])


def test_notes_say_what_is_there(plane: ControlPlane, install: Object) -> None:
    """What helm says in the end names objects that there are, and leads to the first job's store."""
    install |= {"devObjectStore.enabled": True, "devObjectStore.secretNamespaces": [TEAM]}
    said = installed(plane, install)
    for kind, name in re.findall(r"rollout status (\w+)/(\S+)", said):
        plane.kubectl("-n", NAMESPACE, "get", kind, name)
    storage = yaml.safe_load(re.search(r"storage:\n(?: {7}.*\n)+", said)[0])["storage"]  # type: ignore[index]
    example = load(EXAMPLE).spec.storage
    assert storage["endpoint"] == example.endpoint
    assert storage["bucket"] == example.bucket
    assert example.secret_ref is not None
    assert storage["secretRef"]["name"] == example.secret_ref.name
    assert f"It is in: {NAMESPACE}, {TEAM}." in said


@pytest.mark.parametrize("scope", [{}, NAMESPACED], ids=["cluster", "namespaced"])
def test_the_operator_needs_no_more(plane: ControlPlane, install: Object, scope: Object, tmp_path: Path) -> None:
    """With these rights alone it leads, makes a job's first Job, writes status and Events, and is refused nothing."""
    install |= {**scope, "operator.replicas": 0}
    installed(plane, install)
    config = plane.kubeconfig_for(ACCOUNT, "system:serviceaccounts")
    variables = environment(template(install), POD_NAME="operator-0", POD_NAMESPACE=NAMESPACE, POD_IP="127.0.0.1")
    metrics, health = free_ports(2)
    variables |= {"FINETUNE_METRICS_PORT": str(metrics), "FINETUNE_HEALTH_PORT": str(health), "KUBECONFIG": str(config)}
    log = tmp_path / "operator.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "finetune_operator"]
        operator = subprocess.Popen(command, env={**os.environ, **variables}, stdout=output, stderr=output)
    try:
        plane.kubectl("-n", TEAM, "create", "-f", str(EXAMPLE))
        there = ["-n", TEAM, "wait", "--timeout=120s"]
        plane.kubectl(*there, "--for=create", "job", "-l", "finetune.dev/job=quickstart-cluster")
        plane.kubectl(*there, "--for=jsonpath={.status.summary}", "ftj/quickstart-cluster")
        plane.kubectl(*there, "--for=create", "events", "--field-selector=involvedObject.kind=FineTuneJob")
        plane.kubectl("-n", NAMESPACE, "get", "lease", NAME)
        served = urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=30).read().decode()
    finally:
        operator.terminate()
        code = operator.wait(60)
    codes = set(re.findall(r'rest_client_requests_total\{code="(\w+)"', served))
    assert codes & {"200", "201"}
    assert scope or "403" not in codes, log.read_text()  # in a scope it asks for the definition first, in vain
    assert "forbidden" not in log.read_text().lower()
    assert code == 0, log.read_text()


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has, at this moment."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
