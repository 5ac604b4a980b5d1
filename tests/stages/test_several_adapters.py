"""Two adapters on one base, merged in every way; each result is reckoned again from the adapters' files."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.stages.test_merge import make_adapter
from tests.stages.training_job import Job, JobMaker, chat_rows
from tests.unit.test_combining import Array, delta, elect
from transformers import AutoModelForCausalLM, GPT2Config

from finetune_api.stage import Manifest
from finetune_jobs.merging import parity
from finetune_jobs.merging.blend import Blend, write_adapter
from finetune_jobs.merging.combine import Combination, Drop
from finetune_jobs.merging.merge import merge
from finetune_jobs.run.errors import InputMissingError, PreemptedError
from finetune_jobs.run.preemption import Stop
from finetune_jobs.store import layout
from finetune_jobs.store.checkpoints import Checkpoints

TRAINING = {"batchSize": 4, "maxSteps": 6, "learningRate": 2e-2, "precision": "fp32"}
A: dict[str, Any] = {"name": "sft-a", "sft": {"lora": {"r": 4}, "training": TRAINING, "checkpoint": {"steps": 2}}}
B: dict[str, Any] = {
    "name": "sft-b",
    "from": "base",
    "sft": {
        "lora": {"r": 2, "rankStabilized": True, "variant": "pissa"},
        "training": {**TRAINING, "maxSteps": 4},
        "checkpoint": {"steps": 4},
    },
}
NAMED = [{"stage": "sft-a", "weight": 0.8}, {"stage": "sft-b", "weight": -0.5}]
ROWS = {"train": chat_rows(6), "eval": chat_rows(3, seed=1)}


def merging(name: str, *adapters: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A merge in float32, for what is exact."""
    block = {"dtype": "float32", "adapters": list(adapters or NAMED), **settings}
    return {"name": name, "from": "sft-a", "merge": block}


def merged(job: Job, name: str) -> tuple[Manifest, dict[str, Any], Path]:
    """The result, its log and its files."""
    result = job.run(name)
    directory = job.files(result)
    return result, json.loads((directory / "merge.json").read_text()), directory


def added(base: Path, model: Path) -> dict[str, Array]:
    """What a merge added to each linear layer of the tiny model."""
    before, after = load_file(base / "model.safetensors"), load_file(model / "model.safetensors")
    layers = [name.removesuffix(".weight") for name in before if name.endswith("_proj.weight")]
    return {n: after[f"{n}.weight"].double().numpy() - before[f"{n}.weight"].double().numpy() for n in layers}


def expected(how: str, module: str, adapters: list[Path], seed: int) -> Array:
    """The combined change, in numpy."""
    found = [delta(path, module) for path in adapters]
    assert found[0] is not None
    assert found[1] is not None
    weighted = [entry["weight"] * d for entry, d in zip(NAMED, found, strict=True) if d is not None]
    if how == "ties":
        for n, d in enumerate(weighted):
            weighted[n] = np.where(np.abs(d) >= np.sort(np.abs(d), axis=None)[-int(0.2 * d.size)], d, 0)
        return elect(weighted)
    if how == "dareTies":
        for n, d in enumerate(weighted):
            key = hashlib.sha256(f"{seed}/{n}/{module}.weight".encode()).digest()[:16]
            kept = Drop(int.from_bytes(key, "big"), 0.6).kept(0, d.size).reshape(d.shape)
            weighted[n] = np.where(kept, d / 0.6, 0)
        return elect(weighted)
    total: Array = np.sum(weighted, axis=0)
    if how == "svd":
        u, s, vh = np.linalg.svd(total)
        total = u[:, :3] * s[:3] @ vh[:3]
    return total


SETTINGS: dict[str, dict[str, Any]] = {"linear": {}, "ties": {}, "dareTies": {"density": 0.6}, "svd": {"rank": 3}}


