"""Where the base model comes from.

A model of this machine (``file://``, ``package://``) becomes part of ``prepare``'s result. One of the hub or of a
bucket stays where it is: its commit or its ETags are recorded in ``base.json``, and every stage fetches exactly that.
"""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from finetune_api.types import ModelSource, Storage
from finetune_jobs import anatomy
from finetune_jobs.remote import Objects, commit_of, fetch_object, hub_error, open_objects, parse_hub, sha256, token
from finetune_jobs.run.errors import ConfigurationError, InputMissingError
from finetune_jobs.store.client import ObjectInfo, Store
from finetune_jobs.vocabulary import add_tokens

FIELD = "spec.model.source"
_SMALL = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *(
        "chat_template*",
        "*.jinja",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "*.model",
        "*.tiktoken",
        "*.safetensors.index.json",
    ),
)
_WEIGHTS = ("*.safetensors",)
_NEVER = ("consolidated*", "*/*")
"""The same weights once more in the layout of their maker; variants for other runtimes in sub-folders."""


@dataclass(frozen=True)
class Base:
    """The resolved base model."""

    directory: Path
    """Configuration and tokenizer with the job's chat template; the weights too if ``stored``."""
    record: dict[str, Any]
    """``base.json``: equal records mean equal models, wherever they came from."""
    origin: dict[str, Any]
    """For people: source, revision, size."""
    stored: bool
    """The directory is to be committed with prepare's result."""


def resolve(model: ModelSource, storage: Storage, directory: Path) -> Base:
    """Find the model and bring here what ``prepare`` needs of it: all of a local one, else all but the weights.

    ``directory`` must not exist. Raises InputMissingError for what is not there, ConfigurationError (naming the field)
    for what cannot be used.
    """
    source = model.source
    if source.startswith("hf://"):
        base = _resolve_hub(model, directory)
    elif source.startswith("s3://"):
        base = _resolve_objects(model, storage, directory)
    else:
        base = _resolve_local(model, directory)
    return base


def is_local(model: ModelSource) -> bool:
    """The model's files are on this machine."""
    return model.source.startswith(("file://", "package://"))


def check_local(model: ModelSource) -> None:
    """Refuse, as ``resolve`` will, a model of this machine whose files cannot be a base model; others pass."""
    if is_local(model):
        path = _local_path(model.source)
        if path.is_dir():
            _model_files(path, model.trust_remote_code)
            anatomy.read_config(path)
        else:
            from finetune_jobs.gguf.metadata import read

            with _named():
                read(path)


def bytes_to_copy(model: ModelSource, workspace: Path) -> int:
    """Disk that bringing the model into the workspace takes: nothing where a hard link will do."""
    path = _local_path(model.source) if is_local(model) else None
    if path is None:
        return 0
    if path.is_file():
        return 4 * path.stat().st_size  # 16 bits a weight, mostly from 4 or more
    files = _model_files(path, model.trust_remote_code)
    linked = path.stat().st_dev == workspace.stat().st_dev and not model.add_tokens
    return 0 if linked else sum(file.stat().st_size for file in files)


def fingerprint(model: ModelSource, storage: Storage) -> str:
    """Changes when, and only when, the model may have; cheap but for reading local files once."""
    source = model.source
    if source.startswith("hf://"):
        return commit_of(parse_hub(source, FIELD), FIELD)
    if source.startswith("s3://"):
        found = open_objects(source, storage, FIELD).found
        return ",".join(
            f"{name}:{info.etag}:{info.size}" for name, info in found if _needed(name, model.trust_remote_code)
        )
    path = _local_path(source)
    files = [path] if path.is_file() else _model_files(path, model.trust_remote_code)
    return ",".join(f"{file.name}:{sha256(file)}" for file in files)


