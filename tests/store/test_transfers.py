import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.faultproxy import FaultProxy, Kind
from tests.store.conftest import BUCKET, PART, make_file

from finetune_api.stage import File
from finetune_jobs.run.errors import ConfigurationError, InputMissingError, StageError, StorageError
from finetune_jobs.store.calls import AbandonedError, CorruptObjectError
from finetune_jobs.store.client import Store, validates_checksums
from finetune_jobs.store.parts import part_size
from finetune_jobs.store.transfer import download_files, upload_tree

SIZE = 3 * PART - 1000
"""Three parts."""


def sha256(path: Path) -> str:
    """Of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def key(store: Store, name: str = "object") -> str:
    """One of this test's keys."""
    return f"{store.prefix}/{name}"


def put(store: Store, tmp_path: Path, size: int = SIZE, name: str = "object") -> File:
    """Upload ``tmp_path/source/<name>``, made for it."""
    return store.put_file(make_file(tmp_path / "source" / name, size), key(store, name))


@pytest.mark.parametrize("checksum", ["whenRequired", "whenSupported"])
@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 3 * PART], ids=["empty", "byte", "part", "part+1", "3 parts"])
def test_round_trip(connect: Callable[..., Store], tmp_path: Path, size: int, checksum: str) -> None:
    """A file of any size comes back byte for byte, with its sha256, with and without checksum headers."""
    store = connect(checksum=checksum)
    source = make_file(tmp_path / "source", size)
    sent = store.put_file(source, key(store))
    assert sent == File(path="source", key=key(store), size_bytes=size, sha256=sha256(source))
    store.get_file(sent, tmp_path / "deep" / "dest")
    assert (tmp_path / "deep" / "dest").read_bytes() == source.read_bytes()
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["dest"]


