"""The parts of training that need a model but no store."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM, LlamaConfig, Qwen2MoeConfig

from finetune_api.defaults import PROMPTED, resolve_added, resolve_lora, resolve_quantization
from finetune_api.types import Lora, Method, Sft, Training
from finetune_jobs.run.environment import cpu_flags
from finetune_jobs.run.errors import ConfigurationError
from finetune_jobs.training import memory
from finetune_jobs.training.collators import Example, Layout, Tokens, collate
from finetune_jobs.training.distributed import Peers
from finetune_jobs.training.losses import Supervised, token_log_probs
from finetune_jobs.training.losses.dpo import DPO
from finetune_jobs.training.model import Policy, add_lora, compute_type, count, load
from finetune_jobs.training.noise import Noise

CPU = torch.device("cpu")
UNPROMPTED = [method for method in Method if method not in PROMPTED]
"""Texts with trained vectors before them are never packed: see test_prompts.py."""
AutoModel: Any = AutoModelForCausalLM


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products only lose by sharing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def policy_of(directory: Path, method: Method = Method.LORA, compute: torch.dtype = torch.float32) -> Policy:
    """The model with a fresh adapter that already does something."""
    block = Sft(method=method)
    policy = load(
        directory,
        method=method,
        lora=resolve_lora(block),
        added=resolve_added(block),
        quantization=resolve_quantization(block),
        adapter=None,
        compute=compute,
        device=CPU,
        seed=1,
    )
    torch.manual_seed(2)
    for parameter in policy.trainable:
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return policy


def examples(lengths: Sequence[int] = (12, 30, 7, 21, 9, 16, 25, 5)) -> list[Example]:
    """Random tokens, the second halves supervised."""
    rng = np.random.default_rng(0)
    return [Example((Tokens(rng.integers(0, 300, n).astype(np.int32), np.arange(n) >= n // 2),)) for n in lengths]


def step(policy: Policy, layout: Layout) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one step over ``examples``."""
    policy.model.train()
    policy.model.zero_grad(set_to_none=True)
    batch = examples()
    weight = sum(Supervised().weight(e) for e in batch)
    total = 0.0
    for group in layout.split(batch):
        micro = collate([batch[i] for i in group], packed=layout.packed)
        loss, _ = Supervised().loss(token_log_probs(policy, micro), micro)
        (loss / weight).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) / weight
    return total, torch.cat([p.grad.flatten() for p in policy.trainable if p.grad is not None])


@pytest.mark.parametrize("method", UNPROMPTED, ids=str)
def test_loss_and_gradient_do_not_depend_on_the_layout(tiny_model: Path, method: Method) -> None:
    """8x1, 4x2, 1x8, padded or packed: equal to float32's noise, and the loss is that of transformers."""
    policy = policy_of(tiny_model, method)
    loss, gradient = step(policy, Layout(packed=False, tokens=None, examples=1))
    for packed in (False, True):
        for size in (1, 2, 8):
            other_loss, other_gradient = step(policy, Layout(packed, tokens=None, examples=size))
            assert other_loss == pytest.approx(loss, abs=1e-6)
            assert float((other_gradient - gradient).abs().max()) < 1e-6
    theirs, tokens = 0.0, 0
    for one in examples():
        [sequence] = one.sequences
        ids = torch.from_numpy(sequence.ids.astype(np.int64))
        labels = ids.masked_fill(~torch.from_numpy(sequence.supervised), -100)
        out = policy.model(input_ids=ids[None], labels=labels[None])
        theirs, tokens = theirs + float(out.loss.detach()) * one.supervised, tokens + one.supervised
    assert loss == pytest.approx(theirs / tokens, abs=1e-5)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_survive_an_evaluation(tiny_model: Path, compute: torch.dtype) -> None:
    """On some CPUs bitsandbytes repacks evaluated 4-bit layers into a form that lets no gradient through."""
    policy = policy_of(tiny_model, Method.QLORA, compute)
    layout = Layout(packed=True, tokens=None)
    before = step(policy, layout)[1]
    policy.model.eval()
    with torch.no_grad():
        token_log_probs(policy, collate(examples(), packed=True))
    assert torch.equal(step(policy, layout)[1], before)


def test_dpo_s_loss_is_the_formula(tiny_model: Path) -> None:
    """Against the definition, with rewards of both signs; the first chosen answer is worse than its reference."""
    batch = collate(
        [Example((e.sequences[0], f.sequences[0]), (-9.0, -70.0)) for e, f in [examples()[:2]]], packed=True
    )
    log_probs = torch.linspace(-3, -1, len(batch.targets), requires_grad=True)
    loss, watched = DPO(beta=0.2).loss(log_probs, batch)
    chosen, rejected = (log_probs[batch.sequence == i].sum().item() for i in (0, 1))
    rewards = 0.2 * (chosen + 9), 0.2 * (rejected + 70)
    assert loss.item() == pytest.approx(math.log1p(math.exp(rewards[1] - rewards[0])), rel=1e-5)
    expected = (*rewards, 0.0, rewards[0] - rewards[1], chosen, rejected)
    assert dict(zip(DPO(0.2).metrics, watched.tolist(), strict=True)) == {
        name: pytest.approx(value, rel=1e-5) for name, value in zip(DPO(0.2).metrics, expected, strict=True)
    }


