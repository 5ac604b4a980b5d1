import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.store.conftest import BUCKET
from tests.tinymodel import CHATML, byte_tokenizer, padding_tokenizer, tiny_model
from transformers import MambaConfig, MambaForCausalLM

from finetune_api.stage import JobRef, StageRun
from finetune_api.types import FineTuneJobSpec
from finetune_cli.embedded import EmbeddedStore
from finetune_jobs import models
from finetune_jobs.data.encode import Encoded, EncodedPair, encode, encode_pair, load_tokenizer, prompt_ids
from finetune_jobs.data.labels import EncodedAnswer, encode_answers
from finetune_jobs.data.sources import open_source
from finetune_jobs.data.split import question_key
from finetune_jobs.run.context import Context, Outcome
from finetune_jobs.run.errors import ConfigurationError, DataError, InputMissingError, PreemptedError, StageError
from finetune_jobs.run.preemption import Stop
from finetune_jobs.run.progress import Progress
from finetune_jobs.stages import prepare
from finetune_jobs.store.checkpoints import Checkpoints
from finetune_jobs.store.client import Store
from finetune_jobs.training import collators

SFT = {"name": "sft", "sft": {}}
DPO = {"name": "dpo", "preference": {}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model."""
    return tiny_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def store(store_server: EmbeddedStore) -> Store:
    """A store of this module's own."""
    return Store(
        bucket=BUCKET,
        prefix="prepare",
        endpoint=store_server.endpoint,
        access_key=store_server.access_key,
        secret_key=store_server.secret_key,
    )


@dataclass
class Job:
    """Runs ``prepare`` on files that a test writes."""

    folder: Path
    model: Path
    store: Store
    stop: Stop

    def write(self, name: str, rows: list[Any]) -> dict[str, Any]:
        """A file of rows and the source that names it."""
        text = "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows)
        (self.folder / name).write_text(text, encoding="utf-8")
        return {"source": f"file://{self.folder / name}"}

    def write_more(self, name: str, rows: list[Any]) -> Path:
        """The path of such a file."""
        self.write(name, rows)
        return self.folder / name

    def spec(self, data: dict[str, Any], *pipeline: dict[str, Any], **more: Any) -> FineTuneJobSpec:
        """A job on these sources."""
        written = {
            "model": {"source": f"file://{self.model}"},
            "data": {role: source if isinstance(source, list) else [source] for role, source in data.items()},
            "storage": {"bucket": BUCKET, "endpoint": self.store.endpoint},
            "pipeline": list(pipeline) or [SFT],
            **more,
        }
        return FineTuneJobSpec.model_validate_json(json.dumps(written))

    def run(self, spec: FineTuneJobSpec) -> "Prepared":
        """One attempt in a workspace of its own."""
        workspace = self.folder / f"work{random.random()}"
        workspace.mkdir()
        run = StageRun(job=JobRef(namespace="n", name="j", uid="u"), stage="prepare", attempt=1, spec=spec)
        checkpoints = Checkpoints(self.store, "prepare/x", "w", keep=1)
        ctx = Context(run, self.store, workspace, None, Progress(None), self.stop, {}, checkpoints)
        try:
            return Prepared(prepare.run(ctx))
        finally:
            checkpoints.close()


@dataclass
class Prepared:
    """What ``prepare`` left."""

    outcome: Outcome

    def json(self, logical: str) -> Any:
        """One of the JSON outputs."""
        return json.loads((self.outcome.directory / self.outcome.outputs[logical]).read_text())

    def rows(self, role: str, name: str = "default") -> list[Any]:
        """Frozen rows; none if there is no such file."""
        path = self.outcome.directory / "data" / name / f"{role}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def card(self) -> Any:
        """The data card."""
        return self.json("datacard")


@pytest.fixture
def job(tmp_path: Path, model: Path, store: Store) -> Job:
    """A job without files yet."""
    return Job(tmp_path, model, store, Stop())


def chat(question: str, answer: str) -> dict[str, Any]:
    """A conversation of one question."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chats(count: int, first: int = 0) -> list[Any]:
    """Conversations that have little in common."""
    words = [f"w{i}" for i in range(300)]
    return [chat(" ".join(random.Random(i).choices(words, k=12)), f"answer {i}") for i in range(first, first + count)]


def pairs(rows: list[Any]) -> list[Any]:
    """For each conversation a pair."""
    return [
        {"prompt": r["messages"][0]["content"], "chosen": r["messages"][1]["content"], "rejected": "no"} for r in rows
    ]


def test_a_whole_job_is_frozen(job: Job) -> None:
    """Sets split without overlap, model and built-in questions beside them; every count of the card is that of the
    files.
    """
    rows = chats(200)
    data = {"train": job.write("train.jsonl", rows), "preference": job.write("pairs.jsonl", pairs(chats(40, 1000)))}
    done = job.run(job.spec(data, SFT, DPO, {"name": "merge", "merge": {}}))

    frozen = {role: done.rows(role) for role in ("train", "eval", "test", "preference", "preferenceEval")}
    assert {role: len(found) for role, found in frozen.items()} == {
        "train": 171,
        "eval": 9,
        "test": 20,
        "preference": 38,
        "preferenceEval": 2,
    }
    contents = [json.dumps(r["messages"]) for role in ("train", "eval", "test") for r in frozen[role]]
    assert sorted(contents) == sorted(json.dumps(r["messages"]) for r in rows)
    lines = (job.folder / "train.jsonl").read_text().splitlines()
    assert all(json.loads(lines[r["line"] - 1])["messages"] == r["messages"] for r in frozen["test"])

    assert set(done.outcome.outputs) == {
        *(f"data/default/{role}" for role in frozen),
        "data/general",
        "data/refusals",
        "base",
        "model",
        "datacard",
        "checks",
    }
    assert all((done.outcome.directory / path).exists() for path in done.outcome.outputs.values())
    where = json.loads((done.outcome.directory / "environment.json").read_text())["environment"]
    assert where["packages"]["transformers"]
    assert where["cpu"]["memoryBytes"] > 0
    for role, found in frozen.items():
        assert done.card["sets"]["default"][role]["rows"] == len(found)
    text = (done.outcome.directory / "datacard.txt").read_text()
    assert "train: 171 rows" in text
    assert done.card["sets"]["default"]["train"]["sources"][0]["files"][0]["sha256"] in text
    assert done.outcome.figures["trainRows"] == 171


def turns(count: int) -> dict[str, Any]:
    """A conversation of many questions."""
    parts = [{"role": role, "content": f"{role} {i}"} for i in range(count) for role in ("user", "assistant")]
    return {"messages": parts}


@pytest.mark.parametrize(
    "rows",
    [
        [
            *chats(60),
            chat("long question " * 20, "never seen"),
            chat("q", "a long answer " * 30),
            *map(turns, (2, 9, 10)),
        ],
        [{"text": f"words that are learned but for the first {i} " * (i % 9 + 1)} for i in range(60)],
    ],
    ids=["messages", "text"],
)
def test_token_counts_are_those_of_training(job: Job, rows: list[Any]) -> None:
    """The card's totals are the sums over what the loss counts, for every stage's own limit."""
    settings = {"training": {"maxLength": 100, "overlong": "truncate"}}
    done = job.run(job.spec({"train": job.write("t.jsonl", rows)}, SFT, {"name": "short", "sft": settings}))
    tokenizer = load_tokenizer(done.outcome.directory / "model")
    for name, length, overlong in (("sft", 2048, "drop"), ("short", 100, "truncate")):
        found = [encode(r, tokenizer, loss_on="auto", max_length=length, overlong=overlong) for r in done.rows("train")]  # type: ignore[arg-type]
        used = [e for e in found if isinstance(e, Encoded)]
        counted = done.card["stages"][name]["roles"]["train"]
        assert counted["rows"] == len(used)
        assert counted["tokens"] == sum(len(e.input_ids) for e in used)
        assert counted["supervisedTokens"] == sum(collators.example(e).supervised for e in used)
        assert sum(counted["dropped"].values()) == len(found) - len(used)
        assert counted["cut"] == sum(len(e.input_ids) == 100 for e in used if name == "short")


def test_token_counts_of_pairs_are_those_of_training(job: Job) -> None:
    """Of both answers, as far as ``maxLength`` leaves them."""
    rows = [
        {"prompt": f"question {i}", "chosen": "good answer " * (i % 7), "rejected": "worse " * (i % 5 + 1)}
        for i in range(60)
        if i % 7
    ]
    settings = {"training": {"maxLength": 60, "overlong": "truncate"}}
    data = {
        "train": job.write("t.jsonl", chats(30)),
        "preference": job.write("p.jsonl", [r for r in rows if r["chosen"]]),
    }
    done = job.run(job.spec(data, SFT, {"name": "dpo", "preference": settings}))
    tokenizer = load_tokenizer(done.outcome.directory / "model")
    found = [encode_pair(r, tokenizer, max_length=60, overlong="truncate") for r in done.rows("preference")]
    used = [collators.pair(e) for e in found if isinstance(e, EncodedPair)]
    counted = done.card["stages"]["dpo"]["roles"]["preference"]
    assert (counted["rows"], counted["supervisedTokens"]) == (len(used), sum(e.supervised for e in used))
    assert counted["cut"] > 0


def test_the_same_inputs_give_the_same_bytes(job: Job) -> None:
    """Run twice, from another folder and with the file sorted otherwise: the locked rows are the same; nothing names
    the folder.
    """
    rows = chats(100)
    first = job.run(job.spec({"train": job.write("train.jsonl", rows)}))
    again = job.run(job.spec({"train": job.write("train.jsonl", rows)}))
    for logical, path in first.outcome.outputs.items():
        if logical not in ("model", "datacard"):
            assert (first.outcome.directory / path).read_bytes() == (
                again.outcome.directory / again.outcome.outputs[logical]
            ).read_bytes()
            assert str(job.folder) not in (first.outcome.directory / path).read_text()
    turned = job.run(job.spec({"train": job.write("train.jsonl", rows[::-1])}))
    assert [r["messages"] for r in turned.rows("test")] == [r["messages"] for r in first.rows("test")]
    other = job.run(job.spec({"train": job.write("train.jsonl", rows)}, seed=7))
    assert [r["id"] for r in other.rows("test")] != [r["id"] for r in first.rows("test")]


@pytest.mark.parametrize(
    ("count", "sizes"), [(2, (1, 0, 1)), (3, (1, 1, 1)), (5, (3, 1, 1)), (20, (15, 1, 4))], ids=str
)
def test_tiny_sets_work(job: Job, count: int, sizes: tuple[int, int, int]) -> None:
    """From two rows on there is something to train on and something to test."""
    done = job.run(job.spec({"train": job.write("t.jsonl", chats(count))}))
    assert tuple(len(done.rows(role)) for role in ("train", "eval", "test")) == sizes


def test_what_a_test_row_asks_is_nowhere_trained_on(job: Job) -> None:
    """Neither copies, nor other answers to the same question, nor pairs about it, in any stage's set."""
    rows = chats(100)
    again = [chat(r["messages"][0]["content"].upper(), "another answer") for r in rows]
    own = {**SFT, "name": "more", "data": {"train": [job.write("more.jsonl", rows[50:])]}}
    data = {"train": job.write("t.jsonl", rows + again), "preference": job.write("p.jsonl", pairs(rows))}
    done = job.run(job.spec(data, SFT, own, DPO))
    locked = {question_key(r) for r in done.rows("test")}
    trained = [
        r
        for name in ("default", "more")
        for role in ("train", "eval", "preference", "preferenceEval")
        for r in done.rows(role, name)
    ]
    assert len(trained) > 300
    assert locked.isdisjoint({question_key(r) for r in trained})
    removed = done.card["sets"]["default"]["preference"]["removed"]
    assert sum(removed.values()) == len(locked)
    assert not done.rows("test", "more")


def test_given_test_rows_stay_as_they_are_and_overlap_is_told(job: Job) -> None:
    """The user's test rows keep their order; those that are also trained on are counted, exactly and nearly."""
    rows = chats(60)
    near = chat(rows[1]["messages"][0]["content"], rows[1]["messages"][1]["content"] + "!")
    test = [rows[0], near, *chats(3, 500)]
    given = {
        "train": job.write("t.jsonl", rows),
        "test": job.write("test.jsonl", test),
        "eval": job.write("e.jsonl", chats(5, 700)),
    }
    done = job.run(job.spec(given))
    assert [r["messages"] for r in done.rows("test")] == [r["messages"] for r in test]
    assert len(done.rows("train")) == 60
    assert done.card["sets"]["default"]["train"]["testRowsAlsoHere"] == {"exact": 1, "near": 1}
    assert done.card["sets"]["default"]["train"]["evalRowsAlsoHere"] == {"exact": 0, "near": 0}
    assert any("1 test rows also stand in it" in w for w in done.card["warnings"])
    assert any(c["name"] == "data" and not c["passed"] for c in done.json("checks")["checks"])


def test_weights_mix_sources(job: Job) -> None:
    """A source of weight 2 stands twice in an epoch, one of weight 0.5 half; the card keeps the weights."""
    train = [
        {**job.write("a.jsonl", chats(40)), "weight": 2.0},
        {**job.write("b.jsonl", chats(40, 100)), "weight": 0.5},
    ]
    test, evaluation = job.write("x.jsonl", chats(2, 900)), job.write("y.jsonl", chats(2, 950))
    done = job.run(job.spec({"train": train, "test": test, "eval": evaluation}))
    sources = [r["source"] for r in done.rows("train")]
    assert (sources.count("a.jsonl"), sources.count("b.jsonl")) == (80, 20)
    assert len({r["id"] for r in done.rows("train")}) == 100


def test_a_job_of_pairs_alone_is_tested_on_chosen_answers(job: Job) -> None:
    """Without training rows the locked rows come from the pairs."""
    done = job.run(job.spec({"preference": job.write("p.jsonl", pairs(chats(50)))}, DPO))
    assert len(done.rows("test")) == 10
    assert all(r["messages"][-1]["content"].startswith("answer") for r in done.rows("test"))
    assert {len(done.rows("preference")), len(done.rows("preferenceEval"))} == {38, 2}


def labelled(rows: list[Any]) -> list[Any]:
    """The same questions, every third answer wrong, and labelled so."""
    return [
        {"prompt": r["messages"][0]["content"], "completion": f"{r['messages'][-1]['content']}{'no' * (i % 3 == 0)}"}
        | {"label": i % 3 > 0}
        for i, r in enumerate(rows)
    ]


KTO = {"name": "kto", "preference": {"loss": "kto", "training": {"maxLength": 70}}}


def test_answers_with_labels_are_frozen_and_counted(job: Job) -> None:
    """Told from the columns, in the form of the training rows. The card says how many are desirable and how many are
    both, and counts what training will.
    """
    rows = labelled(chats(40, 100))
    both = {**rows[1], "label": False}
    data = {"train": job.write("t.jsonl", chats(30)), "preference": job.write("l.jsonl", [*rows, both])}
    done = job.run(job.spec(data, SFT, KTO))
    frozen = [*done.rows("preference"), *done.rows("preferenceEval")]
    assert {tuple(row) for row in frozen} == {("id", "source", "line", "messages", "label")}
    card = done.card["sets"]["default"]
    assert len(frozen) == 41
    found = [card[role]["labels"] for role in ("preference", "preferenceEval")]
    assert sum(f["desirable"] for f in found) == sum(r["label"] for r in rows)
    assert sum(f["contradictions"] for f in found) == 1
    assert any("labelled desirable and undesirable alike" in words for words in done.card["warnings"])
    assert any(words.startswith("kto: ") and "kto.desirableWeight" in words for words in done.card["warnings"])
    tokenizer = load_tokenizer(done.outcome.directory / "model")
    used = list(encode_answers(done.rows("preference"), tokenizer, max_length=70))
    counted = done.card["stages"]["kto"]["roles"]["preference"]
    kept = [collators.judged(e) for e in used if isinstance(e, EncodedAnswer)]
    assert (counted["rows"], counted["supervisedTokens"]) == (len(kept), sum(e.supervised for e in kept))


def test_labels_and_pairs_teach_kto_together(job: Job) -> None:
    """A pair is two answers, the chosen one desirable; each ends with its stop token."""
    data = {
        "train": job.write("t.jsonl", chats(30)),
        "preference": [job.write("l.jsonl", labelled(chats(20, 100))), job.write("p.jsonl", pairs(chats(20, 200)))],
    }
    done = job.run(job.spec(data, SFT, KTO))
    tokenizer = load_tokenizer(done.outcome.directory / "model")
    rows = done.rows("preference")
    found = list(encode_answers(rows, tokenizer, max_length=None))
    expected = [label for row in rows for label in ([row["label"]] if "label" in row else [True, False])]
    assert [answer.desirable for answer in found if isinstance(answer, EncodedAnswer)] == expected
    for answer in found:
        assert isinstance(answer, EncodedAnswer)
        assert tokenizer.decode(answer.prompt_ids).endswith("<|im_start|>assistant\n")
        assert tokenizer.decode(answer.answer_ids).endswith("<|im_end|>")


def test_a_job_that_only_converts_needs_no_rows(job: Job) -> None:
    """Its files are held against the answers to the built-in questions; where something is scored, rows are missed."""
    convert = {"name": "files", "quantize": {"gguf": [], "bitsandbytes": ["nf4"]}}
    done = job.run(job.spec({}, convert, evaluation={"skip": True}))
    assert len(done.rows("test")) == 20
    assert done.rows("test")[0]["messages"][-1] == {"role": "assistant", "content": "Paris"}
    with pytest.raises(ConfigurationError, match=r"spec\.data: no rows at all"):
        job.run(job.spec({}, convert))


def test_labels_for_a_loss_of_pairs_are_refused_before_training(job: Job) -> None:
    """Where `auto` found them, no rule could know."""
    data = {"train": job.write("t.jsonl", chats(30)), "preference": job.write("l.jsonl", labelled(chats(20, 100)))}
    with pytest.raises(ConfigurationError, match=r"spec\.pipeline\[1\]\.preference: .*loss: kto"):
        job.run(job.spec(data, SFT, DPO))


def test_a_job_of_labels_alone_is_tested_on_desirable_answers(job: Job) -> None:
    """An undesirable answer is none to compare with; what asks the same is trained on no more."""
    done = job.run(job.spec({"preference": job.write("l.jsonl", labelled(chats(60)))}, KTO))
    assert len(done.rows("test")) == 8
    assert all(not r["messages"][-1]["content"].endswith("no") and "label" not in r for r in done.rows("test"))
    asked = {question_key(r) for r in done.rows("test")}
    assert not asked & {question_key(r) for r in done.rows("preference")}


def test_pairs_take_the_form_of_the_training_rows(job: Job) -> None:
    """Beside prompts and completions, pairs of texts stay texts; beside conversations they become some."""
    texts = [{"prompt": f"question {i}", "completion": f" answer {i}"} for i in range(20)]
    pair = job.write("p.jsonl", pairs(chats(20, 50)))
    plain = job.run(job.spec({"train": job.write("t.jsonl", texts), "preference": pair}, SFT, DPO))
    assert isinstance(plain.rows("preference")[0]["prompt"], str)
    spoken = job.run(job.spec({"train": job.write("t.jsonl", chats(20)), "preference": pair}, SFT, DPO))
    assert spoken.rows("preference")[0]["prompt"][0]["role"] == "user"


def test_a_model_without_template_learns_instructions_as_text(job: Job, tmp_path: Path) -> None:
    """Instructions become prompts, built-in questions too, and the card says so; the job's own template changes
    that.
    """
    job.model = tiny_model(tmp_path / "base", tokenizer=byte_tokenizer(None))
    train = job.write("t.jsonl", [{"instruction": f"do {i}", "output": f"done {i}"} for i in range(20)])
    done = job.run(job.spec({"train": train}))
    assert "### Instruction:\ndo " in done.rows("train")[0]["prompt"]
    general = [json.loads(line) for line in (done.outcome.directory / "data/general.jsonl").read_text().splitlines()]
    assert len(general) == 20
    tokenizer = load_tokenizer(done.outcome.directory / "model")
    assert all(prompt_ids(row, tokenizer) for row in general)
    assert any("no chat template" in w for w in done.card["warnings"])
    told = job.run(job.spec({"train": train}, model={"source": f"file://{job.model}", "chatTemplate": CHATML}))
    assert "messages" in told.rows("train")[0]


def test_other_models_markers_in_plain_text_are_warned_of(job: Job) -> None:
    """Text that was rendered for another model."""
    rows = [{"text": f"[INST] question {i} [/INST] answer {i}"} for i in range(30)]
    done = job.run(job.spec({"train": job.write("t.jsonl", rows)}))
    assert any("'[INST]'" in w and "plain text rows" in w for w in done.card["warnings"])


def test_a_tokenizer_that_pads_words_goes_through(job: Job, tmp_path: Path) -> None:
    """Llama 2's kind of tokenizer and template, end to end."""
    job.model = tiny_model(tmp_path / "llama2", tokenizer=padding_tokenizer())
    done = job.run(job.spec({"train": job.write("t.jsonl", chats(30))}))
    assert done.card["model"]["stopTokens"] == ["</s>"]
    assert done.card["stages"]["sft"]["roles"]["train"]["rows"] == len(done.rows("train"))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*chats(3), "{broken"], r"t\.jsonl:4: not JSON"),
        (
            [*chats(3), {"messages": [{"role": "user", "content": "q"}]}],
            r"t\.jsonl:4: no assistant turn, so no supervised token",
        ),
        ([], r"t\.jsonl: no rows"),
        (chats(1), r"t\.jsonl: no test row can be set aside, since there is one row only"),
        (chats(1) * 5, r"since all 5 rows are equal"),
        ([{"a": 1}], r"t\.jsonl:1: .*the file has a"),
    ],
    ids=["broken line", "no answer", "empty", "one row", "equal rows", "columns"],
)
def test_bad_training_data_names_file_and_line(job: Job, rows: list[Any], words: str) -> None:
    """Exit 65 with the place and the mend."""
    with pytest.raises(DataError, match=words):
        job.run(job.spec({"train": job.write("t.jsonl", rows)}))


def test_a_chosen_equal_to_its_rejected_names_file_and_line(job: Job) -> None:
    """Exit 65; mistakes of other files stand in the same message."""
    pair = pairs(chats(5))
    pair[3]["rejected"] = pair[3]["chosen"]
    train = job.write("t.jsonl", [*chats(3), {"messages": 5}])
    with pytest.raises(DataError) as caught:
        job.run(job.spec({"train": train, "preference": job.write("p.jsonl", pair)}, SFT, DPO))
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == ["t.jsonl:4", "p.jsonl:4"]


def test_rows_that_the_template_refuses_are_all_named(job: Job, tmp_path: Path) -> None:
    """Two conversations that begin with the assistant: both lines, with the template's words."""
    template = "{{ raise_exception('user first') if messages[0].role == 'assistant' }}" + CHATML
    job.model = tiny_model(tmp_path / "strict", tokenizer=byte_tokenizer(template))
    odd = [
        {"messages": [{"role": "assistant", "content": f"hello {i}"}, *chats(1, i)[0]["messages"]]} for i in (90, 91)
    ]
    test = job.write("x.jsonl", chats(3, 200))
    with pytest.raises(DataError) as caught:
        job.run(job.spec({"train": job.write("t.jsonl", [odd[0], *chats(10), odd[1]]), "test": test, "eval": test}))
    told = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in told] == ["t.jsonl:1", "t.jsonl:12"]
    assert "user first" in told[0]


