"""Every file of ``manifests/examples`` from ``prepare`` to the report, on a random model and a few of its rows.

All that is changed in a file stands in ``shortened``. A new example is run without a word here.
"""

import json
import math
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.stages import families
from tests.stages.finished_run import FinishedRun
from tests.stages.test_architectures import converter_knows, difference, logits
from tests.stages.test_reward import classified
from tests.stages.training_job import answer_log_prob
from tests.store.conftest import BUCKET, EmbeddedStore
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from finetune_api.defaults import resolve_beta, resolve_lora, resolve_qat, resolve_quantization
from finetune_api.pipeline import find, kind, lora_ggufs, model_before, targets, training_block
from finetune_api.types import BASE, KTO, FineTuneJobSpec, Method, Preference, Reward, Rl, SimPO
from finetune_cli.manifest import load
from finetune_jobs.gguf import metadata
from finetune_jobs.gguf.engine import GGUFModel
from finetune_jobs.store.client import Store
from finetune_jobs.training import scoring
from finetune_jobs.tuned import tuned

__all__ = ["converter_knows"]

EXAMPLES = Path(__file__).parents[2] / "manifests/examples"
NOT_RUN = {
    "quickstart-cluster": "the quickstart to the letter, but for where model and data lie, which is for tests/e2e",
    "lora-70b": "without its eight GPUs it is the quickstart's lora; how they share: test_sharding.py, tests/gpu",
    "unsloth": "without a GPU it is qlora-8b: test_unsloth_fallback.py, tests/gpu",
}
"""Examples that would show nothing new here, and why."""
FILES = [path for path in sorted(EXAMPLES.glob("*.yaml")) if path.stem not in NOT_RUN]
STEPS, ROWS, ANSWER = 2, 4, 4
Json = dict[str, Any]


def shortened(path: Path, model: Path, storage: dict[str, str], shared: dict[str, Path]) -> FineTuneJobSpec:
    """The example's spec as it is written, but for the model, the numbers of rows and steps and the length of answers.

    Rows from a bucket become those of the quickstart's file of the same name; there is no GPU, and no gate, for a
    random model passes none. A step sees all rows, so that its loss follows from the model that came in. Scores are
    taken where something else than merged models and GGUFs is scored; those are in the quickstart.
    """
    whole = load(path).spec
    spec = whole.model_dump(mode="json", by_alias=True, exclude_unset=True)
    spec["model"] = {**spec["model"], "source": f"file://{model}"}
    spec["model"].pop("secretRef", None)
    spec["storage"] = storage
    usual = all(target.gguf or find(whole, target.stage).merge for target in targets(whole))
    changed = {"maxRows": 2, "maxNewTokens": ANSWER, "gates": {}, "skip": usual and path.stem != "quickstart"}
    spec["evaluation"] = {**spec.get("evaluation", {}), **changed}
    for data in [spec["data"], *(stage["data"] for stage in spec["pipeline"] if "data" in stage)]:
        for source in (source for sources in data.values() for source in sources):
            name = Path(source["source"]).with_suffix(".jsonl").name
            source |= {"source": f"file://{EXAMPLES / 'data' / name}", "maxRows": ROWS}
    if not changed["skip"]:
        spec["data"] |= {role: [{"source": f"file://{rows}"}] for role, rows in shared.items()}
    for stage in spec["pipeline"]:
        stage.pop("resources", None)
        for name in {"sft", "preference", "reward", "rl"} & stage.keys():
            block = stage[name]
            training = {"maxSteps": STEPS, "batchSize": 4 * ROWS, "loggingSteps": 1, "precision": "fp32"}
            block |= {"training": block.get("training", {}) | training, "checkpoint": {"steps": STEPS}}
        if "rl" in stage:
            stage["rl"]["training"]["batchSize"] = 2
            stage["rl"]["generation"] = stage["rl"].get("generation", {}) | {"maxNewTokens": ANSWER}
        if "imatrix" in stage.get("quantize", {}):
            stage["quantize"]["imatrix"]["rows"] = ROWS
    return FineTuneJobSpec.model_validate_json(json.dumps(spec))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models of two families, the quickstart's and one with biases, whose tokens were learned from its mails."""
    scratch = tmp_path_factory.mktemp("examples")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "TEXT", (EXAMPLES / "data/train.jsonl").read_text(encoding="utf-8").splitlines())
        for name in ("smollm", "qwen2"):
            family = families.FAMILIES[name]
            longer = families.Family({**family.config, "max_position_embeddings": 1024}, family.tokenizer)
            found[name] = families.write(longer, scratch / name, torch.float32)
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One question of each kind in place of the forty that are built in."""
    scratch = tmp_path_factory.mktemp("shared")
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    rows = {"general": {"messages": asked, "reference": "Paris"}, "refusals": {"messages": asked, "expect": "answer"}}
    for role, row in rows.items():
        (scratch / f"{role}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return {role: scratch / f"{role}.jsonl" for role in rows}


class Checks:
    """What one job left, by stage."""

    def __init__(self, run: FinishedRun) -> None:
        self.run, self.spec = run, run.spec
        self.folders: dict[str, Path] = {}

    def files(self, stage: str) -> Path:
        """Downloaded once."""
        if stage not in self.folders:
            self.folders[stage] = self.run.files(stage)
        return self.folders[stage]

    def json(self, stage: str, path: str) -> Any:
        """One of its files."""
        return json.loads((self.files(stage) / path).read_text(encoding="utf-8"))

    def rows(self, role: str) -> list[Json]:
        """As ``prepare`` froze them."""
        text = (self.files("prepare") / f"data/default/{role}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def incoming(self, stage: str) -> Any:
        """The model that the stage started from, by transformers and what an adapter's format is read by."""
        before = model_before(self.spec, stage)
        found: Any = self.whole(before.weights)
        return found if before.adapter is None else tuned(found, self.files(before.adapter) / "adapter").eval()

    def whole(self, name: str) -> Any:
        """A model of 16 bits or more."""
        folder = self.files("prepare" if name == BASE else name) / "model"
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self) -> list[int]:
        """Tokens of a test row's question and answer."""
        tokenizer = AutoTokenizer.from_pretrained(self.files("prepare") / "model")
        found: list[int] = tokenizer.apply_chat_template(self.rows("test")[0]["messages"], return_dict=False)
        return found


