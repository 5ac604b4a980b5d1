"""Whose functions compute the layers: transformers', some by Liger, or Unsloth's; under the same loop, on one GPU.

A random bf16 Llama (default: 28 layers of width 3072, 3.4 billion parameters), r 16 on all linear layers, packed steps
of about 16,000 tokens in rows of varied length (log-normal, mean about 410 tokens, at most 2,048). Prints for each
of them, in a process of its own, the first losses, tokens a second of the steps after the first three, and the peak::

    PYTHONPATH=.:api:jobs python benchmarks/backends.py [--method qlora] [--kernels liger] [--layers 28]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sharding import make_model

KERNELS = ("transformers", "liger", "unsloth")


def work(directory: Path, kernels: str, method: str, steps: int, recompute: str) -> None:
    """With one of ``KERNELS``; prints what it measured."""
    from finetune_jobs.training import unsloth

    if kernels == "unsloth" and (reason := unsloth.start()):  # before transformers
        sys.exit(f"unsloth: {reason}")
    import numpy as np
    import torch

    from finetune_api.defaults import resolve_lora, resolve_quantization, resolve_training
    from finetune_api.types import Sft
    from finetune_jobs.training import liger, memory
    from finetune_jobs.training.collators import Example, Tokens, collate
    from finetune_jobs.training.distributed import Peers
    from finetune_jobs.training.losses import Supervised, token_log_probs
    from finetune_jobs.training.model import compute_type, device_of, load
    from finetune_jobs.training.optimizer import Optimizer

    if kernels == "transformers":
        liger.use = lambda _: "not asked for"
    checkpointing = {"auto": "auto", "yes": True, "no": False}[recompute]
    backend = "unsloth" if kernels == "unsloth" else "transformers"
    training = {"backend": backend, "optimizer": "adamw", "gradientCheckpointing": checkpointing}
    block = Sft.model_validate({"method": method, "training": training}, strict=False)
    peers = Peers()
    device = device_of(peers)
    policy = load(
        directory, method=block.method, lora=resolve_lora(block), quantization=resolve_quantization(block),
        adapter=None, compute=compute_type("auto", device), device=device, seed=1, backend=backend,
    )  # fmt: skip
    if policy.liger != (kernels == "liger"):
        sys.exit(f"liger: {liger.unusable()}")
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.7, 0.8, 40 * steps), 16, 2048).astype(int)
    rows = [Example((Tokens(rng.integers(0, 128000, n).astype(np.int32), np.arange(n) >= n // 4),)) for n in lengths]
    settings = resolve_training(block)
    plan = memory.plan(policy, settings, rows, "sft", peers)
    optimizer, objective = Optimizer(policy, settings), Supervised()
    policy.model.train()
    losses, norms, done, seconds = [], [], 0, 0.0
    for step in range(steps):
        examples = rows[40 * step : 40 * (step + 1)]
        weight = sum(objective.weight(e) for e in examples)
        torch.cuda.synchronize()
        started, total = time.monotonic(), 0.0
        for group in plan.layout.split(examples):
            batch = collate([examples[i] for i in group], packed=plan.layout.packed).to(device)
            loss, _ = objective.loss(token_log_probs(policy, batch), batch)
            optimizer.backward(loss / weight)
            total += float(loss.detach())
        norms.append(optimizer.step(2e-4))
        losses.append(total / weight)
        if step >= 3:  # until then kernels are compiled and chosen
            seconds += time.monotonic() - started
            done += sum(e.tokens for e in examples)
    figures = {
        "losses": [round(loss, 5) for loss in losses[:4]],
        "gradient norms": [round(norm or 0.0, 5) for norm in norms[:4]],
        "tokens/s": round(done / seconds),
        "GiB peak": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "packed": plan.layout.packed,
        "tokens a micro-batch": plan.layout.tokens,
        "recomputed": plan.gradient_checkpointing,
        "card": torch.cuda.get_device_name(),
    }
    print(f"{method}, {kernels}: {json.dumps(figures)}", flush=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", nargs="+", choices=("lora", "qlora"), default=["lora", "qlora"])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--recompute", choices=("auto", "yes", "no"), default="auto")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--work", default="")
    given = parser.parse_args()
    if given.work:
        work(given.directory, given.work, given.method[0], given.steps, given.recompute)
        return
    from tests.tinymodel import byte_tokenizer

    with tempfile.TemporaryDirectory(dir=given.directory) as scratch:
        make_model(Path(scratch), given.layers, given.hidden)
        byte_tokenizer().save_pretrained(scratch)  # nothing is read with it, but Unsloth wants one
        for method in given.method:
            for kernels in given.kernels:
                told = ["--work", kernels, "--method", method, "--steps", str(given.steps), "--directory", scratch]
                subprocess.run([sys.executable, __file__, *told, "--recompute", given.recompute], check=False)


if __name__ == "__main__":
    main()
