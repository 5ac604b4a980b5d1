"""A whole cluster: the control plane with all its controllers, and one node that runs pods; needs root.

The node's programs run in a sandbox (``sandbox.py``); images come from archives, as there is no registry.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import pki, processes, sandbox
from tests.cluster.binaries import HERE, MissingToolError, binary
from tests.cluster.controlplane import (
    ControlPlane,
    claim,
    load_control_plane,
    log_end,
    start_control_plane,
    stop_control_plane,
)
from tests.cluster.images import write_image
from tests.cluster.packages import NODE, require

NAME = "node-1"
PAUSE = "registry.k8s.io/pause:3.10.1"
BUSYBOX = "docker.io/local/busybox:1"
"""An image with a shell and the usual small programs, on every node."""
COREDNS = "docker.io/local/coredns:1"
READY = "{.items[*].status.conditions[?(@.type=='Ready')].status}"
SECONDS = 300
"""For the node or the DNS to be ready: it takes 10 s, but the machine may be busy."""

CONTAINERD = """\
version = 2
root = "{images}"
state = "{directory}/state"
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{directory}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"""


@dataclass(frozen=True)
class Cluster:
    """Where a cluster is, and how to talk to it and to its node."""

    plane: ControlPlane
    link: sandbox.Link
    first_process: int
    """Of the node's sandbox."""
    images: Path
    """containerd's images and file systems."""

    @property
    def directory(self) -> Path:
        """Everything of it, but images that are shared with later clusters."""
        return self.plane.directory

    @property
    def kubeconfig(self) -> Path:
        """For the administrator; complete in itself."""
        return self.plane.kubeconfig

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """``ControlPlane.kubectl``."""
        return self.plane.kubectl(*arguments, stdin=stdin)

    def on_node(self, *command: str) -> str:
        """What a command on the node printed.

        Raises:
            RuntimeError: it failed; with what it said.
        """
        done = subprocess.run([*sandbox.enter(self.first_process), *command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def ctr(self, *arguments: str) -> str:
        """containerd's own client, in the kubelet's namespace of images."""
        return self.on_node("ctr", f"--address={self._socket}", "--namespace=k8s.io", *arguments)

    def load_image(self, archive: Path) -> None:
        """Give the node an image from an archive (docker or OCI) that names it.

        Pods need ``imagePullPolicy: Never`` or ``IfNotPresent``, and the whole name: ``docker.io/local/x:1``.
        """
        self.ctr("images", "import", str(archive))

    def has_image(self, name: str) -> bool:
        """Whether the node has it, from an earlier cluster perhaps."""
        return name in self.ctr("images", "list", "--quiet").split()

    def set_gpus(self, count: int) -> None:
        """Make the node say that it has so many ``nvidia.com/gpu``; pods get a number and no device."""
        patch = [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": str(count)}]
        self.kubectl("patch", "node", NAME, "--subresource=status", "--type=json", "-p", json.dumps(patch))
        path = r"jsonpath={.status.allocatable.nvidia\.com/gpu}"
        self.kubectl("wait", f"--for={path}={count}", f"node/{NAME}", f"--timeout={SECONDS}s")

    def start(self, name: str) -> None:
        """Start ``containerd``, ``kubelet`` or ``kube-proxy``, again if it was killed."""
        command = [*sandbox.enter(self.first_process), *self._command(name)]
        processes.start(self.directory, name, command, self.plane.owner)

    def kill(self, name: str) -> None:
        """SIGKILL one of the node's programs, as a node's failure would; its containers run on."""
        if pid := processes.started(self.directory, name):
            processes.kill([*processes.children(pid), pid])

    @property
    def _socket(self) -> Path:
        return self.directory / "containerd.sock"

    def _command(self, name: str) -> list[str]:
        directory = self.directory
        if name == "containerd":
            return ["containerd", f"--config={directory / 'containerd.toml'}", "--log-level=warn"]
        same = [str(binary(name)), f"--hostname-override={NAME}"]
        if name == "kubelet":
            more = [f"--node-ip={self.link.inside}", f"--root-dir={directory / 'kubelet'}", f"--cert-dir={directory}"]
            return [*same, f"--config={directory / 'kubelet.json'}", f"--kubeconfig={directory / 'node.conf'}", *more]
        # The limit of connections belongs to the whole machine, which keeps its own.
        limits = ["--conntrack-max-per-core=0", "--conntrack-min=0"]
        more = ["--proxy-mode=nftables", f"--cluster-cidr={self.link.pods}", *limits]
        return [*same, f"--kubeconfig={directory / 'kube-proxy.conf'}", *more]


def start_cluster(
    directory: Path,
    *,
    owner: int | None = None,
    images: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Cluster:
    """Start one in an empty directory and wait until pods can run and names resolve.

    Args:
        directory: for all that it keeps; not below a directory of ``sandbox.HIDDEN``.
        owner: the process that it shall not outlive, by default this one; 0 for none.
        images: where containerd keeps images, by default in ``directory``; one cluster at a time.
        say: is told of each step.

    Raises:
        MissingToolError: not root, or a package is missing, or the programs are not built and there is no Go.
        RuntimeError: a program ended or said why it could not do its part.
    """
    if os.geteuid() != 0:
        raise MissingToolError("a node needs root: namespaces, mounts, control groups")
    require(NODE, say=say)
    directory = claim(directory)
    try:
        link = sandbox.make_link(directory)
        say("control plane")
        plane = start_control_plane(
            directory, owner=owner, address=link.outside, services=link.services, controllers=True, scheduler=True
        )
        say("node")
        first_process = sandbox.start(directory, link, plane.owner)
        cluster = Cluster(plane, link, first_process, images or directory / "images")
        saved = {"link": link.number, "first_process": first_process, "images": str(cluster.images)}
        (directory / "node.json").write_text(json.dumps(saved))
        _configure(cluster)
        cluster.start("kube-proxy")
        cluster.start("containerd")
        _load_images(cluster)
        cluster.start("kubelet")  # it ends at once if containerd does not listen yet
        _wait_for_node(cluster)
        say("DNS")
        _start_dns(cluster)
    except BaseException:
        stop_cluster(directory)
        raise
    return cluster


def load_cluster(directory: Path) -> Cluster:
    """The one that another process started there.

    Raises:
        FileNotFoundError: none was.
    """
    saved = json.loads((directory.resolve() / "node.json").read_text())
    plane = load_control_plane(directory)
    return Cluster(plane, sandbox.Link(saved["link"]), saved["first_process"], Path(saved["images"]))


def stop_cluster(directory: Path) -> None:
    """Leave nothing of a cluster or a control plane, after a crash too, but the directory with its logs."""
    directory = directory.resolve()
    if os.geteuid() == 0 and shutil.which("ip"):
        sandbox.remove(directory)
    stop_control_plane(directory)


def _configure(cluster: Cluster) -> None:
    directory, link, keys = cluster.directory, cluster.link, cluster.directory / "pki"
    pki.make_certificate(keys, "node", f"/O=system:nodes/CN=system:node:{NAME}", f"DNS:{NAME},IP:{link.inside}")
    pki.make_certificate(keys, "kube-proxy", "/CN=system:kube-proxy")
    for name in ("node", "kube-proxy"):
        pki.write_kubeconfig(directory / f"{name}.conf", f"https://{link.outside}:{cluster.plane.port}", keys, name)
    cluster.images.mkdir(parents=True, exist_ok=True)
    words = {"images": cluster.images, "directory": directory, "socket": cluster._socket, "pause": PAUSE}
    (directory / "containerd.toml").write_text(CONTAINERD.format(**words))
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,  # this machine has a route to the pods; further they have no way
        "hairpinMode": True,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": link.pods}]], "routes": [{"dst": "0.0.0.0/0"}]},
    }
    (directory / "cni").mkdir()
    network = {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}
    (directory / "cni" / "10-pods.conflist").write_text(json.dumps(network, indent=1))
    kubelet = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{sandbox.cgroup_name(directory)}",
        "containerRuntimeEndpoint": f"unix://{cluster._socket}",
        "failSwapOn": False,
        # More than CAP_SYS_RESOURCE would be needed for; containers of such machines lack it.
        "oomScoreAdj": 0,
        "maxOpenFiles": 20000,
        "tlsCertFile": str(keys / "node.crt"),
        "tlsPrivateKeyFile": str(keys / "node.key"),
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(keys / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
        },
        # No registry could give back what was collected.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "podLogsDir": str(directory / "podlogs"),
        "clusterDNS": [_dns_address(link)],
        "clusterDomain": "cluster.local",
        "resolvConf": "",
        "nodeStatusUpdateFrequency": "2s",
        "serializeImagePulls": False,
    }
    (directory / "kubelet.json").write_text(json.dumps(kubelet, indent=1))


def _load_images(cluster: Cluster) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        with suppress(RuntimeError):
            cluster.ctr("version")
            break
        if processes.started(cluster.directory, "containerd") is None or time.monotonic() > deadline:
            raise RuntimeError(f"containerd does not answer: {log_end(cluster.directory, 'containerd')}")
        time.sleep(0.05)
    busybox = shutil.which("busybox", path="/bin:/usr/bin")
    assert busybox is not None  # from packages.NODE
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    links = {f"/bin/{applet}": "busybox" for applet in applets if applet != "busybox"}
    shell = {"/bin/busybox": Path(busybox)}
    for name, files, command, more in (
        (PAUSE, shell, ["/bin/busybox", "sleep", "infinity"], {}),
        (BUSYBOX, shell, ["/bin/sh"], links),
        (COREDNS, {"/coredns": binary("coredns")}, ["/coredns"], {}),
    ):
        archive = cluster.directory / "image.tar"
        write_image(archive, name, files, command, more)
        cluster.load_image(archive)
        archive.unlink()


def _start_dns(cluster: Cluster) -> None:
    manifest = (HERE / "coredns.yaml").read_text()
    for word, value in {"$IMAGE": COREDNS, "$ADDRESS": _dns_address(cluster.link)}.items():
        manifest = manifest.replace(word, value)
    cluster.kubectl("apply", "-f", "-", stdin=manifest)
    cluster.kubectl("-n", "kube-system", "rollout", "status", "deployment/coredns", f"--timeout={SECONDS}s")
    # The first pods of a test must not be refused for want of their service account.
    cluster.kubectl("wait", "--for=create", "serviceaccount/default", f"--timeout={SECONDS}s")


def _wait_for_node(cluster: Cluster) -> None:
    deadline = time.monotonic() + SECONDS
    while "True" not in cluster.kubectl("get", "nodes", "-o", f"jsonpath={READY}"):
        for name in ("containerd", "kubelet", "kube-proxy"):
            if processes.started(cluster.directory, name) is None or time.monotonic() > deadline:
                raise RuntimeError(f"the node is not ready; {name}: {log_end(cluster.directory, name)}")
        time.sleep(0.2)


def _dns_address(link: sandbox.Link) -> str:
    return link.services.rsplit(".", 1)[0] + ".10"
