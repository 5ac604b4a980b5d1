"""Names, types and shapes of a base model's weights, wherever these are: the beginning of every safetensors file.

The format: eight bytes tell the length of the JSON behind them (https://huggingface.co/docs/safetensors).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_api.types import Storage
from finetune_jobs import anatomy
from finetune_jobs.models import FIELD, Base, recorded_objects
from finetune_jobs.remote import hub_error, parse_hub, read_range, token

_LENGTH = 8


def fetch(base: Base, storage: Storage) -> dict[str, bytes]:
    """By file, its header; the weights themselves stay where they are."""
    match base.record["kind"]:
        case "hub":
            return _of_hub(base.record["repository"], base.record["revision"])
        case "s3":
            return _of_objects(base.record, storage)
        case _:
            return {path.name: anatomy.header_of(path) for path in sorted(base.directory.glob("*.safetensors"))}


def write_hollow(headers: Mapping[str, bytes], directory: Path) -> None:
    """Files of the sizes that they promise, with nothing behind their headers: enough for whom shapes are enough.

    They take next to no room on disk.
    """
    for name, header in headers.items():
        ends = [entry["data_offsets"][1] for key, entry in json.loads(header).items() if key != "__metadata__"]
        with (directory / name).open("wb") as file:
            file.write(len(header).to_bytes(_LENGTH, "little") + header)
            file.truncate(_LENGTH + len(header) + max(ends, default=0))


def _of_objects(record: Mapping[str, Any], storage: Storage) -> dict[str, bytes]:
    objects = recorded_objects(record, storage)
    found = {}
    for name, info in objects.found:
        if name.endswith(".safetensors"):
            first = read_range(objects.store, info, 0, _LENGTH - 1)
            length = anatomy.header_length(first, info.size, name)
            found[name] = read_range(objects.store, info, _LENGTH, _LENGTH + length - 1)
    return found


def _of_hub(repository: str, revision: str) -> dict[str, bytes]:
    from huggingface_hub import HfApi, errors

    try:
        files = HfApi(token=token()).get_safetensors_metadata(repository, revision=revision).files_metadata
    except errors.NotASafetensorsRepoError:  # by the usual names; whatever is there, transformers will look for it
        return {}
    except Exception as error:
        raise hub_error(error, parse_hub(f"hf://{repository}@{revision}", FIELD), FIELD) from error
    found = {name: {tensor: _entry(info) for tensor, info in file.tensors.items()} for name, file in files.items()}
    return {name: json.dumps(entries).encode() for name, entries in found.items()}


def _entry(info: Any) -> dict[str, Any]:
    return {"dtype": info.dtype, "shape": info.shape, "data_offsets": list(info.data_offsets)}