SHORT = {"training": {"maxLength": 16}}


@pytest.mark.parametrize(
    ("pipeline", "error", "words"),
    [
        (
            [{"name": "sft", "sft": SHORT}],
            DataError,
            r"spec\.pipeline\[0\]\.sft\.training\.maxLength: none of the \d+ rows of train",
        ),
        (
            [{"name": "sft", "sft": {"lora": {"targetModules": ["q_prj"]}}}],
            ConfigurationError,
            r"pipeline\[0\]\.sft\.lora\.targetModules.*'q_proj'",
        ),
        ([SFT, DPO], ConfigurationError, r"spec\.data\.preference: stage dpo learns from these rows"),
        (
            [{**SFT, "data": {"test": [{"source": "file:///x.jsonl"}]}}],
            ConfigurationError,
            r"spec\.pipeline\[0\]\.data\.test.*spec\.data\.test",
        ),
        (
            [{"name": "gguf", "quantize": {"gguf": ["Q8_0", "Q1_0"]}}],
            ConfigurationError,
            r"spec\.pipeline\[0\]\.quantize\.gguf\[1\]: Q1_0 needs rows that are a multiple of 128",
        ),
    ],
    ids=["maxLength", "targetModules", "no pairs", "own test rows", "a type"],
)
def test_what_only_model_and_data_together_tell(
    job: Job, pipeline: list[Any], error: type[StageError], words: str
) -> None:
    """Field path and mend, before any GPU starts."""
    with pytest.raises(error, match=words):
        job.run(job.spec({"train": job.write("t.jsonl", chats(30))}, *pipeline))


