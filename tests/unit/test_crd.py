import json
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field
from tests.badspecs import REFUSED_BY_THE_SERVER, SEEN_BY_PLAN_ONLY, named
from tests.builders import broken

from finetune_api import crd
from finetune_api.crd_rules import OWN_BLOCKS, blocks
from finetune_api.crd_schema import Schema, SchemaError, structural
from finetune_api.types import TrainingBlock
from finetune_api.validate import InvalidSpec, parse
from finetune_cli.manifest import load_text
from finetune_operator.plan.rules import check

SPEC = crd.schema()["properties"]["spec"]
STATUS = crd.schema()["properties"]["status"]


class Base(BaseModel):
    """As the API's own types."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Colour(StrEnum):
    """Some words."""

    RED = "red"
    BLUE = "blue"


Text = Annotated[str, Field(max_length=9)]


class Inner(Base):
    """What ``Inner`` is."""

    size: Annotated[int, Field(ge=1, le=5)] = 2
    """How large."""
    note: Text | None = None


class Outer(Base):
    """Everything that converts."""

    inner: Inner = Inner()
    """This field's own
    words.

    And more."""
    maybe: Inner | None = None
    entries: Annotated[list[Inner], Field(max_length=3)] = []
    above: Annotated[float, Field(gt=0, lt=1)] = 0.5
    colour: Colour = Colour.RED
    one: Literal["a"] = "a"
    when: datetime | None = None
    either: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    switch: bool | Literal["auto"] = "auto"
    by_word: Annotated[dict[Colour, Text], Field(max_length=2)] = {}
    by_name: Annotated[dict[Text, bool], Field(max_length=2)] = {}
    free: dict[str, Any] | None = None
    figure: Annotated[int | str, Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})] = 0


INNER = {
    "type": "object",
    "properties": {
        "size": {
            "type": "integer",
            "description": "How large. Default: 2.",
            "default": 2,
            "minimum": 1,
            "maximum": 5,
            "format": "int64",
        },
        "note": {"type": "string", "maxLength": 9},
    },
}
UNFILLED = {
    **INNER,
    "properties": {
        **INNER["properties"],  # type: ignore[dict-item]
        "size": {
            "type": "integer",
            "description": "How large. Default: 2.",
            "minimum": 1,
            "maximum": 5,
            "format": "int64",
        },
    },
}
CONVERTED: dict[str, Schema] = {
    "inner": {"description": "This field's own words.\nAnd more.", "default": {}, **INNER},
    "maybe": {"description": "What `Inner` is.", **UNFILLED},
    "entries": {
        "type": "array",
        "maxItems": 3,
        "x-kubernetes-list-type": "atomic",
        "items": {"description": "What `Inner` is.", **INNER},
    },
    "above": {
        "type": "number",
        "default": 0.5,
        "minimum": 0,
        "exclusiveMinimum": True,
        "maximum": 1,
        "exclusiveMaximum": True,
    },
    "colour": {"type": "string", "description": "Some words. Default: red.", "default": "red", "enum": ["red", "blue"]},
    "one": {"type": "string", "default": "a", "enum": ["a"]},
    "when": {"type": "string", "format": "date-time"},
    "either": {
        "default": "auto",
        "x-kubernetes-int-or-string": True,
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "minimum": 1,
        "pattern": "^(auto)$",
        "maxLength": 4,
    },
    "switch": {"default": "auto", "x-kubernetes-preserve-unknown-fields": True, "enum": [True, False, "auto"]},
    "by_word": {
        "type": "object",
        "maxProperties": 2,
        "additionalProperties": {"type": "string", "maxLength": 9},
        "x-kubernetes-validations": [
            {"rule": "self.all(key, key in ['red', 'blue'])", "message": "keys are red, blue"}
        ],
    },
    "by_name": {
        "type": "object",
        "maxProperties": 2,
        "additionalProperties": {"type": "boolean"},
        "x-kubernetes-validations": [
            {"rule": "self.all(key, size(key) <= 9)", "message": "keys have 0 to 9 characters"}
        ],
    },
    "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
    "figure": {"x-kubernetes-preserve-unknown-fields": True},
}


@pytest.mark.parametrize("name", CONVERTED)
def test_a_type_becomes_its_structural_schema(name: str) -> None:
    """References are inlined, the field's own words win, and each shape is said as the API server takes it."""
    assert structural(Outer)["properties"][name] == CONVERTED[name]


