"""The command ``finetune``. Every command is thin; what it needs is imported when it runs, so that help is instant."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli import shell
from finetune_cli.shell import File, FileNamespace, Json

if TYPE_CHECKING:
    from finetune_cli.look import LocalJob

app = shell.new_app(
    "finetune", "One YAML turns a base model and a data set into a tested, quantized GGUF in object storage."
)


def _names(incomplete: str) -> list[str]:
    """Job names, for the shell's completion."""
    from finetune_cli.ledger import all_jobs, home

    return [ledger.name for ledger in all_jobs(home(), "default") if ledger.name.startswith(incomplete)]


Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a job that has run here.", autocompletion=_names)]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the job.")]
Endpoint = Annotated[
    str, typer.Option("--store-endpoint", metavar="URL", help="Use this S3 store; credentials from AWS_* variables.")
]


def _find(namespace: str, name: str) -> "LocalJob":
    from finetune_cli.ledger import find_job, home
    from finetune_cli.look import LocalJob

    return LocalJob(find_job(home(), namespace, name))


@app.command()
def run(file: File, store_endpoint: Endpoint = "", namespace: FileNamespace = "", as_json: Json = False) -> None:
    """Run the whole pipeline on this machine.

    Ctrl-C saves; the same command goes on from there. Exit code 0 only when the job is complete.
    """
    from finetune_cli import runs
    from finetune_cli.errors import COMPLETE
    from finetune_cli.ledger import JobLedger, home
    from finetune_cli.look import LocalJob

    with shell.telling_mistakes(as_json):
        job = runs.load_job(file, namespace, store_endpoint)
    status, code = runs.run(job, file, home(), quiet=as_json)
    text = runs.summary(job, status, file, code)
    if as_json:
        shell.print_json(LocalJob(JobLedger(home(), job.metadata.namespace, job.metadata.name)).resource())
    print(text, file=sys.stderr if as_json or code != COMPLETE else sys.stdout)
    raise typer.Exit(code)


@app.command()
def plan(file: File, store_endpoint: Endpoint = "", namespace: FileNamespace = "", as_json: Json = False) -> None:
    """Check the job and show what each stage needs.

    What it reads and writes, trainable parameters, memory, disk, and what would be reused. Exit code 64 with every
    mistake at once, each with its field and the mend.
    """
    from finetune_cli import commands, planning, runs
    from finetune_cli.ledger import home

    with shell.telling_mistakes(as_json):
        job = runs.load_job(file, namespace, store_endpoint)
        planned = planning.preview(job, str(file), lambda job: planning.done_here(job, home()))
    commands.plan(job, planned, as_json=as_json)


@app.command()
def get(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="One job in detail; left out: all.", autocompletion=_names)
    ] = "",
    namespace: Namespace = "default",
    as_json: Json = False,
) -> None:
    """Show all jobs, or one with its stages and artifacts."""
    from finetune_cli import commands
    from finetune_cli.ledger import all_jobs, home
    from finetune_cli.look import LocalJob

    if name:
        commands.get(_find(namespace, name), as_json=as_json)
        return
    jobs = [LocalJob(ledger) for ledger in all_jobs(home(), namespace)]
    commands.get_all(jobs, none=f"no job has run here in the namespace {namespace}", as_json=as_json)


@app.command()
def watch(name: Name, namespace: Namespace = "default") -> None:
    """Follow a running job. Exit code 0 if it completes."""
    from finetune_cli import commands

    raise typer.Exit(commands.watch(_find(namespace, name)))


@app.command()
def logs(
    name: Name,
    stage: shell.StageName = "",
    follow: shell.Follow = False,
    namespace: Namespace = "default",
    as_json: Json = False,
) -> None:
    """Print what the stages wrote, every attempt of them."""
    from finetune_cli import commands

    commands.logs(_find(namespace, name).log_lines(stage, follow=follow), follow=follow, as_json=as_json)


