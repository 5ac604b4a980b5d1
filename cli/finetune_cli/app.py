"""The command ``finetune``. Every command is thin; what it needs is imported when it runs, so that help is instant."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="finetune",
    help="One YAML turns a base model and a data set into a tested, quantized GGUF in object storage.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DEBUG = "FINETUNE_DEBUG"


def _names(incomplete: str) -> list[str]:
    """Job names, for the shell's completion."""
    from finetune_cli.ledger import all_jobs, home

    return [ledger.name for ledger in all_jobs(home(), "default") if ledger.name.startswith(incomplete)]


File = Annotated[Path, typer.Argument(metavar="FILE", help="The job's YAML.", dir_okay=False)]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a job that has run here.", autocompletion=_names)]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the job.")]
FileNamespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace, where the file names none.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Endpoint = Annotated[
    str, typer.Option("--store-endpoint", metavar="URL", help="Use this S3 store; credentials from AWS_* variables.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"finetune {version('finetunejob')}")
        except PackageNotFoundError:
            print("finetune (not installed)")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; FINETUNE_DEBUG=1 does the same.")] = False,
) -> None:
    if debug:
        os.environ[_DEBUG] = "1"


@app.command()
def run(file: File, store_endpoint: Endpoint = "", namespace: FileNamespace = "", as_json: Json = False) -> None:
    """Run the whole pipeline on this machine.

    Ctrl-C saves; the same command goes on from there. Exit code 0 only when the job is complete.
    """
    from finetune_cli import runs
    from finetune_cli.errors import COMPLETE
    from finetune_cli.ledger import JobLedger, home
    from finetune_cli.look import as_json as resource

    with _telling_mistakes(as_json):
        job = runs.load_job(file, namespace, store_endpoint)
    status, code = runs.run(job, file, home(), quiet=as_json)
    text = runs.summary(job, status, file, code)
    if as_json:
        _print_json(resource(JobLedger(home(), job.metadata.namespace, job.metadata.name)))
    print(text, file=sys.stderr if as_json or code != COMPLETE else sys.stdout)
    raise typer.Exit(code)


@app.command()
def plan(file: File, store_endpoint: Endpoint = "", namespace: FileNamespace = "", as_json: Json = False) -> None:
    """Check the job and show what each stage needs.

    What it reads and writes, trainable parameters, memory, disk, and what would be reused. Exit code 64 with every
    mistake at once, each with its field and the mend.
    """
    from finetune_cli import planning, runs
    from finetune_cli.ledger import home

    with _telling_mistakes(as_json):
        job = runs.load_job(file, namespace, store_endpoint)
        planned = planning.preview(job, home(), str(file))
    if as_json:
        _print_json(planning.as_json(planned))
    else:
        print(planning.as_text(job, planned))


@app.command()
def get(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="One job in detail; left out: all.", autocompletion=_names)
    ] = "",
    namespace: Namespace = "default",
    as_json: Json = False,
) -> None:
    """Show all jobs, or one with its stages and artifacts."""
    from finetune_cli import look
    from finetune_cli.ledger import all_jobs, find_job, home

    if name:
        ledger = find_job(home(), namespace, name)
        if as_json:
            _print_json(look.as_json(ledger))
        else:
            print(look.details(ledger))
        return
    ledgers = all_jobs(home(), namespace)
    if as_json:
        _print_json({"items": [look.as_json(ledger) for ledger in ledgers]})
    elif ledgers:
        print(look.overview(ledgers))
    else:
        print(f"no job has run here in the namespace {namespace}", file=sys.stderr)


@app.command()
def watch(name: Name, namespace: Namespace = "default") -> None:
    """Follow a running job. Exit code 0 if it completes."""
    from finetune_cli import look
    from finetune_cli.ledger import find_job, home

    raise typer.Exit(look.watch(find_job(home(), namespace, name)))


@app.command()
def logs(
    name: Name,
    stage: Annotated[str, typer.Argument(metavar="[STAGE]", help="One stage; left out: all.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more while the job runs.")] = False,
    namespace: Namespace = "default",
    as_json: Json = False,
) -> None:
    """Print what the stages wrote, every attempt of them."""
    from finetune_cli import look
    from finetune_cli.ledger import find_job, home
    from finetune_cli.words import log_line

    for line in look.log_lines(find_job(home(), namespace, name), stage, follow=follow):
        if not as_json:
            print(log_line(line), flush=follow)
        elif line.startswith("{"):
            print(line, flush=follow)


