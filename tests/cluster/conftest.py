"""The installed project, once for all tests here that need it: images, cluster and first job take minutes."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.binaries import MissingToolError
from tests.cluster.fixtures import cannot_run
from tests.cluster.installed import Installed, installed, installed_elsewhere


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, _no_orphans: None) -> Iterator[Installed]:
    """The chart on a cluster of its own, or on ``KUBECONFIG``'s; whoever needs a clean slate makes a namespace."""

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    directory = tmp_path_factory.mktemp("installed")
    kubeconfig = os.environ.get("KUBECONFIG")
    try:
        with (
            installed_elsewhere(Path(kubeconfig), directory, say) if kubeconfig else installed(directory, say) as world
        ):
            yield world
    except MissingToolError as missing:
        cannot_run(str(missing))
