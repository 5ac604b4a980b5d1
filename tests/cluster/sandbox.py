"""Where a node's programs run: namespaces of their own for mounts, processes and network.

Whatever they mount, start or configure there ends with the first process of the sandbox, however it ends. Outside there
are only one end of a network link, a tree of control groups, and processes that carry the cluster's mark: ``remove``
finds all three without anybody's help.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import processes

CGROUPS = Path("/sys/fs/cgroup")
# Directories that containerd, CNI and the kubelet use whatever their configuration says. None is needed from outside.
HIDDEN = ("/run", "/opt", "/var/lib", "/var/log")
# The kubelet sets these on the whole machine unless it finds them so (pkg/kubelet/cm/container_manager_linux.go).
# It finds these files instead, and the machine keeps its own.
SYSCTLS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1_000_000,
    "kernel/keys/root_maxbytes": 25_000_000,
}
MOST = 64
"""How many nodes one machine can have: each takes one number."""


@dataclass(frozen=True)
class Link:
    """A network link into the sandbox, and the addresses that follow from its number."""

    number: int

    @property
    def name(self) -> str:
        """Of the end outside."""
        return f"ftj{self.number}"

    @property
    def outside(self) -> str:
        """This machine's address on it."""
        return f"10.213.{self.number}.1"

    @property
    def inside(self) -> str:
        """The node's address."""
        return f"10.213.{self.number}.2"

    @property
    def pods(self) -> str:
        """The network of the node's pods; this machine has a route to it."""
        return f"10.214.{self.number}.0/24"

    @property
    def services(self) -> str:
        """The network of Services; this machine has a route to it."""
        return f"10.215.{self.number}.0/24"


def make_link(directory: Path) -> Link:
    """Take a number that no other cluster has; the link carries the cluster's directory as its alias.

    Raises:
        RuntimeError: the kernel makes no such link, or there are ``MOST`` clusters.
    """
    for number in range(MOST):
        link = Link(number)
        made = _run("ip", "link", "add", link.name, "type", "veth", "peer", "name", f"{link.name}p")
        if made.returncode == 0:
            _must("ip", "link", "set", link.name, "alias", str(directory))
            _must("ip", "address", "add", f"{link.outside}/24", "dev", link.name)
            _must("ip", "link", "set", link.name, "up")
            return link
        if "File exists" not in made.stderr:
            raise RuntimeError(f"ip link add {link.name} type veth: {made.stderr.strip()}")
    raise RuntimeError(f"{MOST} clusters are up on this machine; `python -m tests.cluster down --all` ends them")


def start(directory: Path, link: Link, owner: int) -> int:
    """Start the sandbox and put the link's other end into it; returns its first process, which ``enter`` takes."""
    if any(directory.is_relative_to(path) for path in HIDDEN):
        raise RuntimeError(f"{directory} would be hidden from the node, as is all below {', '.join(HIDDEN)}")
    # Ignored SIGCHLD: orphans of the sandbox are reaped by the kernel.
    first = ["env", "--ignore-signal=CHLD", "sleep", "infinity"]
    namespaces = ["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation=private"]
    outer = processes.start(directory, "sandbox", ["unshare", *namespaces, "--", *first], owner)
    inner = _first_process(directory, outer)
    _must("ip", "link", "set", f"{link.name}p", "netns", str(inner), "name", "eth0")
    sysctls = directory / "sysctls"
    sysctls.mkdir()
    # Shared below this namespace only: pods may ask for mounts that propagate.
    script = ["set -e", "mount --make-rshared /", "ip link set lo up", "ip link set eth0 up"]
    script += [f"ip address add {link.inside}/24 dev eth0", f"ip route add default via {link.outside}"]
    script += ["echo 1 > /proc/sys/net/ipv4/ip_forward"]  # of this network namespace
    script += [f"mount -t tmpfs tmpfs {path}" for path in HIDDEN]
    for name, value in SYSCTLS.items():
        file = sysctls / name.replace("/", ".")
        file.write_text(f"{value}\n")
        script.append(f"mount --bind {file} /proc/sys/{name}")
    _must(*enter(inner), "sh", "-c", "\n".join(script))
    for network in (link.pods, link.services):
        _must("ip", "route", "add", network, "via", link.inside, "dev", link.name)
    for hierarchy in _hierarchies():
        (hierarchy / cgroup_name(directory)).mkdir(exist_ok=True)
    return inner


def enter(first_process: int) -> list[str]:
    """What to put before a command that shall run in the sandbox."""
    return ["nsenter", f"--target={first_process}", "--mount", "--net", "--pid", "--"]


def cgroup_name(directory: Path) -> str:
    """The control group that holds all pods of that cluster, the same name in every hierarchy."""
    return f"finetunejob-{hashlib.sha256(str(directory).encode()).hexdigest()[:8]}"


def remove(directory: Path) -> None:
    """End everything of that cluster's sandbox that is still there, after a crash too."""
    processes.kill(processes.of(directory))
    links = json.loads(_must("ip", "-json", "link", "show", "type", "veth") or "[]")
    for link in links:
        if link.get("ifalias") == str(directory):
            _run("ip", "link", "delete", link["ifname"])  # it may go by itself just now, with the other end
    for hierarchy in _hierarchies():
        _remove_cgroup(hierarchy / cgroup_name(directory))


def _first_process(directory: Path, outer: int) -> int:
    children = Path(f"/proc/{outer}/task/{outer}/children")
    for _ in range(1000):
        if children.exists() and (found := children.read_text().split()) and _is_apart(int(found[0])):
            return int(found[0])
        time.sleep(0.01)
    log = (directory / "logs" / "sandbox.log").read_text()
    raise RuntimeError(f"unshare did not start: {log.strip()}")


def _is_apart(pid: int) -> bool:
    """Whether the sandbox's program runs, and not still its preparations."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/exe").resolve().name == "sleep"
    return False


def _hierarchies() -> list[Path]:
    if (CGROUPS / "cgroup.controllers").exists():  # version 2: one for all controllers
        return [CGROUPS]
    return [path for path in CGROUPS.iterdir() if path.is_dir() and not path.is_symlink()]


def _remove_cgroup(group: Path) -> None:
    if not group.exists():
        return
    # From the leaves up. Its processes are gone, but the kernel may need a moment to see that.
    for directory, _, _ in os.walk(group, topdown=False):
        for attempt in range(100):
            try:
                os.rmdir(directory)
                break
            except FileNotFoundError:
                break
            except OSError:
                if attempt == 99:
                    raise
                time.sleep(0.05)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})


def _must(*command: str) -> str:
    done = _run(*command)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout
