"""The operator's own TLS certificates, made in memory: no Secret, no cert-manager, no key on any disk.

A certificate is its own authority and signs nothing else. Clients trust exactly the certificates that the replicas have
published (``replicas.py``), so a new one is published for a while before it is shown.
"""

import ipaddress
import os
import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFE = timedelta(days=7)
RENEW_AFTER = LIFE * 2 / 3
SPREAD = timedelta(hours=1)
"""How long a new certificate is published before it is shown: a kubelet takes minutes to refresh what is mounted."""
_SKEW = timedelta(hours=1)
"""It is valid from before it was made: other machines' clocks may be late."""


@dataclass(frozen=True)
class Certificate:
    """A certificate with its key."""

    pem: str
    made: datetime
    key: ec.EllipticCurvePrivateKey = field(repr=False)


def make_certificate(names: Sequence[str], address: str, now: datetime) -> Certificate:
    """An ECDSA P-256 certificate for a server that is reached under these DNS names and this IP address."""
    key = ec.generate_private_key(ec.SECP256R1())
    # Unlike any other's: OpenSSL looks issuers up by their name.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"finetune-operator {secrets.token_hex(8)}")])
    subject_key = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    alternatives = [*(x509.DNSName(n) for n in names), x509.IPAddress(ipaddress.ip_address(address))]
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=False,  # a stolen key must not make certificates for other names
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(subject_key, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject_key), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Certificate(made.public_bytes(serialization.Encoding.PEM).decode(), now, key)


class OwnCertificate:
    """This replica's: the one that ``tls`` shows, and while it is being changed its successor."""

    def __init__(self, names: Sequence[str], address: str, now: datetime) -> None:
        self._names = names
        self._address = address
        self._shown = make_certificate(names, address, now)
        self._next: Certificate | None = None
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        """For the server; it shows the new certificate to whoever connects after the change."""
        self.tls.minimum_version = ssl.TLSVersion.TLSv1_2
        _load(self.tls, self._shown)

    @property
    def published(self) -> list[str]:
        """What clients must trust, as PEM."""
        return [certificate.pem for certificate in (self._shown, self._next) if certificate is not None]

    def renew(self, now: datetime) -> None:
        """Do what is due. Cheap: call it often."""
        if self._next is not None and now >= self._next.made + SPREAD:
            self._shown, self._next = self._next, None
            _load(self.tls, self._shown)
        elif self._next is None and now >= self._shown.made + RENEW_AFTER:
            self._next = make_certificate(self._names, self._address, now)


def valid_until(pem: str) -> datetime:
    """When a certificate ends. Raises ValueError if that is none."""
    return x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc


def trusting(bundle: str) -> ssl.SSLContext:
    """A client that accepts these certificates and no others. Raises ssl.SSLError if there is none."""
    return ssl.create_default_context(cadata=bundle)


def _load(context: ssl.SSLContext, certificate: Certificate) -> None:
    key = certificate.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # OpenSSL's wrapper reads files only: this one lies in memory and is gone when it is closed.
    memory = os.memfd_create("certificate")
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(certificate.pem.encode() + key)
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
