"""From a YAML file to a checked ``FineTuneJob``: the file is read as kubectl reads it, mistakes are told all at once.

kubectl goes through ``sigs.k8s.io/yaml``, which is go-yaml v2: ``1e-5`` is a number, ``012`` is octal, ``on`` is true,
a date stays text. ``tests/unit/test_manifest.py`` holds the table of what that module (v1.6.0) answered.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from finetune_api.types import KIND, FineTuneJob
from finetune_api.validate import FieldError, InvalidSpec, parse
from finetune_operator.plan.rules import check

MAX_BYTES = 1_000_000
"""Of one file; the API server takes no larger object either."""
_MAX_VALUES = 100_000
"""After aliases are written out: a few lines of them can stand for billions of values."""
_MAX_DEPTH = 64
_MAX_DIGITS = 400
"""Of a whole number: more are no number to anybody, and Python refuses some thousands."""

_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(["y", "Y", "yes", "Yes", "YES", "on", "On", "ON", "true", "True", "TRUE"], True),
    **dict.fromkeys(["n", "N", "no", "No", "NO", "off", "Off", "OFF", "false", "False", "FALSE"], False),
    **dict.fromkeys(["", "~", "null", "Null", "NULL"]),
}
_NOT_JSON = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_INTEGER = re.compile(r"(?P<sign>[-+]?)(?:(?P<based>0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO][0-7]+)|(?P<digits>[0-9]+))")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_TAG = "tag:yaml.org,2002:"
_PLAIN = "!plain"


def load(path: Path, *, cluster: bool = False) -> FineTuneJob:
    """The file's one job, checked; ``file://`` sources start at the file's folder. Raises ``InvalidSpec``.

    ``cluster``: it is to run there, where such sources cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidSpec([FieldError("", f"cannot read {path}: {error.strerror}")]) from None
    if len(data) > MAX_BYTES:
        raise _refused(f"{path} has {len(data):,} bytes; a job may have {MAX_BYTES:,}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _refused(f"{path} is not UTF-8 text: line {line} has the byte 0x{data[error.start]:02x}") from None
    return load_text(text, path.resolve().parent, cluster=cluster)


def load_text(text: str, folder: Path, *, cluster: bool = False) -> FineTuneJob:
    """The one job in the YAML text, checked; relative ``file://`` sources start at ``folder``."""
    obj = _only_job(list(read(text)))
    errors: list[FieldError] = []
    whole = True
    try:
        job: FineTuneJob | None = parse(_absolute(obj, folder))
    except InvalidSpec as invalid:
        errors, job, whole = invalid.errors, invalid.rest, invalid.whole
    known = [error.path for error in errors]
    breaches = check(job, cluster=cluster, pipeline=whole) if job else []
    errors = errors + [b for b in breaches if not any(_follows(b.path, path) for path in known)]
    if errors or job is None:
        raise InvalidSpec(errors, job, whole=whole)
    return job


def read(text: str) -> Iterator[Any]:
    """Every document of the YAML text as JSON knows it; raises ``InvalidSpec`` naming line and column."""
    if len(text.encode()) > MAX_BYTES:
        raise _refused(f"the text has {len(text.encode()):,} bytes; a job may have {MAX_BYTES:,}")
    if text.lstrip().startswith("{") and _is_json(text):
        text = text.replace("\t", " ")  # kubectl takes JSON as such: it may be indented with tabs, and holds no others
    try:
        for node in yaml.compose_all(text, Loader=_Loader):
            yield _Reader().value(node)
    except yaml.MarkedYAMLError as error:
        raise _at(error.problem_mark or error.context_mark, _syntax(error)) from None
    except yaml.reader.ReaderError as error:
        raise _refused(f"the file holds the character U+{int(error.character):04X}, which YAML forbids") from None
    except RecursionError:
        raise _refused("values are nested too deep") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class _Loader(yaml.SafeLoader):
    """Parses, but leaves the meaning of unquoted words to us."""


_Loader.yaml_implicit_resolvers = {None: [(_PLAIN, re.compile(""))]}


class _Reader:
    """One document's nodes to values, with a bound on what aliases blow up to."""

    def __init__(self) -> None:
        self._count = 0

    def value(self, node: yaml.Node, depth: int = 0) -> Any:
        self._count += 1
        if self._count > _MAX_VALUES:
            raise _at(node.start_mark, f"more than {_MAX_VALUES:,} values, aliases written out")
        if depth > _MAX_DEPTH:
            raise _at(node.start_mark, f"nested deeper than {_MAX_DEPTH}; does an alias hold itself?")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, depth + 1) for item in node.value]
        assert isinstance(node, yaml.ScalarNode)
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _PLAIN and key_node.value == "<<":
                merged = self._merged(value_node, depth)
                if hidden := sorted(merged.keys() & lines):
                    words = f"put `<<` first: kubectl would let it replace the `{hidden[0]}` above"
                    raise _at(key_node.start_mark, words)
                values.update(merged)
                continue
            key = _key(key_node)
            if key in lines:
                raise _at(key_node.start_mark, f"`{key}` stands here a second time; first in line {lines[key]}")
            lines[key] = key_node.start_mark.line + 1
            values[key] = self.value(value_node, depth + 1)
        return values

    def _merged(self, node: yaml.Node, depth: int) -> dict[str, Any]:
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(part, yaml.MappingNode) for part in parts):
            raise _at(node.start_mark, "`<<` takes a mapping, or a list of mappings")
        merged: dict[str, Any] = {}
        for part in reversed(parts):  # the first one wins
            merged.update(self.value(part, depth + 1))
        return merged


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise _at(node.start_mark, "a field's name must be a word, not a list or mapping")
    match _scalar(node):
        case None:
            raise _at(node.start_mark, "a field without a name")
        case bool() as key:
            return str(key).lower()
        case key:
            return str(key)


