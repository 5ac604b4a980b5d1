"""Certificates and kubeconfigs of a cluster, by openssl: one authority, keys on P-256 because they are made at once."""

import base64
import json
import subprocess
from pathlib import Path

CONFIG = """\
[req]
distinguished_name = subject
[subject]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[leaf]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


def make_authority(directory: Path) -> None:
    """``ca.crt`` and ``ca.key``, and ``service-accounts.key``, which signs service accounts' tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "openssl.cnf").write_text(CONFIG)
    _certificate(directory, "ca", "/CN=finetunejob-tests", ["-extensions", "authority"])
    _openssl(directory, "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "service-accounts.key")


def make_certificate(directory: Path, name: str, subject: str, alternatives: str = "") -> None:
    """``<name>.crt`` and ``<name>.key``, signed by the authority there.

    Args:
        directory: where ``make_authority`` was.
        name: of the files.
        subject: such as ``/O=system:masters/CN=admin``: O are the user's groups, CN is its name.
        alternatives: a server's names, such as ``DNS:localhost,IP:127.0.0.1``.
    """
    options = ["-CA", "ca.crt", "-CAkey", "ca.key", "-extensions", "leaf"]
    if alternatives:
        options += ["-addext", f"subjectAltName={alternatives}"]
    _certificate(directory, name, subject, options)


def write_kubeconfig(path: Path, server: str, pki: Path, name: str, namespace: str = "default") -> None:
    """A kubeconfig that needs no other file: the apiserver's URL, the authority, the certificate ``name``."""
    cluster = {"server": server, "certificate-authority-data": _base64(pki / "ca.crt")}
    user = {
        "client-certificate-data": _base64(pki / f"{name}.crt"),
        "client-key-data": _base64(pki / f"{name}.key"),
    }
    context = {"cluster": "tests", "user": name, "namespace": namespace}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "tests", "cluster": cluster}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": "tests", "context": context}],
        "current-context": "tests",
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, indent=1))  # JSON is YAML


def _certificate(directory: Path, name: str, subject: str, options: list[str]) -> None:
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]
    made = ["-subj", subject, "-days", "365", "-out", f"{name}.crt"]
    _openssl(directory, "req", "-x509", "-config", "openssl.cnf", *key, *made, *options)


def _openssl(directory: Path, *arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"openssl {' '.join(arguments)}: {done.stderr.strip()}")


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
