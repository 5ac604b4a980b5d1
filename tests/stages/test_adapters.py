"""Every adapter that can be trained: saved so that plain PEFT loads it on the original base, merged to the same model,
trained on, and interrupted.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tests.stages.test_reward import classified
from tests.stages.test_rl import prompts
from tests.stages.training_job import Job, JobMaker, StopAfter, chat_rows, pair_rows, write_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from finetune_api.defaults import resolve_lora
from finetune_api.stage import Manifest
from finetune_api.types import IA3, Lora, Method, Quantization, Sft
from finetune_jobs.estimate import read, trained_parameters
from finetune_jobs.merging.merge import merge
from finetune_jobs.run.errors import ConfigurationError, PreemptedError
from finetune_jobs.training.adapters import add_ia3, add_lora
from finetune_jobs.training.model import count, load

AutoModel: Any = AutoModelForCausalLM
TRAINING = {"batchSize": 4, "maxSteps": 6, "learningRate": 1e-2, "precision": "fp32"}
ROLES = {
    "train": chat_rows(10),
    "eval": chat_rows(3, seed=1),
    "preference": pair_rows(8),
    "preferenceEval": pair_rows(3, seed=1),
}
EMBEDDINGS = ["embed_tokens", "lm_head"]
IA3_TRAINING = {**TRAINING, "learningRate": 5e-2}
VARIANTS: dict[str, dict[str, Any]] = {
    "ia3": {"method": "ia3", "training": IA3_TRAINING},
    "ia3 of named layers": {
        "method": "ia3",
        "ia3": {"targetModules": ["q_proj", "up_proj", "o_proj"], "feedforwardModules": ["o_proj"]},
        "training": IA3_TRAINING,
    },
    "dora": {"lora": {"variant": "dora"}},
    "pissa": {"lora": {"variant": "pissa", "r": 8}},
    "pissa stabilized": {"lora": {"variant": "pissa", "r": 4, "rankStabilized": True, "dropout": 0.1}},
    "stabilized": {"lora": {"rankStabilized": True, "r": 32, "alpha": 8}},
    "targets": {"lora": {"targetModules": ["q_proj", "layers.1.mlp.up_proj"]}},
    "embeddings": {"lora": {"modulesToSave": EMBEDDINGS, "variant": "dora"}},
    "embedding alone": {"lora": {"modulesToSave": ["embed_tokens"]}},
    "a norm and a layer": {"lora": {"modulesToSave": ["norm", "layers.0.mlp.down_proj"], "targetModules": ["q_proj"]}},
    "biases": {"lora": {"bias": "all", "targetModules": ["q_proj", "up_proj"]}},
    "own biases": {"lora": {"bias": "loraOnly", "targetModules": ["q_proj", "up_proj"], "variant": "pissa"}},
}


@pytest.fixture(scope="session")
def biased_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, untied, with biases that are not zero."""
    directory = write_model(tmp_path_factory.mktemp("biased") / "model", tied=False)
    config = LlamaConfig.from_pretrained(directory)
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(4)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return directory


def stage(block: dict[str, Any], kind: str = "sft", name: str = "train", **more: Any) -> dict[str, Any]:
    """One training stage that saves every other step."""
    return {"name": name, kind: {"checkpoint": {"steps": 2}, "training": TRAINING, **block, **more}}


def logits(model: Any) -> torch.Tensor:
    """Of 20 fixed tokens."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(7, 47, 2)[None]).logits[0].double()
    return found


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((got - wanted).norm() / wanted.norm())


def base(directory: Path) -> Any:
    """The model in float32."""
    return AutoModel.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("which", VARIANTS)
def test_adapter_merges_to_the_model_that_plain_peft_loads(
    make_job: JobMaker, tiny_model: Path, biased_model: Path, tmp_path: Path, which: str, tied: bool
) -> None:
    """What is saved fits the untouched base, has learned something, and its merge gives the same logits to 1e-5."""
    if tied and "bias" in which:
        pytest.skip("the model with biases is untied")
    model = tiny_model if tied else biased_model
    job = make_job({**ROLES, "eval": ROLES["train"]}, model=model, pipeline=[stage(VARIANTS[which])])
    result = job.run("train")
    adapter = job.files(result) / "adapter"
    tuned = logits(PeftModel.from_pretrained(base(model), str(adapter)))
    assert difference(tuned, logits(base(model))) > 1e-2
    (tmp_path / "merged").mkdir()
    log = merge(model, adapter, tmp_path / "merged", torch.float32, 1 << 30)
    merged = base(tmp_path / "merged")
    assert difference(logits(merged), tuned) <= 1e-5
    assert log["modules"]["largestError"] <= 1e-5
    shared = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert shared is tied
    first, *_, last = job.log(result)["evaluations"]  # on the rows that are learned
    assert last["evalLoss"] < first["evalLoss"]
    assert job.log(result)["parameters"]["trainable"] == result.figures["trainableParameters"]


@pytest.mark.parametrize("which", ["ia3", "dora", "pissa stabilized", "embeddings", "own biases"])
def test_interrupted_run_ends_with_the_same_bits(make_job: JobMaker, biased_model: Path, which: str) -> None:
    """Magnitudes, PiSSA's initial adapter, whole modules and biases are all part of a checkpoint."""

    def job() -> Job:
        return make_job(ROLES, model=biased_model, pipeline=[stage(VARIANTS[which])])

    expected = file_of(job().run("train"))
    assert file_of(interrupted(job(), "train")) == expected


