"""A real Kubernetes on this machine: ``python -m tests.cluster build|up|down|status``.

``up`` needs root for a node, and Go 1.26 the first time; ``up --control-plane`` needs only Go.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster import processes
from tests.cluster.binaries import BY_NAME, MissingToolError, build
from tests.cluster.controlplane import load_control_plane, start_control_plane
from tests.cluster.node import start_cluster, stop_cluster
from tests.cluster.packages import IMAGES, NODE, require

DIRECTORY = Path(tempfile.gettempdir()) / "finetunejob-cluster"


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description="a real Kubernetes on this machine")
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="build the programs (10 minutes the first time)")
    building.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BY_NAME)}; by default all")
    up = commands.add_parser("up", help="start a cluster and wait until pods can run")
    up.add_argument("--control-plane", action="store_true", help="etcd, apiserver and controllers only; no root needed")
    up.add_argument("--install", action="store_true", help="install what is missing with apt-get")
    down = commands.add_parser("down", help="end a cluster, after a crash too, and leave nothing")
    down.add_argument("--all", action="store_true", help="every cluster on this machine, those of running tests too")
    status = commands.add_parser("status", help="what runs, and the kubeconfig; exit code 1 if nothing does")
    for command in (up, down, status):
        command.add_argument("--directory", type=Path, default=DIRECTORY, help="default: %(default)s")
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "build":
            build(asked.names or list(BY_NAME), say)
        elif asked.command == "up":
            _up(asked.directory, asked.control_plane, asked.install)
        elif asked.command == "down":
            for directory in processes.clusters() if asked.all else [asked.directory]:
                stop_cluster(directory)
        else:
            return _status(asked.directory)
    except (MissingToolError, RuntimeError) as error:
        say(f"error: {error}")
        return 1
    return 0


def say(line: str) -> None:
    """Progress, for people."""
    print(line, file=sys.stderr, flush=True)


def _up(directory: Path, control_plane: bool, install: bool) -> None:
    if not processes.of(directory.resolve()):
        stop_cluster(directory)  # what a crash of the machine left
    started = time.monotonic()
    if control_plane:
        start_control_plane(directory, owner=0, controllers=True)
    else:
        if install:
            require({**NODE, **IMAGES}, install=True, say=say)
        start_cluster(directory, owner=0, say=say)
    say(f"up in {time.monotonic() - started:.1f} s")
    print(f"export KUBECONFIG={load_control_plane(directory).kubeconfig}")


def _status(directory: Path) -> int:
    pids = processes.of(directory.resolve())
    if not pids:
        print(f"no cluster is up in {directory}")
        return 1
    plane = load_control_plane(directory)
    print(f"export KUBECONFIG={plane.kubeconfig}")
    print(f"processes: {' '.join(map(str, pids))}")
    print(plane.kubectl("get", "nodes,pods", "--all-namespaces").rstrip() or "no node")
    return 0


if __name__ == "__main__":
    sys.exit(main())
