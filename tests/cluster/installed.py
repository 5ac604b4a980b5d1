"""FineTuneJob as a user has it: installed from its chart on a whole cluster, with the dev object store and its data.

The cluster is one of our own on this machine, or whichever ``KUBECONFIG`` names.
"""

import hashlib
import json
import os
import shlex
import subprocess
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from tests.chart import CHART, NAME, NAMESPACE, ROOT, flags, helm
from tests.cluster.binaries import binary
from tests.cluster.builds import image_cache, load_images
from tests.cluster.node import Cluster, start_cluster, stop_cluster

from finetune_cli.manifest import read

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

EXAMPLE = ROOT / "manifests/examples/quickstart-cluster.yaml"
BUCKET = "finetune"
SECONDS = 1200
"""For anything that ends by itself: the machine may be busy."""
Object = dict[str, Any]


@dataclass(frozen=True)
class Installed:
    """The cluster with the operator in it."""

    kubeconfig: Path
    s3: "S3Client"
    credentials: dict[str, str]
    own: tuple[Cluster, str] | None = None
    """If the node is on this machine: the cluster, and the tag of the project's images on it."""
    namespaces: list[str] = field(default_factory=list)
    """Those that tests made."""

    @property
    def node(self) -> Cluster:
        """For what cannot be done through the API; skips the test where the cluster is not ours."""
        return self._own[0]

    @property
    def tag(self) -> str:
        """Of the project's images on the node; skips the test where the cluster is not ours."""
        return self._own[1]

    @property
    def _own(self) -> tuple[Cluster, str]:
        if self.own is None:
            pytest.skip("it looks into the node, and that of a cluster by KUBECONFIG is not this machine")
        return self.own

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """As the administrator.

        Raises:
            RuntimeError: it failed; with what it said.
        """
        command = [str(binary("kubectl")), f"--kubeconfig={self.kubeconfig}", *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def get(self, namespace: str, *what: str) -> Object:
        """One object, or a list."""
        return dict(json.loads(self.kubectl("-n", namespace, "get", *what, "-o", "json")))

    def items(self, namespace: str, *what: str) -> list[Object]:
        """Of a list."""
        return list(self.get(namespace, *what)["items"])

    def status(self, namespace: str, name: str) -> Object:
        """Of a FineTuneJob."""
        return dict(self.get(namespace, f"ftj/{name}").get("status", {}))

    def stage(self, namespace: str, name: str, stage: str) -> Object:
        """One stage's part of it; empty before it is there."""
        stages = self.status(namespace, name).get("stages", [])
        return next((entry for entry in stages if entry["name"] == stage), {})

    def apply(self, namespace: str, *objects: Object) -> None:
        """``kubectl apply``."""
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("-n", namespace, "apply", "-f", "-", stdin=json.dumps(listed))

    def make_namespace(self, name: str, **credentials: str) -> None:
        """With the secret that jobs name; some of it another than the store's, where that is asked for."""
        self.kubectl("create", "namespace", name)
        self.namespaces.append(name)
        self.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3-credentials"}}
        self.apply(name, {**secret, "stringData": {**self.credentials, **credentials}})

    def wait(self, what: str, check: Callable[[], Any], seconds: float = SECONDS) -> Any:
        """What ``check`` gave when it was true at last.

        Raises:
            TimeoutError: it was not in so many seconds; with all jobs and pods.
        """
        deadline = time.monotonic() + seconds
        while not (found := check()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not in {seconds} s\n{self.kubectl('get', 'ftj,jobs,pods', '-A')}")
            time.sleep(1)  # each look is a program of its own, and the machine has other work to do
        return found

    def wait_until_over(self, namespace: str, name: str, seconds: float = SECONDS) -> Object:
        """The status of a job that is Complete or Failed."""

        def over() -> Object | None:
            status = self.status(namespace, name)
            done = [c["type"] for c in status.get("conditions", []) if c["status"] == "True"]
            return status if {"Complete", "Failed"} & set(done) else None

        return dict(self.wait(f"{namespace}/{name}", over, seconds))

    def read(self, uri: str) -> bytes:
        """An object of the store."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        return self.s3.get_object(Bucket=bucket, Key=key)["Body"].read()


@contextmanager
def installed(directory: Path, say: Callable[[str], None]) -> Iterator[Installed]:
    """Start a cluster, install the chart by the README's words, bring data and model to the store."""
    with image_cache() as cache:
        try:
            cluster = start_cluster(directory, images=cache / "node", say=say)
            tag = load_images(cluster, cache, say)
            say("chart")
            values = {f"images.{image}.tag": tag for image in ("operator", "trainer", "gguf", "objectStore")}
            _install(cluster.kubeconfig, *flags(values))
            path = "jsonpath={.spec.clusterIP}"
            address = cluster.kubectl("-n", NAMESPACE, "get", f"service/{NAME}-object-store", "-o", path)
            credentials = _credentials(cluster.kubectl)
            s3 = _store(f"http://{address}:8333", credentials)
            say("model and data")
            _bring_inputs(s3, directory / "smollm2")
            yield Installed(cluster.kubeconfig, s3, credentials, (cluster, tag))
        finally:
            stop_cluster(directory)


@contextmanager
def installed_elsewhere(kubeconfig: Path, directory: Path, say: Callable[[str], None]) -> Iterator[Installed]:
    """The same on a cluster that is there, with images that it can pull; what is made is taken away again.

    ``CHART_FLAGS`` are more arguments for ``helm upgrade --install``, such as ``--set images.registry=...``. A release
    of ours that is there already is used as it is, and left.
    """
    world = Installed(kubeconfig, boto3.client("s3", region_name="us-east-1"), {})
    there = world.kubectl("-n", NAMESPACE, "get", f"deployment/{NAME}", "--ignore-not-found", "-o", "name").strip()
    try:
        if not there:
            say("chart")
            _install(kubeconfig, *shlex.split(os.environ.get("CHART_FLAGS", "")))
        credentials = _credentials(world.kubectl)
        with _forwarded(kubeconfig) as address:
            s3 = _store(address, credentials)
            say("model and data")
            _bring_inputs(s3, directory / "smollm2")
            world = Installed(kubeconfig, s3, credentials, namespaces=world.namespaces)
            yield world
    finally:
        with suppress(RuntimeError):  # nothing of ours is served if the chart could not be installed
            world.kubectl("-n", "default", "delete", "ftj", "quickstart-cluster", "again", "--ignore-not-found")
        for name in world.namespaces:
            world.kubectl("delete", "namespace", name, "--wait=false")
        if not there:
            helm("uninstall", NAME, f"--namespace={NAMESPACE}", "--ignore-not-found", kubeconfig=kubeconfig)


def _install(kubeconfig: Path, *more: str) -> None:
    values = {"devObjectStore.enabled": True, "devObjectStore.secretNamespaces": ["default"]}
    # Not every cluster has a StorageClass.
    values |= {"devObjectStore.persistence.enabled": False}
    arguments = ("upgrade", "--install", NAME, str(CHART), f"--namespace={NAMESPACE}", "--create-namespace")
    helm(*arguments, "--wait", "--timeout=10m", *flags(values), *more, kubeconfig=kubeconfig)


def _credentials(kubectl: Callable[..., str]) -> dict[str, str]:
    data = json.loads(kubectl("-n", "default", "get", "secret/s3-credentials", "-o", "json"))["data"]
    return {key: b64decode(value).decode() for key, value in data.items()}


def _store(endpoint: str, credentials: dict[str, str]) -> "S3Client":
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=credentials["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=credentials["AWS_SECRET_ACCESS_KEY"],
    )


def _bring_inputs(s3: "S3Client", model: Path) -> None:
    from finetune_jobs.gguf.readback import read_back

    read_back(next((ROOT / ".venv").rglob("SmolLM2*.gguf")), model)
    for file in sorted(path for path in model.rglob("*") if path.is_file()):
        s3.upload_file(str(file), BUCKET, f"inputs/smollm2/{file.relative_to(model)}")
    for file in sorted((ROOT / "manifests/examples/data").glob("*.jsonl")):
        s3.upload_file(str(file), BUCKET, f"inputs/orders/{file.name}")


@contextmanager
def _forwarded(kubeconfig: Path) -> Iterator[str]:
    """The object store's address on this machine, for as long as this lasts."""
    command = [str(binary("kubectl")), f"--kubeconfig={kubeconfig}", f"--namespace={NAMESPACE}", "port-forward"]
    command += ["--address=127.0.0.1", f"service/{NAME}-object-store", ":8333"]
    forward = subprocess.Popen(command, text=True, stdout=subprocess.PIPE)
    try:
        assert forward.stdout is not None
        said = forward.stdout.readline()  # Forwarding from 127.0.0.1:PORT -> 8333
        yield f"http://{said.split()[2]}"
    finally:
        forward.kill()
        forward.wait()


def example(name: str, **spec: Any) -> Object:
    """The quickstart's job under another name, with other parts of its spec."""
    (job,) = read(EXAMPLE.read_text())  # as kubectl reads it: PyYAML takes 1e-3 for a word
    job["metadata"]["name"] = name
    job["spec"] |= spec
    return dict(job)


def sha256(content: bytes) -> str:
    """In hex."""
    return hashlib.sha256(content).hexdigest()
