"""Where the apiserver is and who we are: read by the official client, read again before it is too old.

The official client reads in-cluster accounts and kubeconfigs (tokens, token files, client certificates, exec plugins,
OIDC). It does not notice when a kubeconfig's token file or a certificate is replaced, logs a failed exec plugin instead
of raising, and leaves a token's newline in the header; that is made good here.
"""

import asyncio
import hashlib
import logging
import os
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config import incluster_config, kube_config

from finetune_operator.kube.errors import CredentialsError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """What a request needs, as of now."""

    server: str
    """Scheme, host and port, and a path before ``/api`` where the cluster is behind a proxy that wants one."""
    authorization: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None
    """None: plain http (``kubectl proxy``, tests)."""
    server_name: str | None = None
    """The name in the server's certificate, where it is not that of the address."""
    proxy: str | None = None
    namespace: str = "default"
    """Of the context, or of the pod we run in."""


class Credentials:
    """Access to one cluster, kept fresh.

    Looked for in this order: ``kubeconfig``, $KUBECONFIG, the service account of the pod we run in, ~/.kube/config.
    """

    def __init__(self, kubeconfig: str | Path | None, context: str | None, refresh: float) -> None:
        self._kubeconfig = str(kubeconfig) if kubeconfig else os.environ.get("KUBECONFIG", "")
        if not self._kubeconfig and incluster_config.SERVICE_HOST_ENV_NAME not in os.environ:
            self._kubeconfig = str(Path.home() / ".kube" / "config")
        self._context = context
        self._refresh = refresh
        self._access: Access | None = None
        self._read_at = 0.0
        self._loader: Any = None
        self._tls: tuple[str, ssl.SSLContext] | None = None
        self._lock = asyncio.Lock()

    async def current(self, rejected: Access | None = None) -> Access:
        """Access that is young enough; read anew in any case if the current one is ``rejected``.

        Raises CredentialsError if there is none. Once there was one, a failure to read it again is only logged.
        """
        async with self._lock:
            old = self._access
            again = old is not None and rejected is old
            if old is not None and not again and time.monotonic() < self._read_at + self._refresh:
                return old
            try:
                access = await self._read(again)
            except Exception as error:  # the library raises whatever its parsers do
                if old is None:
                    raise CredentialsError(self._words(error)) from error
                _log.warning("cannot read the credentials again, going on with the old ones: %s", self._words(error))
                access = old
            self._read_at = time.monotonic()
            self._access = access
            return access

    def _words(self, error: Exception) -> str:
        where = f"kubeconfig {self._kubeconfig}" if self._kubeconfig else "the pod's service account"
        return f"{where}: {str(error) or type(error).__name__}; name a kubeconfig, or set KUBECONFIG"

    async def _read(self, rejected: bool) -> Access:
        configuration = Configuration(host="")
        if not self._kubeconfig:
            incluster_config.load_incluster_config(configuration, try_refresh_token=False)
            namespace = Path(incluster_config.SERVICE_TOKEN_FILENAME).with_name("namespace")
            return self._made(configuration, namespace.read_text().strip() if namespace.exists() else "default")
        if self._access is not None and not rejected and _runs_plugin(self._loader):
            # An exec plugin may ask a person for a password: never before its credentials end. The loader itself
            # knows when that is, if the plugin said so; if not, the server will tell.
            if not hasattr(self._loader, "exec_plugin_expiry"):
                return self._access
            await self._loader.load_and_set(configuration)
        else:
            self._loader = await kube_config.load_kube_config(
                self._kubeconfig, self._context, configuration, persist_config=False
            )
        if not configuration.host:
            raise CredentialsError("no cluster.server in the current context")
        if _runs_plugin(self._loader) and not (configuration.api_key or configuration.cert_file):
            raise CredentialsError("the exec plugin gave no credentials; its words are in the log")
        context = self._loader._current_context["context"]
        return self._made(configuration, context.safe_get("namespace") or "default")

    def _made(self, configuration: Any, namespace: str) -> Access:
        https = configuration.host.startswith("https")
        return Access(
            server=configuration.host.rstrip("/"),
            authorization=configuration.api_key.get("BearerToken", "").strip(),
            tls=self._tls_of(configuration) if https else None,
            server_name=configuration.tls_server_name,
            proxy=configuration.proxy,
            namespace=namespace,
        )

    def _tls_of(self, configuration: Any) -> ssl.SSLContext:
        """A new context only if a file's content changed: connections are shared by context."""
        files = (configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file)
        digest = hashlib.sha256(repr(configuration.verify_ssl).encode())
        for file in files:
            digest.update(hashlib.sha256(Path(file).read_bytes() if file else b"").digest())
        if self._tls is None or self._tls[0] != digest.hexdigest():
            context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
            # Python 3.13 refuses certificates that kubectl accepts: many clusters' own CA lacks an extension.
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
            if configuration.cert_file:
                context.load_cert_chain(configuration.cert_file, configuration.key_file)
            if not configuration.verify_ssl:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            self._tls = (digest.hexdigest(), context)
        return self._tls[1]


def _runs_plugin(loader: Any) -> bool:
    # As the library's own refresh_token does; there is no public word for it.
    return loader is not None and loader._user is not None and "exec" in loader._user
