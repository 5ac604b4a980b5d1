"""The whole merged model against base and adapter as PEFT runs them: logits of real rows, in float32. Of several
adapters, against the base that computes with their combined change of its weights, unrounded.

Both models stay mapped. Each module's weights are raised to float32 only while the module runs, so the comparison needs
the memory of the largest module, not of the model; the page cache should hold the files, or every row reads them anew.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Module, Parameter
from transformers import AutoModelForCausalLM

from finetune_jobs.merging.blend import Blend, blended
from finetune_jobs.merging.combine import Change
from finetune_jobs.merging.fold import is_tied, ranges
from finetune_jobs.merging.weights import Weights
from finetune_jobs.run.errors import ConfigurationError, StageError
from finetune_jobs.tuned import load_whole_modules

LOGIT_BOUND = {torch.bfloat16: 5e-2, torch.float16: 2e-2, torch.float32: 1e-5}
"""Largest relative L2 distance of the logits. That a module was folded wrongly shows in its own check; this one is for
what only the whole model shows, and must bear rounding on rows that the model is unsure of (docs/adr/010-merge.md)."""
KL_BOUND = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-3}
"""Largest mean KL divergence on answer tokens, in nats."""
_MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Example:
    """A row in tokens, and where its answer's tokens stand."""

    ids: list[int]
    answer: list[int]
    """Positions in ``ids``, from 1."""


@dataclass(frozen=True)
class Distance:
    """Of the merged model from the adapter's, over the answer tokens of all examples."""

    relative_l2: float
    kl: float
    """Mean over tokens of KL(adapter || merged), in nats."""
    tokens: int


def compare(
    base: Path,
    adapter: Path | Blend,
    merged: Path,
    examples: Sequence[Example],
    trust_remote_code: bool = False,
    on_row: Callable[[], None] = lambda: None,
) -> Distance:
    """Run both models on the examples. ``on_row`` is called before each and may raise to stop."""
    changes = _changes(base, adapter, on_row) if isinstance(adapter, Blend) else {}
    with float32_model(base, trust_remote_code, changes) as model:
        tuned: Any = model
        if not isinstance(adapter, Blend):
            from peft import PeftModel  # seconds to load; `quantize`, which is here for float32_model, needs none of it

            tuned = PeftModel.from_pretrained(model, str(adapter))
            load_whole_modules(tuned, adapter)
        tuned.eval()
        wanted = []
        for example in examples:
            on_row()
            wanted.append(_answer_logits(tuned, example))
    error = size = divergence = 0.0
    tokens = 0
    with float32_model(merged, trust_remote_code) as model:
        for example, reference in zip(examples, wanted, strict=True):
            on_row()
            logits = _answer_logits(model, example)
            error += float((logits - reference).square().sum())
            size += float(reference.square().sum())
            p, q = reference.log_softmax(-1), logits.log_softmax(-1)
            divergence += float((p.exp() * (p - q)).sum())
            tokens += len(reference)
    return Distance((error / size) ** 0.5, divergence / tokens, tokens)


def _changes(directory: Path, blend: Blend, on_tensor: Callable[[], None]) -> Mapping[str, Change]:
    base = Weights(directory)
    tied = is_tied(json.loads((directory / "config.json").read_text(encoding="utf-8")), base)
    return blended(blend, base, tied, lambda done, total: on_tensor()).changes


def answer_loss(
    directory: Path,
    examples: Sequence[Example],
    trust_remote_code: bool = False,
    on_row: Callable[[], None] = lambda: None,
) -> float:
    """The model's mean negative log-probability of the examples' answer tokens, in nats."""
    total, tokens = 0.0, 0
    with float32_model(directory, trust_remote_code) as model:
        for example in examples:
            on_row()
            positions = example.answer[:_MAX_ANSWER_TOKENS]
            wanted = torch.tensor([example.ids[at] for at in positions])
            total += float(torch.nn.functional.cross_entropy(_answer_logits(model, example), wanted, reduction="sum"))
            tokens += len(positions)
    return total / tokens


def check(distance: Distance, dtype: torch.dtype, field: str) -> None:
    """Raise ``ConfigurationError`` if the merged model is another model than the adapter's: it would be so again.

    ``field`` is that of ``dtype`` in the spec.
    """
    # Written so that NaN fails.
    if not (distance.relative_l2 <= LOGIT_BOUND[dtype] and distance.kl <= KL_BOUND[dtype]):
        raise ConfigurationError(
            f"{field}: the merged model is not base and adapter: relative L2 of the logits {distance.relative_l2:.2e} "
            f"(at most {LOGIT_BOUND[dtype]:g}), KL {distance.kl:.2e} (at most {KL_BOUND[dtype]:g}); float32 rounds less"
        )


@contextmanager
def float32_model(
    directory: Path, trust_remote_code: bool, changes: Mapping[str, Change] | None = None
) -> Iterator[Any]:
    """The model of a directory, mapped from its files, that computes in float32: a module's weights are raised, and
    changed by what ``changes`` has for them, only while it runs."""
    # dtype "auto" leaves the file's type, and with it the mapping: nothing is copied.
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=trust_remote_code)
    model.eval()
    changed: dict[int, Change] = {}  # by the parameter itself, which embedding and head may share
    for name, parameter in model.named_parameters():
        # A checkpoint saved from the bare model lacks the first part of the name (`model.`).
        for written in (name, name.partition(".")[2]):
            if changes and written in changes:
                changed[id(parameter)] = changes[written]
    if len(changed) < len(changes or {}):
        raise StageError(f"{len(changes or {}) - len(changed)} of the changed tensors are no weights of the model")
    for module in model.modules():
        _compute_in_float32(module, changed)
    yield model


def _compute_in_float32(module: Module, changed: Mapping[int, Change]) -> None:
    own = {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point() and (parameter.dtype != torch.float32 or id(parameter) in changed)
    }
    if not own:
        return
    if type(module) is Embedding and id(module.weight) not in changed:
        # Casting the rows looked up is the same and spares the table.
        module.register_forward_hook(lambda _module, _inputs, output: output.float())
        return
    module.register_forward_pre_hook(partial(_raise, own, changed))
    module.register_forward_hook(partial(_lower, own), always_call=True)


@torch.no_grad()
def _raise(own: dict[str, Parameter], changed: Mapping[int, Change], module: Module, _inputs: object) -> None:
    for name, parameter in own.items():
        change = changed.get(id(parameter))
        raised = parameter.float() if change is None else _rows(change, parameter)
        setattr(module, name, Parameter(raised, requires_grad=False))


def _rows(change: Change, base: Tensor) -> Tensor:
    """All of them, in the blocks in which they are folded: the very same numbers, and no more memory."""
    return torch.cat([change.rows(base[start:stop], start, stop) for start, stop in ranges(tuple(base.shape))])


def _lower(own: dict[str, Parameter], module: Module, _inputs: object, _output: object) -> None:
    for name, parameter in own.items():
        setattr(module, name, parameter)


@torch.no_grad()
def _answer_logits(model: Any, example: Example) -> torch.Tensor:
    """(answer tokens, vocabulary), float32: the logits that predict each answer token."""
    positions = torch.tensor(example.answer[:_MAX_ANSWER_TOKENS]) - 1
    ids = torch.tensor([example.ids[: int(positions[-1]) + 1]])
    target = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's have it
    if "logits_to_keep" in inspect.signature(target.forward).parameters:
        logits = model(input_ids=ids, logits_to_keep=positions, use_cache=False).logits[0]
    else:
        logits = model(input_ids=ids, use_cache=False).logits[0][positions]
    kept: torch.Tensor = logits.float()
    return kept
