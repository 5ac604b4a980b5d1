import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.faultproxy import FaultProxy, Kind
from tests.store.conftest import make_file

from finetune_api.stage import File, JobRef, Manifest
from finetune_jobs.run.errors import InputMissingError, StageError
from finetune_jobs.store import layout
from finetune_jobs.store.client import Store
from finetune_jobs.store.manifest import commit, content_digest, find_committed, load, verify
from finetune_jobs.store.transfer import download_files, upload_tree

JOB = JobRef(namespace="team", name="bot", uid="1")
DIGEST = hashlib.sha256(b"inputs").hexdigest()


def made(store: Store, tmp_path: Path, *, writer: str = "w1", job: JobRef = JOB, digest: str = DIGEST) -> Manifest:
    """A result of two files, uploaded and not committed."""
    source = tmp_path / writer
    make_file(source / "adapter" / "weights", 1000)
    make_file(source / "log.json", 20)
    prefix = layout.result_prefix(store.prefix, job, "sft", digest)
    files = upload_tree(store, source, f"{prefix}/artifacts/{writer}")
    return Manifest(
        job=job,
        stage="sft",
        attempt=1,
        digest=digest,
        inputs={},
        outputs={"adapter": content_digest(files, "adapter")},
        files=files,
        artifacts=[],
        figures={"evalLoss": 0.5},
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:01:00+00:00",
    )


def result_key(store: Store, job: JobRef = JOB) -> str:
    """Of the manifest that ``made`` is committed as."""
    return layout.manifest_key(layout.result_prefix(store.prefix, job, "sft", DIGEST))


def unfinished(store: Store) -> list[str]:
    """The keys of this test's uploads that have begun and not ended."""
    listed = store.s3.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)
    return [upload["Key"] for upload in listed.get("Uploads", [])]


@pytest.mark.parametrize(("prefix", "start"), [("", "team/bot"), ("a/b", "a/b/team/bot")], ids=["no prefix", "prefix"])
def test_layout(prefix: str, start: str) -> None:
    """Keys are as the design says, without a slash at the front."""
    result = layout.result_prefix(prefix, JOB, "sft", "0123456789abcdef")
    assert layout.manifest_key(result) == f"{start}/sft/0123456789ab/manifest.json"
    assert layout.latest_key(prefix, JOB, "sft") == f"{start}/sft/latest.json"
    assert layout.reuse_key(prefix, "team", "0123") == f"{start.removesuffix('/bot')}/.reuse/0123.json"
    checkpoint = layout.checkpoint_prefix(result, 200)
    assert checkpoint == f"{start}/sft/0123456789ab/checkpoints/step-00000200"
    assert layout.step_of(f"{checkpoint}/w/file") == 200
    assert layout.step_of(layout.manifest_key(result)) is None


