from typing import Any

import pytest

from finetune_api.stage import JobRef
from finetune_api.types import FineTuneJobSpec
from finetune_jobs.run.digest import data_set, digest_of, inputs_of, reads

JOB = JobRef(namespace="default", name="bot", uid="u1")
PIPELINE: list[dict[str, Any]] = [
    {"name": "sft", "sft": {}},
    {"name": "dpo", "preference": {}},
    {"name": "merge", "merge": {}},
    {"name": "gguf", "quantize": {"gguf": ["Q4_K_M"]}},
]
PREPARED = {
    "base": "b",
    "data/default/train": "t",
    "data/default/eval": "e",
    "data/default/test": "x",
    "data/general": "g",
    "data/refusals": "r",
    "datacard": "c",
}
OUTPUTS = {
    "prepare": PREPARED,
    "baseline": {"answers": "a0", "scores": "s0"},
    "sft": {"adapter": "a1", "log": "l1"},
    "dpo": {"adapter": "a2", "log": "l2"},
    "merge": {"model": "m", "log": "l3"},
    "gguf": {"gguf/Q4_K_M": "q", "log": "l4"},
}


def spec(**changes: Any) -> FineTuneJobSpec:
    """The usual job with some top-level fields of its spec replaced."""
    written = {
        "model": {"source": "hf://org/name"},
        "data": {"train": [{"source": "file:///train.jsonl"}], "preference": [{"source": "file:///p.jsonl"}]},
        "storage": {"bucket": "finetune"},
        "pipeline": PIPELINE,
        **changes,
    }
    return FineTuneJobSpec.model_validate(written, strict=False)


def changed(index: int, **fields: Any) -> list[dict[str, Any]]:
    """The pipeline with fields of one stage replaced."""
    return [{**stage, **fields} if i == index else stage for i, stage in enumerate(PIPELINE)]


def digests(s: FineTuneJobSpec) -> dict[str, str]:
    """Every stage's digest, all inputs being equal."""
    names = ["baseline", *(stage.name for stage in s.pipeline), "evaluate", "report"]
    return {name: digest_of(s, JOB, name, inputs_of(s, name, OUTPUTS)) for name in names}


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        pytest.param({"storage": {"bucket": "other", "prefix": "x"}}, set(), id="a moved bucket reruns nothing"),
        pytest.param({"suspend": True}, set(), id="suspend reruns nothing"),
        pytest.param(
            {"pipeline": changed(0, resources={"gpus": 8, "nodes": 2}, retries=9)},
            {"report"},
            id="resources only speed things up",
        ),
        pytest.param(
            {"pipeline": changed(0, sft={"lora": {"r": 8}})}, {"sft", "report"}, id="a changed block reruns its stage"
        ),
        pytest.param(
            {"pipeline": changed(0, sft={"checkpoint": {"keep": 9, "resumeFrom": 200}})},
            {"report"},
            id="resumeFrom meets the checkpoints of the run it means",
        ),
        pytest.param(
            {"pipeline": changed(0, sft={"training": {"backend": "unsloth"}})},
            {"report"},
            id="other kernels change no more than another GPU, and any may have to do",
        ),
        pytest.param({"pipeline": changed(2, merge={"dtype": "float16"})}, {"merge", "report"}, id="merge's block"),
        pytest.param(
            {"evaluation": {"maxRows": 7}}, {"baseline", "evaluate", "report"}, id="evaluation does not retrain"
        ),
        pytest.param(
            {"evaluation": {"gates": {"minScore": {"tokenF1": 0.5}}}}, {"report"}, id="gates are judged in the report"
        ),
        pytest.param(
            {"evaluation": {"gates": {"maxGGUFDivergence": {"Q4_K_M": 0.01}}}},
            {"gguf", "report"},
            id="a stricter bound tests the GGUF anew",
        ),
        pytest.param(
            {"seed": 7},
            {"baseline", "sft", "dpo", "merge", "gguf", "evaluate", "report"},
            id="the seed changes everything",
        ),
    ],
)
def test_only_what_depends_on_a_change_gets_a_new_digest(change: dict[str, Any], rerun: set[str]) -> None:
    """Equal digests mean that the committed result is used again."""
    before, after = digests(spec()), digests(spec(**change))
    assert {name for name in before if before[name] != after[name]} == rerun


def test_new_content_of_an_input_changes_exactly_its_readers() -> None:
    """Other training rows train again; the baseline, which did not read them, stands."""
    s = spec()
    other = {**OUTPUTS, "prepare": {**PREPARED, "data/default/train": "t2"}}
    assert inputs_of(s, "sft", other) != inputs_of(s, "sft", OUTPUTS)
    for name in ("baseline", "dpo", "merge", "gguf", "evaluate"):
        assert inputs_of(s, name, other) == inputs_of(s, name, OUTPUTS), name


def test_names_of_earlier_stages_do_not_count() -> None:
    """Renaming the stage that made an adapter does not merge it again."""
    s = spec()
    renamed = spec(pipeline=[{**PIPELINE[0], "name": "first"}, {**PIPELINE[1]}, *PIPELINE[2:]])
    outputs = {**OUTPUTS, "first": OUTPUTS["sft"]}
    assert digest_of(s, JOB, "dpo", inputs_of(s, "dpo", OUTPUTS)) == digest_of(
        renamed, JOB, "dpo", inputs_of(renamed, "dpo", outputs)
    )


