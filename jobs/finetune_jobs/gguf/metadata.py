"""What is written in a GGUF file: its key-value pairs and where its tensors lie.

Read by hand, since gguf-py's reader makes a mapped array of every token and takes seconds for a vocabulary. The format
(ggml's ``docs/gguf.md``) is little endian: magic, version, counts, pairs, tensor entries, padding, data.
"""

import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from finetune_jobs.gguf.release import gguf_py
from finetune_jobs.run.errors import InputMissingError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """Outermost first, as in torch (the file has it the other way round)."""
    type: str
    """``Q4_K``, ``F32``, ..."""
    offset: int
    """From the start of the file, in bytes."""
    size: int
    """In bytes."""


@dataclass(frozen=True)
class GGUFFile:
    """The head of a GGUF file."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    def values(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A tensor's weights in float32, dequantized."""
        gguf = gguf_py()
        tensor = self.tensors[name]
        kind = gguf.GGMLQuantizationType[tensor.type]
        stored = {"F32": np.float32, "F16": np.float16}.get(tensor.type, np.uint8)
        row = gguf.quant_shape_to_byte_shape(tensor.shape, kind) if stored is np.uint8 else tensor.shape
        data = np.memmap(self.path, dtype=stored, mode="r", offset=tensor.offset, shape=row)
        return np.asarray(gguf.dequantize(data, kind), dtype=np.float32)

    def summary(self) -> dict[str, Any]:
        """Parameters, bits per weight (of the tensors' bytes) and how many tensors have each type."""
        weights = sum(prod(t.shape) for t in self.tensors.values())
        size = sum(t.size for t in self.tensors.values())
        return {
            "parameters": weights,
            "bitsPerWeight": round(8 * size / weights, 3),
            "tensors": dict(Counter(t.type for t in self.tensors.values()).most_common()),
        }


def read(path: Path) -> GGUFFile:
    """The file's head. Raises InputMissingError when it is no GGUF or is cut short."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)
    except struct.error as error:
        raise InputMissingError(f"{path} is not a whole GGUF file: it ends before its list of tensors does") from error
    except (OSError, ValueError, KeyError) as error:
        raise InputMissingError(f"{path} is not a whole GGUF file: {error}") from error


def _parse(path: Path, data: mmap.mmap) -> GGUFFile:
    magic, version, tensor_count, pairs = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}")
    at = 24
    fields: dict[str, Any] = {}
    for _ in range(pairs):
        name, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        fields[name], at = _value(data, at + 4, kind)
    entries = []
    for _ in range(tensor_count):
        name, at = _string(data, at)
        (dimensions,) = struct.unpack_from("<I", data, at)
        *shape, kind, offset = struct.unpack_from(f"<{dimensions}QIQ", data, at + 4)
        entries.append((name, tuple(reversed(shape)), kind, offset))
        at += 4 + 8 * dimensions + 12
    alignment = fields.get("general.alignment", 32)
    start = at + -at % alignment
    sizes = gguf_py().GGML_QUANT_SIZES
    tensors: dict[str, Tensor] = {}
    for name, dims, kind, offset in entries:
        block, block_size = sizes[kind]
        tensors[name] = Tensor(name, dims, _kind(kind), start + offset, prod(dims) // block * block_size)
        if start + offset + tensors[name].size > len(data):
            raise ValueError(f"tensor {name} ends after the end of the file")
    return GGUFFile(path, fields, tensors)


def _kind(kind: int) -> str:
    return str(gguf_py().GGMLQuantizationType(kind).name)


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    return data[at + 8 : end].decode("utf-8", "replace"), end


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(data, at)
    if kind != _ARRAY:
        (value,) = struct.unpack_from(f"<{_SCALARS[kind]}", data, at)
        return value, at + struct.calcsize(_SCALARS[kind])
    item, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if item in _SCALARS:
        layout = f"<{count}{_SCALARS[item]}"
        return list(struct.unpack_from(layout, data, at)), at + struct.calcsize(layout)
    values = []
    for _ in range(count):
        value, at = _value(data, at, item)
        values.append(value)
    return values, at