def test_every_combination(make_job: JobMaker, tiny_model: Path) -> None:
    """Weights within 1e-5 of the change that the formula gives, every check held, the log says what was merged how; a
    merge that is stopped, and one that is made again, come to the same bytes."""
    merges = [merging(how.lower(), combination=how, **settings) for how, settings in SETTINGS.items()]
    job = make_job(ROWS, pipeline=[A, B, *merges], seed=5)
    adapters = [job.files(job.run(name)) / "adapter" for name in ("sft-a", "sft-b")]
    for how in SETTINGS:
        if how == "ties":
            with pytest.raises(PreemptedError):
                job.run(how.lower(), stop=StopAtFifth())
        result, log, directory = merged(job, how.lower())
        for module, got in added(tiny_model, directory / "model").items():
            wanted = expected(how, module, adapters, seed=5)
            assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted), module
        assert log["adapters"] == NAMED
        assert (log["combination"], result.figures["combination"]) == (how, how)
        assert log["modules"]["count"] == 14
        assert 0 < log["modules"]["largestError"] <= 1e-5
        assert 0 <= log["logits"]["relativeL2"] <= 1e-5
        assert log.get("density") == {"ties": 0.2, "dareTies": 0.6}.get(how)
        assert ("adapter" in result.outputs) is (how == "svd")
        if how in ("linear", "ties"):
            continue
        job.store.delete([job.inputs.pop(how.lower())])
        again = job.run(how.lower())
        assert again.digest == result.digest
        assert again.outputs["model"] == result.outputs["model"]


class StopAtFifth(Stop):
    """Told to stop at the fifth look."""

    looks = 0

    def check(self) -> None:
        """Counts the looks."""
        self.looks += 1
        if self.looks == 5:
            self.request()
        super().check()


def test_what_svd_leaves_runs_in_peft(make_job: JobMaker, tiny_model: Path) -> None:
    """The adapter of low rank over the base gives the merged model's logits."""
    job = make_job(ROWS, pipeline=[A, B, merging("svd", combination="svd", rank=2)])
    job.run("sft-a")
    job.run("sft-b")
    _, log, directory = merged(job, "svd")
    assert 0 < log["svd"]["largestLoss"] < 1
    ids = torch.arange(30, 60)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(base, str(directory / "adapter"))(ids).logits
        got = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)(ids).logits
    assert float((got - wanted).norm() / wanted.norm()) <= 1e-5


def test_checkpoints_of_a_training(make_job: JobMaker, tiny_model: Path, tmp_path: Path) -> None:
    """An adapter as a checkpoint has it: the best is the result of a stage that keeps the best, the last and that of a
    step are what the trainer saved there; one that is not there is named with those that are."""
    names = {"result": None, "best": "best", "last": "last", "fourth": 4, "none": 3}
    ones = {n: {"stage": "sft-a", **({} if at is None else {"checkpoint": at})} for n, at in names.items()}
    job = make_job(ROWS, pipeline=[A, *(merging(name, one) for name, one in ones.items())])
    trained = job.run("sft-a")
    evaluations = job.log(trained)["evaluations"]
    best = min(evaluations, key=lambda e: e["evalLoss"])["step"]
    sums = {}
    for name in ("result", "best", "last", "fourth"):
        result, log, directory = merged(job, name)
        assert log["adapters"][0].get("step") == {"best": best, "last": 6, "fourth": 4}.get(name)
        sums[name] = result.outputs["model"]
    assert sums["result"] == sums["best"]
    same = {2: set(), 4: {"fourth"}, 6: {"last"}}[best]
    assert {name for name in ("last", "fourth") if sums[name] == sums["best"]} == same
    saved = Checkpoints(job.store, layout.result_prefix(job.store.prefix, job.ref, "sft-a", trained.digest), "", 1)
    saved.fetch(4, tmp_path / "saved")
    for module, got in added(tiny_model, directory / "model").items():
        wanted = delta(tmp_path / "saved/adapter", module)
        assert wanted is not None
        assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted), module
    words = r"pipeline\[5\]\.merge\.adapters\[0\]\.checkpoint: stage sft-a has no whole checkpoint of step 3"
    with pytest.raises(InputMissingError, match=words + r" \(there: 2, 4, 6\)"):
        job.run("none")