def test_the_table_has_every_field() -> None:
    """No field of the test's type is left unlooked at."""
    assert CONVERTED.keys() == Outer.model_fields.keys()


def test_without_defaults_and_closed_words() -> None:
    """As status has it: nothing is filled in, and a word that a newer operator writes is taken."""
    made = structural(Outer, defaults=False, closed=False)["properties"]
    assert made["colour"] == {"type": "string", "description": "Some words.", "maxLength": 64}
    assert made["inner"]["properties"]["size"]["description"] == "How large."
    assert "default" not in json.dumps(made)


class Recursive(Base):
    """Holds itself."""

    child: "Recursive | None" = None


def of(kind: Any, **field: Any) -> type[BaseModel]:
    """A type with one field, ``f``."""
    namespace = {"__annotations__": {"f": kind}, "__module__": __name__, **field}
    return type("Made", (Base,), namespace)


REFUSED: dict[str, tuple[type[BaseModel], str]] = {
    "text without bound": (of(str), "f: text needs a max_length"),
    "list without bound": (of(list[bool]), "f: a list needs a max_length"),
    "map without bound": (of(dict[str, bool]), "f: a map needs a max_length"),
    "text in a list": (of(Annotated[list[str], Field(max_length=2)]), r"f\[\]: text needs a max_length"),
    "anything": (of(Any), "f: the type None is not known here"),
    "null alone": (of(None), "f: the type null is not known here"),
    "set": (of(Annotated[set[bool], Field(max_length=2)]), "f: uniqueItems cannot stand"),
    "tuple": (of(tuple[bool, bool]), "f: prefixItems cannot stand"),
    "multiple": (of(Annotated[int, Field(multiple_of=2)]), "f: multipleOf cannot stand"),
    "bytes": (of(Annotated[bytes, Field(max_length=2)]), "f: the format binary is not known here"),
    "union of types": (of(Inner | Outer), "f: a union of object and object is not structural"),
    "number or text": (of(float | Literal["auto"]), "f: a union of number and string is not structural"),
    "number or any text": (of(int | Text), "f: text in a union needs a pattern"),
    "true or any text": (of(bool | Text), "f: a union of boolean and string is not structural"),
    "lookaround": (
        of(Annotated[str, Field(max_length=2, json_schema_extra={"pattern": "^(?!a)"})]),
        "f: the pattern .* is none for Go",
    ),
    "examples": (of(Annotated[bool, Field(examples=[True])]), "f: examples cannot stand"),
    "deprecated": (of(Annotated[bool, Field(deprecated=True)]), "f: deprecated cannot stand"),
    "recursion": (Recursive, "child: Recursive holds itself"),
    "keys beside untyped values": (
        of(Annotated[dict[Text, bool | Literal["auto"]], Field(max_length=2)]),
        "f: CEL cannot see a map of untyped values",
    ),
    "a default beside None": (of(bool | None, f=True), "f: what may be None is None by default"),
    "another default": (of(Inner, f=Inner(size=3)), "f: the default of an object must be what its fields have"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_structural_schema_is_refused_with_its_path(name: str) -> None:
    """Nothing is passed on in the hope that the server takes it: it drops some of these without a word."""
    kind, words = REFUSED[name]
    with pytest.raises(SchemaError, match=words):
        structural(kind)


def nodes(schema: Schema, path: str = "") -> list[tuple[str, Schema]]:
    """Every schema inside, with its path."""
    children = {f"{path}.{name}": child for name, child in schema.get("properties", {}).items()}
    children |= {f"{path}[]": schema["items"]} if "items" in schema else {}
    children |= {f"{path}.*": schema["additionalProperties"]} if "additionalProperties" in schema else {}
    return [(path, schema), *(node for name, child in children.items() for node in nodes(child, name))]


def at(schema: Schema, path: str) -> Schema:
    """The schema at that path."""
    return dict(nodes(schema))[path]


def test_the_committed_file_is_what_the_types_give(tmp_path: Path) -> None:
    """Whoever changes a type also writes the file anew; here, and in the chart once it is there."""
    crd.main([str(tmp_path / "made" / "crd.yaml")])
    made = (tmp_path / "made" / "crd.yaml").read_bytes()
    kept = [crd.PATH, *crd.CHART.glob("files/finetunejobs.yaml")]
    assert [path.read_bytes() == made for path in kept] == [True] * len(kept), "run `python -m finetune_api.crd`"


def test_client_side_apply_can_hold_it() -> None:
    """``kubectl apply`` keeps a copy in an annotation, which takes 256 KiB."""
    assert len(json.dumps(crd.crd())) < 2**18


def test_every_field_is_described() -> None:
    """``kubectl explain`` has a sentence for whatever a user may write or read."""
    undescribed = [
        path
        for schema in (SPEC, STATUS)
        for path, node in nodes(schema)
        if "description" not in node and not path.endswith(("[]", ".*"))
    ]
    assert undescribed == []


def test_defaults_stand_only_where_they_do_not_look_written() -> None:
    """Beneath a stage's block, or whatever else may be left out, the server fills in nothing."""
    filled = {path for path, node in nodes(SPEC) if "default" in node}
    beneath = tuple(f".pipeline[].{name}." for name in blocks())
    assert [path for path in filled if path.startswith((*beneath, ".evaluation.resources.", ".template."))] == []
    assert {".seed", ".suspend", ".evaluation", ".evaluation.gates.maxRegression", ".pipeline[].retries"} <= filled
    assert at(SPEC, ".seed")["default"] == 42


def test_status_promises_nothing_that_would_bind_a_newer_operator() -> None:
    """No enumerations, no defaults, no floats, every text bounded; entries are told apart by their names."""
    for path, node in nodes(STATUS):
        assert not {"enum", "default"} & node.keys(), path
        assert node.get("type") != "number", path
        assert node.get("type") != "string" or {"maxLength", "format"} & node.keys(), path
    keys = {
        path: node["x-kubernetes-list-map-keys"] for path, node in nodes(STATUS) if "x-kubernetes-list-map-keys" in node
    }
    assert keys == {".conditions": ["type"], ".stages": ["name"], ".artifacts": ["stage", "name"]}


def test_every_block_of_a_method_has_its_rule() -> None:
    """A block that may be left out of a training block belongs to methods, which the rule names."""
    optional = {
        field.alias or name
        for name, field in TrainingBlock.model_fields.items()
        if type(None) in getattr(field.annotation, "__args__", ())
    }
    assert optional == OWN_BLOCKS.keys()


def test_lists_of_bad_specs_are_long_enough_and_differ() -> None:
    """The tables on both sides hold what they promise."""
    every = [repr(entry) for entry in (*REFUSED_BY_THE_SERVER, *SEEN_BY_PLAN_ONLY)]
    assert len(REFUSED_BY_THE_SERVER) >= 60
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("entry", REFUSED_BY_THE_SERVER, ids=named)
def test_plan_names_the_one_place_that_is_wrong(entry: tuple[Any, ...]) -> None:
    """One mistake, one message, with its path; tests/engine holds the real server to the same paths."""
    with pytest.raises(InvalidSpec) as caught:
        load_text(json.dumps(broken(entry[0], entry[1])), Path("/"))
    assert [error.path for error in caught.value.errors] == [entry[-1] if len(entry) > 2 else entry[0]]


@pytest.mark.parametrize("entry", SEEN_BY_PLAN_ONLY, ids=named)
def test_rules_see_what_no_schema_can_say(entry: tuple[Any, ...]) -> None:
    """The operator refuses these with the same words as ``finetune plan``."""
    job = parse(broken(entry[0], entry[1]))
    assert [error.path for error in check(job, cluster=True)] == [entry[-1] if len(entry) > 2 else entry[0]]


def test_an_older_schema_lacks_fields_and_words_and_a_newer_one_nothing() -> None:
    """The operator waits for what it would otherwise lose without a word, and for nothing else."""
    own = crd.crd()
    assert crd.lacks(own) == []
    older = json.loads(json.dumps(own))
    older["metadata"]["annotations"] = {}
    assert crd.lacks(older) == []
    spec = older["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    del spec["properties"]["seed"]
    del spec["properties"]["pipeline"]["items"]["properties"]["sft"]["properties"]["lora"]
    spec["properties"]["pipeline"]["items"]["properties"]["quantize"]["properties"]["gguf"]["items"]["enum"].remove(
        "F16"
    )
    spec["properties"]["later"] = {"type": "boolean"}
    assert crd.lacks(older) == ["spec.seed", "spec.pipeline[].sft.lora", "spec.pipeline[].quantize.gguf[]: F16"]
    older["spec"]["versions"][0]["name"] = "v1"
    assert crd.lacks(older) == ["finetune.dev/v1alpha1"]
