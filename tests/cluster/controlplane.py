"""A control plane without nodes: etcd and a real apiserver, with the controllers that are asked for; 4 s, 350 MB.

Everything lives in one directory and listens on free ports of loopback, so that several can run at once.
"""

import http.client
import json
import os
import random
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cluster import pki, processes
from tests.cluster.binaries import binary

ADMIN = "/O=system:masters/CN=admin"
CLAIM = ".finetunejob-cluster"
"""The file that says that a directory and all in it belong to a cluster."""
SECONDS = 180
"""For the apiserver to be ready: it takes 3 s, but the machine may be busy."""


@dataclass(frozen=True)
class ControlPlane:
    """Where a control plane is, and how to talk to it; it may be another process that started it."""

    directory: Path
    port: int
    etcd_port: int
    owner: int
    """Process whose end ends it (``processes.clusters``); 0: nobody's."""
    address: str = "127.0.0.1"
    """Under which nodes and pods reach the apiserver."""
    services: str = "10.96.0.0/24"
    controllers: bool = False
    """Whether the controller manager runs: service accounts, Jobs' pods, garbage collection, namespaces' deletion."""
    scheduler: bool = False
    flags: tuple[str, ...] = ()
    """More flags for the apiserver."""

    @property
    def url(self) -> str:
        """The apiserver, from this machine."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def kubeconfig(self) -> Path:
        """For the user ``admin`` of the group ``system:masters``; complete in itself."""
        return self.directory / "admin.conf"

    @property
    def authority(self) -> Path:
        """The certificate that signs all others."""
        return self.directory / "pki" / "ca.crt"

    @property
    def client_certificate(self) -> tuple[Path, Path]:
        """The administrator's certificate and key."""
        return self.directory / "pki" / "admin.crt", self.directory / "pki" / "admin.key"

    def kubectl(self, *arguments: str, stdin: str | None = None, kubeconfig: Path | None = None) -> str:
        """What kubectl printed, as the administrator or with another kubeconfig.

        Raises:
            RuntimeError: it failed; with what it said.
        """
        command = [str(binary("kubectl")), f"--kubeconfig={kubeconfig or self.kubeconfig}", *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def kubeconfig_for(self, user: str, *groups: str) -> Path:
        """A kubeconfig for another user, who may do what RBAC says and no more."""
        name = user.replace(":", "-")
        subject = "".join(f"/O={group}" for group in groups) + f"/CN={user}"
        pki.make_certificate(self.directory / "pki", name, subject)
        return self._write_kubeconfig(name)

    def start(self, name: str) -> None:
        """Start one program, again if it was killed: ``etcd``, ``kube-apiserver`` or one of the controllers.

        Returns as soon as the process is there; ``wait_until_ready`` waits for the apiserver.
        """
        processes.start(self.directory, name, [str(binary(name)), *self._arguments(name)], self.owner)

    def kill(self, name: str) -> None:
        """SIGKILL one program; what etcd had acknowledged is still there when it starts again."""
        if pid := processes.started(self.directory, name):
            processes.kill([pid])

    def wait_until_ready(self) -> None:
        """Return once the apiserver says so of itself.

        Raises:
            RuntimeError: a process ended; with the end of its log.
            TimeoutError: it did not get ready in ``SECONDS``.
        """
        deadline = time.monotonic() + SECONDS
        while not self._answers("/readyz"):
            for name in ("etcd", "kube-apiserver"):
                if processes.started(self.directory, name) is None:
                    raise RuntimeError(f"{name} ended: {log_end(self.directory, name)}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the apiserver is not ready: {log_end(self.directory, 'kube-apiserver')}")
            time.sleep(0.05)

    def _answers(self, path: str) -> bool:
        context = ssl.create_default_context(cafile=self.authority)
        context.load_cert_chain(*self.client_certificate)
        try:
            with urllib.request.urlopen(self.url + path, context=context, timeout=10) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, http.client.HTTPException, OSError):
            return False

    def _write_kubeconfig(self, name: str) -> Path:
        path = self.directory / f"{name}.conf"
        pki.write_kubeconfig(path, self.url, self.directory / "pki", name)
        return path

    def _arguments(self, name: str) -> list[str]:
        keys, data = self.directory / "pki", self.directory
        etcd = f"http://127.0.0.1:{self.etcd_port}"
        identity = [f"--{use}kubeconfig={data / name}.conf" for use in ("", "authentication-", "authorization-")]
        controller = [*identity, "--leader-elect=false", "--secure-port=0"]
        return {
            "etcd": [
                f"--data-dir={data / 'etcd'}",
                f"--listen-client-urls={etcd}",
                f"--advertise-client-urls={etcd}",
                "--listen-peer-urls=http://localhost:0",
                "--unsafe-no-fsync",  # only a crash of the whole machine could lose something
            ],
            "kube-apiserver": [
                f"--etcd-servers={etcd}",
                f"--secure-port={self.port}",
                f"--bind-address={'127.0.0.1' if self.address == '127.0.0.1' else '0.0.0.0'}",
                # A loopback address cannot be an endpoint of the Service `kubernetes`.
                *(
                    ["--endpoint-reconciler-type=none"]
                    if self.address == "127.0.0.1"
                    else [f"--advertise-address={self.address}"]
                ),
                f"--service-cluster-ip-range={self.services}",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                f"--client-ca-file={keys / 'ca.crt'}",
                f"--tls-cert-file={keys / 'apiserver.crt'}",
                f"--tls-private-key-file={keys / 'apiserver.key'}",
                f"--kubelet-certificate-authority={keys / 'ca.crt'}",
                f"--kubelet-client-certificate={keys / 'apiserver-kubelet.crt'}",
                f"--kubelet-client-key={keys / 'apiserver-kubelet.key'}",
                "--kubelet-preferred-address-types=InternalIP,Hostname",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={keys / 'service-accounts.key'}",
                f"--service-account-signing-key-file={keys / 'service-accounts.key'}",
                "--allow-privileged=true",
                f"--cert-dir={data}",
                *self.flags,
            ],
            "kube-controller-manager": [
                *controller,
                f"--root-ca-file={keys / 'ca.crt'}",
                f"--service-account-private-key-file={keys / 'service-accounts.key'}",
                f"--cluster-signing-cert-file={keys / 'ca.crt'}",
                f"--cluster-signing-key-file={keys / 'ca.key'}",
                "--use-service-account-credentials=true",
                f"--cert-dir={data}",
            ],
            "kube-scheduler": [*controller, f"--cert-dir={data}"],
        }[name]


