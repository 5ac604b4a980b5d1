"""A real SeaweedFS for the session, and stores in it that no other test sees.

Elsewhere: ``from tests.store.conftest import store, store_server  # noqa: F401``.
"""

import copy
import os
import random
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.faultproxy import FaultProxy

from finetune_cli.embedded import EmbeddedStore
from finetune_jobs.store.client import Store

BUCKET = "finetune-tests"
PART = 5 << 20
"""The smallest that S3 allows."""


@pytest.fixture(scope="session")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """A server with the bucket ``BUCKET``; the environment names no other store meanwhile."""
    saved = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("AWS_")}
    try:
        with EmbeddedStore(tmp_path_factory.mktemp("finetune-home"), BUCKET) as server:
            yield server
    finally:
        os.environ.update(saved)


@pytest.fixture
def prefix() -> str:
    """Before every key of this test."""
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def connect(store_server: EmbeddedStore, prefix: str) -> Callable[..., Store]:
    """Makes stores: same bucket, the test's prefix, patience of a second; any argument can be replaced."""

    def make(**changed: object) -> Store:
        return _client(store_server, **{"prefix": prefix, **changed})

    return make


@pytest.fixture(scope="session")
def direct(store_server: EmbeddedStore) -> Store:
    """Straight to the server, for ``store``: clients are slow to make."""
    return _client(store_server)


@pytest.fixture
def store(direct: Store, prefix: str) -> Store:
    """Straight to the server, below the test's prefix."""
    own = copy.copy(direct)
    own.prefix = prefix
    return own


@pytest.fixture
def proxy(store: Store) -> Iterator[FaultProxy]:
    """Between ``flaky`` and the server; passes everything on until told otherwise."""
    with FaultProxy(store.endpoint, store.s3).running() as proxy:
        yield proxy


@pytest.fixture
def flaky(proxy: FaultProxy, connect: Callable[..., Store]) -> Store:
    """The same keys as ``store``, through ``proxy``."""
    return connect(endpoint=proxy.endpoint)


def make_file(path: Path, size: int, seed: int = 0) -> Path:
    """A file of that many bytes, no two parts of it alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


def _client(server: EmbeddedStore, **changed: object) -> Store:
    arguments: dict[str, object] = {
        "bucket": BUCKET,
        "endpoint": server.endpoint,
        "access_key": server.access_key,
        "secret_key": server.secret_key,
        "retry_seconds": 1.0,
        "part_bytes": PART,
    }
    return Store(**{**arguments, **changed})  # type: ignore[arg-type]