def interrupted(job: Job, name: str) -> Manifest:
    """The stage's result, which took several attempts: each is told to stop a little later in its life."""
    attempts = 0
    while True:
        try:
            result = job.run(name, StopAfter(9 + attempts))
            break
        except PreemptedError:
            attempts += 1
            assert attempts < 25, "the attempts make no progress"
    assert attempts > 0
    assert job.log(result)["resumedFrom"]
    return result


def file_of(result: Manifest) -> str:
    """The sha256 of the adapter's weights."""
    return next(file.sha256 for file in result.files if file.path.endswith("adapter_model.safetensors"))


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "trained on"])
@pytest.mark.parametrize("which", [name for name in VARIANTS if "bias" not in name])
def test_first_dpo_loss_is_ln_2(make_job: JobMaker, which: str, fresh: bool) -> None:
    """Whatever the adapter, and whether it came in or is new: the reference is the model as it came in."""
    training = {"batchSize": 4, "maxSteps": 2, "learningRate": 1e-3, "precision": "fp32", "loggingSteps": 1}
    method = {"method": VARIANTS[which].get("method", "lora")}
    dpo = stage(VARIANTS[which] if fresh else method, "preference", "dpo", training=training)
    job = make_job(ROLES, pipeline=[dpo] if fresh else [stage(VARIANTS[which]), dpo])
    if not fresh:
        job.run("train")
    curve = job.log(job.run("dpo"))["curve"]
    assert curve[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert curve[1]["loss"] != curve[0]["loss"]


def test_pissa_starts_from_the_principal_components(tiny_model: Path) -> None:
    """The adapter is each weight's best approximation of its rank, and the model with it is still the base."""
    model = base(tiny_model)
    before = logits(model)
    adapted: Any = add_lora(model, Lora(variant="pissa", r=8, alpha=4.0))
    assert difference(logits(adapted), before) < 1e-6
    layer = adapted.base_model.model.model.layers[1].mlp.down_proj
    u, s, vh = torch.linalg.svd(layer.base_layer.weight.double())
    wanted = u[:, :8] @ torch.diag(s[:8]) @ vh[:8]
    learned = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 0.5
    assert difference(learned.double().detach(), wanted) < 1e-5
    assert [p.requires_grad for p in layer.lora_A.parameters()] == [True, False]


def test_pissa_of_a_rank_above_the_layers(tiny_model: Path) -> None:
    """A layer of 32 rows has no more than 32 components; the rest of the rank is idle."""
    adapted: Any = add_lora(base(tiny_model), Lora(variant="pissa", r=48, alpha=96.0))
    assert difference(logits(adapted), logits(base(tiny_model))) < 1e-5


def test_biases_cannot_be_trained_on(make_job: JobMaker, biased_model: Path) -> None:
    """Their start is nowhere kept; the words name the stage and the mend."""
    dpo = stage({}, "preference", "dpo")
    job = make_job(ROLES, model=biased_model, pipeline=[stage(VARIANTS["biases"]), dpo])
    job.run("train")
    with pytest.raises(ConfigurationError, match=r"spec\.pipeline\[1\]\.preference\.start: .* has trained bias"):
        job.run("dpo")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bias": "all"}, r"lora\.bias: the model has no biases"),
        ({"modules_to_save": ["wte"]}, r"lora\.modulesToSave: wte: the model has no such module"),
        ({"target_modules": ["lm_head"]}, r"modulesToSave: \[embed_tokens, lm_head\]"),
    ],
    ids=["no biases", "no such module", "head"],
)
def test_what_the_model_cannot_train_is_refused(tiny_model: Path, settings: dict[str, Any], words: str) -> None:
    """With the field and the mend."""
    with pytest.raises(ConfigurationError, match=words):
        add_lora(base(tiny_model), Lora(alpha=32.0, **settings))


