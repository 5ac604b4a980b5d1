"""Methods that leave the weights as they are: vectors before every text, and networks beside the layers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.stages.finished_run import RunMaker
from tests.stages.test_resume import comparable
from tests.stages.training_job import (
    Job,
    JobMaker,
    StopAfter,
    answer_log_prob,
    chat_rows,
    pair_rows,
    sha256,
    write_model,
)
from tests.tinymodel import byte_tokenizer
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from finetune_api.types import Bottleneck, PrefixTuning, PromptTuning, Sft
from finetune_cli.manifest import load
from finetune_jobs.data.encode import Encoded
from finetune_jobs.estimate import read, trained_parameters
from finetune_jobs.evaluation.hf import HFModel
from finetune_jobs.evaluation.model import RowLoss
from finetune_jobs.merging.adapter import read_adapter
from finetune_jobs.run.errors import ConfigurationError, DataError, PreemptedError
from finetune_jobs.training import bottleneck, prompts
from finetune_jobs.tuned import tuned

AutoModel: Any = AutoModelForCausalLM
EXAMPLES = Path(__file__).parents[2] / "manifests/examples"
TRAINING = {"batchSize": 4, "maxSteps": 6, "precision": "fp32", "loggingSteps": 1, "warmupRatio": 0}
ROLES = {
    "train": chat_rows(10),
    "eval": chat_rows(3, seed=1),
    "preference": pair_rows(8),
    "preferenceEval": pair_rows(3, seed=1),
    "prompts": chat_rows(4, seed=2),
    "promptsEval": chat_rows(2, seed=3),
}
METHODS: dict[str, dict[str, Any]] = {
    "prefix": {"method": "prefixTuning", "prefixTuning": {"virtualTokens": 5}},
    "projected prefix": {"method": "prefixTuning", "prefixTuning": {"virtualTokens": 5, "projection": True}},
    "prompt": {"method": "promptTuning", "promptTuning": {"virtualTokens": 7}},
    "prompt from a text": {"method": "promptTuning", "promptTuning": {"virtualTokens": 4, "initText": "Say it again"}},
    "bottleneck": {"method": "bottleneck", "bottleneck": {"reductionFactor": 8}},
    "pfeiffer": {"method": "bottleneck", "bottleneck": {"placement": ["mlp"], "nonLinearity": "gelu"}},
}
WEIGHTS = "adapter/adapter_model.safetensors"


def stage(which: str, kind: str = "sft", name: str = "train", **more: Any) -> dict[str, Any]:
    """One training stage that saves every other step."""
    block = {"checkpoint": {"steps": 2}, "training": TRAINING, **METHODS[which], **more}
    return {"name": name, kind: block}


def base(directory: Path) -> Any:
    """The model in float32."""
    return AutoModel.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    """Of 20 fixed tokens."""
    ids = torch.arange(7, 47, 2)[None]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -20:].double()
    return found


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("which", METHODS)
def test_training_lowers_the_loss_and_leaves_what_can_be_asked(
    make_job: JobMaker, tiny_model: Path, which: str
) -> None:
    """Its evaluation loss, by its own logits, is the one of the log. Plain PEFT loads vectors before the text too."""
    job = make_job(ROLES, pipeline=[stage(which, training={**TRAINING, "learningRate": 3e-2, "maxSteps": 10})])
    result = job.run("train")
    log = job.log(result)
    assert log["curve"][-1]["loss"] < log["curve"][0]["loss"]
    settings = json.loads((tiny_model / "config.json").read_text())
    block = Sft.model_validate(METHODS[which], strict=False)
    assert log["parameters"]["trainable"] == trained_parameters(read(settings), block)
    assert log["batch"]["packed"] is (METHODS[which]["method"] == "bottleneck")
    assert log[METHODS[which]["method"]].items() >= METHODS[which][METHODS[which]["method"]].items()
    adapter = job.files(result) / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "file:///tiny"
    assert all(tensor.dtype is torch.float32 for tensor in load_file(adapter / "adapter_model.safetensors").values())
    model, total, tokens = tuned(base(tiny_model), adapter), 0.0, 0
    for row in ROLES["eval"]:
        asked, answer = row["messages"]
        found, length = answer_log_prob(model.eval(), byte_tokenizer(), [asked], answer["content"])
        total, tokens = total - found, tokens + length
    assert log["evalLoss"] == pytest.approx(total / tokens, rel=1e-5)
    assert difference(logits(model), logits(base(tiny_model))) > 1e-2
    if METHODS[which]["method"] != "bottleneck":
        plain = PeftModel.from_pretrained(base(tiny_model), str(adapter))
        assert difference(logits(model), logits(plain)) < 1e-6


@pytest.mark.parametrize("which", ["prefix", "projected prefix", "prompt", "bottleneck"])
def test_interrupted_run_ends_with_the_same_bits(make_job: JobMaker, which: str) -> None:
    """What a prefix is projected from is part of a checkpoint too, though not of the result."""

    def job() -> Job:
        return make_job(ROLES, pipeline=[stage(which)])

    undisturbed, interrupted = job(), job()
    expected = undisturbed.run("train")
    attempts = 0
    while True:
        try:
            result = interrupted.run("train", StopAfter(9 + attempts))
            break
        except PreemptedError:
            attempts += 1
            assert attempts < 25, "the attempts make no progress"
    assert interrupted.log(result)["resumedFrom"]
    assert sha256(result, WEIGHTS) == sha256(expected, WEIGHTS)
    assert comparable(interrupted.log(result)) == comparable(undisturbed.log(expected))


@pytest.mark.parametrize("which", ["prefix", "prompt", "bottleneck"])
def test_layout_changes_nothing(make_job: JobMaker, tiny_model: Path, which: str) -> None:
    """Padding of longer neighbours does not reach the texts: one example at a time learns the same. So it does with
    activations that are computed twice, where that can be.
    """
    found = []
    for size in (1, 4):
        twice = size == 1 and which != "prefix"
        training = {**TRAINING, "microBatchSize": size, "gradientCheckpointing": twice}
        job = make_job(ROLES, pipeline=[stage(which, training=training)])
        found.append(logits(tuned(base(tiny_model), job.files(job.run("train")) / "adapter")))
    assert difference(*found) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("which", ["prefix", "projected prefix", "prompt", "bottleneck"])
def test_first_dpo_loss_is_ln_2(make_job: JobMaker, which: str, precision: str) -> None:
    """The reference is what training starts from, fresh vectors included."""
    training = {**TRAINING, "maxSteps": 2, "precision": precision}
    job = make_job(ROLES, pipeline=[stage(which, "preference", "dpo", training=training)])
    curve = job.log(job.run("dpo"))["curve"]
    assert curve[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert curve[1]["loss"] != curve[0]["loss"]


def test_bottleneck_is_trained_on(make_job: JobMaker) -> None:
    """By a stage of the same method, which keeps its shape; the first DPO loss is ln 2 again."""
    dpo = {"name": "dpo", "preference": {"method": "bottleneck", "training": TRAINING}}
    job = make_job(ROLES, pipeline=[stage("bottleneck"), dpo])
    job.run("train")
    result = job.run("dpo")
    assert job.log(result)["curve"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert job.log(result)["bottleneck"]["reductionFactor"] == 8


@pytest.mark.parametrize(("first", "second"), [("prompt", "lora"), ("bottleneck", "lora"), ("prompt", "promptTuning")])
def test_what_cannot_be_trained_on_is_refused(make_job: JobMaker, first: str, second: str) -> None:
    """Here too, should the rules not have been asked."""
    dpo = {"name": "dpo", "preference": {"method": second, "training": TRAINING}}
    job = make_job(ROLES, pipeline=[stage(first), dpo])
    job.run("train")
    with pytest.raises(ConfigurationError, match=rf"preference\.method: {second} cannot train on what train left"):
        job.run("dpo")


@pytest.mark.parametrize("which", ["prefix", "prompt", "bottleneck"])
def test_reinforcement_learning(make_job: JobMaker, which: str) -> None:
    """Answers are sampled with the vectors, and a critic reads the same states; before the first update policy and
    reference are one.
    """
    block = {
        "algorithm": "ppo",
        "rewards": [{"builtin": "length"}],
        "generation": {"maxNewTokens": 6},
        "training": {**TRAINING, "batchSize": 2, "maxSteps": 2},
    }
    job = make_job(ROLES, pipeline=[{"name": "rl", "rl": {**METHODS[which], **block}}])
    curve = job.log(job.run("rl"))["curve"]
    assert curve[0]["kl"] == pytest.approx(0, abs=1e-5)


def _adapter(which: str, model: Path, directory: Path) -> Path:
    """One that does something, without training."""
    torch.manual_seed(8)
    if which == "bottleneck":
        changed = base(model)
        bottleneck.add(changed, Bottleneck())
        for parameter in bottleneck.parameters(changed).values():
            torch.nn.init.normal_(parameter, std=0.2)
        bottleneck.save(changed, Bottleneck(), directory / which, base="org/name")
        return directory / which
    settings = PrefixTuning(virtual_tokens=5) if which == "prefix" else PromptTuning(virtual_tokens=7)
    prompts.save(prompts.add(base(model), settings, model), directory / which, base="org/name")
    return directory / which


@pytest.mark.parametrize("which", ["prefix", "prompt", "bottleneck"])
def test_batches_are_answered_and_scored_as_one_by_one(tiny_model: Path, tmp_path: Path, which: str) -> None:
    """Whatever stands beside a row, padding on the left included; and as the model says of whole texts."""
    adapter = _adapter(which, tiny_model, tmp_path)
    model = HFModel(tiny_model, adapter)
    asked = [[10, 20, 30], list(range(40, 60)), [7, 9, 11, 13, 15, 17, 19]]
    together = model.generate(asked, 8, [], _ignore)
    assert together == [model.generate([one], 8, [], _ignore)[0] for one in asked]
    reader = tuned(base(tiny_model), adapter)
    for prompt, answer in zip(asked, together, strict=True):
        said = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                said.append(int(reader(torch.tensor([said])).logits[0, -1].argmax()))
        assert answer.ids == said[len(prompt) :]
    rows = [Encoded(ids, [False] * 2 + [True] * (len(ids) - 2)) for ids in asked]
    scored: list[RowLoss] = model.losses(rows, _ignore)
    for ids, loss in zip(asked, scored, strict=True):
        with torch.no_grad():
            log_probs = reader(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = -sum(float(log_probs[at - 1, ids[at]]) for at in range(2, len(ids)))
        assert loss.total == pytest.approx(own, rel=1e-5)


def _ignore(_: int) -> None:
    pass


def test_bottleneck_computes_its_paper(tiny_model: Path) -> None:
    """Behind attention and MLP: h + W_up relu(W_down h + b_down) + b_up, in 2 d b + d + b parameters a place; at the
    start exactly the base model.
    """
    model = base(tiny_model)
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[1]
    layer.self_attn.register_forward_hook(lambda m, i, o: seen.update(attention=o[0]))
    layer.mlp.register_forward_hook(lambda m, i, o: seen.update(mlp=o))
    torch.manual_seed(5)
    bottleneck.add(model, Bottleneck(reduction_factor=10))
    assert torch.equal(logits(model), logits(base(tiny_model)))
    own = bottleneck.parameters(model)
    assert len(own) == 2 * 2 * 4
    assert sum(p.numel() for p in own.values()) == 2 * 2 * (2 * 64 * 6 + 64 + 6)
    for parameter in own.values():
        torch.nn.init.normal_(parameter, std=0.3)
    after: dict[str, torch.Tensor] = {}
    layer.self_attn.register_forward_hook(lambda m, i, o: after.update(attention=o[0]))
    layer.mlp.register_forward_hook(lambda m, i, o: after.update(mlp=o))
    logits(model)
    for where, module in (("attention", layer.self_attn), ("mlp", layer.mlp)):
        down, up, h = module.bottleneck.down, module.bottleneck.up, seen[where]
        wanted = h + (h @ down.weight.T + down.bias).clamp(min=0) @ up.weight.T + up.bias
        assert difference(after[where], wanted) < 1e-6


def test_bottleneck_stays_float32_on_a_bf16_model(tiny_model: Path, tmp_path: Path) -> None:
    """What it gives is of the model's type; what is saved is loaded again with nothing but this file."""
    model = AutoModel.from_pretrained(tiny_model, dtype=torch.bfloat16)
    settings = Bottleneck(reduction_factor=16)
    bottleneck.add(model, settings)
    for parameter in bottleneck.parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    bottleneck.save(model, settings, tmp_path / "adapter", base="org/name")
    again = AutoModel.from_pretrained(tiny_model, dtype=torch.bfloat16)
    assert bottleneck.load(again, tmp_path / "adapter") == settings
    assert torch.equal(logits(again), logits(model))
    assert difference(logits(model), logits(base(tiny_model))) > 1e-1
    assert {p.dtype for p in bottleneck.parameters(again).values()} == {torch.float32}
    other = write_model(tmp_path / "other")
    wider = AutoModel.from_config(AutoModel.from_pretrained(other).config.__class__(hidden_size=32))
    with pytest.raises(ConfigurationError, match="of another model"):
        bottleneck.load(wider, tmp_path / "adapter")
    with pytest.raises(DataError, match="peft_type is BOTTLENECK; merge folds in"):
        read_adapter(tmp_path / "adapter")


