"""Adapters as GGUFs of their own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.stages.gguf_models import random_gguf as random_gguf
from tests.stages.gguf_models import random_model as random_model
from tests.stages.gguf_models import smollm2 as smollm2
from tests.stages.gguf_models import write_random
from tests.stages.test_imatrix import train
from tests.stages.test_quantize import log_of, rows
from tests.stages.training_job import Job, JobMaker
from transformers import AutoModelForCausalLM

from finetune_cli import commands
from finetune_cli.chat import Chat
from finetune_cli.errors import CommandError
from finetune_jobs.gguf import lora, metadata
from finetune_jobs.gguf.convert import convert
from finetune_jobs.gguf.engine import GGUFModel
from finetune_jobs.run.errors import ConfigurationError, InputMissingError
from finetune_jobs.store.client import Store

IDS = list(range(100, 130))


def write_adapter(base: Path, directory: Path, **settings: Any) -> np.ndarray[Any, Any]:
    """An adapter that changes much; the log-probabilities of the tuned model after the first ten tokens."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    shape = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    tuned: Any = get_peft_model(model, LoraConfig(**shape))
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(directory)
    with torch.no_grad():
        logits = tuned(torch.tensor([IDS])).logits[0, 9:-1].double()
    found: np.ndarray[Any, Any] = logits.log_softmax(-1).numpy()
    return found


