"""Which committed files a user means by a name. Pure."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetune_api.defaults import FOLDED, PROMPTED
from finetune_api.pipeline import kind, training_block
from finetune_api.stage import File, Manifest
from finetune_api.types import FineTuneJobSpec, Method
from finetune_cli.errors import INVALID, CommandError


@dataclass(frozen=True)
class Wanted:
    """A committed file and where it belongs, relative to the folder that the user named."""

    file: File
    path: str


def select(spec: FineTuneJobSpec, manifests: Sequence[Manifest], names: Iterable[str]) -> list[Wanted]:
    """The files behind each name, by default every GGUF with its Modelfile.

    A name is an artifact's (``Q4_K_M``), a stage's (all that it left), a file or folder that a stage left (``adapter``,
    ``model``, ``evidence``; the last stage that has one), or one of these behind a stage and a slash (``sft/adapter``).
    ``manifests`` are in the order of running. CommandError (64) names what there is.
    """
    names = list(names)
    if names:
        found = [wanted for name in names for wanted in _named(manifests, name)]
    else:
        found = [
            w
            for m in manifests
            if kind(spec, m.stage) == "quantize"
            for w in _artifacts(m, [a.name for a in m.artifacts])
        ]
        if not found:
            there = ", ".join(available(manifests)) or "nothing"
            if any(stage.quantize for stage in spec.pipeline):
                raise CommandError(f"this job has no GGUF yet; there is: {there}")
            raise CommandError(f"this job makes no GGUF{_reader(spec)}; pull by name what there is: {there}")
    unique = list({(w.file.key, w.path): w for w in found}.values())
    stage_of = {file.key: manifest.stage for manifest in manifests for file in manifest.files}
    owners: dict[str, set[str]] = {}
    for wanted in unique:
        owners.setdefault(wanted.path.partition("/")[0], set()).add(stage_of[wanted.file.key])
    # Two stages may leave files or folders of one name; then each goes into a folder of its stage.
    return [
        Wanted(w.file, f"{stage_of[w.file.key]}/{w.path}") if len(owners[w.path.partition("/")[0]]) > 1 else w
        for w in unique
    ]


def _reader(spec: FineTuneJobSpec) -> str:
    """Who can run the last adapter, where it can never become one."""
    methods = {s.name: b.method for s in spec.pipeline if (b := training_block(s)) and b.method is not Method.FULL}
    name, method = next(reversed(methods.items()), ("", Method.LORA))
    if method in FOLDED:
        return ""
    library = "PEFT" if method in PROMPTED else "`finetune_jobs.tuned`"
    return f": {method} changes no weights, and {name}/adapter runs on its base with transformers and {library}"


def available(manifests: Sequence[Manifest]) -> list[str]:
    """Every name that ``select`` takes, but the paths inside folders."""
    names: dict[str, None] = {}
    for manifest in manifests:
        names |= {f"{manifest.stage}/{name}": None for name in _tops(manifest)}
    return list(names)


def _tops(manifest: Manifest) -> list[str]:
    return list(
        dict.fromkeys([*(a.name for a in manifest.artifacts), *(f.path.partition("/")[0] for f in manifest.files)])
    )


def _named(manifests: Sequence[Manifest], name: str) -> list[Wanted]:
    stage, _, inside = name.partition("/")
    for manifest in reversed(manifests):
        if manifest.stage == stage:
            found = _inside(manifest, inside) if inside else _all(manifest)
            if found:
                return found
    for manifest in reversed(manifests):
        if found := _inside(manifest, name):
            return found
    there = available(manifests)
    shorts = [n.partition("/")[2] for n in there] + [m.stage for m in manifests]
    near = difflib.get_close_matches(name, [*there, *shorts], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there is: {', '.join(there) or 'nothing yet'}"
    raise CommandError(f"no artifact {name!r}; {hint}", INVALID)


def _inside(manifest: Manifest, name: str) -> list[Wanted]:
    if any(a.name == name for a in manifest.artifacts):
        return _artifacts(manifest, [name])
    # A folder comes with its name, so that two of them do not mix.
    return [Wanted(f, f.path) for f in manifest.files if f.path == name or f.path.startswith(f"{name}/")]


def _artifacts(manifest: Manifest, names: Sequence[str]) -> list[Wanted]:
    keys = [
        a.uri.removeprefix("s3://").partition("/")[2] for name in names for a in manifest.artifacts if a.name == name
    ]
    return [Wanted(f, f.path.rpartition("/")[2]) for key in keys for f in manifest.files if f.key == key]


def _all(manifest: Manifest) -> list[Wanted]:
    return [Wanted(f, f"{manifest.stage}/{f.path}") for f in manifest.files]
