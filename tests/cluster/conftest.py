"""The installed project, once for all tests here that need it: images, cluster and first job take minutes."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.binaries import MissingToolError, binary
from tests.cluster.fixtures import cannot_run
from tests.cluster.installed import EXAMPLE, Installed, Object, installed, installed_elsewhere


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


@pytest.fixture(scope="session")
def quickstart(world: Installed, tmp_path_factory: pytest.TempPathFactory) -> Object:
    """The example as it is, applied as its first lines say, and over; with the rows that ``--watch`` showed."""
    world.kubectl("apply", "-f", str(EXAMPLE))
    seen = tmp_path_factory.mktemp("quickstart") / "watch"
    columns = ["get", "ftj", "quickstart-cluster", "--watch", "--no-headers", "--namespace=default"]
    with seen.open("w") as file:
        watch = subprocess.Popen([str(binary("kubectl")), f"--kubeconfig={world.kubeconfig}", *columns], stdout=file)
    try:
        status = world.wait_until_over("default", "quickstart-cluster", 3600)
    finally:
        watch.kill()
        watch.wait()
    return {**status, "seen": [re.sub(r" {2,}", "|", row) for row in seen.read_text().splitlines()]}
