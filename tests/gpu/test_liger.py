"""Liger's kernels on a GPU: what transformers computes, for each architecture that they are used for.

They change transformers for a whole process, so each comparison is a process of its own.

python -m pytest tests/gpu/test_liger.py -s
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from finetune_jobs.training import liger

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(find_spec("liger_kernel") is None, reason="Liger is not installed"),
]

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 352,
    "pad_token_id": 0,
    "initializer_range": 0.05,
    "num_labels": 1,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 24},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 128},
    "phi3": {"partial_rotary_factor": 0.5},
    "gemma2": {"sliding_window": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
    "gemma3_text": {"num_hidden_layers": 6, "sliding_window": 16},
}


def pass_over(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """What it says of two sequences in one row, and the gradients of that."""
    model.zero_grad()
    said = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    weights = torch.randn(said.shape, generator=torch.Generator().manual_seed(1)).to(said)
    (said * weights).sum().backward()
    return [said.detach(), *(p.grad.clone() for p in model.parameters())]


def make(kind: str, scores: bool) -> Any:
    """A random one of two layers or six; norms are random too."""
    config = AutoConfig.for_model(kind, **{**SHAPE, **SPECIAL[kind]})
    torch.manual_seed(0)
    auto: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = auto.from_config(config).to("cuda").train()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "bias" not in name:
            torch.nn.init.normal_(parameter, mean=0.0 if kind.startswith("gemma") else 1.0, std=0.1)
    if scores:
        model.score = torch.nn.Identity()  # as a reward model's is taken off
    return model


def compare(kind: str) -> dict[str, float]:
    """The largest differences in float32, relative to the largest entry of each tensor; of the model and a judge."""
    torch.set_float32_matmul_precision("highest")
    ids = torch.arange(96, device="cuda")[None] % 350 + 1
    positions = torch.cat([torch.arange(40), torch.arange(56)]).to("cuda")[None]
    models = [make(kind, scores) for scores in (False, True)]
    before = [pass_over(model, ids, positions) for model in models]  # both, for one that is changed changes the other
    found = {}
    for name, model, expected in zip(("model", "judge"), models, before, strict=True):
        assert liger.use(model) is None, liger.use(model)
        assert "Liger" in str(model)
        after = pass_over(model, ids, positions)
        off = [
            float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in zip(after, expected, strict=True)
        ]
        found |= {f"{name}: logits": off[0], f"{name}: gradients": max(off[1:])}
    return found


@pytest.mark.parametrize("kind", liger.ACTIVATIONS)
def test_the_same_is_computed(kind: str) -> None:
    """Logits and every gradient agree in float32, of packed sequences and with what is special in the architecture."""
    command = [sys.executable, Path(__file__).resolve(), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    off = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{kind}: {off}")
    assert max(off.values()) < 1e-5


if __name__ == "__main__":
    print(json.dumps(compare(sys.argv[1])))
