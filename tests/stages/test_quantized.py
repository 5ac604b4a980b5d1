"""qlora's ways to store the base: trained on, interrupted, and folded into the base that fits better."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from tests.stages.test_adapters import ROLES, TRAINING, base, difference, file_of, logits
from tests.stages.training_job import Job, JobMaker, StopAfter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune_api.types import Quantization
from finetune_jobs.merging.dequantize import write_dequantized
from finetune_jobs.run.errors import PreemptedError

AutoModel: Any = AutoModelForCausalLM
Config: Any = BitsAndBytesConfig
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"type": "nf4"},
    "nf4, plain scales": {"type": "nf4", "doubleQuant": False},
    "fp4": {"type": "fp4"},
    "int8": {"type": "int8"},
}


def pipeline(kind: str, merge: dict[str, Any] | None = None, **lora: Any) -> list[dict[str, Any]]:
    """One qlora stage that saves every other step, and a merge."""
    block = {"method": "qlora", "quantization": KINDS[kind], "lora": lora, "training": TRAINING}
    return [
        {"name": "train", "sft": {**block, "checkpoint": {"steps": 2}}},
        {"name": "merge", "merge": {"dtype": "float32", **(merge or {})}},
    ]


def quantized(directory: Path, kind: str) -> Any:
    """The model as bitsandbytes and transformers hold it, by their own words."""
    if kind == "int8":
        config = Config(load_in_8bit=True)
    else:
        double = KINDS[kind].get("doubleQuant", True)
        config = Config(
            load_in_4bit=True,
            bnb_4bit_quant_type=KINDS[kind]["type"],
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModel.from_pretrained(
        directory, dtype=torch.float32, quantization_config=config, device_map={"": torch.device("cpu")}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_base_is_what_the_layers_hold(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    """Every linear layer's weight is what bitsandbytes reads back, bit for bit; all else is the base's."""
    original = base(tiny_model)
    names = [n for n, m in original.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    settings = Quantization.model_validate(KINDS[kind], strict=False)
    write_dequantized(tiny_model, tmp_path / "raised", settings, names, 1 << 30, lambda: None)
    raised, held = base(tmp_path / "raised"), quantized(tiny_model, kind)
    if kind == "int8":
        logits(held)  # its scales find their place when it is first run
    for name in names:
        weight = raised.get_submodule(name).weight
        torch.testing.assert_close(
            weight, dequantize_module_weight(held.get_submodule(name)).float(), rtol=0, atol=1e-7
        )
        assert 1e-4 < difference(weight.detach(), original.get_submodule(name).weight.detach()) < 0.2
    assert torch.equal(raised.model.embed_tokens.weight, original.model.embed_tokens.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_is_resumed_with_the_same_bits(make_job: JobMaker, kind: str) -> None:
    """The loss falls; a run that is stopped again and again ends as one that was not."""
    plain = make_job(ROLES, pipeline=pipeline(kind))
    expected = plain.run("train")
    log = plain.log(expected)
    assert log["curve"][-1]["loss"] < log["curve"][0]["loss"]
    assert log["quantization"]["type"] == KINDS[kind]["type"]
    job = make_job(ROLES, pipeline=pipeline(kind))
    attempts = 0
    while True:
        try:
            result = job.run("train", StopAfter(9 + attempts))
            break
        except PreemptedError:
            attempts += 1
            assert attempts < 25, "the attempts make no progress"
    assert attempts > 0
    assert file_of(result) == file_of(expected)


def merged(job: Job) -> tuple[dict[str, Any], Path, Any]:
    """``merge.json``, the files' folder, and the figures."""
    result = job.run("merge")
    directory = job.files(result)
    return json.loads((directory / "merge.json").read_text()), directory / "model", result.figures


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_merge_into_the_dequantized_base_is_the_model_that_was_trained(
    make_job: JobMaker, tiny_model: Path, kind: str, variant: str
) -> None:
    """Its logits are those of the adapter on the 4-bit base, to 1e-5; into the original they are others."""
    job = make_job(ROLES, pipeline=pipeline(kind, {"base": "dequantized"}, variant=variant))
    adapter = job.files(job.run("train")) / "adapter"
    log, directory, figures = merged(job)
    trained = logits(PeftModel.from_pretrained(quantized(tiny_model, kind), str(adapter)))
    assert difference(logits(base(directory)), trained) <= 1e-5
    assert difference(logits(PeftModel.from_pretrained(base(tiny_model), str(adapter))), trained) > 1e-3
    assert log["base"] == {"kept": "dequantized", "evalLoss": {}}
    assert figures["base"] == "dequantized"


def test_auto_keeps_the_better_base_and_records_both(make_job: JobMaker, tiny_model: Path) -> None:
    """By the loss on eval rows, which is that of the merged models, computed here on them."""
    losses: dict[str, float] = {}
    job = make_job(ROLES, pipeline=pipeline("nf4"))
    job.run("train")
    log, directory, figures = merged(job)
    for name in ("original", "dequantized"):
        job.spec = make_job(ROLES, pipeline=pipeline("nf4", {"base": name})).spec.model_copy(
            update={"storage": job.spec.storage}
        )
        _, one, _ = merged(job)
        losses[name] = loss(base(one), tiny_model)
        assert (difference(logits(base(one)), logits(base(directory))) < 1e-6) is (name == log["base"]["kept"])
    assert log["base"]["evalLoss"] == pytest.approx(losses, rel=1e-5)
    assert log["base"]["kept"] == min(losses, key=losses.__getitem__)
    assert figures["evalLossOriginal"] == log["base"]["evalLoss"]["original"] != figures["evalLossDequantized"]


def loss(model: Any, directory: Path) -> float:
    """Mean over the answers' tokens of the eval rows, stop token included."""
    from tests.stages.training_job import answer_log_prob
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = [answer_log_prob(model, tokenizer, r["messages"][:1], r["messages"][1]["content"]) for r in ROLES["eval"]]
    return -sum(total for total, _ in found) / sum(tokens for _, tokens in found)


def test_after_lora_there_is_one_base(make_job: JobMaker) -> None:
    """Nothing is scored, and no figure of a base is recorded."""
    job = make_job(ROLES, pipeline=[{"name": "train", "sft": {"training": TRAINING}}, {"name": "merge", "merge": {}}])
    job.run("train")
    log, _, figures = merged(job)
    assert log["base"] == {"kept": "original", "evalLoss": {}}
    assert "base" not in figures