@app.command()
def pull(
    name: Name,
    artifacts: shell.Artifacts = None,
    output: shell.Output = None,
    namespace: Namespace = "default",
    as_json: Json = False,
) -> None:
    """Fetch results, verified by their sha256.

    A broken download is gone on with, what is here already is skipped.
    """
    from finetune_cli import commands

    commands.pull(_find(namespace, name), artifacts or [], output, as_json=as_json)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="NAME|FILE.gguf", help="A job, or a GGUF.", autocompletion=_names)],
    prompt: shell.Prompt = "",
    gguf: shell.Gguf = "",
    adapter: shell.Adapter = "",
    system: shell.System = "",
    max_tokens: shell.MaxTokens = 512,
    temperature: shell.Temperature = 0.0,
    namespace: Namespace = "default",
    as_json: Json = False,
) -> None:
    """Talk to the result.

    With the chat template inside the GGUF, by llama.cpp on this machine.
    """
    from finetune_cli import commands

    job = None if model.endswith(".gguf") else _find(namespace, model)
    path, over = commands.chat_files(model, adapter, gguf, job)
    commands.chat(
        path,
        prompt,
        adapter=over,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        as_json=as_json,
    )


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(metavar="NAME|MODEL", help="A job, or hf://, s3://, a folder, a GGUF.", autocompletion=_names),
    ],
    gguf: shell.ExportGguf = None,
    bnb: shell.ExportBnb = None,
    safetensors: shell.ExportSafetensors = False,
    data: Annotated[
        str, typer.Option("--data", metavar="FILE", help="Rows to measure a MODEL's files by; a job has its own.")
    ] = "",
    output: shell.Output = None,
    name: shell.ExportName = "",
    manifest: Annotated[bool, typer.Option("--print", help="Print the job's YAML, run nothing.")] = False,
    store_endpoint: Endpoint = "",
    namespace: Namespace = "default",
) -> None:
    """Make other files of a finished model.

    GGUFs, or what transformers loads, by a job with a quantize stage alone: it reads what is there, trains nothing, and
    its results are fetched.
    """
    from finetune_cli import commands, runs
    from finetune_cli.errors import COMPLETE, CommandError
    from finetune_cli.export import source_of
    from finetune_cli.ledger import home, write_atomic

    source = source_of(model)
    job = None if source else _find(namespace, model)
    wanted = commands.export_of(source, job, gguf or [], bnb or [], safetensors=safetensors, data=data, name=name)
    if wanted.manifest is None:
        if manifest:
            raise CommandError(f"nothing has to run: finetune pull {model} {' '.join(wanted.artifacts)}")
        commands.pull(_find(namespace, model), wanted.artifacts, output, as_json=False)
        return
    if manifest:
        print(wanted.yaml, end="")
        return
    called = wanted.manifest["metadata"]["name"]
    file = home() / "exports" / namespace / f"{called}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, wanted.yaml)
    made = runs.load_job(file, namespace, store_endpoint)
    status, code = runs.run(made, file, home(), quiet=False)
    if code != COMPLETE:
        print(runs.summary(made, status, file, code), file=sys.stderr)
        raise typer.Exit(code)
    commands.pull(_find(namespace, called), wanted.artifacts, output, as_json=False)


@app.command()
def report(name: Name, open_: shell.Open = True, namespace: Namespace = "default", as_json: Json = False) -> None:
    """Fetch the report, print its path and open it."""
    from finetune_cli import commands

    commands.report(_find(namespace, name), show=open_, as_json=as_json)


@app.command()
def checkpoints(name: Name, namespace: Namespace = "default", as_json: Json = False) -> None:
    """List checkpoints: step, evaluation loss, size."""
    from finetune_cli import commands

    commands.checkpoints(_find(namespace, name), as_json=as_json)


@app.command()
def delete(
    name: Name,
    artifacts: Annotated[
        bool, typer.Option("--artifacts", help="Its objects in the store too, but what other jobs here use.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    namespace: Namespace = "default",
    as_json: Json = False,
) -> None:
    """Forget a job; with --artifacts also its objects."""
    from finetune_cli import objects, words
    from finetune_cli import pull as pulling
    from finetune_cli.ledger import all_jobs, find_job, home
    from finetune_cli.look import LocalJob

    ledger = find_job(home(), namespace, name)
    count = 0
    with ledger.locked():
        if artifacts:
            with pulling.store_of(LocalJob(ledger)) as store:
                used = objects.used_by_others(ledger, all_jobs(home(), namespace))
                job = ledger.record().job
                removal = objects.removable(store, job, used)
                count = removal.count
                _confirm(f"Delete the record of {name} and {count} objects ({words.size(removal.size_bytes)})?", yes)
                objects.remove(store, job, removal)
        else:
            _confirm(f"Delete the record of {name}? Its objects stay in the store.", yes)
        ledger.forget()
    if as_json:
        shell.print_json({"deleted": name, "objects": count})
    else:
        print(f"{name} is deleted" + (f", with {count} objects" if artifacts else "; its objects stay in the store"))


def _confirm(question: str, yes: bool) -> None:
    from finetune_cli.errors import CommandError

    if yes:
        return
    if not sys.stdin.isatty():
        raise CommandError(f"{question} Say so with --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if input().strip().lower() not in ("y", "yes"):
        raise CommandError("nothing was deleted")


def main(arguments: Sequence[str] | None = None) -> int:
    """``finetune``."""
    return shell.run(app, "finetune", arguments)
