import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_jobs.data.formats import Broken, Record, read
from finetune_jobs.run.errors import DataError

ROWS: list[dict[str, Any]] = [{"a": 'é, "x"\nz', "b": "1"}, {"a": "2", "b": ""}]


def _bytes(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == ".jsonl":
        return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS).encode()
    if kind == ".json":
        return json.dumps(ROWS, indent=1).encode()
    if kind == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["a", "b"])
        writer.writeheader()
        writer.writerows(ROWS)
        return text.getvalue().encode()
    pq.write_table(pa.Table.from_pylist(ROWS), out)
    return out.getvalue()


def rows_of(path: Path) -> list[Record | Broken]:
    """All that the file yields."""
    return list(read(path, path.name))


def write(folder: Path, name: str, content: bytes) -> Path:
    """A file of that content; compressed if its name says so."""
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("compressed", ["", ".gz"], ids=["plain", "gz"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize(
    ("kind", "lines"),
    [(".jsonl", [1, 2]), (".json", [2, 6]), (".csv", [2, 4]), (".parquet", [1, 2])],
    ids=lambda v: str(v),
)
def test_every_kind_of_file_gives_the_same_rows(
    tmp_path: Path, kind: str, lines: list[int], bom: bytes, compressed: str
) -> None:
    """Same rows from every kind, compressed or not, with or without byte order mark, each with its line."""
    content = _bytes(kind) if kind == ".parquet" else bom + _bytes(kind)
    found = rows_of(write(tmp_path, f"train{kind}{compressed}", content))
    assert found == [Record(line, row) for line, row in zip(lines, ROWS, strict=True)]


@pytest.mark.parametrize(
    ("name", "content", "line", "words"),
    [
        ("t.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}\n', 2, "not JSON"),
        ("t.jsonl", b'{"a": 1}\n[1, 2]\n{"a": 3}\n', 2, "a list, not an object"),
        ("t.jsonl", b'{"a": 1}\nnull\n{"a": 3}\n', 2, "null, not an object"),
        ("t.jsonl", b'{"a": 1}\n{"a": "\xff\xfe"}\n{"a": 3}\n', 2, "UTF-8"),
        ("t.jsonl", b'{"a": 1}\n' + b"[" * 100_000 + b'\n{"a": 3}\n', 2, "not readable JSON"),
        ("t.json", b'[{"a": 1},\n 7,\n {"a": 3}]', 2, "a number, not an object"),
        ("t.csv", b"a,b\n1,2\n1,2,3\n3,4\n", 3, "3 fields where the header has 2"),
    ],
    ids=["broken", "list", "null", "not utf-8", "too deep", "element", "fields"],
)
def test_a_broken_row_names_its_line_and_the_rest_is_read(
    tmp_path: Path, name: str, content: bytes, line: int, words: str
) -> None:
    """One bad row does not hide the others."""
    found = rows_of(write(tmp_path, name, content))
    assert [type(item) for item in found] == [Record, Broken, Record]
    broken = found[1]
    assert isinstance(broken, Broken)
    assert broken.line == line
    assert words in broken.words


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.jsonl", b"", r"t\.jsonl: no rows"),
        ("t.jsonl", b"\n \n", r"no rows"),
        ("t.json", b"[]", r"no rows"),
        ("t.json", b"", r"no rows"),
        ("t.csv", b"a,b\n", r"no rows"),
        ("t.jsonl", b'[{"a": 1}]', r"t\.jsonl:1: a JSON array.*\.json"),
        ("t.jsonl", '{"a": 1}\n'.encode("utf-16"), r"UTF-16.*save the file as UTF-8"),
        ("t.json", b'{\n "a": [1]\n}', r"t\.json:1: one JSON object, not an array"),
        ("t.json", b'[{"a": 1},\n{"a": 2}\n{"a": 3}]', r"t\.json:3: no comma"),
        ("t.json", b'[{"a": 1},\n{"a": tru}]', r"t\.json:2: not JSON"),
        ("t.json", b'[{"a": 1}]\nx', r"t\.json:2: something stands after"),
        ("t.json", b'[{"a": 1}', r"t\.json:1: no comma or closing bracket"),
        ("t.json", b'[{"a":\n "\xff"}]', r"t\.json:2: not UTF-8"),
        ("t.json", b'"text"', r"t\.json:1: not a JSON array"),
        ("t.csv", b'a,b\n1,2\n"x,4\n', r"t\.csv:3: not CSV"),
        ("t.csv", b"a,b\n1,2\n\xff,2\n", r"t\.csv:3: not UTF-8"),
        ("t.csv", b"a,a\n1,2\n", r"t\.csv:1: column 'a' stands twice"),
        ("t.parquet", b"PAR1 nothing", r"t\.parquet: not readable as parquet"),
        ("t.txt", b"x", r"t\.txt: not a known kind of file.*\.jsonl"),
    ],
    ids=lambda v: v if isinstance(v, str) and not v.startswith("t.") else "",
)
def test_a_file_that_cannot_be_read_says_where_and_what_to_do(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    """File-level damage is a DataError naming file and, where there is one, line."""
    with pytest.raises(DataError, match=words):
        rows_of(write(tmp_path, name, content))


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_a_truncated_gz_is_named(tmp_path: Path, kind: str) -> None:
    """Half a compressed file is not half the data."""
    path = write(tmp_path, f"t{kind}.gz", _bytes(kind) * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"t\.\w+\.gz: the \.gz is truncated"):
        rows_of(path)


def test_a_name_that_lies_about_compression_is_told(tmp_path: Path) -> None:
    """A plain file called .gz, and a .gz called otherwise: which of the two, and the right name."""
    plain = b'{"a": 1}\n'
    for name, content, words in [
        ("t.jsonl.gz", plain, "t.jsonl.gz: not compressed, although its name says so; name it t.jsonl"),
        ("t.jsonl", gzip.compress(plain), "t.jsonl: compressed with gzip; name it t.jsonl.gz"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"^{words}$"):
            rows_of(tmp_path / name)


def test_nul_bytes_are_damage(tmp_path: Path) -> None:
    """UTF-16 without a mark, or the hole that a crash leaves: told as such, with its line; an escaped NUL is text."""
    for name, content in [("t.jsonl", b'{"a": 1}\n{"a": "\0"}\n'), ("u.jsonl", '\n{"a": 1}'.encode("utf-16-le"))]:
        broken = [row for row in rows_of(write(tmp_path, name, content)) if isinstance(row, Broken)]
        assert "a NUL byte" in broken[-1].words
        assert broken[-1].line == 2
    with pytest.raises(DataError, match=r"^t.csv:2: a NUL byte"):
        rows_of(write(tmp_path, "t.csv", b"a,b\n1,\0\n"))
    assert rows_of(write(tmp_path, "v.jsonl", b'{"a": "\\u0000"}\n')) == [Record(1, {"a": "\0"})]


def test_an_object_over_several_lines_is_told_once(tmp_path: Path) -> None:
    """Not as one mistake for each of its lines."""
    with pytest.raises(DataError, match=r"^t.jsonl:1: an object over several lines; write each object in one line$"):
        rows_of(write(tmp_path, "t.jsonl", b'{\n  "a": 1\n}\n'))


@pytest.mark.parametrize("mark", [";", "\t"], ids=["semicolon", "tab"])
def test_other_separators_than_commas_are_named(tmp_path: Path, mark: str) -> None:
    """A spreadsheet of another country, or a .tsv under another name."""
    with pytest.raises(DataError, match=r"^t.csv:1: one column only, .* separate columns with commas, not with "):
        rows_of(write(tmp_path, "t.csv", f"a{mark}b\n1{mark}2\n".encode()))
    assert rows_of(write(tmp_path, "u.csv", f'text\n"1{mark}2"\n'.encode())) == [Record(2, {"text": f"1{mark}2"})]


def test_json_lines_called_json_are_read(tmp_path: Path) -> None:
    """One object a line in a .json file is common enough."""
    found = rows_of(write(tmp_path, "t.json", b'{"a": 1}\n\n{"a": 2}\n'))
    assert found == [Record(1, {"a": 1}), Record(3, {"a": 2})]


def test_reading_streams(tmp_path: Path) -> None:
    """The first rows come before the damage further down is found."""
    path = write(tmp_path, "t.jsonl.gz", b'{"a": 1}\n' * 100_000)
    path.write_bytes(path.read_bytes()[:-100])
    rows = read(path, path.name)
    assert next(rows) == Record(1, {"a": 1})
    with pytest.raises(DataError):
        list(rows)
