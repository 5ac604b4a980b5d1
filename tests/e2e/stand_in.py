"""A stage for the runner's tests: it keeps the contract of a stage's process, and does as ``$WORLD`` says.

``$WORLD/faults/<stage>`` holds a JSON list, one entry for each start: an exit code, ``"none"`` (exit 0 without a
result), ``"kill"`` (SIGKILL of itself), ``"hang"`` (heeds no SIGTERM), ``"leak"`` (leaves a process behind),
``"fill"`` (fills the disk of $FINETUNE_HOME with a file and fails without a word).
``$WORLD/steps/<stage>`` is how many steps it takes, by default 2. ``$WORLD/committed/<stage>`` is its result, once it
has one; ``$WORLD/events`` gets a line for all it does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

WORLD = Path(os.environ["WORLD"])
STEP_SECONDS = float(os.environ.get("STEP_SECONDS", "0.01"))


def event(*words: object) -> None:
    """One line, written at once."""
    with (WORLD / "events").open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def replace(path: Path, content: object) -> None:
    """Write a file as a whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


def main() -> int:
    """The life of a stage: look for a result, work step by step from the last checkpoint, commit, say so."""
    stopping = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    run = json.loads(Path(sys.argv[1]).read_text())
    stage = run["stage"]
    fault = next_fault(stage)
    event("start", stage, run["attempt"], os.getpid())
    print(
        json.dumps({"time": "2026-01-01T00:00:00.000+00:00", "level": "info", "message": f"{stage} says hello"}),
        flush=True,
    )
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "leak":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        event("leak", child.pid)
    if fault == "fill":
        with (
            suppress(OSError),
            (Path(os.environ["FINETUNE_CACHE"]).parent / "filler").open("wb", buffering=0) as filler,
        ):
            while True:
                filler.write(bytes(512))
        return 69
    if isinstance(fault, int):
        return leave(fault, {"error": f"spec.pipeline: the stand-in was told to fail with {fault}"})
    result = {"digest": f"digest-{stage}", "manifest": f"p/default/{run['job']['name']}/{stage}/manifest.json"}
    committed = WORLD / "committed" / stage
    if committed.exists():
        event("found", stage)
        return leave(0, {"result": {**result, "reused": True}})
    checkpoint = WORLD / "checkpoints" / stage
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    asked = WORLD / "steps" / stage
    steps = int(asked.read_text()) if asked.exists() else 2
    while step < steps or fault == "hang":
        time.sleep(STEP_SECONDS)
        step += 1
        event("step", stage, step)
        progress = {"step": step, "totalSteps": steps, "metrics": [{"name": "loss", "value": "1.5"}]}
        replace(Path(os.environ["FINETUNE_PROGRESS_FILE"]), progress)
        if stopping and fault != "hang":
            replace(checkpoint, step)
            event("saved", stage, step)
            return leave(75, {"error": "saved and stopped"})
    if fault == "none":
        return 0
    replace(committed, result)
    event("committed", stage)
    return leave(0, {"result": {**result, "figures": {"seconds": 0.5, "cpuSeconds": 0.25}}})


def next_fault(stage: str) -> int | str | None:
    """Take the first entry of the stage's list."""
    path = WORLD / "faults" / stage
    faults: list[int | str | None] = json.loads(path.read_text()) if path.exists() else []
    if not faults:
        return None
    replace(path, faults[1:])
    return faults[0]


def leave(code: int, message: object) -> int:
    """The termination message, then the exit code."""
    Path(os.environ["FINETUNE_TERMINATION_LOG"]).write_text(json.dumps(message))
    return code


if __name__ == "__main__":
    sys.exit(main())
