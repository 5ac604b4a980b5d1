"""The object store: one bucket, through boto3's own requests.

The transfers of boto3 (s3transfer) are not used: they can neither go on with a broken download nor hash what they
send. The faster CRT client must never be: it ignores the endpoint and would take the data to AWS (boto/boto3#4839).
"""

import base64
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict
from urllib.parse import urlsplit

import boto3
from botocore.config import Config

from finetune_api.stage import File
from finetune_api.types import Storage
from finetune_jobs.run.errors import ConfigurationError, InputMissingError
from finetune_jobs.store import download, upload
from finetune_jobs.store.calls import RETRY_SECONDS, Calls, RejectedError, never

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef

PART_BYTES = 16 << 20
"""Raised for objects of more than 10,000 such parts."""
THREADS = 4
"""Parts on their way at the same time, over all files."""
Checksum = Literal["auto", "whenRequired", "whenSupported"]
ProgressCallback = Callable[[str, int, int], None]
"""(name, bytes done, bytes in all); called from several threads, for one name never at the same time."""


class Guard(TypedDict, total=False):
    """See ``Store.guard``."""

    ContentMD5: str


@dataclass(frozen=True)
class ObjectInfo:
    """What a store says of an object without sending it."""

    key: str
    size: int
    etag: str