@pytest.mark.parametrize(
    ("shape", "trainable", "total"),
    [
        ((4096, 14336, 32, 32, 8, 128256), 41_943_040, 8_072_204_288),
        ((8192, 28672, 80, 64, 8, 128256), 207_093_760, 70_553_706_496 + 207_093_760),
    ],
    ids=["8b", "70b"],
)
def test_parameter_counts_of_llama_3(shape: tuple[int, ...], trainable: int, total: int) -> None:
    """LoRA of rank 16 on all linear layers, exactly, without a byte of memory for the weights."""
    width, inner, layers, heads, groups, vocabulary = shape
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        lora = resolve_lora(Sft())
        assert lora is not None
        counts = count(add_lora(AutoModel.from_config(config), lora))
    assert (counts.trainable, counts.total) == (trainable, total)


@pytest.mark.parametrize("method", UNPROMPTED, ids=str)
def test_packed_4_bit_weights_count_as_what_they_stand_for(tiny_model: Path, method: Method) -> None:
    """The total is that of the architecture, tied weights once, plus the adapter."""
    counts = count(policy_of(tiny_model, method).model)
    base = sum(p.numel() for p in AutoModel.from_pretrained(tiny_model).parameters())
    assert counts.total == base + (0 if method is Method.FULL else counts.trainable)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_proj", "lm_head"], "lm_head is the output head, which no adapter may change"),
        (["q_prj"], r"no linear layer is called q_prj; there are down_proj, gate_proj, k_proj"),
    ],
    ids=["head", "unknown"],
)
def test_targets_that_cannot_be_trained_are_refused(tiny_model: Path, targets: list[str], words: str) -> None:
    """An adapter on a tied head merges wrong in silence; a misspelt name would train nothing."""
    with pytest.raises(ConfigurationError, match=words):
        add_lora(AutoModel.from_pretrained(tiny_model), Lora(target_modules=targets, alpha=32.0))


@pytest.mark.parametrize("target", ["shared_expert.up_proj", "shared_expert_gate", "down_proj"])
def test_experts_and_routers_are_refused(target: str) -> None:
    """By name; linear layers among them, which only Qwen's shared ones are, are no part of all-linear either."""
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=16, shared_expert_intermediate_size=48,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = AutoModel.from_config(config)
    with pytest.raises(ConfigurationError, match=r"mixture of experts, .* write \[all-linear\]"):
        add_lora(model, Lora(target_modules=[target], alpha=32.0))
    adapted = add_lora(model, Lora(target_modules=["all-linear"], r=4, alpha=8.0))
    assert count(adapted).trainable == 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32))


def test_sequences_share_a_row_only_where_they_do_not_see_each_other(tiny_model: Path, tmp_path: Path) -> None:
    """Attention keeps them apart; the convolutions of LFM2 do not, so it is padded, and ``packing: true`` refused."""
    attention = policy_of(tiny_model)
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=352, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, full_attn_idxs=[1], initializer_range=0.1,
    )  # fmt: skip
    Lfm2ForCausalLM(config).save_pretrained(tmp_path / "lfm2")
    convolution = policy_of(tmp_path / "lfm2")
    assert memory.keeps_apart(attention)
    assert not memory.keeps_apart(convolution)
    assert not memory.plan(convolution, Training(), examples(), "sft", Peers()).layout.packed
    with pytest.raises(ConfigurationError, match=r"sft\.training\.packing: .* see each other"):
        memory.plan(convolution, Training(packing=True), examples(), "sft", Peers())


def test_noise_is_scaled_by_the_own_length_of_each_sequence(tiny_model: Path) -> None:
    """In training alone, uniform up to alpha / sqrt(length * width), whoever shares the row."""
    policy = policy_of(tiny_model)
    noise = Noise(policy, alpha=5.0)
    embeddings: Any = policy.base.get_input_embeddings()
    batch = collate(examples([400, 100]), packed=True)
    noise.expect(batch)
    policy.model.eval()
    still = embeddings(batch.input_ids)
    policy.model.train()
    moved = (embeddings(batch.input_ids) - still).abs()
    for part, length in ((moved[0, :400], 400), (moved[0, 400:], 100)):
        bound = 5.0 / math.sqrt(length * 64)
        assert 0.99 * bound < float(part.max()) <= bound * 1.0001
        assert float(part.mean()) == pytest.approx(bound / 2, rel=0.05)


def test_precision_follows_the_hardware() -> None:
    """On a CPU bf16 only with the instructions for it; what is written holds."""
    fast = bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})
    assert compute_type("auto", CPU) is (torch.bfloat16 if fast else torch.float32)
    assert compute_type("fp16", CPU) is torch.float16