def test_layers_without_an_mlp_of_their_own_are_told() -> None:
    """As in OPT, whose layers hold the two halves of it; attention is found in all."""
    names = [
        "model.decoder.layers.0.self_attn",
        "model.decoder.layers.0.fc1",
        "model.decoder.layers.0.self_attn.q_proj",
    ]
    assert bottleneck.places(names, ["attention"]) == names[:1]
    with pytest.raises(ConfigurationError, match=r"bottleneck\.placement: .* no mlp .* write \[attention\], or"):
        bottleneck.places(names, ["attention", "mlp"])


def test_prefix_begins_as_the_keys_and_values_of_words(tiny_model: Path) -> None:
    """A fresh prefix reads like its words before the text: the same logits."""
    torch.manual_seed(3)
    prefixed = prompts.add(base(tiny_model), PrefixTuning(virtual_tokens=5), tiny_model)
    torch.manual_seed(3)
    words = torch.randint(0, 352, (1, 5))
    text = torch.arange(7, 47, 2)[None]
    with torch.no_grad():
        wanted = base(tiny_model)(torch.cat([words, text], dim=1)).logits[0, 5:].double()
    assert difference(logits(prefixed), wanted) < 1e-5


def test_prompt_begins_as_the_words_of_its_text(tiny_model: Path) -> None:
    """Repeated to fill the places."""
    prompted = prompts.add(base(tiny_model), PromptTuning(virtual_tokens=9, init_text="abc"), tiny_model)
    words = (byte_tokenizer()("abc")["input_ids"] * 9)[:9]
    text = torch.arange(7, 47, 2)[None]
    with torch.no_grad():
        wanted = base(tiny_model)(torch.cat([torch.tensor([words]), text], dim=1)).logits[0, 9:].double()
    assert difference(logits(prompted), wanted) < 1e-5


