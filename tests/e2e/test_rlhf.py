import json
from pathlib import Path
from typing import Any

from tests.e2e.test_whole_pipeline import Machine, rows, stages
from tests.stages.gguf_models import random_model, smollm2  # noqa: F401 - fixtures

from finetune_cli.embedded import EmbeddedStore

TRAINING = {"batchSize": 4, "learningRate": 0.001, "precision": "fp32", "loggingSteps": 1}


def write_job(folder: Path, model: Path) -> Path:
    """The classic pipeline over forty questions, small enough to train in seconds."""
    wrong = {"role": "assistant", "content": "?"}
    pairs = [{"prompt": r["messages"][:1], "chosen": r["messages"][1:], "rejected": [wrong]} for r in rows()]
    for name, content in (("train", rows()), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"source": f"file://{model}"},
            "data": {
                "train": [{"source": "file://train.jsonl"}],
                "preference": [{"source": "file://pairs.jsonl"}],
                "prompts": [{"source": "file://train.jsonl"}],
            },
            "storage": {"bucket": "finetune"},
            "evaluation": {"maxRows": 4, "maxNewTokens": 8},
            "pipeline": [
                {"name": "sft", "sft": {"training": {**TRAINING, "maxSteps": 4}}},
                {"name": "judge", "from": "base", "reward": {"training": {**TRAINING, "maxSteps": 4}}},
                {
                    "name": "ppo",
                    "rl": {
                        "rewards": [{"stage": "judge"}, {"builtin": "exactMatch", "weight": 2}],
                        "generation": {"maxNewTokens": 6},
                        "training": {**TRAINING, "maxSteps": 2},
                    },
                },
                {"name": "merge", "merge": {}},
                {"name": "gguf", "quantize": {"gguf": ["Q8_0"]}},
            ],
        },
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))  # JSON is YAML
    return path


def test_the_classic_pipeline_of_human_feedback_is_one_yaml(
    tmp_path: Path,
    random_model: Path,  # noqa: F811 - the fixture
) -> None:
    """sft, a reward model as a branch, ppo on what sft left, merge and a GGUF; the report tells of all of them."""
    home = tmp_path / "machine"
    job = write_job(tmp_path, random_model)
    with EmbeddedStore(home, "finetune"):
        machine = Machine(home)
        output = machine.finetune("run", job)
        status = machine.status()
        assert {c["type"]: c["status"] for c in status["conditions"]}["Complete"] == "True", output
        assert {stage["state"] for stage in stages(status).values()} == {"Complete"}
        machine.finetune("pull", "tiny", "report.json", "index.html", "-o", tmp_path / "out")
        assert machine.finetune("pull", "tiny", "judge/reward", "-o", tmp_path / "judge")
    report: dict[str, Any] = json.loads(next((tmp_path / "out").rglob("report.json")).read_text())
    assert report["targets"] == ["base", "merge", "gguf/Q8_0"]
    assert [report["training"][name]["kind"] for name in ("sft", "judge", "ppo")] == ["sft", "reward", "rl"]
    assert report["training"]["ppo"]["continues"] == "sft"
    assert report["training"]["judge"]["continues"] is None
    judged = report["reward"]["judge"]
    assert judged["pairs"] == report["training"]["judge"]["examples"]["eval"] > 0
    assert 0 <= judged["accuracy"] <= 1
    learned = report["rl"]["ppo"]
    assert learned["prompts"] > 0
    assert set(learned["before"]) == {"reward", "kl", "length", "rewards/judge", "rewards/exactMatch"}
    page = next((tmp_path / "out").rglob("index.html")).read_text()
    assert "KL divergence" in page
    assert next((tmp_path / "judge").rglob("adapter_config.json")).is_file()
