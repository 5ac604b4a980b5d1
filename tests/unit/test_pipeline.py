import pytest
from tests.builders import DPO, GGUF, MERGE, SFT, a_job

from finetune_api.defaults import base_quantization
from finetune_api.pipeline import (
    ModelRef,
    block,
    data_of,
    kind,
    lora_ggufs,
    merged_adapters,
    model_after,
    model_before,
    order,
    parent,
    targets,
    waits_for,
)
from finetune_api.types import AdapterSource, Merge, Quantization

BRANCHES = a_job(
    SFT,
    {"name": "ready", "merge": {}},
    {"name": "dpo", "preference": {}, "from": "sft"},
    {"name": "merged", "merge": {}},
    {"name": "gguf", "quantize": {"gguf": ["Q8_0", "F16"]}},
    {"name": "alone", "sft": {"method": "full"}, "from": "base"},
).spec


def test_the_stage_before_is_the_parent_unless_from_says_otherwise() -> None:
    """The first stage starts from the base model."""
    assert {s.name: parent(BRANCHES, s.name) for s in BRANCHES.pipeline} == {
        "sft": "base",
        "ready": "sft",
        "dpo": "sft",
        "merged": "dpo",
        "gguf": "merged",
        "alone": "base",
    }


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("base", ModelRef("base")),
        ("sft", ModelRef("base", "sft")),
        ("ready", ModelRef("ready")),
        ("dpo", ModelRef("base", "dpo")),
        ("merged", ModelRef("merged")),
        ("gguf", ModelRef("merged")),
        ("alone", ModelRef("alone")),
    ],
)
def test_what_model_a_stage_leaves(name: str, model: ModelRef) -> None:
    """An adapter that is trained on replaces the one before; merging and full training leave whole weights."""
    assert model_after(BRANCHES, name) == model


def test_what_model_a_stage_starts_from() -> None:
    """The model after its parent."""
    assert model_before(BRANCHES, "merged") == ModelRef("base", "dpo")


def test_every_stage_comes_after_all_that_it_waits_for() -> None:
    """Derived stages included; baseline is before all training, evaluate and report after everything."""
    names = order(BRANCHES)
    assert names == ["prepare", "baseline", "sft", "ready", "dpo", "merged", "gguf", "alone", "evaluate", "report"]
    for name in names:
        assert all(names.index(earlier) < names.index(name) for earlier in waits_for(BRANCHES, name))
    assert waits_for(BRANCHES, "gguf") == ["prepare", "baseline", "sft", "dpo", "merged"]
    assert waits_for(BRANCHES, "alone") == ["prepare", "baseline"]


REWARDED = a_job(
    SFT,
    {"name": "judge", "reward": {}, "from": "base"},
    {"name": "whole", "reward": {"method": "full"}},
    {"name": "rl", "rl": {"rewards": [{"stage": "judge"}, {"stage": "whole"}, {"builtin": "length"}]}},
    MERGE,
).spec


def test_a_reward_model_is_a_branch() -> None:
    """Nothing starts from it by itself, but who is rewarded by it waits for it and for all that it waits for."""
    assert [parent(REWARDED, s.name) for s in REWARDED.pipeline] == ["base", "base", "sft", "sft", "rl"]
    assert waits_for(REWARDED, "judge") == ["prepare", "baseline"]
    assert waits_for(REWARDED, "rl") == ["prepare", "baseline", "sft", "judge", "whole"]
    assert waits_for(REWARDED, "merge") == ["prepare", "baseline", "sft", "judge", "whole", "rl"]
    assert model_after(REWARDED, "judge") == ModelRef("base", "judge")
    assert model_after(REWARDED, "whole") == ModelRef("whole")
    assert model_before(REWARDED, "rl") == ModelRef("base", "sft")


def test_reward_models_are_not_scored() -> None:
    """They answer nothing; the adapter that one of them started from is scored if nothing else goes on from it."""
    assert [t.name for t in targets(REWARDED)] == ["merge"]
    assert [t.name for t in targets(a_job(SFT, {"name": "judge", "reward": {}}).spec)] == ["sft"]


