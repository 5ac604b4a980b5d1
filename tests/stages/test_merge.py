import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.stages.training_job import Job, JobMaker, chat_rows
from tests.tinymodel import CHATML
from tests.tinymodel import tiny_model as write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from finetune_api.stage import Manifest
from finetune_api.types import ModelSource
from finetune_jobs.merging import parity
from finetune_jobs.merging.merge import merge
from finetune_jobs.run.errors import ConfigurationError, PreemptedError, StageError
from finetune_jobs.run.preemption import Stop
from finetune_jobs.stages import merge as stage

MANY = 1 << 20


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(2)


def make_base(directory: Path, *, tied: bool, dtype: torch.dtype, shard: str = "1GB", **changed: Any) -> Path:
    """A random Llama of two layers whose weights are large enough to matter; ``changed`` goes into its config."""
    write_tiny_model(directory, tie_word_embeddings=tied, initializer_range=0.2, **changed)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def make_adapter(directory: Path, base: Path, **settings: Any) -> Path:
    """An adapter on every linear layer with a B that is not zero, saved by PEFT."""
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    tuned = get_peft_model(model, LoraConfig(**config))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name or name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(directory)
    return directory


def peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The weights after PEFT's own merge in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {name: parameter.detach() for name, parameter in merged.named_parameters()}


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every shard."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard", ["100KB", "1GB"], ids=["sharded base", "whole base"])
@pytest.mark.parametrize("max_shard_bytes", [100_000, MANY << 4], ids=["sharded result", "whole result"])
def test_same_weights_as_peft(tied: bool, shard: str, max_shard_bytes: int, tmp_path: Path) -> None:
    """In float32 every weight equals PEFT's to 1e-6, in bfloat16 it is PEFT's float32 weight rounded once."""
    base = make_base(tmp_path / "base", tied=tied, dtype=torch.float32, shard=shard)
    adapter = make_adapter(tmp_path / "adapter", base)
    wanted = peft_merged(base, adapter)
    assert (len(list(base.glob("*.safetensors"))) > 1) is (shard == "100KB")
    for dtype in (torch.float32, torch.bfloat16):
        output = tmp_path / str(dtype)
        output.mkdir()
        log = merge(base, adapter, output, dtype, max_shard_bytes)
        merged = load_all(output)
        assert merged.keys() == wanted.keys()
        assert ("lm_head.weight" in merged) is not tied
        assert log["modules"]["count"] == 14
        assert (len(log["shards"]) > 1) is (max_shard_bytes == 100_000)
        for name, tensor in merged.items():
            reference = wanted[name]
            assert tensor.dtype == dtype
            # Sums in another order may fall on the other side of a rounding border: one unit in the last place.
            tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8
            assert float((tensor.float() - reference).norm() / reference.norm()) <= tolerance
            if dtype == torch.bfloat16:
                assert float((tensor == reference.bfloat16()).float().mean()) > 0.999


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"use_rslora": True}, id="rank stabilized"),
        pytest.param({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 3}}, id="patterns"),
        pytest.param({"target_modules": ["q_proj", "down_proj"]}, id="some modules"),
        pytest.param({"target_modules": ["up_proj"], "layers_to_transform": [1]}, id="some layers"),
        pytest.param({"use_dora": True, "use_rslora": True}, id="dora"),
    ],
)
def test_settings_as_peft_reads_them(settings: dict[str, Any], tmp_path: Path) -> None:
    """Scales and targets from the adapter's config give the weights that PEFT's merge gives."""
    base = make_base(tmp_path / "base", tied=True, dtype=torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    (tmp_path / "out").mkdir()
    merge(base, adapter, tmp_path / "out", torch.float32, MANY << 4)
    merged = load_all(tmp_path / "out")
    for name, reference in peft_merged(base, adapter).items():
        torch.testing.assert_close(merged[name], reference, rtol=1e-5, atol=1e-6)


def test_weights_kept_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's layers hold (in, out), some of them square: PEFT's own merge says what belongs where."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base")
    (tmp_path / "out").mkdir()
    log = merge(tmp_path / "base", adapter, tmp_path / "out", torch.float32, MANY << 4)
    assert log["modules"]["count"] == 8
    merged = load_all(tmp_path / "out")
    for name, reference in peft_merged(tmp_path / "base", adapter).items():
        torch.testing.assert_close(merged[name], reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"init_lora_weights": "pissa"}, id="pissa, whose base is changed"),
        pytest.param({"target_modules": ["embed_tokens", "q_proj"]}, id="embedding"),
    ],
)
def test_peft_features_not_merged(settings: dict[str, Any], tmp_path: Path) -> None:
    """Adapters that PEFT saves with a feature we do not merge are refused, never merged without it."""
    base = make_base(tmp_path / "base", tied=False, dtype=torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match=r"not merged|cannot be merged"):
        merge(base, adapter, tmp_path / "out", torch.float32, MANY)


