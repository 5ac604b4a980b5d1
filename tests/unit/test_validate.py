from typing import Any

import pytest
from pydantic import BaseModel
from tests.builders import broken

from finetune_api import types
from finetune_api.types import IMATRIX_TYPES, FineTuneJob
from finetune_api.validate import PATTERNS, FieldError, InvalidSpec, parse, suggest

A_STAGE = "spec.pipeline[0]"


def errors_of(obj: object) -> list[str]:
    """What parsing it says."""
    with pytest.raises(InvalidSpec) as caught:
        parse(obj)
    return [str(error) for error in caught.value.errors]


TRAINING = f"{A_STAGE}.sft.training"
CASES = [
    ("spec.storage.bucket", None, "is required"),
    (f"{A_STAGE}.sft.lora.r", 0, "must be at least 1, got 0"),
    (f"{A_STAGE}.sft.lora.r", 2000, "must be at most 1024, got 2000"),
    (f"{A_STAGE}.sft.lora.r", 1.5, "must be a whole number, got 1.5"),
    (f"{A_STAGE}.sft.lora.r", True, "must be a whole number, got true"),
    (f"{A_STAGE}.sft.lora.r", "16", 'must be a whole number, got the text "16"; write it without quotes'),
    (f"{A_STAGE}.sft.lora.r", 10**30, f"must be at most 1024, got {10**30}"),
    (f"{A_STAGE}.sft.lora.alpha", 0, "must be more than 0, got 0"),
    (f"{A_STAGE}.sft.lora.dropout", 1, "must be less than 1, got 1"),
    (f"{A_STAGE}.sft.lora.targetModules", [], "must not be empty, got a list of 0"),
    (f"{A_STAGE}.sft.lora.targetModules", "q_proj", 'must be a list, got the text "q_proj"; write [q_proj]'),
    (f"{A_STAGE}.sft.lora.targetModules", ["x"] * 65, "must have at most 64 entries, got a list of 65"),
    (f"{TRAINING}.learningRate", "fast", 'must be a number, got the text "fast"'),
    (f"{TRAINING}.learningRate", "1e-5", 'must be a number, got the text "1e-5"; write it without quotes'),
    (f"{TRAINING}.learningRate", float("nan"), 'must be a number, got the text "nan"'),
    (
        f"{TRAINING}.microBatchSize",
        "Auto",
        'must be a whole number from 1 to 65536, or auto, got the text "Auto"; did you mean `auto`?',
    ),
    (f"{TRAINING}.microBatchSize", 0, "must be a whole number from 1 to 65536, or auto, got 0"),
    (f"{TRAINING}.microBatchSize", {"size": 3}, "must be a whole number from 1 to 65536, or auto, got a mapping"),
    (f"{TRAINING}.packing", "yes", 'must be true or false, or auto, got the text "yes"'),
    (
        f"{TRAINING}.scheduler",
        "cosin",
        'must be cosine, linear, constant or constantWithWarmup, got the text "cosin"; did you mean `cosine`?',
    ),
    (
        f"{A_STAGE}.sft.method",
        "QLoRA",
        "must be lora, qlora, full, prefixTuning, promptTuning, ia3 or bottleneck, "
        'got the text "QLoRA"; did you mean `qlora`?',
    ),
    (
        f"{A_STAGE}.sft.checkpoint.resumeFrom",
        "last",
        'must be a whole number from 1 to 10000000, or auto or none, got the text "last"',
    ),
    (f"{A_STAGE}.sft.checkpoint.best", "true", 'must be true or false, got the text "true"'),
    (f"{A_STAGE}.name", "SFT", f'must be {PATTERNS["^[a-z]([-a-z0-9]*[a-z0-9])?$"]}, got the text "SFT"'),
    (f"{A_STAGE}.name", "", "must not be empty, got an empty text"),
    (f"{A_STAGE}.name", 12, "must be text, got 12; put it in quotes"),
    (f"{A_STAGE}.sft", [], "must be a mapping, got a list of 0"),
    (A_STAGE, "sft", 'must be a mapping, got the text "sft"'),
    ("spec.pipeline", [], "must not be empty, got a list of 0"),
    ("spec.pipeline", {"name": "sft"}, "must be a list, got a mapping; begin the entry with `- `"),
    ("spec.evaluation.gates.minScore.exactMatch", 2, "must be at most 1, got 2"),
    ("metadata.name", "x" * 41, f'must have at most 40 characters, got the text "{"x" * 41}"'),
    (
        "apiVersion",
        "finetune.dev/v1",
        'must be finetune.dev/v1alpha1, got the text "finetune.dev/v1"; did you mean `finetune.dev/v1alpha1`?',
    ),
    ("kind", "Job", 'must be FineTuneJob, got the text "Job"'),
]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    CASES,
    ids=[f"{path.rpartition('.')[2]}={str(value)[:20]}" for path, value, _ in CASES],
)
def test_one_mistake_gives_one_message_in_our_words(path: str, value: Any, words: str) -> None:
    """Whatever is wrong with a value, there is exactly one message: its path, what it must be, what it is."""
    assert errors_of(broken(path, value)) == [f"{path}: {words}"]


