"""From an object as YAML or JSON gives it to a checked ``FineTuneJob``, or every mistake at once in the user's words.

pydantic decides what is wrong; the words come from the types' own JSON schema, which knows bounds, choices and names.
Read as the API server reads: null means absent, ``16.0`` is the whole number 16, a ``status`` at the top passes unread.
"""

import contextlib
import difflib
import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from finetune_api import rest
from finetune_api.types import FineTuneJob

Schema = Mapping[str, Any]

PATTERNS = {
    r"^[a-z]([-a-z0-9]*[a-z0-9])?$": "lower-case letters, digits and `-`, a letter first and no `-` at the end",
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$": "lower-case letters, digits and `-`, with no `-` at either end",
    r"^[a-z0-9][-.a-z0-9]*[a-z0-9]$": "lower-case letters, digits, `-` and `.`, with a letter or digit at both ends",
    r"^(https?://.+)?$": "a URL that begins with http:// or https://",
    r"^[1-9][0-9]*(Mi|Gi)$": "a whole number followed by Mi or Gi, such as 4Gi",
    r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$": "a quantity as in Kubernetes, such as 500m, 4 or 16Gi",
    r"^[A-Za-z_][A-Za-z0-9_]*$": "letters, digits and `_`, with no digit first",
}
"""What a value must be, for every pattern of the API."""

_LATER = frozenset(
    [
        "reportTo",
        "checkpoint.metric",
    ]
)
"""Fields that the design has and this version has not; by name, or with the block where the name alone says little."""

_FEW = 12
"""So many known names are worth listing."""


@dataclass(frozen=True)
class FieldError:
    """One mistake: where (``spec.pipeline[1].sft.lora.r``, empty for the whole file) and what, with the mend."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class InvalidSpec(Exception):  # noqa: N818 - named as the reason in status
    """Every mistake that was found.

    ``rest`` is the job without the wrong fields, None if nothing is left to judge: rules beyond the schema can be
    checked on it, so that their breaches are told at the same time. Where the mistakes leave open what the stages do,
    ``whole`` is False: only the model, the data and the storage of ``rest`` are what the user wrote.
    """

    def __init__(self, errors: list[FieldError], rest: FineTuneJob | None = None, *, whole: bool = True) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = errors
        self.rest = rest
        self.whole = whole


def parse(obj: object) -> FineTuneJob:
    """The job that ``obj`` (what YAML or JSON decodes to) describes; raises ``InvalidSpec`` with every mistake."""
    if not isinstance(obj, dict):
        raise InvalidSpec([FieldError("", f"must be a FineTuneJob, got {_got(obj)}")])
    plain = {key: value for key, value in _plain(obj).items() if key != "status"}
    try:
        return _validate(plain)
    except ValidationError as broken:
        found = [(_locate(plain, error["loc"]), error) for error in broken.errors(include_url=False)]
        errors: dict[str, FieldError] = {}
        for place, error in found:
            errors.setdefault(place.path, FieldError(place.path, _message(place, error["type"], error["msg"])))
        left, whole = _rest(plain, [place.keys for place, _ in found])
        raise InvalidSpec(list(errors.values()), left, whole=whole) from None


def suggest(word: str, known: list[str]) -> str:
    """``; did you mean `x`?``, or the known words when they are few, or nothing. For the end of a message."""
    by_shape = {_shape(name): name for name in known}
    if _shape(word) in by_shape:
        return f"; did you mean `{by_shape[_shape(word)]}`?"
    if near := difflib.get_close_matches(_shape(word), by_shape, n=1, cutoff=0.6):
        return f"; did you mean `{by_shape[near[0]]}`?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= _FEW else ""


def _validate(obj: Mapping[str, Any]) -> FineTuneJob:
    # JSON mode: strict about types, yet enums come as text. The Python names of fields are no words of the API.
    return FineTuneJob.model_validate_json(json.dumps(obj), by_alias=True, by_name=False)


def _plain(value: Any) -> Any:
    """Without null fields, and whole numbers as such: ``1.0`` reaches the API server as ``1``."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such number: it is refused like any other text
    return value


# ---------------------------------------------------------------- where