def examples() -> list[parity.Example]:
    """Two rows of random tokens whose answers begin at token 12."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 250, (n,), generator=generator).tolist() for n in (30, 17)]
    return [parity.Example(ids, list(range(12, len(ids)))) for ids in rows]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logit_distance_is_the_float32_one(tied: bool, tmp_path: Path) -> None:
    """The mapped comparison gives what two models loaded whole in float32 give."""
    base = make_base(tmp_path / "base", tied=tied, dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base)
    merged = tmp_path / "out"
    merged.mkdir()
    merge(base, adapter, merged, torch.bfloat16, MANY << 4)
    found = parity.compare(base, adapter, merged, examples())

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        pairs = [
            [model(torch.tensor([e.ids])).logits[0, e.answer[0] - 1 : -1].double() for model in (tuned, whole)]
            for e in examples()
        ]
    wanted, got = (torch.cat(side) for side in zip(*pairs, strict=True))
    kl = torch.nn.functional.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
    assert found.tokens == 18 + 5
    assert found.relative_l2 == pytest.approx(float((got - wanted).norm() / wanted.norm()), rel=1e-3)
    assert found.kl == pytest.approx(float(kl), rel=2e-2)
    assert 1e-4 < found.relative_l2 < 2e-2


def test_biases_are_compared_as_they_were_trained(tmp_path: Path) -> None:
    """A base in 16 bits does not round an adapter's biases, so its float32 merge is no other model."""
    base = make_base(tmp_path / "base", tied=True, dtype=torch.bfloat16, attention_bias=True)
    adapter = make_adapter(tmp_path / "adapter", base, bias="all")
    merged = tmp_path / "out"
    merged.mkdir()
    merge(base, adapter, merged, torch.float32, MANY << 4)
    assert parity.compare(base, adapter, merged, examples()).relative_l2 < 1e-5


def test_another_model_fails_the_comparison(tmp_path: Path) -> None:
    """The base in place of the merged model, or NaN in it, is beyond the bound."""
    base = make_base(tmp_path / "base", tied=True, dtype=torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base)
    distance = parity.compare(base, adapter, base, examples())
    field = "spec.pipeline[1].merge.dtype"
    for dtype in parity.LOGIT_BOUND:
        with pytest.raises(ConfigurationError, match=r"spec.pipeline\[1\].merge.dtype: .* relative L2 of the logits"):
            parity.check(distance, dtype, field)
        with pytest.raises(ConfigurationError, match="relative L2 of the logits nan"):
            parity.check(parity.Distance(float("nan"), float("nan"), 1), dtype, field)


def test_rounding_on_unsure_rows_is_no_other_model() -> None:
    """What bfloat16 alone was measured to cost on math problems after 12 steps passes in bfloat16, not in float32."""
    rounded = parity.Distance(relative_l2=1.81e-2, kl=2.22e-3, tokens=222)
    parity.check(rounded, torch.bfloat16, "")
    with pytest.raises(ConfigurationError):
        parity.check(rounded, torch.float32, "")


def pipeline(**settings: Any) -> list[dict[str, Any]]:
    """A few large steps of sft, then merge."""
    training = {"batchSize": 4, "maxSteps": 6, "learningRate": 2e-2, "precision": "fp32"}
    return [{"name": "sft", "sft": {"training": training}}, {"name": "merge", "merge": settings}]


def merged(job: Job) -> tuple[dict[str, Any], Manifest, Path]:
    """``merge.json``, the result, and its model, after both stages ran."""
    job.run("sft")
    result = job.run("merge")
    directory = job.files(result)
    return json.loads((directory / "merge.json").read_text()), result, directory / "model"


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2e-2), ("float16", 2e-2), ("float32", 1e-5)])
def test_stage(make_job: JobMaker, tiny_model: Path, dtype: str, bound: float) -> None:
    """The stage leaves a model that loads and talks like base and adapter, and a log with every check's figures."""
    rows = chat_rows(6)
    job = make_job({"train": rows, "eval": rows[:3]}, pipeline=pipeline(dtype=dtype, maxShardSize="1Mi"))
    log, result, model_dir = merged(job)
    assert result.outputs.keys() == {"model", "log"}
    assert log["environment"]["packages"]["torch"]
    assert log["modules"]["count"] == len(log["modules"]["errors"]) == result.figures["mergedModules"] == 14
    assert 0 < log["modules"]["largestError"] <= log["modules"]["bound"]
    assert log["unchanged"] is False
    assert log["logits"]["rows"] == 3
    assert 0 < log["logits"]["relativeL2"] == result.figures["logitsRelativeL2"] <= bound
    assert log["logits"]["kl"] <= 1e-3
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    answers = [tokenizer(row["messages"][1]["content"])["input_ids"] for row in rows[:3]]
    assert log["logits"]["tokens"] == sum(len(answer) + 1 for answer in answers)

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (model_dir / name).read_bytes() == (tiny_model / name).read_bytes()


def test_stage_takes_test_rows_where_no_eval_rows_are(make_job: JobMaker) -> None:
    """The job's locked test rows stand in for missing eval rows."""
    rows = chat_rows(6)
    log, _, _ = merged(make_job({"train": rows[:4], "test": rows[4:]}, pipeline=pipeline()))
    assert log["logits"]["rows"] == 2


