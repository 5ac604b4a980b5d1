import gzip
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.tinymodel import byte_tokenizer, tiny_model
from transformers import AutoConfig

from finetune_api.types import DataFormat, DataSource, ModelSource, Storage
from finetune_jobs import anatomy, models
from finetune_jobs.data import sources
from finetune_jobs.data.formats import Record
from finetune_jobs.data.load import Mistakes, RoleRows, load_role
from finetune_jobs.data.sources import Part, fingerprint, open_source
from finetune_jobs.remote import Repository, parse_hub
from finetune_jobs.run.errors import ConfigurationError, DataError, InputMissingError, StageError, StorageError

STORAGE = Storage(bucket="finetune")
GOOD = {"prompt": "q", "completion": "a"}


def lines(*rows: Any) -> str:
    """JSON lines."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def file_source(path: Path, **more: Any) -> DataSource:
    """A file:// source."""
    return DataSource(source=f"file://{path}", **more)


def load(tmp_path: Path, *given: DataSource, role: str = "train", mistakes: Mistakes | None = None) -> RoleRows:
    """A role of these sources; mistakes raise unless collected."""
    opened = [
        (s, f"spec.data.{role}[{i}]", open_source(s, STORAGE, f"spec.data.{role}[{i}]", tmp_path / "x"))
        for i, s in enumerate(given)
    ]
    found = mistakes or Mistakes()
    loaded = load_role(role, opened, chat=False, chat_pairs=False, mistakes=found, report=lambda _: None)
    if mistakes is None:
        found.refuse()
    return loaded


def test_a_folder_is_all_its_files_in_order(tmp_path: Path) -> None:
    """Known kinds only, by name, each row with its own file and line; files recorded with size and sha256."""
    (tmp_path / "b.jsonl").write_text(lines(GOOD, {"prompt": "q2", "completion": "a"}))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines({"prompt": "q1", "completion": "a"}).encode()))
    (tmp_path / "README.md").write_text("no rows")
    (tmp_path / ".hidden.jsonl").write_text("no rows")
    loaded = load(tmp_path, file_source(tmp_path))
    assert [(r["source"], r["line"], r["prompt"]) for r in loaded.rows] == [
        ("a.jsonl.gz", 1, "q1"),
        ("b.jsonl", 1, "q"),
        ("b.jsonl", 2, "q2"),
    ]
    facts = loaded.sources[0].facts
    assert [f["name"] for f in facts["files"]] == ["a.jsonl.gz", "b.jsonl"]
    assert (facts["read"], facts["kept"], facts["formats"]) == (3, 3, ["promptCompletion"])


def test_ids_follow_content_and_are_unique(tmp_path: Path) -> None:
    """The same row has the same id in any file; a repeated one gets a number."""
    (tmp_path / "a.jsonl").write_text(lines(GOOD, GOOD))
    (tmp_path / "b.jsonl").write_text(lines({"completion": "a", "prompt": "q", "more": 1}))
    one, two = (r["id"] for r in load(tmp_path, file_source(tmp_path / "a.jsonl")).rows)
    assert two == f"{one}-2"
    assert load(tmp_path, file_source(tmp_path / "b.jsonl")).rows[0]["id"] == one


