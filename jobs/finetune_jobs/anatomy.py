"""Can the base model be worked with? What its configuration, its tokenizer and the headers of its weight files tell."""

import difflib
import inspect
import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from finetune_api.types import Lora, PrefixTuning
from finetune_jobs.run.errors import ConfigurationError, InputMissingError

FIELD = "spec.model.source"
_LONGEST_HEADER = 100_000_000
"""Bytes, by the rule of the safetensors format."""


def load_config(directory: Path, *, trust_remote_code: bool) -> Any:
    """The model's configuration. Refuses, in words, what no stage could work with."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    raw = read_config(directory)
    model_type = raw["model_type"]
    if quantized := raw.get("quantization_config"):
        method = (
            quantized.get("quant_method", "an unknown method") if isinstance(quantized, dict) else "an unknown method"
        )
        raise ConfigurationError(
            f"{FIELD}: the weights are quantized already ({method}); use the original 16-bit model, `method: qlora` "
            "quantizes it while training"
        )
    remote = "AutoModelForCausalLM" in (raw.get("auto_map") or {})
    if model_type not in CAUSAL and not remote:
        raise ConfigurationError(
            f"{FIELD}: a model of type {model_type!r} does not continue text (no causal language model); choose another"
        )
    if model_type not in CAUSAL and not trust_remote_code:
        raise ConfigurationError(
            f"spec.model.trustRemoteCode: the model brings Python code of its own ({model_type!r}); read it, then set "
            "this to true"
        )
    try:
        return AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ConfigurationError(f"{FIELD}: config.json cannot be used: {_words(error)}") from error


def _words(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` as it stands."""
    try:
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputMissingError(f"{FIELD}: the model has no config.json") from None
    except ValueError as error:
        raise InputMissingError(f"{FIELD}: config.json is damaged: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ConfigurationError(f"{FIELD}: config.json does not say which model_type this is")
    return raw


def check_weights(directory: Path, parameters: int) -> None:
    """Every shard is there and whole, and together they have (nearly) as many numbers as the model has parameters."""
    index = directory / "model.safetensors.index.json"
    shards = sorted(directory.glob("*.safetensors"))
    if index.exists():
        try:
            listed = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputMissingError(f"{FIELD}: {index.name} is damaged; copy the model again") from error
        if missing := sorted(listed - {p.name for p in shards}):
            raise InputMissingError(
                f"{FIELD}: {missing[0]} is missing ({len(missing)} of {len(listed)} weight files); copy the model again"
            )
        shards = [p for p in shards if p.name in listed]
    numbers = sum(_numbers_in(path) for path in shards)
    if numbers < 0.99 * parameters:
        raise InputMissingError(
            f"{FIELD}: the weight files hold {numbers:,} of the model's {parameters:,} parameters; copy the model again"
        )


def header_of(path: Path) -> bytes:
    """The JSON at the beginning of a safetensors file."""
    with path.open("rb") as content:
        return content.read(header_length(content.read(8), path.stat().st_size, path.name))


def header_length(first: bytes, size: int, name: str) -> int:
    """Bytes of the JSON that follows the ``first`` eight of a safetensors file; refuses what cannot be."""
    length = int(struct.unpack("<Q", first)[0]) if len(first) == 8 else size
    if length > min(size - 8, _LONGEST_HEADER):
        raise InputMissingError(f"{FIELD}: {name} is no safetensors file, or cut short; copy the model again")
    return length


def _numbers_in(path: Path) -> int:
    """Numbers in a safetensors file, from its header; refuses a file that is shorter than the header says."""
    header = header_of(path)
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        end = max((int(tensor["data_offsets"][1]) for tensor in tensors), default=0)
        numbers = sum(prod(map(int, tensor["shape"])) for tensor in tensors)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputMissingError(f"{FIELD}: {path.name} is no safetensors file; copy the model again") from error
    if 8 + len(header) + end > path.stat().st_size:
        raise InputMissingError(f"{FIELD}: {path.name} is cut short; copy the model again")
    return numbers


@dataclass(frozen=True)
class Anatomy:
    """What the architecture looks like, without weights."""

    parameters: int
    """Tied ones once."""
    linear: list[str]
    """Full names of the modules that LoRA can change."""
    turned: list[str]
    """Those of them that keep their weight as (in, out): GPT-2's."""
    modules: list[str]
    """Full names of all modules with weights, those inside of others too."""
    biased: list[str]
    """Full names of those that have a bias of their own."""
    window: int | None
    """Tokens that the shortest-sighted layers look back; None where all see everything."""
    vocabulary: int
    """Rows of the embedding."""
    tied: bool
    """Embedding and output head are one matrix."""


def anatomy(config: Any, *, trust_remote_code: bool = False) -> Anatomy:
    """Build the model on torch's meta device: all names and shapes, no memory. Refuses, in words, an architecture that
    no stage could work with.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    auto: Any = AutoModelForCausalLM  # from_config has no types

    paired = bool(config.is_encoder_decoder)  # before a decoder without its encoder overwrites it
    try:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ConfigurationError(f"{FIELD}: config.json describes no model: {_words(error)}") from error
    if words := _unfit(model, config, paired=paired):
        raise ConfigurationError(f"{FIELD}: a model of type {config.model_type!r} {words}; choose another")
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    linear = linear_layers(model)
    turned = [name for name in linear if isinstance(model.get_submodule(name), Conv1D)]
    modules = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    biased = [
        name for name, module in model.named_modules() if isinstance(getattr(module, "bias", None), torch.nn.Parameter)
    ]
    text = config.get_text_config()
    tied = bool(getattr(text, "tie_word_embeddings", False))
    window = getattr(text, "sliding_window", None)
    parameters = sum(p.numel() for p in model.parameters())
    if tied and head is not None and head.weight is not embedding.weight:
        parameters -= head.weight.numel()
    return Anatomy(parameters, linear, turned, modules, biased, window, int(embedding.weight.shape[0]), tied)


def linear_layers(model: Any) -> list[str]:
    """Full names of the modules that an adapter can change: all linear ones but the output head."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]


def _unfit(model: Any, config: Any, *, paired: bool) -> str:
    """Why answers cannot be generated in batches with a cache of attention keys and values, nor sequences packed; empty
    for a model made of attention alone.
    """
    takes = inspect.signature(model.forward).parameters
    # An encoder with an output head says so in `is_decoder`; a decoder of a pair counts padding in its positions.
    if paired or ("encoder_hidden_states" in takes and getattr(config, "is_decoder", None) is False):
        return "is an encoder, or works only together with one, so it cannot be taught to continue text"
    if getattr(model, "_is_stateful", False) or _has_states(config):
        return "keeps a running state (Mamba, linear attention or convolutions), which no stage here can work with yet"
    if "past_key_values" not in takes:
        return "has no cache of attention keys and values, which no stage here can work without"
    return "" if model.get_output_embeddings() is not None else "has no output head over the vocabulary"


def _has_states(config: Any) -> bool:
    from transformers import DynamicCache

    try:
        return any(DynamicCache(config=config).is_linear)
    except (AttributeError, KeyError, ValueError):  # an architecture that brings a cache of its own
        return False


def _called(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def wrong_targets(targets: Iterable[str], body: Anatomy, where: str) -> Iterator[str]:
    """For every name of ``lora.targetModules`` that is not the end of a linear layer's name: so, and the nearest."""
    ends = sorted({name.rpartition(".")[2] for name in body.linear})
    for target in targets:
        if target == "all-linear" or any(_called(n, target) for n in body.linear):
            continue
        near = difflib.get_close_matches(target, ends, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        yield f"{where}: the model has no linear layer {target!r}{hint} It has {', '.join(ends)}; or use [all-linear]"


def wrong_modules(names: Iterable[str], body: Anatomy, where: str) -> Iterator[str]:
    """The same for ``lora.modulesToSave``, of all modules."""
    ends = sorted({name.rpartition(".")[2] for name in body.modules})
    for name in names:
        if any(_called(n, name) for n in body.modules):
            continue
        near = difflib.get_close_matches(name, ends, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        words = ", ".join(end for end in ends if not end.isdecimal())
        yield f"{where}: the model has no module {name!r}{hint} It has {words}"


def wrong_bias(lora: Lora, body: Anatomy, where: str) -> Iterator[str]:
    """So, where ``lora.bias`` finds no biases to train."""
    if lora.bias == "none":
        return
    targets = lora.target_modules
    adapted = [n for n in body.linear if "all-linear" in targets or any(_called(n, target) for target in targets)]
    if not (body.biased if lora.bias == "all" else set(adapted) & set(body.biased)):
        whose = "the model has" if lora.bias == "all" else "its adapted layers have"
        yield f"{where}: {whose} no biases to train; write none"


def wrong_prefix(prefix: PrefixTuning, body: Anatomy, where: str) -> Iterator[str]:
    """So, where layers look back over fewer tokens than the prefix has."""
    if body.window is not None and body.window <= prefix.virtual_tokens:
        yield (
            f"{where}: layers of this model look {body.window} tokens back, over fewer than {prefix.virtual_tokens} "
            "of a prefix and the text; write fewer, or `method: promptTuning` or lora"
        )


def check_tokenizer(tokenizer: Any, directory: Path, body: Anatomy) -> None:
    """Its ids fit the embedding, and the library reads ``tokenizer.json`` as its maker meant it
    (transformers#45488).
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= body.vocabulary:
        raise ConfigurationError(
            f"{FIELD}: the tokenizer has ids up to {largest}, but the embedding has {body.vocabulary} rows; this is "
            "another model's tokenizer"
        )
    file = directory / "tokenizer.json"
    if file.exists():
        from tokenizers import Tokenizer

        meant = Tokenizer.from_file(str(file)).encode(_PROBE, add_special_tokens=False).ids
        read = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        if meant != read:
            raise ConfigurationError(
                f"{FIELD}: transformers reads this tokenizer otherwise than tokenizer.json says ({len(read)} against "
                f"{len(meant)} ids for a test "
                "sentence), so every text would be learned wrongly; set tokenizer_class to PreTrainedTokenizerFast in "
                "tokenizer_config.json"
            )


_PROBE = "The 3 naïve cafés cost 1,234.50 €: 你好, привет!\n\tif x == 10:  return 'ok'"