def test_loss_on_completion_of_texts_names_the_stage(job: Job) -> None:
    """The field's whole path."""
    rows = [{"text": f"some words {i}"} for i in range(30)]
    stage = {"name": "sft", "sft": {"training": {"lossOn": "completion"}}}
    with pytest.raises(ConfigurationError, match=r"spec\.pipeline\[0\]\.sft\.training\.lossOn"):
        job.run(job.spec({"train": job.write("t.jsonl", rows)}, stage))


@pytest.mark.parametrize("own", [True, False], ids=["the job's", "the model's"])
def test_a_template_that_is_no_jinja_is_a_mistake_of_the_field(job: Job, tmp_path: Path, own: bool) -> None:
    """Told once, and not once for each row."""
    half = "{% for m in messages %}{{ m.content }"
    model = {"source": f"file://{job.model}", "chatTemplate": half}
    if not own:
        model = {"source": f"file://{tiny_model(tmp_path / 'm', tokenizer=byte_tokenizer(half))}"}
    words = r"^spec\.model\.chatTemplate: is not" if own else r"^spec\.model\.source: the model's chat template is not"
    with pytest.raises(ConfigurationError, match=f"{words} valid Jinja: line 1: "):
        job.run(job.spec({"train": job.write("t.jsonl", chats(30))}, model=model))