def test_max_rows_counts_over_the_whole_source(tmp_path: Path) -> None:
    """The first rows, whatever file they are in."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(lines(GOOD, GOOD))
    assert [r["source"] for r in load(tmp_path, file_source(tmp_path, max_rows=3)).rows] == [
        "a.jsonl",
        "a.jsonl",
        "b.jsonl",
    ]


def test_mistakes_in_several_files_are_told_at_once(tmp_path: Path) -> None:
    """One message: file, line, words and field of each."""
    (tmp_path / "a.jsonl").write_text(lines(GOOD, "{broken", {"prompt": "q", "completion": ""}))
    (tmp_path / "b.jsonl").write_text(lines({"question": "q"}, {"question": "r"}))
    (tmp_path / "c.csv").write_text("")
    with pytest.raises(DataError) as caught:
        load(tmp_path, *(file_source(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.csv")))
    told = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in told] == ["a.jsonl:2", "a.jsonl:3", "b.jsonl:1", "c.csv"]
    assert told[0].endswith("(spec.data.train[0])")
    assert "columns" in told[2]


def test_twenty_mistakes_are_enough(tmp_path: Path) -> None:
    """A file of nothing but mistakes makes no endless message."""
    (tmp_path / "a.jsonl").write_text("{broken\n" * 1000)
    with pytest.raises(DataError) as caught:
        load(tmp_path, file_source(tmp_path / "a.jsonl"))
    assert len(str(caught.value).splitlines()) == 21


def test_rows_left_out_are_counted_and_none_left_is_a_mistake(tmp_path: Path) -> None:
    """A trailing question is left out beside good rows; a file of nothing else is refused."""
    ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    (tmp_path / "a.jsonl").write_text(lines({"messages": [ask, answer]}, {"messages": [ask, answer, ask]}))
    facts = load(tmp_path, file_source(tmp_path / "a.jsonl")).sources[0].facts
    assert facts["dropped"] == {"conversation does not end with an assistant turn": 1}
    (tmp_path / "a.jsonl").write_text(lines({"messages": [ask, answer, ask]}))
    with pytest.raises(DataError, match=r"no row is left: 1 x conversation does not end"):
        load(tmp_path, file_source(tmp_path / "a.jsonl"))


def test_roles_read_their_own_kind_of_rows(tmp_path: Path) -> None:
    """Pairs under train are learned by the chosen answer; under preference they must be pairs."""
    (tmp_path / "p.jsonl").write_text(lines({"prompt": "q", "chosen": "a", "rejected": "b"}))
    (tmp_path / "t.jsonl").write_text(lines(GOOD))
    assert load(tmp_path, file_source(tmp_path / "p.jsonl")).rows[0]["completion"] == "a"
    assert load(tmp_path, file_source(tmp_path / "p.jsonl"), role="preference").rows[0]["rejected"] == "b"
    with pytest.raises(DataError, match=r"t\.jsonl:1.*chosen \+ rejected"):
        load(tmp_path, file_source(tmp_path / "t.jsonl"), role="preference")
    with pytest.raises(DataError, match=r"t\.jsonl:1.*role preference, which needs pairs"):
        load(tmp_path, file_source(tmp_path / "t.jsonl", format=DataFormat.PROMPT_COMPLETION), role="preference")


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (
            "file:///nowhere/t.jsonl",
            InputMissingError,
            r"spec\.data\.train\[0\]\.source: there is no file /nowhere/t\.jsonl",
        ),
        ("/nowhere/t.jsonl", ConfigurationError, "must begin with file://"),
        ("hf://org/name", ConfigurationError, "hf://datasets/org/name"),
        ("hf://datasets/name", ConfigurationError, "must be hf://datasets/org/name"),
        ("s3:///key", ConfigurationError, "s3://bucket/key"),
        ("hf://datasets/org/name", StorageError, "HF_HUB_OFFLINE"),
    ],
    ids=["missing", "no scheme", "model", "short", "no bucket", "offline"],
)
def test_a_source_that_is_not_there_names_the_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, error: type[StageError], words: str
) -> None:
    """Field path, what was looked for, the mend."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=words):
        load(tmp_path, DataSource(source=source))