def divergence(wanted: np.ndarray[Any, Any], path: Path, adapter: Path | None) -> float:
    """Mean KL divergence of the GGUF, with the adapter over it, in nats."""
    with GGUFModel(path, lora=adapter) as model:
        (found,) = model.answer_logprobs([(IDS[:10], IDS[10:])])
    return float((np.exp(wanted) * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"alpha_pattern": {"q_proj": 20}, "rank_pattern": {"down_proj": 9}, "use_rslora": True},
    ],
    ids=["plain", "rank-stabilized", "patterns"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_adapter_over_its_base_is_the_tuned_model(
    smollm2: Path, tmp_path: Path, tied: bool, settings: dict[str, Any]
) -> None:
    """Whatever PEFT's scale is made of: log-probabilities as transformers gives them, base and adapter in float32."""
    base = write_random(tmp_path / "model", smollm2, dtype="float32", tie_word_embeddings=tied)
    wanted = write_adapter(base, tmp_path / "adapter", **settings)
    convert(base, tmp_path / "base.gguf", name="base", precision="f32")
    assert lora.convert(tmp_path / "adapter", base, tmp_path / "lora.gguf", name="mine") == 14
    head = metadata.read(tmp_path / "lora.gguf")
    assert (head.fields["general.type"], head.fields["adapter.type"]) == ("adapter", "lora")
    assert divergence(wanted, tmp_path / "base.gguf", tmp_path / "lora.gguf") < 1e-5
    assert divergence(wanted, tmp_path / "base.gguf", None) > 1e-2


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"use_dora": True}, "DoRA magnitude"), ({"modules_to_save": ["embed_tokens"]}, "is trained whole")],
)
def test_what_the_format_cannot_hold_is_refused(
    random_model: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    """An adapter that would come out as another one is not written."""
    write_adapter(random_model, tmp_path / "adapter", **settings)
    with pytest.raises(ConfigurationError, match=words):
        lora.convert(tmp_path / "adapter", random_model, tmp_path / "lora.gguf", name="mine")


def test_adapter_of_another_model_is_refused(random_model: Path, random_gguf: Path, tmp_path: Path) -> None:
    """llama.cpp's words, and the file's name."""
    (tmp_path / "lora.gguf").write_bytes(random_gguf.read_bytes())
    with pytest.raises(InputMissingError, match=r"lora\.gguf cannot be laid over model\.gguf"):
        GGUFModel(random_gguf, lora=tmp_path / "lora.gguf")


def test_chat_lays_an_adapter_over_its_base(random_model: Path, random_gguf: Path, tmp_path: Path) -> None:
    """``finetune chat BASE.gguf --adapter``: the answer that our own engine gives with it, which is another without."""
    write_adapter(random_model, tmp_path / "adapter")
    lora.convert(tmp_path / "adapter", random_model, tmp_path / "lora.gguf", name="mine")
    answers = []
    for adapter in (tmp_path / "lora.gguf", None):
        chat = Chat(random_gguf, adapter=adapter, max_tokens=8, context=256)
        with GGUFModel(random_gguf, lora=adapter) as model:
            prompt = model.tokenize(model.render([{"role": "user", "content": "Where is Oslo?"}]))
            (expected,) = model.generate([prompt], 8)
        answers.append("".join(chat.ask("Where is Oslo?")))
        assert answers[-1] == expected.text
    assert answers[0] != answers[1]
    with pytest.raises(CommandError, match="cannot read"):
        Chat(random_gguf, adapter=tmp_path / "gone.gguf")


def test_stage_leaves_the_merged_adapter_too(make_job: JobMaker, random_model: Path) -> None:
    """sft, merge, quantize with ``loraGGUF``: the file stands beside the others and was held against the merged model;
    it is no model, so the Modelfile does not name it."""
    training = {"maxSteps": 3, "batchSize": 2, "learningRate": 0.01, "precision": "fp32", "warmupRatio": 0}
    pipeline = [
        {"name": "sft", "sft": {"lora": {"r": 4, "rankStabilized": True}, "training": training}},
        {"name": "merge", "merge": {"dtype": "float32"}},
        {"name": "gguf", "quantize": {"gguf": ["Q8_0"], "loraGGUF": True}},
    ]
    evaluation = {"skip": True, "maxNewTokens": 4}
    roles = {"train": train(8), "eval": train(2), "test": rows()}
    job = make_job(roles, model=random_model, pipeline=pipeline, evaluation=evaluation)
    job.run("sft")
    job.run("merge")
    result = job.run("gguf")
    assert {a.name for a in result.artifacts} == {"Q8_0", "LoRA", "Modelfile"}
    assert result.outputs.keys() == {"gguf/Q8_0", "lora", "log"}
    said = log_of(job, result)["lora"]
    assert said["base"] == "base"
    assert said["modules"] == 14
    assert said["kl"] < 1e-4
    assert "LoRA" not in (job.files(result) / "Modelfile").read_text()
    assert json.loads((job.files(result) / "quantize.json").read_text())["lora"]["file"] == "tiny-LoRA.gguf"


class Finished:
    """A job of which the commands only look at results."""

    name, command = "tiny", "finetune"

    def __init__(self, job: Job, stages: list[str], folder: Path) -> None:
        self.job, self.stages, self.downloads = job, stages, folder

    def definition(self) -> Any:
        """Its spec."""
        return SimpleNamespace(spec=self.job.spec)

    def status(self) -> Any:
        """Stages that are done."""
        results = [SimpleNamespace(manifest=self.job.inputs[name]) for name in self.stages]
        return SimpleNamespace(
            stages=[SimpleNamespace(result=one, state=SimpleNamespace(done=True)) for one in results]
        )

    @contextmanager
    def store(self, told: object) -> Iterator[Store]:
        """Where they are."""
        yield self.job.store


def test_chat_switches_between_two_adapters(make_job: JobMaker, random_model: Path, tmp_path: Path) -> None:
    """Two adapters merged by TIES, quantized with ``loraGGUF``, the base beside: each adapter's GGUF stands beside the
    merged model's, held against base and that adapter, and ``finetune chat NAME --adapter STAGE`` answers as that
    adapter over the base's GGUF does."""
    training = {"maxSteps": 3, "batchSize": 2, "learningRate": 0.02, "precision": "fp32", "warmupRatio": 0}
    pipeline = [
        {"name": "sft-a", "sft": {"lora": {"r": 4}, "training": training}},
        {"name": "sft-b", "from": "base", "sft": {"lora": {"r": 2}, "training": {**training, "maxSteps": 5}}},
        {"name": "merge", "merge": {"adapters": [{"stage": "sft-a"}, {"stage": "sft-b"}], "combination": "ties"}},
        {"name": "gguf", "quantize": {"gguf": ["Q8_0"], "loraGGUF": True}},
        {"name": "plain", "from": "base", "quantize": {"gguf": ["F16"]}},
    ]
    roles = {"train": train(8), "eval": train(2), "test": rows()[:2]}
    job = make_job(roles, model=random_model, pipeline=pipeline, evaluation={"skip": True, "maxNewTokens": 4})
    results = {name: job.run(name) for name in ("sft-a", "sft-b", "merge", "gguf", "plain")}
    assert {a.name for a in results["gguf"].artifacts} == {"Q8_0", "LoRA-sft-a", "LoRA-sft-b", "Modelfile"}
    assert {"lora/sft-a", "lora/sft-b"} <= results["gguf"].outputs.keys()
    said = log_of(job, results["gguf"])["lora"]
    assert [one["kl"] < 1e-4 for one in said.values()] == [True, True]

    finished: Any = Finished(job, list(results), tmp_path / "downloads")
    base = job.files(results["plain"]) / "tiny-F16.gguf"
    answers = {}
    for name in ("sft-a", "sft-b"):
        path, over = commands.chat_files("tiny", name, "", finished)
        assert path.read_bytes() == base.read_bytes()
        answers[name] = "".join(Chat(path, adapter=over, max_tokens=8, context=256).ask("Where is Oslo?"))
        tuned = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32),
            str(job.files(results[name]) / "adapter"),
        )
        with torch.no_grad():
            wanted = tuned(torch.tensor([IDS])).logits[0, 9:-1].double().log_softmax(-1).numpy()
        assert divergence(wanted, path, over) < 1e-4
    merged, _ = commands.chat_files("tiny", "", "", finished)
    assert merged.name == "tiny-Q8_0.gguf"
    assert answers["sft-a"] != answers["sft-b"]

    without: Any = Finished(job, [name for name in results if name != "plain"], tmp_path / "downloads")
    with pytest.raises(CommandError, match=r"tiny makes no GGUF of base, .* add `- {name: base-gguf, from: base"):
        commands.chat_files("tiny", "sft-a", "", without)
    with pytest.raises(CommandError, match=r"sft-a is no \.gguf; a stage's adapter goes with its job"):
        commands.chat_files("some.gguf", "sft-a", "", None)