def test_a_template_may_mark_what_the_assistant_says(job: Job) -> None:
    """``{% generation %}`` is a tag that only transformers knows."""
    marked = CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    model = {"source": f"file://{job.model}", "chatTemplate": marked}
    assert job.run(job.spec({"train": job.write("t.jsonl", chats(30))}, model=model)).rows("train")


def test_a_model_without_tokenizer_is_an_input_missing(job: Job, tmp_path: Path) -> None:
    """The weights alone were copied."""
    model = tiny_model(tmp_path / "m")
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputMissingError, match=r"^spec\.model\.source: the model has no tokenizer"):
        job.run(job.spec({"train": job.write("t.jsonl", chats(30))}, model={"source": f"file://{model}"}))


def test_a_model_without_attention_is_refused_by_its_field(job: Job, tmp_path: Path) -> None:
    """A Mamba keeps a state where others have a cache: prepare says so, not the first stage that needs the cache."""
    tokenizer = byte_tokenizer()
    config = MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, vocab_size=len(tokenizer))
    MambaForCausalLM(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(
        ConfigurationError, match=r"^spec\.model\.source: a model of type 'mamba' keeps a running state"
    ):
        job.run(job.spec({"train": job.write("t.jsonl", chats(30))}, model={"source": f"file://{tmp_path}/m"}))


def test_half_a_gguf_names_the_field(job: Job, tmp_path: Path) -> None:
    """And what to do."""
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(InputMissingError, match=r"^spec\.model\.source: .*m\.gguf is not a whole GGUF file: .*again$"):
        job.run(job.spec({"train": job.write("t.jsonl", chats(30))}, model={"source": f"file://{tmp_path}/m.gguf"}))


def test_what_does_not_fit_the_model_comes_at_once(job: Job) -> None:
    """Tokens that its tokenizer could not write, and target modules of all stages, each with its field."""
    model = {"source": f"file://{job.model}", "addTokens": ["<part>", "café"]}
    stages = [{**SFT, "sft": {"lora": {"targetModules": ["q_prj", "zzz"]}}}, {**SFT, "name": "two", "sft": {}}]
    stages[1]["sft"] = {"lora": {"targetModules": ["fc1"]}}
    with pytest.raises(ConfigurationError) as caught:
        job.run(job.spec({"train": job.write("t.jsonl", chats(30))}, *stages, model=model))
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "spec.model.addTokens[1]",
        "spec.pipeline[0].sft.lora.targetModules",
        "spec.pipeline[0].sft.lora.targetModules",
        "spec.pipeline[1].sft.lora.targetModules",
    ]


