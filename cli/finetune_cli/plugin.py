"""The command ``kubectl finetune``: what ``finetune`` does with jobs of this machine, with those of a cluster.

kubectl finds it as ``kubectl-finetune`` on the PATH, and ``kubectl_complete-finetune`` for its completion.
"""

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import completion

from finetune_cli import shell
from finetune_cli.shell import File, FileNamespace, Json

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster, ClusterJob

_PROGRAM = "kubectl-finetune"
_NAME = "kubectl finetune"
app = shell.new_app(
    _NAME, "Look after FineTuneJobs of a cluster: what `finetune` does on one machine.", completes=False
)


def _names(context: typer.Context, incomplete: str) -> list[str]:
    """Job names, for the shell's completion."""
    given = context.params
    with _connected(given.get("namespace") or "", given.get("context") or "", given.get("kubeconfig")) as cluster:
        return [job.name for job in cluster.all() if job.name.startswith(incomplete)]


Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a FineTuneJob.", autocompletion=_names)]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace; default: the context's.")]
Context = Annotated[str, typer.Option("--context", help="Context of the kubeconfig; default: its current one.")]
Kubeconfig = Annotated[
    Path | None, typer.Option("--kubeconfig", metavar="FILE", help="Default: $KUBECONFIG, then ~/.kube/config.")
]
Endpoint = Annotated[
    str, typer.Option("--store-endpoint", metavar="URL", help="Where the job's S3 store is, seen from this machine.")
]


@contextmanager
def _connected(namespace: str, context: str, kubeconfig: Path | None) -> "Iterator[Cluster]":
    from finetune_cli.cluster import connected

    with connected(namespace, context, kubeconfig) as cluster:
        yield cluster


@contextmanager
def _job(
    name: str, namespace: str, context: str, kubeconfig: Path | None, endpoint: str = ""
) -> "Iterator[ClusterJob]":
    with _connected(namespace, context, kubeconfig) as cluster:
        yield cluster.find(name, endpoint)


@app.command()
def plan(file: File, namespace: FileNamespace = "", as_json: Json = False) -> None:
    """Check the job and show what each stage needs.

    By the operator's own rules; nothing is sent. Exit code 64 with every mistake at once, each with its field and the
    mend.
    """
    from finetune_cli import commands, planning, runs

    with shell.telling_mistakes(as_json):
        job = runs.load_job(file, namespace, cluster=True)
        planned = planning.preview(job, str(file), lambda job: (set(), "what can be reused, prepare will find out"))
    commands.plan(job, planned, as_json=as_json)


@app.command()
def get(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="One job in detail; left out: all.", autocompletion=_names)
    ] = "",
    namespace: Namespace = "",
    context: Context = "",
    kubeconfig: Kubeconfig = None,
    as_json: Json = False,
) -> None:
    """Show all jobs, or one with its stages and artifacts."""
    from finetune_cli import commands

    with _connected(namespace, context, kubeconfig) as cluster:
        if name:
            commands.get(cluster.find(name), as_json=as_json)
        else:
            none = f"no FineTuneJob in the namespace {cluster.namespace}"
            commands.get_all(cluster.all(), none=none, as_json=as_json)


@app.command()
def watch(name: Name, namespace: Namespace = "", context: Context = "", kubeconfig: Kubeconfig = None) -> None:
    """Follow a job to its end. Exit code 0 if it completes."""
    from finetune_cli import commands

    with _job(name, namespace, context, kubeconfig) as job:
        raise typer.Exit(commands.watch(job))


@app.command()
def logs(
    name: Name,
    stage: shell.StageName = "",
    follow: shell.Follow = False,
    node: Annotated[
        int, typer.Option("--node", metavar="INDEX", min=0, help="Of a stage on several nodes; 0 is the first.")
    ] = 0,
    namespace: Namespace = "",
    context: Context = "",
    kubeconfig: Kubeconfig = None,
    store_endpoint: Endpoint = "",
    as_json: Json = False,
) -> None:
    """Print what the stages wrote, every attempt of them.

    From their pods; of those that are gone, from the object store, which keeps the first node's alone.
    """
    from finetune_cli import commands

    with _job(name, namespace, context, kubeconfig, store_endpoint) as job:
        commands.logs(job.log_lines(stage, follow=follow, node=node), follow=follow, as_json=as_json)


