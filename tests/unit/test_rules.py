import re
from typing import Any

import pytest
from tests.builders import DPO, GGUF, MERGE, NOW, SFT, a_job, done

from finetune_operator.plan.plan import plan
from finetune_operator.plan.pods import PodSettings, batch_job
from finetune_operator.plan.rules import RULES, check, warnings

P = "spec.pipeline"
UNSLOTH = {"backend": "unsloth"}
BETWEEN = "put `- {name: merge, merge: {}}` between"


def sft(name: str = "sft", **block: Any) -> dict[str, Any]:
    """An sft stage."""
    return {"name": name, "sft": block}


def dpo(name: str = "dpo", **block: Any) -> dict[str, Any]:
    """A preference stage."""
    return {"name": name, "preference": block}


def merge(name: str = "merge", **stage: Any) -> dict[str, Any]:
    """A merge stage."""
    return {"name": name, "merge": {}, **stage}


def gguf(name: str = "gguf", *types: str, **stage: Any) -> dict[str, Any]:
    """A quantize stage."""
    return {"name": name, "quantize": {"gguf": list(types) or ["Q8_0"]}, **stage}


LORA_GGUF: dict[str, Any] = {"name": "gguf", "quantize": {"gguf": ["Q8_0"], "loraGGUF": True}}
OTHER: dict[str, Any] = {"name": "other", "from": "base", "sft": {}}


def named_adapters(*adapters: dict[str, Any], name: str = "merge", **block: Any) -> dict[str, Any]:
    """A merge of these."""
    return {"name": name, "merge": {"adapters": list(adapters), **block}}


def merging(*names: str, name: str = "merge", **block: Any) -> dict[str, Any]:
    """A merge of what these stages leave."""
    return named_adapters(*({"stage": one} for one in names), name=name, **block)


def reward(name: str = "judge", **block: Any) -> dict[str, Any]:
    """A reward stage that starts from the base model."""
    return {"name": name, "from": "base", "reward": block}


def rl(*rewards: str, name: str = "rl", **block: Any) -> dict[str, Any]:
    """An rl stage that is rewarded by these stages, by length without any."""
    sources = [{"stage": one} for one in rewards] or [{"builtin": "length"}]
    return {"name": name, "rl": {"rewards": sources, **block}}


VALID: dict[str, Any] = {
    "the smallest": ([sft()], {}),
    "added tokens": (
        [sft(lora={"modulesToSave": ["embed_tokens", "lm_head"]}), DPO, reward(), MERGE],
        {"model": {"source": "hf://a/b", "addTokens": ["<a>", "<b>"]}},
    ),
    "sft, preference, merge, quantize": ([SFT, DPO, MERGE, GGUF], {}),
    "two branches": ([SFT, merge(), gguf(), merge("again", **{"from": "sft"}), gguf("small", "Q2_K")], {}),
    "two quantize stages in a row": ([SFT, MERGE, gguf("a", "Q8_0"), gguf("b", "Q4_K_M")], {}),
    "full, then quantize": ([sft(method="full"), GGUF], {}),
    "full after a merge": ([SFT, MERGE, sft("more", method="full"), GGUF], {}),
    "lora after full": ([sft(method="full"), dpo(lora={"r": 4}), MERGE], {}),
    "the base model alone": ([gguf()], {}),
    "an adapter in gguf": ([SFT, DPO, MERGE, {"name": "gguf", "quantize": {"gguf": ["F16"], "loraGGUF": True}}], {}),
    "a type that needs an importance matrix": ([gguf("gguf", "IQ1_S", "F32")], {}),
    "sft, reward, rl, merge, quantize": ([SFT, reward(), rl("judge"), MERGE, GGUF], {}),
    "a reward model that starts from sft": ([SFT, {"name": "judge", "reward": {"method": "lora"}}, rl("judge")], {}),
    "a reward model alone": ([reward(method="full")], {"evaluation": {"skip": True}}),
    "two rewards": (
        [reward(), rl(rewards=[{"stage": "judge", "weight": 2}, {"builtin": "length", "weight": -0.1}])],
        {},
    ),
    "grpo": ([rl(algorithm="grpo", kl={"coefficient": 0}, training={"microBatchSize": 4})], {}),
    "rloo with two answers": ([rl(algorithm="rloo", generation={"perPrompt": 2})], {}),
    "ppo with its own block": ([rl(ppo={"lambda": 0.9}, kl={"coefficient": 0.1, "target": 6})], {}),
    "every loss": (
        [
            SFT,
            dpo("a", loss="ipo", beta=0.5),
            dpo("b", loss="simpo", simpo={"gamma": 0.5}),
            dpo("c", loss="kto", kto={"desirableWeight": 1.5}, training={"batchSize": 4, "microBatchSize": 1}),
            dpo("d", labelSmoothing=0.1),
            dpo("e", loss="orpo", labelSmoothing=0.0),
        ],
        {},
    ),
    "labels for kto": (
        [SFT, dpo(loss="kto")],
        {"data": {r: [{"source": "s3://data/k.csv", "format": "labels"}] for r in ("train", "preference")}},
    ),
    "the 4-bit form of qlora's base": (
        [sft(method="qlora", quantization={"type": "fp4"}), {"name": "merge", "merge": {"base": "dequantized"}}],
        {},
    ),
    "every variant": (
        [
            sft(lora={"variant": "pissa", "bias": "all", "rankStabilized": True, "modulesToSave": ["norm"]}),
            MERGE,
            dpo(method="qlora", lora={"variant": "dora", "modulesToSave": ["embed_tokens", "lm_head"]}),
        ],
        {},
    ),
    "vectors before every text": ([sft(method="promptTuning", promptTuning={"initText": "Answer in JSON"})], {}),
    "a prefix": ([sft(method="prefixTuning", prefixTuning={"projection": True}, training={"packing": False})], {}),
    "a new adapter on one that is folded in": (
        [sft(lora={"bias": "all"}), dpo(start="merge", method="ia3"), sft("more", method="full", start="merge"), GGUF],
        {},
    ),
    "a new adapter that is trained on": (
        [sft(lora={"r": 8}), dpo(start="merge", lora={"r": 4}), sft("more", lora={"r": 4}), MERGE],
        {},
    ),
    "ia3, trained on and merged": (
        [
            sft(method="ia3", ia3={"targetModules": ["k_proj", "down_proj"], "feedforwardModules": ["down_proj"]}),
            dpo(method="ia3"),
            MERGE,
            GGUF,
        ],
        {},
    ),
    "bottlenecks, trained on": (
        [sft(method="bottleneck", bottleneck={"placement": ["mlp"]}), dpo(method="bottleneck")],
        {},
    ),
    "a prompt beside a lora": ([SFT, MERGE, GGUF, {**sft("prompt", method="promptTuning"), "from": "base"}], {}),
    "a prompt for a merged model": ([SFT, MERGE, sft("prompt", method="promptTuning")], {}),
    "several adapters": (
        [SFT, OTHER, merging("sft", "other", combination="ties", density=0.5), LORA_GGUF],
        {},
    ),
    "one adapter twice, of two checkpoints": (
        [
            SFT,
            named_adapters({"stage": "sft", "checkpoint": "last"}, {"stage": "sft", "weight": -0.5, "checkpoint": 3}),
        ],
        {},
    ),
    "a stage's adapter and another job's": (
        [
            SFT,
            named_adapters({"stage": "sft"}, {"uri": "s3://bucket/team/bot/sft/3c561901eae3"}, combination="dareTies"),
        ],
        {},
    ),
    "adapters of elsewhere alone": (
        [named_adapters({"uri": "s3://bucket/x/y"}, {"uri": "file:///adapter"}, combination="svd", rank=8)],
        {"evaluation": {"skip": True}, "data": {}},
    ),
    "adapters of two kinds": ([SFT, {**sft("other", method="ia3"), "from": "base"}, merging("sft", "other")], {}),
    "adapters beside one quantized base": (
        [
            sft(method="qlora"),
            {**sft("other", method="qlora"), "from": "base"},
            merging("sft", "other", base="dequantized"),
        ],
        {},
    ),
    "the same lora written twice": ([sft(lora={"r": 8}), dpo(lora={"r": 8, "alpha": 16})], {}),
    "qlora with its own block": ([sft(method="qlora", quantization={"doubleQuant": False})], {}),
    "no data, no evaluation": ([gguf()], {"data": {}, "evaluation": {"skip": True}}),
    "a stage's own data": (
        [{**sft(), "data": {"train": [{"source": "s3://data/k.csv.gz"}]}}],
        {"data": {"test": [{"source": "s3://data/t.json"}]}},
    ),
    "qat for every method that it is for": (
        [
            sft(qat={"type": "Q4_0"}, lora={"bias": "all", "rankStabilized": True}),
            MERGE,
            sft("more", method="full", qat={"type": "Q2_K"}),
            GGUF,
        ],
        {},
    ),
    "qat of an adapter that comes in": ([sft(lora={"variant": "pissa"}), sft("more", qat={"type": "Q4_0"}), MERGE], {}),
    "unsloth for what it computes": (
        [
            {
                **sft(method="qlora", training={"backend": "unsloth", "precision": "bf16"}, lora={"dropout": 0.1}),
                "resources": {"gpus": 1},
            },
            dpo(method="qlora", training={"backend": "unsloth", "distributed": "ddp"}),
        ],
        {},
    ),
    "gpus share the model": ([{**sft(training={"distributed": "fsdp"}), "resources": {"gpus": 8}}], {}),
    "gpus share all of full": (
        [{**sft(method="full", training={"distributed": "fsdp"}), "resources": {"gpus": 8}}],
        {},
    ),
    "gpus share the batch": ([{**sft(training={"batchSize": 16, "microBatchSize": 2}), "resources": {"gpus": 4}}], {}),
    "nodes share the batch": ([{**sft(training={"batchSize": 32}), "resources": {"gpus": 8, "nodes": 2}}], {}),
    "nodes without GPUs": ([{**sft(training={"batchSize": 3}), "resources": {"nodes": 3}}], {}),
    "evaluation after several nodes": ([{**sft(), "resources": {"nodes": 2}}], {"evaluation": {"resources": {}}}),
    "gates": (
        [SFT, MERGE, GGUF],
        {"evaluation": {"gates": {"minScore": {"exactMatch": 0.8}, "maxGGUFDivergence": {"Q4_K_M": 0.1}}}},
    ),
    **{
        f"model {source}": ([SFT], {"model": {"source": source}})
        for source in ("hf://org/na.me-1@main", "s3://bucket/models/x", "file:///m.gguf", "package://llm_x/model.gguf")
    },
    **{
        f"data {source}": ([SFT], {"data": {"train": [{"source": source}]}})
        for source in (
            "hf://datasets/org/name@v1",
            "hf://datasets/openai/gsm8k/main@e53f048",
            "file:///d/x.parquet",
            "s3://data/folder/",
            "s3://data/folder",
            "s3://data/.hidden",
        )
    },
}