@app.command()
def pull(
    name: Name,
    artifacts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ARTIFACT...]", help="Names; left out: the GGUFs and their Modelfile."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Where to; default: a folder of the job's name."),
    ] = None,
    namespace: Namespace = "default",
    as_json: Json = False,
) -> None:
    """Fetch results, verified by their sha256.

    A broken download is gone on with, what is here already is skipped.
    """
    from finetune_cli import pull as pulling
    from finetune_cli import results, words
    from finetune_cli.ledger import find_job, home

    ledger = find_job(home(), namespace, name)
    into = output or Path(name)
    with pulling.store_of(ledger) as store:
        wanted = results.select(ledger.record().job.spec, pulling.committed(store, ledger.status()), artifacts or [])
        paths, skipped = pulling.fetch(store, wanted, into)
    if as_json:
        _print_json(
            {
                "files": [
                    {"path": str(p), "sha256": w.file.sha256, "sizeBytes": w.file.size_bytes}
                    for p, w in zip(paths, wanted, strict=True)
                ]
            }
        )
        return
    for path, item in zip(paths, wanted, strict=True):
        print(f"{path}  {words.size(item.file.size_bytes)}")
    if skipped:
        print(f"{skipped} of {len(paths)} were here already", file=sys.stderr)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="NAME|FILE.gguf", help="A job, or a GGUF.", autocompletion=_names)],
    prompt: Annotated[str, typer.Argument(metavar="[PROMPT]", help="One question; left out: a conversation.")] = "",
    gguf: Annotated[
        str, typer.Option("--gguf", metavar="TYPE", help="Which of the job's GGUFs; default Q4_K_M, else the first.")
    ] = "",
    system: Annotated[str, typer.Option("--system", help="System message.")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 512,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 is greedy: always the same answer.")
    ] = 0.0,
    namespace: Namespace = "default",
    as_json: Json = False,
) -> None:
    """Talk to the result.

    With the chat template inside the GGUF, by llama.cpp on this machine.
    """
    from finetune_cli import chat as chatting
    from finetune_cli import pull as pulling
    from finetune_cli.ledger import find_job, home

    path = Path(model) if model.endswith(".gguf") else pulling.gguf(find_job(home(), namespace, model), gguf)
    conversation = chatting.Chat(path, system=system, max_tokens=max_tokens, temperature=temperature)
    if not prompt and as_json:
        raise typer.BadParameter("--json needs a PROMPT")
    if not prompt:
        chatting.interactive(conversation)
    elif as_json:
        _print_json({"model": str(path), "prompt": prompt, "answer": "".join(conversation.ask(prompt))})
    else:
        for piece in conversation.ask(prompt):
            print(piece, end="", flush=True)
        print()


@app.command()
def report(
    name: Name,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Show it in a browser, where there is one.")] = True,
    namespace: Namespace = "default",
    as_json: Json = False,
) -> None:
    """Fetch the report, print its path and open it."""
    from finetune_cli import pull as pulling
    from finetune_cli.ledger import find_job, home

    page, data = pulling.report(find_job(home(), namespace, name))
    if as_json:
        print(data.read_text(encoding="utf-8"))
        return
    print(page)
    if open_ and sys.stdout.isatty() and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        import webbrowser

        webbrowser.open(page.as_uri())


@app.command()
def checkpoints(name: Name, namespace: Namespace = "default", as_json: Json = False) -> None:
    """List checkpoints: step, evaluation loss, size."""
    from finetune_cli import objects, words
    from finetune_cli import pull as pulling
    from finetune_cli.ledger import find_job, home

    ledger = find_job(home(), namespace, name)
    with pulling.store_of(ledger) as store:
        found = objects.checkpoints(store, ledger.record().job)
    if as_json:
        _print_json(
            {
                "items": [
                    {"stage": s, "digest": d, "step": c.step, "metrics": c.metrics, "sizeBytes": c.size_bytes}
                    for s, d, c in found
                ]
            }
        )
    elif found:
        rows = [
            [
                s,
                str(c.step),
                f"{c.metrics['evalLoss']:.4f}" if "evalLoss" in c.metrics else "",
                words.size(c.size_bytes),
                d,
            ]
            for s, d, c in found
        ]
        print(words.table(["stage", "step", "eval loss", "size", "result"], rows))
    else:
        print(f"{name} has no checkpoint", file=sys.stderr)


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

    ledger = find_job(home(), namespace, name)
    count = 0
    with ledger.locked():
        if artifacts:
            with pulling.store_of(ledger) as store:
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
        _print_json({"deleted": name, "objects": count})
    else:
        print(f"{name} is deleted" + (f", with {count} objects" if artifacts else "; its objects stay in the store"))


@contextlib.contextmanager
def _telling_mistakes(as_json: bool) -> Iterator[None]:
    """With ``--json`` the mistakes of a job's file go to stdout too."""
    from finetune_cli.errors import InvalidJobError

    try:
        yield
    except InvalidJobError as error:
        if as_json:
            _print_json({"valid": False, "errors": [{"path": e.path, "message": e.message} for e in error.errors]})
        raise


def _confirm(question: str, yes: bool) -> None:
    from finetune_cli.errors import CommandError

    if yes:
        return
    if not sys.stdin.isatty():
        raise CommandError(f"{question} Say so with --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if input().strip().lower() not in ("y", "yes"):
        raise CommandError("nothing was deleted")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; every failure becomes words on stderr and an exit code. A traceback only with ``--debug``."""
    try:
        app(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get(_DEBUG):
            raise
        from finetune_cli.errors import describe

        code, words = describe(error)
        print(f"finetune: {words}", file=sys.stderr)
        return code
    return 0
