import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.faultproxy import FaultProxy, Kind
from tests.store.conftest import PART, make_file

from finetune_jobs.run.errors import ConfigurationError, InputMissingError, StorageError
from finetune_jobs.store import layout
from finetune_jobs.store.calls import CorruptObjectError
from finetune_jobs.store.checkpoints import CheckpointInfo, Checkpoints, best_of, retained
from finetune_jobs.store.client import Store


@contextmanager
def of(
    store: Store, *, writer: str = "w1", keep: int = 3, told: list[tuple[int, str]] | None = None
) -> Iterator[Checkpoints]:
    """The checkpoints of a result below the test's prefix."""
    on_commit = None if told is None else lambda step, uri: told.append((step, uri))
    checkpoints = Checkpoints(store, f"{store.prefix}/result", writer, keep, on_commit)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def save(checkpoints: Checkpoints, tmp_path: Path, step: int, loss: float = 1.0, size: int = 1000) -> None:
    """Save a checkpoint of two files."""
    directory = tmp_path / f"snapshot-{step}-{time.monotonic_ns()}"
    make_file(directory / "adapter.safetensors", size, seed=step)
    make_file(directory / "state" / "rng.json", 10, seed=step)
    checkpoints.save(step, directory, {"evalLoss": loss})


def steps(checkpoints: Checkpoints) -> list[int]:
    """Of the checkpoints that are whole."""
    return [info.step for info in checkpoints.list()]


def content(directory: Path) -> dict[str, str]:
    """sha256 by path."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_save_and_fetch(store: Store, tmp_path: Path) -> None:
    """What was saved comes back, every byte; the snapshot goes only once it is committed, and the callers are told."""
    told: list[tuple[int, str]] = []
    state: list[bool] = []
    directory = tmp_path / "snapshot"
    make_file(directory / "adapter.safetensors", PART + 10)
    make_file(directory / "state" / "rng.json", 10)
    before = content(directory)
    with of(store, told=told) as checkpoints:
        checkpoints.save(
            200,
            directory,
            {"evalLoss": 0.5, "loss": float("nan")},
            complete=lambda: state.append(directory.exists()),
        )
        assert checkpoints.drain(60)
        assert state == [False]
        assert told == [(200, f"s3://{store.bucket}/{store.prefix}/result/checkpoints/step-00000200/manifest.json")]
        info = checkpoints.newest()
        assert info is not None
        assert (info.step, info.metrics, info.writer) == (200, {"evalLoss": 0.5}, "w1")
        assert info.size_bytes == PART + 20
        assert checkpoints.restore(tmp_path / "back") == info
        assert content(tmp_path / "back") == before == {file.path: file.sha256 for file in info.files}


def test_manifest_comes_last(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """A checkpoint's manifest is the last thing written for it, and exists once."""
    with of(flaky) as checkpoints:
        save(checkpoints, tmp_path, 1)
        assert checkpoints.drain(60)
    paths = [seen.path for seen in proxy.requests("PUT")]
    assert [path.endswith("manifest.json") for path in paths] == [False, False, True]


def test_nothing_saved_yet(store: Store, tmp_path: Path) -> None:
    """Without checkpoints there is no newest, no best, nothing to restore, and draining is done at once."""
    with of(store) as checkpoints:
        assert checkpoints.newest() is None
        assert checkpoints.best() is None
        assert checkpoints.restore(tmp_path / "back") is None
        assert checkpoints.drain(0)
        with pytest.raises(InputMissingError, match=r"no checkpoint of step 5.*there: none.*resumeFrom"):
            checkpoints.fetch(5, tmp_path / "back")


@pytest.mark.parametrize("damage", ["object gone", "object cut", "manifest rubbish", "no manifest"])
def test_half_a_checkpoint_is_not_newest(store: Store, tmp_path: Path, damage: str) -> None:
    """When the newest checkpoint is not whole, the one before is the newest; saving that step again mends it."""
    with of(store) as checkpoints:
        save(checkpoints, tmp_path, 10)
        save(checkpoints, tmp_path, 20)
        checkpoints.drain(60)
        info = checkpoints.get(20)
        assert info is not None
        manifest = layout.manifest_key(layout.checkpoint_prefix(f"{store.prefix}/result", 20))
        match damage:
            case "object gone":
                store.delete([info.files[0].key])
            case "object cut":
                store.put_bytes(info.files[0].key, b"cut")
            case "manifest rubbish":
                store.put_bytes(manifest, b"{")
            case _:
                store.delete([manifest])
        assert steps(checkpoints) == [10]
        restored = checkpoints.restore(tmp_path / "back")
        assert restored is not None
        assert restored.step == 10
    with of(store, writer="w2") as checkpoints:
        save(checkpoints, tmp_path, 20, size=2000)
        checkpoints.drain(60)
        assert steps(checkpoints) == [10, 20]
        newest = checkpoints.newest()
        assert newest is not None
        assert newest.writer == "w2"
        named = {file.key for info in checkpoints.list() for file in info.files}
        objects = {item.key for item in store.list(store.prefix) if not item.key.endswith("manifest.json")}
        assert objects == named  # the dead attempt's files are gone


