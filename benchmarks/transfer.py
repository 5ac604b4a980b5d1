"""Our transfers against plain boto3's upload_file and download_file, both against SeaweedFS on this machine.

``python benchmarks/transfer.py [MiB]`` (default 1024, in 11 files). Client and server share the cores: compare the
rows, never quote them as the speed of a network. Ours also hashes every byte both ways and checks it;
boto3 does neither. Each row is a process of its own, so that CPU seconds and peak memory are its own; the best of three
is shown.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig

from finetune_cli.embedded import EmbeddedStore
from finetune_jobs.store.client import Store
from finetune_jobs.store.transfer import download_files, upload_tree

BUCKET = "bench"
ROUNDS = 3
_CHUNK = 16 << 20


def make(directory: Path, megabytes: int) -> None:
    """Eleven files, as a model has: one of half the size, five of a twelfth, five small ones."""
    sizes = [megabytes // 2, *[megabytes // 12] * 5]
    sizes += [(megabytes - sum(sizes)) // 5] * 5
    for number, size in enumerate(sizes):
        with (directory / f"file-{number:02d}").open("wb") as file:
            for start in range(0, size << 20, _CHUNK):
                file.write(os.urandom(min(_CHUNK, (size << 20) - start)))


def ours(store: Store, directory: Path, way: str) -> None:
    """As the stages do."""
    if way == "up":
        files = upload_tree(store, directory / "data", "ours")
        (directory / "files.json").write_text(json.dumps([file.model_dump() for file in files]))
        return
    from finetune_api.stage import File

    files = [File.model_validate(file) for file in json.loads((directory / "files.json").read_text())]
    download_files(store, files, directory / "back")


def plain(store: Store, directory: Path, way: str) -> None:
    """As boto3's manual does, but for the classic client (see docs/adr/003-object-store.md)."""
    s3 = boto3.client("s3", endpoint_url=store.endpoint)
    config = TransferConfig(preferred_transfer_client="classic")
    (directory / "back").mkdir(exist_ok=True)
    for path in sorted((directory / "data").iterdir()):
        if way == "up":
            s3.upload_file(str(path), BUCKET, f"plain/{path.name}", Config=config)
        else:
            s3.download_file(BUCKET, f"plain/{path.name}", str(directory / "back" / path.name), Config=config)


def measured(who: str, way: str, directory: Path, endpoint: str) -> None:
    """One row, printed as JSON."""
    store = Store(bucket=BUCKET, endpoint=endpoint)
    before = resource.getrusage(resource.RUSAGE_SELF)
    base = before.ru_maxrss
    start = time.perf_counter()
    (ours if who == "ours" else plain)(store, directory, way)
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"seconds": seconds, "cpu": cpu, "rss": usage.ru_maxrss >> 10, "base": base >> 10}))


def row(who: str, way: str, directory: Path, store: EmbeddedStore) -> dict[str, float]:
    """The fastest of the rounds."""
    best: dict[str, float] = {}
    for _ in range(ROUNDS):
        for old in (directory / "back").glob("*"):
            old.unlink()
        command = [sys.executable, __file__, "--row", who, way, str(directory), store.endpoint]
        done = subprocess.run(
            command, env={**os.environ, **store.environment()}, check=True, capture_output=True, text=True
        )
        found: dict[str, float] = json.loads(done.stdout)
        if not best or found["seconds"] < best["seconds"]:
            best = found
    return best


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megabytes", nargs="?", type=int, default=1024)
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        who, way, directory, endpoint = arguments.row
        measured(who, way, Path(directory), endpoint)
        return
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as name:
        directory = Path(name)
        (directory / "data").mkdir()
        make(directory / "data", arguments.megabytes)
        total = sum(path.stat().st_size for path in (directory / "data").iterdir()) / 1e6
        with EmbeddedStore(directory / "home", BUCKET) as store:
            print(f"{total:.0f} MB in 11 files, best of {ROUNDS}, {os.cpu_count()} cores shared with the server\n")
            print(f"{'':20}{'MB/s':>8}{'CPU s':>8}{'peak RSS MiB':>14}{'of it before':>14}")
            for way, verb in (("up", "upload"), ("down", "download")):
                for who in ("plain", "ours"):
                    found = row(who, way, directory, store)
                    label = f"{verb}, {'boto3' if who == 'plain' else 'ours'}"
                    speed = total / found["seconds"]
                    print(f"{label:20}{speed:8.0f}{found['cpu']:8.2f}{found['rss']:14.0f}{found['base']:14.0f}")


if __name__ == "__main__":
    main()
