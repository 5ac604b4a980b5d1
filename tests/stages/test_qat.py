import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.stages.training_job import JobMaker, answer_log_prob, chat_rows, write_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from finetune_api.defaults import resolve_lora, resolve_training
from finetune_api.types import GGUFType, Lora, Method, Sft
from finetune_jobs.gguf import metadata
from finetune_jobs.gguf.quantize import quantize
from finetune_jobs.gguf.release import gguf_py
from finetune_jobs.run.errors import ConfigurationError
from finetune_jobs.training.model import Policy, load
from finetune_jobs.training.optimizer import Optimizer
from finetune_jobs.training.qat import Rounding
from finetune_jobs.training.rounding import rounded

AutoModel: Any = AutoModelForCausalLM
CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 300, 12, 4, 150]])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products only lose by sharing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def policy_of(directory: Path, kind: str, method: Method = Method.LORA, **lora: Any) -> Policy:
    """The model, kept rounded for a file of that type; its fresh adapter already does something."""
    block = Sft(method=method, lora=Lora(**lora) if method is Method.LORA else None)
    policy = load(
        directory,
        method=method,
        lora=resolve_lora(block),
        quantization=None,
        adapter=None,
        compute=torch.float32,
        device=CPU,
        seed=1,
    )
    torch.manual_seed(2)
    for parameter in policy.trainable:
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return replace(policy, rounding=Rounding(policy.base, GGUFType(kind), "spec.pipeline[0].sft.qat"))


def stored(weight: Tensor, kind: str) -> Tensor:
    """As merge writes it in bfloat16, and llama.cpp quantizes it."""
    return rounded(weight.bfloat16(), kind)


def loss_of(model: Any) -> Tensor:
    """Of some text."""
    loss: Tensor = model(input_ids=IDS, labels=IDS).loss
    return loss


def test_base_and_adapter_are_rounded_together(tiny_model: Path) -> None:
    """The loss is that of a model with the merged file's weights, and A and B get its weights' gradients through
    W + s B A: dA = s B^T dW, dB = s dW A^T.
    """
    policy = policy_of(tiny_model, "Q4_0", r=4, alpha=6, rank_stabilized=True, bias="none")
    scale = 6 / 4**0.5
    trained = {name.removeprefix("base_model.model."): p for name, p in policy.model.named_parameters()}
    reference = AutoModel.from_pretrained(tiny_model)
    for name, parameter in reference.named_parameters():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in trained:
            a, b = (trained[f"{layer}.lora_{side}.default.weight"].detach() for side in "AB")
            parameter.data = stored(torch.addmm(parameter.data, b, a, alpha=scale), "Q4_0")
        elif "embed" in name:  # tied, and 64 wide: too narrow for Q6_K
            parameter.data = stored(parameter.data, "Q8_0")
    loss_of(policy.model).backward()
    loss_of(reference).backward()
    assert loss_of(policy.model).item() == loss_of(reference).item()
    checked = 0
    for name, parameter in reference.named_parameters():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in trained:
            a, b = (trained[f"{layer}.lora_{side}.default.weight"] for side in "AB")
            assert a.grad is not None
            assert b.grad is not None
            assert torch.allclose(a.grad, scale * b.detach().T @ parameter.grad, rtol=1e-4, atol=1e-7), name
            assert torch.allclose(b.grad, scale * parameter.grad @ a.detach().T, rtol=1e-4, atol=1e-7), name
            checked += 1
    assert checked == 14
    assert policy.rounding is not None
    assert policy.rounding.types == {"Q4_0": 14, "Q8_0": 1}


def test_full_learns_its_own_weights_at_the_rounded_ones(tiny_model: Path) -> None:
    """A step is AdamW's on the weights as they were before rounding, with the gradient at the rounded ones."""
    policy = policy_of(tiny_model, "Q4_K_M", Method.FULL)
    own, reference = (AutoModel.from_pretrained(tiny_model) for _ in range(2))
    for name, parameter in reference.named_parameters():
        more = "embed" in name or any(f"layers.1.{module}" in name for module in ("self_attn.v", "mlp.down"))
        kind = "BF16" if "norm" in name else "Q8_0" if more else "Q5_0"  # rows too narrow for Q4_K and Q6_K
        parameter.data = stored(parameter.data, kind)
    assert loss_of(policy.model).item() == loss_of(reference).item()
    training = resolve_training(Sft(method=Method.FULL))
    optimizer = Optimizer(policy, training)
    optimizer.backward(loss_of(policy.model))
    norm = optimizer.step(1e-3)
    loss_of(reference).backward()
    for mine, theirs in zip(own.parameters(), reference.parameters(), strict=True):
        mine.grad = theirs.grad
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(own.parameters(), training.max_grad_norm)))
    torch.optim.AdamW(own.parameters(), lr=1e-3, weight_decay=0.0).step()
    with policy.own_weights():
        for (name, mine), theirs in zip(policy.model.named_parameters(), own.parameters(), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7), name
    for (name, mine), theirs in zip(policy.model.named_parameters(), own.parameters(), strict=True):
        if "q_proj" in name:
            assert torch.equal(mine, stored(theirs, "Q5_0"))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    """How llama.cpp would store its tensors cannot be told."""
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigurationError, match=r"^spec\.pipeline\[0\]\.sft\.qat: .*no estimate for model_type 'gpt2'"
    ):
        policy_of(tmp_path, "Q4_0", Method.FULL)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_computing_activations_twice_changes_nothing(make_job: JobMaker, precision: str) -> None:
    """Nor do micro-batches; and in 16-bit arithmetic it learns as well."""
    logs = []
    for settings in ({"gradientCheckpointing": False}, {"gradientCheckpointing": True, "microBatchSize": 2}):
        training = {"maxSteps": 6, "batchSize": 4, "learningRate": 1e-2, "precision": precision, "loggingSteps": 1}
        block = {"qat": {"type": "Q4_0"}, "lora": {"r": 8}, "training": {**training, **settings}}
        job = make_job({"train": chat_rows(12)}, pipeline=[{"name": "sft", "sft": block}])
        logs.append(job.log(job.run("sft")))
    once, twice = ([point["loss"] for point in log["curve"]] for log in logs)
    assert twice == pytest.approx(once, rel=1e-4 if precision == "fp32" else 0.05)
    assert once[-1] < once[0] - 0.2
    assert logs[0]["qat"] == {"type": "Q4_0", "tensors": {"Q4_0": 14, "Q8_0": 1}}
    assert logs[0]["method"] == "lora"


