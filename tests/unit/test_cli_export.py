"""``finetune export``: which job makes the files that a user asks for."""

from pathlib import Path
from typing import Any

import pytest
from tests.unit.test_cli_results import manifest

from finetune_api.types import API_VERSION, KIND, FineTuneJob
from finetune_api.validate import parse
from finetune_cli.errors import CommandError
from finetune_cli.export import Export, Wish, of_job, of_model, source_of
from finetune_cli.manifest import load_text

DATA = {"train": [{"source": "s3://data/train.jsonl"}]}
SFT = {"name": "sft", "sft": {}}
DPO = {"name": "dpo", "preference": {}}
MERGE = {"name": "merge", "merge": {}}
GGUF = {"name": "gguf", "quantize": {"gguf": ["Q8_0"]}}
ADAPTER = manifest("sft", ["adapter/adapter_config.json"])
MERGED = manifest("merge", ["merge.json", "model/config.json", "model/model.safetensors"])


def job(*pipeline: dict[str, Any], name: str = "bot") -> FineTuneJob:
    """A finished job with these stages."""
    spec = {
        "model": {"source": "hf://a/b", "secretRef": {"name": "hub"}},
        "data": {**DATA, "preference": [{"source": "s3://data/pairs.jsonl"}]},
        "storage": {"bucket": "models", "endpoint": "https://store", "secretRef": {"name": "s3"}},
        "seed": 7,
        "pipeline": list(pipeline),
    }
    meta = {"name": name, "namespace": "team"}
    return parse({"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": spec})


def made(export: Export) -> FineTuneJob:
    """The job that runs, through its file and every check."""
    return load_text(export.yaml, Path("/"))


def test_a_merged_model_is_quantized_from_where_it_lies() -> None:
    """One stage, over the merge stage's files; data, seed and storage, and so the locked test rows, are the job's."""
    export = of_job(job(SFT, MERGE, GGUF), [ADAPTER, MERGED, manifest("gguf", ["x.gguf"])], Wish(gguf=["Q4_K_M"]))
    new, old = made(export), job(SFT, MERGE, GGUF)
    assert (new.metadata.name, new.metadata.namespace) == ("bot-export", "team")
    assert new.spec.model.source == "s3://models/k/merge/model"
    assert new.spec.model.secret_ref is None
    assert [stage.name for stage in new.spec.pipeline] == ["export"]
    assert new.spec.evaluation.skip
    assert (new.spec.seed, new.spec.data, new.spec.storage) == (7, old.spec.data, old.spec.storage)
    assert export.artifacts == ["Q4_K_M", "Modelfile"]


def test_an_adapter_is_merged_first() -> None:
    """The job left an adapter of its base: that base, and the adapter from where it lies."""
    export = of_job(job(SFT), [ADAPTER], Wish(bitsandbytes=["nf4"], safetensors=True))
    new = made(export)
    assert new.spec.model.source == "hf://a/b"
    merge, quantize = new.spec.pipeline
    assert merge.merge is not None
    assert [adapter.uri for adapter in merge.merge.adapters or []] == ["s3://models/default/bot/sft/sft"]
    assert quantize.quantize is not None
    assert (quantize.quantize.gguf, quantize.quantize.bitsandbytes) == ([], ["nf4"])
    assert export.artifacts == ["merge", "export/bitsandbytes-nf4"]


def test_safetensors_of_a_merged_model_are_there() -> None:
    """Nothing runs."""
    assert of_job(job(SFT, MERGE), [ADAPTER, MERGED], Wish(safetensors=True)) == Export(None, ["merge"])


def test_the_last_model_that_is_there_counts() -> None:
    """Of a job that stopped after its merge, that; a reward model is no model to export."""
    reward = {"name": "taste", "reward": {}, "from": "base"}
    finished = [ADAPTER, manifest("taste", ["adapter/adapter_config.json"])]
    export = of_job(job(SFT, reward, MERGE), finished, Wish(gguf=["Q8_0"]))
    assert [stage.name for stage in made(export).spec.pipeline] == ["merge", "export"]
    assert "s3://models/default/bot/sft/sft" in export.yaml


def test_a_model_of_ones_own() -> None:
    """A source, without or with rows to measure by."""
    new = made(of_model("hf://Org/Some_Model.v2@main", "", Wish(gguf=["Q8_0"])))
    assert (new.metadata.name, new.spec.pipeline[0].name) == ("some-model-v2-export", "export")
    assert not new.spec.data.train
    rows = made(of_model("file:///models/Llama.gguf", "s3://rows/rows.jsonl", Wish(gguf=["IQ2_XS"]), "mine"))
    assert (rows.metadata.name, rows.spec.data.train[0].source) == ("mine", "s3://rows/rows.jsonl")


def test_a_long_name_stays_one() -> None:
    """At most 40 characters, and a DNS label."""
    export = of_job(job(SFT, MERGE, name="a" * 40), [ADAPTER, MERGED], Wish(gguf=["Q8_0"]))
    assert made(export).metadata.name == "a" * 33 + "-export"


@pytest.mark.parametrize(
    ("grant", "words"),
    [
        (lambda: of_job(job(SFT), [ADAPTER], Wish()), "say what to make"),
        (lambda: of_model("hf://a/b", "", Wish(safetensors=True)), "is for a job"),
        (lambda: of_job(job(GGUF), [manifest("gguf", ["x"])], Wish(safetensors=True)), "changed no weights"),
        (
            lambda: of_job(
                job(SFT, {"name": "dpo", "preference": {"start": "merge"}}),
                [ADAPTER, manifest("dpo", ["adapter/adapter_config.json"])],
                Wish(gguf=["Q8_0"]),
            ),
            "put a merge stage behind it",
        ),
    ],
)
def test_what_cannot_be_made_is_told(grant: Any, words: str) -> None:
    """With what to do instead."""
    with pytest.raises(CommandError, match=words):
        grant()


def test_paths_and_urls_are_models_and_words_are_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder here that is called as a job is, where its files were pulled to, does not hide the job."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bot").mkdir()
    (tmp_path / "m.gguf").touch()
    assert source_of("bot") == ""
    assert source_of("./bot") == f"file://{tmp_path / 'bot'}"
    assert source_of("m.gguf") == f"file://{tmp_path / 'm.gguf'}"
    assert source_of("hf://a/b") == "hf://a/b"
    with pytest.raises(CommandError, match="there is no"):
        source_of("other.gguf")