class Store:
    """One bucket. Keys are whole: ``layout`` has put the prefix in front. Safe to share between threads.

    Every method raises as ``calls.Calls`` does: ConfigurationError when credentials, bucket or endpoint are wrong,
    StorageError when the store stays away.
    """

    def __init__(
        self,
        *,
        bucket: str,
        prefix: str = "",
        endpoint: str = "",
        region: str = "",
        checksum: Checksum = "auto",
        access_key: str = "",
        secret_key: str = "",
        progress: ProgressCallback | None = None,
        retry_seconds: float = RETRY_SECONDS,
        part_bytes: int = PART_BYTES,
    ) -> None:
        """Credentials left out come from the environment, or wherever boto3 finds them; nothing is sent yet."""
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self.progress = progress
        self.part_bytes = part_bytes
        self.validates = validates_checksums(endpoint, checksum)
        """Whether requests carry checksums that the store checks."""
        self.s3 = _client(endpoint, region, self.validates, access_key, secret_key)
        self.endpoint = self.s3.meta.endpoint_url
        self.call = Calls(urlsplit(self.endpoint).netloc, bucket, retry_seconds)
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="store")
        """Moves parts."""
        self.slots = threading.BoundedSemaphore(THREADS + 1)
        """One for each part in memory, whether read or sent: uploads of any size and number take bounded memory."""

    @classmethod
    def of(cls, storage: Storage, progress: ProgressCallback | None = None) -> "Store":
        """The store of a job. FINETUNE_STORE_RETRY_SECONDS sets how long it may stay away."""
        return cls(
            bucket=storage.bucket,
            prefix=storage.prefix,
            endpoint=storage.endpoint,
            region=storage.region,
            checksum=storage.checksum,
            progress=progress,
            retry_seconds=float(os.environ.get("FINETUNE_STORE_RETRY_SECONDS", RETRY_SECONDS)),
        )

    def guard(self, data: bytes) -> Guard:
        """Arguments of a write that let the store find damage on the way.

        Where boto3 adds no checksum of its own, the oldest one that every store knows. (SeaweedFS does not check the
        sha256 in the signature.)
        """
        if self.validates:
            return {}
        return {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}

    def put_file(self, path: Path, key: str, *, name: str = "", abandoned: Callable[[], bool] = never) -> File:
        """Upload a file, in parts if it is large. The hash is of the bytes that were sent."""
        return upload.upload(self, path, key, name=name or path.name, abandoned=abandoned)

    def get_file(self, file: File, dest: Path, cache: Path | None = None) -> None:
        """Bring the object to ``dest``, going on where an earlier try broke off; ``dest`` exists only once verified.

        Raises CorruptObjectError when two downloads do not have the file's sha256, InputMissingError when it is gone,
        StageError when the disk is too small. ``cache`` is a directory of files named by their sha256.
        """
        download.download(self, file, dest, cache=cache)

    def put_bytes(self, key: str, data: bytes, *, abandoned: Callable[[], bool] = never) -> None:
        """Write or overwrite a small object."""
        guard = self.guard(data)
        self.call(
            "PutObject", key, lambda: self.s3.put_object(Bucket=self.bucket, Key=key, Body=data, **guard), abandoned
        )

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a small object unless there is one: of several writers exactly one gets True."""
        tries = 0
        guard = self.guard(data)

        def put() -> None:
            nonlocal tries
            tries += 1
            self.s3.put_object(Bucket=self.bucket, Key=key, Body=data, IfNoneMatch="*", **guard)

        try:
            self.call("PutObject", key, put)
        except RejectedError as error:
            if error.code != "PreconditionFailed":
                raise
            # An earlier try may have succeeded and only its answer been lost: then we stand in our own way.
            return tries > 1 and self.get_bytes(key) == data
        return True

    def get_bytes(self, key: str) -> bytes:
        """A small object; InputMissingError when there is none."""
        return self.call("GetObject", key, lambda: self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def head(self, key: str) -> ObjectInfo:
        """Size and ETag; InputMissingError when there is no such object."""
        answer = self.call("HeadObject", key, lambda: self.s3.head_object(Bucket=self.bucket, Key=key))
        return ObjectInfo(key, answer["ContentLength"], answer["ETag"])

    def exists(self, key: str, size: int) -> bool:
        """Is the object there, with that size?"""
        try:
            return self.head(key).size == size
        except InputMissingError:
            return False

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose keys begin with ``prefix``, in order of keys."""
        after = ""
        more = True
        while more:
            page = self._page(prefix, after)
            found = page.get("Contents", [])
            yield from (ObjectInfo(o["Key"], o["Size"], o["ETag"]) for o in found)
            more = bool(found) and page["IsTruncated"]
            after = found[-1]["Key"] if found else ""

    def _page(self, prefix: str, after: str) -> "ListObjectsV2OutputTypeDef":
        # By key instead of by continuation token: there is nothing in it that could expire.
        return self.call(
            "ListObjectsV2",
            prefix,
            lambda: self.s3.list_objects_v2(Bucket=self.bucket, Prefix=prefix, StartAfter=after),
        )

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; one that is not there is no error. One request each: not every store has DeleteObjects."""

        def remove(key: str) -> None:
            self.call("DeleteObject", key, lambda: self.s3.delete_object(Bucket=self.bucket, Key=key))

        for done in [self.pool.submit(remove, key) for key in keys]:
            done.result()

    def abort_uploads(self, prefix: str, spare: str = "") -> None:
        """Remove the parts of uploads below ``prefix`` that were not finished: whoever began them was killed.

        No listing shows them, yet they take space. Keys that contain ``spare`` are left alone.
        """
        with suppress(RejectedError):  # a store without this request keeps them
            begun = self.call(
                "ListMultipartUploads",
                prefix,
                partial(self.s3.list_multipart_uploads, Bucket=self.bucket, Prefix=prefix),
            )
            for one in begun.get("Uploads", []):
                if not spare or spare not in one["Key"]:
                    self._abort(one["Key"], one["UploadId"])

    def _abort(self, key: str, upload_id: str) -> None:
        abort = partial(self.s3.abort_multipart_upload, Bucket=self.bucket, Key=key, UploadId=upload_id)
        with suppress(RejectedError):  # it ended meanwhile
            self.call("AbortMultipartUpload", key, abort)


def validates_checksums(endpoint: str, checksum: Checksum) -> bool:
    """``auto``: on AWS yes; elsewhere no, since over https many stores refuse the checksums that boto3 adds."""
    if checksum != "auto":
        return checksum == "whenSupported"
    host = urlsplit(endpoint).hostname or ""
    return not endpoint or host == "amazonaws.com" or host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _client(endpoint: str, region: str, validates: bool, access_key: str, secret_key: str) -> "S3Client":
    checksums: Literal["when_supported", "when_required"] = "when_supported" if validates else "when_required"
    loopback = (urlsplit(endpoint).hostname or "") in ("127.0.0.1", "::1", "localhost")
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},  # calls.py retries
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
        # Over http boto3 would hash every body once more, for the signature; that covers `guard`'s checksum anyway.
        s3={"addressing_style": "path" if endpoint else "auto", "payload_signing_enabled": False},
        max_pool_connections=4 * THREADS,
        connect_timeout=10,
        read_timeout=60,
        tcp_keepalive=True,
        proxies={} if loopback else None,
    )
    try:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=endpoint or None,
            region_name=region or None,
            aws_access_key_id=access_key or None,
            aws_secret_access_key=secret_key or None,
            config=config,
        )
    except ValueError as error:
        raise ConfigurationError(f"spec.storage.endpoint: {endpoint!r} is not the URL of a store: {error}") from error
