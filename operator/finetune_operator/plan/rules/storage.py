"""Rules on the object store."""

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from finetune_api.types import FineTuneJobSpec
from finetune_api.validate import FieldError


def endpoint(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """The store's URL has a host, a port that is a number, and nothing that a client would stumble over."""
    url = spec.storage.endpoint
    if url and (words := _not_a_server(url)):
        yield FieldError("spec.storage.endpoint", f'{words}, got "{url}": write it like http://host:8333')


def _not_a_server(url: str) -> str:
    if re.search(r"\s", url):
        return "must not hold white space"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "must have a host, and a port from 1 to 65535 if any"
    if not parts.hostname or port == 0:
        return "must have a host, and a port from 1 to 65535 if any"
    if parts.username is not None:
        return "must not hold credentials: they belong in spec.storage.secretRef"
    return "must end after host and port, or a path" if parts.query or parts.fragment else ""


def bucket(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """What S3 refuses of names that have the right letters."""
    name = spec.storage.bucket
    if ".." in name or re.fullmatch(r"[0-9]+(\.[0-9]+){3}", name):
        words = "must not hold two dots in a row, nor look like an IP address"
        yield FieldError("spec.storage.bucket", f'{words}, got "{name}"')


def prefix(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A prefix that means the same to every client: some resolve ``..``, some fold ``//``."""
    text = spec.storage.prefix
    parts = text.strip("/").split("/")
    if text and (not text.isprintable() or any(part in ("", ".", "..") for part in parts)):
        words = "must be names with one / between, none of them . or .."
        yield FieldError("spec.storage.prefix", f'{words}, got "{text.encode("unicode_escape").decode()}"')