def quantized(model: Path, kind: str, scratch: Path) -> Any:
    """The model with the weights of its GGUF, which llama.cpp's own quantizer wrote."""
    gguf, weights = gguf_py(), load_file(model / "model.safetensors")
    config = AutoModel.from_pretrained(model).config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    weights.pop("lm_head.weight", None)  # the embedding once more
    own = {name: names.get_name(name, (".weight",)) for name in weights}
    whole, path = scratch / "whole.gguf", scratch / f"{kind}.gguf"
    writer = gguf.GGUFWriter(whole, "llama")  # without a vocabulary, which the quantizer does not ask for
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(64)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, weight in weights.items():
        writer.add_tensor(own[name], weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantize(whole, path, kind)
    file = metadata.read(path)
    network = AutoModel.from_pretrained(model, dtype=torch.float32)
    for name, parameter in network.named_parameters():
        parameter.data = torch.from_numpy(file.values(own[name]).copy())
    return network


def answer_loss(network: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """The mean negative log-probability of a token of the answers."""
    found = [answer_log_prob(network, tokenizer, row["messages"][:1], row["messages"][1]["content"]) for row in rows]
    return -sum(total for total, _ in found) / sum(count for _, count in found)


def letters(count: int, seed: int) -> list[dict[str, Any]]:
    """Two letters, and those that follow: each is decided by the two before it, by a table that is to be learned."""
    known, rng = random.Random(7), random.Random(seed)
    follows = {pair: known.choice("abcdefghijkl") for pair in itertools.product("abcdefghijkl", repeat=2)}
    rows = []
    for line in range(count):
        text = [rng.choice("abcdefghijkl"), rng.choice("abcdefghijkl")]
        for _ in range(12):
            text.append(follows[text[-2], text[-1]])
        messages = [
            {"role": "user", "content": "".join(text[:2])},
            {"role": "assistant", "content": "".join(text[2:])},
        ]
        rows.append({"id": f"{seed}-{line}", "source": "train.jsonl", "line": line + 1, "messages": messages})
    return rows


def with_outliers(directory: Path, width: int) -> Path:
    """As trained models have them: one column in each block of 32 has larger weights, and spoils the others' levels."""
    write_model(directory, hidden_size=width, intermediate_size=max(128, width))
    network = AutoModel.from_pretrained(directory)
    for name, parameter in network.named_parameters():
        if "proj" in name:
            parameter.data[:, ::32] *= 8
    network.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("kind", "width", "methods"), [("Q4_0", 64, ("lora", "full")), ("Q2_K", 256, ("lora",))])
def test_its_file_loses_less(
    make_job: JobMaker, tmp_path: Path, kind: str, width: int, methods: tuple[str, ...]
) -> None:
    """The held-out loss of the file that llama.cpp makes is lower than after the same training without qat, and is the
    one that training told.
    """

    def sft(steps: int, rate: float, **more: Any) -> dict[str, Any]:
        training = {"maxSteps": steps, "batchSize": 16, "learningRate": rate, "warmupRatio": 0, "precision": "fp32"}
        return {**more, "training": training, "checkpoint": {"steps": steps}}

    first = sft(120, 5e-3, method="full") if width == 64 else sft(60, 2e-3, method="full")
    pipeline: list[dict[str, Any]] = [{"name": "start", "sft": first}]
    for method in methods:
        for name, more in ((f"usual-{method}", {}), (f"qat-{method}", {"qat": {"type": kind}})):
            block = sft(15, 5e-3 if method == "lora" else 1e-3, method=method, **more)
            pipeline.append({"name": name, "from": "start", "sft": block})
            if method == "lora":
                pipeline.append({"name": f"{name}-merge", "merge": {}})
    held = letters(30, seed=2)
    model = with_outliers(tmp_path / "model", width)
    job = make_job({"train": letters(960, seed=1), "eval": held}, model=model, pipeline=pipeline)
    results = {stage["name"]: job.run(stage["name"]) for stage in pipeline}
    for method in methods:
        losses = {}
        for name in (f"usual-{method}", f"qat-{method}"):
            made = job.files(results[f"{name}-merge" if method == "lora" else name]) / "model"
            tokenizer = AutoTokenizer.from_pretrained(made)
            losses[name] = answer_loss(quantized(made, kind, tmp_path), tokenizer, held)
        usual, aware = losses.values()
        assert aware < 0.95 * usual, losses
        assert aware == pytest.approx(float(results[f"qat-{method}"].figures["evalLoss"]), rel=1e-3)
