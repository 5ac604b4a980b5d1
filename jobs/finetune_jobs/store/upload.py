"""A file to the store: read once, hashed as it is sent, in parts of several threads."""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, BinaryIO

from botocore.exceptions import BotoCoreError, ClientError

from finetune_api.stage import File
from finetune_jobs.run.errors import StageError
from finetune_jobs.store.calls import RejectedError
from finetune_jobs.store.parts import Meter, part_size, results

if TYPE_CHECKING:
    from _hashlib import HASH

    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

    from finetune_jobs.store.client import Store


def upload(store: "Store", path: Path, key: str, *, name: str, abandoned: Callable[[], bool]) -> File:
    """See ``Store.put_file``. A file that changes meanwhile is an error; a failed upload leaves no parts behind."""
    size = path.stat().st_size
    step = part_size(size, store.part_bytes)
    sha256 = hashlib.sha256()
    meter = Meter(store.progress, name, size)
    with path.open("rb") as stream:
        if size <= step:
            with store.slots:
                data = stream.read()
                sha256.update(data)
                store.put_bytes(key, data, abandoned=abandoned)
            meter.add(len(data))
        else:
            multipart(store, stream, key, step, sha256, meter, abandoned)
    if meter.done != size:
        raise StageError(f"{path} changed from {size} to {meter.done} bytes while it was uploaded")
    return File(path=path.name, key=key, size_bytes=size, sha256=sha256.hexdigest())


def multipart(
    store: "Store",
    stream: BinaryIO,
    key: str,
    step: int,
    sha256: "HASH",
    meter: Meter,
    abandoned: Callable[[], bool],
) -> None:
    """Upload ``stream`` to its end in parts of ``step`` bytes, at least two of them."""
    bucket = store.bucket
    failed = Event()
    upload_id = store.call(
        "CreateMultipartUpload",
        key,
        lambda: (
            store.s3.create_multipart_upload(Bucket=bucket, Key=key, ChecksumAlgorithm="CRC32")
            if store.validates
            else store.s3.create_multipart_upload(Bucket=bucket, Key=key)
        )["UploadId"],
        abandoned,
    )

    def send(number: int, data: bytes) -> "CompletedPartTypeDef":
        guard = store.guard(data)
        try:
            answer = store.call(
                "UploadPart",
                key,
                lambda: store.s3.upload_part(
                    Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=data, **guard
                ),
                lambda: failed.is_set() or abandoned(),
            )
        except BaseException:
            failed.set()
            raise
        meter.add(len(data))
        part: CompletedPartTypeDef = {"PartNumber": number, "ETag": answer["ETag"]}
        if "ChecksumCRC32" in answer:
            part["ChecksumCRC32"] = answer["ChecksumCRC32"]
        return part

    parts: list[Future[CompletedPartTypeDef]] = []
    try:
        while not failed.is_set() and (data := _next(store, stream, step)):
            sha256.update(data)
            parts.append(store.pool.submit(send, len(parts) + 1, data))
            parts[-1].add_done_callback(lambda _: store.slots.release())
        _complete(store, key, upload_id, results(parts), meter.done, abandoned)
    except BaseException:
        failed.set()
        for part in parts:
            part.cancel()
        wait(parts)
        with suppress(ClientError, BotoCoreError):
            store.s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
        raise


def _next(store: "Store", stream: BinaryIO, step: int) -> bytes:
    """The next part, and with it a slot; at the end of the stream neither."""
    store.slots.acquire()
    data = b""
    try:
        data = stream.read(step)
    finally:
        if not data:
            store.slots.release()
    return data


def _complete(
    store: "Store",
    key: str,
    upload_id: str,
    parts: "list[CompletedPartTypeDef]",
    size: int,
    abandoned: Callable[[], bool],
) -> None:
    try:
        store.call(
            "CompleteMultipartUpload",
            key,
            lambda: store.s3.complete_multipart_upload(
                Bucket=store.bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}
            ),
            abandoned,
        )
    except RejectedError as error:
        # An earlier try may have succeeded and only its answer been lost: then the upload is gone and the object there.
        if error.code != "NoSuchUpload" or not store.exists(key, size):
            raise
