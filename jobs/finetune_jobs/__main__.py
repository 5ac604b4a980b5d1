"""``python -m finetune_jobs stage.json``: the command of every stage, in a pod and on one machine."""

# First of all, before anything slow: a SIGTERM that comes while the libraries load must not be lost.
from finetune_jobs.run import preemption

STOP = preemption.install()

import os  # noqa: E402 - see above

# Idle OpenMP threads spin by default: on busy cores that made a training step eight times as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Bars of libraries have no place in a log of JSON lines; progress.py says how far the stage is.
os.environ.setdefault("TQDM_DISABLE", "1")

import logging  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from finetune_api.stage import Termination  # noqa: E402
from finetune_jobs.run import launch, lifecycle, logs  # noqa: E402
from finetune_jobs.run.errors import StageError  # noqa: E402


def main() -> int:
    """Run the stage that the one argument describes; the exit code is the contract of ``run/errors.py``."""
    if len(sys.argv) != 2:
        print("usage: python -m finetune_jobs stage.json", file=sys.stderr)
        return 64
    path = Path(sys.argv[1])
    termination = lifecycle.termination_path()
    first = int(os.environ.get("RANK", "0")) == 0
    log = logs.Kept()
    code = 0
    try:
        run = lifecycle.load(path)
        logs.configure(run, log)
        processes = launch.processes(run)
        if launch.needed(processes):
            return launch.run(path, processes, STOP)
        message = lifecycle.execute(run, STOP, log=log)
    except BaseException as error:  # whatever it is, the operator needs its code and the user its words
        code, words = lifecycle.describe(error)
        logger = logging.getLogger("finetune.stage")
        # Our own errors say in words what happened and what to do; where it happened helps nobody but us.
        unforeseen = not isinstance(error, StageError)
        logger.log(logging.INFO if code == 75 else logging.ERROR, "%s", words, exc_info=unforeseen)
        lifecycle.write_termination(Termination(error=words[:3000]), termination)
    else:
        if first:
            lifecycle.write_termination(message, termination)
    if first:  # last of all, when everything is said
        log.upload()
    return code


if __name__ == "__main__":
    sys.exit(main())