@dataclass(frozen=True)
class _Place:
    """A mistake's place: the keys that lead to it, its schema, its value and the objects round it."""

    keys: tuple[int | str, ...]
    schema: Schema
    value: Any
    around: tuple[tuple[str, Schema, Any], ...]
    """(path, schema, value) of every enclosing object, outermost first."""

    @property
    def path(self) -> str:
        """As users write it: ``spec.pipeline[1].sft``."""
        return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.keys).removeprefix(".")

    @property
    def name(self) -> str:
        return str(self.keys[-1])


@functools.cache
def _root() -> Schema:
    return FineTuneJob.model_json_schema(by_alias=True)


def _resolve(schema: Schema) -> Schema:
    """Follow a reference, and see through ``or null``."""
    if "$ref" in schema:
        return _resolve(_root()["$defs"][str(schema["$ref"]).rsplit("/", 1)[-1]])
    if "anyOf" in schema:
        members = [_resolve(member) for member in schema["anyOf"] if member.get("type") != "null"]
        return members[0] if len(members) == 1 else {"anyOf": members}
    return schema


def _locate(obj: Any, loc: tuple[int | str, ...]) -> _Place:
    place = _Place((), _resolve(_root()), obj, ())
    for part in loc:
        schema, value = place.schema, place.value
        if "anyOf" in schema:  # what follows names a member of the union, not a place
            break
        if part == "[key]":
            return replace(place, schema=_resolve(schema["propertyNames"]), value=place.name)
        if isinstance(part, int):
            child, value = schema["items"], value[part]
        else:
            child = schema.get("properties", {}).get(part, schema.get("additionalProperties") or {})
            value = value.get(part) if isinstance(value, dict) else None
            if "propertyNames" in schema:  # the mistake may be in the key: keep its schema at hand
                child = {**_resolve(child), "propertyNames": schema["propertyNames"]}
        around = (*place.around, (place.path, place.schema, place.value))
        place = _Place((*place.keys, part), _resolve(child), value, around)
    return place


# ---------------------------------------------------------------- what


def _message(place: _Place, kind: str, fallback: str) -> str:
    if kind == "missing":
        return "is required"
    if kind == "extra_forbidden":
        return f"unknown field{_mend_name(place)}"
    words = _mismatch(place.schema, place.value)
    return f"{words[0]}, got {_got(place.value)}{words[1]}" if words else fallback


def _mismatch(schema: Schema, value: Any) -> tuple[str, str] | None:
    """What the value must be, and the mend (may be empty); None if the schema finds nothing wrong with it."""
    if "anyOf" in schema:
        return f"must be {_expected(schema)}", _mend_word(schema, value)
    if "enum" in schema or "const" in schema:
        return f"must be {_expected(schema)}", _mend_word(schema, value)
    if not _has_type(value, schema.get("type")):
        return f"must be {_KINDS.get(str(schema.get('type')), 'something else')}", _mend_type(schema, value)
    for key, holds, words in _bounds(schema, value):
        if key in schema and not holds:
            return f"must {words}", ""
    if (pattern := schema.get("pattern")) is not None:
        return f"must be {PATTERNS.get(pattern, f'text that matches {pattern}')}", ""
    return None


_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "array": "a list",
    "object": "a mapping",
}


_PYTHON: dict[str, type | tuple[type, ...]] = {
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "string": str,
    "array": list,
    "object": dict,
}


