"""Safetensors without holding a model in memory: tensors read through the page cache, shards written in pieces.

The format (github.com/huggingface/safetensors): 8 bytes little-endian length of the header, the header in JSON (name to
dtype, shape and byte range), then the tensors' bytes. All offsets follow from names, types and shapes, so the files can
be laid out first and filled in any order.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open

from finetune_jobs.run.errors import InputMissingError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor is, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Weights:
    """A model's tensors by name, mapped from its safetensors files: values are read when they are touched."""

    def __init__(self, directory: Path) -> None:
        """Map ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names.

        Raises:
            InputMissingError: no such file, or one that is cut short.
        """
        self.specs: dict[str, TensorSpec] = {}
        """In the order of the files, so that reading goes forward."""
        self._opened: dict[str, Any] = {}  # safe_open has no type information
        for path in _files(directory):
            try:
                opened: Any = safe_open(path, framework="pt")
            except Exception as error:  # SafetensorError derives from Exception alone
                raise InputMissingError(f"{path}: not a whole safetensors file: {error}") from error
            for name in opened.offset_keys():
                piece = opened.get_slice(name)
                if (dtype := _TYPES.get(piece.get_dtype())) is None:
                    raise InputMissingError(f"{path}: tensor {name} is {piece.get_dtype()}, which is not supported")
                self.specs[name] = TensorSpec(dtype, tuple(piece.get_shape()))
                self._opened[name] = opened

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, mapped; not to be written to."""
        tensor: torch.Tensor = self._opened[name].get_tensor(name)
        return tensor

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Some rows of the tensor, and no others are read."""
        rows: torch.Tensor = self._opened[name].get_slice(name)[first:end]
        return rows

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sum(spec.size_bytes for spec in self.specs.values())


def _files(directory: Path) -> list[Path]:
    if (index := directory / INDEX).is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [SINGLE]
    for name in names:
        if not (directory / name).is_file():
            raise InputMissingError(f"{directory}: no {name}; merge reads models in safetensors format")
    return [directory / name for name in names]


class ShardWriter:
    """Safetensors files with their headers written and their tensors still to fill in, in any order, by any thread."""

    def __init__(self, directory: Path, specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> None:
        """Create the files, and the index where there is more than one; they take no disk space yet.

        A shard is at most ``max_shard_bytes`` long, unless it holds a single larger tensor.
        """
        self._specs = specs
        self._places: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        shards = _split(specs, max_shard_bytes)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            header, offsets, end = _header({name: specs[name] for name in names})
            descriptor = os.open(directory / file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            self._descriptors.append(descriptor)
            _write_all(descriptor, memoryview(header), 0)
            os.ftruncate(descriptor, end)
            for name in names:
                self._places[name] = (descriptor, offsets[name])
                weight_map[name] = file
        if len(shards) > 1:
            metadata = {"total_size": sum(spec.size_bytes for spec in specs.values())}
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, first_row: int, rows: torch.Tensor) -> None:
        """Fill in rows of a tensor, from ``first_row`` on."""
        spec = self._specs[name]
        descriptor, start = self._places[name]
        row_bytes = math.prod(spec.shape[1:]) * spec.dtype.itemsize
        data: Any = rows.contiguous().reshape(-1).view(torch.uint8).numpy()
        _write_all(descriptor, memoryview(data), start + first_row * row_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


def _split(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.size_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.size_bytes
    return shards


def _header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """The header with its length before it, each tensor's offset in the file, and the file's length."""
    # Readers view the bytes in place, so a tensor must begin at a multiple of its item size: wide types first.
    ordered = sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name, spec in ordered:
        offsets[name] = end
        end += spec.size_bytes
        entries[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: data + offset for name, offset in offsets.items()}, data + end


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
