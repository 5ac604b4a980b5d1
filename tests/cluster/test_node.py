"""The whole cluster runs pods as any Kubernetes does, and leaves the machine as it was."""

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.cluster import processes, sandbox
from tests.cluster.node import BUSYBOX, Cluster, load_cluster

FIXED_PATHS = (
    "/run/containerd",
    "/run/netns",
    "/opt/containerd",
    "/var/lib/cni",
    "/var/lib/kubelet",
    "/var/log/containers",
    "/var/log/pods",
)
"""What containerd, CNI and the kubelet make whatever their configuration says."""
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


@pytest.fixture
def space(node_cluster: Cluster, request: pytest.FixtureRequest) -> str:
    """A namespace of the test's own, under the strictest rules of Pod Security."""
    name = str(request.node.name).replace("_", "-")[:60].strip("-")
    node_cluster.kubectl("create", "namespace", name)
    node_cluster.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    node_cluster.kubectl("-n", name, "wait", "--for=create", "serviceaccount/default", "--timeout=300s")
    return name


def test_a_failing_job_on_a_gpu_says_why(node_cluster: Cluster, space: str) -> None:
    """A pod that asks for two of the faked GPUs runs; exit code, last words and the failed rule are in the API."""
    node_cluster.set_gpus(8)
    job = make_job("train", "echo out of luck > /dev/termination-log; exit 64", gpus=2)
    rule = {"action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "In", "values": [64]}}
    job["spec"]["podFailurePolicy"] = {"rules": [rule]}
    apply(node_cluster, space, job)
    node_cluster.kubectl("-n", space, "wait", "--for=condition=Failed", "job/train", "--timeout=300s")
    (failed,) = [c for c in get(node_cluster, space, "job/train")["status"]["conditions"] if c["type"] == "Failed"]
    assert failed["reason"] == "PodFailurePolicy"
    assert "exit code 64" in failed["message"]
    (pod,) = get(node_cluster, space, "pods")["items"]
    ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["exitCode"], ended["message"]) == (64, "out of luck\n")
    assert pod["spec"]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "2"}


def test_more_gpus_than_the_node_has_are_unschedulable(node_cluster: Cluster, space: str) -> None:
    """The scheduler is a real one: it says what the node lacks."""
    node_cluster.set_gpus(8)
    apply(node_cluster, space, make_job("big", "true", gpus=9))
    unscheduled = "--for=jsonpath={.status.conditions[?(@.type=='PodScheduled')].reason}=Unschedulable"
    node_cluster.kubectl("-n", space, "wait", "--for=create", "pod", "-l", "job-name=big", "--timeout=300s")
    node_cluster.kubectl("-n", space, "wait", unscheduled, "pod", "-l", "job-name=big", "--timeout=300s")
    (pod,) = get(node_cluster, space, "pods")["items"]
    assert "Insufficient nvidia.com/gpu" in pod["status"]["conditions"][0]["message"]


def test_a_service_is_reached_by_its_name_from_a_pod_and_by_its_address_from_here(
    node_cluster: Cluster, space: str
) -> None:
    """In-cluster names resolve to Services' addresses, which lead to their pods; this machine has a route to them."""
    script = "mkdir /tmp/www && echo hello from a pod > /tmp/www/index.html && exec httpd -f -p 8080 -h /tmp/www"
    labelled = {"name": "web", "labels": {"app": "web"}}
    server = {"apiVersion": "v1", "kind": "Pod", "metadata": labelled, "spec": make_pod(script)}
    ports = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": ports}
    apply(node_cluster, space, server, service)
    node_cluster.kubectl("-n", space, "wait", "--for=condition=Ready", "pod/web", "--timeout=300s")
    address = get(node_cluster, space, "service/web")["spec"]["clusterIP"]
    name = f"web.{space}.svc.cluster.local"
    # kube-proxy and the DNS learn of a Service by watching: the first try may come before that. No wget: linked
    # statically, it crashes over names and addresses.
    request = r"printf 'GET / HTTP/1.0\r\n\r\n' | nc -w 5 $a 80 | grep hello"
    once = f"a=$(nslookup {name} | awk '/^Address: /{{print $2}}') && {request} && echo at $a"
    apply(node_cluster, space, make_job("ask", f"for i in $(seq 60); do {once} && exit; sleep 1; done; exit 1"))
    node_cluster.kubectl("-n", space, "wait", "--for=condition=Complete", "job/ask", "--timeout=300s")
    said = node_cluster.kubectl("-n", space, "logs", "job/ask")
    assert said.endswith(f"hello from a pod\nat {address}\n")
    with urllib.request.urlopen(f"http://{address}", timeout=60) as answer:
        assert answer.read() == b"hello from a pod\n"


