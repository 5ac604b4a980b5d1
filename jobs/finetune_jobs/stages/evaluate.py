"""``evaluate``: every tuned model and every GGUF on the rows on which the base model was scored."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

from finetune_api.pipeline import Target, model_after, targets
from finetune_api.types import BASE
from finetune_jobs import bnb
from finetune_jobs.data.encode import load_tokenizer
from finetune_jobs.evaluation import answers, diffs
from finetune_jobs.evaluation.answers import Scores
from finetune_jobs.evaluation.ask import Result, ask, steps
from finetune_jobs.evaluation.model import Model
from finetune_jobs.evaluation.report import main_target
from finetune_jobs.evaluation.scores import headline, record
from finetune_jobs.run.context import Context, Outcome
from finetune_jobs.run.errors import InputMissingError

_log = logging.getLogger("finetune.evaluate")


def run(ctx: Context) -> Outcome:
    """Answers, scores and side-by-side diffs of every target.

    Preempted, it starts anew: answers are cheap beside training.
    """
    spec = ctx.spec
    base_record = json.loads(ctx.fetch("baseline", "scores.json").read_text(encoding="utf-8"))
    base = answers.read(ctx.fetch("baseline", "answers"))
    out = ctx.workspace / "result"
    scores: dict[str, Scores] = {BASE: base_record["scores"][BASE]}
    precision: dict[str, str] = dict(base_record["settings"]["precision"])
    answers.write(base, out / "answers" / BASE)
    tuned = targets(spec)
    for number, target in enumerate(tuned):

        def tick(done: int, count: int, before: int = number) -> None:
            ctx.stop.check()
            ctx.progress.report(before * count + done, len(tuned) * count)

        result, precision[target.name] = _score(ctx, target, tick)
        changes = diffs.write(base, result.answers, out / "diffs" / target.name, target.name)
        scores[target.name] = result.scores | changes
        answers.write(result.answers, out / "answers" / target.name)
        _log.info("%s: %s", target.name, scores[target.name])
    text = json.dumps(record(spec, scores, precision), indent=2, allow_nan=False)
    (out / "scores.json").write_text(text + "\n", encoding="utf-8")
    return Outcome(
        out,
        {"scores": "scores.json", "answers": "answers", "diffs": "diffs"},
        figures=headline(spec, scores[main_target(tuned).name]),
    )


def _score(ctx: Context, target: Target, tick: Callable[[int, int], None]) -> tuple[Result, str]:
    """The target's result and the precision it was computed in; its memory is free again afterwards."""
    spec = ctx.spec
    made = model_after(spec, target.stage)
    directory = ctx.model_dir(made.weights)
    tokenizer = load_tokenizer(directory, spec.model.chat_template, trust_remote_code=spec.model.trust_remote_code)
    questions = answers.questions(ctx, tokenizer)
    count = steps(questions)
    tick(0, count)

    def ask_all(model: Model) -> tuple[Result, str]:
        return ask(model, tokenizer, questions, spec.evaluation, lambda done: tick(done, count)), model.precision

    if target.gguf is not None:
        from finetune_jobs.evaluation.gguf import ScoredGGUF
        from finetune_jobs.gguf.engine import GGUFModel

        with GGUFModel(_gguf(ctx, target)) as model:
            return ask_all(ScoredGGUF(model))
    from finetune_jobs.evaluation.hf import HFModel

    if target.bitsandbytes is not None:
        directory = ctx.fetch(target.stage, bnb.folder(target.bitsandbytes))
        return ask_all(HFModel(directory, trust_remote_code=spec.model.trust_remote_code))

    adapter = ctx.adapter_dir(made.adapter) if made.adapter else None
    return ask_all(HFModel(directory, adapter, trust_remote_code=spec.model.trust_remote_code))


def _gguf(ctx: Context, target: Target) -> Path:
    manifest = ctx.manifests[target.stage]
    artifact = next((a for a in manifest.artifacts if a.name == target.gguf), None)
    file = next((f for f in manifest.files if artifact and f.sha256 == artifact.sha256), None)
    if file is None:
        raise InputMissingError(f"stage {target.stage} left no {target.gguf}; delete its result and run the job again")
    return ctx.fetch(target.stage, file.path)