def test_a_fingerprint_follows_content(tmp_path: Path) -> None:
    """Another byte, another fingerprint; another place, the same."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.jsonl").write_text(lines(GOOD))
    prints = [fingerprint(file_source(tmp_path / f), STORAGE, "f") for f in ("one", "two", "one/t.jsonl")]
    assert len(set(prints)) == 1
    (tmp_path / "two" / "t.jsonl").write_text(lines(GOOD, GOOD))
    assert fingerprint(file_source(tmp_path / "two"), STORAGE, "f") != prints[0]


def test_hub_data_sets_are_read_by_the_hubs_own_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets`` reads a repository (here: a local folder laid out like one), split and configuration by name."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "train.jsonl").write_text(lines(GOOD, GOOD))
    (tmp_path / "repo" / "test.jsonl").write_text(lines(GOOD))
    arguments = {"path": str(tmp_path / "repo"), "name": None, "revision": None, "cache_dir": str(tmp_path / "cache")}

    def part(split: str) -> Part:
        return Part(f"org/name/{split}", hub={**arguments, "split": split, "where": "spec.data.train[0].source"})

    assert list(sources.read(part("train"))) == [Record(1, GOOD), Record(2, GOOD)]
    with pytest.raises(ConfigurationError, match=r"spec\.data\.train\[0\]\.source.*nothere"):
        list(sources.read(part("nothere")))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf://org/name", Repository("model", "org/name", "", "main")),
        ("hf://org/name@v1", Repository("model", "org/name", "", "v1")),
        ("hf://datasets/org/name/config@abc", Repository("dataset", "org/name", "config", "abc")),
        ("hf://datasets/org/name/dir/t.jsonl", Repository("dataset", "org/name", "dir/t.jsonl", "main")),
    ],
    ids=["model", "revision", "configuration", "file"],
)
def test_hub_names(source: str, expected: Repository) -> None:
    """Organisation, name, what is inside, revision."""
    assert parse_hub(source, "f") == expected


# --- the base model --------------------------------------------------------------------------------------------------


def resolve(source: str, directory: Path, **more: Any) -> models.Base:
    """The model of that source, with its weights checked as ``prepare`` does."""
    model = ModelSource(source=source, **more)
    base = models.resolve(model, STORAGE, directory)
    config = anatomy.load_config(base.directory, trust_remote_code=model.trust_remote_code)
    anatomy.check_weights(base.directory, anatomy.anatomy(config).parameters)
    return base


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with what repositories carry besides."""
    directory = tiny_model(tmp_path_factory.mktemp("model") / "m")
    (directory / "README.md").write_text("x")
    (directory / "consolidated.safetensors").write_text("x")
    return directory