def _scalar(node: yaml.ScalarNode) -> Any:
    text, tag = node.value, node.tag.removeprefix(_TAG)
    if not text.isascii():
        try:  # JSON writes characters beyond U+FFFF as two escapes, which YAML's reader leaves apart
            text = text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise _at(node.start_mark, "half a surrogate pair; write the whole character") from None
    if tag == "binary":
        raise _at(node.start_mark, "!!binary is not read here")
    if tag not in (_PLAIN, "int", "float", "bool", "null"):
        return text
    if _NOT_JSON.fullmatch(text):
        raise _at(node.start_mark, f"{text} is no number that JSON, and so the API server, knows")
    value = resolve(text)
    kinds = {"int": int, "float": (int, float), "bool": bool, "null": type(None)}
    if tag in kinds and not isinstance(value, kinds[tag]):  # type: ignore[arg-type]
        raise _at(node.start_mark, f"`{text}` is not of the type !!{tag}")
    return value


def resolve(text: str) -> bool | int | float | str | None:
    """What an unquoted word means to go-yaml v2; whole numbers are ``int`` however they are written."""
    if text in _WORDS:
        return _WORDS[text]
    if text[:1] not in set("+-.0123456789"):
        return text
    plain = text if text.startswith(".") else text.replace("_", "")
    if found := _INTEGER.fullmatch(plain):
        number = _integer(found)
        if number is not None and -(2**63) <= number < (2**63 if found["sign"] else 2**64):
            return number
    if _FLOAT.fullmatch(plain) and abs(real := float(plain)) != float("inf"):
        return int(real) if real.is_integer() and abs(real) < 1e21 else real
    return text


def _integer(found: re.Match[str]) -> int | None:
    if len(found["digits"] or "") > _MAX_DIGITS:
        return None
    if found["based"]:
        size = int(found["based"], 0)
    elif found["digits"].startswith("0"):
        if not re.fullmatch("[0-7]+", found["digits"]):
            return None  # 08 is no octal number, but a fine float
        size = int(found["digits"], 8)
    else:
        size = int(found["digits"])
    return -size if found["sign"] == "-" else size


# ---------------------------------------------------------------- the document


def _only_job(documents: list[Any]) -> Any:
    """The one FineTuneJob among the documents; other kinds (a Secret, say) may stand beside it."""
    written = [item for document in documents if document is not None for item in _items(document)]
    if not written:
        raise _refused("the file is empty; a FineTuneJob was expected")
    if len(written) == 1:
        return written[0]
    jobs = [document for document in written if isinstance(document, dict) and document.get("kind") == KIND]
    if len(jobs) == 1:
        return jobs[0]
    kinds = [str(d.get("kind", "no kind")) if isinstance(d, dict) else "no mapping" for d in written]
    raise _refused(f"exactly one {KIND} was expected; the file's documents are: {', '.join(kinds)}")


def _items(document: Any) -> list[Any]:
    """The objects of a ``kind: List``, as ``kubectl get -o yaml`` prints several; else the document itself."""
    items = document.get("items") if isinstance(document, dict) and document.get("kind") == "List" else None
    return items if isinstance(items, list) else [document]


def _absolute(value: Any, folder: Path) -> Any:
    """With every relative ``file://`` source, and every adapter's, starting at the folder."""
    if isinstance(value, list):
        return [_absolute(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _source(item, folder) if key in ("source", "uri") else _absolute(item, folder)
        for key, item in value.items()
    }


def _source(value: Any, folder: Path) -> Any:
    if not isinstance(value, str) or not value.startswith("file://") or value == "file://":
        return _absolute(value, folder)
    path = value.removeprefix("file://")
    try:
        absolute = (folder / path).resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long or with a NUL: told with the others
        return value
    return f"file://{absolute}" + ("/" if path.endswith("/") and absolute != Path("/") else "")


def _follows(breach: str, wrong: str) -> bool:
    """Whether a breach only follows from a field that is wrong: it is there, inside, or about the list it left."""
    return breach == wrong or breach.startswith((f"{wrong}.", f"{wrong}[")) or wrong.startswith(f"{breach}[")


# ---------------------------------------------------------------- words


def _refused(message: str) -> InvalidSpec:
    return InvalidSpec([FieldError("", message)])


def _at(mark: yaml.Mark | None, message: str) -> InvalidSpec:
    return _refused(f"line {mark.line + 1}, column {mark.column + 1}: {message}" if mark else message)


def _syntax(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "cannot be read"
    mark = error.problem_mark
    line = (mark.buffer or "").rstrip("\0").split("\n")[mark.line : mark.line + 1] if mark and mark.buffer else []
    if "'\\t'" in problem or (line and "\t" in line[0][: len(line[0]) - len(line[0].lstrip())]):
        return "a tab; indent with spaces"
    if "quoted scalar" in (error.context or "") and "end of stream" in problem and error.context_mark:
        return f"the quote that opens in line {error.context_mark.line + 1} never closes"
    if "undefined alias" in problem:
        return f"{problem.removeprefix('found ')}: no `&name` stands before it"
    if "mapping values are not allowed" in problem:
        return "a second `: ` in one line, or a wrong indentation; put text that holds `: ` in quotes"
    if "block end" in problem or "block mapping" in (error.context or ""):
        return f"not valid YAML ({problem}); the line's indentation does not fit those above"
    if "expected ',' or" in problem:
        return f"not valid YAML ({problem}); is a bracket or brace left open?"
    return f"not valid YAML: {problem}"
