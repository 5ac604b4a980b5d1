"""What ``finetune`` and ``kubectl finetune`` have in common toward the shell: arguments, JSON, exit codes."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

_DEBUG = "FINETUNE_DEBUG"

File = Annotated[Path, typer.Argument(metavar="FILE", help="The job's YAML.", dir_okay=False)]
FileNamespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace, where the file names none.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
StageName = Annotated[str, typer.Argument(metavar="[STAGE]", help="One stage; left out: all.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Wait for more while the job runs.")]
Artifacts = Annotated[
    list[str] | None, typer.Argument(metavar="[ARTIFACT...]", help="Names; left out: the GGUFs and their Modelfile.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to; default: a folder of the job's name.")
]
Prompt = Annotated[str, typer.Argument(metavar="[PROMPT]", help="One question; left out: a conversation.")]
Gguf = Annotated[
    str, typer.Option("--gguf", metavar="TYPE", help="Which of the job's GGUFs; default Q4_K_M, else the first.")
]
Adapter = Annotated[
    str,
    typer.Option(
        "--adapter",
        metavar="STAGE|FILE.gguf",
        help="A LoRA adapter to lay over a GGUF of its base model: that of a stage of the job, or a file.",
    ),
]
System = Annotated[str, typer.Option("--system", help="System message.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy: always the same answer.")]
ExportGguf = Annotated[
    list[str] | None, typer.Option("--gguf", metavar="TYPE[,TYPE]", help="GGUF files, such as Q4_K_M.")
]
ExportBnb = Annotated[
    list[str] | None, typer.Option("--bnb", metavar="int8|nf4", help="Folders for transformers with bitsandbytes.")
]
ExportSafetensors = Annotated[bool, typer.Option("--safetensors", help="The 16-bit model, its adapter merged into it.")]
ExportName = Annotated[str, typer.Option("--name", help="Of the job that makes it; default: NAME-export.")]
Open = Annotated[bool, typer.Option("--open/--no-open", help="Show it in a browser, where there is one.")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"finetune {version('finetunejob')}")
        except PackageNotFoundError:
            print("finetune (not installed)")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; FINETUNE_DEBUG=1 does the same.")] = False,
) -> None:
    """Of the command itself, before any subcommand."""
    if debug:
        os.environ[_DEBUG] = "1"


def new_app(name: str, help: str, *, completes: bool = True) -> typer.Typer:
    """An empty command. ``completes``: it can install its own completion."""
    app = typer.Typer(
        name=name,
        help=help,
        add_completion=completes,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(options)
    return app


@contextlib.contextmanager
def telling_mistakes(as_json: bool) -> Iterator[None]:
    """With ``--json`` the mistakes of a job's file go to stdout too."""
    from finetune_cli.errors import InvalidJobError

    try:
        yield
    except InvalidJobError as error:
        if as_json:
            print_json({"valid": False, "errors": [{"path": e.path, "message": e.message} for e in error.errors]})
        raise


def print_json(value: Any) -> None:
    """For programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def run(app: typer.Typer, name: str, arguments: Sequence[str] | None) -> int:
    """Run the command; every failure becomes words on stderr and an exit code. A traceback only with ``--debug``."""
    try:
        app(arguments, prog_name=name)
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
        print(f"{name}: {words}", file=sys.stderr)
        return code
    return 0
