"""The importance matrix: by how much each column of a weight counts, measured on the rows that the model was taught.

It is the mean square of what meets the column, over all tokens (llama.cpp's ``tools/imatrix``): to round a weight by e
changes the output by e times the activation. The merged Hugging Face model runs in float32 with a hook on each linear
layer, and the figures go to the quantizer in memory; llama.cpp's own program is not needed. As there, embedding and
output head have none, and of a mixture of experts each expert has its own, over the tokens that were sent to it.
"""

import ctypes
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from finetune_jobs.data.encode import Dropped, encode
from finetune_jobs.data.rows import Row
from finetune_jobs.gguf import metadata
from finetune_jobs.gguf.library import api
from finetune_jobs.gguf.release import gguf_py
from finetune_jobs.merging.parity import float32_model
from finetune_jobs.run.errors import DataError

Array = np.ndarray[Any, np.dtype[np.float32]]
_ROW_TOKENS = 2048
_INT, _TEXT = 0, 3
"""``llama_model_kv_override_type``."""


@dataclass(frozen=True)
class ImportanceMatrix:
    """Sums by llama.cpp's tensor name, as its own program keeps them."""

    sums: dict[str, Array]
    """(matrices, columns) the squares of what met each column, added up; of a tensor that is made of experts a matrix
    for each."""
    counts: dict[str, Array]
    """(matrices, 1) over how many tokens."""
    rows: int
    tokens: int

    @property
    def squares(self) -> dict[str, Array]:
        """(matrices, columns) the means, to the bit those that llama.cpp reckons from the file."""
        return {name: _mean(total, self.counts[name]) for name, total in self.sums.items()}


def measure(
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    converted: Path,
    *,
    trust_remote_code: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> ImportanceMatrix:
    """Run the model over the rows, prompt and answer alike, each cut to 2,048 tokens; ``tick`` may raise to stop.

    ``converted`` is the model's GGUF, whose names the figures get. Raises DataError when no row can be read.
    """
    sums: dict[str, torch.Tensor] = {}
    visits: dict[str, torch.Tensor] = {}
    tokens = used = 0
    with float32_model(model, trust_remote_code) as network, torch.inference_mode():
        names = tensor_names(converted, (n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)))
        for module, tensor in names.items():
            network.get_submodule(module).register_forward_pre_hook(partial(_add, sums, tensor))
        for block, experts in _experts(network):
            experts.register_forward_pre_hook(partial(_add_experts, sums, visits, block))
        longest = min(_ROW_TOKENS, getattr(network.config, "max_position_embeddings", _ROW_TOKENS))
        body = getattr(network, network.base_model_prefix, network)  # what the head would say is not asked for
        for row in rows:
            tick()
            encoded = encode(row, tokenizer, loss_on="auto", max_length=sys.maxsize, overlong="drop")
            if isinstance(encoded, Dropped):
                continue
            ids = encoded.input_ids[:longest]
            body(input_ids=torch.tensor([ids]), use_cache=False)
            tokens += len(ids)
            used += 1
    if not tokens:
        raise DataError("no train row can be read for the importance matrix")
    counts = {name: visits.get(name, torch.tensor([tokens])).float().numpy()[:, None] for name in sorted(sums)}
    totals = {name: np.atleast_2d(sums[name].float().numpy()) for name in sorted(sums)}
    return ImportanceMatrix(totals, counts, used, tokens)


def _mean(total: Array, count: Array) -> Array:
    mean = np.divide(total, np.maximum(count, 1), dtype=np.float32)
    # An expert that was sent nothing: no column before another, as llama.cpp has it.
    return np.where(count > 0, mean, np.float32(1))