def test_reward_model_with_whole_modules_is_loaded_by_transformers(make_job: JobMaker, tiny_model: Path) -> None:
    """Its head is one more whole module beside those that were asked for."""
    block = {"lora": {"modulesToSave": ["embed_tokens"]}}
    job = make_job(ROLES, pipeline=[stage(block, "reward")])
    directory = job.files(job.run("train")) / "reward"
    config = json.loads((directory / "adapter_config.json").read_text())
    assert set(config["modules_to_save"]) == {"model.embed_tokens", "score"}
    assert any(name.endswith("embed_tokens.weight") for name in load_file(directory / "adapter_model.safetensors"))


REWARDED = {
    "ia3": {"method": "ia3"},
    "pissa": VARIANTS["pissa stabilized"],
    "dora": VARIANTS["dora"],
    "folded": {"start": "merge", "lora": {"r": 2}},
}
RATED = {"rewards": [{"builtin": "length"}], "generation": {"maxNewTokens": 4}}


@pytest.mark.parametrize("which", REWARDED)
@pytest.mark.parametrize(("kind", "own"), [("reward", {}), ("rl", RATED)], ids=["reward", "rl"])
def test_rewarded_and_rewarding_with_every_adapter(
    make_job: JobMaker, tiny_model: Path, kind: str, own: dict[str, Any], which: str
) -> None:
    """Interrupted, it ends with the same bits; others load what is left on the base as it was, or as it was folded,
    and find the rewards that the stage found last, or an rl stage's model moved. rl began at no distance.
    """
    training = {"batchSize": 4, "maxSteps": 3, "learningRate": 1e-2, "precision": "fp32", "loggingSteps": 1}
    block = {**REWARDED[which], **own, "checkpoint": {"steps": 1, "best": False}}
    roles = {**ROLES, "prompts": prompts(5), "promptsEval": []}

    def job() -> Job:
        before = [stage({}, name="before")] if which == "folded" else []
        made = make_job(roles, pipeline=[*before, stage(block, kind, training=training)])
        for one in before:
            made.run(one["name"])
        return made

    expected = file_of(job().run("train"))
    last = job()
    result = interrupted(last, "train")
    assert file_of(result) == expected
    log, made = last.log(result), last.files(result)
    before = made / "model" if which == "folded" else tiny_model
    if kind == "rl":
        tuned = logits(PeftModel.from_pretrained(base(before), str(made / "adapter")))
        assert difference(tuned, logits(base(before))) > 1e-3
        assert log["curve"][0]["kl"] == pytest.approx(0, abs=1e-5)
    else:
        loaded = AutoModelForSequenceClassification.from_pretrained(before, num_labels=1, dtype=torch.float32)
        judge = PeftModel.from_pretrained(loaded, str(made / "reward")).eval()
        chosen = classified(judge, made / "reward", ROLES["preferenceEval"])[:, 0]
        assert float(chosen.mean()) == pytest.approx(log["evaluations"][-1]["eval/rewards/chosen"], abs=1e-4)


def test_dora_on_an_int8_base(make_job: JobMaker) -> None:
    """DoRA looks at the quantized weights in every pass, which changes none of them: what is learned falls in loss, and
    an interrupted run ends with the same bits.
    """
    block = {"method": "qlora", "quantization": {"type": "int8"}, "lora": {"variant": "dora"}}
    jobs = [make_job({**ROLES, "eval": ROLES["train"]}, pipeline=[stage(block)]) for _ in range(2)]
    expected = jobs[0].run("train")
    first, *_, last = jobs[0].log(expected)["evaluations"]
    assert last["evalLoss"] < first["evalLoss"]
    assert file_of(interrupted(jobs[1], "train")) == file_of(expected)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_dora_on_a_packed_base_keeps_the_precision(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, kind: Literal["nf4", "int8"]
) -> None:
    """Layers answer in 16 bits beside float32 magnitudes: all that follows is kept for the way back."""
    policy = load(
        tiny_model,
        method=Method.QLORA,
        lora=Lora(r=2, alpha=4, variant="dora", target_modules=["all-linear"]),
        quantization=Quantization(type=kind, double_quant=False),
        adapter=None,
        compute=torch.bfloat16,
        device=torch.device("cpu"),
        seed=0,
    )
    answers: list[torch.dtype] = []
    for layer in policy.model.modules():
        if isinstance(layer, LoraLayer):
            layer.register_forward_hook(lambda _layer, _given, answer: answers.append(answer.dtype))
    enabled = torch.is_autocast_enabled
    # Without a device it tells of GPUs, and so PEFT casts on CPUs alone. With one it is torch's own memory.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: enabled(*device) if device else True)
    with policy.autocast():
        policy.model(input_ids=torch.tensor([[1, 2, 3]]))
    assert set(answers) == {torch.bfloat16}
    assert {p.dtype for p in policy.trainable} == {torch.float32}


def test_merge_unties_what_another_trainer_untied(tiny_model: Path, tmp_path: Path) -> None:
    """PEFT alone trains the head of a tied model apart from the embedding: the merged model has both, as trained."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base(tiny_model), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    wanted = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "merged").mkdir()
    merge(tiny_model, tmp_path / "adapter", tmp_path / "merged", torch.float32, 1 << 30)
    assert difference(logits(base(tmp_path / "merged")), wanted) <= 1e-5


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("which", VARIANTS)
def test_parameters_are_estimated_exactly(tiny_model: Path, biased_model: Path, which: str, tied: bool) -> None:
    """What `plan` says will be trained is what PEFT makes trainable."""
    if "layers." in str(VARIANTS[which]) or (tied and "bias" in which):
        pytest.skip("single layers are estimated as all of their name; the model with biases is untied")
    directory = tiny_model if tied else biased_model
    block = Sft.model_validate(VARIANTS[which], strict=False)
    lora = resolve_lora(block)
    adapted = add_lora(base(directory), lora) if lora else add_ia3(base(directory), block.ia3 or IA3())
    estimated = trained_parameters(read(json.loads((directory / "config.json").read_text())), block)
    assert estimated == count(adapted).trainable


def test_ia3_on_llama_3_8b() -> None:
    """1,024 keys, as many values and 14,336 inner numbers in 32 layers: reference/practice.md, section 3."""
    shape = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    config = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, **shape}
    block = Sft.model_validate({"method": "ia3"}, strict=False)
    assert trained_parameters(read(config), block) == 524_288
    with torch.device("meta"):
        model = AutoModel.from_config(LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    assert count(add_ia3(model, IA3())).trainable == 524_288


@pytest.mark.parametrize("which", [name for name in VARIANTS if name != "ia3"])
def test_new_adapter_on_one_that_is_folded_in(
    make_job: JobMaker, biased_model: Path, tmp_path: Path, which: str
) -> None:
    """The first DPO loss is ln 2; the folded model is the incoming one, and what comes of both can be merged."""
    training = {"batchSize": 4, "maxSteps": 2, "learningRate": 1e-3, "precision": "fp32", "loggingSteps": 1}
    dpo = stage({"start": "merge", "lora": {"r": 2}}, "preference", "dpo", training=training)
    last = {"name": "merge", "merge": {"dtype": "float32"}}
    job = make_job(ROLES, model=biased_model, pipeline=[stage(VARIANTS[which]), dpo, last])
    first = job.files(job.run("train")) / "adapter"
    result = job.run("dpo")
    log = job.log(result)
    assert log["curve"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (log["continues"], log["folded"], log["lora"]["r"]) == (None, "train", 2)
    made = job.files(result)
    came_in = logits(PeftModel.from_pretrained(base(biased_model), str(first)))
    assert difference(logits(base(made / "model")), came_in) <= 1e-5
    tuned = logits(PeftModel.from_pretrained(base(made / "model"), str(made / "adapter")))
    assert difference(tuned, came_in) > 1e-5
    merged = job.files(job.run("merge")) / "model"
    assert difference(logits(base(merged)), tuned) <= 1e-5


def test_folding_run_is_interrupted(make_job: JobMaker) -> None:
    """The next attempt folds again, and ends with the same bits; full training may start so too."""
    for method in ("lora", "full"):
        block = {"start": "merge", "method": method}

        def job(block: dict[str, Any] = block) -> Job:
            made = make_job(ROLES, pipeline=[stage({}), stage(block, name="more")])
            made.run("train")
            return made

        expected = job().run("more")
        result = interrupted(job(), "more")
        own = [[f.sha256 for f in r.files if f.path.endswith(".safetensors")] for r in (result, expected)]
        assert own[0] == own[1]
        assert ("adapter" in result.outputs) is (method == "lora")
        assert "model" in result.outputs