def test_large_files_go_in_parts_both_ways(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """A file of three parts takes three part requests up and three ranges down, each byte sent once."""
    sent = put(flaky, tmp_path)
    assert sum(seen.up for seen in proxy.requests("PUT", "partNumber=")) == SIZE
    assert proxy.count("PUT", "partNumber=") == 3
    flaky.get_file(sent, tmp_path / "dest")
    ranges = [seen.range for seen in proxy.requests("GET")]
    assert sorted(ranges) == sorted(f"bytes={n * PART}-{min((n + 1) * PART, SIZE) - 1}" for n in range(3))
    assert sum(seen.down for seen in proxy.requests("GET")) == SIZE


@given(size=st.integers(0, 5 << 40), least=st.integers(5 << 20, 64 << 20))
def test_part_size(size: int, least: int) -> None:
    """No upload takes more than 10,000 parts, and none smaller parts than asked for."""
    step = part_size(size, least)
    assert step >= least
    assert -(-size // step) <= 10_000
    assert step == least or (step % (1 << 20) == 0 and -(-size // (step - (1 << 20))) > 10_000)


def test_folder(store: Store, tmp_path: Path) -> None:
    """A folder comes back with every path, size and sha256, links followed, empty files included."""
    source = tmp_path / "source"
    for number, name in enumerate(["a.bin", "b/c.bin", "b/d e+ü.json", "b/empty"]):
        make_file(source / name, [6_000_000, 1000, 10, 0][number], seed=number)
    (source / "link").symlink_to(source / "a.bin")
    files = upload_tree(store, source, key(store, "tree"))
    assert [file.path for file in files] == ["a.bin", "b/c.bin", "b/d e+ü.json", "b/empty", "link"]
    assert all(file.key == f"{key(store, 'tree')}/{file.path}" for file in files)
    assert all(file.sha256 == sha256(source / file.path) for file in files)
    download_files(store, files, tmp_path / "back")
    assert {file.path: sha256(tmp_path / "back" / file.path) for file in files} == {f.path: f.sha256 for f in files}


def test_downloaded_files_are_not_sent_again(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """A second download into the same folder moves nothing; a file that was written to since comes again."""
    files = [put(flaky, tmp_path, 1000, name) for name in ("one", "two")]
    download_files(flaky, files, tmp_path / "back")
    proxy.forget()
    download_files(flaky, files, tmp_path / "back")
    assert proxy.seen == []
    with (tmp_path / "back" / "two").open("r+b") as changed:
        changed.write(b"?")
    download_files(flaky, files, tmp_path / "back")
    assert [seen.path.endswith("/two") for seen in proxy.seen] == [True]
    assert sha256(tmp_path / "back" / "two") == files[1].sha256


def test_progress(connect: Callable[..., Store], tmp_path: Path) -> None:
    """The callback counts each file's bytes up to its size, both ways."""
    told: list[tuple[str, int, int]] = []
    store = connect(progress=lambda *words: told.append(words))
    source = tmp_path / "source"
    make_file(source / "large", SIZE)
    make_file(source / "small", 10)
    files = upload_tree(store, source, key(store))
    up = [done for name, done, total in told if name == "large" and total == SIZE]
    assert up == sorted(up)
    assert len(up) == 3
    assert up[-1] == SIZE
    assert told.count(("small", 10, 10)) == 1
    told.clear()
    download_files(store, files, tmp_path / "back")
    assert [done for name, done, _ in told if name == "large"][-1] == SIZE
    assert told.count(("small", 10, 10)) == 1


@pytest.mark.parametrize(
    ("kind", "path", "amount", "checksum"),
    [
        (Kind.CUT_UP, "partNumber=2", 1_500_000, "whenRequired"),
        (Kind.CUT_UP, "partNumber=2", 1_500_000, "whenSupported"),
        (Kind.WRONG_UP, "partNumber=3", 0, "whenRequired"),
        (Kind.WRONG_UP, "partNumber=3", 0, "whenSupported"),
        (Kind.UNAVAILABLE, "", 0, "whenRequired"),
        (Kind.SLOW, "partNumber=1", 0.002, "whenRequired"),
        (Kind.LOSE_ANSWER, "partNumber=1", 0, "whenRequired"),
    ],
    ids=["cut", "cut, checksums", "damaged", "damaged, checksums", "503", "slow", "answer lost"],
)
def test_upload_through_faults(
    connect: Callable[..., Store],
    proxy: FaultProxy,
    tmp_path: Path,
    kind: Kind,
    path: str,
    amount: float,
    checksum: str,
) -> None:
    """A fault on the way up costs a request more; the object in the store is the file."""
    store = connect(endpoint=proxy.endpoint, checksum=checksum, retry_seconds=10)
    fault = proxy.add(kind, method="PUT", path=path, times=2, amount=amount)
    sent = put(store, tmp_path)
    assert fault.times == (1 if kind is Kind.SLOW else 0)
    stored = proxy.client.get_object(Bucket=BUCKET, Key=sent.key)["Body"].read()
    assert hashlib.sha256(stored).hexdigest() == sent.sha256 == sha256(tmp_path / "source" / "object")


@pytest.mark.parametrize(
    ("kind", "amount"),
    [(Kind.CUT_DOWN, 1_500_000), (Kind.CUT_DOWN, 0), (Kind.UNAVAILABLE, 0), (Kind.SLOW, 0.002), (Kind.WRONG_DOWN, 0)],
    ids=["cut", "cut at once", "503", "slow", "damaged"],
)
@pytest.mark.parametrize("size", [1_600_000, SIZE], ids=["small", "parts"])
def test_download_through_faults(
    connect: Callable[..., Store], proxy: FaultProxy, tmp_path: Path, kind: Kind, amount: float, size: int
) -> None:
    """A fault on the way down costs requests; the file that appears is the object."""
    store = connect(endpoint=proxy.endpoint, retry_seconds=10)
    sent = put(store, tmp_path, size)
    fault = proxy.add(kind, method="GET", times=1, amount=amount)
    store.get_file(sent, tmp_path / "dest")
    assert fault.times == 0
    assert sha256(tmp_path / "dest") == sent.sha256 == sha256(tmp_path / "source" / "object")


def test_complete_whose_answer_is_lost(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """An upload that the store completed, but could not say so, is complete."""
    proxy.add(Kind.LOSE_ANSWER, method="POST", path="uploadId=")
    sent = put(flaky, tmp_path)
    assert proxy.requests("POST", "uploadId=")[0].status == 0
    flaky.get_file(sent, tmp_path / "dest")


def test_failed_upload_leaves_nothing(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """When a part cannot be sent the error names operation, object, host and mend, and no parts stay behind."""
    proxy.add(Kind.UNAVAILABLE, path="partNumber=2", times=1000)
    with pytest.raises(StorageError) as caught:
        put(flaky, tmp_path)
    for word in ("UploadPart", f"s3://{BUCKET}/{key(flaky)}", proxy.endpoint[7:], "503 SlowDown", "check that"):
        assert word in str(caught.value)
    uploads = proxy.client.list_multipart_uploads(Bucket=BUCKET, Prefix=flaky.prefix)
    assert "Uploads" not in uploads
    assert not flaky.exists(key(flaky), SIZE)


def test_uploads_can_be_given_up(store: Store, tmp_path: Path) -> None:
    """An upload that is told to stop stops, and leaves no object."""
    with pytest.raises(AbandonedError):
        store.put_file(make_file(tmp_path / "file", SIZE), key(store), abandoned=lambda: True)
    assert list(store.list(store.prefix)) == []


def test_broken_download_goes_on(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """A second download asks only for the ranges that the first did not finish; until then there is no file."""
    sent = put(flaky, tmp_path)
    dest = tmp_path / "dest"
    proxy.forget()

    def refuse_more(name: str, done: int, total: int) -> None:
        if done >= 2 * PART:
            proxy.add(Kind.UNAVAILABLE, method="GET", times=1000)

    flaky.progress = refuse_more
    with ThreadPoolExecutor(1) as one:  # one range at a time, so that some are left
        pool, flaky.pool = flaky.pool, one
        with pytest.raises(StorageError, match="GetObject"):
            flaky.get_file(sent, dest)
        flaky.pool = pool
    assert not dest.exists()
    before = sum(seen.down for seen in proxy.requests("GET") if seen.status == 206)
    flaky.progress = None
    proxy.forget()
    flaky.get_file(sent, dest)
    after = sum(seen.down for seen in proxy.requests("GET"))
    assert before == 2 * PART
    assert after == SIZE - 2 * PART
    assert sha256(dest) == sent.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dest", "source"]


def test_damaged_rest_of_a_broken_download(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """Ranges left by an earlier try are hashed too: if they were damaged on the disk, the file is fetched anew."""
    sent = put(flaky, tmp_path)
    etag = flaky.head(sent.key).etag
    plan = {"key": sent.key, "etag": etag, "size": SIZE, "range": PART}
    (tmp_path / "dest.part").write_bytes(bytes(SIZE))
    (tmp_path / "dest.part.done").write_text(f"{json.dumps(plan)}\n0\n1")
    proxy.forget()
    flaky.get_file(sent, tmp_path / "dest")
    assert sha256(tmp_path / "dest") == sent.sha256
    # The 1 has no end of line, so the range 1 was not trusted even then.
    assert proxy.count("GET") == 2 + 3


def test_broken_download_of_a_changed_object(store: Store, tmp_path: Path) -> None:
    """What is left of a download of another version is thrown away, never mixed with the new one."""
    old = put(store, tmp_path)
    plan = {"key": old.key, "etag": store.head(old.key).etag, "size": SIZE, "range": PART}
    (tmp_path / "dest.part").write_bytes((tmp_path / "source" / "object").read_bytes())
    (tmp_path / "dest.part.done").write_text(f"{json.dumps(plan)}\n0\n1\n2\n")
    new = store.put_file(make_file(tmp_path / "new", SIZE, seed=1), old.key)
    store.get_file(new, tmp_path / "dest")
    assert sha256(tmp_path / "dest") == new.sha256 != old.sha256


def test_object_replaced_during_the_download(connect: Callable[..., Store], store: Store, tmp_path: Path) -> None:
    """An object that changes between two ranges is an error that says so, and no file."""
    sent = put(store, tmp_path)
    other = make_file(tmp_path / "other", SIZE, seed=1)
    replaced = threading.Event()

    def replace(name: str, done: int, total: int) -> None:
        if not replaced.is_set():
            replaced.set()
            connect().put_file(other, sent.key)

    reader = connect(progress=replace)
    with ThreadPoolExecutor(1) as reader.pool, pytest.raises(CorruptObjectError, match="not what was committed"):
        reader.get_file(sent, tmp_path / "dest")
    assert not list(tmp_path.glob("dest*"))


@pytest.mark.parametrize("size", [1000, SIZE], ids=["small", "parts"])
def test_damaged_object(store: Store, tmp_path: Path, size: int) -> None:
    """An object with the right size and other bytes is refused by its sha256; nothing is left at the destination."""
    sent = put(store, tmp_path, size)
    damaged = bytearray((tmp_path / "source" / "object").read_bytes())
    damaged[size // 2] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    store.put_file(tmp_path / "damaged", sent.key)
    with pytest.raises(CorruptObjectError, match=f"{sent.key} is not what was committed"):
        store.get_file(sent, tmp_path / "dest")
    assert not list(tmp_path.glob("dest*"))


def test_missing_and_overwritten_objects(store: Store, tmp_path: Path) -> None:
    """A missing object is a missing input; one of another size is named as overwritten."""
    sent = put(store, tmp_path)
    store.put_file(make_file(tmp_path / "shorter", 2 * PART), sent.key)
    with pytest.raises(CorruptObjectError, match=f"has {2 * PART} bytes, {SIZE} were committed"):
        store.get_file(sent, tmp_path / "dest")
    store.delete([sent.key])
    with pytest.raises(InputMissingError, match=sent.key):
        store.get_file(sent, tmp_path / "dest")
    with pytest.raises(InputMissingError, match="run the job again"):
        store.get_bytes(sent.key)
    assert not store.exists(sent.key, SIZE)


@pytest.mark.parametrize("path", ["../out", "/etc/out", "a/../../out"])
def test_paths_cannot_lead_out(store: Store, tmp_path: Path, path: str) -> None:
    """A manifest cannot make us write outside the directory that it is downloaded to."""
    sent = put(store, tmp_path, 10).model_copy(update={"path": path})
    with pytest.raises(CorruptObjectError, match="impossible"):
        download_files(store, [sent], tmp_path / "back")


def test_store_without_ranges(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """A store that answers 200 to a ranged GET is refused with the field to change, not retried."""
    sent = put(flaky, tmp_path)
    proxy.add(Kind.IGNORE_RANGE, method="GET", times=1000)
    with pytest.raises(ConfigurationError, match=r"spec\.storage\.endpoint"):
        flaky.get_file(sent, tmp_path / "dest")
    assert proxy.count("GET") <= 4


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"secret_key": "wrong"}, r"spec\.storage\.secretRef.*SignatureDoesNotMatch.*AWS_ACCESS_KEY_ID"),
        ({"access_key": "wrong"}, r"spec\.storage\.secretRef.*InvalidAccessKeyId.*AWS_ACCESS_KEY_ID"),
        ({"bucket": "no-such-bucket"}, r"spec\.storage\.bucket.*'no-such-bucket'"),
    ],
    ids=["secret", "key", "bucket"],
)
def test_wrong_settings_fail_at_once(
    connect: Callable[..., Store], proxy: FaultProxy, tmp_path: Path, changed: dict[str, Any], field: str
) -> None:
    """Credentials and bucket that are wrong are named with their field after one request, up and down."""
    store = connect(endpoint=proxy.endpoint, retry_seconds=60, **changed)
    for request in (
        lambda: store.put_bytes("key", b""),
        lambda: store.put_if_absent("key", b""),
        lambda: store.get_bytes("key"),
        lambda: list(store.list("")),
        lambda: store.put_file(make_file(tmp_path / "file", SIZE), "key"),
    ):
        proxy.forget()
        with pytest.raises(ConfigurationError, match=field):
            request()
        assert len(proxy.seen) == 1


def test_no_credentials(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any credentials the message says which variables to set."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(ConfigurationError, match=r"spec\.storage\.secretRef.*AWS_ACCESS_KEY_ID"):
        Store(bucket=BUCKET, endpoint=store.endpoint).get_bytes("key")


def test_nobody_listens(connect: Callable[..., Store]) -> None:
    """A store that is not there is a StorageError that names its host and the field, after the patience is over."""
    store = connect(endpoint="http://127.0.0.1:9", retry_seconds=0.3)
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9.*spec\.storage\.endpoint") as caught:
        store.get_bytes("key")
    assert caught.value.exit_code == 69


@pytest.mark.parametrize("endpoint", ["http://", "https://a b", "ftp//x"])
def test_endpoint_that_is_no_url(connect: Callable[..., Store], endpoint: str) -> None:
    """A malformed endpoint is named before anything is sent."""
    with pytest.raises(ConfigurationError, match=r"spec\.storage\.endpoint"):
        connect(endpoint=endpoint).get_bytes("key")


def test_endpoint_that_is_no_store(connect: Callable[..., Store]) -> None:
    """A web page at the endpoint is not taken for a store."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<html><body>Not here<br></body></html>"
            self.send_response(404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        store = connect(endpoint=f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ConfigurationError, match=r"spec\.storage\.endpoint.*does not speak S3"):
            list(store.list(""))
        server.shutdown()


def test_retries_leave_the_global_generator_alone(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """A fault in the upload thread does not change what the training draws from Python's random generator."""
    random.seed(1)
    before = random.getstate()
    proxy.add(Kind.UNAVAILABLE, times=3)
    sent = put(flaky, tmp_path)
    flaky.get_file(sent, tmp_path / "dest")
    assert [seen.status for seen in proxy.seen].count(503) == 3
    assert sha256(tmp_path / "dest") == sent.sha256
    random_after = random.getstate()
    assert random_after == before


def test_full_disk_is_seen_before_the_download(
    flaky: Store, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without room for all files nothing is fetched; the message has the directory and both figures."""
    files = [put(flaky, tmp_path, SIZE, name) for name in ("one", "two")]
    proxy.forget()
    usage = type("Usage", (), {"free": SIZE + 5})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(
        StageError, match=f"{2 * SIZE:,} bytes more are needed in {tmp_path}/back, {SIZE + 5:,} are free"
    ):
        download_files(flaky, files, tmp_path / "back")
    assert proxy.seen == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("size", [900_000, SIZE], ids=["small", "parts"])
def test_disk_fills_up_during_the_download(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A disk that another process fills meanwhile gives the same words, and no file, whole or part."""
    import subprocess

    sent = put(store, tmp_path, size)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("mount is not allowed here")
    try:
        usage = type("Usage", (), {"free": 1 << 40})
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(StageError, match=f"the disk is full: .* bytes more are needed in {small}"):
            store.get_file(sent, small / "dest")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_cache(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """A file in the cache is not sent again, and takes no second place on the disk."""
    sent, cache = put(flaky, tmp_path), tmp_path / "cache"
    flaky.get_file(sent, tmp_path / "first", cache)
    proxy.forget()
    flaky.get_file(sent, tmp_path / "second", cache)
    assert proxy.seen == []
    assert sha256(tmp_path / "second") == sent.sha256
    assert (tmp_path / "second").stat().st_nlink == 3
    assert [path.name for path in cache.iterdir()] == [sent.sha256]


@pytest.mark.parametrize("how", ["in the cache", "through a link", "truncated"])
def test_changed_cache_entries_are_not_used(flaky: Store, proxy: FaultProxy, tmp_path: Path, how: str) -> None:
    """An entry that was written to after it was verified, even through another link, is fetched again."""
    sent, cache = put(flaky, tmp_path, 1000), tmp_path / "cache"
    flaky.get_file(sent, tmp_path / "first", cache)
    victim = tmp_path / "first" if how == "through a link" else cache / sent.sha256
    if how == "truncated":
        os.truncate(victim, 10)
    else:
        with victim.open("r+b") as file:
            file.write(b"????")
    proxy.forget()
    flaky.get_file(sent, tmp_path / "second", cache)
    assert proxy.count("GET") == 1
    assert sha256(tmp_path / "second") == sent.sha256 == sha256(cache / sent.sha256)


def test_cache_on_another_file_system(
    flaky: Store, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where files cannot be linked they are copied, and a copy that does not have the sha256 is not used."""

    def refuse(*arguments: object) -> None:
        raise OSError("no links across file systems")

    monkeypatch.setattr("os.link", refuse)
    sent, cache = put(flaky, tmp_path, 1000), tmp_path / "cache"
    flaky.get_file(sent, tmp_path / "first", cache)
    proxy.forget()
    flaky.get_file(sent, tmp_path / "second", cache)
    assert proxy.seen == []
    entry = cache / sent.sha256
    assert entry.stat().st_nlink == 1
    times = entry.stat()
    entry.write_bytes(bytes(1000))
    os.utime(entry, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a failing disk would do it
    flaky.get_file(sent, tmp_path / "third", cache)
    assert sha256(tmp_path / "third") == sent.sha256


def test_put_if_absent_has_one_winner(store: Store) -> None:
    """Of sixteen writers at once exactly one is told that it wrote, and its bytes are there."""
    barrier = threading.Barrier(16)

    def write(number: int) -> bool:
        barrier.wait()
        return store.put_if_absent(key(store), b"%d" % number)

    with ThreadPoolExecutor(16) as writers:
        won = list(writers.map(write, range(16)))
    assert sum(won) == 1
    assert store.get_bytes(key(store)) == b"%d" % won.index(True)


def test_put_if_absent_whose_answer_is_lost(flaky: Store, proxy: FaultProxy) -> None:
    """The writer whose success was not reported does not take itself for another."""
    proxy.add(Kind.LOSE_ANSWER, method="PUT")
    assert flaky.put_if_absent(key(flaky), b"mine")
    assert [seen.status for seen in proxy.requests("PUT")] == [0, 412]
    assert not flaky.put_if_absent(key(flaky), b"mine")


def test_long_listings(connect: Callable[..., Store]) -> None:
    """A listing of several pages has every key once, in order; deleting a key that is not there is no error."""
    store = connect()
    short_pages: Any = lambda params, **_: {**params, "MaxKeys": 3}  # noqa: E731 - boto3's types want no result
    store.s3.meta.events.register("provide-client-params.s3.ListObjectsV2", short_pages)
    keys = [f"{store.prefix}/{name}" for name in ("a", "a/b", "b c", "d+e", "f", "g", "ü")]
    for name in keys:
        store.put_bytes(name, b"12")
    assert [(item.key, item.size) for item in store.list(f"{store.prefix}/")] == [(name, 2) for name in keys]
    store.delete([*keys, f"{store.prefix}/never-there"])
    assert list(store.list(store.prefix)) == []


@pytest.mark.parametrize(
    ("endpoint", "checksum", "expected"),
    [
        ("", "auto", True),
        ("https://s3.eu-central-1.amazonaws.com", "auto", True),
        ("https://s3.cn-north-1.amazonaws.com.cn", "auto", True),
        ("https://minio.example.org", "auto", False),
        ("https://amazonaws.com.example.org", "auto", False),
        ("https://minio.example.org", "whenSupported", True),
        ("", "whenRequired", False),
    ],
)
def test_checksum_modes(endpoint: str, checksum: Any, expected: bool) -> None:
    """Checksum headers are for AWS, unless the spec says otherwise."""
    assert validates_checksums(endpoint, checksum) is expected


def test_patience_is_bounded(flaky: Store, proxy: FaultProxy) -> None:
    """A store that stays unavailable is asked several times, with pauses, and not for ever."""
    proxy.add(Kind.UNAVAILABLE, times=10**6)
    start = time.monotonic()
    with pytest.raises(StorageError, match="503"):
        flaky.get_bytes(key(flaky))
    assert 3 <= len(proxy.seen) <= 10
    assert time.monotonic() - start < 30
