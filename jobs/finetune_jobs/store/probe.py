"""What must a store keep for us to trust it with a result? Try each promise, say in words what breaks without it."""

import hashlib
import io
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from botocore.exceptions import ClientError

from finetune_jobs.run.errors import ConfigurationError, InputMissingError, StorageError
from finetune_jobs.store.calls import RejectedError, never
from finetune_jobs.store.client import Store
from finetune_jobs.store.parts import Meter
from finetune_jobs.store.upload import multipart

_PART = 5 << 20
"""Smallest part of an upload that S3 allows before the last."""


@dataclass(frozen=True)
class Promise:
    """One thing that we rely on, and whether this store does it."""

    name: str
    kept: bool
    words: str
    """What we found; for a broken promise also what goes wrong because of it."""
    needed: bool
    """Without it the store must not be used."""


def probe(store: Store) -> list[Promise]:
    """Try each promise on objects of a new name, which are removed again.

    Raises as ``Store`` does when the store cannot be reached or refuses the credentials: nothing is known then.
    """
    base = "/".join(part for part in (store.prefix, ".probe", uuid.uuid4().hex) if part)
    checks = [
        (_conditional_put, True, "two attempts could both commit a result and mix their files"),
        (_checksum, False, "damage on the way to the store is found only when the object is read"),
        (_ranged_get, True, "large files could not be downloaded in parts, nor a broken download gone on with"),
        (_listing, True, "a committed result or checkpoint could look incomplete and be made anew"),
        (_multipart, True, "files over 5 GiB could not be stored"),
        (_delete, False, "old checkpoints would stay and fill the store"),
    ]
    try:
        return [_promise(check, store, base, needed, without) for check, needed, without in checks]
    finally:
        with suppress(StorageError):
            store.delete([item.key for item in store.list(f"{base}/")])


def refuse(promises: Iterable[Promise]) -> None:
    """ConfigurationError, with every broken promise in words, if the store breaks one that we need."""
    broken = [f"{promise.name}: {promise.words}" for promise in promises if promise.needed and not promise.kept]
    if broken:
        raise ConfigurationError(
            f"spec.storage.endpoint: this store would lose data: {'; '.join(broken)}; "
            "use another store or a newer release"
        )


class _BrokenError(Exception):
    pass


_Check = Callable[[Store, str], str]


def _promise(check: _Check, store: Store, base: str, needed: bool, without: str) -> Promise:
    name = check.__name__.strip("_").replace("_", " ")
    try:
        return Promise(name, True, check(store, base), needed)
    except (_BrokenError, RejectedError, InputMissingError) as error:
        return Promise(name, False, f"{error}; {without}", needed)


def _expect(condition: bool, words: str) -> None:
    if not condition:
        raise _BrokenError(words)


def _conditional_put(store: Store, base: str) -> str:
    key = f"{base}/once"
    _expect(store.put_if_absent(key, b"first"), "a conditional write of a new object was refused")
    _expect(not store.put_if_absent(key, b"second"), "a second conditional write was accepted")
    _expect(store.get_bytes(key) == b"first", "a conditional write was refused and yet replaced the object")
    return "of two conditional writes the second was refused"


def _checksum(store: Store, base: str) -> str:
    key, body = f"{base}/checksum", b"these bytes"
    try:
        # Not through calls.py, which would send damaged data again.
        if store.validates:
            store.s3.put_object(Bucket=store.bucket, Key=key, Body=body, ChecksumCRC32="AAAAAA==")
        else:
            store.s3.put_object(Bucket=store.bucket, Key=key, Body=body, **store.guard(b"other bytes"))
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        _expect(status == 400, f"a write with a wrong checksum was answered with status {status}")
        return "a write with a wrong checksum was refused"
    raise _BrokenError("a write with a wrong checksum was accepted")


def _ranged_get(store: Store, base: str) -> str:
    key, data = f"{base}/range", bytes(range(200))
    store.put_bytes(key, data)
    _expect(store.get_bytes(key) == data, "an object came back with other bytes")
    status, part = _range(store, key, 50, 149)
    _expect(status == 206, f"a request for a part of an object was answered with status {status} instead of 206")
    _expect(part == data[50:150], "a part of an object came back with other bytes")
    return "a part of an object came back as asked"


def _listing(store: Store, base: str) -> str:
    names = [f"{base}/list/{name}" for name in ("a", "b/c", "b/d")]
    for name in names:
        store.put_bytes(name, b"12345")
    seen = [(item.key, item.size) for item in store.list(f"{base}/list/")]
    _expect(
        seen == [(name, 5) for name in names], f"of 3 objects just written, a listing shows {len(seen)} as they are"
    )
    return "objects just written are listed"


def _multipart(store: Store, base: str) -> str:
    key, data = f"{base}/parts", bytes(_PART) + b"the end"
    multipart(store, io.BytesIO(data), key, _PART, hashlib.sha256(), Meter(None, key, len(data)), never)
    _expect(store.exists(key, len(data)), "an upload in two parts has another size than was sent")
    _, seam = _range(store, key, _PART - 3, _PART + 2)
    _expect(seam == b"\0\0\0the", "an upload in two parts came back with other bytes")
    return "an upload in two parts came back whole"


def _delete(store: Store, base: str) -> str:
    key = f"{base}/gone"
    store.put_bytes(key, b"x")
    store.delete([key])
    _expect(not store.exists(key, 1), "an object was still there after it was deleted")
    return "a deleted object is gone"


def _range(store: Store, key: str, first: int, last: int) -> tuple[int, bytes]:
    def get() -> tuple[int, bytes]:
        answer = store.s3.get_object(Bucket=store.bucket, Key=key, Range=f"bytes={first}-{last}")
        return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Body"].read()

    return store.call("GetObject", key, get)