def test_a_pod_outlives_its_kubelet(node_cluster: Cluster, space: str) -> None:
    """The kubelet can be killed and started again as on a real node: the container runs on, and exec works again."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "steady"}, "spec": make_pod("sleep 3600")}
    apply(node_cluster, space, pod)
    node_cluster.kubectl("-n", space, "wait", "--for=condition=Ready", "pod/steady", "--timeout=300s")
    before = get(node_cluster, space, "pod/steady")["status"]["containerStatuses"][0]["containerID"]
    node_cluster.kill("kubelet")
    with pytest.raises(RuntimeError, match="refused"):
        node_cluster.kubectl("-n", space, "exec", "steady", "--", "true")
    node_cluster.start("kubelet")
    for _ in range(300):
        try:
            said = node_cluster.kubectl("-n", space, "exec", "steady", "--", "echo", "still here")
            break
        except RuntimeError:
            node_cluster.on_node("sleep", "0.2")
    assert said == "still here\n"
    assert get(node_cluster, space, "pod/steady")["status"]["containerStatuses"][0]["containerID"] == before


@pytest.mark.parametrize("crash", [False, True], ids=["running", "crashed"])
def test_down_leaves_nothing(node_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, crash: bool) -> None:
    """After `up`, a pod and `down` the machine is as before, even if every process of the cluster was killed."""
    # Beside the session's cluster: two can be up at once. A short path, for sockets in it may have 108 characters.
    directory = tmp_path_factory.mktemp("second")
    before = machine(directory)
    command("up", "--directory", str(directory))
    cluster = load_cluster(directory)
    namespace = os.readlink(f"/proc/{cluster.first_process}/ns/pid")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "left"}, "spec": make_pod("sleep 3600")}
    apply(cluster, "default", pod)
    cluster.kubectl("wait", "--for=condition=Ready", "pod/left", "--timeout=300s")
    assert "pod/left" in command("status", "--directory", str(directory))
    during = machine(directory)
    assert {name for name in before if during[name] != before[name]} == {"cgroups", "links", "routes"}
    inside = processes_in(namespace)
    assert len(inside) > 5
    if crash:
        processes.kill(processes.of(directory))
    command("down", "--directory", str(directory))
    assert machine(directory) == before
    assert processes.of(directory) == []
    assert [pid for pid, started in inside.items() if start_time(pid) == started] == []
    assert {path.name for path in directory.iterdir()} == {".finetunejob-cluster", "logs"}


def machine(directory: Path) -> dict[str, object]:
    """What a node could change of the machine, without what other clusters on it do at the same time."""
    links = [link for link in json.loads(run("ip", "-json", "link")) if link.get("ifalias") in (None, str(directory))]
    names = [link["ifname"] for link in links]
    mine = sandbox.cgroup_name(directory)
    groups = [group for group in Path("/sys/fs/cgroup").glob("*/*") if group.is_dir()]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return {
        "sysctls": {name: Path("/proc/sys", name).read_text() for name in [*sandbox.SYSCTLS, "net/ipv4/ip_forward"]},
        "links": names,
        "routes": [route for route in json.loads(run("ip", "-json", "route")) if route["dev"] in names],
        "cgroups": sorted(str(g) for g in groups if g.name == mine or not g.name.startswith("finetunejob-")),
        "mounts": [line for line in mounts if str(directory) in line or line.split()[4] == "/"],
        "paths": {path: os.path.exists(path) for path in FIXED_PATHS},
    }


def processes_in(namespace: str) -> dict[int, str]:
    """Those whose namespace of processes is this one, containers' too, with the time when they started."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(entry / "ns/pid") == namespace:
                found[int(entry.name)] = start_time(int(entry.name))
    return found


def start_time(pid: int) -> str:
    """Tells a process from a later one with the same number; empty if there is none, or only its exit code."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def make_pod(script: str, gpus: int = 0) -> dict[str, Any]:
    """A pod's spec that the rules "restricted" allow: a shell script in the container `main`."""
    container: dict[str, Any] = {
        "name": "main",
        "image": BUSYBOX,
        "imagePullPolicy": "Never",
        "command": ["sh", "-c", script],
    }
    container |= {"securityContext": RESTRICTED}
    if gpus:
        container |= {"resources": {"limits": {"nvidia.com/gpu": gpus}}}
    return {"containers": [container], "restartPolicy": "Never", "terminationGracePeriodSeconds": 1}


def make_job(name: str, script: str, gpus: int = 0) -> dict[str, Any]:
    """A Job of one attempt."""
    spec = {"backoffLimit": 0, "template": {"spec": make_pod(script, gpus)}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def apply(cluster: Cluster, namespace: str, *objects: dict[str, Any]) -> None:
    """``kubectl apply``."""
    stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    cluster.kubectl("-n", namespace, "apply", "-f", "-", stdin=stdin)


def get(cluster: Cluster, namespace: str, what: str) -> dict[str, Any]:
    """One object, or a list."""
    return dict(json.loads(cluster.kubectl("-n", namespace, "get", what, "-o", "json")))


def command(*arguments: str) -> str:
    """``python -m tests.cluster`` as a person runs it."""
    return run(sys.executable, "-m", "tests.cluster", *arguments)


def run(*words: str) -> str:
    """What a program printed; an error if it failed."""
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout
