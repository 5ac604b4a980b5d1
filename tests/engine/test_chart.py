"""The chart without a cluster: values, schema, README, and kustomize's copy of it."""

import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from tests.chart import CHART, NAMESPACE, ROOT, Object, environment, kustomize, only, rendered, template, values

from finetune_cli.manifest import load
from finetune_operator.kube.metrics import Metrics
from finetune_operator.metrics import JobMetrics, JobStates
from finetune_operator.plan.rules import check
from finetune_operator.settings import from_environment

FILES = sorted(path for path in (*CHART.rglob("*"), *(ROOT / "manifests").rglob("*.yaml")) if path.is_file())
PEER = {"namespaceSelector": {"matchLabels": {"team": "monitoring"}}}
STORE = {"devObjectStore.enabled": True}
OTHERS: dict[str, tuple[object, Object]] = {
    "fullnameOverride": ("other", {}),
    "images.registry": ("mirror.example/team", {}),
    "images.pullPolicy": ("Always", {}),
    "images.pullSecrets": (["pull"], {}),
    **{f"images.{name}.repository": ("local/other", STORE) for name in ("operator", "trainer", "gguf", "objectStore")},
    "images.unsloth.repository": ("local/other", {}),
    "images.unsloth.tag": ("other", {"images.unsloth.repository": "local/other"}),
    "images.unsloth.digest": (f"sha256:{'0' * 64}", {"images.unsloth.repository": "local/other"}),
    **{f"images.{name}.tag": ("other", STORE) for name in ("operator", "trainer", "gguf", "objectStore")},
    **{
        f"images.{name}.digest": (f"sha256:{'0' * 64}", STORE)
        for name in ("operator", "trainer", "gguf", "objectStore")
    },
    "crd.install": (False, {}),
    "scope.namespaces": (["team-a", "team-b"], {}),
    "operator.replicas": (3, {}),
    "operator.workers": (17, {}),
    "operator.logLevel": ("debug", {}),
    "operator.resources": ({"limits": {"cpu": 1}}, {}),
    "operator.podAnnotations": ({"a": "b"}, {}),
    "operator.podLabels": ({"a": "b"}, {}),
    "operator.nodeSelector": ({"a": "b"}, {}),
    "operator.tolerations": ([{"key": "a", "operator": "Exists"}], {}),
    "operator.priorityClassName": ("system-cluster-critical", {}),
    "operator.terminationGracePeriodSeconds": (60, {}),
    "serviceAccount.create": (False, {}),
    "serviceAccount.name": ("other", {}),
    "serviceAccount.annotations": ({"a": "b"}, {}),
    "rbac.aggregatedRoles": (False, {}),
    "progress.enabled": (False, {}),
    "podDisruptionBudget.enabled": (False, {}),
    "networkPolicy.enabled": (False, {}),
    "networkPolicy.apiServerPorts": ([16443], {}),
    "networkPolicy.apiServerCIDRs": (["10.0.0.1/32"], {}),
    "networkPolicy.metricsFrom": ([PEER], {}),
    "metrics.serviceMonitor.enabled": (True, {}),
    "metrics.serviceMonitor.interval": ("10s", {"metrics.serviceMonitor.enabled": True}),
    "metrics.serviceMonitor.labels": ({"a": "b"}, {"metrics.serviceMonitor.enabled": True}),
    "metrics.dashboard.enabled": (True, {}),
    "metrics.dashboard.labels": ({"a": "b"}, {"metrics.dashboard.enabled": True}),
    "devObjectStore.enabled": (True, {}),
    "devObjectStore.bucket": ("other", STORE),
    "devObjectStore.existingSecret": ("other", STORE),
    "devObjectStore.secretName": ("other", STORE),
    "devObjectStore.secretNamespaces": (["default"], STORE),
    "devObjectStore.persistence.enabled": (False, STORE),
    "devObjectStore.persistence.size": ("1Gi", STORE),
    "devObjectStore.persistence.storageClassName": ("fast", STORE),
    "devObjectStore.resources": ({"limits": {"cpu": 1}}, STORE),
}
"""For every value another one, with what must be set for it to matter."""