def test_an_embedding_that_was_trained_whole_counts_by_what_it_adds(make_job: JobMaker, tiny_model: Path) -> None:
    """Half of its way from the base's, beside an adapter that left it alone; it stays the head, and the merged model's
    logits are those of the base that computes so."""
    lora = {"r": 2, "modulesToSave": ["embed_tokens", "lm_head"]}
    whole = {**B, "sft": {"lora": lora, "training": {**TRAINING, "maxSteps": 3}, "checkpoint": {"steps": 3}}}
    job = make_job(ROWS, pipeline=[A, whole, merging("both", {"stage": "sft-a"}, {"stage": "sft-b", "weight": 0.5})])
    first, second = (job.files(job.run(name)) / "adapter" for name in ("sft-a", "sft-b"))
    trained = load_file(second / "adapter_model.safetensors")
    _, log, directory = merged(job, "both")
    before, after = (load_file(path / "model.safetensors") for path in (tiny_model, directory / "model"))
    name = "model.embed_tokens.weight"
    wanted = (before[name] + trained[f"base_model.model.{name}"]) / 2
    assert not torch.equal(before[name], wanted)
    torch.testing.assert_close(after[name], wanted, rtol=1e-5, atol=1e-6)
    assert "lm_head.weight" not in after
    assert log["logits"]["relativeL2"] <= 1e-5

    blend = Blend([("a", first, 1.0), ("b", second, 0.5)], Combination())
    example = parity.Example(list(range(30, 60)), list(range(10, 30)))
    assert parity.compare(tiny_model, blend, directory / "model", [example]).relative_l2 <= 1e-5
    assert parity.compare(tiny_model, blend, tiny_model, [example]).relative_l2 > 0.1


def test_two_adapters_beside_one_quantized_base(make_job: JobMaker) -> None:
    """Both bases are tried, and the better is kept, as after one qlora."""
    training = {**TRAINING, "maxSteps": 2, "optimizer": "adamw"}
    trained = [{"name": name, "from": "base", "sft": {"method": "qlora", "training": training}} for name in "ab"]
    both = {"adapters": [{"stage": "a"}, {"stage": "b"}], "combination": "ties"}
    job = make_job(ROWS, pipeline=[*trained, {"name": "both", "merge": both}])
    job.run("a")
    job.run("b")
    result, log, _ = merged(job, "both")
    assert log["base"]["evalLoss"].keys() == {"original", "dequantized"}
    assert log["base"]["kept"] == min(log["base"]["evalLoss"], key=log["base"]["evalLoss"].__getitem__)
    assert result.figures["base"] == log["base"]["kept"]
    assert log["logits"]["relativeL2"] <= 5e-2


@pytest.mark.parametrize(("how", "rank"), [("linear", None), ("svd", 6)], ids=["linear", "svd of enough ranks"])
def test_sum_is_what_peft_gives_by_joining(tmp_path: Path, how: Any, rank: int | None) -> None:
    """Its `cat`, the one way of PEFT's that is a sum of deltas, here of a GPT-2, whose layers hold (in, out), and of
    scales of two kinds; what svd leaves is turned back as PEFT reads it."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    a = make_adapter(tmp_path / "a", tmp_path / "base")
    b = make_adapter(tmp_path / "b", tmp_path / "base", r=2, lora_alpha=6, use_rslora=True)
    ids = torch.arange(20)[None]

    def logits(directory: Path, *adapters: Path) -> torch.Tensor:
        tuned: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        if adapters:
            tuned = PeftModel.from_pretrained(tuned, str(adapters[0]), adapter_name="0")
        for number, adapter in enumerate(adapters[1:], start=1):
            tuned.load_adapter(str(adapter), str(number))
        if len(adapters) > 1:
            tuned.add_weighted_adapter(["0", "1"], [0.7, -1.2], "both", combination_type="cat")
            tuned.set_adapter("both")
        with torch.no_grad():
            found: torch.Tensor = tuned(ids).logits
        return found

    wanted = logits(tmp_path / "base", a, b)
    blend = Blend([("a", a, 0.7), ("b", b, -1.2)], Combination(how, rank=rank))
    (tmp_path / "out").mkdir()
    merge(tmp_path / "base", blend, tmp_path / "out", torch.float32, 1 << 30)
    assert float((logits(tmp_path / "out") - wanted).norm() / wanted.norm()) <= 1e-5
    if how == "svd":
        write_adapter(blend, tmp_path / "left")
        assert float((logits(tmp_path / "base", tmp_path / "left") - wanted).norm() / wanted.norm()) <= 1e-5
