"""The estimates against published figures, against transformers' own models, and against a real autograd graph."""

from typing import Any

import pytest
import torch
from tests.builders import MERGE, SFT, raw_job
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from finetune_api.types import BuiltinReward, GGUFType, Preference, Reward, RewardSource, Rl, Sft, Training
from finetune_api.validate import parse
from finetune_jobs.estimate import (
    Architecture,
    bitsandbytes_bytes,
    disk,
    gguf_bytes,
    lora_parameters,
    read,
    trained_parameters,
    training_memory,
    unfit,
)
from finetune_jobs.estimate.memory import CACHED_TOKENS, TOLERANCE, activation_bytes

GIB = 2**30
from_config: Any = AutoModelForCausalLM.from_config
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LLAMA_70B = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
SMOLLM2 = {
    **LLAMA_8B,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "head_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {}),
    ("granite", {"head_dim": None}),
    ("smollm3", {"head_dim": None}),
    ("qwen2", {"head_dim": None}),
    ("qwen2", {"head_dim": None, "tie_word_embeddings": True}),
    ("qwen3", {}),
    ("olmo2", {"head_dim": None}),
    ("gemma", {}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("phi3", {"head_dim": None}),
]


def sft(**fields: Any) -> Sft:
    """An sft block with these fields."""
    return Sft.model_validate(fields, strict=False)


@pytest.fixture(params=VARIANTS, ids=[f"{name} {extra or ''}" for name, extra in VARIANTS])
def tiny(request: pytest.FixtureRequest) -> tuple[Architecture, torch.nn.Module]:
    """An architecture as estimated, and the same as transformers builds it (without memory)."""
    name, extra = request.param
    shape = {key: value for key, value in {**TINY, **extra}.items() if value is not None}
    config = CONFIG_MAPPING[name](**shape)
    with torch.device("meta"):
        model = from_config(config)
    return read(config.to_dict()), model


def test_parameters_are_counted_as_transformers_builds_them(tiny: tuple[Architecture, torch.nn.Module]) -> None:
    """To the last one: norms, biases and tied embeddings included."""
    estimated, model = tiny
    assert estimated.parameters == sum(p.numel() for p in model.parameters())
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert estimated.linear_parameters == sum(m.weight.numel() for m in linears)
    assert lora_parameters(estimated, 4, ["all-linear"]) == sum(4 * (m.in_features + m.out_features) for m in linears)


def test_published_counts() -> None:
    """Llama-3-8B and 70B, and their LoRA adapters: reference/practice.md, section 3."""
    small, large = read(LLAMA_8B), read(LLAMA_70B)
    assert small.parameters == 8_030_261_248
    assert lora_parameters(small, 16, ["all-linear"]) == 41_943_040
    assert small.parameters + lora_parameters(small, 16, ["all-linear"]) == 8_072_204_288
    assert trained_parameters(small, sft(method="prefixTuning")) == 1_310_720
    assert trained_parameters(small, sft(method="promptTuning")) == 81_920
    place = 2 * 4096 * 256 + 4096 + 256
    assert trained_parameters(small, sft(method="bottleneck")) == 64 * place
    assert trained_parameters(small, sft(method="bottleneck", bottleneck={"placement": ["mlp"]})) == 32 * place
    assert large.parameters == 70_553_706_496
    assert lora_parameters(large, 16, ["all-linear"]) == 207_093_760
    assert read(SMOLLM2).parameters == 134_515_008


def test_lora_on_some_modules() -> None:
    """Names as in ``targetModules``, with or without the module above; an unknown one is told with what there is."""
    model = read(LLAMA_8B)
    assert lora_parameters(model, 8, ["q_proj", "self_attn.v_proj"]) == 32 * 8 * (4096 + 4096 + 4096 + 1024)
    with pytest.raises(ValueError, match=r"no linear layer qkv_proj; it has q_proj, k_proj"):
        lora_parameters(model, 8, ["qkv_proj"])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mamba"}, "no estimate for model_type 'mamba'; known: llama"),
        ({"model_type": "llama"}, "no hidden_size"),
    ],
    ids=["unknown family", "no sizes"],
)
def test_what_cannot_be_estimated_is_said(config: dict[str, Any], words: str) -> None:
    """Rather no figure than a wrong one."""
    with pytest.raises(ValueError, match=words):
        read(config)


# ---------------------------------------------------------------- memory


