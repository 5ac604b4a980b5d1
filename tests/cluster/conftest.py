"""The installed project, once for all tests here that need it: images, cluster and first job take minutes."""

import sys
from collections.abc import Iterator

import pytest
from tests.cluster.binaries import MissingToolError
from tests.cluster.fixtures import cannot_run
from tests.cluster.installed import Installed, installed


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, _no_orphans: None) -> Iterator[Installed]:
    """The chart on a cluster of its own; whoever needs a clean slate makes a namespace."""
    try:
        with installed(tmp_path_factory.mktemp("installed"), lambda line: print(line, file=sys.stderr)) as world:
            yield world
    except MissingToolError as missing:
        cannot_run(str(missing))