def test_commit_and_find(store: Store, tmp_path: Path) -> None:
    """A committed result is found by its inputs, with every file; before the commit there is none."""
    manifest = made(store, tmp_path)
    assert find_committed(store, JOB, "sft", DIGEST) is None
    with pytest.raises(InputMissingError):
        load(store, result_key(store))
    assert commit(store, manifest) == manifest
    assert find_committed(store, JOB, "sft", DIGEST) == load(store, result_key(store)) == manifest
    download_files(store, manifest.files, tmp_path / "back")
    for file in manifest.files:
        content = (tmp_path / "back" / file.path).read_bytes()
        assert content == (tmp_path / "w1" / file.path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file.sha256
    latest = store.get_bytes(layout.latest_key(store.prefix, JOB, "sft"))
    assert result_key(store).encode() in latest
    assert find_committed(store, JOB, "sft", "f" * 64) is None
    assert find_committed(store, JOB, "merge", DIGEST) == manifest  # reuse asks for the inputs only


def test_manifest_is_written_last_and_once(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """Nothing is written after the manifest, and the manifest only if there is none."""
    commit(flaky, made(flaky, tmp_path))
    writes = [seen.path for seen in proxy.requests("PUT")]
    assert writes[-1].endswith(result_key(flaky))
    assert sum(path.endswith("manifest.json") for path in writes) == 1


def test_uploads_of_attempts_that_were_killed_are_removed(store: Store, tmp_path: Path) -> None:
    """Parts that an attempt left when it was killed show in no listing and take space: the commit removes them, and
    no others."""
    result = result_key(store).removesuffix("manifest.json")
    begun = [f"{result}artifacts/killed/model", f"{result}checkpoints/step-00000002/w1/model", f"{store.prefix}/other"]
    for key in begun:
        upload = store.s3.create_multipart_upload(Bucket=store.bucket, Key=key)["UploadId"]
        store.s3.upload_part(Bucket=store.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"1")
    commit(store, made(store, tmp_path))
    assert sorted(unfinished(store)) == sorted(begun[1:])


def test_reuse_within_the_namespace_only(store: Store, tmp_path: Path) -> None:
    """Another job of the namespace finds the result, one of another namespace does not."""
    manifest = commit(store, made(store, tmp_path))
    sibling = JobRef(namespace="team", name="other", uid="2")
    stranger = JobRef(namespace="rivals", name="bot", uid="3")
    assert find_committed(store, sibling, "train", DIGEST) == manifest
    assert find_committed(store, stranger, "sft", DIGEST) is None


@pytest.mark.parametrize("damage", ["gone", "another size"])
def test_result_that_lost_an_object_is_not_found(store: Store, tmp_path: Path, damage: str) -> None:
    """A manifest counts only while all its objects are there with their sizes; committing again replaces it."""
    manifest = commit(store, made(store, tmp_path))
    victim = manifest.files[0].key
    store.delete([victim])
    if damage == "another size":
        store.put_bytes(victim, b"short")
    assert not verify(store, manifest)
    assert find_committed(store, JOB, "sft", DIGEST) is None
    again = made(store, tmp_path, writer="w2")
    assert commit(store, again) == again
    assert find_committed(store, JOB, "sft", DIGEST) == again


@pytest.mark.parametrize("content", [b"", b"not json", b"{}", b'{"manifest": 5}'])
def test_unreadable_manifests_and_pointers(store: Store, tmp_path: Path, content: bytes) -> None:
    """Rubbish in place of a manifest or pointer is no result, no crash, and is replaced by the next commit."""
    store.put_bytes(result_key(store), content)
    store.put_bytes(layout.reuse_key(store.prefix, "team", DIGEST), content)
    assert find_committed(store, JOB, "sft", DIGEST) is None
    with pytest.raises(InputMissingError, match="is no manifest"):
        load(store, result_key(store))
    manifest = made(store, tmp_path)
    assert commit(store, manifest) == manifest
    assert find_committed(store, JOB, "sft", DIGEST) == manifest


def test_two_attempts_race(store: Store, tmp_path: Path) -> None:
    """Eight attempts that commit at once agree on one manifest; it is whole, and the losers' files are gone."""
    manifests = [made(store, tmp_path, writer=f"w{number}") for number in range(8)]
    barrier = threading.Barrier(8)

    def finish(number: int) -> Manifest:
        barrier.wait()
        return commit(store, manifests[number])

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(finish, range(8)))
    assert all(result == results[0] for result in results)
    assert results[0] == find_committed(store, JOB, "sft", DIGEST)
    left = {item.key for item in store.list(layout.result_prefix(store.prefix, JOB, "sft", DIGEST))}
    assert left == {result_key(store), *(file.key for file in results[0].files)}


def test_commit_whose_answer_is_lost(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """The attempt whose manifest was written, but not acknowledged, is the winner and keeps its files."""
    manifest = made(flaky, tmp_path)
    proxy.add(Kind.LOSE_ANSWER, method="PUT", path="manifest.json")
    assert commit(flaky, manifest) == manifest
    assert verify(flaky, manifest)


names = st.text("abc/.é ", min_size=1, max_size=8)
files = st.dictionaries(names, st.binary(max_size=4), min_size=1, max_size=6).map(
    lambda tree: [
        File(path=f"out/{name}", key="k", size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in tree.items()
    ]
)


@given(files, st.randoms())
def test_content_digest_is_of_names_and_contents(tree: list[File], shuffle: object) -> None:
    """The order of files, their keys and the folder's own name do not matter; each relative name and content does."""
    digest = content_digest(tree, "out")
    shuffled = list(tree)
    shuffle.shuffle(shuffled)  # type: ignore[attr-defined]
    moved = [f.model_copy(update={"path": f"moved/to{f.path.removeprefix('out')}", "key": "x"}) for f in shuffled]
    other = File(path="beside", key="k", size_bytes=0, sha256="0" * 64)
    assert content_digest([*moved, other], "moved/to") == digest
    assert content_digest([*tree[1:], tree[0].model_copy(update={"sha256": "1" * 64})], "out") != digest
    assert content_digest([*tree[1:], tree[0].model_copy(update={"path": f"{tree[0].path}~"})], "out") != digest


def test_content_digest_formula() -> None:
    """The digest can be computed with sha256sum: sorted lines of relative path, NUL, sha256."""
    listed = [File(path=f"data/{n}", key="k", size_bytes=1, sha256=n * 64) for n in "ba"]
    lines = b"a\0" + b"a" * 64 + b"\n" + b"b\0" + b"b" * 64 + b"\n"
    assert content_digest(listed, "data") == hashlib.sha256(lines).hexdigest()
    assert content_digest(listed, "data/a") == hashlib.sha256(b"\0" + b"a" * 64 + b"\n").hexdigest()
    with pytest.raises(StageError, match="no file at 'dat'"):
        content_digest(listed, "dat")
