"""The CustomResourceDefinition, made from the types: ``python -m finetune_api.crd [PATH...]`` writes it.

It carries the digest of its schema as an annotation. An operator with another digest asks ``lacks`` what the served
schema does not know yet: the API server would drop such fields without a word.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from finetune_api.crd_rules import add_rules
from finetune_api.crd_schema import Schema, structural
from finetune_api.status import JobStatus
from finetune_api.types import API_VERSION, KIND, FineTuneJobSpec, Metadata

GROUP, VERSION = API_VERSION.split("/")
PLURAL = "finetunejobs"
DIGEST = "finetune.dev/schema-digest"
"""The annotation with the digest of the schema."""

_ROOT = Path(__file__).resolve().parents[2]
PATH = _ROOT / "manifests/crd/finetunejobs.yaml"
CHART = _ROOT / "charts/finetune-operator"
_HEADER = "# Written by `python -m finetune_api.crd` from api/finetune_api: change the types, not this file.\n"
_COLUMNS = [
    {"name": "Stage", "type": "string", "jsonPath": ".status.stage"},
    {"name": "Progress", "type": "string", "jsonPath": ".status.progress"},
    {"name": "ETA", "type": "string", "jsonPath": ".status.eta"},
    {"name": "Status", "type": "string", "jsonPath": ".status.summary"},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
]


def schema() -> Schema:
    """The schema of the whole object."""
    spec = structural(FineTuneJobSpec, path="spec")
    add_rules(spec)
    # Of metadata only the name may be restricted; a rule at the root could not say which field is wrong.
    name = structural(Metadata, path="metadata", defaults=False)["properties"]["name"]
    return {
        "type": "object",
        "description": spec["description"],
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": API_VERSION},
            "kind": {"type": "string", "description": KIND},
            "metadata": {"type": "object", "properties": {"name": name}},
            "spec": spec,
            "status": structural(JobStatus, path="status", defaults=False, closed=False),
        },
    }


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition."""
    made = schema()
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}", "annotations": {DIGEST: digest(made)}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["ftj"],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": _COLUMNS,
                    "schema": {"openAPIV3Schema": made},
                }
            ],
        },
    }


def digest(schema: Schema) -> str:
    """The same for the same schema, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(schema, sort_keys=True).encode()).hexdigest()[:16]


def lacks(served: Mapping[str, Any]) -> list[str]:
    """What the served CustomResourceDefinition does not know of this one: paths of fields, and words of enumerations.

    Empty for a newer one, whose additions an older operator need not know.
    """
    if served["metadata"].get("annotations", {}).get(DIGEST) == digest(own := schema()):
        return []
    versions = {version["name"]: version["schema"]["openAPIV3Schema"] for version in served["spec"]["versions"]}
    return list(_missing(versions[VERSION], own, "")) if VERSION in versions else [API_VERSION]


def _missing(served: Mapping[str, Any], own: Mapping[str, Any], path: str) -> Iterator[str]:
    for word in own.get("enum", []) if "enum" in served else []:
        if word not in served["enum"]:
            yield f"{path}: {word}"
    for name, child in own.get("properties", {}).items():
        here = f"{path}.{name}".removeprefix(".")
        if name in served.get("properties", {}):
            yield from _missing(served["properties"][name], child, here)
        else:
            yield here
    for key, step in (("items", "[]"), ("additionalProperties", ".*")):
        if isinstance(own.get(key), Mapping):
            yield from _missing(served.get(key, {}), own[key], path + step)


def text() -> str:
    """The file, byte for byte the same for the same types."""
    return _HEADER + yaml.dump(crd(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes every value out: equal lists are not the same list to a reader."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def main(paths: list[str]) -> None:
    """Write the file to the paths, or to where this repository keeps it: manifests and, once it is there, the chart."""
    kept = [PATH, *([CHART / "files/finetunejobs.yaml"] if CHART.is_dir() else [])]
    for path in map(Path, paths) if paths else kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
