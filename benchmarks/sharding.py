"""LoRA over several GPUs: each with the whole base (ddp) against each with a share of it (fsdp).

A random bf16 Llama (default Llama-3-8B's shape), r 16 on all linear layers, rows of varied length (log-normal, mean
about 410 tokens, at most 2,048). One process for each GPU, the stage's own model loading, layout and loop. Prints for
each way the loss curve's ends, tokens a second, and per process what it holds after loading and at its peak::

    python benchmarks/sharding.py [--steps 20] [--processes 2] [--layers 32] [--directory /tmp]
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def make_model(directory: Path, layers: int, hidden: int) -> None:
    """Write a random model, one block a file."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    config.save_pretrained(directory)
    auto: Any = AutoModelForCausalLM  # from_config has no types
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files: dict[str, list[str]] = {}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for name in shapes:
        block = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{block}.safetensors", []).append(name)
    for file, names in files.items():
        tensors = {
            n: torch.ones(shapes[n], dtype=torch.bfloat16)
            if len(shapes[n]) == 1
            else (0.02 * torch.randn(shapes[n], device=device)).bfloat16().cpu()
            for n in names
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, names in files.items() for n in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@dataclass
class Unsaved:
    """In place of the store: what would be saved is dropped."""

    def save(self, step: int, directory: Path, metrics: object) -> None:
        """Forget it."""
        shutil.rmtree(directory)

    def drain(self) -> bool:
        """Nothing waits."""
        return True


def work(directory: Path, how: str, steps: int) -> None:
    """One process; writes what it measured."""
    import numpy as np
    import torch

    from finetune_api.defaults import resolve_lora, resolve_training
    from finetune_api.types import Checkpoint, Sft, Validation
    from finetune_jobs.run.context import Context
    from finetune_jobs.run.preemption import Stop
    from finetune_jobs.run.progress import Progress
    from finetune_jobs.training import distributed, memory, schedule
    from finetune_jobs.training.collators import Example, Tokens
    from finetune_jobs.training.loop import Loop, Sets
    from finetune_jobs.training.losses import Supervised
    from finetune_jobs.training.model import compute_type, device_of, load
    from finetune_jobs.training.sharding import choose
    from finetune_jobs.training.trainer import Settings

    peers = distributed.connect()
    device = device_of(peers)
    written = {"distributed": how, "maxSteps": steps, "batchSize": 40, "loggingSteps": 1}
    block = Sft.model_validate({"training": written})
    compute = compute_type("auto", device)
    sharding = choose(block, directory, device, peers)
    policy = load(
        directory, method=block.method, lora=resolve_lora(block), quantization=None, adapter=None, compute=compute,
        device=device, seed=1, sharding=sharding,
    )  # fmt: skip
    loaded = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.7, 0.8, 40 * steps), 16, 2048).astype(int)
    train = [Example((Tokens(rng.integers(0, 128000, n).astype(np.int32), np.arange(n) >= n // 4),)) for n in lengths]
    training = resolve_training(block)
    plan = memory.plan(policy, training, train, "sft", peers)
    away: Any = Unsaved()
    ctx = Context(away, away, directory / f"work-{peers.rank}", None, Progress(None), Stop(), {}, away)
    settings = Settings("sft", training, Checkpoint(), Validation(), 1)
    ahead = schedule.plan(len(train), training, 1)
    loop = Loop(ctx, settings, policy, Supervised(), Sets(train, []), ahead, plan.layout, peers)
    state = loop.fit(None)
    peers.leave()
    curve = [round(p["loss"], 4) for p in state.curve]
    figures = {
        "shards": policy.shards,
        "first losses": curve[:3],
        "last loss": curve[-1],
        "tokens/s": round(state.tokens / state.seconds),
        "tokens a micro-batch": plan.layout.tokens,
        "recomputed": plan.gradient_checkpointing,
        "parameters held": policy.held,
        "GiB loaded": round(loaded / 2**30, 2),
        "GiB peak": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
    }
    (directory / f"{how}-{peers.rank}.json").write_text(json.dumps(figures))


def launch(directory: Path, how: str, steps: int, processes: int) -> None:
    """Start the processes and print what they measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{k: str(v) for k, v in {**place, **meet}.items()}}
        command = [sys.executable, __file__, "--work", how, "--steps", str(steps), "--directory", str(directory)]
        workers.append(subprocess.Popen(command, env=environment))
    codes = [worker.wait() for worker in workers]
    print(f"{how}: exit codes {codes}")
    for rank in range(processes):
        if (file := directory / f"{how}-{rank}.json").exists():
            print(f"  process {rank}: {file.read_text()}", flush=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--work", default="")
    given = parser.parse_args()
    if given.work:
        work(given.directory, given.work, given.steps)
        return
    with tempfile.TemporaryDirectory(dir=given.directory) as scratch:
        make_model(Path(scratch), given.layers, given.hidden)
        for how in ("ddp", "fsdp"):
            launch(Path(scratch), how, given.steps, given.processes)


if __name__ == "__main__":
    main()