def copy_of(model: Path, directory: Path) -> Path:
    """A copy that a test may damage."""
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def test_a_local_model_is_taken_with_what_it_needs(model: Path, tmp_path: Path) -> None:
    """Weights, configuration, tokenizer; no README, no second set of weights; record equal wherever the folder is."""
    base = resolve(f"file://{model}", tmp_path / "out")
    names = {p.name for p in base.directory.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not names & {"README.md", "consolidated.safetensors"}
    assert base.stored
    assert str(model) not in json.dumps(base.record)
    elsewhere = copy_of(model, tmp_path / "copy")
    assert resolve(f"file://{elsewhere}", tmp_path / "out2").record == base.record
    prints = {models.fingerprint(ModelSource(source=f"file://{m}"), STORAGE) for m in (model, elsewhere)}
    assert len(prints) == 1


def test_the_jobs_chat_template_travels_with_the_model(model: Path, tmp_path: Path) -> None:
    """It is written into the copy, is part of the record, and leaves the source alone."""
    before = (model / "chat_template.jinja").read_text()
    plain = resolve(f"file://{model}", tmp_path / "a")
    own = resolve(f"file://{model}", tmp_path / "b", chat_template="{{ messages }}")
    assert (own.directory / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (model / "chat_template.jinja").read_text() == before
    assert own.record != plain.record


def test_a_package_is_found_without_running_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose import would fail still gives its files."""
    package = tmp_path / "model_package_for_tests"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    copy_of(model, package / "weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve("package://model_package_for_tests/weights", tmp_path / "out").stored


def _damage(directory: Path, name: str) -> None:
    config = json.loads((directory / "config.json").read_text())
    match name:
        case "quantized":
            config["quantization_config"] = {"quant_method": "gptq"}
        case "no text":
            config["model_type"] = "vit"
        case "own code":
            config |= {"model_type": "brand_new", "auto_map": {"AutoModelForCausalLM": "code.Model"}}
        case "no type":
            del config["model_type"]
        case "bigger":
            config["num_hidden_layers"] = 4
    (directory / "config.json").write_text("{" if name == "damaged config" else json.dumps(config))
    weights = directory / "model.safetensors"
    match name:
        case "no weights":
            weights.unlink()
        case "pickle":
            weights.rename(directory / "pytorch_model.bin")
        case "cut short":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "no safetensors":
            weights.write_bytes(b"x" * 100)
        case "missing shard":
            index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        case "adapter":
            (directory / "config.json").rename(directory / "adapter_config.json")
        case "no config":
            (directory / "config.json").unlink()


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("quantized", ConfigurationError, r"spec\.model\.source.*quantized already \(gptq\)"),
        ("no text", ConfigurationError, "'vit' does not continue text"),
        ("own code", ConfigurationError, r"spec\.model\.trustRemoteCode"),
        ("no type", ConfigurationError, "model_type"),
        ("damaged config", InputMissingError, "config.json is damaged"),
        ("bigger", InputMissingError, r"weight files hold [\d,]+ of the model's"),
        ("no weights", InputMissingError, "no weights"),
        ("pickle", InputMissingError, "pickle"),
        ("cut short", InputMissingError, "model.safetensors is cut short"),
        ("no safetensors", InputMissingError, "no safetensors file"),
        ("missing shard", InputMissingError, "model-00001-of-00002.safetensors is missing"),
        ("adapter", InputMissingError, "is an adapter, not a model"),
        ("no config", InputMissingError, "no config.json"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_work_says_why(
    model: Path, tmp_path: Path, name: str, error: type[StageError], words: str
) -> None:
    """Before anything else is done, with the field and the mend."""
    damaged = copy_of(model, tmp_path / "m")
    _damage(damaged, name)
    with pytest.raises(error, match=words):
        resolve(f"file://{damaged}", tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("file:///nowhere", InputMissingError, "there is no /nowhere"),
        ("package://no_such_package_here/x", InputMissingError, "'no_such_package_here' is not installed"),
        ("hf://org/name", StorageError, r"spec\.model\.source: model org/name at main.*HF_HUB_OFFLINE"),
        ("hf://name", ConfigurationError, "hf://org/name"),
        ("/models/x", ConfigurationError, "must begin with hf://"),
    ],
    ids=["no folder", "no package", "offline", "short", "no scheme"],
)
def test_a_model_that_is_not_there_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, error: type[StageError], words: str
) -> None:
    """Field, place, mend."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=words):
        resolve(source, tmp_path / "out")


def test_a_row_of_another_format_names_both(tmp_path: Path) -> None:
    """What the file began as, and what this row has."""
    (tmp_path / "t.jsonl").write_text(lines(GOOD, {"text": "a"}))
    with pytest.raises(DataError, match=r"t\.jsonl:2: has the columns text, but the file began as promptCompletion \("):
        load(tmp_path, file_source(tmp_path / "t.jsonl"))


def test_a_cell_that_json_cannot_hold_is_a_mistake_of_the_row(tmp_path: Path) -> None:
    """Parquet holds dates in lists; they are told with file and row."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    table = pa.Table.from_pylist([{"messages": turns, "tools": [{"since": datetime(2026, 1, 1)}]}])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet:1: holds a value of type datetime, .*; write it as text"):
        load(tmp_path, file_source(tmp_path / "t.parquet"))


def test_every_mistake_of_refusals_is_told(tmp_path: Path) -> None:
    """Not only the first row's."""
    (tmp_path / "t.jsonl").write_text(lines({"prompt": "q", "expect": "maybe"}, {"x": 1}))
    with pytest.raises(DataError, match=r"(?s)t\.jsonl:1: .*t\.jsonl:2: "):
        load(tmp_path, file_source(tmp_path / "t.jsonl"), role="refusals")


def _header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + b"x" * 100


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors.index.json", b"{", "model.safetensors.index.json is damaged"),
        ("model.safetensors.index.json", b"[]", "model.safetensors.index.json is damaged"),
        ("model.safetensors.index.json", b"{}", "model.safetensors.index.json is damaged"),
        ("model.safetensors", _header("[]"), "model.safetensors is no safetensors file"),
        ("model.safetensors", _header('{"a": {"shape": [2]}}'), "model.safetensors is no safetensors file"),
        ("model.safetensors", _header('{"a": 1}'), "model.safetensors is no safetensors file"),
    ],
)
def test_damaged_weight_files_are_told_in_words(
    model: Path, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    """Whatever a broken copy left in the place of JSON."""
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputMissingError, match=f"^spec.model.source: {words}; copy the model again$"):
        anatomy.check_weights(tmp_path, 1)


def test_target_modules_are_looked_up_in_the_model(model: Path) -> None:
    """Unknown names get the nearest known one; the output head is no target."""
    body = anatomy.anatomy(anatomy.load_config(model, trust_remote_code=False))
    assert list(anatomy.wrong_targets(["all-linear", "q_proj", "mlp.up_proj"], body, "f")) == []
    near, far = anatomy.wrong_targets(["q_prj", "q_proj", "zzz"], body, "f")
    assert near.startswith("f: the model has no linear layer 'q_prj'; did you mean 'q_proj'? It has down_proj, ")
    assert far.startswith("f: the model has no linear layer 'zzz'. It has down_proj, ")
    assert len(body.linear) == 14
    assert body.tied


_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}


