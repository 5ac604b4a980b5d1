"""TRL as a second opinion: another implementation of the same papers must come to the same losses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.training_job import JobMaker, chat_rows, pair_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_jobs.data.encode import Encoded, encode

BETA = 0.3
SETTINGS = {
    "maxSteps": 4,
    "learningRate": 1e-3,
    "scheduler": "constant",
    "warmupRatio": 0,
    "batchSize": 8,  # all rows in every step, so that their order does not matter
    "precision": "fp32",
    "loggingSteps": 1,
}


def losses_of(trainer: Any) -> list[float]:
    """Train, and give the loss of each step."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trl_settings(directory: Path) -> dict[str, Any]:
    """The same settings in TRL's words."""
    return {
        "output_dir": str(directory),
        "max_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def test_sft_learns_as_trl_does(make_job: JobMaker, tiny_model: Path, tmp_path: Path) -> None:
    """Four steps of full training: the same loss at every step."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = chat_rows(8)
    job = make_job({"train": rows}, pipeline=[{"name": "sft", "sft": {"method": "full", "training": SETTINGS}}])
    ours = [point["loss"] for point in job.log(job.run("sft"))["curve"]]

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    encoded = [encode(row, tokenizer, loss_on="auto", max_length=512, overlong="drop") for row in rows]
    data = Dataset.from_list(
        [
            {"input_ids": e.input_ids, "completion_mask": list(map(int, e.supervised))}
            for e in encoded
            if isinstance(e, Encoded)
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = SFTConfig(**trl_settings(tmp_path), completion_only_loss=True)
    theirs = losses_of(SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer))
    assert ours == pytest.approx(theirs, abs=2e-4)
    assert theirs[-1] < theirs[0]


def test_dpo_learns_as_trl_does(make_job: JobMaker, tiny_model: Path, tmp_path: Path) -> None:
    """From ln 2 on, the same loss at every step against the same reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = pair_rows(8)
    block = {"method": "full", "beta": BETA, "training": SETTINGS}
    job = make_job({"preference": pairs}, pipeline=[{"name": "dpo", "preference": block}])
    ours = [point["loss"] for point in job.log(job.run("dpo"))["curve"]]

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [tokenizer.apply_chat_template(p["prompt"], add_generation_prompt=True, tokenize=False) for p in pairs]
    data = Dataset.from_list(
        [
            {"prompt": prompt, "chosen": p["chosen"][0]["content"], "rejected": p["rejected"][0]["content"]}
            for prompt, p in zip(prompts, pairs, strict=True)
        ]
    )
    model, reference = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32) for _ in range(2))
    config = DPOConfig(**trl_settings(tmp_path), beta=BETA)
    trainer = DPOTrainer(model=model, ref_model=reference, args=config, train_dataset=data, processing_class=tokenizer)
    theirs = losses_of(trainer)
    assert ours == pytest.approx(theirs, abs=2e-4)
    assert theirs[-1] < theirs[0]
