"""Fixtures for every test here, defined once: a session has one control plane, not one for each directory."""

from tests.cluster.fixtures import (  # noqa: F401
    _no_orphans,
    control_plane,
    control_plane_with_controllers,
    namespace,
    node_cluster,
)