@app.command()
def pull(
    name: Name,
    artifacts: shell.Artifacts = None,
    output: shell.Output = None,
    namespace: Namespace = "",
    context: Context = "",
    kubeconfig: Kubeconfig = None,
    store_endpoint: Endpoint = "",
    as_json: Json = False,
) -> None:
    """Fetch results, verified by their sha256.

    A broken download is gone on with, what is here already is skipped.
    """
    from finetune_cli import commands

    with _job(name, namespace, context, kubeconfig, store_endpoint) as job:
        commands.pull(job, artifacts or [], output, as_json=as_json)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="NAME|FILE.gguf", help="A job, or a GGUF.", autocompletion=_names)],
    prompt: shell.Prompt = "",
    gguf: shell.Gguf = "",
    adapter: shell.Adapter = "",
    system: shell.System = "",
    max_tokens: shell.MaxTokens = 512,
    temperature: shell.Temperature = 0.0,
    namespace: Namespace = "",
    context: Context = "",
    kubeconfig: Kubeconfig = None,
    store_endpoint: Endpoint = "",
    as_json: Json = False,
) -> None:
    """Talk to the result.

    With the chat template inside the GGUF, by llama.cpp on this machine.
    """
    from finetune_cli import commands

    if model.endswith(".gguf"):
        path, over = commands.chat_files(model, adapter, gguf, None)
    else:
        with _job(model, namespace, context, kubeconfig, store_endpoint) as job:
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
    name: Name,
    gguf: shell.ExportGguf = None,
    bnb: shell.ExportBnb = None,
    safetensors: shell.ExportSafetensors = False,
    new_name: shell.ExportName = "",
    namespace: Namespace = "",
    context: Context = "",
    kubeconfig: Kubeconfig = None,
    store_endpoint: Endpoint = "",
) -> None:
    """Print the job that makes other files of a job's model, for `kubectl apply -f -`.

    It has a quantize stage alone, which reads what is there and trains nothing.
    """
    from finetune_cli import commands
    from finetune_cli.errors import CommandError

    with _job(name, namespace, context, kubeconfig, store_endpoint) as job:
        wanted = commands.export_of(name, job, gguf or [], bnb or [], safetensors=safetensors, data="", name=new_name)
    if wanted.manifest is None:
        raise CommandError(f"nothing has to run: {_NAME} pull {name} {' '.join(wanted.artifacts)}")
    print(wanted.yaml, end="")


@app.command()
def report(
    name: Name,
    open_: shell.Open = True,
    namespace: Namespace = "",
    context: Context = "",
    kubeconfig: Kubeconfig = None,
    store_endpoint: Endpoint = "",
    as_json: Json = False,
) -> None:
    """Fetch the report, print its path and open it."""
    from finetune_cli import commands

    with _job(name, namespace, context, kubeconfig, store_endpoint) as job:
        commands.report(job, show=open_, as_json=as_json)


@app.command()
def checkpoints(
    name: Name,
    namespace: Namespace = "",
    context: Context = "",
    kubeconfig: Kubeconfig = None,
    store_endpoint: Endpoint = "",
    as_json: Json = False,
) -> None:
    """List checkpoints: step, evaluation loss, size."""
    from finetune_cli import commands

    with _job(name, namespace, context, kubeconfig, store_endpoint) as job:
        commands.checkpoints(job, as_json=as_json)


@app.command()
def suspend(name: Name, namespace: Namespace = "", context: Context = "", kubeconfig: Kubeconfig = None) -> None:
    """Stop a job's stages, which save what they have."""
    with _job(name, namespace, context, kubeconfig) as job:
        job.suspend(True)
    print(f"{name} stops as soon as its stages have saved; `{_NAME} resume {name}` goes on from there")


@app.command()
def resume(name: Name, namespace: Namespace = "", context: Context = "", kubeconfig: Kubeconfig = None) -> None:
    """Let a suspended job go on from where it was."""
    with _job(name, namespace, context, kubeconfig) as job:
        job.suspend(False)
    print(f"{name} goes on; `{_NAME} watch {name}` shows it")


def main(arguments: Sequence[str] | None = None) -> int:
    """``kubectl finetune``."""
    # As an exception, so that what the command has started, such as a port-forward, ends with it.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return shell.run(app, _NAME, arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


def complete() -> int:
    """``kubectl_complete-finetune``: its arguments are the words so far, the last one unfinished; kubectl asks so."""
    # For what it does besides, which is to make the shells known: the command itself installs no completion.
    completion.get_completion_inspect_parameters()
    words = [_PROGRAM, *sys.argv[1:]]
    os.environ |= {"_KUBECTL_FINETUNE_COMPLETE": "complete_bash"}
    os.environ |= {"COMP_WORDS": shlex.join(words), "COMP_CWORD": str(max(1, len(words) - 1))}
    shell.run(app, _PROGRAM, [])
    print(":4")  # no file names besides
    return 0
