"""The chart as tests see it: its values with what their comments say, and what Helm and kustomize make of it."""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster import binaries
from tests.cluster.fixtures import cannot_run

ROOT = Path(__file__).parents[1]
CHART = ROOT / "charts/finetune-operator"
NAMESPACE = "finetune-system"
NAME = "finetune-operator"
"""Of the release, and so of its objects."""
Object = dict[str, Any]


@dataclass(frozen=True)
class Value:
    """A row of the README's table."""

    path: str
    default: object
    comment: str

    @property
    def row(self) -> str:
        """As Markdown."""
        return f"| `{self.path}` | `{json.dumps(self.default)}` | {self.comment} |"


def values() -> list[Value]:
    """Every value with a comment, in order. A map with a comment is one value, whatever is in it."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    return list(_values(defaults, _comments(), ()))


def _values(at: Object, comments: dict[tuple[str, ...], str], path: tuple[str, ...]) -> Iterator[Value]:
    for key, value in at.items():
        here = (*path, key)
        if here in comments:
            yield Value(".".join(here), value, comments[here])
        elif isinstance(value, dict) and value:
            yield from _values(value, comments, here)
        else:
            raise ValueError(f"values.yaml: {'.'.join(here)} has no comment")


def _comments() -> dict[tuple[str, ...], str]:
    """The comment above each key of values.yaml."""
    found: dict[tuple[str, ...], str] = {}
    path: list[str] = []
    comment = ""
    for line in (CHART / "values.yaml").read_text().splitlines():
        text = line.strip()
        if text.startswith("#"):
            comment = f"{comment} {text.removeprefix('#').strip()}".strip()
            continue
        if text:
            path = [*path[: (len(line) - len(line.lstrip())) // 2], text.partition(":")[0]]
            if comment:
                found[tuple(path)] = comment
        comment = ""
    return found


def tool(name: str) -> Path:
    """A program of ``tests/cluster``, if it is built: that takes minutes, which no unit test should.

    Else the test is skipped; in CI it is built.
    """
    path = binaries._path(binaries.BY_NAME[name])
    if not path.exists() and os.environ.get("CI") != "true":
        pytest.skip(f"{name} is not built: python -m tests.cluster build {name}")
    try:
        return binaries.binary(name)
    except binaries.MissingToolError as missing:
        cannot_run(str(missing))
        raise


def helm(*arguments: str, kubeconfig: Path | None = None) -> str:
    """What helm printed; without a kubeconfig it knows of no cluster.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    return _run([str(tool("helm")), *arguments], kubeconfig)


def rendered(changed: Object | None = None, *, name: str = NAME) -> str:
    """What Helm makes with these values, by dotted path, over the defaults."""
    return helm("template", name, str(CHART), f"--namespace={NAMESPACE}", *flags(changed or {}))


def template(changed: Object | None = None, *, name: str = NAME) -> list[Object]:
    """The objects in it."""
    return objects(rendered(changed, name=name))


def kustomize(directory: str) -> list[Object]:
    """The objects that ``kubectl apply -k`` would apply, of a directory below ``manifests``."""
    return objects(_run([str(tool("kubectl")), "kustomize", str(ROOT / "manifests" / directory)], None))


def flags(changed: Object) -> list[str]:
    """For helm, values by dotted path: ``{"crd.install": False}``."""
    return [f"--set-json={path}={json.dumps(value)}" for path, value in changed.items()]


def objects(text: str) -> list[Object]:
    """The objects of a YAML stream."""
    # In C: the CustomResourceDefinition is long, and Python's own loader takes a second for it.
    return [obj for obj in yaml.load_all(text, Loader=yaml.CSafeLoader) if obj]


def only(among: list[Object], kind: str) -> Object:
    """The one of that kind. Raises ValueError if there is none, or another."""
    [found] = [obj for obj in among if obj["kind"] == kind]
    return found


def environment(made: list[Object], **pod: str) -> dict[str, str]:
    """The variables of the operator's container; those that the kubelet would fill in are in ``pod``."""
    container = only(made, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "finetune_operator"]
    return {item["name"]: item["value"] for item in container["env"] if "value" in item} | pod


def _run(command: list[str], kubeconfig: Path | None) -> str:
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig or os.devnull)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout
