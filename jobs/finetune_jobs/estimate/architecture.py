"""A decoder's weights, tensor by tensor, from its configuration; checked against transformers' own models by a test."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.defaults import resolve_added, resolve_lora
from finetune_api.types import IA3, Bottleneck, Lora, PrefixTuning, PromptTuning, TrainingBlock


@dataclass(frozen=True)
class Linear:
    """A linear layer that stands once in every block."""

    name: str
    """The last part of its module's name: ``q_proj``."""
    inputs: int
    outputs: int
    bias: bool = False


@dataclass(frozen=True)
class Architecture:
    """What the estimates need to know of a model."""

    layers: int
    hidden: int
    intermediate: int
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together; the values' too."""
    vocabulary: int
    tied: bool
    """The output head is the embedding."""
    linears: tuple[Linear, ...]
    """Of one block."""
    vectors: int
    """Elements of norms, over the whole model."""

    @property
    def linear_parameters(self) -> int:
        """Weights of all blocks' linear layers: what LoRA adapts and qlora stores in 4 bits."""
        return self.layers * sum(linear.inputs * linear.outputs for linear in self.linears)

    @property
    def biases(self) -> int:
        """Elements of all linear layers' biases."""
        return self.layers * sum(linear.outputs for linear in self.linears if linear.bias)

    @property
    def embedding_parameters(self) -> int:
        """Embedding, and the output head where it is a tensor of its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All, tied ones once."""
        return self.linear_parameters + self.biases + self.embedding_parameters + self.vectors


@dataclass(frozen=True)
class _Family:
    """How an architecture differs from Llama's. Defaults are those that its ``config.json`` may leave out."""

    fused: bool = False
    """One tensor for q, k and v, one for gate and up (Phi-3)."""
    norms: int = 2
    """Per block, of the model's width."""
    head_norms: str = ""
    """Norms on queries and keys: of one ``head``, or over ``all`` of them."""
    qkv_bias: bool = False
    head_dim: int | None = None
    tied: bool = False


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(),
    "granite": _Family(),
    "smollm3": _Family(tied=True),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(head_norms="head", head_dim=128),
    "olmo2": _Family(head_norms="all"),
    "gemma": _Family(head_dim=256, tied=True),
    "gemma2": _Family(norms=4, head_dim=256, tied=True),
    "gemma3_text": _Family(norms=4, head_norms="head", head_dim=256, tied=True),
    "phi3": _Family(fused=True),
}