def _add(sums: dict[str, torch.Tensor], tensor: str, _module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
    found = inputs[0].double().square().flatten(0, -2).sum(0)
    sums[tensor] = sums[tensor] + found if tensor in sums else found


def _experts(network: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """The experts of each block, where they are two tensors of all experts, (experts, out, in)."""
    for name, module in network.named_modules():
        block = re.search(r"\.(\d+)\.", name)
        plain = not (getattr(module, "is_transposed", False) or getattr(module, "has_bias", False))
        if block and plain and getattr(module, "has_gate", False) and hasattr(module, "gate_up_proj"):
            yield f"blk.{block[1]}", module


def _add_experts(
    sums: dict[str, torch.Tensor],
    visits: dict[str, torch.Tensor],
    block: str,
    experts: Any,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """What meets each expert's gate and up, and behind them its down."""
    states, chosen, _ = inputs
    count = experts.gate_up_proj.shape[0]
    widths = experts.gate_up_proj.shape[-1], experts.down_proj.shape[-1]
    into, inner = (torch.zeros(count, width, dtype=torch.double) for width in widths)
    for expert in torch.unique(chosen).tolist():
        sent = states[(chosen == expert).any(-1)]
        into[expert] = sent.double().square().sum(0)
        met = experts._apply_gate(torch.nn.functional.linear(sent, experts.gate_up_proj[expert]))
        inner[expert] = met.double().square().sum(0)
    counts = torch.bincount(chosen.flatten(), minlength=count)
    for part, found in (("gate", into), ("up", into), ("down", inner)):
        name = f"{block}.ffn_{part}_exps.weight"
        sums[name] = sums[name] + found if name in sums else found
        visits[name] = visits[name] + counts if name in visits else counts


def tensor_names(converted: Path, modules: Iterable[str]) -> dict[str, str]:
    """Which tensor of the file holds the weight of each linear layer; embedding and head are left out."""
    gguf = gguf_py()
    file = metadata.read(converted)
    kind = file.fields["general.architecture"]
    architecture = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    known = gguf.get_tensor_name_map(architecture, file.fields[f"{kind}.block_count"])
    found = {}
    for module in modules:
        # As the converter does for the language part of a model that sees, too.
        plain = module.replace("language_model.", "")
        tensor = known.get_name(f"{plain}.weight", try_suffixes=(".weight",))
        if tensor in file.tensors and tensor not in ("output.weight", "token_embd.weight"):
            found[module] = tensor
    return found


def lacking(converted: Path, matrix: ImportanceMatrix) -> list[str]:
    """Weights in the blocks of the model that the matrix says nothing about: experts of an unusual kind."""
    tensors = metadata.read(converted).tensors
    blocks = [name for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) > 1]
    blocks = [name for name in blocks if not name.endswith("ffn_gate_inp.weight")]  # a router is never quantized
    return [name for name in blocks if name not in matrix.sums]


def hand_over(parameters: Any, matrix: ImportanceMatrix) -> list[Any]:
    """Set it in ``llama_model_quantize_params``; what is returned must live as long as the call.

    The file will say that it was made with one, as llama.cpp's own program would write it.
    """
    columns = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in matrix.squares.items()}
    entries = (api.llama_model_imatrix_data * (len(columns) + 1))()  # one without a name ends it
    for entry, (name, values) in zip(entries, columns.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    said = {"dataset": b"train rows of the job", "entries_count": len(columns), "chunks_count": matrix.rows}
    overrides = (api.llama_model_kv_override * (len(said) + 1))()  # one without a key ends it
    for override, (name, value) in zip(overrides, said.items(), strict=False):
        override.key = f"quantize.imatrix.{name}".encode()
        if isinstance(value, bytes):
            override.tag, override.value.val_str = _TEXT, value
        else:
            override.tag, override.value.val_i64 = _INT, value
    parameters.imatrix, parameters.kv_overrides = entries, overrides
    return [columns, entries, overrides]


def write(path: Path, matrix: ImportanceMatrix) -> None:
    """As a file that ``llama-quantize --imatrix`` reads."""
    gguf = gguf_py()
    writer = gguf.GGUFWriter(path, arch="")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["train"])
    writer.add_uint32("imatrix.chunk_count", matrix.rows)
    writer.add_uint32("imatrix.chunk_size", -(-matrix.tokens // matrix.rows))
    for name, sums in matrix.sums.items():
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", matrix.counts[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