def fetch(record: Mapping[str, Any], directory: Path, storage: Storage) -> Path:
    """The whole model that a ``base.json`` of kind hub or s3 stands for, in ``directory``; what is there already is
    kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if record["kind"] == "hub":
        for file in _snapshot(record["repository"], record["revision"], record["trustRemoteCode"], weights=True):
            link = directory / file.name
            if not link.exists():
                link.symlink_to(file.resolve())
    else:
        objects = recorded_objects(record, storage)
        for name, info in objects.found:
            if not (directory / name).exists():
                fetch_object(objects.store, info, directory / name)
    _write_template(directory, record["chatTemplate"])
    done = directory.with_name(f"{directory.name}.tokens-added")
    if record.get("addTokens") and not done.exists():
        add_tokens(directory, record["addTokens"])
        done.touch()
    return directory


def recorded_objects(record: Mapping[str, Any], storage: Storage) -> Objects:
    """Those that a ``base.json`` of kind s3 stands for."""
    store = Store.of(storage.model_copy(update={"bucket": record["bucket"], "prefix": ""}))
    found = ((item["name"], ObjectInfo(item["key"], item["sizeBytes"], item["etag"])) for item in record["objects"])
    return Objects(store, tuple(found))


def _resolve_hub(model: ModelSource, directory: Path) -> Base:
    repository = parse_hub(model.source, FIELD)
    if repository.kind != "model":
        raise ConfigurationError(f"{FIELD}: {model.source!r} is a data set, not a model")
    commit = commit_of(repository, FIELD)
    names, size = _hub_listing(model, commit)
    _require_weights(names)
    directory.mkdir(parents=True)
    for file in _snapshot(repository.name, commit, model.trust_remote_code, weights=False):
        shutil.copyfile(file, directory / file.name)
    _finish(directory, model)
    record = {
        "kind": "hub",
        "repository": repository.name,
        "revision": commit,
        "trustRemoteCode": model.trust_remote_code,
        "chatTemplate": model.chat_template,
        "weightBytes": size,
        **_added(model),
    }
    return Base(directory, record, {"source": model.source, "revision": commit, "weightBytes": size}, stored=False)


def _hub_listing(model: ModelSource, commit: str) -> tuple[list[str], int]:
    from huggingface_hub import HfApi

    repository = parse_hub(model.source, FIELD)
    try:
        info = HfApi(token=token()).model_info(repository.name, revision=commit, files_metadata=True)
    except Exception as error:
        raise hub_error(error, repository, FIELD) from error
    files = {s.rfilename: s.size or 0 for s in info.siblings or []}
    weights = [name for name in files if _needed(name, False) and fnmatch(name, "*.safetensors")]
    return list(files), sum(files[name] for name in weights)


def _snapshot(repository: str, commit: str, trust_remote_code: bool, *, weights: bool) -> list[Path]:
    from huggingface_hub import snapshot_download

    patterns = [*_SMALL, *(_WEIGHTS if weights else ()), *(("*.py",) if trust_remote_code else ())]
    try:
        place = snapshot_download(
            repository, revision=commit, allow_patterns=patterns, ignore_patterns=list(_NEVER), token=token()
        )
    except Exception as error:
        raise hub_error(error, parse_hub(f"hf://{repository}@{commit}", FIELD), FIELD) from error
    return sorted(p for p in Path(place).iterdir() if p.is_file())


def _resolve_objects(model: ModelSource, storage: Storage, directory: Path) -> Base:
    objects = open_objects(model.source, storage, FIELD)
    names = [name for name, _ in objects.found]
    if len(names) == 1 and names[0].endswith(".gguf"):
        raise ConfigurationError(
            f"{FIELD}: a single .gguf can be a base model from file:// or package:// only, not from {model.source}"
        )
    _require_weights(names)
    kept = [(name, info) for name, info in objects.found if _needed(name, model.trust_remote_code)]
    for name, info in kept:
        if not fnmatch(name, "*.safetensors"):
            fetch_object(objects.store, info, directory / name)
    directory.mkdir(parents=True, exist_ok=True)
    _finish(directory, model)
    size = sum(info.size for name, info in kept if fnmatch(name, "*.safetensors"))
    record = {
        "kind": "s3",
        "bucket": objects.store.bucket,
        "objects": [{"name": name, "key": i.key, "sizeBytes": i.size, "etag": i.etag} for name, i in kept],
        "trustRemoteCode": model.trust_remote_code,
        "chatTemplate": model.chat_template,
        "weightBytes": size,
        **_added(model),
    }
    return Base(directory, record, {"source": model.source, "weightBytes": size}, stored=False)


def _resolve_local(model: ModelSource, directory: Path) -> Base:
    path = _local_path(model.source)
    origin: dict[str, Any] = {"source": model.source}
    if path.is_file():
        from finetune_jobs.gguf.readback import read_back

        origin["sha256"] = sha256(path)
        with _named():
            read_back(path, directory)
    else:
        directory.mkdir(parents=True)
        for file in _model_files(path, model.trust_remote_code):
            _link(file, directory / file.name)
    _finish(directory, model)
    files = sorted(p for p in directory.iterdir())
    listed = [{"name": p.name, "sizeBytes": p.stat().st_size, "sha256": sha256(p)} for p in files]
    size = sum(p.stat().st_size for p in files if p.suffix == ".safetensors")
    record = {"kind": "store", "files": listed, "trustRemoteCode": model.trust_remote_code, "weightBytes": size}
    return Base(directory, record, {**origin, "weightBytes": size}, stored=True)


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Put the field before what the reader says, which also reads GGUFs that no field names."""
    try:
        yield
    except InputMissingError as error:
        raise InputMissingError(f"{FIELD}: {error}; copy the file again") from error


