"""The control plane that the engine's tests run against is a real one, and leaves nothing behind."""

import json
import subprocess
from pathlib import Path

import pytest
from tests.cluster import processes
from tests.cluster.binaries import binary, version
from tests.cluster.controlplane import (
    ControlPlane,
    load_control_plane,
    running_control_plane,
    start_control_plane,
    stop_control_plane,
)


def test_it_is_the_pinned_version(control_plane: ControlPlane) -> None:
    """Client and server say the version that go.mod pins, not the v0.0.0-master of a build without version strings."""
    said = json.loads(control_plane.kubectl("version", "-o", "json"))
    assert said["serverVersion"]["gitVersion"] == version("k8s.io/kubernetes") == "v1.37.2"
    assert said["clientVersion"]["gitVersion"] == "v1.37.2"


def test_a_watch_sees_what_another_client_creates(control_plane: ControlPlane, namespace: str) -> None:
    """A watch that began before an object existed is told of it, and of its change."""
    command = [str(binary("kubectl")), f"--kubeconfig={control_plane.kubeconfig}", "-n", namespace]
    watch = [*command, "get", "configmap", "seen", "--watch", "-o", "jsonpath={.data.word}{'\\n'}"]
    control_plane.kubectl("-n", namespace, "create", "configmap", "seen", "--from-literal=word=first")
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline() == "first\n"
        patch = json.dumps({"data": {"word": "second"}})
        control_plane.kubectl("-n", namespace, "patch", "configmap", "seen", "-p", patch)
        assert watching.stdout.readline() == "second\n"
        watching.kill()


def test_another_user_may_do_only_what_is_granted(control_plane: ControlPlane, namespace: str) -> None:
    """RBAC is on: a user may read ConfigMaps once a role binding says so, and still not Secrets."""
    config = control_plane.kubeconfig_for("reader", "engine-tests")
    with pytest.raises(RuntimeError, match='User "reader" cannot list resource "configmaps"'):
        control_plane.kubectl("-n", namespace, "get", "configmaps", kubeconfig=config)
    control_plane.kubectl("-n", namespace, "create", "role", "read", "--verb=list", "--resource=configmaps")
    control_plane.kubectl("-n", namespace, "create", "rolebinding", "read", "--role=read", "--group=engine-tests")
    control_plane.kubectl("-n", namespace, "get", "configmaps", kubeconfig=config)
    with pytest.raises(RuntimeError, match='cannot list resource "secrets"'):
        control_plane.kubectl("-n", namespace, "get", "secrets", kubeconfig=config)


def test_a_killed_apiserver_comes_back_with_the_same_objects(tmp_path: Path) -> None:
    """What was acknowledged before SIGKILL of apiserver and etcd is there when both run again; then nothing is left."""
    with running_control_plane(tmp_path) as plane:
        plane.kubectl("create", "configmap", "kept", "--from-literal=word=same")
        plane.kill("kube-apiserver")
        plane.kill("etcd")
        with pytest.raises(RuntimeError, match="refused"):
            plane.kubectl("get", "configmap", "kept")
        plane.start("etcd")
        plane.start("kube-apiserver")
        plane.wait_until_ready()
        assert plane.kubectl("get", "configmap", "kept", "-o", "jsonpath={.data.word}") == "same"
    assert processes.of(tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == {".finetunejob-cluster", "logs"}


def test_a_process_that_cannot_start_is_told_with_its_words(tmp_path: Path) -> None:
    """A bad flag of the apiserver is an error with its last words, and no etcd stays behind."""
    with pytest.raises(RuntimeError, match=r"(?s)kube-apiserver ended: .*unknown flag: --no-such-flag"):
        start_control_plane(tmp_path, flags=("--no-such-flag",))
    assert processes.of(tmp_path) == []


def test_another_process_can_use_and_stop_it(tmp_path: Path) -> None:
    """The directory says all it takes to talk to a control plane, the process table all it takes to stop it."""
    with running_control_plane(tmp_path) as plane:
        again = load_control_plane(tmp_path)
        assert again == plane
        again.kubectl("get", "namespaces")
        (tmp_path / "control-plane.json").unlink()  # as after a crash before it was written
        stop_control_plane(tmp_path)
        assert processes.of(tmp_path) == []


def test_the_controllers_make_pods_and_delete_children(control_plane_with_controllers: ControlPlane) -> None:
    """With the controller manager a Job gets its pod, and a foreground deletion takes the pod along."""
    plane = control_plane_with_controllers
    plane.kubectl("create", "namespace", "controllers")
    plane.kubectl("-n", "controllers", "create", "job", "one", "--image=none.invalid/none")
    plane.kubectl("-n", "controllers", "wait", "--for=create", "pod", "-l", "job-name=one", "--timeout=120s")
    plane.kubectl("-n", "controllers", "delete", "job", "one", "--cascade=foreground", "--timeout=120s")
    assert plane.kubectl("-n", "controllers", "get", "pods", "-o", "name") == ""


def test_a_directory_with_something_else_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    """Neither starting nor stopping a cluster touches a directory that a person has files in."""
    (tmp_path / "thesis.txt").write_text("my own")
    with pytest.raises(RuntimeError, match="neither empty nor a cluster's"):
        start_control_plane(tmp_path)
    stop_control_plane(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "my own"
