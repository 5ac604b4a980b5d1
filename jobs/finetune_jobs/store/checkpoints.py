"""Checkpoints of one stage: uploaded beside the training, trusted only by their manifests.

A checkpoint's manifest is written after its files, and removed before them: at no moment is there a half checkpoint
that looks whole. Files of attempts that died are removed with the next checkpoint.
"""

import logging
import math
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.stage import File, Record
from finetune_jobs.run.errors import InputMissingError, StageError, StorageError
from finetune_jobs.store import layout
from finetune_jobs.store.calls import AbandonedError, CorruptObjectError
from finetune_jobs.store.client import Store
from finetune_jobs.store.manifest import present, put_once
from finetune_jobs.store.transfer import download_files, upload_tree

_log = logging.getLogger("finetune.checkpoints")
METRIC = "evalLoss"
"""By which one checkpoint is better than another: lower is better."""


class CheckpointInfo(Record):
    """A checkpoint's manifest."""

    step: int
    metrics: dict[str, float]
    """Taken at that step; a value that is not finite is left out."""
    writer: str
    files: list[File]

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)


def best_of(checkpoints: Iterable[CheckpointInfo]) -> CheckpointInfo | None:
    """The one with the lowest evaluation loss, of equals the earliest; None if none was evaluated."""
    return min((c for c in checkpoints if METRIC in c.metrics), key=lambda c: (c.metrics[METRIC], c.step), default=None)


def retained(checkpoints: Iterable[CheckpointInfo], keep: int) -> set[int]:
    """The steps of the ``keep`` checkpoints that stay: the newest and the best always (two, even if ``keep`` is 1),
    then the next newest.
    """
    newest_first = sorted(checkpoints, key=lambda c: -c.step)
    best = best_of(newest_first)
    stay = {c.step for c in newest_first[:1]} | ({best.step} if best else set())
    for checkpoint in newest_first:
        if len(stay) < keep:
            stay.add(checkpoint.step)
    return stay


@dataclass(frozen=True)
class _Snapshot:
    step: int
    directory: Path
    metrics: Mapping[str, float]
    complete: Callable[[], None] | None


