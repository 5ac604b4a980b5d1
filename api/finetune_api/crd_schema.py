"""From a pydantic type to a structural OpenAPI v3 schema, as a CustomResourceDefinition takes it.

Fail-closed: the API server drops some keywords without a word, so every keyword and every shape that is not known here
raises ``SchemaError`` with its path, as does a list, map or text without a bound (the cost of CEL rules is worked out
from bounds). Which rules the server has: reference/operator.md, section E.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]

LIST_TYPE, LIST_KEYS = "x-kubernetes-list-type", "x-kubernetes-list-map-keys"
OPAQUE, INT_OR_STRING = "x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string"
VALIDATIONS = "x-kubernetes-validations"

_ALWAYS = {"type", "title", "description", "default"}
_ALLOWED = {
    "string": {"minLength", "maxLength", "pattern", "enum", "const", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set[str](),
    "array": {"items", "minItems", "maxItems", LIST_TYPE, LIST_KEYS},
    "object": {"properties", "required", "additionalProperties", "propertyNames", "minProperties", "maxProperties"},
}
_OPEN_ENUM_LENGTH = 64
_NOT_RE2 = re.compile(r"\(\?<?[=!]|\\[1-9]")


class SchemaError(Exception):
    """A type that has no structural schema, with its path."""


@dataclass(frozen=True)
class _At:
    """Where the conversion is, and what holds there."""

    path: str
    defs: Mapping[str, Schema]
    defaults: bool
    """Whether the server fills in what is left out."""
    closed: bool
    """Whether a word must be one of those known today."""
    inside: tuple[str, ...] = ()
    """Names of the types round this one."""

    def down(self, step: str) -> "_At":
        return replace(self, path=f"{self.path}{step}".removeprefix("."))

    def refuse(self, words: str) -> SchemaError:
        return SchemaError(f"{self.path or 'the type'}: {words}")


def structural(model: type[BaseModel], *, path: str = "", defaults: bool = True, closed: bool = True) -> Schema:
    """The type's schema; raises ``SchemaError``.

    Beneath a field that may be None nothing is filled in: it would make what was left out look written. Without
    ``closed`` an enumeration is any short text, so that an older schema takes a newer word.
    """
    root = model.model_json_schema(by_alias=True)
    defs = root.pop("$defs", {})
    return _node(root, _At(path, defs, defaults, closed))


def _node(schema: Schema, at: _At) -> Schema:
    schema = dict(schema)
    if schema.pop(OPAQUE, False):
        return {**_described(schema, at), OPAQUE: True}
    if "$ref" in schema:
        name = str(schema.pop("$ref")).rsplit("/", 1)[-1]
        if name in at.inside:
            raise at.refuse(f"{name} holds itself")
        return _node({**at.defs[name], **schema}, replace(at, inside=(*at.inside, name)))
    if "anyOf" in schema:
        return _union(schema, at)
    kind = schema.get("type")
    if kind not in _ALLOWED:
        raise at.refuse(f"the type {kind} is not known here")
    if unknown := schema.keys() - _ALWAYS - _ALLOWED[kind]:
        raise at.refuse(f"{', '.join(sorted(unknown))} cannot stand in a structural schema of type {kind}")
    made = {"string": _string, "array": _array, "object": _object}.get(kind, _number)(schema, at)
    return {"type": kind, **_described(schema, at), **_default(schema, made, at), **made}


def _described(schema: Schema, at: _At) -> Schema:
    """The docstring: a line for each paragraph, code in single quotes as kubectl's own descriptions have it.

    The default stands there too, whoever fills it in: ``kubectl explain`` shows no other.
    """
    if "description" not in schema:
        return {}
    paragraphs = re.split(r"\n\s*\n", schema["description"].strip())
    text = "\n".join(" ".join(p.split()) for p in paragraphs).replace("``", "`")
    value = schema.get("default")
    if not at.closed or value is None or isinstance(value, dict) or value in ([], ""):
        return {"description": text}
    shown = f"[{', '.join(value)}]" if isinstance(value, list) else value
    return {"description": f"{text} Default: {shown if isinstance(shown, str) else json.dumps(shown)}."}


# ---------------------------------------------------------------- unions


def _union(schema: Schema, at: _At) -> Schema:
    """``X | None`` is X; a number or words, true or false or words; anything else has no structural schema."""
    members = [_resolved(member, at) for member in schema.pop("anyOf")]
    present = [member for member in members if member.get("type") != "null"]
    if len(present) < len(members) and schema.pop("default", None) is not None:
        raise at.refuse("what may be None is None by default")
    if len(present) == 1:
        inner = at if len(members) == 1 else replace(at, defaults=False)
        return _node({**present[0], **schema}, inner)
    if unknown := schema.keys() - _ALWAYS:
        raise at.refuse(f"{', '.join(sorted(unknown))} cannot stand beside a union")
    words = [member for member in present if member.get("type") == "string"]
    others = [_node(member, at) for member in present if member not in words]
    kinds = [other.get("type") for other in others]
    if words and kinds == ["integer"]:
        made = {
            INT_OR_STRING: True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            **{key: value for key, value in others[0].items() if key in _ALLOWED["integer"]},
            "pattern": "|".join(_pattern(member, at) for member in words),
            "maxLength": max(_longest(member, at) for member in words),
        }
    elif words and kinds == ["boolean"] and all("const" in word or "enum" in word for word in words):
        # No type is both: an untyped value, held to a list of what it may be.
        made = {OPAQUE: True, "enum": [True, False, *(choice for word in words for choice in _words(word))]}
    else:
        raise at.refuse(f"a union of {' and '.join(str(m.get('type', 'object')) for m in present)} is not structural")
    return {**_described(schema, at), **_default(schema, made, at), **made}


def _resolved(schema: Schema, at: _At) -> Schema:
    """Without a reference to a plain type; one to an object stays, for its name guards against recursion."""
    target = at.defs.get(str(schema.get("$ref", "")).rsplit("/", 1)[-1], {})
    return {**target, **{k: v for k, v in schema.items() if k != "$ref"}} if "enum" in target else schema


def _words(member: Schema) -> list[Any]:
    return list(member["enum"]) if "enum" in member else [member["const"]]


def _pattern(member: Schema, at: _At) -> str:
    if "const" in member or "enum" in member:
        return f"^({'|'.join(re.escape(word) for word in _words(member))})$"
    if "pattern" not in member:
        raise at.refuse("text in a union needs a pattern, or a list of words")
    return str(_string(member, at)["pattern"])


def _longest(member: Schema, at: _At) -> int:
    if "const" in member or "enum" in member:
        return max(map(len, _words(member)))
    return int(_string(member, at)["maxLength"])


# ---------------------------------------------------------------- types


def _kept(schema: Schema, *keys: str) -> Schema:
    return {key: schema[key] for key in keys if key in schema}


def _number(schema: Schema, at: _At) -> Schema:
    made = _kept(schema, "minimum", "maximum")
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in schema:
            made |= {bound: schema[exclusive], exclusive: True}
    return {**made, **({"format": "int64"} if schema["type"] == "integer" else {})}


def _string(schema: Schema, at: _At) -> Schema:
    if "const" in schema or "enum" in schema:
        return {"enum": _words(schema)} if at.closed else {"maxLength": _OPEN_ENUM_LENGTH}
    made = _kept(schema, "minLength", "maxLength", "pattern", "format")
    if made.get("format", "date-time") != "date-time":
        raise at.refuse(f"the format {made['format']} is not known here")
    if "maxLength" not in made and "format" not in made:
        raise at.refuse("text needs a max_length")
    if _NOT_RE2.search(made.get("pattern", "")):
        raise at.refuse(f"the pattern {made['pattern']} is none for Go, which knows no lookaround or back-reference")
    return made


def _array(schema: Schema, at: _At) -> Schema:
    if "maxItems" not in schema:
        raise at.refuse("a list needs a max_length")
    if "items" not in schema:
        raise at.refuse("a list needs a type for its items")
    made = _kept(schema, "minItems", "maxItems")
    kind = schema.get(LIST_TYPE, "atomic")
    keys = {LIST_KEYS: schema[LIST_KEYS]} if kind == "map" else {}
    return {**made, LIST_TYPE: kind, **keys, "items": _node(schema["items"], at.down("[]"))}


def _object(schema: Schema, at: _At) -> Schema:
    if "properties" not in schema:
        return _map(schema, at)
    if schema.get("additionalProperties", False) is not False:
        raise at.refuse("an object has fields of its own or free ones, not both")
    made = {name: _node(child, at.down(f".{name}")) for name, child in schema["properties"].items()}
    return {**({"required": schema["required"]} if "required" in schema else {}), "properties": made}


def _map(schema: Schema, at: _At) -> Schema:
    values = schema.get("additionalProperties", False)
    if values is True:  # dict[str, Any]: nobody looks inside
        return {OPAQUE: True}
    if "maxProperties" not in schema:
        raise at.refuse("a map needs a max_length")
    made = _kept(schema, "minProperties", "maxProperties")
    made["additionalProperties"] = _node(values or {}, at.down(".*"))
    if rules := _key_rules(_resolved(schema.get("propertyNames", {}), at), at):
        if OPAQUE in made["additionalProperties"]:
            raise at.refuse("CEL cannot see a map of untyped values: leave its keys free")
        made[VALIDATIONS] = rules
    return made


def _key_rules(names: Schema, at: _At) -> list[Schema]:
    """What must hold for a map's keys: structural schemas have no ``propertyNames``, so CEL says it."""
    if not names:
        return []
    made = _string(names, at)
    if words := made.get("enum"):
        listed = ", ".join(f"'{word}'" for word in words)
        return [{"rule": f"self.all(key, key in [{listed}])", "message": f"keys are {', '.join(words)}"}]
    rules = []
    if "maxLength" in made:
        low, high = made.get("minLength", 0), made["maxLength"]
        bounds = f"size(key) >= {low} && size(key) <= {high}" if low else f"size(key) <= {high}"
        rules.append({"rule": f"self.all(key, {bounds})", "message": f"keys have {low} to {high} characters"})
    if "pattern" in made:
        rule = f"self.all(key, key.matches({made['pattern']!r}))"
        rules.append({"rule": rule, "message": f"keys match {made['pattern']}"})
    return rules


# ---------------------------------------------------------------- defaults


def _default(schema: Schema, made: Schema, at: _At) -> Schema:
    """The default that the server fills in. An empty one says nothing that absence does not say."""
    value = schema.get("default")
    if not at.defaults or value is None or value in ([], {}, ""):
        return {}
    if "properties" not in made:
        return {"default": value}
    # The fields fill themselves in once the object is there. Nulls inside a default would be refused.
    filled = {name: child["default"] for name, child in made["properties"].items() if "default" in child}
    if _written(value) != _written(_filled(made)):
        raise at.refuse("the default of an object must be what its fields have by default")
    return {"default": {}} if filled else {}


def _filled(made: Schema) -> Schema:
    """What ``{}`` becomes."""
    return {
        name: _filled(child) if "properties" in child else child["default"]
        for name, child in made["properties"].items()
        if "default" in child
    }


def _written(value: Any) -> Any:
    """Without what is empty."""
    if not isinstance(value, dict):
        return value
    inner = {name: _written(item) for name, item in value.items()}
    return {name: item for name, item in inner.items() if item is not None and item not in ([], {}, "")}
