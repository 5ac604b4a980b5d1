import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_api.defaults import resolve_lora, resolve_quantization
from finetune_api.pipeline import training_block
from finetune_api.types import BuiltinReward, FineTuneJob, Method
from finetune_cli.manifest import load
from finetune_operator.plan.rules import check, warnings

EXAMPLES = Path(__file__).parents[2] / "manifests/examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
DATA = EXAMPLES / "data"


CHOICES: dict[str, set[object]] = {
    "method": set(Method),
    "variant": {"lora", "dora", "pissa"},
    "quantization": {"nf4", "fp4", "int8"},
    "start": {"continue", "merge"},
    "loss": {"dpo", "ipo", "kto", "orpo", "simpo"},
    "algorithm": {"ppo", "grpo", "rloo"},
    "reward": set(BuiltinReward),
    "combination": {"linear", "ties", "dareTies", "svd"},
    "bitsandbytes": {"int8", "nf4"},
}
OTHERS = ("train", "eval", "preference", "labels")


def rows(name: str) -> list[dict[str, Any]]:
    """One of the quickstart's files."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def mails(name: str) -> list[str]:
    """What each row asks."""
    return [row["messages"][-2]["content"] if "messages" in row else row["prompt"][-1]["content"] for row in rows(name)]


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_example_is_sound(path: Path) -> None:
    """Every example loads, breaks no rule, gives no cause for advice, and is named like its file."""
    job = load(path)
    assert check(job) == []
    assert warnings(job) == []
    assert job.metadata.name == path.stem


def test_every_choice_has_an_example() -> None:
    """Methods, quantized bases, variants, losses, algorithms, rewards, forms of the result: each is shown somewhere."""
    shown: dict[str, set[object]] = {name: set() for name in CHOICES}
    for stage in (stage for path in FILES for stage in load(path).spec.pipeline):
        block = training_block(stage)
        if block is not None:
            lora, quantized = resolve_lora(block), resolve_quantization(block)
            shown["method"].add(block.method)
            shown["variant"] |= {lora.variant} if lora else set()
            shown["quantization"] |= {quantized.type} if quantized else set()
            shown["start"].add(block.start)
        shown["loss"] |= {stage.preference.loss} if stage.preference else set()
        shown["algorithm"] |= {stage.rl.algorithm} if stage.rl else set()
        shown["reward"] |= {reward.builtin for reward in stage.rl.rewards if reward.builtin} if stage.rl else set()
        shown["combination"] |= {stage.merge.combination} if stage.merge and stage.merge.adapters else set()
        shown["bitsandbytes"] |= set(stage.quantize.bitsandbytes) if stage.quantize else set()
    assert shown == CHOICES


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_example_says_what_it_is_for_and_needs(path: Path) -> None:
    """In words, before anything else."""
    head = path.read_text(encoding="utf-8").split("apiVersion")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert re.search(r"\b(cores|GPUs?|cluster)\b", head)


def on_a_cluster(path: Path) -> FineTuneJob:
    """The same file, read for a cluster."""
    job = load(path)
    assert check(job, cluster=True) == []
    return job


def test_gpu_examples_fit_a_cluster() -> None:
    """The examples for GPUs ask for them, and read nothing that only one machine has."""
    qlora, lora = on_a_cluster(EXAMPLES / "qlora-8b.yaml"), on_a_cluster(EXAMPLES / "lora-70b.yaml")
    assert [s.resources.gpus for s in qlora.spec.pipeline] == [1, 1, 0, 0]
    assert [s.resources.gpus for s in lora.spec.pipeline] == [8, 0, 0]
    assert "70B" in lora.spec.model.source


def test_quickstart_reads_files_that_are_there() -> None:
    """The paths in the quickstart start at its own folder."""
    data = load(EXAMPLES / "quickstart.yaml").spec.data
    sources = [source.source for role in (data.train, data.eval, data.test, data.preference) for source in role]
    assert len(sources) == 5
    assert all(Path(source.removeprefix("file://")).is_file() for source in sources)


def test_data_is_what_the_script_makes(tmp_path: Path) -> None:
    """The committed files are the script's output, byte for byte, so that nothing in them was touched by hand."""
    subprocess.run([sys.executable, str(DATA / "make.py"), "--directory", str(tmp_path)], check=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in DATA.glob("*.jsonl")}


def test_no_mail_stands_in_two_files() -> None:
    """Locked rows are asked nowhere else, and half of them hold a word that nothing else in the data has."""
    asked = [mail for name in ("train", "eval", "test", "preference", "labels") for mail in mails(name)]
    assert len(asked) == len(set(asked)) == 320 + 12 + 40 + 96 + 96
    known = set(re.findall(r"\w+", " ".join(mail for name in OTHERS for mail in mails(name))))
    new = [mail for mail in mails("test") if set(re.findall(r"\w+", mail)) - known]
    assert len(new) >= 16


def test_answers_can_be_checked() -> None:
    """Each answer is one JSON object of the five fields in their order, and every value stands in its mail."""
    spelled = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten"}
    for name in ("train", "eval", "test"):
        for row in rows(name):
            mail, text = row["messages"][-2]["content"], row["messages"][-1]["content"]
            form = json.loads(text)
            assert json.dumps(form) == text
            assert list(form) == ["name", "item", "quantity", "city", "day"]
            assert all(form[field] in mail for field in ("name", "item", "city", "day"))
            assert {str(form["quantity"]), spelled.get(form["quantity"])} & set(re.findall(r"\w+", mail))


def test_desirable_answers_are_right() -> None:
    """Half of the labelled answers are desirable; each of those is the form, and every value stands in its mail."""
    desirable = [row for row in rows("labels") if row["label"]]
    assert len(desirable) == len(rows("labels")) / 2
    for row in desirable:
        mail, text = row["prompt"][-1]["content"], row["completion"][0]["content"]
        form = json.loads(text)
        assert json.dumps(form) == text
        assert list(form) == ["name", "item", "quantity", "city", "day"]
        assert all(form[field] in mail for field in ("name", "item", "city", "day"))


def test_rejected_answers_are_wrong_in_many_ways() -> None:
    """No rejected answer is right; some are no JSON, some lack a field, some differ in one value alone."""
    kinds: dict[str, int] = {}
    for row in rows("preference"):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert chosen != rejected
        right = json.loads(chosen)
        try:
            wrong = json.loads(rejected)
        except ValueError:
            kind = "prose"
        else:
            assert wrong != right
            differ = [field for field in right if field in wrong and wrong[field] != right[field]]
            kind = "missing" if len(wrong) < len(right) else f"{len(differ)}:{differ[0]}"
        kinds[kind] = kinds.get(kind, 0) + 1
    assert {"prose", "missing", "1:quantity", "1:day", "1:city", "1:name", "1:item", "2:name"} <= kinds.keys()
    assert min(kinds.values()) >= 8