class Checkpoints:
    """Saves, lists, fetches and removes. One upload runs at a time, one more may wait."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        writer: str,
        keep: int,
        on_commit: Callable[[int, str], None] | None = None,
    ) -> None:
        """``prefix`` is the result's (``layout.result_prefix``); ``on_commit(step, uri)`` is called by the upload
        thread.
        """
        self._store, self._prefix, self._writer, self._keep = store, prefix, writer, keep
        self._on_commit = on_commit
        self._damaged: set[int] = set()
        self._saved: set[int] = set()
        self._changed = threading.Condition()
        self._waiting: list[_Snapshot] = []
        self._pending = 0
        self._error: Exception | None = None
        self._closed = False
        self._worker: threading.Thread | None = None

    # Writing

    def save(
        self,
        step: int,
        directory: Path,
        metrics: Mapping[str, float],
        complete: Callable[[], None] | None = None,
    ) -> None:
        """Hand over a directory that nobody writes to any more; its upload begins behind the training.

        Once it is committed the directory is removed, then ``complete`` is called by the upload thread. Waits while
        another snapshot waits, so that a slow store does not fill the disk. Raises what a previous upload failed with.
        A step that is saved twice is replaced; one that an earlier attempt has committed whole stays as it is.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) == 0)
            self._raise_failure()
            if self._closed:
                raise StageError("a checkpoint was saved after the end of the stage")
            self._waiting.append(_Snapshot(step, directory, dict(metrics), complete))
            self._pending += 1
            self._changed.notify_all()
            if self._worker is None:
                # A daemon: a process that must end does not wait for an upload.
                self._worker = threading.Thread(target=self._work, name="checkpoints", daemon=True)
                self._worker.start()

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until all that was saved is committed: False if ``timeout`` seconds were too few. Raises as ``save``."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._pending == 0, timeout)
            self._raise_failure()
            return done

    def close(self) -> None:
        """Give up what is not committed yet."""
        with self._changed:
            self._closed = True
            self._pending -= len(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join(timeout=5)

    def _raise_failure(self) -> None:
        error, self._error = self._error, None
        if isinstance(error, StageError):
            raise error
        if error is not None:
            raise StorageError(f"a checkpoint was not saved: {type(error).__name__}: {error}") from error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                snapshot = self._waiting.pop()
                self._changed.notify_all()
            error: Exception | None = None
            try:
                self._commit(snapshot)
            except AbandonedError:
                _log.info("the upload of checkpoint %d was given up", snapshot.step)
            except Exception as failure:  # whatever it is, the training must hear of it
                _log.error("checkpoint %d was not saved: %s", snapshot.step, failure)
                error = failure
            with self._changed:
                self._error = error
                self._pending -= 1
                self._changed.notify_all()

    def _commit(self, snapshot: _Snapshot) -> None:
        prefix = layout.checkpoint_prefix(self._prefix, snapshot.step)
        if snapshot.step in self._saved:
            # Our own files are about to be overwritten: the manifest that names them must not outlive them.
            self._store.delete([layout.manifest_key(prefix)])
        self._saved.add(snapshot.step)
        files = upload_tree(self._store, snapshot.directory, f"{prefix}/{self._writer}", abandoned=lambda: self._closed)
        metrics = {name: float(value) for name, value in snapshot.metrics.items() if math.isfinite(value)}
        info = CheckpointInfo(step=snapshot.step, metrics=metrics, writer=self._writer, files=files)
        put_once(self._store, layout.manifest_key(prefix), info.model_dump_json(by_alias=True).encode(), self._counts)
        self._damaged.discard(snapshot.step)
        _log.info("checkpoint %d is committed: %d files, %d bytes", snapshot.step, len(files), info.size_bytes)
        shutil.rmtree(snapshot.directory, ignore_errors=True)
        if self._on_commit is not None:
            self._on_commit(snapshot.step, f"s3://{self._store.bucket}/{prefix}/manifest.json")
        if snapshot.complete is not None:
            snapshot.complete()
        try:
            self.prune()
        except StageError as error:  # the next checkpoint tries again
            _log.warning("old checkpoints were not removed: %s", error)

    def _counts(self, data: bytes) -> bool:
        """Of the same step by another attempt: it stays if it is whole."""
        found = _parse(data)
        return found is not None and found.step not in self._damaged and present(self._store, found.files)

    def prune(self) -> None:
        """Remove what ``retained`` does not name, and files of dead attempts, up to the newest whole checkpoint."""
        sizes = self._listing()
        whole = self._whole(sizes)
        if not whole:
            return
        stay = retained(whole, self._keep)
        named = {file.key for c in whole if c.step in stay for file in c.files}
        named |= {self._manifest_key(step) for step in stay}
        newest = max(c.step for c in whole)
        gone = [key for key in sizes if key not in named and (layout.step_of(key) or 0) <= newest]
        manifests = [key for key in gone if key == self._manifest_key(layout.step_of(key) or 0)]
        self._store.delete(manifests)
        self._store.delete(set(gone) - set(manifests))
        self._store.abort_uploads(layout.checkpoints_prefix(self._prefix), spare=f"/{self._writer}/")

    # Reading

    def list(self) -> Sequence[CheckpointInfo]:
        """The committed checkpoints whose objects are all there, oldest first."""
        return self._whole(self._listing())

    def newest(self) -> CheckpointInfo | None:
        """The last checkpoint that is whole."""
        return max(self.list(), key=lambda c: c.step, default=None)

    def best(self) -> CheckpointInfo | None:
        """The checkpoint with the lowest evaluation loss."""
        return best_of(self.list())

    def get(self, step: int) -> CheckpointInfo | None:
        """That step's checkpoint, if it is whole."""
        return next((c for c in self.list() if c.step == step), None)

    def fetch(self, step: int, dest: Path) -> CheckpointInfo:
        """Bring a checkpoint into the directory ``dest``, every file verified.

        InputMissingError if there is none; CorruptObjectError if a file is damaged: the checkpoint then no longer
        counts for this object, and ``newest`` is the one before.
        """
        info = self.get(step)
        if info is None:
            there = ", ".join(str(c.step) for c in self.list()) or "none"
            raise InputMissingError(
                f"no checkpoint of step {step} is whole in s3://{self._store.bucket}/{self._prefix} (there: {there}); "
                "set checkpoint.resumeFrom to one of them or to auto"
            )
        try:
            download_files(self._store, info.files, dest)
        except (CorruptObjectError, InputMissingError):
            self._damaged.add(step)
            raise
        return info

    def restore(self, dest: Path) -> CheckpointInfo | None:
        """Bring the newest checkpoint that proves undamaged into the directory ``dest``; None if there is none."""
        while (info := self.newest()) is not None:
            try:
                return self.fetch(info.step, dest)
            except (CorruptObjectError, InputMissingError) as error:
                _log.warning("checkpoint %d is damaged, trying the one before: %s", info.step, error)
                shutil.rmtree(dest, ignore_errors=True)
        return None

    def _manifest_key(self, step: int) -> str:
        return layout.manifest_key(layout.checkpoint_prefix(self._prefix, step))

    def _listing(self) -> dict[str, int]:
        return {item.key: item.size for item in self._store.list(layout.checkpoints_prefix(self._prefix))}

    def _whole(self, sizes: Mapping[str, int]) -> Sequence[CheckpointInfo]:
        found = []
        for key in sorted(sizes):
            step = layout.step_of(key)
            if step is None or step in self._damaged or key != self._manifest_key(step):
                continue
            try:
                info = _parse(self._store.get_bytes(key))
            except InputMissingError:  # pruned meanwhile
                continue
            if info is not None and all(sizes.get(file.key) == file.size_bytes for file in info.files):
                found.append(info)
            else:
                _log.warning("checkpoint %d is not whole; it is not used", step)
        return found


def _parse(data: bytes) -> CheckpointInfo | None:
    try:
        return CheckpointInfo.model_validate_json(data)
    except ValueError:
        return None
