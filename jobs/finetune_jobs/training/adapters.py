"""A fresh adapter on a frozen model: LoRA and its variants, and IA3.

PEFT makes it. PiSSA alone is ours: where PEFT takes the initial adapter out of the base's weights, a second adapter
that never changes takes it out of the outputs. The base stays as it is on the disk, so what is saved, of twice the
rank, fits it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune_api.types import IA3, Lora
from finetune_jobs.anatomy import linear_layers
from finetune_jobs.estimate import scaled_modules
from finetune_jobs.run.errors import ConfigurationError

TRAINED, INITIAL = "default", "initial"
"""PEFT's names of the adapter that is trained, and of PiSSA's subtracted one."""
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_EXPERT_PARTS = {"experts", "router", "gate", "block_sparse_moe"}
_EXPERT_PARTS |= {"shared_expert", "shared_experts", "shared_expert_gate"}
_BIAS = {"none": "none", "all": "all", "loraOnly": "lora_only"}
_EXACT_UP_TO = 1024
"""Rows or columns; of a larger matrix the principal components are found by 16 rounds of iteration instead."""


def add_lora(model: PreTrainedModel, lora: Lora, task: str | None = "CAUSAL_LM") -> nn.Module:
    """A fresh adapter as the resolved settings say. Raises ConfigurationError for what cannot be trained."""
    from peft import LoraConfig, get_peft_model

    check_targets(model, lora.target_modules, "lora.targetModules")
    saved = _saved(model, lora.modules_to_save)
    settings: dict[str, Any] = {
        "r": lora.r,
        "lora_alpha": lora.alpha or 2.0 * lora.r,  # PEFT divides by r; whole numbers are no need
        "target_modules": _targets(model, lora.target_modules),
        "fan_in_fan_out": any(map(is_turned, model.modules())),  # of a quantized layer PEFT does not see it
        "use_rslora": lora.rank_stabilized,
        "task_type": task,
    }
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    tied_trained = tied and any(name.rpartition(".")[2] in EMBEDDINGS for name in lora.modules_to_save)
    config = LoraConfig(
        **settings,
        lora_dropout=lora.dropout,
        bias=_BIAS[lora.bias],  # type: ignore[arg-type] # one of its words
        use_dora=lora.variant == "dora",
        modules_to_save=saved or None,
        ensure_weight_tying=tied_trained,  # one matrix before, one after
    )
    adapted: Any = get_peft_model(model, config)
    if lora.variant == "pissa":
        settings["lora_alpha"] *= -1
        adapted.add_adapter(INITIAL, LoraConfig(**settings))
        adapted.base_model.set_adapter([TRAINED, INITIAL])
        for layer in _layers(adapted):
            _start_from_principal_components(layer)
    elif lora.variant == "dora":
        _check_dora(adapted)
    if lora.bias != "none" and not any(n.endswith(".bias") and p.requires_grad for n, p in adapted.named_parameters()):
        where = "its adapted layers have" if lora.bias == "loraOnly" else "the model has"
        raise ConfigurationError(f"lora.bias: {where} no biases to train; write none")
    assert isinstance(adapted, nn.Module)
    return adapted


def add_ia3(model: PreTrainedModel, ia3: IA3, task: str | None = "CAUSAL_LM") -> nn.Module:
    """Factors that are all 1. Raises ConfigurationError for layers that the model has not."""
    from peft import IA3Config, get_peft_model

    try:
        targets, feedforward = scaled_modules(linear_layers(model), ia3)
    except ValueError as error:
        raise ConfigurationError(f"ia3.targetModules: {error}") from None
    check_targets(model, targets, "ia3.targetModules")
    config = IA3Config(task_type=task, target_modules=targets, feedforward_modules=feedforward)
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, nn.Module)
    return adapted


EMBEDDINGS = ("embed_tokens", "lm_head")
"""The two ends of a model, which may be one matrix."""


def check_targets(model: PreTrainedModel, targets: list[str], field: str) -> None:
    """Raises ConfigurationError for a target that is no linear layer, or one that no adapter may change."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for target in targets:
        matched = [name for name in names if name == target or name.endswith(f".{target}")]
        if any(model.get_submodule(name) is head for name in matched):
            raise ConfigurationError(
                f"{field}: {target} is the output head, which no adapter may change; "
                "lora can train it whole, with `modulesToSave: [embed_tokens, lm_head]`"
            )
        if target != "all-linear" and not matched:
            known = sorted({name.rsplit(".", 1)[-1] for name in names if model.get_submodule(name) is not head})
            raise ConfigurationError(f"{field}: no linear layer is called {target}; there are {', '.join(known)}")
        if _has_experts(model) and any(map(_is_expert, matched)):
            raise ConfigurationError(
                f"{field}: {target} would train experts or router of this mixture of experts, "
                "which cannot be merged yet; write [all-linear], which leaves them out"
            )


