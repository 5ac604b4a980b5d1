"""``finetune run``: from the file to the last line."""

import sys
from pathlib import Path

from finetune_api.status import JobStatus
from finetune_api.types import FineTuneJob
from finetune_api.validate import FieldError, InvalidSpec
from finetune_cli import words
from finetune_cli.access import opened
from finetune_cli.checks import unusable_files
from finetune_cli.display import view
from finetune_cli.errors import COMPLETE, FAILED, InvalidJobError
from finetune_cli.ledger import JobLedger
from finetune_cli.manifest import load
from finetune_cli.processes import await_survivor, survivor
from finetune_cli.runner import GRACE_SECONDS, STAGE_COMMAND, Runner
from finetune_operator.plan.status import holds


def load_job(file: Path, namespace: str = "", endpoint: str = "", *, cluster: bool = False) -> FineTuneJob:
    """The job of a file that may run here, or on a cluster; InvalidJobError with every mistake otherwise.

    ``namespace`` and ``endpoint`` are those of the command line. Where the file names another namespace, that is a
    mistake as with kubectl.
    """
    try:
        job = load(file, cluster=cluster)
    except InvalidSpec as error:
        told = {breach.path for breach in error.errors}
        missing = unusable_files(error.rest) if error.rest else []
        raise InvalidJobError(str(file), [*error.errors, *(m for m in missing if m.path not in told)]) from None
    errors = unusable_files(job)
    if namespace and namespace != job.metadata.namespace:
        if "namespace" in job.metadata.model_fields_set:
            errors.append(
                FieldError("metadata.namespace", f"is {job.metadata.namespace}, the command line says {namespace}")
            )
        job = job.model_copy(update={"metadata": job.metadata.model_copy(update={"namespace": namespace})})
    if endpoint:
        storage = job.spec.storage.model_copy(update={"endpoint": endpoint})
        job = job.model_copy(update={"spec": job.spec.model_copy(update={"storage": storage})})
    if endpoint and not endpoint.startswith(("http://", "https://")):
        errors.append(FieldError("--store-endpoint", "must be a URL that begins with http:// or https://"))
    if errors:
        raise InvalidJobError(str(file), errors)
    return job


def run(
    job: FineTuneJob, file: Path, root: Path, *, quiet: bool, command: tuple[str, ...] = STAGE_COMMAND
) -> tuple[JobStatus, int]:
    """Run the job to its end; its last status and the command's exit code. ``quiet``: what is said goes to stderr."""
    ledger = JobLedger(root, job.metadata.namespace, job.metadata.name)
    stream = sys.stderr if quiet else sys.stdout
    with ledger.locked():
        for attempt in ledger.attempts():
            if survivor(attempt.process) is not None:
                print(
                    f"waiting for {attempt.run.stage} of the run before, which saves what it has",
                    file=stream,
                    flush=True,
                )
                await_survivor(attempt.process, GRACE_SECONDS)
        ledger.sweep()
        job, status, news = ledger.adopt(job, file)
        if news:
            print(news, file=stream, flush=True)
        if holds(status, "Complete"):
            return status, COMPLETE
        with opened(job.spec.storage, root) as access, view(stream, job.metadata.name) as display:
            runner = Runner(
                ledger,
                job,
                status,
                storage=access.storage,
                environment=access.environment,
                revive=access.revive,
                view=display,
                command=command,
            )
            status = runner.run()
    if holds(status, "Complete"):
        return status, COMPLETE
    if holds(status, "Failed") or runner.interrupted is None:
        return status, FAILED
    return status, 128 + runner.interrupted


def summary(job: FineTuneJob, status: JobStatus, file: Path, code: int) -> str:
    """What the user reads at the end."""
    name = job.metadata.name
    option = "" if job.metadata.namespace == "default" else f" -n {job.metadata.namespace}"
    if code == COMPLETE:
        parts = [f"{name}: {status.summary}"]
        if scores := words.scores(status):
            parts.append(f"Scores on the locked test rows, base -> tuned:\n{scores}")
        parts.append(words.timings_table(status))
        if status.artifacts:
            parts.append(words.artifacts_table(status))
        parts.append("Next:\n" + "\n".join(f"  finetune {line}" for line in _next(job, f"{name}{option}")))
        return "\n\n".join(parts)
    if code != FAILED:
        return f"{name}: {status.summary}; the same command goes on: finetune run {file}"
    if job.spec.suspend:
        return f"{name}: spec.suspend is true, so nothing runs; set it to false and run the same command"
    lines = [f"{name}: {status.summary}"]
    lines += [f"  {s.name}: {s.reason} {s.message}".rstrip() for s in status.stages if s.state == "Failed"]
    lines.append(f"whole logs: finetune logs {name}{option}; what is done stays: the same command tries the rest again")
    return "\n".join(lines)


def _next(job: FineTuneJob, name: str) -> list[str]:
    """The commands that have something to show, given what this pipeline makes."""
    quantized = any(stage.quantize for stage in job.spec.pipeline)
    lines = (
        [f"pull {name}", f'chat {name} "your question"'] if quantized else [f"pull {name} {job.spec.pipeline[-1].name}"]
    )
    return lines if job.spec.evaluation.skip else [*lines, f"report {name}"]