@pytest.mark.parametrize("name", VALID)
def test_a_sound_job_breaks_no_rule(name: str) -> None:
    """Rules refuse nothing that works."""
    stages, spec = VALID[name]
    assert check(a_job(*stages, **spec)) == []


S3 = [{"source": "s3://data/k.jsonl"}]
BROKEN: dict[str, Any] = {
    "qat of quantized weights": (
        [sft(method="qlora", qat={"type": "Q4_0"})],
        {},
        f"{P}[0].sft.qat",
        "is only for method lora or full, got qlora: remove it, or write `method: lora`",
    ),
    "qat of a weight in parts": (
        [sft(qat={"type": "Q4_0"}, lora={"variant": "dora"})],
        {},
        f"{P}[0].sft.lora.variant",
        "qat rounds what base and adapter make together, which is not done with `variant`: leave one of the two out",
    ),
    "qat with dropout": (
        [sft(qat={"type": "Q4_0"}, lora={"dropout": 0.1})],
        {},
        f"{P}[0].sft.lora.dropout",
        "qat rounds what base and adapter make together, which is not done with `dropout`: leave one of the two out",
    ),
    "qat of an adapter with whole modules": (
        [sft(lora={"modulesToSave": ["embed_tokens"]}), sft("more", qat={"type": "Q4_0"})],
        {},
        f"{P}[1].sft.qat",
        "qat rounds what base and adapter make together, which is not done with `modulesToSave`, as `sft` made the "
        f"adapter: leave qat out, or {BETWEEN}",
    ),
    "qat of a shared model": (
        [{**sft(qat={"type": "Q4_0"}, training={"distributed": "fsdp"}), "resources": {"gpus": 2}}],
        {},
        f"{P}[0].sft.training.distributed",
        "qat rounds whole weights, which fsdp shares: write ddp, or leave qat out",
    ),
    "adapter of no stage": (
        [SFT, OTHER, merging("stf", "other")],
        {},
        f"{P}[2].merge.adapters[0].stage",
        "there is no stage `stf`; did you mean `sft`?",
    ),
    "adapter of a later stage": (
        [SFT, merging("sft", "other"), OTHER],
        {},
        f"{P}[1].merge.adapters[1].stage",
        "`other` is no earlier stage: name one of sft",
    ),
    "adapter of a merge": (
        [SFT, merge(), {**merging("sft", "merge", name="both"), "from": "sft"}],
        {},
        f"{P}[2].merge.adapters[1].stage",
        "`merge` leaves no adapter that can be merged: name one of sft",
    ),
    "adapter of a reward model": (
        [SFT, reward(), merging("sft", "judge")],
        {},
        f"{P}[2].merge.adapters[1].stage",
        "`judge` leaves no adapter that can be merged: name one of sft",
    ),
    "adapter of full training": (
        [sft("full", method="full"), merging("full")],
        {},
        f"{P}[1].merge.adapters[0].stage",
        "`full` leaves no adapter that can be merged: train with `method: lora` before it",
    ),
    "adapter of vectors": (
        [SFT, {**sft("prompt", method="promptTuning"), "from": "base"}, {**merging("sft", "prompt"), "from": "sft"}],
        {},
        f"{P}[2].merge.adapters[1].stage",
        "`prompt` trains with promptTuning, which is no change of the weights: name one of sft",
    ),
    "adapter of nothing": (
        [SFT, named_adapters({"weight": 2})],
        {},
        f"{P}[1].merge.adapters[0]",
        "needs exactly one of stage, uri: make it two entries, or name one",
    ),
    "adapter of no weight": (
        [SFT, OTHER, named_adapters({"stage": "sft"}, {"stage": "other", "weight": 0})],
        {},
        f"{P}[2].merge.adapters[1].weight",
        "0 leaves nothing of the adapter: remove the entry",
    ),
    "adapter named twice": (
        [SFT, merging("sft", "sft")],
        {},
        f"{P}[1].merge.adapters[1]",
        "sft is listed twice: remove one, and double the weight of the other",
    ),
    "a combination of one": (
        [SFT, {"name": "m", "merge": {"combination": "ties"}}],
        {},
        f"{P}[1].merge.combination",
        "ties combines adapters that are named: name them under adapters, or remove it",
    ),
    "density of a sum": (
        [SFT, OTHER, merging("sft", "other", density=0.5)],
        {},
        f"{P}[2].merge.density",
        "is only for combination ties or dareTies, got linear: remove it",
    ),
    "rank of ties": (
        [SFT, OTHER, merging("sft", "other", combination="ties", rank=8)],
        {},
        f"{P}[2].merge.rank",
        "is only for combination svd, got ties: remove it",
    ),
    "the adapter before is not among them": (
        [SFT, OTHER, dpo(), merging("sft", "other")],
        {},
        f"{P}[3].merge.adapters",
        "`dpo` comes before this stage, and is not one of its adapters: name it too, or write `from: sft`",
    ),
    "adapters of two bases": (
        [SFT, merge(), sft("more"), merging("sft", "more", name="both")],
        {},
        f"{P}[3].merge.adapters[0].stage",
        "`sft` belongs to the weights of `base`, this stage starts from those of `merge`: "
        "write `from: sft`, and name adapters of one base alone",
    ),
    "an adapter from elsewhere on a merged model": (
        [SFT, MERGE, sft("more"), named_adapters({"stage": "more"}, {"uri": "s3://bucket/x/y"}, name="both")],
        {},
        f"{P}[3].merge.adapters[1].uri",
        "an adapter from elsewhere belongs to the base model, this stage starts from `merge`: write `from: base`",
    ),
    "svd of dora": (
        [sft(lora={"variant": "dora"}), dpo(), OTHER, merging("dpo", "other", combination="svd")],
        {},
        f"{P}[3].merge.adapters[0].stage",
        "`sft` trains with `variant: dora`, which is not of A and B alone, and svd is: "
        "write linear or ties, or train without it",
    ),
    "svd of ia3": (
        [SFT, {**sft("other", method="ia3"), "from": "base"}, merging("sft", "other", combination="svd")],
        {},
        f"{P}[2].merge.adapters[1].stage",
        "`other` trains with method ia3, which is not of A and B alone, and svd is: "
        "write linear or ties, or train without it",
    ),
    "a checkpoint after the end": (
        [sft(training={"maxSteps": 5}), OTHER, named_adapters({"stage": "sft", "checkpoint": 6}, {"stage": "other"})],
        {},
        f"{P}[2].merge.adapters[0].checkpoint",
        "`sft` takes 5 steps, got 6: write 5, or last",
    ),
    "a checkpoint of a folder": (
        [SFT, named_adapters({"stage": "sft"}, {"uri": "file:///a", "checkpoint": "best"})],
        {},
        f"{P}[1].merge.adapters[1].checkpoint",
        "a folder holds one adapter: leave it out, or name an s3:// uri",
    ),
    "an adapter of the hub": (
        [SFT, named_adapters({"stage": "sft"}, {"uri": "hf://org/name"})],
        {},
        f"{P}[1].merge.adapters[1].uri",
        'must look like s3://bucket/.../stage/digest or file://folder, got "hf://org/name"',
    ),
    "adapters beside different bases": (
        [sft(method="qlora"), OTHER, merging("sft", "other", base="dequantized")],
        {},
        f"{P}[2].merge.base",
        "the adapters did not all train beside one and the same quantized base: leave it out",
    ),
    "one of several adapters no GGUF can hold": (
        [SFT, {**sft("other", lora={"bias": "all"}), "from": "base"}, merging("sft", "other"), LORA_GGUF],
        {},
        f"{P}[3].quantize.loraGGUF",
        "`other` trains with `bias: all`, which an adapter in GGUF cannot hold: leave one of the two out",
    ),
    "factors as a GGUF": (
        [sft(method="ia3"), MERGE, LORA_GGUF],
        {},
        f"{P}[2].quantize.loraGGUF",
        "`sft` trains with ia3, whose factors an adapter in GGUF cannot hold: leave one of the two out",
    ),
    "adapters of elsewhere as GGUFs": (
        [{**SFT, "from": "base"}, {**named_adapters({"uri": "s3://bucket/x/y"}), "from": "base"}, LORA_GGUF],
        {},
        f"{P}[2].quantize.loraGGUF",
        "all adapters of `merge` are from elsewhere: leave it out",
    ),
    "no block": (
        [SFT, {"name": "merge"}],
        {},
        f"{P}[1]",
        "needs exactly one of sft, preference, reward, rl, merge, quantize; "
        "a block without fields is written `merge: {}`",
    ),
    "two blocks": (
        [{"name": "x", "sft": {}, "merge": {}}],
        {},
        f"{P}[0]",
        "has sft and merge, but a stage does one thing: make it 2 stages",
    ),
    "test rows of a stage's own": (
        [{**sft(), "data": {"test": S3}}],
        {},
        f"{P}[0].data.test",
        "is the same for the whole job: move it to spec.data.test",
    ),
    "smoothing of another loss": (
        [SFT, dpo(loss="ipo", labelSmoothing=0.1)],
        {},
        f"{P}[1].preference.labelSmoothing",
        "is only for loss dpo, got ipo: remove it, or write `loss: dpo`",
    ),
    "simpo's block with dpo": (
        [SFT, dpo(simpo={})],
        {},
        f"{P}[1].preference.simpo",
        "is only for loss simpo, got dpo: remove it, or write `loss: simpo`",
    ),
    "kto's block with orpo": (
        [SFT, dpo(loss="orpo", kto={"desirableWeight": 2})],
        {},
        f"{P}[1].preference.kto",
        "is only for loss kto, got orpo: remove it, or write `loss: kto`",
    ),
    "labels for dpo": (
        [SFT, dpo()],
        {"data": {"train": S3, "preference": [*S3, {**S3[0], "format": "labels"}]}},
        f"{P}[1].preference.loss",
        "dpo compares two answers, but the rows are single ones with a label: write `loss: kto`, or give pairs",
    ),
    "kto of few answers": (
        [SFT, dpo(loss="kto", training={"batchSize": 3})],
        {},
        f"{P}[1].preference.training.batchSize",
        "kto estimates its KL divergence from the answers of a step, got 3: write 4 or more",
    ),
    "noise in preference": (
        [SFT, dpo(training={"neftuneNoiseAlpha": 5})],
        {},
        f"{P}[1].preference.training.neftuneNoiseAlpha",
        "is for sft: leave it out here",
    ),
    "a data set without its owner": (
        [SFT],
        {"data": {"train": [{"source": "hf://datasets/squad"}]}},
        "spec.data.train[0].source",
        'must look like hf://datasets/org/name or hf://datasets/org/name@revision, got "hf://datasets/squad"',
    ),
    "a scheme of other programs": (
        [SFT],
        {"model": {"source": "ollama://llama3"}},
        "spec.model.source",
        'must begin with hf://, s3://, file:// or package://, got "ollama://llama3"',
    ),
    "a file behind a web server": (
        [SFT],
        {"data": {"train": [{"source": "https://host/t.jsonl"}]}},
        "spec.data.train[0].source",
        'must begin with s3://, hf://, configmap:// or file://, got "https://host/t.jsonl": download it and write file://',
    ),
    "an unseen character in an address": (
        [SFT],
        {"model": {"source": "file:///m\x00"}},
        "spec.model.source",
        "holds a character that cannot be seen: file:///m\\x00",
    ),
    "a column that no format has": (
        [SFT],
        {"data": {"train": [{"source": "s3://data/k.jsonl", "columns": {"prmpt": "q"}}]}},
        "spec.data.train[0].columns.prmpt",
        "is no standard column; did you mean `prompt`?",
    ),
    "a port that is no number": (
        [SFT],
        {"storage": {"bucket": "finetune", "endpoint": "http://host:port"}},
        "spec.storage.endpoint",
        'must have a host, and a port from 1 to 65535 if any, got "http://host:port": write it like http://host:8333',
    ),
    "white space in the endpoint": (
        [SFT],
        {"storage": {"bucket": "finetune", "endpoint": "http://ho st"}},
        "spec.storage.endpoint",
        'must not hold white space, got "http://ho st": write it like http://host:8333',
    ),
    "a bucket that looks like an address": (
        [SFT],
        {"storage": {"bucket": "10.0.0.1"}},
        "spec.storage.bucket",
        'must not hold two dots in a row, nor look like an IP address, got "10.0.0.1"',
    ),
    "a prefix that climbs": (
        [SFT],
        {"storage": {"bucket": "finetune", "prefix": "a/../b"}},
        "spec.storage.prefix",
        'must be names with one / between, none of them . or .., got "a/../b"',
    ),
    "same name": ([SFT, SFT], {}, f"{P}[1].name", f"`sft` is the name of {P}[0] too: rename one"),
    "reserved name": ([sft("prepare")], {}, f"{P}[0].name", "`prepare` is reserved: write `my-prepare`, say"),
    "base as a name": ([sft("base")], {}, f"{P}[0].name", "`base` is reserved: write `my-base`, say"),
    "unknown from": (
        [SFT, merge(**{"from": "stf"})],
        {},
        f"{P}[1].from",
        "there is no stage `stf`; did you mean `sft`?",
    ),
    "later from": (
        [SFT, merge(**{"from": "dpo"}), {**DPO, "from": "sft"}],
        {},
        f"{P}[1].from",
        "`dpo` is written after this stage: move it before",
    ),
    "own from": ([{**SFT, "from": "sft"}], {}, f"{P}[0].from", "a stage cannot start from itself: name one of base"),
    "derived from": ([{**SFT, "from": "baseline"}], {}, f"{P}[0].from", "`baseline` leaves no model: name one of base"),
    "from a quantize stage": (
        [SFT, MERGE, GGUF, {**DPO, "from": "gguf"}],
        {},
        f"{P}[3].from",
        "`gguf` leaves GGUF files, which nothing can start from: write `from: merge`",
    ),
    "nothing to merge": (
        [MERGE],
        {},
        f"{P}[0].merge",
        "there is no adapter to merge: put an sft, preference or rl stage before it",
    ),
    "merge after full": (
        [sft(method="full"), MERGE],
        {},
        f"{P}[1].merge",
        "`sft` trains with method full, which leaves no adapter to merge: remove this stage",
    ),
    "merge after merge": (
        [SFT, MERGE, merge("again")],
        {},
        f"{P}[2].merge",
        "`merge` has merged the adapter already: remove this stage",
    ),
    "quantize an adapter": (
        [SFT, GGUF],
        {},
        f"{P}[1].quantize",
        f"`sft` leaves an adapter, and a GGUF needs whole weights: {BETWEEN}",
    ),
    "full after an adapter": (
        [SFT, dpo(method="full")],
        {},
        f"{P}[1].preference.method",
        f"full cannot train the adapter that `sft` leaves: {BETWEEN}, or write `method: lora` to train the adapter on",
    ),
    "gguf type twice": (
        [gguf("gguf", "Q8_0", "F16", "Q8_0")],
        {},
        f"{P}[0].quantize.gguf[2]",
        "Q8_0 is listed twice: remove one",
    ),
    "nothing to write": (
        [{"name": "gguf", "quantize": {"bitsandbytes": []}}],
        {},
        f"{P}[0].quantize.gguf",
        "is required: name a type, or write `bitsandbytes`",
    ),
    "an importance matrix for no gguf": (
        [{"name": "gguf", "quantize": {"bitsandbytes": ["nf4"], "imatrix": {}}}],
        {},
        f"{P}[0].quantize.imatrix",
        "is for GGUF types, and there are none: leave it out",
    ),
    "an adapter in gguf of a base model": (
        [{"name": "gguf", "quantize": {"gguf": ["F16"], "loraGGUF": True}}],
        {},
        f"{P}[0].quantize.loraGGUF",
        "there is no merged adapter before it: leave it out, or train with lora and merge",
    ),
    "an adapter in gguf with magnitudes": (
        [sft(lora={"variant": "dora"}), MERGE, {"name": "gguf", "quantize": {"gguf": ["F16"], "loraGGUF": True}}],
        {},
        f"{P}[2].quantize.loraGGUF",
        "`sft` trains with `variant: dora`, which an adapter in GGUF cannot hold: leave one of the two out",
    ),
    "an adapter in gguf with whole modules": (
        [
            sft(lora={"modulesToSave": ["embed_tokens"]}),
            DPO,
            MERGE,
            {"name": "gguf", "quantize": {"gguf": ["F16"], "loraGGUF": True}},
        ],
        {},
        f"{P}[3].quantize.loraGGUF",
        "`sft` trains with `modulesToSave`, which an adapter in GGUF cannot hold: leave one of the two out",
    ),
    "an importance matrix without rows": (
        [{"name": "gguf", "quantize": {"gguf": ["Q8_0"], "imatrix": {"rows": 10}}}],
        {"data": {}, "evaluation": {"skip": True}},
        f"{P}[0].quantize.imatrix",
        "is measured on train rows: give some under spec.data.train",
    ),
    "a type that needs an importance matrix without rows": (
        [gguf("gguf", "Q8_0", "IQ2_XXS")],
        {"data": {}, "evaluation": {"skip": True}},
        f"{P}[0].quantize.gguf[1]",
        "IQ2_XXS needs an importance matrix, which is measured on train rows: give some, or use another type",
    ),
    "bitsandbytes type twice": (
        [{"name": "gguf", "quantize": {"gguf": ["Q8_0"], "bitsandbytes": ["nf4", "nf4"]}}],
        {},
        f"{P}[0].quantize.bitsandbytes[1]",
        "nf4 is listed twice: remove one",
    ),
    "lora with full": (
        [sft(method="full", lora={})],
        {},
        f"{P}[0].sft.lora",
        "is only for method lora or qlora, got full: remove it, or write `method: lora`",
    ),
    "prefix settings with lora": (
        [sft(prefixTuning={})],
        {},
        f"{P}[0].sft.prefixTuning",
        "is only for method prefixTuning, got lora: remove it, or write `method: prefixTuning`",
    ),
    "lora with a prompt": (
        [sft(method="promptTuning", lora={})],
        {},
        f"{P}[0].sft.lora",
        "is only for method lora or qlora, got promptTuning: remove it, or write `method: lora`",
    ),
    "merge a prompt": (
        [sft("prompt", method="promptTuning"), MERGE],
        {},
        f"{P}[1].merge",
        "`prompt` learned vectors that stand before every text (promptTuning), not weights: "
        "pull `prompt/adapter` as it is, or train with `method: lora`",
    ),
    "other factors": (
        [sft(method="ia3"), dpo(method="ia3", ia3={"targetModules": ["q_proj"]})],
        {},
        f"{P}[1].preference.ia3",
        "`sft` made the factors that are trained on, and of other layers: leave `ia3` out here",
    ),
    "a lora on factors": (
        [sft(method="ia3"), DPO],
        {},
        f"{P}[1].preference.method",
        f"lora cannot train the adapter that `sft` leaves: write `method: ia3`, or {BETWEEN}",
    ),
    "factors twice": (
        [sft(method="ia3", ia3={"targetModules": ["k_proj", "k_proj"]})],
        {},
        f"{P}[0].sft.ia3.targetModules[1]",
        "k_proj is listed twice: remove one",
    ),
    "factors of the head": (
        [sft(method="ia3", ia3={"targetModules": ["lm_head"]})],
        {},
        f"{P}[0].sft.ia3.targetModules[0]",
        "lm_head takes no factors: name linear layers, as in [k_proj, v_proj]",
    ),
    "inputs of a layer that is not scaled": (
        [sft(method="ia3", ia3={"feedforwardModules": ["down_proj"]})],
        {},
        f"{P}[0].sft.ia3.feedforwardModules[0]",
        "down_proj is not in targetModules: name it there too",
    ),
    "nothing to fold in": (
        [sft(start="merge")],
        {},
        f"{P}[0].sft.start",
        "there is no adapter to fold in: leave it out",
    ),
    "bottlenecks to fold in": (
        [sft(method="bottleneck"), dpo(start="merge")],
        {},
        f"{P}[1].preference.start",
        "`sft` added networks of its own to the model (bottleneck), which no weight can take in: write `from: base`, "
        "or train with `method: lora` before it",
    ),
    "another rank than the new adapter's": (
        [sft(lora={"r": 8}), dpo(start="merge", lora={"r": 4, "alpha": 16}), sft("more", lora={"r": 8})],
        {},
        f"{P}[2].sft.lora.r",
        f"`dpo` made the adapter that is trained on with 4, got 8: leave `lora` out here, or {BETWEEN}",
    ),
    "merge bottlenecks": (
        [sft(method="bottleneck"), MERGE],
        {},
        f"{P}[1].merge",
        "`sft` added networks of its own to the model (bottleneck), which no weight can take in: "
        "pull `sft/adapter` as it is, or train with `method: lora`",
    ),
    "quantize a prefix": (
        [sft(method="prefixTuning"), GGUF],
        {},
        f"{P}[1].quantize",
        "`sft` learned vectors that stand before every text (prefixTuning), not weights, so there can be no GGUF: "
        "remove this stage, or train with `method: lora`",
    ),
    "train a prompt on": (
        [sft(method="promptTuning"), dpo(method="promptTuning")],
        {},
        f"{P}[1].preference.start",
        "the vectors that `sft` learned before every text cannot be trained on: "
        "write `from: base`, or `method: lora` in `sft`",
    ),
    "a lora on bottlenecks": (
        [sft(method="bottleneck"), DPO],
        {},
        f"{P}[1].preference.method",
        "lora cannot train the adapter that `sft` leaves: write `method: bottleneck`, or `from: base`",
    ),
    "a prompt on a lora": (
        [SFT, dpo(method="promptTuning")],
        {},
        f"{P}[1].preference.method",
        f"promptTuning cannot train the adapter that `sft` leaves: write `method: lora`, or {BETWEEN}",
    ),
    "full after bottlenecks": (
        [sft(method="bottleneck"), dpo(method="full")],
        {},
        f"{P}[1].preference.method",
        "full cannot train the adapter that `sft` leaves: write `from: base`, or train with `method: lora` before it",
    ),
    "other bottlenecks": (
        [sft(method="bottleneck"), dpo(method="bottleneck", bottleneck={"reductionFactor": 2})],
        {},
        f"{P}[1].preference.bottleneck",
        "`sft` made the adapters that are trained on, and otherwise: leave `bottleneck` out here",
    ),
    "a place twice": (
        [sft(method="bottleneck", bottleneck={"placement": ["mlp", "mlp"]})],
        {},
        f"{P}[0].sft.bottleneck.placement[1]",
        "mlp is listed twice: remove one",
    ),
    "prompts in one row": (
        [sft(method="promptTuning", training={"packing": True})],
        {},
        f"{P}[0].sft.training.packing",
        "promptTuning puts vectors before every text, which then needs a row of its own: write auto",
    ),
    "a prefix computed twice": (
        [sft(method="prefixTuning", training={"gradientCheckpointing": True})],
        {},
        f"{P}[0].sft.training.gradientCheckpointing",
        "the prefix is given to the layers as a cache, which recomputing does not have: write auto",
    ),
    "a reward model of bottlenecks": (
        [reward(method="bottleneck"), SFT],
        {},
        f"{P}[0].reward.method",
        "bottleneck leaves no reward model that transformers could load: write lora, qlora or full",
    ),
    **{
        f"unsloth for {got}": (
            [stage, SFT] if kind == "reward" else [stage],
            {},
            f"{P}[0].{kind}.training.backend",
            f"unsloth is for sft and preference by lora or qlora, got {got}: write auto",
        )
        for kind, stage, got in (
            ("sft", sft(method="full", training=UNSLOTH), "method full"),
            ("preference", dpo(method="ia3", training=UNSLOTH), "method ia3"),
            ("reward", reward(training=UNSLOTH), "reward"),
            ("rl", rl(training=UNSLOTH), "rl"),
        )
    },
    **{
        f"unsloth with {words}": (
            [stage],
            extra,
            f"{P}[0].sft.training.backend",
            f"unsloth is {words}: write auto, or change that",
        )
        for stage, extra, words in (
            ({**sft(training=UNSLOTH), "resources": {"gpus": 2}}, {}, "for one GPU of one node"),
            ({**sft(training=UNSLOTH), "resources": {"gpus": 1, "nodes": 2}}, {}, "for one GPU of one node"),
            (sft(training={**UNSLOTH, "distributed": "fsdp"}), {}, "not for `distributed: fsdp`"),
            (sft(training={**UNSLOTH, "precision": "fp32"}), {}, "not for `precision: fp32`"),
            (
                sft(method="qlora", quantization={"type": "int8"}, training=UNSLOTH),
                {},
                "not for `quantization.type: int8`",
            ),
            (sft(qat={"type": "Q4_0"}, training=UNSLOTH), {}, "not for `qat`"),
            (sft(lora={"variant": "dora"}, training=UNSLOTH), {}, "not for `lora.variant: dora`"),
            (sft(lora={"bias": "all"}, training=UNSLOTH), {}, "not for `lora.bias: all`"),
            (sft(lora={"modulesToSave": ["embed_tokens"]}, training=UNSLOTH), {}, "not for `lora.modulesToSave`"),
            (
                sft(training=UNSLOTH),
                {"model": {"source": "hf://org/m", "trustRemoteCode": True}},
                "for models without code of their own",
            ),
        )
    },
    "unsloth on the adapter of another variant": (
        [sft(lora={"variant": "dora"}), dpo(training=UNSLOTH)],
        {},
        f"{P}[1].preference.training.backend",
        "unsloth is not for `lora.variant: dora`: write auto, or change that",
    ),
    "a 4-bit model that is shared": (
        [sft(method="qlora", training={"distributed": "fsdp"})],
        {},
        f"{P}[0].sft.training.distributed",
        "fsdp is for method lora or full, got qlora: write `method: lora`, or ddp",
    ),
    "fsdp with an optimizer of blocks": (
        [sft(method="full", training={"distributed": "fsdp", "optimizer": "adamw8bit"})],
        {},
        f"{P}[0].sft.training.optimizer",
        "adamw8bit packs numbers in blocks, which processes cannot share: write adamw, or ddp above",
    ),
    "quantization without qlora": (
        [sft(quantization={})],
        {},
        f"{P}[0].sft.quantization",
        "is only for method qlora, got lora: remove it, or write `method: qlora`",
    ),
    "another rank": (
        [SFT, dpo(lora={"r": 8, "alpha": 32})],
        {},
        f"{P}[1].preference.lora.r",
        f"`sft` made the adapter that is trained on with 16, got 8: leave `lora` out here, or {BETWEEN}",
    ),
    "another rank, two on": (
        [sft(lora={"r": 4, "alpha": 8}), DPO, sft("more", lora={"r": 16, "alpha": 8})],
        {},
        f"{P}[2].sft.lora.r",
        f"`sft` made the adapter that is trained on with 4, got 16: leave `lora` out here, or {BETWEEN}",
    ),
    "other modules": (
        [SFT, dpo(lora={"targetModules": ["q_proj"]})],
        {},
        f"{P}[1].preference.lora.targetModules",
        "`sft` made the adapter that is trained on with [all-linear], got [q_proj]: "
        f"leave `lora` out here, or {BETWEEN}",
    ),
    "output head": (
        [sft(lora={"targetModules": ["q_proj", "lm_head"]})],
        {},
        f"{P}[0].sft.lora.targetModules[1]",
        "lm_head takes no adapter: leave it out, or train it whole with `modulesToSave: [embed_tokens, lm_head]`",
    ),
    "embeddings": (
        [sft(lora={"targetModules": ["model.embed_tokens"]})],
        {},
        f"{P}[0].sft.lora.targetModules[0]",
        "model.embed_tokens takes no adapter: leave it out, or train it whole with "
        "`modulesToSave: [embed_tokens, lm_head]`",
    ),
    "a whole module twice": (
        [sft(lora={"modulesToSave": ["norm", "norm"]})],
        {},
        f"{P}[0].sft.lora.modulesToSave[1]",
        "norm is listed twice: remove one",
    ),
    "all linear layers whole": (
        [sft(lora={"modulesToSave": ["all-linear"]})],
        {},
        f"{P}[0].sft.lora.modulesToSave[0]",
        "all-linear is for targetModules: name modules, or write `method: full`",
    ),
    "a module whole and with an adapter": (
        [sft(lora={"targetModules": ["q_proj", "up_proj"], "modulesToSave": ["up_proj"]})],
        {},
        f"{P}[0].sft.lora.modulesToSave[0]",
        "up_proj is in targetModules too: remove it from one of them",
    ),
    "pissa on a 4-bit base": (
        [sft(method="qlora", lora={"variant": "pissa"})],
        {},
        f"{P}[0].sft.lora.variant",
        "pissa takes the principal components of 16-bit weights: write `method: lora`, or another variant",
    ),
    "the 4-bit form of a base that was not quantized": (
        [SFT, {"name": "merge", "merge": {"base": "dequantized"}}],
        {},
        f"{P}[1].merge.base",
        "`sft` trained on the original weights: leave it out, or write `method: qlora` there",
    ),
    "biases of a 4-bit base": (
        [sft(method="qlora", lora={"bias": "loraOnly"})],
        {},
        f"{P}[0].sft.lora.bias",
        "biases of quantized layers are not trained: write `method: lora`, or none",
    ),
    **{
        f"{name} of a base that is shared": (
            [sft(lora={name: value}, training={"distributed": "fsdp"})],
            {},
            f"{P}[0].sft.training.distributed",
            "fsdp shares the frozen weights, which variant, bias or modulesToSave of `lora` need whole: write ddp, or "
            "leave them out",
        )
        for name, value in (("variant", "dora"), ("bias", "all"), ("modulesToSave", ["embed_tokens"]))
    },
    "biases trained on": (
        [sft(lora={"bias": "all"}), DPO],
        {},
        f"{P}[1].preference.start",
        f"`sft` trains biases too, and such an adapter cannot be trained on: {BETWEEN}",
    ),
    "pissa written twice": (
        [sft(lora={"variant": "pissa", "alpha": 32, "r": 8}), dpo(lora={"r": 8, "alpha": 64})],
        {},
        f"{P}[1].preference.lora.r",
        f"`sft` made the adapter that is trained on with 16, got 8: leave `lora` out here, or {BETWEEN}",
    ),
    "all-linear and more": (
        [sft(lora={"targetModules": ["all-linear", "q_proj"]})],
        {},
        f"{P}[0].sft.lora.targetModules",
        "all-linear covers every linear layer: leave the other names out",
    ),
    "module twice": (
        [sft(lora={"targetModules": ["q_proj", "q_proj"]})],
        {},
        f"{P}[0].sft.lora.targetModules[1]",
        "q_proj is listed twice: remove one",
    ),
    "batch and gpus": (
        [{**sft(training={"batchSize": 6}), "resources": {"gpus": 4}}],
        {},
        f"{P}[0].sft.training.batchSize",
        "must be a multiple of the stage's 4 GPUs, which take equal shares, got 6: write 4 or 8",
    ),
    "batch below gpus": (
        [{**sft(training={"batchSize": 2}), "resources": {"gpus": 4}}],
        {},
        f"{P}[0].sft.training.batchSize",
        "must be a multiple of the stage's 4 GPUs, which take equal shares, got 2: write 4",
    ),
    "micro-batch": (
        [{**sft(training={"batchSize": 24, "microBatchSize": 5}), "resources": {"gpus": 2}}],
        {},
        f"{P}[0].sft.training.microBatchSize",
        "must divide the 12 examples that one device takes in a step, got 5: write 4, or auto",
    ),
    "resume at the end": (
        [sft(training={"maxSteps": 10}, checkpoint={"resumeFrom": 10})],
        {},
        f"{P}[0].sft.checkpoint.resumeFrom",
        "must be less than training.maxSteps, 10, got 10: nothing would be left to train",
    ),
    "no train rows": ([SFT], {"data": {}}, "spec.data.train", "is required: stage `sft` trains on it"),
    "no pairs": ([SFT, DPO], {"data": {"train": S3}}, "spec.data.preference", "is required: stage `dpo` trains on it"),
    "no prompts": ([rl()], {"data": {"train": S3}}, "spec.data.prompts", "is required: stage `rl` trains on it"),
    "no pairs for a reward": (
        [reward(), rl("judge")],
        {"data": {"train": S3, "prompts": S3}},
        "spec.data.preference",
        "is required: stage `judge` trains on it",
    ),
    "from a reward model": (
        [SFT, reward(), {**DPO, "from": "judge"}],
        {},
        f"{P}[2].from",
        "`judge` leaves a reward model, which scores answers and gives none: read it in an rl stage as "
        "`rewards: [{stage: judge}]`, and start from a model that answers",
    ),
    "merge a reward model": (
        [reward(), MERGE],
        {},
        f"{P}[1].merge",
        "there is no adapter to merge: put an sft, preference or rl stage before it",
    ),
    "quantize a reward model": (
        [SFT, reward(), gguf(**{"from": "judge"})],
        {},
        f"{P}[2].from",
        "`judge` leaves a reward model, which scores answers and gives none: read it in an rl stage as "
        "`rewards: [{stage: judge}]`, and start from a model that answers",
    ),
    "unknown reward": (
        [reward(), rl("jugde")],
        {},
        f"{P}[1].rl.rewards[0].stage",
        "there is no stage `jugde`; did you mean `judge`?",
    ),
    "no reward model at all": (
        [SFT, rl("judge")],
        {},
        f"{P}[1].rl.rewards[0].stage",
        "there is no stage `judge`: put one before, as in `- {name: judge, reward: {}}`",
    ),
    "later reward": (
        [rl("judge"), reward()],
        {},
        f"{P}[0].rl.rewards[0].stage",
        "`judge` is no earlier reward stage: put one before, as in `- {name: judge, reward: {}}`",
    ),
    "reward by what is none": (
        [SFT, reward(), rl("sft")],
        {},
        f"{P}[2].rl.rewards[0].stage",
        "`sft` is no earlier reward stage: name one of judge",
    ),
    "reward by two in one": (
        [reward(), rl(rewards=[{"stage": "judge", "builtin": "length"}])],
        {},
        f"{P}[1].rl.rewards[0]",
        "needs exactly one of stage, builtin: make it two entries, or name one",
    ),
    "reward by nothing": (
        [rl(rewards=[{"weight": 2}])],
        {},
        f"{P}[0].rl.rewards[0]",
        "needs exactly one of stage, builtin: make it two entries, or name one",
    ),
    "reward twice": (
        [rl(rewards=[{"builtin": "length"}, {"builtin": "length"}])],
        {},
        f"{P}[0].rl.rewards[1]",
        "length is listed twice: remove one, and double the weight of the other",
    ),
    "ppo's block with grpo": (
        [rl(algorithm="grpo", ppo={})],
        {},
        f"{P}[0].rl.ppo",
        "is only for algorithm ppo, got grpo: remove it",
    ),
    "a target with rloo": (
        [rl(algorithm="rloo", kl={"target": 6})],
        {},
        f"{P}[0].rl.kl.target",
        "is only for algorithm ppo, got rloo: remove it, and set kl.coefficient",
    ),
    "a target with nothing to move": (
        [rl(kl={"target": 6, "coefficient": 0})],
        {},
        f"{P}[0].rl.kl.target",
        "moves the coefficient by a share of itself, and 0 stays 0: write a kl.coefficient above 0",
    ),
    "nothing to compare": (
        [rl(algorithm="grpo", generation={"perPrompt": 1})],
        {},
        f"{P}[0].rl.generation.perPrompt",
        "grpo compares the answers to a prompt, got 1: write 2 or more",
    ),
    "no room for a prompt": (
        [rl(training={"maxLength": 128})],
        {},
        f"{P}[0].rl.generation.maxNewTokens",
        "must be less than training.maxLength, 128, prompt and answer together, got 128: lower it, or raise maxLength",
    ),
    "prompts that are cut": (
        [rl(training={"overlong": "truncate"})],
        {},
        f"{P}[0].rl.training.overlong",
        "a prompt that is cut asks something else: leave it out, and longer prompts are dropped",
    ),
    "a policy that is shared": (
        [rl(training={"distributed": "fsdp"})],
        {},
        f"{P}[0].rl.training.distributed",
        "each GPU holds the whole model here: write ddp, or `method: qlora` where memory is short",
    ),
    "rewards of packed rows": (
        [reward(training={"packing": True}), rl("judge")],
        {},
        f"{P}[0].reward.training.packing",
        "a reward is read at the end of each row: leave it out",
    ),
    "noise in rl": (
        [rl(training={"neftuneNoiseAlpha": 5})],
        {},
        f"{P}[0].rl.training.neftuneNoiseAlpha",
        "is for sft: leave it out here",
    ),
    "nothing that answers": (
        [reward()],
        {},
        "spec.evaluation.skip",
        "a reward model gives no answers, and no other stage leaves a model to score: write `skip: true`",
    ),
    "no test rows": (
        [GGUF],
        {"data": {}},
        "spec.data.test",
        "is required: without train rows there are none to lock for scores: "
        "give some, or write `evaluation: {skip: true}`",
    ),
    "model without scheme": (
        [SFT],
        {"model": {"source": "org/name"}},
        "spec.model.source",
        'must begin with hf://, s3://, file:// or package://, got "org/name": write hf://org/name',
    ),
    "model as a path": (
        [SFT],
        {"model": {"source": "./m.gguf"}},
        "spec.model.source",
        'must begin with hf://, s3://, file:// or package://, got "./m.gguf": write file://./m.gguf',
    ),
    "model with another scheme": (
        [SFT],
        {"model": {"source": "s4://data/m"}},
        "spec.model.source",
        'must begin with hf://, s3://, file:// or package://, got "s4://data/m": write s3://data/m',
    ),
    "model's web page": (
        [SFT],
        {"model": {"source": "https://huggingface.co/org/name"}},
        "spec.model.source",
        'must begin with hf://, s3://, file:// or package://, got "https://huggingface.co/org/name": write hf://org/name',
    ),
    "model without org": (
        [SFT],
        {"model": {"source": "hf://name"}},
        "spec.model.source",
        'must look like hf://org/name or hf://org/name@revision, got "hf://name"',
    ),
    "bucket alone": (
        [SFT],
        {"model": {"source": "s3://bucket"}},
        "spec.model.source",
        'must look like s3://bucket/prefix, got "s3://bucket"',
    ),
    "data without scheme": (
        [SFT],
        {"data": {"train": [{"source": "data/train.jsonl"}]}},
        "spec.data.train[0].source",
        'must begin with s3://, hf://, configmap:// or file://, got "data/train.jsonl": write file://data/train.jsonl',
    ),
    "data like a model": (
        [SFT],
        {"data": {"train": [{"source": "hf://org/name"}]}},
        "spec.data.train[0].source",
        'must look like hf://datasets/org/name or hf://datasets/org/name@revision, got "hf://org/name": write hf://datasets/org/name',
    ),
    "data of another kind": (
        [SFT],
        {"data": {"train": [*S3, {"source": "s3://data/train.txt"}]}},
        "spec.data.train[1].source",
        "`train.txt` is not read: .jsonl, .json, .parquet, .csv are, each also with .gz; a folder ends with /",
    ),
    "a stage's data": (
        [{**sft(), "data": {"eval": [{"source": "s3://data/e.zip"}]}}],
        {},
        f"{P}[0].data.eval[0].source",
        "`e.zip` is not read: .jsonl, .json, .parquet, .csv are, each also with .gz; a folder ends with /",
    ),
    "gates on nothing": (
        [SFT],
        {"evaluation": {"skip": True, "gates": {"failJob": True}}},
        "spec.evaluation.gates",
        "with `skip: true` nothing is measured: remove the gates, or skip",
    ),
    "gate on loss": (
        [SFT],
        {"evaluation": {"gates": {"minScore": {"loss": 0.5}}}},
        "spec.evaluation.gates.minScore.loss",
        "a lower loss is better, and this is a lowest score: use another",
    ),
    "gate unmeasured": (
        [SFT],
        {"evaluation": {"metrics": ["loss"], "gates": {"minScore": {"tokenF1": 0.5}}}},
        "spec.evaluation.gates.minScore.tokenF1",
        "is not measured: add tokenF1 to spec.evaluation.metrics",
    ),
    "gate on a type not made": (
        [SFT, MERGE, GGUF],
        {"evaluation": {"gates": {"maxGGUFDivergence": {"q4_k_m": 0.1}}}},
        "spec.evaluation.gates.maxGGUFDivergence.q4_k_m",
        "the pipeline makes no GGUF of this type; did you mean `Q4_K_M`?",
    ),
    "gate without gguf": (
        [SFT],
        {"evaluation": {"gates": {"maxGGUFDivergence": {"F16": 0.1}}}},
        "spec.evaluation.gates.maxGGUFDivergence.F16",
        "the pipeline makes no GGUF of this type; it makes none at all",
    ),
    "a merge on two nodes": (
        [SFT, merge(resources={"nodes": 2})],
        {},
        f"{P}[1].resources.nodes",
        "only stages that train run on several nodes, got 2: leave it out",
    ),
    "GGUFs on two nodes": (
        [gguf(resources={"nodes": 2})],
        {},
        f"{P}[0].resources.nodes",
        "only stages that train run on several nodes, got 2: leave it out",
    ),
    "scores on two nodes": (
        [SFT],
        {"evaluation": {"resources": {"gpus": 8, "nodes": 2}}},
        "spec.evaluation.resources.nodes",
        "only stages that train run on several nodes, got 2: leave it out",
    ),
    "a batch that the GPUs of all nodes cannot share": (
        [{**sft(training={"batchSize": 24}), "resources": {"gpus": 8, "nodes": 2}}],
        {},
        f"{P}[0].sft.training.batchSize",
        "must be a multiple of the stage's 16 GPUs, which take equal shares, got 24: write 16 or 32",
    ),
    "a batch that the nodes cannot share": (
        [{**sft(), "resources": {"nodes": 3}}],
        {},
        f"{P}[0].sft.training.batchSize",
        "must be a multiple of the stage's 3 nodes, which take equal shares, got 16: write 15 or 18",
    ),
    "token twice": (
        [sft(method="full")],
        {"model": {"source": "hf://a/b", "addTokens": ["<a>", "<b>", "<a>"]}},
        "spec.model.addTokens[2]",
        "'<a>' is listed twice: remove one",
    ),
    "tokens that nothing learns": (
        [SFT, DPO],
        {"model": {"source": "hf://a/b", "addTokens": ["<a>"]}},
        f"{P}[0].sft.lora.modulesToSave",
        "the tokens of spec.model.addTokens are learned with embedding and head alone: "
        "write [embed_tokens, lm_head], or `method: full`",
    ),
    "tokens before a prompt": (
        [sft(method="promptTuning")],
        {"model": {"source": "hf://a/b", "addTokens": ["<a>"]}},
        f"{P}[0].sft.method",
        "the tokens of spec.model.addTokens are learned with embedding and head alone: "
        "write `method: lora` with `modulesToSave: [embed_tokens, lm_head]`, or `method: full`",
    ),
    "metric twice": (
        [SFT],
        {"evaluation": {"metrics": ["loss", "loss"]}},
        "spec.evaluation.metrics[1]",
        "loss is listed twice: remove one",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_breach_is_told_once_with_its_place_and_mend(name: str) -> None:
    """One mistake, one message: what follows from it in later stages is not told as well."""
    stages, spec, path, words = BROKEN[name]
    assert [(e.path, e.message) for e in check(a_job(*stages, **spec))] == [(path, words)]


LONG = [{"source": f"s3://data/{'x' * 1000}{n}"} for n in range(32)]
LARGE: dict[str, Any] = {
    "many files": (
        [{**SFT, "data": {"train": LONG}}],
        {"data": dict.fromkeys(("train", "eval", "test", "preference", "general", "refusals"), LONG)},
        "spec.data",
    ),
    "long variables": (
        [SFT],
        {"template": {"env": [{"name": f"V{n}", "value": "x" * 4096} for n in range(64)]}},
        "spec.template",
    ),
    "annotations that go with the pod": (
        [{**SFT, "template": {"annotations": {f"note-{n}": "x" * 4000 for n in range(32)}}}, MERGE],
        {},
        f"{P}[0]",
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_no_pod_can_be_told_is_refused(name: str) -> None:
    """A spec is read from an annotation, and those are bounded; the largest part is named. One machine has no bound."""
    stages, spec, path = LARGE[name]
    job = a_job(*stages, **spec)
    assert check(job) == []
    (breach,) = check(job, cluster=True)
    assert breach.path == path
    assert re.search(r"the job is \d+ KiB as JSON, and a pod can be told at most 224; \d+ of them", breach.message)


def test_a_large_job_that_a_pod_can_be_told_is_none() -> None:
    """Two thirds of the bound; and its Job's annotations are within Kubernetes' own."""
    job = a_job(SFT, data=dict.fromkeys(("train", "eval", "test", "preference", "general"), LONG))
    assert check(job, cluster=True) == []
    made = plan(job, done("prepare", "baseline"), [], NOW, cluster=True)
    assert [child.run.stage for child in made.create] == ["sft"]
    settings = PodSettings(trainer_image="t", gguf_image="g")
    annotations = batch_job(job, {}, made.create[0], settings)["spec"]["template"]["metadata"]["annotations"]
    assert 0.6 * 2**18 < sum(len(key) + len(value) for key, value in annotations.items()) < 2**18


def test_every_rule_is_tested() -> None:
    """Each rule of the list finds something in the table above, so none can be dropped or die unseen."""
    broken = [a_job(*stages, **spec).spec for stages, spec, _, _ in BROKEN.values()]
    assert [rule.__name__ for rule in RULES if not any(list(rule(spec)) for spec in broken)] == []


def test_one_column_serves_once() -> None:
    """A question that is its own answer teaches nothing: both fields that read the column are named."""
    train = [{"source": "s3://data/k.jsonl", "columns": {"prompt": "q", "completion": "q"}}]
    assert [str(e) for e in check(a_job(SFT, data={"train": train}))] == [
        f"spec.data.train[0].columns.{name}: prompt and completion are both read from `q`: give each its own column"
        for name in ("prompt", "completion")
    ]


def test_without_a_pipeline_only_addresses_are_judged() -> None:
    """Where nobody knows what the stages do, no rule speaks about them, and the others still do."""
    job = a_job(MERGE, GGUF, model={"source": "x"}, storage={"bucket": "a..b"})
    assert [e.path for e in check(job, pipeline=False)] == ["spec.model.source", "spec.storage.bucket"]


def test_breaches_come_all_at_once_in_the_order_of_the_spec() -> None:
    """Breaches of different rules stand in the order in which a reader meets the fields."""
    job = a_job(
        sft(lora={"targetModules": ["lm_head"]}),
        GGUF,
        merge(**{"from": "nope"}),
        model={"source": "x"},
        evaluation={"metrics": ["loss", "loss"]},
    )
    assert [e.path for e in check(job)] == [
        "spec.model.source",
        "spec.evaluation.metrics[1]",
        f"{P}[0].sft.lora.targetModules[0]",
        f"{P}[1].quantize",
        f"{P}[2].from",
    ]


@pytest.mark.parametrize("source", ["file:///m", "package://llm_x/m.gguf"])
def test_local_sources_are_refused_on_a_cluster_only(source: str) -> None:
    """What pods cannot reach is a mistake there and fine here."""
    job = a_job(SFT, model={"source": source}, data={"train": [{"source": "file:///t.jsonl"}]})
    assert check(job) == []
    assert [e.path for e in check(job, cluster=True)] == ["spec.model.source", "spec.data.train[0].source"]


def test_a_config_map_is_for_a_cluster_only() -> None:
    """The other way round: here there is none."""
    job = a_job(SFT, data={"train": [{"source": "configmap://rows/train.jsonl.gz"}]})
    assert check(job, cluster=True) == []
    (breach,) = check(job)
    assert breach.path == "spec.data.train[0].source"
    assert breach.message == "configmap:// is of a cluster: without one write file://"
    (nameless,) = check(a_job(SFT, data={"train": [{"source": "configmap://train.jsonl"}]}), cluster=True)
    assert "must look like configmap://name/train.jsonl" in nameless.message


ADVICE: dict[str, Any] = {
    "rate too high": (sft(training={"learningRate": 0.01}), f"{P}[0].sft.training.learningRate"),
    "rate too low": (sft(training={"learningRate": 1e-6}), f"{P}[0].sft.training.learningRate"),
    "full at the rate of lora": (
        sft(method="full", training={"learningRate": 2e-4}),
        f"{P}[0].sft.training.learningRate",
    ),
    "many epochs": (sft(training={"epochs": 6}), f"{P}[0].sft.training.epochs"),
    "large rank": (sft(lora={"r": 256}), f"{P}[0].sft.lora.r"),
    "alpha of another rank": (sft(lora={"r": 8, "alpha": 256}), f"{P}[0].sft.lora.alpha"),
    "small alpha": (sft(lora={"r": 64, "alpha": 1}), f"{P}[0].sft.lora.alpha"),
    "alpha of a plain lora, rank-stabilized": (
        sft(lora={"r": 128, "rankStabilized": True}),
        f"{P}[0].sft.lora.alpha",
    ),
    "queries and values alone": (sft(lora={"targetModules": ["q_proj", "v_proj"]}), f"{P}[0].sft.lora.targetModules"),
    "dropout against a reference": (dpo(loss="orpo", lora={"dropout": 0.1}), f"{P}[0].preference.lora.dropout"),
    "three bits without an importance matrix": (gguf("gguf", "Q8_0", "Q3_K_M"), f"{P}[0].quantize.gguf[1]"),
    "two values for a model of many": (gguf("gguf", "TQ2_0"), f"{P}[0].quantize.gguf[0]"),
    "preference first": (DPO, f"{P}[0].preference"),
    "beta of another loss": (dpo(loss="orpo", beta=2.5), f"{P}[0].preference.beta"),
    "rate of another loss": (
        dpo(loss="orpo", method="full", training={"learningRate": 1e-7}),
        f"{P}[0].preference.training.learningRate",
    ),
    "qlora on a CPU": (sft(method="qlora"), f"{P}[0].sft.method"),
    "unsloth on a CPU": (sft(training=UNSLOTH), f"{P}[0].sft.training.backend"),
}


@pytest.mark.parametrize("name", ADVICE)
def test_advice_names_its_field_and_is_no_breach(name: str) -> None:
    """What runs, but hardly as meant, is advice."""
    stage, path = ADVICE[name]
    assert [advice.path for advice in warnings(a_job(stage))] == [path]
    assert check(a_job(stage)) == []


QAT: dict[str, Any] = {
    "no file": ([sft(qat={"type": "Q4_0"}), MERGE, gguf("gguf", "Q4_1")], f"{P}[0].sft.qat.type"),
    "another model's file": (
        [sft(qat={"type": "Q4_0"}), MERGE, {**sft("other"), "from": "base"}, merge("again"), gguf("gguf", "Q4_0")],
        f"{P}[0].sft.qat.type",
    ),
    "a file with an importance matrix": (
        [sft(qat={"type": "Q4_0"}), MERGE, {"name": "gguf", "quantize": {"gguf": ["Q4_0"], "imatrix": {}}}],
        f"{P}[2].quantize.imatrix",
    ),
    "another type of few bits": (
        [sft(qat={"type": "Q3_K_M"}), MERGE, gguf("gguf", "Q3_K_M", "Q2_K")],
        f"{P}[2].quantize.gguf[1]",
    ),
    "trained on without": ([sft(qat={"type": "Q4_0"}), DPO, MERGE, gguf("gguf", "Q4_0")], f"{P}[1].preference"),
}


@pytest.mark.parametrize("name", QAT)
def test_advice_on_what_becomes_of_qat(name: str) -> None:
    """What is trained for a type is written as that, as it was rounded in training, with nothing learned in between."""
    pipeline, path = QAT[name]
    assert [advice.path for advice in warnings(a_job(*pipeline))] == [path]
    assert check(a_job(*pipeline)) == []


@pytest.mark.parametrize(
    ("pipeline", "start"),
    [
        ([SFT, MERGE, GGUF, dpo()], "merge"),
        ([sft(method="full"), GGUF, dpo()], "sft"),
        ([SFT, MERGE, GGUF, gguf("small", "Q2_K"), sft("more", lora={"r": 8})], "merge"),
        ([GGUF, sft()], "base"),
    ],
)
def test_going_on_after_ggufs_is_told_from_where(pipeline: list[dict[str, Any]], start: str) -> None:
    """The model that the stage really starts from, and the line that says so: with it there is no advice."""
    last = {**pipeline[-1], "from": start}
    (advice,) = [found for found in warnings(a_job(*pipeline)) if found.path.endswith(".from")]
    assert str(advice).endswith(f"leaves GGUF files, so this stage starts from `{start}`: write `from: {start}`")
    assert check(a_job(*pipeline[:-1], last)) == []
    assert not [found for found in warnings(a_job(*pipeline[:-1], last)) if found.path.endswith(".from")]


@pytest.mark.parametrize(
    "block",
    [
        {},
        {"training": {"learningRate": 2e-3}},
        {"training": {"learningRate": 2e-5}},
        {"training": {"epochs": 5}},
        {"lora": {"r": 128}},
        {"lora": {"r": 64, "alpha": 16}},
        {"lora": {"r": 64, "alpha": 64, "rankStabilized": True}},
        {"lora": {"dropout": 0.1, "targetModules": ["q_proj", "k_proj", "v_proj", "o_proj"]}},
        {"training": {"epochs": 9}, "validation": {"earlyStopping": {}}},
        {"training": {"epochs": 9, "maxSteps": 5}},
    ],
    ids=str,
)
def test_usual_choices_get_no_advice(block: dict[str, Any]) -> None:
    """Advice that comes every time is not read."""
    assert warnings(a_job(sft(**block), DPO, MERGE, GGUF)) == []