def _other_models() -> list[Any]:
    torch.manual_seed(6)
    shape: dict[str, Any] = {
        **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 24},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }
    gemma = Gemma2ForCausalLM(Gemma2Config(**shape, sliding_window=16))
    return [Qwen3ForCausalLM(Qwen3Config(**shape)).eval(), gemma.eval()]


@pytest.mark.parametrize("number", [0, 1], ids=["qwen3", "gemma2"])
def test_other_architectures(number: int, tmp_path: Path) -> None:
    """Heads that are wider than the model's width says, and layers that see a window only."""
    ids = torch.arange(3, 13)[None]
    for settings in (PrefixTuning(virtual_tokens=3), PromptTuning(virtual_tokens=3)):
        model = _other_models()[number]
        torch.manual_seed(3)
        fresh = prompts.add(model, settings, tmp_path)
        torch.manual_seed(3)
        words = torch.randint(0, 96, (1, 3))
        if isinstance(settings, PromptTuning):  # its words are those whose embeddings it has
            table: Any = model.get_input_embeddings()
            words = torch.cdist(fresh.get_prompt(1)[0], table(torch.arange(96))).argmin(-1)[None]
        with torch.no_grad():
            wanted = model(torch.cat([words, ids], dim=1)).logits[0, 3:]
            assert difference(fresh(ids).logits[0], wanted) < 1e-5
    model = _other_models()[number]
    bottleneck.add(model, Bottleneck())
    assert len(bottleneck.parameters(model)) == 16


def test_pipeline_scores_what_was_trained(start_run: RunMaker) -> None:
    """From prepare to the report: three results on one base, each scored for itself, none of them a GGUF."""
    names = ("prefix", "prompt", "bottleneck")
    stages = []
    for name in names:  # the examples of the documentation, cut short
        [written] = load(EXAMPLES / f"{name}.yaml").spec.pipeline
        block = written.model_dump(mode="json", by_alias=True, exclude_unset=True)["sft"]
        stages.append({"name": name, "from": "base", "sft": block | {"training": {**TRAINING, "maxSteps": 2}}})
    run = start_run(stages).run_all()
    scores = run.json("evaluate", "scores.json")["scores"]
    assert set(scores) == {"base", *names}
    assert len({figures["loss"] for figures in scores.values()}) == 4
    report = run.json("report", "report.json")
    assert [s["name"] for s in report["stages"]] == ["prepare", "baseline", *names, "evaluate"]
    checks = run.json("prepare", "checks.json")["estimate"]["stages"]
    for which in names:
        assert run.manifests[which].figures["trainableParameters"] == checks[which]["trainableParameters"]