def _local_path(source: str) -> Path:
    scheme, _, rest = source.partition("://")
    if scheme == "file":
        path = Path(rest)
    elif scheme == "package":
        package, _, inside = rest.partition("/")
        path = _package_directory(package) / inside
    else:
        raise ConfigurationError(f"{FIELD}: must begin with hf://, s3://, file:// or package://, got {source!r}")
    if not path.exists():
        raise InputMissingError(f"{FIELD}: {source}: there is no {path}")
    if path.is_file() and path.suffix != ".gguf":
        raise ConfigurationError(f"{FIELD}: {path.name} is one file but no .gguf; name the folder that holds the model")
    return path


def _package_directory(package: str) -> Path:
    """Where a package's files are, without running any of its code."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputMissingError(
            f"{FIELD}: the Python package {package!r} is not installed here; install it beside finetunejob"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _model_files(path: Path, trust_remote_code: bool) -> list[Path]:
    names = sorted(p.name for p in path.iterdir() if p.is_file())
    ggufs = [n for n in names if n.endswith(".gguf")]
    if ggufs and "config.json" not in names:
        raise ConfigurationError(
            f"{FIELD}: {path} holds GGUFs, no Hugging Face model; name one of them, such as {path / ggufs[0]}"
        )
    if "config.json" not in names:
        adapter = "adapter_config.json" in names
        words = (
            "is an adapter, not a model; name its base model"
            if adapter
            else "has no config.json, so it is no Hugging Face model"
        )
        raise InputMissingError(f"{FIELD}: {path} {words}")
    _require_weights(names)
    return [path / name for name in names if _needed(name, trust_remote_code)]


def _needed(name: str, trust_remote_code: bool) -> bool:
    wanted = (*_SMALL, *_WEIGHTS, *(("*.py",) if trust_remote_code else ()))
    return any(fnmatch(name, p) for p in wanted) and not any(fnmatch(name, p) for p in _NEVER)


def _require_weights(names: Iterable[str]) -> None:
    present = [n for n in names if "/" not in n]
    if not any(_needed(n, False) and fnmatch(n, "*.safetensors") for n in present):
        old = any(fnmatch(n, "*.bin") or fnmatch(n, "*.pt*") for n in present)
        words = (
            "only weights of the pickle kind; load the model once with transformers and save it again"
            if old
            else "no weights"
        )
        raise InputMissingError(f"{FIELD}: the model has {words} (*.safetensors are needed)")


def _link(file: Path, link: Path) -> None:
    """A second name for the file where that is possible, else a copy."""
    try:
        os.link(file.resolve(), link)
    except OSError:
        shutil.copyfile(file, link)


def _finish(directory: Path, model: ModelSource) -> None:
    """Change what is here of the model as the job says."""
    _write_template(directory, model.chat_template)
    if model.add_tokens:
        add_tokens(directory, model.add_tokens)


def _added(model: ModelSource) -> dict[str, Any]:
    return {"addTokens": model.add_tokens} if model.add_tokens else {}


def _write_template(directory: Path, template: str) -> None:
    if template:
        target = directory / "chat_template.jinja"
        target.unlink(missing_ok=True)  # it may be a link to the source's own file
        target.write_text(template, encoding="utf-8")