def test_damaged_bytes_are_found_on_the_way_back(store: Store, tmp_path: Path) -> None:
    """A file with the right size and other bytes makes restore take the checkpoint before, and leaves no mixture."""
    with of(store) as checkpoints:
        save(checkpoints, tmp_path, 10)
        save(checkpoints, tmp_path, 20)
        checkpoints.drain(60)
        victim = next(file for info in checkpoints.list() if info.step == 20 for file in info.files)
        store.put_bytes(victim.key, bytes(victim.size_bytes))
        with pytest.raises(CorruptObjectError, match=r"step-00000020.*not what was committed"):
            checkpoints.fetch(20, tmp_path / "explicit")
    with of(store, writer="w2") as checkpoints:
        assert steps(checkpoints) == [10, 20]  # sizes cannot tell
        info = checkpoints.restore(tmp_path / "back")
        assert info is not None
        assert info.step == 10
        assert content(tmp_path / "back") == {file.path: file.sha256 for file in info.files}
        assert steps(checkpoints) == [10]
        save(checkpoints, tmp_path, 20)
        checkpoints.drain(60)
    with of(store, writer="w3") as checkpoints:
        info = checkpoints.restore(tmp_path / "again")
        assert info is not None
        assert (info.step, info.writer) == (20, "w2")


def test_retention(store: Store, tmp_path: Path) -> None:
    """Of six checkpoints the newest two and the best stay; no object of the others does."""
    with of(store, keep=3) as checkpoints:
        for step, loss in zip(range(10, 70, 10), [3.0, 1.0, 2.0, 2.5, 2.6, 2.7], strict=True):
            save(checkpoints, tmp_path, step, loss)
            checkpoints.drain(60)
        assert steps(checkpoints) == [20, 50, 60]
        best = checkpoints.best()
        assert best is not None
        assert best.step == 20
    left = {layout.step_of(item.key) for item in store.list(store.prefix)}
    assert left == {20, 50, 60}


def test_uploads_of_attempts_that_were_killed_are_removed(store: Store, tmp_path: Path) -> None:
    """With the next checkpoint the parts that a killed attempt left are gone; our own uploads are left alone."""
    for writer in ("killed", "w1"):
        key = f"{store.prefix}/result/checkpoints/step-00000001/{writer}/optimizer.pt"
        upload = store.s3.create_multipart_upload(Bucket=store.bucket, Key=key)["UploadId"]
        store.s3.upload_part(Bucket=store.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"1")
    with of(store) as checkpoints:
        save(checkpoints, tmp_path, 2)
        checkpoints.drain(60)
        checkpoints.prune()
    listed = store.s3.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)
    assert [upload["Key"].split("/")[-2] for upload in listed["Uploads"]] == ["w1"]


