"""Fixtures for every test here, defined once: a session has one control plane, not one for each directory."""

from typing import Any

import pytest
from tests.cluster.fixtures import (  # noqa: F401
    _no_orphans,
    control_plane,
    control_plane_with_controllers,
    namespace,
    node_cluster,
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Among several workers a file stays with one, for its tests share what is dear to make.

    So does all of tests/cluster: one whole cluster at a time.
    """
    from xdist.scheduler import LoadFileScheduling  # where only tests/gpu runs there is none

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope = str(super()._split_scope(nodeid))
            return "tests/cluster" if scope.startswith("tests/cluster/") else scope

    return Scheduling(config, log)
