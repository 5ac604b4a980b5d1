"""Models for transformers in int8 and nf4."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.stages.finished_run import RunMaker
from tests.stages.gguf_models import random_model as random_model
from tests.stages.gguf_models import smollm2 as smollm2
from tests.stages.test_quantize import log_of, rows
from tests.stages.training_job import JobMaker, chat_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.pipeline import targets
from finetune_jobs import bnb
from finetune_jobs.data.encode import encode, load_tokenizer
from finetune_jobs.evaluation.hf import HFModel
from finetune_jobs.gguf import parity


def kl(model: Path, tuned: Path, ids: list[int], start: int) -> np.ndarray[Any, Any]:
    """Divergence at each place from ``start`` on, from the logits alone."""
    logs = []
    for directory in (model, tuned):
        network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, device_map="cpu")
        with torch.no_grad():
            logs.append(network(torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1))
    found: np.ndarray[Any, Any] = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).numpy()
    return found


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.0), ("nf4", 4.5)])
def test_export_loads_as_it_is(tiny_model: Path, tmp_path: Path, kind: str, bits: float) -> None:
    """``from_pretrained`` without any setting gives the quantized layers, and the tokenizer is there; the layers take
    the bits they should; the comparison is what the logits of both give."""
    made = tmp_path / "made"
    bnb.export(tiny_model, made, kind)
    network = AutoModelForCausalLM.from_pretrained(made, device_map="cpu")
    layer = network.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[kind]
    assert layer.weight.numel() * layer.weight.element_size() * 8 <= bits * 64 * 128
    assert type(network.lm_head).__name__ == "Linear"
    assert AutoTokenizer.from_pretrained(made)("a b") == AutoTokenizer.from_pretrained(tiny_model)("a b")
    tokenizer = load_tokenizer(tiny_model, "")
    asked = chat_rows(3)
    known = parity.reference(tiny_model, tokenizer, asked, tmp_path)
    found, error, top1 = bnb.compare(made, known)
    wanted: list[float] = []
    for row in asked:
        encoded = encode(row, tokenizer, loss_on="completion", max_length=512, overlong="drop")
        wanted += kl(tiny_model, made, encoded.input_ids, encoded.supervised.index(True)).tolist()  # type: ignore[union-attr]
    assert found == pytest.approx(np.mean(wanted), rel=1e-3, abs=1e-7)
    assert error == pytest.approx(np.std(wanted) / len(wanted) ** 0.5, rel=1e-3, abs=1e-7)
    assert 0 < found < 0.5
    assert 0.5 < top1 <= 1
    assert HFModel(made).generate([[1, 2, 3]], 3, [], lambda done: None)[0].ids


def test_stage_leaves_and_compares_both(make_job: JobMaker, random_model: Path) -> None:
    """Folders beside the GGUFs, targets of the evaluation, with the figures of the comparison."""
    pipeline = [{"name": "gguf", "quantize": {"gguf": ["F16"], "bitsandbytes": ["int8", "nf4"]}}]
    job = make_job(
        {"test": rows()}, model=random_model, pipeline=pipeline, evaluation={"skip": True, "maxNewTokens": 4}
    )
    result = job.run("gguf")
    assert {"bitsandbytes/int8", "bitsandbytes/nf4"} < result.outputs.keys()
    assert [target.name for target in targets(job.spec)] == ["gguf/F16", "gguf/int8", "gguf/nf4"]
    said = log_of(job, result)["bitsandbytes"]
    assert 0 < said["int8"]["kl"] < said["nf4"]["kl"] < 1
    assert said["nf4"]["sizeBytes"] < said["int8"]["sizeBytes"]
    config = json.loads((job.files(result) / "bitsandbytes-nf4/config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def test_a_stage_for_transformers_alone(make_job: JobMaker, random_model: Path) -> None:
    """No GGUF is made, not even to begin with, and no Modelfile."""
    pipeline = [{"name": "small", "quantize": {"bitsandbytes": ["nf4"]}}]
    job = make_job({"test": rows()}, model=random_model, pipeline=pipeline, evaluation={"skip": True})
    result = job.run("small")
    assert result.outputs.keys() == {"bitsandbytes/nf4", "log"}
    assert 0 < log_of(job, result)["bitsandbytes"]["nf4"]["kl"] < 1
    assert not list(job.files(result).glob("*.gguf"))


def test_each_is_scored_and_stands_in_the_report(start_run: RunMaker) -> None:
    """From prepare to the report, without a GGUF beside: the loss in the scores is that of the folder as
    ``from_pretrained`` loads it, and the table of precisions has a row for each with all of its figures."""
    run = start_run([{"name": "packed", "quantize": {"bitsandbytes": ["nf4", "int8"]}}], evaluation={"maxRows": 2})
    run.run_all()
    report = run.json("report", "report.json")
    assert list(report["scores"]) == ["base", "packed/nf4", "packed/int8"]
    folder = run.files("packed")
    tokenizer = AutoTokenizer.from_pretrained(folder / "bitsandbytes-nf4")
    for kind in ("nf4", "int8"):
        network = AutoModelForCausalLM.from_pretrained(folder / f"bitsandbytes-{kind}", device_map="cpu")
        found = []
        for answer in run.answers(f"packed/{kind}")["test"]:
            before = tokenizer(answer.prompt, add_special_tokens=False)["input_ids"]
            said = tokenizer(f"{answer.reference}<|im_end|>", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = network(torch.tensor([before + said])).logits[0].double().log_softmax(-1)
            found += [-float(logs[len(before) + i - 1, token]) for i, token in enumerate(said)]
        assert report["scores"][f"packed/{kind}"]["loss"] == pytest.approx(np.mean(found), rel=2e-3)
    rows = {row["form"]: row for row in report["precision"]}
    assert list(rows) == ["the reference", "int8", "nf4"]
    assert rows["the reference"]["sizeBytes"] > rows["int8"]["sizeBytes"] > rows["nf4"]["sizeBytes"]
    assert 0 < rows["int8"]["kl"] < rows["nf4"]["kl"]
    assert [rows[kind]["precision"] for kind in ("int8", "nf4")] == ["int8", "int4"]
    assert all(rows[kind]["score"] is not None for kind in ("int8", "nf4"))
    page = (run.files("report") / "index.html").read_text(encoding="utf-8")
    assert all(f"packed/{kind}" in page for kind in ("nf4", "int8"))
