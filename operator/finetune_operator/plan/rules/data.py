"""Rules on where models and rows come from."""

import difflib
import re
from collections import Counter
from collections.abc import Iterator

from finetune_api.columns import STANDARD
from finetune_api.pipeline import data_of
from finetune_api.types import Data, DataSource, FineTuneJobSpec, Preference, Reward, Rl, Sft
from finetune_api.validate import FieldError, suggest
from finetune_operator.plan.rules.walk import stages, trainings

_NAME = r"[A-Za-z0-9][-._A-Za-z0-9]*"
_REVISION = r"(@[-._/A-Za-z0-9]+)?"
_BUCKET = r"[a-z0-9][-.a-z0-9]{2,62}"
_MODEL = {
    "hf": (rf"{_NAME}/{_NAME}{_REVISION}", "hf://org/name or hf://org/name@revision"),
    "s3": (rf"{_BUCKET}/.+", "s3://bucket/prefix"),
    "file": (r".+", "file:///folder or file:///model.gguf"),
    "package": (r"[A-Za-z_][A-Za-z0-9_]*/.+", "package://python_package/path"),
}
_ROWS = {
    "s3": (rf"{_BUCKET}/.+", "s3://bucket/key.jsonl"),
    # What follows the name is a configuration or a file: hf://datasets/openai/gsm8k/main.
    "hf": (rf"datasets/{_NAME}(/{_NAME})+{_REVISION}", "hf://datasets/org/name or hf://datasets/org/name@revision"),
    "configmap": (r"[a-z0-9][-.a-z0-9]{0,252}/[-._A-Za-z0-9]{1,253}", "configmap://name/train.jsonl"),
    "file": (r".+", "file://data/train.jsonl"),
}
"""By scheme: what comes after ``://``, and how to say it."""
_ROLES = {Sft: "train", Preference: "preference", Reward: "preference", Rl: "prompts"}
"""What each block learns from."""
_ENDINGS = (".jsonl", ".json", ".parquet", ".csv")


def shared_roles(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """The locked rows are the whole job's: scores of one stage on rows of its own could not be compared."""
    for index, stage in enumerate(spec.pipeline):
        for role in ("test", "general", "refusals"):
            if getattr(stage.data, role):
                yield FieldError(
                    f"spec.pipeline[{index}].data.{role}", f"is the same for the whole job: move it to spec.data.{role}"
                )


def training_rows(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Every training stage has rows of its kind."""
    told: set[str] = set()
    for _, stage, training in trainings(spec):
        role = _ROLES[type(training)]
        # Looked up alone: names may be doubled, and each of the two stages has its own data.
        rows = data_of(spec.model_copy(update={"pipeline": [stage]}), stage.name)
        if role not in told and not getattr(rows, role):
            told.add(role)
            yield FieldError(f"spec.data.{role}", f"is required: stage `{stage.name}` trains on it")


def test_rows(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """The evaluation has rows to lock."""
    trained_on = any(stage.sft for stage in spec.pipeline)
    if not (spec.evaluation.skip or spec.data.test or spec.data.train or trained_on):
        mend = "give some, or write `evaluation: {skip: true}`"
        yield FieldError("spec.data.test", f"is required: without train rows there are none to lock for scores: {mend}")


def addresses(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A source has a scheme we know, and that scheme's shape."""
    yield from _address("spec.model.source", spec.model.source, _MODEL, "hf://")
    for path, entry in _sources(spec):
        yield from _address(path, entry.source, _ROWS, "hf://datasets/")


def endings(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """A data file's name tells what it holds."""
    for path, entry in _sources(spec):
        source = entry.source
        name = source.rpartition("/")[2]
        plain = name.removesuffix(".gz")
        if (
            source.startswith(("s3://", "file://", "configmap://"))
            and "." in plain.lstrip(".")
            and not plain.endswith(_ENDINGS)
        ):
            known = ", ".join(_ENDINGS)
            yield FieldError(path, f"`{name}` is not read: {known} are, each also with .gz; a folder ends with /")


def columns(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """``columns`` names standard columns, and a column of the file's stands for one of them."""
    for path, entry in _sources(spec):
        where = path.removesuffix("source") + "columns"
        taken = Counter(entry.columns.values())
        for standard, own in entry.columns.items():
            if standard not in STANDARD:
                known = sorted(STANDARD)
                mend = suggest(standard, known) or f"; write `standard: yours`, standard being {', '.join(known)}"
                yield FieldError(f"{where}.{standard}", f"is no standard column{mend}")
            elif taken[own] > 1:
                names = " and ".join(name for name, other in entry.columns.items() if other == own)
                yield FieldError(f"{where}.{standard}", f"{names} are both read from `{own}`: give each its own column")


def reachable_from_pods(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Pods cannot see the user's disk."""
    rows = ((path, entry.source) for path, entry in _sources(spec))
    for path, source in [("spec.model.source", spec.model.source), *rows]:
        if source.startswith(("file://", "package://")):
            scheme = source.partition("://")[0]
            yield FieldError(path, f"{scheme}:// is on your machine, where no pod can read: upload it, write s3://…")


def reachable_from_here(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """Without a cluster there are no ConfigMaps."""
    for path, entry in _sources(spec):
        if entry.source.startswith("configmap://"):
            yield FieldError(path, "configmap:// is of a cluster: without one write file://")


def _sources(spec: FineTuneJobSpec) -> Iterator[tuple[str, DataSource]]:
    for path, data in [("spec.data", spec.data), *((f"{path}.data", stage.data) for path, stage in stages(spec))]:
        for role in Data.model_fields:
            for index, entry in enumerate(getattr(data, role)):
                yield f"{path}.{role}[{index}].source", entry


def _address(path: str, source: str, shapes: dict[str, tuple[str, str]], hub: str) -> Iterator[FieldError]:
    scheme, separator, rest = source.partition("://")
    if not source.isprintable():
        yield FieldError(path, f"holds a character that cannot be seen: {source.encode('unicode_escape').decode()}")
    elif not separator or scheme not in shapes:
        *known, last = [f"{name}://" for name in shapes]
        words = f'must begin with {", ".join(known)} or {last}, got "{source}"'
        yield FieldError(path, words + _mend_scheme(source, hub, [*known, last]))
    elif not re.fullmatch(shapes[scheme][0], rest):
        owned = scheme == "hf" and not rest.startswith("datasets/")
        a_data_set = owned and shapes is _ROWS and re.fullmatch(f"{_NAME}(/{_NAME})?{_REVISION}", rest)
        mend = f": write hf://datasets/{rest}" if a_data_set else ""
        yield FieldError(path, f'must look like {shapes[scheme][1]}, got "{source}"{mend}')


def _mend_scheme(source: str, hub: str, known: list[str]) -> str:
    scheme, separator, rest = source.partition("://")
    if not separator:
        if source.startswith(("/", ".")) or source.endswith((*_ENDINGS, ".gz", ".gguf")):
            return f": write file://{source}"
        return f": write {hub}{source}" if re.fullmatch(f"{_NAME}/{_NAME}{_REVISION}", source) else ""
    if page := re.match(r"huggingface\.co/(?:datasets/)?([^/]+/[^/]+)", rest):
        return f": write {hub}{page[1]}"
    if scheme in ("http", "https"):
        return ": download it and write file://"
    near = difflib.get_close_matches(f"{scheme.lower()}://", known, n=1, cutoff=0.75)
    return f": write {near[0]}{rest}" if near else ""