def _targets(model: PreTrainedModel, targets: list[str]) -> str | list[str]:
    """For PEFT. Its own `all-linear` would take shared experts and routers that are linear layers."""
    if targets != ["all-linear"] or not _has_experts(model):
        return targets[0] if targets == ["all-linear"] else list(targets)
    return [name for name in linear_layers(model) if not _is_expert(name)]


def _saved(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Full names of the modules. Given `norm`, PEFT would take every module whose name ends so."""
    found: list[str] = []
    for name in names:
        matched = {n: m for n, m in model.named_modules() if n == name or n.endswith(f".{name}")}
        weights = [p for module in matched.values() for p in module.parameters()]
        field = f"lora.modulesToSave: {name}"
        if not weights:
            raise ConfigurationError(f"{field}: the model has no such module with weights; name [embed_tokens], say")
        if not all(weight.is_floating_point() for weight in weights):
            raise ConfigurationError(
                f"{field}: it is stored quantized and cannot be trained whole; write `method: lora`"
            )
        if _has_experts(model) and any(map(_is_expert, matched)):
            raise ConfigurationError(f"{field}: experts and routers cannot be merged yet; leave it out")
        found += matched
    return found


def _has_experts(model: PreTrainedModel) -> bool:
    return any(getattr(model.config, count, None) for count in _EXPERT_COUNTS)


def _is_expert(name: str) -> bool:
    return not _EXPERT_PARTS.isdisjoint(name.split("."))


def is_turned(layer: nn.Module) -> bool:
    """The model keeps this layer's weight as (in, out), also where the layer is quantized."""
    return Conv1D in (type(layer), getattr(layer, "source_cls", None))


def _layers(adapted: nn.Module) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    yield from (module for module in adapted.modules() if isinstance(module, LoraLayer))


def keep_precision(adapted: nn.Module, compute: torch.dtype) -> None:
    """Let dora on packed weights answer in ``compute``, as PEFT does itself on others.

    It answers in its magnitudes' float32 there, and all that follows would be kept for the way back at twice the width.
    """
    for layer in _layers(adapted):
        layer.register_forward_hook(lambda _layer, _given, answer: answer.to(compute))


def _check_dora(adapted: nn.Module) -> None:
    if any(is_turned(layer.get_base_layer()) for layer in _layers(adapted)):
        raise ConfigurationError("lora.variant: dora is for models that keep weights as (out, in); write lora")


def _start_from_principal_components(layer: Any) -> None:
    """PiSSA (arXiv:2404.02948, section 3): A and B hold the weight's ``r`` largest singular values, half in each."""
    weight: Tensor = layer.get_base_layer().weight.detach().float()
    if layer.fan_in_fan_out:
        weight = weight.T
    rank, scale = layer.r[TRAINED], layer.scaling[TRAINED]
    if min(weight.shape) <= _EXACT_UP_TO:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, q=min(2 * rank, *weight.shape), niter=16)
        vh = v.T
    root = (s[:rank] / scale).sqrt()
    b, a = u[:, :rank] * root, root[:, None] * vh[:rank]
    for name in (TRAINED, INITIAL):
        for parameter, start in ((layer.lora_A[name].weight, a), (layer.lora_B[name].weight, b)):
            parameter.data.zero_()  # a small layer has fewer components than the rank
            parameter.data[: start.shape[0], : start.shape[1]] = start
            parameter.requires_grad_(name == TRAINED)