def read(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a ``config.json`` describes.

    Raises ValueError for a family that is not known here, or a configuration without its sizes.
    """
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise ValueError(f"no estimate for model_type {config.get('model_type')!r}; known: {', '.join(_FAMILIES)}")
    try:
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        layers, heads, vocabulary = (
            int(config[key]) for key in ("num_hidden_layers", "num_attention_heads", "vocab_size")
        )
    except KeyError as missing:
        raise ValueError(f"the model's configuration has no {missing.args[0]}") from None
    head = int(config.get("head_dim") or family.head_dim or hidden // heads)
    queries, keys = heads * head, int(config.get("num_key_value_heads") or heads) * head
    on_heads = {"": 0, "head": 2 * head, "all": queries + keys}[family.head_norms]
    return Architecture(
        layers=layers,
        hidden=hidden,
        intermediate=inner,
        queries=queries,
        keys=keys,
        vocabulary=vocabulary,
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        linears=_linears(config, family, hidden, inner, queries, keys),
        vectors=layers * (family.norms * hidden + on_heads) + hidden,
    )


def _linears(
    config: Mapping[str, Any], family: _Family, hidden: int, inner: int, queries: int, keys: int
) -> tuple[Linear, ...]:
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if family.fused:
        return (
            Linear("qkv_proj", hidden, queries + 2 * keys),
            Linear("o_proj", queries, hidden),
            Linear("gate_up_proj", hidden, 2 * inner),
            Linear("down_proj", inner, hidden),
        )
    return (
        Linear("q_proj", hidden, queries, attention or family.qkv_bias),
        Linear("k_proj", hidden, keys, attention or family.qkv_bias),
        Linear("v_proj", hidden, keys, attention or family.qkv_bias),
        Linear("o_proj", queries, hidden, attention),
        Linear("gate_proj", hidden, inner, mlp),
        Linear("up_proj", hidden, inner, mlp),
        Linear("down_proj", inner, hidden, mlp),
    )


def trained_parameters(model: Architecture, block: TrainingBlock) -> int:
    """What the method trains: an adapter, vectors, or the whole model."""
    match resolve_added(block):
        case PrefixTuning(virtual_tokens=n, projection=projected):
            prefix = 2 * model.layers * model.keys  # a place
            if projected:  # an embedding, and two layers with as many numbers between them
                return n * model.keys + (model.keys + 1) * (model.keys + prefix)
            return n * prefix
        case PromptTuning(virtual_tokens=n):
            return n * model.hidden
        case IA3() as ia3:
            targets, feedforward = scaled_modules([x.name for x in model.linears], ia3)
            wanted = _ends(targets)
            if unknown := sorted(wanted - {x.name for x in model.linears}):
                raise ValueError(f"the model has no linear layer {', '.join(unknown)}")
            inputs = _ends(feedforward)
            scaled = [x.inputs if x.name in inputs else x.outputs for x in model.linears if x.name in wanted]
            return model.layers * sum(scaled)
        case Bottleneck() as settings:
            inner = max(1, model.hidden // settings.reduction_factor)
            place = 2 * model.hidden * inner + model.hidden + inner
            return model.layers * len(settings.placement) * place
        case None:
            lora = resolve_lora(block)
            return adapter_parameters(model, lora) if lora else model.parameters


_SCALED = (
    (("k_proj", "v_proj"), "down_proj"),
    (("qkv_proj",), "down_proj"),
    (("query_key_value",), "dense_4h_to_h"),
    (("k_proj", "v_proj"), "fc2"),
    (("k_proj", "v_proj"), "fc_out"),
    (("c_attn",), "mlp.c_proj"),
)
"""Which layers make keys and values, and which is the MLP's last, by their names in one architecture after another."""


def scaled_modules(names: list[str], ia3: IA3) -> tuple[list[str], list[str]]:
    """What ia3 scales in a model with linear layers of these names, and where of that the inputs.

    Raises ValueError for an architecture whose layers have other names.
    """

    def there(wanted: str) -> bool:
        return any(name == wanted or name.endswith(f".{wanted}") for name in names)

    targets = list(ia3.target_modules)
    if not targets:
        found = [(made, ending) for made, ending in _SCALED if all(map(there, (*made, ending)))]
        if not found:
            raise ValueError(
                f"which layers to scale is not known here; name them, of {', '.join(sorted(_ends(names)))}"
            )
        made, ending = found[0]
        targets = [*made, ending]
    last = tuple(f".{ending}" for _, ending in _SCALED)
    return targets, list(ia3.feedforward_modules) or [name for name in targets if f".{name}".endswith(last)]


def adapter_parameters(model: Architecture, lora: Lora) -> int:
    """Trainable parameters of the resolved settings: A and B, and what the variant, biases and whole modules add."""
    total = lora_parameters(model, lora.r, lora.target_modules)
    adapted = _adapted(model, lora.target_modules)
    if lora.variant == "dora":  # a length for every row
        total += model.layers * sum(x.outputs for x in adapted)
    if lora.bias != "none":
        biased = adapted if lora.bias == "loraOnly" else model.linears
        total += model.layers * sum(x.outputs for x in biased if x.bias)
    return total + saved_parameters(model, lora.modules_to_save)


def saved_parameters(model: Architecture, names: list[str]) -> int:
    """Of modules that are trained whole. Raises ValueError for a name that no module has."""
    table = model.vocabulary * model.hidden
    linears = {x.name: model.layers * (x.inputs * x.outputs + (x.outputs if x.bias else 0)) for x in model.linears}
    norms = {"norm": model.hidden, **dict.fromkeys(_LAYER_NORMS, model.layers * model.hidden)}
    sizes = {"embed_tokens": table, "lm_head": table, **linears, **norms}
    wanted = _ends(names)
    if model.tied and {"embed_tokens", "lm_head"} <= wanted:
        wanted -= {"lm_head"}
    if unknown := sorted(wanted - set(sizes)):
        raise ValueError(f"the model has no module {', '.join(unknown)}; it has {', '.join(sizes)}")
    return sum(sizes[name] for name in wanted)


_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


def adapted_weights(model: Architecture, targets: list[str]) -> int:
    """Weights of the linear layers that have an adapter."""
    return model.layers * sum(x.inputs * x.outputs for x in _adapted(model, targets))


def _adapted(model: Architecture, targets: list[str]) -> list[Linear]:
    """The linear layers of a block that have an adapter."""
    return [x for x in model.linears if targets == ["all-linear"] or x.name in _ends(targets)]


def _ends(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def lora_parameters(model: Architecture, r: int, targets: list[str]) -> int:
    """Trainable parameters of LoRA: ``r * (inputs + outputs)`` for every adapted layer (arXiv:2106.09685, section 4.1).

    ``targets`` as in ``lora.targetModules``. Raises ValueError for a name that no layer has.
    """
    names = [linear.name for linear in model.linears]
    written = set() if targets == ["all-linear"] else _ends(targets)
    if unknown := sorted(written - set(names)):
        raise ValueError(f"the model has no linear layer {', '.join(unknown)}; it has {', '.join(names)}")
    return model.layers * sum(r * (x.inputs + x.outputs) for x in _adapted(model, targets))
