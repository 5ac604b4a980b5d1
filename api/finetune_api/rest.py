"""A broken job without its wrong fields, so that rules beyond the schema can be checked on the others all the same.

Works on what YAML decodes to. Where a required field is wrong something harmless stands in for it; what a rule then
says about that field only follows from the mistake, and the caller leaves it out.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

from finetune_api.pipeline import BLOCKS
from finetune_api.types import API_VERSION, IMATRIX_TYPES, KIND, BuiltinReward, GGUFType

Keys = tuple[int | str, ...]
"""The way to a field: ``("spec", "pipeline", 0, "sft")``."""

_REQUIRED: Mapping[str, Any] = {
    "apiVersion": API_VERSION,
    "kind": KIND,
    "metadata": {"name": "unnamed"},
    "spec": {"model": {"source": "hf://unnamed/unnamed"}, "data": {}, "storage": {"bucket": "unnamed"}},
}


def pipeline_stands(obj: Any, wrong: Iterable[Keys]) -> bool:
    """Whether it is still known what every stage does: no block, method or ``from`` is among the wrong fields."""
    for keys in wrong:
        if keys == ("spec",):
            return False
        if keys[:2] != ("spec", "pipeline"):
            continue
        if len(keys) < 4 or keys[3] == "from" or keys[-1] == "method":
            return False
        if len(keys) == 4 and keys[3] in BLOCKS:
            return False
        # An unknown field beside a block is only that; without a block it may be the block, misspelt.
        stage = obj["spec"]["pipeline"][keys[2]]
        if not any(stage.get(name) is not None for name in BLOCKS):
            return False
    return True


def without(obj: Mapping[str, Any], wrong: Iterable[Keys]) -> dict[str, Any]:
    """A copy without the wrong fields. A data source without an address, or a reward without a name, is left out as a
    whole."""
    rest: dict[str, Any] = json.loads(json.dumps(obj))
    cuts = {keys[:-1] if _names_an_entry(keys) else keys for keys in wrong if keys}
    outermost = [keys for keys in cuts if not any(keys[:n] in cuts for n in range(1, len(keys)))]
    # From the back, so that the entries of a list keep their numbers until their turn.
    for keys in sorted(outermost, key=lambda keys: [str(key).zfill(8) for key in keys], reverse=True):
        if len(keys) == 4 and keys[:2] == ("spec", "pipeline") and keys[3] == "name":
            _rename(rest["spec"]["pipeline"], cast(int, keys[2]))
        else:
            _remove(rest, keys)
    _fill(rest, _REQUIRED)
    stages = rest["spec"].get("pipeline")
    for stage in stages if isinstance(stages, list) else []:
        quantize = stage.get("quantize") if isinstance(stage, dict) else None
        if isinstance(quantize, dict) and not quantize.get("gguf"):
            # Which types are meant is not known; none of those that would ask for rows.
            quantize["gguf"] = [str(name) for name in GGUFType if name not in IMATRIX_TYPES]
        reinforced = stage.get("rl") if isinstance(stage, dict) else None
        if isinstance(reinforced, dict) and not reinforced.get("rewards"):
            reinforced["rewards"] = [{"builtin": str(BuiltinReward.LENGTH)}]
    return rest


def _names_an_entry(keys: Keys) -> bool:
    """Without this field, the entry of the list that it stands in says nothing."""
    rewards = keys[-3:-2] == ("rewards",) and keys[-1] in ("stage", "builtin")
    return (keys[-1] == "source" or rewards) and isinstance(keys[-2], int)


def sources_of(rest: Mapping[str, Any]) -> dict[str, Any]:
    """The same job with nothing in its spec but model, data and storage, and a pipeline that nobody wrote."""
    spec = {name: rest["spec"][name] for name in ("model", "data", "storage")}
    return {**rest, "spec": {**spec, "pipeline": [{"name": "unnamed", "merge": {}}]}}


def _rename(stages: list[Any], index: int) -> None:
    """A name that holds, for a stage and for those that start from it or are rewarded by it."""
    old, new = stages[index].get("name"), f"stage-{index}"
    stages[index]["name"] = new
    for stage in stages:
        if isinstance(stage, dict) and old is not None and stage.get("from") == old:
            stage["from"] = new
        rewards = (stage.get("rl") or {}).get("rewards") if isinstance(stage, dict) else None
        for reward in rewards if isinstance(rewards, list) else []:
            if isinstance(reward, dict) and old is not None and reward.get("stage") == old:
                reward["stage"] = new


def _remove(obj: Any, keys: Keys) -> None:
    for key in keys[:-1]:
        if isinstance(obj, dict) and key not in obj:
            return
        obj = obj[key]
    if isinstance(obj, list):
        del obj[cast(int, keys[-1])]
    elif isinstance(obj, dict):
        obj.pop(keys[-1], None)


def _fill(obj: dict[str, Any], required: Mapping[str, Any]) -> None:
    for name, value in required.items():
        if name not in obj:
            obj[name] = json.loads(json.dumps(value))
        elif isinstance(value, Mapping) and isinstance(obj[name], dict):
            _fill(obj[name], value)