def test_70b_weights_and_states() -> None:
    """The parts of reference/trainers.md, section 4.2."""
    model = read(LLAMA_70B)
    qlora = training_memory(model, sft(method="qlora", training={"optimizer": "adamw"}))
    assert qlora.weights / GIB == pytest.approx(36.8, abs=0.05)
    assert training_memory(
        model, sft(method="qlora", quantization={"doubleQuant": False})
    ).weights / GIB == pytest.approx(39.8, abs=0.05)
    assert (qlora.adapter + qlora.gradients + qlora.optimizer) / GIB == pytest.approx(3.1, abs=0.05)
    r64 = training_memory(model, sft(method="qlora", lora={"r": 64}, training={"optimizer": "adamw"}))
    assert (r64.adapter + r64.gradients + r64.optimizer) / GIB == pytest.approx(12.3, abs=0.05)
    assert training_memory(model, sft()).weights / GIB == pytest.approx(131.4, abs=0.05)
    full = training_memory(model, sft(method="full"))
    assert (full.weights + full.gradients + full.optimizer) / GIB == pytest.approx(1051, abs=1)


def test_70b_lora_shared_by_eight_fits_80_gb_gpus() -> None:
    """An eighth of 131.4 GiB, two of 80 blocks and the output head beside it; the adapter is whole in each process."""
    model = read(LLAMA_70B)
    shared, whole = training_memory(model, sft(), shards=8), training_memory(model, sft())
    assert shared.weights / GIB == pytest.approx(131.4 / 8, abs=0.01)
    assert shared.workspace / GIB == pytest.approx(2 * 128.5 / 80 + 1.96, abs=0.1)
    assert (shared.adapter, shared.optimizer) == (whole.adapter, whole.optimizer)
    assert shared.total < 40 * GIB < 80 * GIB < whole.total


def test_8b_full_shared_by_eight() -> None:
    """128 GB of weights, gradients and Adam's moments: an eighth each. Whole is what is gathered at a time, in float32:
    two of 32 blocks, the head, its gradient twice, and 16-bit copies of block and head. No copies of all weights.
    """
    model = read(LLAMA_8B)
    shared, whole = (training_memory(model, sft(method="full"), shards=n) for n in (8, 1))
    states = [m.weights + m.gradients + m.optimizer for m in (shared, whole)]
    assert states[1] / 1e9 == pytest.approx(128.5, abs=0.1)
    assert states[0] == pytest.approx(states[1] / 8, rel=1e-6)
    block, head = 218_103_808, 128_256 * 4096
    assert whole.workspace == 2 * model.parameters
    assert shared.workspace == 4 * (2 * block + 3 * head) + 2 * (block + head)
    assert shared.total < 32 * GIB < 80 * GIB < whole.total
    kept = training_memory(model, sft(method="full", training={"gradientCheckpointing": False}), shards=8)
    assert kept.workspace == shared.workspace + whole.workspace


def test_qat_keeps_what_it_rounds() -> None:
    """Under an adapter in 16 bits, of full in float32; layers without one are rounded once and for all."""
    model, qat = read(LLAMA_8B), {"qat": {"type": "Q4_0"}}

    def more(**block: Any) -> int:
        return training_memory(model, sft(**block, **qat)).total - training_memory(model, sft(**block)).total

    assert more() == 2 * model.linear_parameters
    assert more(lora={"targetModules": ["q_proj"]}) == 2 * 32 * 4096 * 4096
    assert more(method="full") == 4 * model.parameters


def test_70b_qlora_fits_where_others_found_it_to() -> None:
    """About 43 GiB at one sequence of 2,048 tokens (Unsloth 41, axolotl 40 to 48, LLaMA-Factory 48)."""
    total = training_memory(read(LLAMA_70B), sft(method="qlora")).total / GIB
    assert total == pytest.approx(43, rel=TOLERANCE)
    assert total < 48


def test_checkpointed_activations_and_logits_grow_with_length() -> None:
    """2.5 GiB of block inputs at 2k tokens on 70B, four times as much at 8k; float32 logits 0.98 GiB at 2k."""
    model = read(LLAMA_70B)
    kept = activation_bytes(model, 2, full=False, recomputed=True)
    one_block = activation_bytes(model, 2, full=False, recomputed=False) / model.layers
    assert (kept - one_block) * 2048 / GIB == pytest.approx(2.5)
    short, long = (training_memory(model, sft(method="qlora", training={"maxLength": n})) for n in (2048, 8192))
    assert long.activations == 4 * short.activations
    assert short.logits * 4 / 14 / GIB == pytest.approx(0.98, abs=0.01)


