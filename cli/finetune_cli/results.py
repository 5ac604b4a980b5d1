"""Which committed files a user means by a name. Pure."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetune_api.defaults import FOLDED, PROMPTED
from finetune_api.pipeline import LORA, ModelRef, kind, lora_ggufs, model_before, training_block
from finetune_api.stage import File, Manifest
from finetune_api.types import BASE, FineTuneJobSpec, Method
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


@dataclass(frozen=True)
class OverBase:
    """A stage's adapter as a GGUF, and a GGUF of the model that it was trained on."""

    adapter: Wanted
    weights: str
    """Whose model that is: ``base``'s or a stage's."""
    base: Wanted | None
    """None: the job made none."""


def over_base(spec: FineTuneJobSpec, manifests: Sequence[Manifest], name: str, of_type: str = "") -> OverBase:
    """What ``chat --adapter NAME`` loads: that stage's adapter, laid over the base's GGUF of that type, else Q4_K_M,
    else the first. CommandError (64) says how to make what there is not.
    """
    known = {called: (m, artifact) for m in manifests for called, artifact in _adapters(spec, m).items()}
    if name not in known:
        there = f"there is: {', '.join(known)}" if known else "the job made none"
        trains = any(stage.name == name and training_block(stage) for stage in spec.pipeline)
        mend = f"; merge {name}, and write `loraGGUF: true` in the quantize stage after it" if trains else ""
        raise CommandError(f"no adapter of {name!r} as a GGUF ({there}){mend}", INVALID)
    manifest, artifact = known[name]
    weights = model_before(spec, model_before(spec, manifest.stage).weights).weights
    bases = [
        Wanted(one.file, f"{made.stage}/{one.path}")  # stages that convert the base and a merge of it call files alike
        for made in manifests
        if kind(spec, made.stage) == "quantize" and model_before(spec, made.stage) == ModelRef(weights)
        for one in _artifacts(made, [a.name for a in made.artifacts if not of_type or a.name == of_type])
        if one.path.endswith(".gguf")
    ]
    bases.sort(key=lambda one: "Q4_K_M" not in one.path)
    return OverBase(_artifacts(manifest, [artifact])[0], weights, bases[0] if bases else None)


def _adapters(spec: FineTuneJobSpec, manifest: Manifest) -> dict[str, str]:
    """Artifacts of adapters by what a user calls them: their stage, and their checkpoint."""
    named = lora_ggufs(spec, manifest.stage) if kind(spec, manifest.stage) == "quantize" else {}
    made = {artifact.name for artifact in manifest.artifacts}
    called = {str(source.stage) if a == LORA else a.removeprefix(f"{LORA}-"): a for a, source in named.items()}
    return {name: artifact for name, artifact in called.items() if artifact in made}


def tuned(spec: FineTuneJobSpec, manifests: Sequence[Manifest]) -> list[Manifest]:
    """Without stages that only convert the base model, if there are others."""
    converts = [m for m in manifests if kind(spec, m.stage) == "quantize"]
    own = [m for m in converts if model_before(spec, m.stage) != ModelRef(BASE)]
    return [m for m in manifests if m in own or m not in converts] if own else list(manifests)


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
