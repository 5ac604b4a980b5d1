from collections.abc import Callable

import pytest
from tests.faultproxy import FaultProxy, Kind

from finetune_jobs.run.errors import ConfigurationError, StorageError
from finetune_jobs.store.client import Store
from finetune_jobs.store.probe import Promise, probe, refuse

NAMES = ["conditional put", "checksum", "ranged get", "listing", "multipart", "delete"]


@pytest.mark.parametrize("checksum", ["whenRequired", "whenSupported"])
def test_good_store(connect: Callable[..., Store], checksum: str) -> None:
    """SeaweedFS keeps every promise, is not refused, and has nothing of the probe afterwards."""
    store = connect(checksum=checksum)
    promises = probe(store)
    assert [(promise.name, promise.kept) for promise in promises] == [(name, True) for name in NAMES]
    refuse(promises)
    assert list(store.list(store.prefix)) == []
    assert "Uploads" not in store.s3.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)


@pytest.mark.parametrize(
    ("kind", "method", "path", "broken", "words"),
    [
        (
            Kind.IGNORE_CONDITIONS,
            "PUT",
            "/once",
            ["conditional put"],
            "second conditional write was accepted; two attempts",
        ),
        (Kind.IGNORE_RANGE, "GET", "/range", ["ranged get"], "status 200 instead of 206; large files"),
        (Kind.WRONG_DOWN, "GET", "/range", ["ranged get"], "other bytes"),
        (Kind.WRONG_DOWN, "GET", "/parts", ["multipart"], "other bytes"),
    ],
    ids=["conditions", "ranges", "bytes", "seam"],
)
def test_broken_promises_are_named(
    flaky: Store, proxy: FaultProxy, kind: Kind, method: str, path: str, broken: list[str], words: str
) -> None:
    """A store that breaks a promise is refused for good, in words that say what would be lost."""
    proxy.add(kind, method=method, path=path, times=100)
    promises = probe(flaky)
    assert [promise.name for promise in promises if not promise.kept] == broken
    with pytest.raises(ConfigurationError, match=rf"spec\.storage\.endpoint.*{words}") as caught:
        refuse(promises)
    assert caught.value.exit_code == 64


def test_promises_that_we_can_do_without() -> None:
    """A broken promise that costs only space or time does not refuse the store."""
    refuse([Promise("delete", False, "an object was still there", needed=False)])


def test_store_that_is_away_or_closed_to_us(connect: Callable[..., Store], proxy: FaultProxy) -> None:
    """An outage or wrong credentials are not mistaken for broken promises."""
    with pytest.raises(ConfigurationError, match=r"spec\.storage\.secretRef"):
        probe(connect(secret_key="wrong"))
    proxy.add(Kind.UNAVAILABLE, times=10**6)
    with pytest.raises(StorageError, match="503"):
        probe(connect(endpoint=proxy.endpoint))