def test_what_makes_memory_smaller_or_larger() -> None:
    """Every lever moves its own part, in its direction."""
    model = read(LLAMA_8B)
    plain = training_memory(model, sft())
    assert training_memory(model, sft(training={"gradientCheckpointing": False})).activations > 5 * plain.activations
    assert training_memory(model, sft(training={"microBatchSize": 4})).activations == 4 * plain.activations
    assert training_memory(model, sft(training={"optimizer": "adamw8bit"})).optimizer == plain.optimizer / 4
    assert training_memory(model, sft(training={"precision": "fp32"})).weights == 2 * plain.weights
    assert training_memory(model, sft(method="qlora")).weights < plain.weights / 2.5
    assert training_memory(model, Preference()).activations == 2 * plain.activations
    assert training_memory(model, sft(), tokens=1024).logits == plain.logits / 2
    on_cpu = training_memory(model, sft(), on_gpu=False)
    assert (on_cpu.weights, on_cpu.context) == (2 * plain.weights, 0)


def saved_bytes(layers: int, *, method: str, tokens: int) -> tuple[Architecture, int]:
    """What autograd keeps for the backward pass of a real model, weights and their casts not counted."""
    shape: dict[str, Any] = {**TINY, "num_hidden_layers": layers, "hidden_size": 128, "intermediate_size": 384}
    config = CONFIG_MAPPING["llama"](**shape)
    model: Any = from_config(config).to(torch.float32 if method == "full" else torch.bfloat16)
    if method != "full":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", use_dora=method == "dora"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tokens in tensor.shape:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", dtype=torch.bfloat16), hooks:
        logits = model(input_ids=torch.zeros((1, tokens), dtype=torch.long)).logits
    assert logits.requires_grad
    return read(config.to_dict()), sum(kept.values())


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_activations_are_those_that_autograd_keeps(method: str) -> None:
    """Per block and token, measured as the difference between two depths: within a twentieth."""
    tokens = 307  # no other size of the model
    model, less = saved_bytes(1, method=method, tokens=tokens)
    _, more = saved_bytes(3, method=method, tokens=tokens)
    full, dora = method == "full", method == "dora"
    estimated = activation_bytes(model, 2, full=full, recomputed=False, dora=dora) / model.layers
    assert estimated == pytest.approx((more - less) / 2 / tokens, rel=0.05)


# ---------------------------------------------------------------- disk

LLAMA_CPP_8B = {
    **{"IQ1_S": 1.87, "IQ1_M": 2.01, "IQ2_XXS": 2.23, "IQ2_XS": 2.42, "IQ2_S": 2.56, "IQ2_M": 2.74},
    **{"IQ3_XXS": 3.04, "IQ3_XS": 3.27, "IQ3_S": 3.42, "IQ3_M": 3.52, "IQ4_XS": 4.17, "IQ4_NL": 4.38},
    **{"Q2_K_S": 2.78, "Q2_K": 2.95, "Q3_K_S": 3.41, "Q3_K_M": 3.74, "Q3_K_L": 4.02, "Q4_K_S": 4.36, "Q4_K_M": 4.58},
    **{"Q5_K_S": 5.21, "Q5_K_M": 5.33, "Q6_K": 6.14, "Q8_0": 7.95, "F16": 14.96},
}
"""GiB of Llama-3.1-8B, from llama.cpp's tools/quantize/README.md."""
OUR_SMOLLM2 = {
    "Q2_K": 88201568,
    "Q3_K_M": 93509984,
    "Q4_K_M": 105453920,
    "Q5_K_M": 112103264,
    "Q6_K": 138382688,
    "Q8_0": 144810848,
    "F16": 270885728,
    "BF16": 270885728,
}
"""Bytes of the files that llama.cpp made of SmolLM2-135M, whose width is no multiple of 256."""


@pytest.mark.parametrize(("name", "gib"), LLAMA_CPP_8B.items(), ids=LLAMA_CPP_8B)
def test_gguf_sizes_are_those_that_llama_cpp_publishes(name: str, gib: float) -> None:
    """Within half a percent, or the last figure that is printed."""
    assert gguf_bytes(read(LLAMA_8B), GGUFType(name)) / GIB == pytest.approx(gib, rel=0.005, abs=0.01)