def start_control_plane(
    directory: Path,
    *,
    owner: int | None = None,
    address: str = "127.0.0.1",
    services: str = "10.96.0.0/24",
    controllers: bool = False,
    scheduler: bool = False,
    flags: tuple[str, ...] = (),
) -> ControlPlane:
    """Start one in an empty directory and wait until it is ready; the arguments are those of ``ControlPlane``.

    Raises:
        RuntimeError: a program ended at once, or openssl failed; with what it said. Or ``claim`` refused the directory.
        MissingToolError: the programs are not built, and there is no Go to build them.
    """
    directory = claim(directory)
    port, etcd_port = _free_ports(2)
    owner = os.getpid() if owner is None else owner
    plane = ControlPlane(directory, port, etcd_port, owner, address, services, controllers, scheduler, flags)
    names = ["etcd", "kube-apiserver"]
    later = ["kube-controller-manager"] * controllers + ["kube-scheduler"] * scheduler
    for name in [*names, *later, "kubectl"]:
        binary(name)
    _make_credentials(plane)
    (directory / "control-plane.json").write_text(json.dumps({**asdict(plane), "directory": str(directory)}, indent=1))
    try:
        for name in names:
            plane.start(name)
        plane.wait_until_ready()
        for name in later:
            plane.start(name)
    except BaseException:
        stop_control_plane(directory)
        raise
    return plane


def load_control_plane(directory: Path) -> ControlPlane:
    """The one that another process started there.

    Raises:
        FileNotFoundError: none was.
    """
    saved = json.loads((directory.resolve() / "control-plane.json").read_text())
    return ControlPlane(**{**saved, "directory": Path(saved["directory"]), "flags": tuple(saved["flags"])})


def stop_control_plane(directory: Path) -> None:
    """Leave no process and no data of it, after a crash too; the logs stay."""
    directory = directory.resolve()
    # Nothing of it is kept, so nothing need be shut down in order: the apiserver takes its time without etcd.
    processes.kill(processes.of(directory))
    if not (directory / CLAIM).exists():
        return
    for path in directory.iterdir():
        if path.is_dir() and path.name != "logs":
            shutil.rmtree(path)
        elif not path.is_dir() and path.name != CLAIM:
            path.unlink()


def claim(directory: Path) -> Path:
    """Make the directory one of a cluster, whose content ``stop_control_plane`` may delete; returns its real path.

    Raises:
        RuntimeError: it holds something else, or a cluster is up in it.
    """
    directory = directory.resolve()
    if processes.of(directory):
        raise RuntimeError(f"a cluster is up in {directory}: `python -m tests.cluster down` ends it")
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()) and not (directory / CLAIM).exists():
        raise RuntimeError(f"{directory} is neither empty nor a cluster's: name another directory")
    (directory / CLAIM).touch()
    return directory


@contextmanager
def running_control_plane(
    directory: Path, controllers: bool = False, scheduler: bool = False, flags: tuple[str, ...] = ()
) -> Iterator[ControlPlane]:
    """One for the length of a ``with``."""
    plane = start_control_plane(directory, controllers=controllers, scheduler=scheduler, flags=flags)
    try:
        yield plane
    finally:
        stop_control_plane(plane.directory)


def log_end(directory: Path, name: str, lines: int = 8) -> str:
    """The last lines that a program of the cluster wrote."""
    path = directory / "logs" / f"{name}.log"
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no log)"


def _make_credentials(plane: ControlPlane) -> None:
    directory = plane.directory / "pki"
    pki.make_authority(directory)
    first_service = plane.services.rsplit(".", 1)[0] + ".1"
    names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
    addresses = sorted({"127.0.0.1", plane.address, first_service})
    alternatives = ",".join([*(f"DNS:{name}" for name in names), *(f"IP:{address}" for address in addresses)])
    pki.make_certificate(directory, "apiserver", "/CN=kube-apiserver", alternatives)
    pki.make_certificate(directory, "apiserver-kubelet", "/O=system:masters/CN=apiserver-kubelet")
    users = {"admin": ADMIN}
    users |= {f"kube-{name}": f"/CN=system:kube-{name}" for name in ("controller-manager", "scheduler")}
    for name, subject in users.items():
        pki.make_certificate(directory, name, subject)
        plane._write_kubeconfig(name)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel and NodePorts take by themselves."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports += [port] if port not in ports else []
    return ports
