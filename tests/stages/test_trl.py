"""TRL as a second opinion: another implementation of the same papers must come to the same losses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.stages.training_job import JobMaker, Row, chat_rows, label_rows, pair_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from finetune_jobs.data.encode import Encoded, EncodedPair, encode, encode_pair
from finetune_jobs.training import schedule
from finetune_jobs.training.grpo import GRPO, group_advantages
from finetune_jobs.training.rloo import leave_one_out
from finetune_jobs.training.rollout import Rollouts

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


def test_ipo_learns_as_trl_does(make_job: JobMaker, tiny_model: Path, tmp_path: Path) -> None:
    """TRL divides log-ratios by the answers' tokens, the paper does not: where all answers have n tokens, its loss at
    ``beta * n`` is ours at ``beta`` divided by the square of n.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows, length = pairs_of_one_length(tokenizer)
    # Gradients differ by n^2 too: Adam does not see it, clipping would.
    settings = {**SETTINGS, "maxGradNorm": 1000, "learningRate": 2e-4}
    block = {"loss": "ipo", "method": "full", "beta": BETA, "training": settings}
    job = make_job({"preference": rows}, pipeline=[{"name": "ipo", "preference": block}])
    ours = [point["loss"] for point in job.log(job.run("ipo"))["curve"]]

    data = Dataset.from_list(
        [
            {
                "prompt": tokenizer.apply_chat_template(p["prompt"], add_generation_prompt=True, tokenize=False),
                "chosen": p["chosen"][0]["content"],
                "rejected": p["rejected"][0]["content"],
            }
            for p in rows
        ]
    )
    model, reference = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32) for _ in range(2))
    changed = {**trl_settings(tmp_path), "max_grad_norm": 1000.0, "learning_rate": 2e-4}
    config = DPOConfig(**changed, beta=BETA * length, loss_type="ipo")
    trainer = DPOTrainer(model=model, ref_model=reference, args=config, train_dataset=data, processing_class=tokenizer)
    theirs = [loss * length**2 for loss in losses_of(trainer)]
    assert ours[0] == pytest.approx(1 / (4 * BETA**2))
    assert ours == pytest.approx(theirs, rel=2e-3)
    assert theirs[-1] < theirs[0]


def pairs_of_one_length(tokenizer: Any) -> tuple[list[Row], int]:
    """Eight pairs whose answers all have as many tokens, stop token included."""
    rows = pair_rows(8)
    for number, row in enumerate(rows):
        row["chosen"] = [{"role": "assistant", "content": "xyz"[number % 3] * 2 + "qk"}]
        row["rejected"] = [{"role": "assistant", "content": "zq" + "ykx"[number % 3] * 2}]
    encoded = [encode_pair(row, tokenizer, max_length=512, overlong="drop") for row in rows]  # type: ignore[arg-type]
    lengths = {len(ids) for e in encoded if isinstance(e, EncodedPair) for ids in (e.chosen_ids, e.rejected_ids)}
    [length] = lengths
    return rows, length


def test_kto_learns_as_trl_does(
    make_job: JobMaker, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same loss and divergence at every step. TRL puts each prompt before the answer of the row before it, we that
    of the row after it: TRL is given the rows backwards, and we keep one order in every epoch.
    """
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    monkeypatch.setattr(schedule, "_order", lambda examples, seed, epoch: list(range(examples)))
    rows = label_rows(8)
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows)
    block = {"loss": "kto", "method": "full", "beta": BETA, "kto": {"desirableWeight": 1.5}, "training": SETTINGS}
    job = make_job({"preference": rows}, pipeline=[{"name": "kto", "preference": block}])
    ours = job.log(job.run("kto"))["curve"]

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    data = Dataset.from_list(
        [
            {
                "prompt": tokenizer.apply_chat_template(r["messages"][:1], add_generation_prompt=True, tokenize=False),
                "completion": r["messages"][1]["content"],
                "label": r["label"],
            }
            for r in reversed(rows)
        ]
    )
    model, reference = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32) for _ in range(2))
    config = KTOConfig(**trl_settings(tmp_path), beta=BETA, desirable_weight=1.5, train_sampling_strategy="sequential")
    trainer = KTOTrainer(model=model, ref_model=reference, args=config, train_dataset=data, processing_class=tokenizer)
    theirs = losses_of(trainer)
    divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert [point["loss"] for point in ours] == pytest.approx(theirs, abs=5e-4)
    assert [point["kl"] for point in ours] == pytest.approx(divergences, abs=5e-3)
    assert theirs[-1] < theirs[0]
    assert divergences[-1] > 0


def test_a_reward_model_learns_as_trls_does(make_job: JobMaker, tiny_model: Path, tmp_path: Path) -> None:
    """From the same head on, the same loss at every step, centering included."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    pairs = pair_rows(8)
    block = {"method": "full", "centerRewardsCoefficient": 0.05, "training": SETTINGS}
    job = make_job({"preference": pairs}, pipeline=[{"name": "judge", "reward": block}])
    ours = [point["loss"] for point in job.log(job.run("judge"))["curve"]]

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = "<|endoftext|>"  # theirs must not take the stop token for padding: ours reads rewards there
    prompts = [tokenizer.apply_chat_template(p["prompt"], add_generation_prompt=True, tokenize=False) for p in pairs]
    data = Dataset.from_list(
        [
            {side: prompt + pair[side][0]["content"] + "<|im_end|>" for side in ("chosen", "rejected")}
            for prompt, pair in zip(prompts, pairs, strict=True)
        ]
    )
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    drawn = torch.randn((1, 64), generator=torch.Generator().manual_seed(job.spec.seed))
    model.score.weight.data = drawn / 65**0.5
    config = RewardConfig(**trl_settings(tmp_path), center_rewards_coefficient=0.05)
    theirs = losses_of(RewardTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer))
    assert ours == pytest.approx(theirs, abs=2e-4)
    assert theirs[-1] < theirs[0]