def test_stage_says_why_logits_were_not_compared(make_job: JobMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rows, or on a machine too small for the model, the log holds the reason, and status no figure."""
    log, result, _ = merged(make_job({"train": chat_rows(4)}, pipeline=pipeline()))
    assert "no eval or test row" in log["logits"]["skipped"]
    assert "logitsKL" not in result.figures

    monkeypatch.setattr(stage, "_available_memory", lambda: 1000)
    log, _, _ = merged(make_job({"train": chat_rows(4), "eval": chat_rows(2)}, pipeline=pipeline()))
    assert "of memory to spare" in log["logits"]["skipped"]


def test_stage_takes_the_jobs_chat_template(make_job: JobMaker) -> None:
    """A chat template written in the spec is the merged model's own."""
    template = CHATML.replace("<|im_start|>", "<|im_start|>the ")
    job = make_job({"train": chat_rows(4)}, pipeline=pipeline())
    job.spec = job.spec.model_copy(update={"model": ModelSource(source="file:///tiny", chat_template=template)})
    _, _, model_dir = merged(job)
    assert AutoTokenizer.from_pretrained(model_dir).chat_template == template


def test_stage_without_adapter(make_job: JobMaker) -> None:
    """A merge that no adapter comes before is a mistake of the spec, named by its field."""
    job = make_job({"train": chat_rows(4)}, pipeline=pipeline()[1:])
    with pytest.raises(ConfigurationError, match=r"spec\.pipeline\[0\]\.merge: no adapter"):
        job.run("merge")


class StopAtFifth(Stop):
    """Told to stop at the fifth look."""

    looks = 0

    def check(self) -> None:
        """Counts the looks."""
        self.looks += 1
        if self.looks == 5:
            self.request()
        super().check()


def test_stage_stops_when_told(make_job: JobMaker) -> None:
    """Told to stop while it merges, the stage ends as preempted and commits nothing."""
    job = make_job({"train": chat_rows(4)}, pipeline=pipeline())
    job.run("sft")
    with pytest.raises(PreemptedError):
        job.run("merge", stop=StopAtFifth())
    assert "merge" not in job.inputs


_MERGE_AND_WATCH = """
import json, sys, threading, time
from pathlib import Path
import torch
from finetune_api.types import ModelSource
from finetune_jobs.merging import parity
from finetune_jobs.merging.merge import merge

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
directory = Path(sys.argv[1])
(directory / "out").mkdir()
log = merge(directory / "base", directory / "adapter", directory / "out", torch.bfloat16, 512 << 20)
folded = peak[0]
example = parity.Example([1, 2, 3, 4], [2, 3])
distance = parity.compare(directory / "base", directory / "adapter", directory / "out", [example])
done.set()
thread.join()
print(json.dumps({"folded": folded, "compared": peak[0], "error": log["modules"]["largestError"], "kl": distance.kl}))
"""


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """A 1.5 GB model is merged, and its logits compared, in the anonymous memory of two large tensors and 1 GiB.

    Held whole it would take 1.5 GB, and 2.9 GB in float32.
    """
    layers, hidden, inner = 10, 2048, 10240
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=1024,
        tie_word_embeddings=True,
    )
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    # One random layer, saved again under each layer's names: the values do not matter here.
    shapes = {"q": (hidden, hidden), "k": (256, hidden), "v": (256, hidden), "o": (hidden, hidden)}
    layer = {f"self_attn.{k}_proj.weight": shape for k, shape in shapes.items()}
    layer |= {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden)}
    layer |= {"mlp.down_proj.weight": (hidden, inner)}
    values = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in layer.items()}
    values |= {
        f"{norm}.weight": torch.ones(hidden).bfloat16() for norm in ("input_layernorm", "post_attention_layernorm")
    }
    weight_map: dict[str, str] = {}
    for n in range(layers):
        file = f"model-{n + 1:05}-of-{layers:05}.safetensors"
        tensors = {f"model.layers.{n}.{name}": tensor for name, tensor in values.items()}
        if n == 0:
            tensors["model.embed_tokens.weight"] = (torch.randn(1024, hidden) * 0.02).bfloat16()
            tensors["model.norm.weight"] = torch.ones(hidden).bfloat16()
        save_file(tensors, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    lora = {}
    for n in range(layers):
        for name, (rows, columns) in layer.items():
            module = f"base_model.model.model.layers.{n}.{name.removesuffix('.weight')}"
            lora[f"{module}.lora_A.weight"] = torch.randn(8, columns) * 0.02
            lora[f"{module}.lora_B.weight"] = torch.randn(rows, 8) * 0.02
    adapter.mkdir()
    save_file(lora, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[1] for name in layer})
    LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(adapter)
    del values, lora, tensors
    gc.collect()

    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    ran = subprocess.run(
        [sys.executable, "-c", _MERGE_AND_WATCH, str(tmp_path)], capture_output=True, text=True, check=False
    )
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])
    bound = 2 * inner * hidden * 4 + (1 << 30)
    assert bound < size < 1.6e9
    assert figures["folded"] <= bound
    assert figures["compared"] <= bound
    assert figures["kl"] <= parity.KL_BOUND[torch.bfloat16]
