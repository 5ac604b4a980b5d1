"""Which files a name means: artifacts, stages, folders, and what happens when two stages have the same."""

import pytest

from finetune_api.stage import Artifact, File, JobRef, Manifest
from finetune_api.types import FineTuneJobSpec
from finetune_cli.errors import CommandError
from finetune_cli.results import available, over_base, select, tuned

JOB = JobRef(namespace="default", name="bot", uid="u")
SPEC = FineTuneJobSpec.model_validate(
    {
        "model": {"source": "hf://a/b"},
        "data": {},
        "storage": {"bucket": "finetune"},
        "pipeline": [
            {"name": "sft", "sft": {}},
            {"name": "dpo", "preference": {}},
            {"name": "gguf", "quantize": {"gguf": ["Q8_0"]}},
            {"name": "small", "from": "dpo", "quantize": {"gguf": ["Q4_K_M"]}},
        ],
    },
    strict=False,
)


def manifest(stage: str, paths: list[str], artifacts: dict[str, str] | None = None) -> Manifest:
    """A committed result with these files, some of them artifacts."""
    files = [File(path=p, key=f"k/{stage}/{p}", size_bytes=1, sha256="0" * 64) for p in paths]
    named = [
        Artifact(stage=stage, name=name, uri=f"s3://finetune/k/{stage}/{path}", size_bytes=1, sha256="0" * 64)
        for name, path in (artifacts or {}).items()
    ]
    return Manifest(
        job=JOB,
        stage=stage,
        attempt=1,
        digest=stage,
        inputs={},
        outputs={},
        files=files,
        artifacts=named,
        figures={},
        started="",
        finished="",
    )


GGUF = manifest(
    "gguf", ["bot-Q8_0.gguf", "Modelfile", "quantize.json"], {"Q8_0": "bot-Q8_0.gguf", "Modelfile": "Modelfile"}
)
ALL = [
    manifest("prepare", ["base.json", "model/config.json"]),
    manifest("sft", ["adapter/adapter_config.json", "training.json"]),
    manifest("dpo", ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "training.json"]),
    GGUF,
    manifest(
        "report",
        ["report.json", "index.html", "evidence/sft.json"],
        {"report.json": "report.json", "index.html": "index.html"},
    ),
]
SMALL = manifest("small", ["bot-Q4_K_M.gguf", "Modelfile"], {"Q4_K_M": "bot-Q4_K_M.gguf", "Modelfile": "Modelfile"})


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ["bot-Q8_0.gguf", "Modelfile"]),
        (["Q8_0"], ["bot-Q8_0.gguf"]),
        (["gguf/Q8_0"], ["bot-Q8_0.gguf"]),
        (["gguf"], ["gguf/bot-Q8_0.gguf", "gguf/Modelfile", "gguf/quantize.json"]),
        (["adapter"], ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]),
        (["sft/adapter"], ["adapter/adapter_config.json"]),
        (["sft/training.json"], ["training.json"]),
        (["model"], ["model/config.json"]),
        (["report"], ["report/report.json", "report/index.html", "report/evidence/sft.json"]),
        (["evidence"], ["evidence/sft.json"]),
        (["index.html", "index.html"], ["index.html"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_select(names: list[str], expected: list[str]) -> None:
    """A name means what its user sees in `get`, the last stage first; folders keep their name."""
    assert [wanted.path for wanted in select(SPEC, ALL, names)] == expected


def test_files_of_one_name_go_into_folders() -> None:
    """Two Modelfiles do not overwrite each other, while names that are unique stay where they are."""
    paths = [wanted.path for wanted in select(SPEC, [*ALL, SMALL], [])]
    assert paths == ["bot-Q8_0.gguf", "gguf/Modelfile", "bot-Q4_K_M.gguf", "small/Modelfile"]


def test_same_folder_of_two_stages() -> None:
    """Two adapters asked for at once are kept apart."""
    paths = [wanted.path for wanted in select(SPEC, ALL, ["sft/adapter", "dpo/adapter"])]
    assert paths == [
        "sft/adapter/adapter_config.json",
        "dpo/adapter/adapter_config.json",
        "dpo/adapter/adapter_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Q8", "did you mean"),
        ("adaptor", "did you mean"),
        ("zzz", "there is: prepare/base.json"),
        ("sft/zzz", "no artifact"),
    ],
)
def test_unknown_names_are_told_what_there_is(name: str, hint: str) -> None:
    """A name that means nothing is a mistake of the user's, exit code 64, with the nearest or all names."""
    with pytest.raises(CommandError, match=hint) as caught:
        select(SPEC, ALL, [name])
    assert caught.value.code == 64