def _has_type(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return bool(kind == "boolean")
    return isinstance(value, _PYTHON.get(str(kind), object))


def _bounds(schema: Schema, value: Any) -> Iterator[tuple[str, bool, str]]:
    if isinstance(value, int | float):
        yield "minimum", value >= schema.get("minimum", value), f"be at least {schema.get('minimum')}"
        yield "maximum", value <= schema.get("maximum", value), f"be at most {schema.get('maximum')}"
        above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
        yield "exclusiveMinimum", above is None or value > above, f"be more than {above}"
        yield "exclusiveMaximum", below is None or value < below, f"be less than {below}"
        return
    low, high, what = "minProperties", "maxProperties", "entries"
    if isinstance(value, str):
        low, high, what = "minLength", "maxLength", "characters"
    elif isinstance(value, list):
        low, high = "minItems", "maxItems"
    count = len(value)
    few = f"have at least {schema.get(low)} {what}" if count else "not be empty"
    yield low, count >= schema.get(low, 0), few
    yield high, count <= schema.get(high, count), f"have at most {schema.get(high)} {what}"


def _expected(schema: Schema) -> str:
    """``a whole number from 1 to 65536, or auto``."""
    if "anyOf" in schema:
        return ", or ".join(_expected(member) for member in schema["anyOf"])
    if choices := _choices(schema):
        return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
    words = _KINDS.get(str(schema.get("type")), "something else")
    if "minimum" in schema and "maximum" in schema:
        words += f" from {schema['minimum']} to {schema['maximum']}"
    return words


def _choices(schema: Schema) -> list[str]:
    if "anyOf" in schema:
        return [choice for member in schema["anyOf"] for choice in _choices(member)]
    return [str(choice) for choice in schema.get("enum", [schema["const"]] if "const" in schema else [])]


def _got(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case int() | float():
            return str(value)
        case str() if value == "":
            return "an empty text"
        case str():
            shown = value if value.isprintable() else json.dumps(value)[1:-1]  # a message is one line
            return f'the text "{shown}"' if len(shown) <= 60 else f'the text "{shown[:57]}..."'
        case list():
            return f"a list of {len(value)}"
        case _:
            return "a mapping"


# ---------------------------------------------------------------- mends


def _mend_type(schema: Schema, value: Any) -> str:
    kind = schema.get("type")
    if kind in ("integer", "number") and isinstance(value, str) and _is_number(value):
        return "; write it without quotes"
    if kind == "string" and isinstance(value, bool | int | float):
        return "; put it in quotes"
    if kind == "array" and isinstance(value, str) and _resolve(schema.get("items", {})).get("type") == "string":
        return f"; write [{value}]"
    if kind == "array" and isinstance(value, dict):
        return "; begin the entry with `- `"
    return ""


def _mend_word(schema: Schema, value: Any) -> str:
    if not isinstance(value, str):
        return ""
    hint = suggest(value, _choices(schema))
    return "" if hint.startswith("; known") else hint


def _mend_name(place: _Place) -> str:
    """The known field that an unknown one was meant to be: here, further in, further out, or spelt otherwise."""
    _, schema, value = place.around[-1]
    if place.name in _LATER or ".".join(map(str, place.keys[-2:])) in _LATER:
        return "; it comes in a later version: leave it out"
    known = list(schema.get("properties", {}))
    shape = _shape(place.name)
    if shape not in map(_shape, known):
        if inside := _inside(schema, shape, value):
            return f"; it belongs in `{inside}`"
        for outer_path, outer, _ in reversed(place.around[:-1]):
            if shape in map(_shape, outer.get("properties", {})):
                return f"; it belongs in `{outer_path}`" if outer_path else "; it belongs at the top"
    return suggest(place.name, known) if known else ""


def _inside(schema: Schema, shape: str, value: Any, depth: int = 3) -> str:
    """Dotted path of the nearest object below that has such a field; written objects first."""
    children: dict[str, Schema] = {name: _resolve(child) for name, child in schema.get("properties", {}).items()}
    written = value if isinstance(value, dict) else {}
    names = sorted((n for n, c in children.items() if "properties" in c), key=lambda n: n not in written)
    for name in names:
        if shape in map(_shape, children[name]["properties"]):
            return name
    for name in names if depth > 1 else []:
        if deeper := _inside(children[name], shape, written.get(name), depth - 1):
            return f"{name}.{deeper}"
    return ""


def _shape(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# ---------------------------------------------------------------- what is left


def _rest(obj: dict[str, Any], wrong: list[rest.Keys]) -> tuple[FineTuneJob | None, bool]:
    """The job without its wrong fields, and whether its pipeline is the user's."""
    left = rest.without(obj, wrong)
    if rest.pipeline_stands(obj, wrong):
        with contextlib.suppress(ValidationError):
            return _validate(left), True
    with contextlib.suppress(ValidationError):
        return _validate(rest.sources_of(left)), False
    return None, False
