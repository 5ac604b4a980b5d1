"""Whether micro-batches that we choose fit: every method on one GPU, in a process of its own, to its memory's peak.

A random bf16 Llama (default Llama-3-8B's shape), rows of varied length (log-normal, mean about 410 tokens, at most
2,048), two steps of 40. Prints the peak beside what was free, and what is estimated for the least that is needed::

    PYTHONPATH=.:api:jobs python benchmarks/fits.py [--only lora dpo] [--layers 32] [--hidden 4096]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from sharding import make_model

BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("sft", {}),
    "dora": ("sft", {"lora": {"variant": "dora"}}),
    "qdora": ("sft", {"method": "qlora", "lora": {"variant": "dora"}}),
    "pissa": ("sft", {"lora": {"variant": "pissa"}}),
    "qlora": ("sft", {"method": "qlora"}),
    "int8": ("sft", {"method": "qlora", "quantization": {"type": "int8", "doubleQuant": False}}),
    "ia3": ("sft", {"method": "ia3"}),
    "prefix": ("sft", {"method": "prefixTuning"}),
    "prompt": ("sft", {"method": "promptTuning"}),
    "bottleneck": ("sft", {"method": "bottleneck"}),
    "qat": ("sft", {"qat": {"type": "Q4_0"}}),
    "dpo": ("preference", {}),
    "kto": ("preference", {"loss": "kto"}),
    "simpo": ("preference", {"loss": "simpo"}),
}


def work(directory: Path, name: str) -> dict[str, Any]:
    """What was measured."""
    import numpy as np
    import torch

    from finetune_api.defaults import resolve_added, resolve_lora, resolve_qat, resolve_quantization, resolve_training
    from finetune_api.types import Checkpoint, Preference, Sft, Validation
    from finetune_jobs import anatomy, estimate
    from finetune_jobs.run.context import Context
    from finetune_jobs.run.preemption import Stop
    from finetune_jobs.run.progress import Progress
    from finetune_jobs.stages.preference import objective_of
    from finetune_jobs.training import memory, schedule
    from finetune_jobs.training.collators import Example, Tokens
    from finetune_jobs.training.distributed import Peers
    from finetune_jobs.training.loop import Loop, Sets
    from finetune_jobs.training.losses import Supervised, reference_log_probs
    from finetune_jobs.training.model import compute_type, device_of, load
    from finetune_jobs.training.qat import Rounding
    from finetune_jobs.training.trainer import Settings

    class Unsaving(Loop):
        """There is no store."""

        def _save_due(self) -> bool:
            return False

    kind, written = BLOCKS[name]
    told = {**written, "training": {"maxSteps": 2, "batchSize": 40, "loggingSteps": 1}}
    block = {"sft": Sft, "preference": Preference}[kind].model_validate(told, strict=False)
    peers = Peers()
    device = device_of(peers)
    policy = load(
        directory, method=block.method, lora=resolve_lora(block), added=resolve_added(block), adapter=None,
        quantization=resolve_quantization(block), compute=compute_type("auto", device), device=device, seed=1,
    )  # fmt: skip
    if (wanted := resolve_qat(block)) is not None:
        policy = replace(policy, rounding=Rounding(policy.base, wanted, "qat"))
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    rng = np.random.default_rng(0)
    pairs = kind == "preference" and name != "kto"

    def sequence() -> Tokens:
        length = int(np.clip(rng.lognormal(5.7, 0.8), 16, 2048))
        return Tokens(rng.integers(0, 128000, length).astype(np.int32), np.arange(length) >= length // 4)

    rows = [Example(tuple(sequence() for _ in range(2 if pairs else 1))) for _ in range(80)]
    if name == "kto":
        rows = [replace(row, desirable=bool(n % 2)) for n, row in enumerate(rows)]
    training = resolve_training(block)
    plan = memory.plan(policy, training, rows, name, peers)
    away: Any = None  # no store
    ctx = Context(away, away, directory / "work", None, Progress(None), Stop(), {}, away)
    ahead = schedule.plan(len(rows), training, 1)
    if name in ("dpo", "kto"):
        steps = [list(ahead.batch(step)) for step in range(ahead.total_steps)]
        found = reference_log_probs(policy, rows, steps, plan.layout, peers, ctx.stop)
        rows = [replace(row, reference=tuple(map(float, known))) for row, known in zip(rows, found, strict=True)]
    objective = Supervised() if isinstance(block, Sft) else objective_of(block)
    settings = Settings(name, training, Checkpoint(), Validation(), 1)
    state = Unsaving(ctx, settings, policy, objective, Sets(rows, []), ahead, plan.layout, peers).fit(None)
    shape = estimate.read(anatomy.read_config(directory))
    gib = {
        "free at the start": free,
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "estimated for one row, recomputed": estimate.training_memory(shape, block, on_gpu=True).total,
    }
    return {
        "losses": [round(point["loss"], 4) for point in state.curve],
        "tokens/s": round(state.tokens / state.seconds),
        "tokens a micro-batch": plan.layout.tokens,
        "recomputed": plan.gradient_checkpointing,
        "liger": policy.liger,
        **{f"GiB {what}": round(size / 2**30, 2) for what, size in gib.items()},
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--work", default="")
    given = parser.parse_args()
    if given.work:
        print(f"{given.work}: {json.dumps(work(given.directory, given.work))}", flush=True)
        return
    with tempfile.TemporaryDirectory(dir=given.directory) as scratch:
        make_model(Path(scratch), given.layers, given.hidden)
        from tests.tinymodel import byte_tokenizer

        byte_tokenizer().save_pretrained(scratch)  # a prompt of words begins with theirs
        for name in given.only:
            subprocess.run([sys.executable, __file__, "--work", name, "--directory", scratch], check=False)


if __name__ == "__main__":
    main()
