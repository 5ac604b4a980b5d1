"""LoRA or full training over several GPUs: each with the whole model (ddp) against each with a share of it (fsdp).

A random bf16 Llama (default Llama-3-8B's shape), r 16 on all linear layers or all weights, rows of varied length
(log-normal, mean about 410 tokens, at most 2,048). One process for each GPU, the stage's own model loading, layout and
loop. Prints for each way the loss curve's ends, tokens a second, and per process what it holds after loading, what its
optimizer holds, and its peak beside what the estimate says of it::

    python benchmarks/sharding.py [--method full] [--ways fsdp] [--steps 20] [--processes 2] [--layers 32] [--save]

Full training of 8B fits no 80 GB GPU whole: ``--method full --ways fsdp``. ``--save`` also writes one checkpoint, reads
it back and writes the model, and tells the seconds; it needs 12 bytes a parameter of disk, and 4 more.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
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


def work(directory: Path, method: str, how: str, steps: int, save: bool) -> None:
    """One process; writes what it measured."""
    import numpy as np
    import torch

    from finetune_api.defaults import resolve_lora, resolve_training
    from finetune_api.types import Checkpoint, Sft, Validation
    from finetune_jobs import anatomy, estimate
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

    class Unsaving(Loop):
        """A checkpoint of full training would take longer than the steps."""

        def _save_due(self) -> bool:
            return False

    peers = distributed.connect()
    device = device_of(peers)
    written = {"distributed": how, "maxSteps": steps, "batchSize": 40, "loggingSteps": 1}
    block = Sft.model_validate({"method": method, "training": written}, strict=False)
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
    away: Any = None  # no store
    ctx = Context(away, away, directory / f"work-{peers.rank}", None, Progress(None), Stop(), {}, away)
    settings = Settings("sft", training, Checkpoint(), Validation(), 1)
    ahead = schedule.plan(len(train), training, 1)
    loop = Unsaving(ctx, settings, policy, Supervised(), Sets(train, []), ahead, plan.layout, peers)
    state = loop.fit(None)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    seconds = times(directory / "saved", loop) if save else {}
    peers.leave()
    expected = estimate.training_memory(
        estimate.read(anatomy.read_config(directory)), block, on_gpu=device.type == "cuda", shards=policy.shards
    )
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
        "GiB of optimizer": round(loop.optimizer.size_bytes / 2**30, 2),
        "GiB peak": round(peak / 2**30, 2),
        "GiB estimated for one row, recomputed": round(expected.total / 2**30, 2),
        **seconds,
    }
    (directory / f"{how}-{peers.rank}.json").write_text(json.dumps(figures))


def times(directory: Path, loop: Any) -> dict[str, float]:
    """Seconds that a checkpoint takes to write and to read, and the 16-bit model to write."""
    from finetune_jobs.training import weights

    own = directory if loop.peers.first else None
    began = time.monotonic()
    if loop.peers.first or loop.policy.divided:
        weights.save_trained(loop.policy, own)
        loop.optimizer.save(own / "optimizer" if own else None)
    loop.peers.any(False)  # until all are there
    saved = time.monotonic()
    weights.load_trained(directory, loop.policy)
    loop.optimizer.load(directory / "optimizer")
    loop.peers.any(False)
    read = time.monotonic()
    if loop.peers.first or loop.policy.divided:
        weights.gather(loop.policy, directory / "model" if own else None)
    loop.peers.any(False)
    written = time.monotonic()
    figures = {"s to save": saved - began, "s to read": read - saved, "s for the model": written - read}
    return {name: round(value, 1) for name, value in figures.items()}


def launch(directory: Path, given: argparse.Namespace, how: str) -> None:
    """Start the processes and print what they measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, workers = given.processes, []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{k: str(v) for k, v in {**place, **meet}.items()}}
        told = ["--work", how, "--method", given.method, "--steps", str(given.steps), "--directory", str(directory)]
        command = [sys.executable, __file__, *told, *(["--save"] if given.save else [])]
        workers.append(subprocess.Popen(command, env=environment))
    codes = [worker.wait() for worker in workers]
    print(f"{given.method}, {how}: exit codes {codes}")
    for rank in range(processes):
        if (file := directory / f"{how}-{rank}.json").exists():
            print(f"  process {rank}: {file.read_text()}", flush=True)
    shutil.rmtree(directory / "saved", ignore_errors=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--ways", nargs="+", choices=("ddp", "fsdp"), default=["ddp", "fsdp"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--work", default="")
    given = parser.parse_args()
    if given.work:
        work(given.directory, given.method, given.work, given.steps, given.save)
        return
    with tempfile.TemporaryDirectory(dir=given.directory) as scratch:
        make_model(Path(scratch), given.layers, given.hidden)
        for how in given.ways:
            launch(Path(scratch), given, how)


if __name__ == "__main__":
    main()