def test_readme_has_every_value() -> None:
    """The README's table is made of the values' paths, defaults and comments, and of nothing else."""
    rows = [line for line in (CHART / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert rows == [value.row for value in values()]


def test_versions_are_one() -> None:
    """The chart, its images and the manifests have the version of the package."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)
    manifests = "".join(path.read_text() for path in (ROOT / "manifests").rglob("*.yaml"))
    assert set(re.findall(r"(?:finetunejob/\w+:|version: )(\d[\w.]*)", manifests)) == {version}


def test_chart_has_the_current_crd() -> None:
    """The chart's copy of the CustomResourceDefinition is the manifests'."""
    assert (CHART / "files/finetunejobs.yaml").read_text() == (ROOT / "manifests/crd/finetunejobs.yaml").read_text()


def test_no_image_names_a_registry() -> None:
    """By default every image is a bare name, for which the nodes know a registry; Unsloth's has none."""
    images = yaml.safe_load((CHART / "values.yaml").read_text())["images"]
    names = [image["repository"] for image in images.values() if isinstance(image, dict)]
    assert sorted(bool(re.fullmatch(r"finetunejob/[a-z-]+", name)) for name in names if name) == [True] * 4
    assert [name for name in names if not name] == [images["unsloth"]["repository"]]


def test_dashboard_asks_for_figures_that_there_are() -> None:
    """Every figure and label in the dashboard's queries is one that the operator serves."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    JobMetrics(registry)
    assert metrics.registry is registry
    families = [*registry.collect(), *JobStates(dict).collect()]
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    served = {family.name + suffix for family in families for suffix in suffixes[family.type]}
    dashboard = json.loads((CHART / "files/dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"(\w+)\{", query)}
    assert asked <= served
    assert len(asked) == len(queries) - 1  # one figure has two quantiles
    assert {"finetune_jobs", "is_leader", "workqueue_depth", "rest_client_requests_total"} <= asked


def test_quickstart_for_a_cluster_is_the_quickstart() -> None:
    """It differs in nothing but its name and where things come from, and reads nothing that a cluster has not."""
    here, there = (load(ROOT / f"manifests/examples/{name}.yaml") for name in ("quickstart", "quickstart-cluster"))
    assert check(there, cluster=True) == []
    assert there.spec.pipeline == here.spec.pipeline
    assert there.spec.evaluation == here.spec.evaluation
    assert sources(there.spec.data) == sources(here.spec.data)
    assert there.spec.storage.endpoint == f"http://finetune-operator-object-store.{NAMESPACE}.svc:8333"


def sources(data: Any) -> dict[str, list[tuple[str, float]]]:
    """File names and weights by role."""
    roles = {role: getattr(data, role) for role in ("train", "eval", "test", "preference")}
    return {role: [(item.source.rpartition("/")[2], item.weight) for item in items] for role, items in roles.items()}


def test_every_value_matters() -> None:
    """Each value, set to another one that the schema admits, changes what is installed."""
    assert OTHERS.keys() == {value.path for value in values()}
    secrets = re.compile(r"AWS_\w+: \w+")  # made anew at each rendering
    for path, (other, needed) in OTHERS.items():
        before, after = (secrets.sub("", rendered(changed)) for changed in (needed, {**needed, path: other}))
        assert before != after, path


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("replicas", 3),
        ("operator.replica", 3),
        ("operator.replicas", "three"),
        ("operator.workers", 0),
        ("operator.logLevel", "verbose"),
        ("operator.resources", {"limit": {}}),
        ("operator.resources", {"limits": {"memory": "256MB"}}),
        ("images.operator.name", "other"),
        ("images.operator.digest", "1234"),
        ("images.pullPolicy", "Sometimes"),
        ("scope.namespaces", "team-a"),
        ("scope.namespaces", ["Team A"]),
        ("crd.keep", False),
        ("progress.enabled", "yes"),
        ("networkPolicy.apiServerPorts", []),
        ("networkPolicy.metricsFrom", [{"namespaceSelektor": {}}]),
        ("metrics.serviceMonitor.interval", "often"),
        ("metrics.dashboard.enable", True),
        ("devObjectStore.bucket", "No"),
        ("devObjectStore.persistence.size", "big"),
    ],
)
def test_schema_refuses(path: str, wrong: object) -> None:
    """A value that is misspelt or of the wrong kind is refused, and the refusal names it."""
    with pytest.raises(RuntimeError, match=re.escape(path.rpartition(".")[2])) as refused:
        rendered({path: wrong})
    assert "schema" in str(refused.value)


def test_kustomize_makes_the_same() -> None:
    """``manifests/base`` holds, beside its namespace, the objects of the chart with its default values."""
    base = kustomize("base")
    assert [obj["metadata"]["name"] for obj in base if obj["kind"] == "Namespace"] == [NAMESPACE]
    assert by_identity(base, without="Namespace") == by_identity(template())


def test_kustomize_makes_the_same_for_one_namespace() -> None:
    """The overlay for a namespace holds the objects of the chart with that scope."""
    overlay = by_identity(kustomize("overlays/namespaced"), without="Namespace")
    assert overlay == by_identity(template({"scope.namespaces": ["team-a"]}))


def by_identity(among: list[Object], without: str = "") -> dict[tuple[str, str, str], Object]:
    """Objects by kind, namespace and name, without what only Helm says of them, and the environment without order."""
    found = {}
    for obj in among:
        meta = obj["metadata"]
        for name in ("app.kubernetes.io/managed-by", "helm.sh/chart"):
            meta.get("labels", {}).pop(name, None)
        meta.get("annotations", {}).pop("helm.sh/resource-policy", None)
        if obj["kind"] == "Deployment":
            obj["spec"]["template"]["spec"]["containers"][0]["env"].sort(key=lambda variable: variable["name"])
        if obj["kind"] != without:
            found[obj["kind"], meta.get("namespace", ""), meta["name"]] = obj
    assert len(found) == len([obj for obj in among if obj["kind"] != without])
    return found


@pytest.mark.parametrize("changed", [{}, {"scope.namespaces": ["team-a", "team-b"]}, {"progress.enabled": False}])
def test_no_rule_reaches_secrets_or_everything(changed: Object) -> None:
    """No rule has a wildcard, names secrets, or lets anybody become somebody else."""
    rules = [rule for obj in template(changed) for rule in obj.get("rules") or ()]
    assert rules
    for rule in rules:
        assert not {"*", "secrets", "serviceaccounts", "roles", "clusterroles", "pods/exec"} & {*rule["resources"]}
        assert not {"*", "impersonate", "bind", "escalate"} & {*rule["verbs"]}


def test_without_progress_its_rights_are_gone() -> None:
    """Without the progress server there is no Service, port or right for it."""
    made = template({"progress.enabled": False})
    rules = [rule for obj in made for rule in obj.get("rules") or ()]
    assert not [rule for rule in rules if {"configmaps", "tokenreviews"} & {*rule["resources"]}]
    operator = [obj for obj in made if obj["kind"] not in ("CustomResourceDefinition", "Secret")]
    assert "9443" not in str(operator)
    assert "'progress'" not in str(operator)
    assert environment(made)["FINETUNE_PROGRESS_SERVICE"] == ""


def test_namespaced_has_nothing_in_the_cluster() -> None:
    """With a scope, without CRD and people's roles, every object has a namespace, and roles are where jobs are."""
    made = template({"scope.namespaces": ["team-a", "team-b"], "crd.install": False, "rbac.aggregatedRoles": False})
    assert all("namespace" in obj["metadata"] for obj in made)
    for kind in ("Role", "RoleBinding"):
        where = [obj["metadata"]["namespace"] for obj in made if obj["kind"] == kind]
        assert where == ["team-a", "team-b", NAMESPACE]
    variables = environment(made)
    assert from_environment(variables).namespaces == ("team-a", "team-b")


def test_environment_is_what_the_operator_reads() -> None:
    """The operator takes its settings from the Deployment's variables, and finds in them what the values say."""
    settings = from_environment(
        environment(
            template({"images.registry": "mirror.example", "images.gguf.digest": f"sha256:{'1' * 64}"}), POD_NAME="a"
        )
    )
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert settings.pods.trainer_image == f"mirror.example/finetunejob/trainer:{version}"
    assert settings.pods.gguf_image == f"mirror.example/finetunejob/gguf@sha256:{'1' * 64}"
    assert settings.pods.unsloth_image == ""
    assert (settings.pods.image_pull_policy, settings.namespaces) == ("IfNotPresent", ())
    assert (settings.lease_name, settings.identity, settings.workers) == ("finetune-operator", "a", 16)


def test_unsloth_has_an_image_where_one_is_named() -> None:
    """Few need it, so there is none by default."""
    given = {
        "images.registry": "mirror.example",
        "images.unsloth.repository": "ours/unsloth",
        "images.unsloth.tag": "2",
    }
    settings = from_environment(environment(template(given), POD_NAME="a"))
    assert settings.pods.unsloth_image == "mirror.example/ours/unsloth:2"


def test_values_of_an_earlier_chart_are_enough() -> None:
    """``helm upgrade --reuse-values`` knows no value that is new in the chart: it is as if left empty."""
    assert template({"images.unsloth": None}) == template()


def test_another_release_has_names_of_its_own() -> None:
    """A second release shares no object but the CustomResourceDefinition with the first, and elects its own leader."""
    one, other = by_identity(template()), by_identity(template(name="second"))
    assert [kind for kind, _, _ in one.keys() & other.keys()] == ["CustomResourceDefinition"]
    lease = environment(template(name="second"))["FINETUNE_LEASE_NAME"]
    assert lease == "second-finetune-operator"
    assert lease in str(only(template(name="second"), "Role")["rules"])


def test_selectors_find_their_pods_alone() -> None:
    """Every selector in the chart matches the operator's pods or the object store's, and never both."""
    made = template(STORE)
    workloads = ("Deployment", "StatefulSet")
    pods = {kind: only(made, kind)["spec"]["template"]["metadata"]["labels"] for kind in workloads}
    stages = {"app.kubernetes.io/managed-by": "finetune-operator"}
    found = [labels for obj in made if obj["kind"] != "CustomResourceDefinition" for labels in selectors(obj)]
    assert len(found) >= 12
    for labels in found:
        matched = [kind for kind, own in pods.items() if labels.items() <= own.items()]
        assert len(matched) == 1 or (labels == stages and not matched)


def selectors(at: Any) -> Iterator[dict[str, str]]:
    """Every label selector in an object."""
    if isinstance(at, list):
        for item in at:
            yield from selectors(item)
    elif isinstance(at, dict):
        for key, value in at.items():
            if key == "matchLabels" or (key == "selector" and "matchLabels" not in value):
                yield value
            else:
                yield from selectors(value)


def test_no_tabs_and_no_trailing_blanks() -> None:
    """Files that people edit have neither tabs nor blanks at the end of a line."""
    for path in FILES:
        assert not re.search(r"\t|[ ]$", path.read_text(), re.MULTILINE), path
