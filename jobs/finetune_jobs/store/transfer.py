"""Folders to the store and back. The files of a folder go in parallel, their parts share the store's few threads."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from finetune_api.stage import File
from finetune_jobs.store import cache as cached
from finetune_jobs.store.calls import never
from finetune_jobs.store.client import Store
from finetune_jobs.store.download import check_names, require_space

T = TypeVar("T")
R = TypeVar("R")
_FILES = 4
"""On their way at the same time."""


def upload_tree(store: Store, directory: Path, key_prefix: str, *, abandoned: Callable[[], bool] = never) -> list[File]:
    """Upload every file below ``directory`` to ``<key_prefix>/<path>``; in order of paths. Links are followed."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())

    def put(path: Path) -> File:
        relative = path.relative_to(directory).as_posix()
        sent = store.put_file(path, f"{key_prefix}/{relative}", name=relative, abandoned=abandoned)
        return sent.model_copy(update={"path": relative})

    return _each(put, paths)


def download_files(store: Store, files: Iterable[File], into: Path, cache: Path | None = None) -> None:
    """Bring each file to ``into/<path>``, verified. Those that are there already, unchanged, are not sent again.

    Raises as ``Store.get_file`` does, and before anything is sent if the disk cannot hold them all.
    """
    wanted = list(files)
    for file in wanted:
        check_names(file)
    into.mkdir(parents=True, exist_ok=True)
    require_space(into, sum(file.size_bytes for file in wanted if not _at_hand(file, into, cache)))
    _each(lambda file: store.get_file(file, into / file.path, cache), wanted)


def _at_hand(file: File, into: Path, cache: Path | None) -> bool:
    places = [into / file.path, *([cache / file.sha256] if cache is not None else [])]
    # A part that is there has its whole space reserved.
    started = (into / f"{file.path}.part").exists()
    return started or any(cached.is_verified(place, file.size_bytes) for place in places)


def _each(do: Callable[[T], R], items: list[T]) -> list[R]:
    """Do it to all; after the first error no more are begun."""
    with ThreadPoolExecutor(_FILES, thread_name_prefix="files") as files:
        try:
            return list(files.map(do, items))
        except BaseException:
            files.shutdown(cancel_futures=True)
            raise