def check_training(checks: Checks, stage: str) -> None:
    """Method, settings, steps and parameters are those asked for; the first loss is the formula's; what was trained
    loads, and is not what came in."""
    spec, log = checks.spec, checks.json(stage, "training.json")
    block = training_block(find(spec, stage))
    assert block is not None
    assert (log["kind"], log["method"], log["steps"]) == (kind(spec, stage), str(block.method), STEPS)
    assert [point["step"] for point in log["curve"]] == [1, 2]
    assert all(math.isfinite(point["loss"]) for point in log["curve"])
    expected = checks.json("prepare", "checks.json")["estimate"]["stages"][stage]["trainableParameters"]
    if not isinstance(block, Reward | Rl):
        assert log["parameters"]["trainable"] == expected
    written = resolve_lora(block)
    if written is not None and log["continues"] is None:
        assert (log["lora"]["variant"], log["lora"]["rankStabilized"]) == (written.variant, written.rank_stabilized)
        assert (log["lora"]["r"], log["lora"]["alpha"]) == (written.r, written.alpha)
        assert log["lora"]["bias"].replace("_o", "O") == written.bias
        assert bool(log["lora"]["modulesToSave"]) is bool(written.modules_to_save)
    quantized = resolve_quantization(block)
    assert log["quantization"] == (quantized and quantized.model_dump(mode="json", by_alias=True))
    assert (log["qat"] or {}).get("type") == resolve_qat(block)
    match block:
        case Preference():
            check_preference(checks, stage, block, log)
        case Rl():
            check_rl(block, log)
        case Reward():
            check_reward(checks, stage, log)
            return
        case _:
            pass
    if block.method is Method.FULL:
        learned = checks.whole(stage)
    else:
        base = checks.whole(stage if log["folded"] else model_before(spec, stage).weights)
        learned = tuned(base, checks.files(stage) / "adapter").eval()
    assert difference(logits(learned, checks.ids()), logits(checks.incoming(stage), checks.ids())) > 1e-6


def check_preference(checks: Checks, stage: str, block: Preference, log: Json) -> None:
    """The loss that is asked for, with its figure of the first step (reference/practice.md, section 3)."""
    beta = resolve_beta(block)
    assert (log["objective"]["loss"], log["objective"]["beta"]) == (block.loss, beta)
    first = log["curve"][0]["loss"]
    if block.loss in ("dpo", "ipo", "kto"):
        weights = block.kto or KTO()
        mean = (weights.desirable_weight + weights.undesirable_weight) / 2
        assert weights.desirable_weight == weights.undesirable_weight
        closed = {"dpo": math.log(2), "ipo": 1 / (4 * beta**2), "kto": 0.5 * mean}
        assert first == pytest.approx(closed[block.loss], rel=1e-6)
        return
    network = checks.incoming(stage)
    tokenizer = AutoTokenizer.from_pretrained(checks.files("prepare") / "model")
    losses = []
    for row in checks.rows("preference"):
        sides = []
        for side in ("chosen", "rejected"):
            total, count = answer_log_prob(network, tokenizer, row["prompt"], row[side][0]["content"])
            sides.append(total / count)
        chosen, rejected = sides
        if block.loss == "orpo":
            odds = [p - math.log1p(-math.exp(p)) for p in (chosen, rejected)]
            losses.append(-chosen + beta * math.log1p(math.exp(odds[1] - odds[0])))
        else:
            gamma = (block.simpo or SimPO()).gamma
            losses.append(math.log1p(math.exp(beta * (rejected - chosen) + gamma)))
    assert first == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def odd(answer: Any) -> float:
    """The share of its tokens that are odd: no answer of a random model would earn a built-in reward."""
    return float(np.mean(np.array(answer.ids) % 2))


