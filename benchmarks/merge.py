"""Merge a LoRA adapter: ours against PEFT's ``merge_and_unload`` and ``save_pretrained``.

A random bf16 Llama (default 1.2 billion parameters, 2.4 GB) with an adapter of rank 16 on every linear layer. Each side
runs in a process of its own that has imported what it needs, so that neither pays for the other's memory; the wall time
is from the files on the disk to the files on the disk, base load included. Ours includes its check of every module.
The page cache is warm for both. Prints a table::

    python benchmarks/merge.py [--layers 22] [--hidden 2048] [--rounds 2] [--directory /tmp]
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def make_model(directory: Path, hidden: int, layers: int) -> int:
    """Write a base and an adapter; gives the number of parameters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        vocab_size=32000,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    model.save_pretrained(directory / "base", max_shard_size="4GB")
    tuned: Any = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tuned.save_pretrained(directory / "adapter")
    return count


def ours(directory: Path, output: Path) -> None:
    """Streamed merge, every merged module checked."""
    import torch

    from finetune_jobs.merging.merge import merge

    merge(directory / "base", directory / "adapter", output, torch.bfloat16, 4 << 30)


def theirs(directory: Path, output: Path) -> None:
    """What PEFT's documentation shows."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory / "base", dtype="auto")
    tuned: Any = PeftModel.from_pretrained(model, str(directory / "adapter"))
    tuned.merge_and_unload().save_pretrained(output, max_shard_size="4GB")


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def _measure(which: str, directory: Path, output: Path, answer: Connection) -> None:
    import peft  # noqa: F401 - both sides start with everything imported
    import transformers

    from finetune_jobs.merging import merge  # noqa: F401

    transformers.logging.disable_progress_bar()
    output.mkdir()
    peak, done = [_anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak.append(_anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    wall, cpu = time.perf_counter(), time.process_time()
    (ours if which == "ours" else theirs)(directory, output)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done.set()
    watcher.join()
    rss = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    answer.send({"wall": wall, "cpu": cpu, "rss": rss, "anonymous": max(peak), "anonymousBefore": peak[0]})


def run(which: str, directory: Path) -> dict[str, float]:
    """One merge in a fresh process."""
    output = directory / which
    shutil.rmtree(output, ignore_errors=True)
    os.sync()  # neither side writes back the other's pages
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_measure, args=(which, directory, output, send))
    process.start()
    send.close()
    try:
        figures: dict[str, float] = receive.recv()
    finally:
        process.join()
    return figures


def main() -> None:
    """Make the model, run both sides in turn, print the table, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each; the fastest counts")
    parser.add_argument("--directory", type=Path, help="where about four times the model's size is free")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        directory = Path(scratch)
        parameters = make_model(directory, arguments.hidden, arguments.layers)
        runs: dict[str, list[dict[str, float]]] = {"peft": [], "ours": []}
        for _ in range(arguments.rounds):
            for which in runs:
                runs[which].append(run(which, directory))
    best = {which: min(figures, key=lambda f: f["wall"]) for which, figures in runs.items()}
    if arguments.json:
        print(json.dumps({"parameters": parameters, "runs": runs}))
        return
    print(f"{parameters / 1e9:.2f} billion parameters, bf16, LoRA r=16 on all linear layers, {os.cpu_count()} cores")
    print(f"{'':6}{'wall s':>9}{'cpu s':>9}{'peak RSS MiB':>14}{'peak anonymous MiB':>20}")
    for which, f in best.items():
        print(f"{which:6}{f['wall']:9.2f}{f['cpu']:9.2f}{f['rss'] / 2**20:14.0f}{f['anonymous'] / 2**20:20.0f}")
    print(f"ours takes {best['ours']['wall'] / best['peft']['wall']:.2f} of the wall time")


if __name__ == "__main__":
    main()
