"""``baseline``: what the base model says to the locked rows, before anything trains."""

import json
import logging

from finetune_api.types import BASE
from finetune_jobs.data.encode import load_tokenizer
from finetune_jobs.evaluation import answers
from finetune_jobs.evaluation.ask import ask, steps
from finetune_jobs.evaluation.hf import HFModel
from finetune_jobs.evaluation.scores import headline, record
from finetune_jobs.run.context import Context, Outcome

_log = logging.getLogger("finetune.baseline")


def run(ctx: Context) -> Outcome:
    """Answers and scores of ``base``. Preempted, it starts anew: answers are cheap beside training."""
    spec = ctx.spec
    directory = ctx.model_dir(BASE)
    tokenizer = load_tokenizer(directory, spec.model.chat_template, trust_remote_code=spec.model.trust_remote_code)
    questions = answers.questions(ctx, tokenizer)
    ctx.stop.check()
    model = HFModel(directory, trust_remote_code=spec.model.trust_remote_code)

    def tick(done: int) -> None:
        ctx.stop.check()
        ctx.progress.report(done, steps(questions))

    result = ask(model, tokenizer, questions, spec.evaluation, tick)
    _log.info("base: %s", result.scores)
    out = ctx.workspace / "result"
    answers.write(result.answers, out / "answers")
    scores = record(spec, {BASE: result.scores}, {BASE: model.precision})
    (out / "scores.json").write_text(json.dumps(scores, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return Outcome(
        out,
        {"answers": "answers", "scores": "scores.json"},
        figures=headline(spec, result.scores),
    )