def test_a_stage_with_data_of_its_own_reads_its_own_set() -> None:
    """An override of one role gives the stage a frozen set under its own name; the locked test rows stay the job's."""
    s = spec(pipeline=changed(0, data={"train": [{"source": "file:///other.jsonl"}]}))
    assert data_set(s, "sft") == "sft"
    assert data_set(s, "dpo") == "default"
    assert ("prepare", "data/sft/train") in reads(s, "sft")
    assert ("prepare", "data/default/test") in reads(s, "gguf")


def test_evaluate_reads_every_target() -> None:
    """Merged model, GGUFs and the baseline's answers; not the adapters that were merged."""
    assert {pair for pair in reads(spec(), "evaluate") if pair[0] not in ("prepare", "baseline")} == {
        ("merge", "model"),
        ("gguf", "gguf/Q4_K_M"),
    }


REWARDED = [
    {"name": "judge", "reward": {}, "from": "base"},
    {"name": "whole", "reward": {"method": "full"}},
    {"name": "rl", "rl": {"rewards": [{"stage": "judge", "weight": 2}, {"stage": "whole"}]}},
]


def test_rl_reads_its_reward_models() -> None:
    """An adapter with the weights that it belongs to, or a whole model; prompts, and no pairs."""
    assert set(reads(spec(pipeline=REWARDED), "rl")) == {
        ("prepare", "base"),
        ("judge", "reward"),
        ("whole", "reward"),
        ("prepare", "data/default/prompts"),
        ("prepare", "data/default/promptsEval"),
    }


def test_two_reward_models_that_change_places_are_another_reward() -> None:
    """Their weights in the sum go by their names, so for once the names of earlier stages count."""
    s = spec(pipeline=REWARDED)
    one = {"prepare": PREPARED, "judge": {"reward": "a"}, "whole": {"reward": "b"}}
    other = {"prepare": PREPARED, "judge": {"reward": "b"}, "whole": {"reward": "a"}}
    assert digest_of(s, JOB, "rl", inputs_of(s, "rl", one)) != digest_of(s, JOB, "rl", inputs_of(s, "rl", other))


SEVERAL = [
    {"name": "a", "sft": {}},
    {"name": "b", "sft": {}, "from": "base"},
    {
        "name": "merge",
        "merge": {
            "adapters": [{"stage": "a", "weight": 2}, {"stage": "b"}, {"uri": "s3://bucket/x/y"}],
            "combination": "ties",
        },
    },
    {"name": "gguf", "quantize": {"gguf": ["Q8_0"], "loraGGUF": True}},
]
MADE = {
    "prepare": {**PREPARED, "adapters/merge/2": "z"},
    "a": {"adapter": "1"},
    "b": {"adapter": "2"},
    "merge": {"model": "m"},
}


def test_a_merge_reads_the_adapters_that_it_names() -> None:
    """Each stage's, and those of elsewhere from ``prepare``; so does a quantize stage that writes them as GGUFs."""
    s = spec(pipeline=SEVERAL)
    read = {("prepare", "base"), ("a", "adapter"), ("b", "adapter"), ("prepare", "adapters/merge/2")}
    rows = {("prepare", "data/default/eval"), ("prepare", "data/default/test")}
    assert set(reads(s, "merge")) == read | rows
    assert set(reads(s, "gguf")) == read | {("merge", "model"), ("prepare", "data/default/test")}


@pytest.mark.parametrize(
    "change",
    [
        {"adapters": [{"stage": "a"}, {"stage": "b"}, {"uri": "s3://bucket/x/y"}]},
        {"adapters": [{"stage": "a", "weight": 2, "checkpoint": "best"}, {"stage": "b"}, {"uri": "s3://bucket/x/y"}]},
        {"combination": "dareTies"},
        {"density": 0.5},
    ],
    ids=["weight", "checkpoint", "combination", "density"],
)
def test_how_adapters_are_combined_counts(change: dict[str, Any]) -> None:
    """A weight, a checkpoint, the way, and its settings each make another model."""
    other = [*SEVERAL[:2], {"name": "merge", "merge": {**SEVERAL[2]["merge"], **change}}, SEVERAL[3]]
    one, two = spec(pipeline=SEVERAL), spec(pipeline=other)
    inputs = inputs_of(one, "merge", MADE)
    assert inputs == inputs_of(two, "merge", MADE)
    assert digest_of(one, JOB, "merge", inputs) != digest_of(two, JOB, "merge", inputs)


@pytest.mark.parametrize("stage", ["merge", "gguf"])
def test_adapters_that_change_places_are_another_model(stage: str) -> None:
    """Weights and files go by the stages' names, so those count; so does the content of one from elsewhere."""
    s = spec(pipeline=SEVERAL)
    swapped = {**MADE, "a": MADE["b"], "b": MADE["a"]}
    elsewhere = {**MADE, "prepare": {**PREPARED, "adapters/merge/2": "other"}}
    digests = {digest_of(s, JOB, stage, inputs_of(s, stage, made)) for made in (MADE, swapped, elsewhere)}
    assert len(digests) == 3