def test_all_that_is_missing_comes_at_once(job: Job) -> None:
    """Model and rows, those of a stage too, each with its field as the user wrote it."""
    gone = {"source": f"file://{job.folder}/gone.jsonl"}
    stage = {**SFT, "data": {"train": [gone]}}
    with pytest.raises(InputMissingError) as caught:
        prepare.fingerprint(job.spec({"train": gone}, stage, model={"source": "file:///no/model"}), job.store)
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == [
        "spec.model.source",
        "spec.data.train[0].source",
        "spec.pipeline[0].data.train[0].source",
    ]


def test_being_told_to_stop_ends_it(job: Job) -> None:
    """Nothing to save: exit 75 at the next step."""
    job.stop.request()
    with pytest.raises(PreemptedError):
        job.run(job.spec({"train": job.write("t.jsonl", chats(30))}))


# --- objects of a bucket ---------------------------------------------------------------------------------------------


@pytest.fixture
def credentials(store_server: EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a stage gets them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", store_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", store_server.secret_key)


@pytest.mark.usefixtures("credentials")
def test_model_and_data_may_lie_in_a_bucket(job: Job, tmp_path: Path) -> None:
    """Rows are those of the local file; the model stays where it is and is fetched whole and equal later."""
    rows = chats(30)
    job.write("t.jsonl", rows)
    for file in job.model.iterdir():
        job.store.put_file(file, f"things/model/{file.name}")
    job.store.put_file(job.folder / "t.jsonl", "things/data/t.jsonl")
    model = {"source": f"s3://{BUCKET}/things/model", "chatTemplate": "{# ours #}" + CHATML}
    spec = job.spec({"train": {"source": f"s3://{BUCKET}/things/data/t.jsonl"}}, model=model)
    done = job.run(spec)
    local = job.run(job.spec({"train": job.write("t.jsonl", rows)}))
    assert done.rows("train") == local.rows("train")
    assert "model" not in done.outcome.outputs

    fetched = models.fetch(done.json("base"), tmp_path / "fetched", spec.storage)
    assert (fetched / "model.safetensors").read_bytes() == (job.model / "model.safetensors").read_bytes()
    assert load_tokenizer(fetched).chat_template == "{# ours #}" + CHATML

    before = prepare.fingerprint(spec, job.store)
    assert prepare.fingerprint(spec, job.store) == before
    job.store.put_file(job.write_more("t.jsonl", chats(31)), "things/data/t.jsonl")
    changed = prepare.fingerprint(spec, job.store)
    assert {key for key in before if before[key] != changed[key]} == {"data.train[0]"}
    job.store.put_bytes("things/model/config.json", b"{}")
    with pytest.raises(InputMissingError):
        models.fetch(done.json("base"), tmp_path / "again", spec.storage)


