"""Files of rows, read one by one with the number of the line that each stands on.

``.jsonl`` ``.json`` ``.csv`` ``.parquet``, each also ``.gz``. Lines count from 1; for parquet it is the row's number,
for the elements of a JSON array the line on which the element begins.
"""

import csv
import gzip
import json
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from finetune_jobs.run.errors import DataError

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")
_GZIP = b"\x1f\x8b"
_NUL = "a NUL byte: UTF-16, or a damaged file; save the file as UTF-8, or write it again"
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Record:
    """One row as the file has it."""

    line: int
    columns: dict[str, Any]


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read, although the rows after it may."""

    line: int
    words: str


def extension(name: str) -> str | None:
    """The file's kind (``.jsonl`` for ``a.jsonl.gz``); None for what is not a file of rows."""
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in EXTENSIONS else None


def read(path: Path, name: str) -> Iterator[Record | Broken]:
    """The file's rows in order, in little memory (a ``.json`` array is held whole).

    ``name`` is what error messages call the file. Raises DataError where reading cannot go on: a truncated ``.gz``, no
    parquet, no rows.
    """
    kind = extension(name)
    if kind is None:
        raise DataError(f"{name}: not a known kind of file; use {', '.join(EXTENSIONS)}, each also .gz")
    readers = {".jsonl": _read_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    empty = True
    try:
        _check_compression(path, name)
        with path.open("rb") as plain, gzip.GzipFile(fileobj=plain) if name.endswith(".gz") else plain as stream:
            for item in readers[kind](cast(IO[bytes], stream), name):
                empty = False
                yield item
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name}: the .gz is truncated or damaged ({error}); compress it again") from error
    if empty:
        raise DataError(f"{name}: no rows; the file is empty")


def _check_compression(path: Path, name: str) -> None:
    """The name says whether the content is compressed: a wrong name gives thousands of puzzling mistakes."""
    with path.open("rb") as content:
        head = content.read(2)
    if name.endswith(".gz") and head and head != _GZIP:
        raise DataError(f"{name}: not compressed, although its name says so; name it {name.removesuffix('.gz')}")
    if head == _GZIP and not name.endswith(".gz"):
        raise DataError(f"{name}: compressed with gzip; name it {name}.gz")


def _read_lines(stream: IO[bytes], name: str) -> Iterator[Record | Broken]:
    for number, raw in enumerate(stream, start=1):
        line = _without_bom(raw, name) if number == 1 else raw
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith(b"["):
            raise DataError(f"{name}:1: a JSON array, not one object a line; name the file .json")
        if number == 1 and line.strip() == b"{":
            raise DataError(f"{name}:1: an object over several lines; write each object in one line")
        yield _parse(line, number)


def _parse(line: bytes, number: int) -> Record | Broken:
    if b"\0" in line:
        return Broken(number, _NUL)
    try:
        return _record(json.loads(line.decode("utf-8")), number)
    except UnicodeDecodeError as error:
        return Broken(number, f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8")
    except json.JSONDecodeError as error:
        return Broken(number, f"not JSON: {error.msg} at column {error.colno}; write one JSON object a line")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, a thousand brackets
        return Broken(number, f"not readable JSON: {error}")


def _record(value: object, line: int) -> Record | Broken:
    if isinstance(value, dict):
        return Record(line, value)
    kinds = {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return Broken(line, f'{kinds.get(type(value), "a number")}, not an object; write {{"column": value, ...}}')


def _read_json(stream: IO[bytes], name: str) -> Iterator[Record | Broken]:
    content = _without_bom(stream.read(), name)
    if content.lstrip().startswith(b"{"):  # one object a line is often named .json
        if content.count(b"\n", 0, len(content.rstrip())) and isinstance(
            _parse(content.lstrip().split(b"\n", 1)[0], 1), Broken
        ):
            raise DataError(f"{name}:1: one JSON object, not an array; write [{{...}}, {{...}}] or one object a line")
        for number, raw in enumerate(content.split(b"\n"), start=1):
            if raw.strip():
                yield _parse(raw, number)
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8; save the file as UTF-8") from error
    yield from _elements(text, name)


def _elements(text: str, name: str) -> Iterator[Record | Broken]:
    decoder = json.JSONDecoder()
    at, line, counted = _skip(text, 0), 1, 0
    if at == len(text):
        return

    def fail(where: int, words: str) -> DataError:
        return DataError(
            f"{name}:{text.count(chr(10), 0, where) + 1}: {words}; write an array of objects: [{{...}}, {{...}}]"
        )

    if text[at] != "[":
        raise fail(at, "not a JSON array")
    at = _skip(text, at + 1)
    if text[at : at + 1] == "]":
        return
    while True:
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise fail(error.pos, f"not JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise fail(at, f"not readable JSON: {error}") from error
        line, counted = line + text.count("\n", counted, at), at
        yield _record(value, line)
        at = _skip(text, end)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise fail(at, "no comma or closing bracket after an element")
        at = _skip(text, at + 1)
    if (at := _skip(text, at + 1)) != len(text):
        raise fail(at, "something stands after the array")


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _read_csv(stream: IO[bytes], name: str) -> Iterator[Record | Broken]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_text_lines(stream, name), strict=True)
    header: list[str] = []
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{name}:{start}: not CSV: {error}; put fields with commas, quotes or line breaks in double quotes"
            ) from error
        if not fields:
            continue
        if not header:
            header = [field.strip() for field in fields]
            if len(header) == 1 and (mark := next((m for m in ";\t|" if m in header[0]), None)):
                words = f"one column only, {header[0]!r}; separate columns with commas, not with {mark!r}"
                raise DataError(f"{name}:{start}: {words}")
            if twice := sorted({h for h in header if header.count(h) > 1}):
                raise DataError(f"{name}:{start}: column {twice[0]!r} stands twice in the header; rename one")
        elif len(fields) != len(header):
            yield Broken(
                start, f"{len(fields)} fields where the header has {len(header)}; is a quote or comma missing?"
            )
        else:
            yield Record(start, dict(zip(header, fields, strict=True)))


def _text_lines(stream: IO[bytes], name: str) -> Iterator[str]:
    for number, raw in enumerate(stream, start=1):
        if b"\0" in raw and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{name}:{number}: {_NUL}")
        try:
            yield (_without_bom(raw, name) if number == 1 else raw).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}:{number}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
            ) from error


def _without_bom(content: bytes, name: str) -> bytes:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name}:1: UTF-16, not UTF-8; save the file as UTF-8")
    return content.removeprefix(b"\xef\xbb\xbf")


def _read_parquet(stream: IO[bytes], name: str) -> Iterator[Record | Broken]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryFile() as plain:  # parquet is read from its end, which a .gz does not have at hand
        if name.endswith(".gz"):
            shutil.copyfileobj(stream, plain)
            stream = plain
        line = 0
        try:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=1024):
                for columns in batch.to_pylist():
                    line += 1
                    yield Record(line, columns)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            first = str(error).splitlines()[0][:200]
            raise DataError(
                f"{name}: not readable as parquet after row {line} ({first}); write the file again"
            ) from error