def test_manifests_go_before_their_files(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """Whoever is killed while removing a checkpoint leaves files without a manifest, never the reverse."""
    with of(flaky, keep=1) as checkpoints:
        for step in (1, 2):
            save(checkpoints, tmp_path, step, loss=1 / step)
            checkpoints.drain(60)
    gone = [seen.path for seen in proxy.requests("DELETE")]
    assert [path.endswith("manifest.json") for path in gone] == [True, False, False]


checkpoint_lists = st.lists(
    st.tuples(st.integers(1, 50), st.none() | st.sampled_from([0.5, 1.0, 1.5, 2.0])),
    max_size=12,
    unique_by=lambda c: c[0],
).map(
    lambda pairs: [
        CheckpointInfo(step=step, metrics={} if loss is None else {"evalLoss": loss}, writer="w", files=[])
        for step, loss in pairs
    ]
)


@given(checkpoint_lists, st.integers(1, 5))
def test_retained(checkpoints: list[CheckpointInfo], keep: int) -> None:
    """Never the newest nor the best goes; ``keep`` stay, or two when those differ; the others are the next newest."""
    stay = retained(checkpoints, keep)
    all_steps = sorted((c.step for c in checkpoints), reverse=True)
    best = best_of(checkpoints)
    must = {*all_steps[:1], *([best.step] if best else [])}
    assert must <= stay <= set(all_steps)
    assert len(stay) == min(len(all_steps), max(keep, len(must)))
    others = [step for step in all_steps if step not in must]
    assert stay - must == set(others[: len(stay - must)])
    evaluated = [c for c in checkpoints if c.metrics]
    assert (best is None) == (not evaluated)
    if best:
        assert all((best.metrics["evalLoss"], best.step) <= (c.metrics["evalLoss"], c.step) for c in evaluated)


def test_failed_upload_is_raised_by_the_next_save(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """The training hears of a failed upload at its next save; the save after that works."""
    fault = proxy.add(Kind.UNAVAILABLE, path="step-00000001", times=10**6)
    with of(flaky) as checkpoints:
        save(checkpoints, tmp_path, 1)
        with pytest.raises(StorageError, match=r"step-00000001.*503") as caught:
            assert checkpoints.drain(60)
        assert caught.value.exit_code == 69
        fault.times = 0
        save(checkpoints, tmp_path, 2)
        assert checkpoints.drain(60)
        assert steps(checkpoints) == [2]
        assert len(list(tmp_path.glob("snapshot-1-*"))) == 1  # not committed, so not removed
        fault.times = 10**6
        save(checkpoints, tmp_path, 1)
        with checkpoints._changed:
            checkpoints._changed.wait_for(lambda: checkpoints._pending == 0, 60)
        with pytest.raises(StorageError, match="step-00000001"):
            save(checkpoints, tmp_path, 3)


def test_failed_upload_before_a_good_one_is_only_logged(
    flaky: Store, proxy: FaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When a later checkpoint was committed, an earlier one that failed is not worth stopping for."""
    proxy.add(Kind.UNAVAILABLE, path="step-00000001", times=10**6)
    with of(flaky) as checkpoints, caplog.at_level(logging.ERROR, "finetune.checkpoints"):
        save(checkpoints, tmp_path, 1)
        save(checkpoints, tmp_path, 2)
        assert checkpoints.drain(60)
        assert steps(checkpoints) == [2]
    assert ["checkpoint 1 was not saved" in record.message for record in caplog.records] == [True]


def test_wrong_credentials_stay_final(connect: Callable[..., Store], tmp_path: Path) -> None:
    """An upload that can never succeed keeps its exit code: 64, not a retry."""
    with of(connect(secret_key="wrong")) as checkpoints:
        save(checkpoints, tmp_path, 1)
        with pytest.raises(ConfigurationError, match=r"spec\.storage\.secretRef"):
            checkpoints.drain(60)


def test_drain_gives_up_in_time(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """A drain that is too short says so; the upload goes on and a longer drain succeeds."""
    slow = proxy.add(Kind.SLOW, method="PUT", path="adapter", amount=0.05)
    with of(flaky) as checkpoints:
        save(checkpoints, tmp_path, 1, size=2_000_000)
        assert not checkpoints.drain(0.2)
        assert checkpoints.newest() is None
        assert checkpoints.drain(60)
        assert steps(checkpoints) == [1]
        assert slow.times == 0


def test_slow_store_holds_back_the_third_save(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """One snapshot is uploaded, one waits, the next save waits for room: the disk holds no more than three."""
    gate = proxy.add(Kind.UNAVAILABLE, path="step-00000001", times=10**6)
    saved = threading.Event()
    with of(flaky) as checkpoints:
        save(checkpoints, tmp_path, 1)
        save(checkpoints, tmp_path, 2)

        def third() -> None:
            save(checkpoints, tmp_path, 3)
            saved.set()

        thread = threading.Thread(target=third)
        thread.start()
        assert not saved.wait(0.3)
        gate.times = 0
        assert saved.wait(60)
        thread.join()
        assert checkpoints.drain(60)
        assert steps(checkpoints) == [1, 2, 3]


def test_close_gives_up_what_is_not_committed(flaky: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """The end of a stage does not wait for a store that is away; nothing half is trusted later."""
    proxy.add(Kind.UNAVAILABLE, times=10**6)
    patient = Checkpoints(flaky, f"{flaky.prefix}/result", "w1", 3)
    save(patient, tmp_path, 1)
    save(patient, tmp_path, 2)
    patient.close()
    worker = patient._worker
    assert worker is not None
    assert not worker.is_alive()
    proxy.forget()
    assert steps(patient) == []


def test_two_attempts_save_the_same_step(connect: Callable[..., Store], store: Store, tmp_path: Path) -> None:
    """The first commit of a step stays; the other attempt uses it and its own files are removed."""
    with of(store) as first, of(connect(), writer="w2") as second:
        save(first, tmp_path, 10)
        first.drain(60)
        save(second, tmp_path, 10)
        assert second.drain(60)
        info = second.newest()
        assert info is not None
        assert info.writer == "w1"
    assert not any("/w2/" in item.key for item in store.list(store.prefix))


def test_saving_a_step_again_replaces_it(store: Store, tmp_path: Path) -> None:
    """The second save of a step by the same attempt counts, also when sizes are equal; its bytes verify."""
    with of(store) as checkpoints:
        for seed, loss in ((1, 2.0), (2, 1.0)):
            directory = tmp_path / f"snapshot-{seed}"
            make_file(directory / "weights", 1000, seed)
            expected = content(directory)
            checkpoints.save(10, directory, {"evalLoss": loss})
            assert checkpoints.drain(60)
        info = checkpoints.restore(tmp_path / "back")
        assert info is not None
        assert info.metrics == {"evalLoss": 1.0}
        assert content(tmp_path / "back") == expected
