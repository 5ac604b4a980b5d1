"""Every way to train, once on a GPU in bf16: the first loss that its formula gives, and a loss that falls.

python -m pytest tests/gpu -s
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.test_launch import words
from tests.stages.test_rl import prompts
from tests.stages.test_sharding import message_of, nodes, stage
from tests.stages.training_job import JobMaker, chat_rows, pair_rows

from finetune_jobs.training import liger

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

ROLES = {
    "train": chat_rows(16),
    "eval": chat_rows(4, seed=1),
    "preference": pair_rows(12),
    "preferenceEval": pair_rows(4, seed=1),
    "prompts": prompts(8),
    "promptsEval": prompts(3, seed=1),
}
TRAINING = {"batchSize": 8, "loggingSteps": 1, "maxSteps": 12, "learningRate": 1e-2, "warmupRatio": 0}

SFT: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, 8-bit adam": {"training": {"optimizer": "adamw8bit"}},
    "lora, recomputed": {"training": {"gradientCheckpointing": True}},
    "qat": {"qat": {"type": "Q4_K_M"}},
    "qat, full": {"method": "full", "qat": {"type": "Q4_0"}, "training": {"learningRate": 1e-3}},
    "dora": {"lora": {"variant": "dora"}},
    "pissa": {"lora": {"variant": "pissa"}},
    "rslora": {"lora": {"rankStabilized": True}},
    "qlora nf4": {"method": "qlora"},
    "qlora fp4": {"method": "qlora", "quantization": {"type": "fp4"}},
    "qlora int8": {"method": "qlora", "quantization": {"type": "int8", "doubleQuant": False}},
    "full": {"method": "full", "training": {"learningRate": 1e-3}},
    "ia3": {"method": "ia3"},
    "prefix": {"method": "prefixTuning"},
    "prompt": {"method": "promptTuning", "training": {"learningRate": 3e-2}},
    "bottleneck": {"method": "bottleneck"},
}
PREFERENCE = {"dpo": math.log(2), "ipo": 25.0, "kto": 0.5, "orpo": None, "simpo": None}


def block(**written: Any) -> dict[str, Any]:
    """With the hyper-parameters of all here."""
    return {**written, "training": {**TRAINING, **written.get("training", {})}, "checkpoint": {"steps": 6}}


def trained(job: Any, stage: str, name: str) -> dict[str, Any]:
    """The stage's log, with its figures printed."""
    torch.cuda.reset_peak_memory_stats()
    log: dict[str, Any] = job.log(job.run(stage))
    curve = [point["loss"] for point in log["curve"]]
    shown = {"first": curve[0], "last": curve[-1], "evalLoss": log["evalLoss"], "precision": log["precision"]}
    print(f"\n{name}: {json.dumps(shown)}")
    assert log["device"].startswith("cuda")
    assert log["liger"] is (liger.unusable() is None)
    assert log["precision"] == "bfloat16"
    assert all(map(math.isfinite, curve))
    return log


@pytest.mark.parametrize("name", SFT)
def test_supervised(make_job: JobMaker, name: str) -> None:
    """The loss on the same rows falls under every method."""
    if name.startswith("qlora") or "8-bit" in name:
        pytest.importorskip("bitsandbytes")
    job = make_job({**ROLES, "train": chat_rows(8)}, pipeline=[{"name": "train", "sft": block(**SFT[name])}])
    curve = trained(job, "train", name)["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.05


SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "full, fsdp": ("fsdp", {"method": "full"}),
    "lora, fsdp": ("fsdp", {}),
    "qat, ddp": ("ddp", {"qat": {"type": "Q4_0"}}),
}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("name", SHARED)
def test_shared_by_two(make_job: JobMaker, tmp_path: Path, name: str) -> None:
    """What two GPUs learn is what one learns, but for bf16's noise; with fsdp each holds half of what is shared."""
    distributed, method = SHARED[name]
    written = stage(learningRate=1e-3, precision="bf16")
    written["sft"] |= method
    alone = make_job(ROLES, pipeline=[written])
    one = trained(alone, "train", f"{name}: one GPU")
    shared = {"training": {**written["sft"]["training"], "distributed": distributed}}
    job = make_job(ROLES, pipeline=[{"name": "train", "sft": {**written["sft"], **shared}}])
    with nodes(job, tmp_path, 1, FINETUNE_PROCESSES="2") as (process,):
        assert process.wait(timeout=300) == 0
    two = job.log(job.committed("train", words(message_of(tmp_path, 0))))
    assert two["liger"] is one["liger"]
    shards = 2 if distributed == "fsdp" else 1
    assert two["batch"]["shards"] == shards
    learned = 0 if "method" in method else one["parameters"]["trainable"]  # an adapter is whole in every process
    assert two["parameters"]["held"] == (one["parameters"]["held"] - learned) // shards + learned
    assert two["optimizerBytes"] == pytest.approx(one["optimizerBytes"] / (1 if learned else shards), rel=0.01)
    for figure in ("loss", "gradNorm"):
        curves = [[point[figure] for point in log["curve"]] for log in (two, one)]
        print(f"\n{figure}, shared by two and alone: {curves}")
        assert curves[0] == pytest.approx(curves[1], rel=0.03)


@pytest.mark.parametrize("loss", PREFERENCE)
def test_preference(make_job: JobMaker, loss: str) -> None:
    """The first loss is the formula's, in bf16 too."""
    written = block(loss=loss, training={"learningRate": 1e-3})
    job = make_job(ROLES, pipeline=[{"name": "train", "preference": written}])
    curve = trained(job, "train", loss)["curve"]
    if (first := PREFERENCE[loss]) is not None:
        assert curve[0]["loss"] == pytest.approx(first, rel=1e-5)
    assert curve[-1]["loss"] < curve[0]["loss"]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo"])
def test_reinforcement(make_job: JobMaker, algorithm: str) -> None:
    """By a trained reward model and a built-in reward; the first answers are at no distance from the reference."""
    judge = {"name": "judge", "reward": block()}
    rl = block(
        algorithm=algorithm,
        rewards=[{"stage": "judge"}, {"builtin": "length", "weight": 0.5}],
        generation={"maxNewTokens": 8, "perPrompt": 4},
        training={"maxSteps": 6, "learningRate": 1e-3},
    )
    job = make_job(ROLES, pipeline=[judge, {"name": "train", "rl": rl}])
    judged = trained(job, "judge", "reward")["curve"]
    assert judged[-1]["loss"] < judged[0]["loss"]
    curve = trained(job, "train", algorithm)["curve"]
    assert curve[0]["kl"] == pytest.approx(0, abs=0.05)  # sampled and read in different kernels