def test_no_gguf_yet() -> None:
    """Without a GGUF the default finds nothing, and says what there is."""
    with pytest.raises(CommandError, match=r"no GGUF yet; there is: prepare/base\.json, prepare/model"):
        select(SPEC, ALL[:1], [])


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("lora", r"makes no GGUF; pull by name what there is: tuned/adapter"),
        (
            "promptTuning",
            r"promptTuning changes no weights, and tuned/adapter runs on its base with transformers and PEFT",
        ),
        ("bottleneck", r"runs on its base with transformers and `finetune_jobs\.tuned`; pull by name what there is"),
    ],
)
def test_without_a_quantize_stage_the_words_say_what_runs_the_result(method: str, words: str) -> None:
    """An adapter of a method that no GGUF can hold is of use all the same."""
    content = {
        **SPEC.model_dump(mode="json", by_alias=True),
        "pipeline": [{"name": "tuned", "sft": {"method": method}}],
    }
    spec = FineTuneJobSpec.model_validate(content, strict=False)
    with pytest.raises(CommandError, match=words):
        select(spec, [manifest("tuned", ["adapter/adapter_config.json"])], [])


def test_available_names_mean_themselves() -> None:
    """Every name that is offered can be selected."""
    for name in available(ALL):
        assert select(SPEC, ALL, [name])


SWITCHED = FineTuneJobSpec.model_validate(
    {
        "model": {"source": "hf://a/b"},
        "data": {},
        "storage": {"bucket": "finetune"},
        "pipeline": [
            {"name": "sft", "sft": {}},
            {"name": "other", "from": "base", "sft": {}},
            {"name": "both", "merge": {"adapters": [{"stage": "sft"}, {"stage": "other", "checkpoint": "best"}]}},
            {"name": "plain", "from": "base", "quantize": {"gguf": ["Q8_0", "Q4_K_M"]}},
            {"name": "gguf", "from": "both", "quantize": {"gguf": ["Q8_0"], "loraGGUF": True}},
            {"name": "alone", "from": "sft", "merge": {}},
            {"name": "one", "quantize": {"gguf": ["Q8_0"], "loraGGUF": True}},
        ],
    },
    strict=False,
)
PLAIN = manifest("plain", ["bot-Q8_0.gguf", "bot-Q4_K_M.gguf"], {"Q8_0": "bot-Q8_0.gguf", "Q4_K_M": "bot-Q4_K_M.gguf"})
BOTH = manifest(
    "gguf",
    ["bot-Q8_0.gguf", "bot-LoRA-sft.gguf", "bot-LoRA-other-best.gguf"],
    {"Q8_0": "bot-Q8_0.gguf", "LoRA-sft": "bot-LoRA-sft.gguf", "LoRA-other-best": "bot-LoRA-other-best.gguf"},
)
ONE = manifest("one", ["bot-Q8_0.gguf", "bot-LoRA.gguf"], {"Q8_0": "bot-Q8_0.gguf", "LoRA": "bot-LoRA.gguf"})


@pytest.mark.parametrize(
    ("manifests", "name", "of_type", "adapter", "base"),
    [
        ([PLAIN, BOTH], "sft", "", "k/gguf/bot-LoRA-sft.gguf", "k/plain/bot-Q4_K_M.gguf"),
        ([PLAIN, BOTH], "other-best", "Q8_0", "k/gguf/bot-LoRA-other-best.gguf", "k/plain/bot-Q8_0.gguf"),
        ([PLAIN, BOTH, ONE], "sft", "Q2_K", "k/one/bot-LoRA.gguf", None),
        ([ONE], "sft", "", "k/one/bot-LoRA.gguf", None),
    ],
    ids=["of several", "by its checkpoint, over a type", "the last that was made, no such type", "no base"],
)
def test_an_adapter_is_laid_over_the_model_that_it_was_trained_on(
    manifests: list[Manifest], name: str, of_type: str, adapter: str, base: str | None
) -> None:
    """Never over a merged model; the base's file has a folder, for it may be called like another."""
    found = over_base(SWITCHED, manifests, name, of_type)
    assert found.adapter.file.key == adapter
    assert (found.base and found.base.file.key) == base
    assert found.weights == "base"
    assert found.base is None or found.base.path.startswith("plain/")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "other",
            r"no adapter of 'other' as a GGUF \(there is: sft, other-best\); merge other, and write `loraGGUF: true`",
        ),
        ("nobody", r"no adapter of 'nobody' as a GGUF \(there is: sft, other-best\)$"),
    ],
)
def test_an_adapter_that_is_no_gguf_is_told_how_to_become_one(name: str, words: str) -> None:
    """What there is, and for a stage that trains one the mend."""
    with pytest.raises(CommandError, match=words):
        over_base(SWITCHED, [PLAIN, BOTH], name)


def test_a_conversion_of_the_base_is_not_talked_to_by_itself() -> None:
    """The tuned models come before it, unless there is nothing else."""
    assert tuned(SWITCHED, [PLAIN, BOTH]) == [BOTH]
    assert tuned(SWITCHED, [PLAIN]) == [PLAIN]