def check_rl(block: Rl, log: Json) -> None:
    """The algorithm that is asked for; its reward is the weighted sum, and it begins at the model that came in."""
    assert log["objective"]["algorithm"] == block.algorithm
    first = log["curve"][0]
    names = {reward.stage or str(reward.builtin): reward.weight for reward in block.rewards}
    assert first["reward"] == pytest.approx(sum(w * first[f"rewards/{name}"] for name, w in names.items()), abs=1e-6)
    assert first["kl"] == pytest.approx(0, abs=1e-4)


def check_reward(checks: Checks, stage: str, log: Json) -> None:
    """transformers' sequence classifier scores the held-out pairs as recorded."""
    folder = checks.files(stage) / "reward"
    base = checks.files("prepare") / "model"
    judge: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    scores = classified(tuned(judge, folder).eval(), base, checks.rows("preferenceEval"))
    recorded = log["evaluations"][-1]
    assert recorded["eval/rewards/margins"] == pytest.approx(float((scores[:, 0] - scores[:, 1]).mean()), abs=2e-4)


def check_merge(checks: Checks, stage: str) -> None:
    """The merged model loads; one adapter's gives what base and adapter give, but for 16 bits."""
    block, log = find(checks.spec, stage).merge, checks.json(stage, "merge.json")
    assert block is not None
    merged, base = checks.whole(stage), checks.whole(model_before(checks.spec, stage).weights)
    assert log["logits"]["relativeL2"] <= log["logits"]["relativeL2Bound"]
    assert difference(logits(merged, checks.ids()), logits(base, checks.ids())) > 1e-6
    if block.adapters:
        assert [one["stage"] for one in log["adapters"]] == [one.stage for one in block.adapters]
        assert (log["combination"], log["modules"]["count"]) == (block.combination, 14)
    elif log["base"]["kept"] == "original":
        assert difference(logits(merged, checks.ids()), logits(checks.incoming(stage), checks.ids())) < 2e-2


def check_quantize(checks: Checks, stage: str) -> None:
    """Every GGUF is of its type and answers; adapters are GGUFs of adapters; the others load in transformers."""
    block, log = find(checks.spec, stage).quantize, checks.json(stage, "quantize.json")
    assert block is not None
    folder, ids = checks.files(stage), checks.ids()
    assert list(log["types"]) == [str(one) for one in block.gguf]
    for name, said in log["types"].items():
        assert said["imatrix"] is bool(block.imatrix)
        with GGUFModel(folder / said["file"]) as answering:
            (answer,) = answering.generate([ids[:20]], ANSWER)
            assert len(answer.ids) == ANSWER or answer.finished
        assert 0 <= said["kl"] < 1, name
    for label in lora_ggufs(checks.spec, stage):
        path = next(folder.glob(f"*-{label}.gguf"))
        assert metadata.read(path).fields["general.type"] == "adapter"
    for way in block.bitsandbytes:
        packed = AutoModelForCausalLM.from_pretrained(folder / f"bitsandbytes-{way}", device_map="cpu")
        layer = type(packed.model.layers[0].mlp.up_proj).__name__
        assert layer == {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[way]


def check_report(checks: Checks) -> None:
    """Every tuned model is scored, and has its row with figures."""
    report = checks.json("report", "report.json")
    names = [target.name for target in targets(checks.spec)]
    assert list(report["scores"]) == [BASE, *names]
    assert all(math.isfinite(figures["loss"]) for figures in report["scores"].values())
    page = (checks.files("report") / "index.html").read_text(encoding="utf-8")
    assert all(name in page for name in names)
    forms = {row["form"]: row for row in report["precision"]}
    for target in targets(checks.spec):
        if target.quantized is not None:
            assert forms[target.quantized]["kl"] >= 0
            assert forms[target.quantized]["score"] is not None


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
@pytest.mark.usefixtures("start_run")
def test_example_runs(
    path: Path,
    models: dict[str, Path],
    shared: dict[str, Path],
    store_server: EmbeddedStore,
    tmp_path: Path,
    converter_knows: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every stage commits what its kind promises, and what the file is about has happened."""
    family = "qwen2" if "Qwen" in load(path).spec.model.source else "smollm"
    converter_knows(families.FAMILIES[family].pre)
    for builtin in scoring.BUILTIN:
        monkeypatch.setitem(scoring.BUILTIN, builtin, odd)
    storage = {"bucket": BUCKET, "endpoint": store_server.endpoint, "prefix": f"example-{uuid.uuid4().hex[:8]}"}
    spec = shortened(path, models[family], storage, shared)
    checks = Checks(FinishedRun(spec, Store.of(spec.storage), tmp_path).run_all())
    for stage in spec.pipeline:
        match kind(spec, stage.name):
            case "merge":
                check_merge(checks, stage.name)
            case "quantize":
                check_quantize(checks, stage.name)
            case _:
                check_training(checks, stage.name)
    if not spec.evaluation.skip:
        check_report(checks)


def test_the_files_that_are_not_run_are_there() -> None:
    """No exception outlives its example."""
    assert all((EXAMPLES / f"{name}.yaml").is_file() for name in NOT_RUN)