@pytest.mark.parametrize(("name", "size"), OUR_SMOLLM2.items(), ids=OUR_SMOLLM2)
def test_gguf_sizes_with_fallback_types(name: str, size: int) -> None:
    """Rows of 576 numbers take other types: within a percent of real files."""
    assert gguf_bytes(read(SMOLLM2), GGUFType(name)) == pytest.approx(size, rel=0.01)


def test_70b_in_q4_k_m() -> None:
    """43.1 GB: reference/trainers.md, section 4.2."""
    assert gguf_bytes(read(LLAMA_70B), GGUFType.Q4_K_M) / 1e9 == pytest.approx(43.1, rel=0.02)


def test_fused_layers_have_sizes_too(tiny: tuple[Architecture, torch.nn.Module]) -> None:
    """Every family, every type: between one and thirty-three bits a linear weight."""
    model, _ = tiny
    for name in GGUFType:
        assert (
            model.linear_parameters
            < 8 * gguf_bytes(model, name)
            < 33 * model.parameters + 32 * (model.vectors + model.biases) + 8 * 48 * 320
        )


def test_disk_adds_up() -> None:
    """Base, merged model, the 16-bit GGUF once, each quant, and what bitsandbytes loads."""
    model = read(LLAMA_8B)
    quantize = {"gguf": ["F16", "Q4_K_M"], "bitsandbytes": ["nf4"]}
    need = disk(model, parse(raw_job(SFT, MERGE, {"name": "gguf", "quantize": quantize})).spec)
    assert need.base == need.merged == 2 * model.parameters
    assert need.total == 2 * need.base + need.converted + need.quants[GGUFType.Q4_K_M] + need.packed
    assert need.packed / 1e9 == pytest.approx(5.7, rel=0.01)  # 6.98 billion linear weights, and 2.1 GB of tables
    assert disk(model, parse(raw_job(SFT)).spec).total == need.base


def test_bitsandbytes_folders_have_their_real_size() -> None:
    """SmolLM2 as nf4 is 106.7 MiB; int8 adds four bytes a row."""
    model = read(SMOLLM2)
    assert bitsandbytes_bytes(model, "nf4") / 2**20 == pytest.approx(106.7, rel=0.01)
    assert bitsandbytes_bytes(model, "int8") > bitsandbytes_bytes(model, "nf4") * 1.4


def test_a_type_without_another_to_fall_back_on() -> None:
    """llama.cpp writes Q1_0 only of rows of whole blocks: SmolLM2's 576 are none, Llama 3's are."""
    assert "multiple of 128, and this model has some of 576" in unfit(read(SMOLLM2), GGUFType.Q1_0)
    assert not unfit(read(LLAMA_8B), GGUFType.Q1_0)
    assert not any(unfit(read(SMOLLM2), name) for name in GGUFType if name is not GGUFType.Q1_0)


def test_ppo_of_an_8b_model_fits_one_gpu() -> None:
    """Policy, reference and critic share the weights; a reward model of the same size is a second time 15 GiB."""
    model = read(LLAMA_8B)
    block = Rl(rewards=[RewardSource(stage="judge"), RewardSource(builtin=BuiltinReward.LENGTH)])
    memory = training_memory(model, block)
    assert memory.rewards == memory.weights == 2 * model.parameters
    assert 32 * GIB < memory.total < 60 * GIB
    alone = training_memory(model, block.model_copy(update={"rewards": block.rewards[1:]}))
    assert memory.total - alone.total == memory.rewards


def test_sampling_may_need_more_than_learning() -> None:
    """Keys and values of all answers of a batch, up to what one batch may hold."""
    model = read(LLAMA_8B)
    block = Rl(rewards=[RewardSource(builtin=BuiltinReward.LENGTH)])
    steps = [block.model_copy(update={"training": Training(batch_size=n)}) for n in (1, 64)]
    few, many = (training_memory(model, step) for step in steps)
    cache = 2 * 2 * model.layers * model.keys * CACHED_TOKENS
    learning = few.activations + few.logits
    assert many.workspace - few.workspace == cache - learning > 0


def test_a_reward_model_has_two_sequences_and_no_vocabulary() -> None:
    """As a pair of preference, without logits."""
    model = read(LLAMA_8B)
    reward, pair = training_memory(model, Reward()), training_memory(model, Preference())
    assert reward.logits == 0
    assert reward.activations == pair.activations
