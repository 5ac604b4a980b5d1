"""FineTuneJob as a user has it: installed from its chart on a whole cluster, with the dev object store and its data."""

import hashlib
import json
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from tests.chart import CHART, NAME, NAMESPACE, ROOT, flags, helm
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

    cluster: Cluster
    s3: "S3Client"
    credentials: dict[str, str]
    tag: str
    """Of the project's images on the node."""

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """As the administrator."""
        return self.cluster.kubectl(*arguments, stdin=stdin)

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
            time.sleep(0.5)
        return found

    def wait_until_over(self, namespace: str, name: str) -> Object:
        """The status of a job that is Complete or Failed."""

        def over() -> Object | None:
            status = self.status(namespace, name)
            done = [c["type"] for c in status.get("conditions", []) if c["status"] == "True"]
            return status if {"Complete", "Failed"} & set(done) else None

        return dict(self.wait(f"{namespace}/{name}", over))

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
            values |= {"devObjectStore.enabled": True, "devObjectStore.secretNamespaces": ["default"]}
            # The cluster has no StorageClass.
            values |= {"devObjectStore.persistence.enabled": False}
            arguments = ("upgrade", "--install", NAME, str(CHART), f"--namespace={NAMESPACE}", "--create-namespace")
            helm(*arguments, "--wait", "--timeout=10m", *flags(values), kubeconfig=cluster.kubeconfig)
            yield _bring_inputs(cluster, tag)
        finally:
            stop_cluster(directory)


def _bring_inputs(cluster: Cluster, tag: str) -> Installed:
    from finetune_jobs.gguf.readback import read_back

    data = json.loads(cluster.kubectl("get", "secret/s3-credentials", "-o", "json"))["data"]
    credentials = {key: b64decode(value).decode() for key, value in data.items()}
    path = "jsonpath={.spec.clusterIP}"
    address = cluster.kubectl("-n", NAMESPACE, "get", f"service/{NAME}-object-store", "-o", path)
    s3 = boto3.client(
        "s3",
        endpoint_url=f"http://{address}:8333",
        region_name="us-east-1",
        aws_access_key_id=credentials["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=credentials["AWS_SECRET_ACCESS_KEY"],
    )
    model = cluster.directory / "smollm2"
    read_back(next((ROOT / ".venv").rglob("SmolLM2*.gguf")), model)
    for file in sorted(path for path in model.rglob("*") if path.is_file()):
        s3.upload_file(str(file), BUCKET, f"inputs/smollm2/{file.relative_to(model)}")
    for file in sorted((ROOT / "manifests/examples/data").glob("*.jsonl")):
        s3.upload_file(str(file), BUCKET, f"inputs/orders/{file.name}")
    return Installed(cluster, s3, credentials, tag)


def example(name: str, **spec: Any) -> Object:
    """The quickstart's job under another name, with other parts of its spec."""
    (job,) = read(EXAMPLE.read_text())  # as kubectl reads it: PyYAML takes 1e-3 for a word
    job["metadata"]["name"] = name
    job["spec"] |= spec
    return dict(job)


def sha256(content: bytes) -> str:
    """In hex."""
    return hashlib.sha256(content).hexdigest()
