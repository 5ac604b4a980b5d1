"""PPO of a model with a reward model of the same size on one GPU: the memory, and what the estimate says of it.

A random bf16 Llama (default Llama-3-8B's shape), LoRA of r 16 on all linear layers; policy, critic and reference share
one base, the judge has its own. The stage's own loading, layout and steps; prompts and answers of 128 tokens each::

    PYTHONPATH=.:api:jobs python benchmarks/ppo.py [--layers 32] [--hidden 4096] [--steps 3] [--batch 32]
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from sharding import make_model


def work(directory: Path, steps: int, batch: int) -> dict[str, Any]:
    """What was measured."""
    import numpy as np
    import torch
    from tests.tinymodel import byte_tokenizer

    from finetune_api.defaults import kl_coefficient, resolve_lora, resolve_training
    from finetune_api.types import Checkpoint, Reward, Rl, Validation
    from finetune_jobs import anatomy, estimate
    from finetune_jobs.run.context import Context
    from finetune_jobs.run.preemption import Stop
    from finetune_jobs.run.progress import Progress
    from finetune_jobs.stages.rl import algorithm_of
    from finetune_jobs.training import memory, schedule, scoring
    from finetune_jobs.training.collators import Example, Tokens
    from finetune_jobs.training.distributed import Peers
    from finetune_jobs.training.model import compute_type, device_of, load, new_head
    from finetune_jobs.training.reinforcement import Reinforcement, Sampling
    from finetune_jobs.training.trainer import Settings

    class Unsaving(Reinforcement):
        """There is no store."""

        def _save_due(self) -> bool:
            return False

    peers = Peers()
    device = device_of(peers)
    training = {"maxSteps": steps, "batchSize": batch, "loggingSteps": 1, "maxLength": 1024, "learningRate": 1e-5}
    written = {"rewards": [{"stage": "judge"}], "generation": {"maxNewTokens": 128}, "training": training}
    block = Rl.model_validate({"algorithm": "ppo", **written}, strict=False)
    judging = Reward.model_validate({}, strict=False)
    base = {"quantization": None, "adapter": None, "compute": compute_type("auto", device), "device": device, "seed": 1}
    policy = load(directory, method=block.method, lora=resolve_lora(block), **base)
    policy = replace(policy, head=new_head(policy.base, device, bias=True))
    one = torch.cuda.memory_allocated()
    judge = load(directory, method=judging.method, lora=resolve_lora(judging), scores=True, **base)
    for parameter in judge.trainable:
        parameter.requires_grad_(False)
    judge.model.eval()
    both = torch.cuda.memory_allocated()
    rng = np.random.default_rng(0)
    prompts = [scoring.Prompt([int(i) for i in rng.integers(3, 350, 128)]) for _ in range(batch * steps)]
    settings = Settings("rl", resolve_training(block), Checkpoint(), Validation(), 1)
    longest = Example((Tokens(np.zeros(1024, np.int32), np.arange(1024) >= 896),))
    plan = memory.plan(policy, settings.training, [longest], "rl", peers)
    away: Any = None  # no store
    ctx = Context(away, away, directory / "work", None, Progress(None), Stop(), {}, away)
    ahead = schedule.plan(len(prompts), settings.training, 1)
    loop = Unsaving(
        ctx, settings, policy, algorithm_of(block), {"train": prompts, "eval": []}, [scoring.judged("judge", 1, judge)],
        Sampling(128, 1.0, 1), kl_coefficient(block), byte_tokenizer(), ahead,
        plan.layout, peers,
    )  # fmt: skip
    state = loop.fit(None)
    shown = ("loss", "reward", "kl", "length")
    shape = estimate.read(anatomy.read_config(directory))
    expected = estimate.training_memory(shape, block, on_gpu=True)
    return {
        "steps": [{name: round(point[name], 4) for name in shown} for point in state.curve],
        "seconds a step": round(state.seconds / state.step, 1),
        "recomputed": plan.gradient_checkpointing,
        "tokens a micro-batch": plan.layout.tokens,
        "GiB of policy and critic": round(one / 2**30, 2),
        "GiB with the judge": round(both / 2**30, 2),
        "GiB peak": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "GiB estimated for one row, recomputed": round(expected.total / 2**30, 2),
        "card": torch.cuda.get_device_name(),
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch), given.layers, given.hidden)
        print(json.dumps(work(Path(scratch), given.steps, given.batch), indent=1))


if __name__ == "__main__":
    main()
