import json
from pathlib import Path
from typing import Any

import pytest
from tests.builders import raw_job

from finetune_api.types import Metric
from finetune_api.validate import InvalidSpec
from finetune_cli.manifest import MAX_BYTES, load, load_text, read

FOLDER = Path("/jobs")

# What sigs.k8s.io/yaml v1.6.0 (go.yaml.in/yaml/v2 v2.4.2) makes of `a: <key>`: YAMLToJSON, read back as JSON.
GO: dict[str, object] = {
    "1e-5": 1e-5, "1E5": 100000, "1e+5": 100000, "1e05": 100000, "1.e5": 100000, "1.5e3": 1500, "-1e-5": -1e-5,
    "0e5": 0,
    "1.0": 1, "16.0": 16, "1.": 1, "0.": 0, "0.0002": 0.0002, ".5": 0.5, "+.5": 0.5, "-.5": -0.5, "09.5": 9.5,
    "+1": 1, "-1": -1, "-0": 0, "00": 0, "1_000": 1000, "1_000.5": 1000.5, "1_": 1, "1__0": 10, "1e1_0": 10**10,
    "012": 10, "-012": -10, "+012": 10, "0777": 511, "0o14": 12, "-0o17": -15, "08": 8, "-08": -8, "0900": 900,
    "0_8": 8,
    "0x1F": 31, "0X1F": 31, "-0x1F": -31, "0x_1": 1, "0b101": 5, "-0b101": -5, "0xFFFFFFFFFFFFFFFF": 2**64 - 1,
    "9223372036854775808": 2**63,
    # Beyond 64 bits: floats.
    "18446744073709551616": int(2.0**64), "-9223372036854775809": int(-(2.0**63)),
    "1e21": 1e21, "1e-400": 0,
    "0b12": "0b12", "0o8": "0o8", "0x": "0x", "0b": "0b", "1e": "1e", "e5": "e5", ".e5": ".e5", "_1": "_1", ".": ".",
    "1e400": "1e400", "1,000": "1,000", "1.2.3": "1.2.3", "0x1p-2": "0x1p-2", "4Gi": "4Gi",
    "190:20:30": "190:20:30", "1:30": "1:30", "2001-01-01": "2001-01-01",
    "2001-01-01T10:00:00Z": "2001-01-01T10:00:00Z", "2001-01-01 10:00:00": "2001-01-01 10:00:00",
    **dict.fromkeys(["y", "Y", "yes", "Yes", "YES", "on", "On", "ON", "true", "True", "TRUE"], True),
    **dict.fromkeys(["n", "N", "no", "No", "NO", "off", "Off", "OFF", "false", "False", "FALSE"], False),
    **dict.fromkeys(["", "~", "null", "Null", "NULL"]),
    "tRUE": "tRUE", "nUll": "nUll", "inf": "inf", "nan": "nan", "+Inf": "+Inf", "Infinity": "Infinity",
    "none": "none", "=": "=",
    "'on'": "on", '"1e5"': "1e5", "!!str 12": "12", "!!int '12'": 12, "!!float 3": 3, "!!bool yes": True,
    "!!null ''": None,
    "!!str on": "on", "!foo bar": "bar", "!!timestamp 2001-01-01": "2001-01-01",
    "s3://b/k#x": "s3://b/k#x", "{b: , c: 1}": {"b": None, "c": 1}, "[a:b, 1]": ["a:b", 1],
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), GO.items(), ids=[repr(text) for text in GO])
def test_scalars_mean_what_they_mean_to_kubectl(text: str, value: object) -> None:
    """Every word reads as in sigs.k8s.io/yaml, down to whether a number is whole."""
    (document,) = read(f"a: {text}\n")
    assert document == {"a": value}
    assert type(document["a"]) is type(value)