ANSWERS, NEW_TOKENS = 4, 5


def worth(ids: list[int]) -> float:
    """Of an answer: a share of its tokens."""
    return sum(token % 2 for token in ids) / NEW_TOKENS


def online(trainer: Any, config: Any, directory: Path, model: Path, **settings: Any) -> list[dict[str, Any]]:
    """Two updates by TRL on the same answers. For each what its loss was computed from, answers to the same prompt side
    by side, the log-probabilities of the tokens by a pass of our own, and the loss.
    """
    from datasets import Dataset

    seen: list[dict[str, Any]] = []

    class Watched(trainer):  # type: ignore[misc]
        def _compute_loss(self, policy: Any, inputs: Any) -> Any:
            loss = super()._compute_loss(policy, inputs)
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            with torch.no_grad():
                logits = policy(input_ids=ids, attention_mask=mask).logits[:, -NEW_TOKENS - 1 : -1]
            log_probs = logits.double().log_softmax(-1).gather(2, inputs["completion_ids"][..., None])[..., 0]
            # TRL mixes the answers to different prompts.
            order = sorted(range(len(ids)), key=lambda row: inputs["prompt_ids"][row].tolist())
            found = {name: value[order] for name, value in inputs.items() if getattr(value, "ndim", 0)}
            seen.append({**found, "log_probs": log_probs[order], "loss": float(loss.detach())})
            return loss

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = "<|endoftext|>"
    arguments = {**trl_settings(directory), "max_steps": 2, "num_iterations": 2, "learning_rate": 1e-2}
    Watched(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=lambda completion_ids, **_: [worth(ids) for ids in completion_ids],
        args=config(**arguments, num_generations=ANSWERS, max_completion_length=NEW_TOKENS, **settings),
        train_dataset=Dataset.from_list([{"prompt": word} for word in ("one", "two", "three", "four")]),
        processing_class=tokenizer,
    ).train()
    assert len(seen) == 2
    return seen


def rolled(inputs: dict[str, Any], old: Any, reference: Any) -> Rollouts:
    """Their answers as ours."""
    mask = inputs["completion_mask"].bool().numpy()
    rewards = [worth(ids[m].tolist()) for ids, m in zip(inputs["completion_ids"].numpy(), mask, strict=True)]
    log_probs = [np.asarray(found, np.float64) * mask for found in (old, reference)]
    assert np.ptp(rewards) > 0
    return Rollouts(mask, *log_probs, np.zeros(mask.shape), np.array(rewards), ANSWERS)


def test_grpo_is_trls(tiny_model: Path, tmp_path: Path) -> None:
    """Advantages and loss on answers of theirs: before an update, and after one, with ratio and divergence at work."""
    from trl import GRPOConfig, GRPOTrainer

    # Their default weights the divergence by the ratio, which the paper does not.
    paper = {"loss_type": "grpo", "use_bias_correction_kl": False}
    seen = online(GRPOTrainer, GRPOConfig, tmp_path, tiny_model, beta=0.04, **paper)
    algorithm = GRPO(kl=0.04)
    for inputs in seen:
        rollouts = rolled(inputs, inputs["old_per_token_logps"], inputs["ref_per_token_logps"])
        assert group_advantages(rollouts) == pytest.approx(inputs["advantages"].numpy(), abs=1e-4)
        mask = inputs["completion_mask"].bool()
        tokens = {name: torch.from_numpy(t)[mask] for name, t in algorithm.targets(rollouts, 0.04).items()}
        ours, _ = algorithm.loss(inputs["log_probs"][mask], torch.zeros(int(mask.sum())), tokens)
        assert float(ours) / algorithm.weight(rollouts) == pytest.approx(inputs["loss"], abs=1e-4)
    assert seen[1]["loss"] != pytest.approx(seen[0]["loss"], abs=1e-3)


def test_rloo_has_trls_advantages(tiny_model: Path, tmp_path: Path) -> None:
    """What an answer is compared with, on answers of theirs; at no distance from the reference there is no price."""
    from trl import RLOOConfig, RLOOTrainer

    inputs = online(RLOOTrainer, RLOOConfig, tmp_path, tiny_model, beta=0.05)[0]
    rollouts = rolled(inputs, inputs["log_probs"], inputs["log_probs"])
    assert leave_one_out(rollouts, 0.05) == pytest.approx(inputs["advantages"].numpy(), abs=1e-4)