SEVERAL = a_job(
    SFT,
    {"name": "other", "sft": {"method": "qlora"}, "from": "base"},
    {
        "name": "both",
        "merge": {"adapters": [{"stage": "sft"}, {"stage": "other", "checkpoint": 4}, {"uri": "s3://bucket/x/y"}]},
    },
    {"name": "gguf", "quantize": {"gguf": ["Q8_0"], "loraGGUF": True}},
    {"name": "alone", "merge": {}, "from": "other"},
    {"name": "small", "quantize": {"gguf": ["Q8_0"], "loraGGUF": True}},
).spec


def test_a_merge_waits_for_the_adapters_that_it_names() -> None:
    """Whatever comes before it; they are not scored, since their merge is."""
    assert waits_for(SEVERAL, "both") == ["prepare", "baseline", "sft", "other"]
    assert [adapter.stage for adapter in merged_adapters(SEVERAL, "both")] == ["sft", "other", None]
    assert merged_adapters(SEVERAL, "alone") == [AdapterSource(stage="other")]
    assert [t.name for t in targets(SEVERAL)] == ["both", "gguf/Q8_0", "alone", "small/Q8_0"]


def test_adapters_as_ggufs_are_told_apart() -> None:
    """One alone is the merged model's; of several each has its stage's name, and its checkpoint's."""
    assert list(lora_ggufs(SEVERAL, "gguf")) == ["LoRA-sft", "LoRA-other-4"]
    assert list(lora_ggufs(SEVERAL, "small")) == ["LoRA"]
    assert lora_ggufs(BRANCHES, "gguf") == {}


def test_several_adapters_share_a_quantized_base_only_if_all_were_trained_on_it() -> None:
    """One of qlora alone has its own; beside one of lora, or of another job, there is none."""
    assert base_quantization(SEVERAL, "both") is None
    assert base_quantization(SEVERAL, "alone") == Quantization()
    both = {"adapters": [{"stage": "a"}, {"stage": "b"}]}
    qlora = [{"name": n, "from": "base", "sft": {"method": "qlora", "quantization": {"type": "fp4"}}} for n in "ab"]
    assert base_quantization(a_job(*qlora, {"name": "m", "merge": both}).spec, "m") == Quantization(type="fp4")


def test_without_evaluation_only_prepare_is_added() -> None:
    """``skip`` takes away baseline, evaluate and report, and nothing waits for them."""
    spec = a_job(SFT, MERGE, evaluation={"skip": True}).spec
    assert order(spec) == ["prepare", "sft", "merge"]
    assert waits_for(spec, "sft") == ["prepare"]


def test_what_is_scored() -> None:
    """Merged and full models, every GGUF, and adapters that nothing goes on from."""
    assert [t.name for t in targets(BRANCHES)] == ["ready", "merged", "gguf/Q8_0", "gguf/F16", "alone"]
    assert [t.name for t in targets(a_job(SFT, DPO).spec)] == ["dpo"]


def test_a_stages_data_overrides_role_by_role() -> None:
    """Roles that a stage does not name come from the job."""
    spec = a_job({"name": "sft", "sft": {}, "data": {"train": [{"source": "s3://data/other.jsonl"}]}}).spec
    data = data_of(spec, "sft")
    assert [s.source for s in data.train] == ["s3://data/other.jsonl"]
    assert [s.source for s in data.preference] == ["s3://data/pairs.jsonl"]


def test_kinds_and_blocks() -> None:
    """A derived stage is its own kind; a stage of the pipeline is its block's."""
    spec = a_job(SFT, MERGE, GGUF).spec
    assert [kind(spec, name) for name in ("prepare", "sft", "gguf")] == ["prepare", "sft", "quantize"]
    assert isinstance(block(spec.pipeline[1]), Merge)


def test_a_broken_pipeline_raises_instead_of_looping() -> None:
    """Circles, missing parents and stages without a block are ValueErrors, never endless."""
    circle = a_job({**SFT, "from": "merge"}, MERGE).spec
    missing = a_job({**SFT, "from": "nope"}).spec
    empty = a_job({"name": "x"}).spec
    for call in (
        lambda: order(circle),
        lambda: model_after(circle, "sft"),
        lambda: waits_for(circle, "sft"),
        lambda: order(missing),
        lambda: model_after(missing, "sft"),
        lambda: model_after(empty, "x"),
    ):
        with pytest.raises(ValueError, match=r"start|no stage|blocks"):
            call()