DOCUMENTS = [
    ("a: &x {r: 1, s: 2}\nb: {<<: *x, s: 3}\n", {"a": {"r": 1, "s": 2}, "b": {"r": 1, "s": 3}}),
    ("b:\n  <<: [{a: 1, b: 2}, {a: 3, c: 4}]\n  c: 9\n", {"b": {"a": 1, "b": 2, "c": 9}}),
    ("a: |\n  x\n   y\n\nb: >-\n  p\n  q\n", {"a": "x\n y\n", "b": "p q"}),
    ("1: a\n2.5: b\non: c\n", {"1": "a", "2.5": "b", "true": "c"}),
    ("a: &x [1]\nb: *x\n", {"a": [1], "b": [1]}),
    ("\ufeffa: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
    ("--- \na: 1\n...\n", {"a": 1}),
    ("<<: {a: 1}\nb: <<\n", {"a": 1, "b": "<<"}),
]


@pytest.mark.parametrize(("text", "value"), DOCUMENTS, ids=[repr(text)[:30] for text, _ in DOCUMENTS])
def test_documents_mean_what_they_mean_to_kubectl(text: str, value: object) -> None:
    """Anchors, merge keys, block texts and odd field names, as the same Go module answered."""
    assert list(read(text)) == [value]


REFUSED = [
    ("a: 1\na: 2\n", "line 2, column 1: `a` stands here a second time; first in line 1"),
    ("yes: 1\ntrue: 2\n", "line 2, column 1: `true` stands here a second time; first in line 1"),
    ("a:\n\t- 1\n", "line 2, column 1: a tab; indent with spaces"),
    ("a: b: c\n", "line 1, column 5: a second `: ` in one line, or a wrong indentation; "
     "put text that holds `: ` in quotes"),
    ("a:\n  b: 1\n c: 2\n", "line 3, column 2: not valid YAML (expected <block end>, but found "
     "'<block mapping start>'); the line's indentation does not fit those above"),
    ("a: [1, 2\nb: 3\n", "line 2, column 2: not valid YAML (expected ',' or ']', but got ':'); "
     "is a bracket or brace left open?"),
    ("a: 'x\n", "line 2, column 1: the quote that opens in line 1 never closes"),
    ("a: *x\n", "line 1, column 4: undefined alias 'x': no `&name` stands before it"),
    ("a: &x [*x]\n", "line 1, column 4: nested deeper than 64; does an alias hold itself?"),
    ("a: .inf\n", "line 1, column 4: .inf is no number that JSON, and so the API server, knows"),
    ("a: !!int 3.5\n", "line 1, column 4: `3.5` is not of the type !!int"),
    ("a: !!binary aGk=\n", "line 1, column 4: !!binary is not read here"),
    ("? [a]\n: b\n", "line 1, column 3: a field's name must be a word, not a list or mapping"),
    ("~: 1\n", "line 1, column 1: a field without a name"),
    ("a: {<<: 3}\n", "line 1, column 9: `<<` takes a mapping, or a list of mappings"),
    ("a: {r: 1, <<: {r: 2}}\n", "line 1, column 11: put `<<` first: kubectl would let it replace the `r` above"),
    ("a: \x07\n", "the file holds the character U+0007, which YAML forbids"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=[repr(text) for text, _ in REFUSED])
def test_what_cannot_be_read_is_told_with_line_and_column(text: str, words: str) -> None:
    """A syntax error is one message without a field path, with its place and, where there is one, the mend."""
    with pytest.raises(InvalidSpec) as caught:
        list(read(text))
    assert [(error.path, error.message) for error in caught.value.errors] == [("", words)]


@pytest.mark.parametrize("shape", ["aliases", "nesting", "size"])
def test_a_file_cannot_blow_up(shape: str) -> None:
    """A few lines of aliases, deep nesting or sheer size are refused before they cost memory."""
    text = {
        "aliases": "a0: &a0 [x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
        "nesting": "a: " + "[" * 2000 + "]" * 2000,
        "size": f"a: {'x' * MAX_BYTES}\n",
    }[shape]
    with pytest.raises(InvalidSpec) as caught:
        list(read(text))
    assert any(
        words in str(caught.value) for words in ("more than 100,000 values", "nested", "a job may have 1,000,000")
    )


def as_yaml(**spec: Any) -> str:
    """A valid job as text: JSON is YAML."""
    return json.dumps(raw_job(**spec))


def test_a_job_is_loaded_from_a_file(tmp_path: Path) -> None:
    """The file's job comes back typed, numbers in every notation included."""
    path = tmp_path / "job.yaml"
    path.write_text(
        """
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: support-bot, labels: {kueue.x-k8s.io/queue-name: gpu}}
spec:
  model: {source: hf://org/name}
  data:
    train: [{source: s3://datasets/support/train.jsonl}]
  storage: {bucket: finetune, secretRef: {name: s3-credentials}}
  evaluation: {gates: {minScore: {exactMatch: .8}}}
  pipeline:
  - {name: sft, sft: {method: qlora, training: {learningRate: 1e-5, batchSize: 16.0}}, resources: {gpus: 1}}
  - {name: merge, merge: {}}
  - {name: gguf, quantize: {gguf: [Q4_K_M, Q8_0]}}
"""
    )
    job = load(path)
    sft = job.spec.pipeline[0].sft
    assert sft is not None
    assert (sft.training.learning_rate, sft.training.batch_size) == (1e-5, 16)
    assert job.spec.evaluation.gates.min_score == {Metric.EXACT_MATCH: 0.8}


@pytest.mark.parametrize(
    ("source", "absolute"),
    [
        ("file://data/train.jsonl", "file:///jobs/data/train.jsonl"),
        ("file://./train.jsonl", "file:///jobs/train.jsonl"),
        ("file://../train.jsonl", "file:///train.jsonl"),
        ("file:///data/train.jsonl", "file:///data/train.jsonl"),
        ("file://data/", "file:///jobs/data/"),
        ("s3://data/train.jsonl", "s3://data/train.jsonl"),
    ],
)
def test_relative_files_start_at_the_folder_of_the_yaml(source: str, absolute: str) -> None:
    """So that the job means the same wherever the command is typed: for data, a stage's data and the model."""
    stage = {"name": "sft", "sft": {}, "data": {"eval": [{"source": source}]}}
    job = load_text(json.dumps(raw_job(stage, data={"train": [{"source": source}]})), FOLDER)
    assert job.spec.data.train[0].source == absolute
    assert job.spec.pipeline[0].data.eval[0].source == absolute
    model = load_text(json.dumps(raw_job(model={"source": "file://m"})), FOLDER)
    assert model.spec.model.source == "file:///jobs/m"


def test_exactly_one_job_in_a_file() -> None:
    """A Secret may stand beside the job; two jobs, or none, are refused with what is there."""
    one = as_yaml()
    secret = "kind: Secret\n"
    assert load_text(f"---\n{secret}---\n{one}\n---\n", FOLDER).metadata.name == "bot"
    for text, words in [
        (
            f"{one}\n---\n{one}",
            "exactly one FineTuneJob was expected; the file's documents are: FineTuneJob, FineTuneJob",
        ),
        (f"{secret}---\n- 1\n", "exactly one FineTuneJob was expected; the file's documents are: Secret, no mapping"),
        ("# nothing\n", "the file is empty; a FineTuneJob was expected"),
        ("", "the file is empty; a FineTuneJob was expected"),
    ]:
        with pytest.raises(InvalidSpec) as caught:
            load_text(text, FOLDER)
        assert str(caught.value) == words


def test_schema_and_rules_speak_at_once() -> None:
    """A wrong bound and a broken rule elsewhere are told together; a rule about the wrong field itself is not."""
    stages = [
        {
            "name": "sft",
            "sft": {"lora": {"r": 0, "targetModules": ["lm_head"]}, "training": {"batchSize": 0}},
            "resources": {"gpus": 3},
        },
        {"name": "gguf", "from": "sftt", "quantize": {"gguf": ["Q8_0"]}},
        {"name": "more", "from": "base", "sft": {"quantization": {"type": "nf5"}}, "data": {"train": ["x"]}},
    ]
    with pytest.raises(InvalidSpec) as caught:
        load_text(json.dumps(raw_job(*stages, model={"source": "org/model"}, data={"train": ["x"]})), FOLDER)
    assert sorted(error.path for error in caught.value.errors) == [
        "spec.data.train[0]",  # and not that train is empty without it
        "spec.model.source",
        "spec.pipeline[0].sft.lora.r",
        "spec.pipeline[0].sft.lora.targetModules[0]",
        "spec.pipeline[0].sft.training.batchSize",
        "spec.pipeline[1].from",
        "spec.pipeline[2].data.train[0]",
        "spec.pipeline[2].sft.quantization",
        "spec.pipeline[2].sft.quantization.type",
    ]


def test_a_null_block_is_told_how_to_be_written() -> None:
    """``merge:`` alone is null, which kubectl prunes: the message says ``merge: {}``."""
    text = as_yaml().replace('"merge": {}', '"merge": null')
    with pytest.raises(InvalidSpec) as caught:
        load_text(text, FOLDER)
    (error,) = [error for error in caught.value.errors if error.path == "spec.pipeline[1]"]
    assert "`merge: {}`" in error.message


def test_a_job_whose_stages_are_unknown_is_judged_by_its_addresses() -> None:
    """A block that does not exist hides neither a wrong scheme nor a wrong endpoint, and invents no breach."""
    text = json.dumps(
        raw_job(
            {"name": "sft", "sfft": {}},
            {"name": "merge", "merge": {}},
            model={"source": "org/model"},
            storage={"bucket": "finetune", "endpoint": "http://host:port"},
        )
    )
    with pytest.raises(InvalidSpec) as caught:
        load_text(text, FOLDER)
    assert [error.path for error in caught.value.errors] == [
        "spec.pipeline[0].sfft",
        "spec.model.source",
        "spec.storage.endpoint",
    ]


def test_what_kubectl_takes_is_taken() -> None:
    """JSON that is indented with tabs, characters that JSON writes as two escapes, a list of one object."""
    job = raw_job(model={"source": "hf://org/model", "chatTemplate": "\U0001f389 {{ messages }}"})
    for text in (
        json.dumps(job, indent="\t"),
        json.dumps({"apiVersion": "v1", "kind": "List", "items": [job]}),
    ):
        assert load_text(text, FOLDER).spec.model.chat_template == "\U0001f389 {{ messages }}"


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("9" * 5000, 'must be a whole number, got the text "' + "9" * 57),
        ('"\\ud800"', "half a surrogate pair"),
        ('"a\\nb"', 'got the text "a\\nb"'),
    ],
    ids=["digits", "surrogate", "newline"],
)
def test_no_scalar_is_too_strange_for_words(written: str, words: str) -> None:
    """Thousands of digits and half characters are mistakes of the file, not ours."""
    with pytest.raises(InvalidSpec) as caught:
        load_text(as_yaml().replace('"spec": {', f'"spec": {{"seed": {written}, ', 1), FOLDER)
    assert words in str(caught.value)


def test_a_path_that_leads_nowhere_is_left_as_it_is(tmp_path: Path) -> None:
    """A link to itself is told with the other missing files, not by an exception."""
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    job = load_text(json.dumps(raw_job(data={"train": [{"source": "file://loop.jsonl"}]})), tmp_path)
    assert job.spec.data.train[0].source == "file://loop.jsonl"


def test_unreadable_files_are_told_plainly(tmp_path: Path) -> None:
    """A missing file, a directory, or bytes that are not UTF-8: one sentence each."""
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    for path, words in [
        (tmp_path / "none.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "latin.yaml", "is not UTF-8 text: line 2 has the byte 0xe9"),
    ]:
        with pytest.raises(InvalidSpec) as caught:
            load(path)
        assert words in str(caught.value)