@pytest.mark.parametrize(
    ("model_type", "settings", "words"),
    [
        ("mamba", {**_SMALL, "state_size": 8}, "keeps a running state"),
        ("lfm2", {**_SMALL, "layer_types": ["conv", "full_attention"]}, "keeps a running state"),
        ("falcon_h1", _SMALL, "keeps a running state"),
        ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97}, "has no cache of attention"),
        ("bert", _SMALL, "is an encoder"),
        (
            "mbart",
            {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "vocab_size": 97},
            "is an encoder",
        ),
    ],
)
def test_architectures_that_no_stage_can_work_with_are_refused(
    model_type: str, settings: dict[str, Any], words: str
) -> None:
    """By what they are made of, in words that name the field, before any stage stumbles over them."""
    with pytest.raises(
        ConfigurationError, match=f"^spec.model.source: a model of type '{model_type}' {words}.*; choose"
    ):
        anatomy.anatomy(AutoConfig.for_model(model_type, **settings))


@pytest.mark.parametrize("model_type", ["gpt_neox", "bloom", "gemma3_text", "mixtral", "phi3", "bert"])
def test_attention_models_of_every_make_are_fine(model_type: str) -> None:
    """With and without positions, with sliding windows and experts; an encoder that was made a decoder too."""
    decoder = {"is_decoder": True} if model_type == "bert" else {}
    body = anatomy.anatomy(AutoConfig.for_model(model_type, **_SMALL, pad_token_id=0, **decoder))
    assert body.vocabulary == 97


def test_parameters_are_counted_once(tmp_path: Path) -> None:
    """Tied embeddings count once; the count is that of the weight file."""
    for tied in (True, False):
        directory = tiny_model(tmp_path / str(tied), tie_word_embeddings=tied)
        body = anatomy.anatomy(anatomy.load_config(directory, trust_remote_code=False))
        assert body.parameters == anatomy._numbers_in(directory / "model.safetensors")


def test_a_tokenizer_that_does_not_fit_is_refused(model: Path, tmp_path: Path) -> None:
    """Ids beyond the embedding are another model's."""
    small = tiny_model(tmp_path / "small", vocab_size=300)
    body = anatomy.anatomy(anatomy.load_config(small, trust_remote_code=False))
    with pytest.raises(ConfigurationError, match=r"ids up to \d+, but the embedding has 300 rows"):
        anatomy.check_tokenizer(byte_tokenizer(), small, body)
