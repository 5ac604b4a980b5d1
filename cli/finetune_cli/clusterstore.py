"""The object store of a cluster's job, from the user's machine: whose credentials, and by which way."""

import base64
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from finetune_api.types import CABundle, Storage
from finetune_cli.access import Access
from finetune_cli.errors import INVALID, CommandError
from finetune_cli.portforward import forwarded
from finetune_jobs.run.errors import ConfigurationError
from finetune_operator.kube.client import Resource
from finetune_operator.kube.errors import ForbiddenError, NotFoundError

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster

SECRETS = Resource("", "v1", "secrets")
CONFIG_MAPS = Resource("", "v1", "configmaps")
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_TOKEN = "AWS_SESSION_TOKEN"
_OWN = f"set {_KEYS[0]} and {_KEYS[1]} (and {_TOKEN} if there is one), or AWS_PROFILE"


@contextmanager
def opened(cluster: "Cluster", storage: Storage, endpoint: str = "") -> Iterator[Access]:
    """Reach the store while the block lasts; ``endpoint`` takes the place of the spec's.

    Credentials of the user's own come first, then the Secret that the job names, read with the user's rights.
    CommandError: there are neither, or no way leads there.
    """
    environment = _environment(cluster, storage)
    secret = storage.secret_ref.name if storage.secret_ref is not None and _has_own() else ""
    with (
        _saying_whose(secret),
        _trusting(cluster, storage.ca_bundle, environment) as environment,
        _way(cluster, storage.endpoint, endpoint) as reachable,
    ):
        yield Access(storage.model_copy(update={"endpoint": reachable}), environment)


def _has_own() -> bool:
    return bool(os.environ.get("AWS_PROFILE")) or all(os.environ.get(key) for key in _KEYS)


@contextmanager
def _saying_whose(secret: str) -> Iterator[None]:
    """The user's AWS settings may be there for something else: a refusal says that they were taken."""
    try:
        yield
    except ConfigurationError as error:
        if not secret:
            raise
        words = f"{error}\nThe credentials were those of your environment; unset {_KEYS[0]} and AWS_PROFILE, and the"
        raise CommandError(f"{words} job's Secret {secret} is used", INVALID) from error


def _environment(cluster: "Cluster", storage: Storage) -> dict[str, str]:
    if _has_own():
        return dict(os.environ)
    if storage.secret_ref is None:
        from botocore.session import Session

        if Session().get_credentials() is None:
            raise CommandError(
                f"the job's pods reach the store as themselves (no spec.storage.secretRef), and here are no "
                f"credentials: {_OWN}",
                INVALID,
            )
        return dict(os.environ)
    # The user's other AWS settings belong to other stores: a session token beside these keys would be refused.
    others = {key: value for key, value in os.environ.items() if not key.startswith("AWS_") or key == "AWS_CA_BUNDLE"}
    return {**others, **_secret(cluster, storage.secret_ref.name)}


def _secret(cluster: "Cluster", name: str) -> dict[str, str]:
    place = f"the Secret {name} in the namespace {cluster.namespace}"
    try:
        found = cluster.do(cluster.client.get(SECRETS, cluster.namespace, name))
    except ForbiddenError:
        raise CommandError(
            f"the store's credentials are in {place}, which you may not read. Either {_OWN}; or have somebody grant "
            f"you `get` on that Secret",
            INVALID,
        ) from None
    except NotFoundError:
        raise CommandError(f"{place}, which spec.storage.secretRef names, is not there: make it, or {_OWN}") from None
    data = {key: base64.b64decode(value).decode() for key, value in (found.get("data") or {}).items()}
    if missing := [key for key in _KEYS if not data.get(key)]:
        raise CommandError(f"{place} has no {' and no '.join(missing)}: add them, or {_OWN}")
    return {key: data[key] for key in (*_KEYS, _TOKEN) if key in data}


@contextmanager
def _trusting(cluster: "Cluster", bundle: CABundle | None, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """With the certificates of ``spec.storage.caBundle``, unless the user has named some."""
    if bundle is None or environment.get("AWS_CA_BUNDLE"):
        yield dict(environment)
        return
    reference = bundle.config_map
    found = cluster.do(cluster.client.get(CONFIG_MAPS, cluster.namespace, reference.name))
    text = (found.get("data") or {}).get(reference.key)
    if text is None:
        raise CommandError(f"spec.storage.caBundle: the ConfigMap {reference.name} has no key {reference.key}")
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(text)
        file.flush()
        yield {**environment, "AWS_CA_BUNDLE": file.name}


@contextmanager
def _way(cluster: "Cluster", endpoint: str, instead: str) -> Iterator[str]:
    """The endpoint as this machine can use it; the user's word ``instead`` is taken as it is."""
    url = urlsplit(endpoint)
    host = url.hostname or ""
    if instead or not endpoint or not _only_inside(host):
        yield instead or endpoint
        return
    service, namespace = _service(host, cluster.namespace)
    if url.scheme == "https":
        raise CommandError(
            f"{endpoint} is a name inside the cluster, and its certificate holds under no other: let the name lead "
            f"here (127.0.0.1 {host} in /etc/hosts), forward the service (kubectl -n {namespace} port-forward "
            f"service/{service} 8443:{url.port or 443}), and say --store-endpoint https://{host}:8443",
            INVALID,
        )
    with forwarded(cluster.kubectl, namespace, service, url.port or 80) as port:
        yield url._replace(netloc=f"127.0.0.1:{port}").geturl()


def _only_inside(host: str) -> bool:
    """Whether it is the name of a service that only the cluster's DNS knows."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:  # we are in a pod ourselves
        return False
    if f"{host}.".endswith(".svc.") or ".svc." in host:
        return True
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror:
        return True
    return False


def _service(host: str, namespace: str) -> tuple[str, str]:
    """Service and namespace: ``<service>[.<namespace>[.svc[.<domain>]]]``."""
    parts = host.partition(".svc")[0].split(".") if ".svc" in host else host.split(".")
    if len(parts) == 1:
        return parts[0], namespace
    if len(parts) == 2:
        return parts[0], parts[1]
    raise CommandError(
        f"spec.storage.endpoint: {host} is not known here, and it is no service's name that could be forwarded; "
        "name an address that leads there with --store-endpoint",
        INVALID,
    )
