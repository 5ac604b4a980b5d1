"""Names and shapes of weights without the weights: the hub's from a server that speaks as it does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from finetune_api.types import Storage
from finetune_jobs import headers
from finetune_jobs.models import Base
from finetune_jobs.run.errors import InputMissingError, StorageError

SHAPES = {"a.weight": (3, 5), "b.weight": (1024, 4096), "c": (0,)}
STORAGE = Storage(bucket="none")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """One file of 16-bit weights."""
    save_file({name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}, tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture
def hub(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A repository with that file; what was asked for."""
    asked: list[str] = []
    content = weights.read_bytes()

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(b"")

        def do_GET(self) -> None:
            first, _, last = self.headers["range"].removeprefix("bytes=").partition("-")
            asked.append(self.headers["range"])
            self._answer(content[int(first) : int(last) + 1])

        def _answer(self, body: bytes) -> None:
            there = self.path == "/org/model/resolve/c0ffee/model.safetensors"
            self.send_response(200 if there else 404)
            if not there:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("ETag", '"1"')
            self.send_header("X-Repo-Commit", "c0ffee")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        # Both are what HF_ENDPOINT would have made of them, had it been there at the import.
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)
        yield asked
        server.shutdown()


def base(directory: Path, **record: str) -> Base:
    """As ``resolve`` leaves it."""
    return Base(directory, {"kind": "store", **record}, {}, stored=not record)


def test_hollow_files_have_names_types_and_shapes(weights: Path, tmp_path: Path) -> None:
    """And the size, of which the disk holds the header alone."""
    model, hollow = tmp_path / "model", tmp_path / "hollow"
    for directory in (model, hollow):
        directory.mkdir()
    weights.rename(model / "model.safetensors")
    headers.write_hollow(headers.fetch(base(model), STORAGE), hollow)
    file = hollow / "model.safetensors"
    assert file.stat().st_size == (model / "model.safetensors").stat().st_size
    assert file.stat().st_blocks * 512 < 65536
    with safe_open(file, framework="pt") as read:
        assert {name: tuple(read.get_slice(name).get_shape()) for name in SHAPES} == SHAPES
        assert read.get_slice("b.weight").get_dtype() == "BF16"


def test_the_hub_is_asked_for_the_beginning(hub: list[str], tmp_path: Path) -> None:
    """One request for the file, of 100 kB."""
    found = headers.fetch(base(tmp_path, kind="hub", repository="org/model", revision="c0ffee"), STORAGE)
    entries = json.loads(found["model.safetensors"])
    assert {name: tuple(entry["shape"]) for name, entry in entries.items()} == SHAPES
    assert hub == ["bytes=0-100000"]


def test_what_is_not_there_is_told(hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of other names are left to those who look for them; a hub that cannot be asked is an error."""
    elsewhere = base(tmp_path, kind="hub", repository="org/other", revision="c0ffee")
    assert headers.fetch(elsewhere, STORAGE) == {}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match=r"spec\.model\.source: model org/other at c0ffee"):
        headers.fetch(elsewhere, STORAGE)


@pytest.mark.parametrize("content", [b"", b"short", (1 << 60).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_cut_short_is_told(tmp_path: Path, content: bytes) -> None:
    """With the field and the mend."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(
        InputMissingError, match=r"^spec\.model\.source: model\.safetensors is no .*copy the model again$"
    ):
        headers.fetch(base(tmp_path), STORAGE)