UNKNOWN = [
    (f"{A_STAGE}.sft.lora.targetModuls", "did you mean `targetModules`?"),
    (f"{A_STAGE}.sft.lora.target_modules", "did you mean `targetModules`?"),
    (f"{A_STAGE}.sft.epochs", "it belongs in `training`"),
    (f"{A_STAGE}.learningRate", "it belongs in `sft.training`"),
    (f"{A_STAGE}.sft.retries", "it belongs in `spec.pipeline[0]`"),
    (f"{A_STAGE}.sfft", "did you mean `sft`?"),
    (
        f"{A_STAGE}.sft.lora.zzz",
        "known: r, alpha, dropout, targetModules, bias, variant, rankStabilized, modulesToSave",
    ),
    ("spec.resources", "it belongs in `evaluation`"),
    ("seed", "it belongs in `spec`"),
]


@pytest.mark.parametrize(("path", "hint"), UNKNOWN, ids=[path for path, _ in UNKNOWN])
def test_an_unknown_field_is_refused_with_the_field_that_was_meant(path: str, hint: str) -> None:
    """A misspelt or misplaced field names the right one, or where it belongs; nothing is silently ignored."""
    assert errors_of(broken(path, 1)) == [f"{path}: unknown field; {hint}"]


def test_every_mistake_is_told_at_once() -> None:
    """Mistakes in different parts do not hide each other, and a union member that does not fit is told once."""
    job = broken(f"{A_STAGE}.sft.lora", {"r": 0, "rr": 1})
    job["spec"]["storage"] = {}
    job["spec"]["pipeline"][0]["sft"]["training"] = {"microBatchSize": "x", "epochs": -1}
    job["spec"]["pipeline"][2]["quantize"]["gguf"] = ["Q4KM"]
    assert sorted(error.partition(": ")[0] for error in errors_of(job)) == [
        "spec.pipeline[0].sft.lora.r",
        "spec.pipeline[0].sft.lora.rr",
        "spec.pipeline[0].sft.training.epochs",
        "spec.pipeline[0].sft.training.microBatchSize",
        "spec.pipeline[2].quantize.gguf[0]",
        "spec.storage.bucket",
    ]


@pytest.mark.parametrize("obj", [None, [], "text", 5], ids=str)
def test_what_is_no_mapping_is_no_job(obj: object) -> None:
    """A file that holds something else than a mapping is refused in a sentence."""
    (message,) = errors_of(obj)
    assert message.startswith("must be a FineTuneJob, got ")


def test_null_is_absent_and_whole_floats_are_whole_numbers() -> None:
    """As the API server has it: null fields are pruned, 16.0 is 16, server-side fields pass unread."""
    job = broken(f"{A_STAGE}.sft", {"lora": {"r": 8.0, "alpha": None}, "training": None})
    job["status"] = {"summary": "x"}
    job["metadata"] |= {"creationTimestamp": None, "resourceVersion": "7", "labels": {"a": "b"}}
    parsed = parse(job)
    assert parsed.spec.pipeline[0].sft is not None
    assert parsed.spec.pipeline[0].sft.lora is not None
    assert parsed.spec.pipeline[0].sft.lora.r == 8
    assert isinstance(parsed.spec.pipeline[0].sft.lora.r, int)


def test_python_names_of_fields_are_not_yaml_names() -> None:
    """``learning_rate`` would be refused by the cluster, so it is refused here."""
    assert errors_of(broken(f"{TRAINING}.learning_rate", 1e-4)) == [
        f"{TRAINING}.learning_rate: unknown field; did you mean `learningRate`?"
    ]


def test_the_rest_of_a_broken_job_can_still_be_judged() -> None:
    """Without its wrong fields the job stands, unless they say what a stage does."""
    with pytest.raises(InvalidSpec) as caught:
        parse(broken(f"{A_STAGE}.sft.lora", {"r": 0, "alpha": 3, "a.b": 1}))
    assert caught.value.rest is not None
    block = caught.value.rest.spec.pipeline[0].sft
    assert block is not None
    assert block.lora is not None
    assert (block.lora.r, block.lora.alpha) == (16, 3.0)
    for path in (f"{A_STAGE}.sft.method", f"{A_STAGE}.from", f"{A_STAGE}.sft", "spec.pipeline"):
        with pytest.raises(InvalidSpec) as caught:
            parse(broken(path, 0))
        assert caught.value.rest is not None
        assert not caught.value.whole


@pytest.mark.parametrize(
    "path",
    [
        "apiVersion",
        "metadata.name",
        "spec.storage.bucket",
        "spec.model.source",
        "spec.data.train[0].source",
        f"{A_STAGE}.name",
        f"{A_STAGE}.sfft",
        "spec.pipeline[2].quantize.gguf",
    ],
)
@pytest.mark.parametrize("value", [None, 0], ids=["missing", "wrong"])
def test_a_wrong_required_field_hides_no_other_mistake(path: str, value: int | None) -> None:
    """Something harmless stands in for it, so that the rest of the job is judged with its pipeline."""
    job = broken(path, value)
    job["spec"]["pipeline"][1]["retries"] = "many"  # there is always something wrong
    with pytest.raises(InvalidSpec) as caught:
        parse(job)
    assert caught.value.whole
    assert caught.value.rest is not None
    assert len(caught.value.rest.spec.pipeline) == 3


