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

    So do all files of one ``xdist_group``.
    """
    from xdist.scheduler import LoadGroupScheduling  # where only tests/gpu runs there is none

    class FileScheduling(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return str(super()._split_scope(nodeid)).partition("::")[0]

    return FileScheduling(config, log)
