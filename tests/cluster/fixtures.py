"""Real clusters for tests; ``tests/conftest.py`` gives these fixtures to every test.

A machine that cannot run them skips with the reason; in CI (``CI=true``) that is a failure. With ``KUBECONFIG`` set,
the installed project is tested on that cluster, and no other is started.
"""

import os
import uuid
from collections.abc import Iterator

import pytest
from tests.cluster import processes
from tests.cluster.binaries import MissingToolError
from tests.cluster.controlplane import ControlPlane, running_control_plane
from tests.cluster.node import Cluster, start_cluster, stop_cluster


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory, _no_orphans: None) -> Iterator[ControlPlane]:
    """etcd and apiserver, nothing else: what a controller would do with Jobs, the test can do itself."""
    _only_without_kubeconfig()
    try:
        with running_control_plane(tmp_path_factory.mktemp("control-plane")) as plane:
            yield plane
    except MissingToolError as missing:
        cannot_run(str(missing))


@pytest.fixture(scope="session")
def control_plane_with_controllers(
    tmp_path_factory: pytest.TempPathFactory, _no_orphans: None
) -> Iterator[ControlPlane]:
    """One of its own with the controller manager: Jobs make pods (that stay pending), owners' children are deleted."""
    _only_without_kubeconfig()
    try:
        with running_control_plane(tmp_path_factory.mktemp("controllers"), controllers=True) as plane:
            yield plane
    except MissingToolError as missing:
        cannot_run(str(missing))


@pytest.fixture(scope="module")
def node_cluster(tmp_path_factory: pytest.TempPathFactory, _no_orphans: None) -> Iterator[Cluster]:
    """A whole cluster with one node that runs pods, and DNS; it has ``node.BUSYBOX`` and no way to any registry."""
    _only_without_kubeconfig()
    directory = tmp_path_factory.mktemp("cluster")
    try:
        yield start_cluster(directory)
    except MissingToolError as missing:
        cannot_run(str(missing))
    finally:
        stop_cluster(directory)


@pytest.fixture
def namespace(control_plane: ControlPlane) -> str:
    """A new namespace of ``control_plane``, in which no other test is."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    control_plane.kubectl("create", "namespace", name)
    return name


@pytest.fixture(scope="session")
def _no_orphans() -> None:
    """End what test runs left behind that were killed."""
    for directory in processes.clusters(orphaned=True):
        stop_cluster(directory)


def _only_without_kubeconfig() -> None:
    if os.environ.get("KUBECONFIG"):
        pytest.skip("it needs a control plane or a node of its own; tests on the cluster of KUBECONFIG are others")


def cannot_run(reason: str) -> None:
    """Skip the test, unless the machine is one that must run everything."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