def test_what_starts_from_a_stage_without_a_name_still_does() -> None:
    """A stage whose name is wrong gets one that holds, and whoever starts from it follows."""
    job = broken(f"{A_STAGE}.name", "S")
    job["spec"]["pipeline"][1]["from"] = "S"
    with pytest.raises(InvalidSpec) as caught:
        parse(job)
    assert caught.value.rest is not None
    assert [stage.name for stage in caught.value.rest.spec.pipeline][:2] == ["stage-0", "merge"]
    assert caught.value.rest.spec.pipeline[1].from_ == "stage-0"


@pytest.mark.parametrize(
    "path",
    [
        f"{A_STAGE}.sft.training.reportTo",
    ],
)
def test_a_field_of_a_later_version_is_told_as_such(path: str) -> None:
    """Not as a slip of the pen, and not with a field that was never meant."""
    job = broken(path, 1)
    if ".quantization." in path:
        job["spec"]["pipeline"][0]["sft"]["method"] = "qlora"
    assert errors_of(job) == [f"{path}: unknown field; it comes in a later version: leave it out"]


def test_a_message_is_one_line() -> None:
    """Whatever control characters a value holds."""
    assert errors_of(broken("metadata.name", "a\nb")) == [
        f'metadata.name: must be {PATTERNS["^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"]}, got the text "a\\nb"'
    ]


def test_list_entries_are_removed_from_the_back() -> None:
    """Two wrong entries of a list leave exactly the right ones."""
    job = broken("spec.pipeline[2].quantize.gguf", ["Q3", "Q8_0", "Q5", "Q4_K_M"])
    with pytest.raises(InvalidSpec) as caught:
        parse(job)
    assert caught.value.rest is not None
    quantize = caught.value.rest.spec.pipeline[2].quantize
    assert quantize is not None
    assert [str(name) for name in quantize.gguf] == ["Q8_0", "Q4_K_M"]


def test_unreadable_types_ask_for_no_rows() -> None:
    """Where no type is left, all are assumed but those that are measured on train rows: no mistake of ours is added."""
    with pytest.raises(InvalidSpec) as caught:
        parse(broken("spec.pipeline[2].quantize.gguf", ["Q3"]))
    assert caught.value.rest is not None
    quantize = caught.value.rest.spec.pipeline[2].quantize
    assert quantize is not None
    assert quantize.gguf
    assert not IMATRIX_TYPES.intersection(quantize.gguf)


def _nodes(schema: Any) -> list[dict[str, Any]]:
    if isinstance(schema, dict):
        return [schema, *(node for value in schema.values() for node in _nodes(value))]
    return [node for value in schema for node in _nodes(value)] if isinstance(schema, list) else []


def test_every_pattern_of_the_api_has_words() -> None:
    """A regular expression is never shown to a user."""
    schema = FineTuneJob.model_json_schema(by_alias=True)
    patterns = {node["pattern"] for node in _nodes(schema) if isinstance(node.get("pattern"), str)}
    assert patterns
    assert patterns == set(PATTERNS)


@pytest.mark.parametrize(
    "value", [{"no": "such"}, "no\nsuch thing", [[]], -1e300], ids=["mapping", "text", "list", "number"]
)
@pytest.mark.parametrize(
    ("model", "path"),
    [(types.Training, TRAINING), (types.Lora, f"{A_STAGE}.sft.lora"), (types.Checkpoint, f"{A_STAGE}.sft.checkpoint")],
    ids=["training", "lora", "checkpoint"],
)
def test_every_field_answers_a_wrong_value_in_our_words(model: type[BaseModel], path: str, value: Any) -> None:
    """Whatever stands in whichever field, one message about that field comes, and it is not pydantic's."""
    for field in model.model_fields.values():
        messages = errors_of(broken(f"{path}.{field.alias}", value))
        assert messages
        for message in messages:
            place, _, words = message.partition(": ")
            assert place.startswith(f"{path}.{field.alias}")
            assert words.startswith(("must ", "unknown field"))


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("mrege", ["sft", "merge"], "; did you mean `merge`?"),
        ("zzz", ["sft", "merge"], "; known: sft, merge"),
        ("zzz", [], ""),
        ("zzz", [f"name{n}" for n in range(30)], ""),
    ],
    ids=["near", "few", "none", "many"],
)
def test_suggestions(word: str, known: list[str], hint: str) -> None:
    """The nearest known word, or the few that there are."""
    assert suggest(word, known) == hint


def test_a_field_error_reads_as_path_and_message() -> None:
    """The form that users see."""
    assert str(FieldError("spec.seed", "is required")) == "spec.seed: is required"
    assert str(FieldError("", "line 3, column 1: a tab")) == "line 3, column 1: a tab"