@pytest.mark.usefixtures("credentials")
def test_nothing_in_the_bucket_names_the_field(job: Job) -> None:
    """A wrong key, and a bucket that is not there."""
    with pytest.raises(InputMissingError, match=r"spec\.data\.train\[0\]\.source: nothing is stored at s3://"):
        job.run(job.spec({"train": {"source": f"s3://{BUCKET}/no/such/key.jsonl"}}))
    with pytest.raises(StageError, match=r"spec\.data\.train\[0\]\.source"):
        job.run(job.spec({"train": {"source": "s3://no-such-bucket-here/key.jsonl"}}))


def test_rows_may_lie_in_a_config_map(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is the file that the operator mounts; its content counts, and the card names the ConfigMap."""
    here = job.spec({"train": job.write("t.jsonl", chats(30))})
    mounted = job.spec({"train": {"source": "configmap://rows/t.jsonl"}})
    with pytest.raises(ConfigurationError, match=r"spec\.data\.train\[0\]\.source: configmap:// is of a cluster"):
        prepare.fingerprint(mounted, job.store)
    monkeypatch.setenv("FINETUNE_CONFIG_MAPS", str(tmp_path / "mounts"))
    with pytest.raises(InputMissingError, match=r"there is no file .*/rows/t\.jsonl"):
        prepare.fingerprint(mounted, job.store)
    (tmp_path / "mounts/rows").mkdir(parents=True)
    shutil.copyfile(here.data.train[0].source.removeprefix("file://"), tmp_path / "mounts/rows/t.jsonl")
    assert prepare.fingerprint(mounted, job.store) == prepare.fingerprint(here, job.store)
    opened = open_source(mounted.data.train[0], mounted.storage, "spec.data.train[0]", tmp_path)
    assert opened.facts["source"] == "configmap://rows/t.jsonl"


def test_fingerprints_follow_content_not_place(job: Job, tmp_path: Path) -> None:
    """A moved file and a moved model change nothing; a changed byte does."""
    spec = job.spec({"train": job.write("t.jsonl", chats(30))})
    before = prepare.fingerprint(spec, job.store)
    (tmp_path / "moved").mkdir()
    there = Job(tmp_path / "moved", tiny_model(tmp_path / "moved" / "m"), job.store, job.stop)
    assert prepare.fingerprint(there.spec({"train": there.write("t.jsonl", chats(30))}), job.store) == before
    assert prepare.fingerprint(there.spec({"train": there.write("t.jsonl", chats(31))}), job.store) != before
