"""Put the locked rows to one model and score what it says."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from finetune_api.types import Evaluation
from finetune_jobs.data.encode import stop_ids
from finetune_jobs.evaluation.answers import SPOT_CHECK_TOKENS, Answer, Question, Scores, grade, summarise
from finetune_jobs.evaluation.model import Generated, Model, RowLoss
from finetune_jobs.run.errors import ConfigurationError


@dataclass(frozen=True)
class Result:
    """One target."""

    answers: list[Answer]
    scores: Scores


def steps(questions: Sequence[Question]) -> int:
    """How far ``tick`` of ``ask`` counts."""
    return len(questions) + sum(q.encoded is not None for q in questions)


def ask(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    evaluation: Evaluation,
    tick: Callable[[int], None],
) -> Result:
    """All answers, then all losses. ``tick`` gets the rows done so far, ``steps(questions)`` at the end.

    Raises ConfigurationError for a model whose loss is no number: none of its answers means anything.
    """
    generated: dict[int, Generated] = {}
    done = sum(not q.prompt_ids for q in questions)
    limit = evaluation.max_new_tokens
    seconds = 0.0
    for spot, most in ((False, limit), (True, min(limit, SPOT_CHECK_TOKENS))):
        chosen = [i for i, q in enumerate(questions) if q.prompt_ids and (q.role != "test") is spot]
        clock = time.perf_counter()
        prompts = [questions[i].prompt_ids for i in chosen]
        outputs = model.generate(prompts, most, stop_ids(tokenizer), _from(tick, done))
        seconds += time.perf_counter() - clock
        generated |= dict(zip(chosen, outputs, strict=True))
        done += len(chosen)
    measured = [i for i, q in enumerate(questions) if q.encoded is not None]
    # A row longer than the context has no loss; it still counts as a row.
    fits = [i for i in measured if (e := questions[i].encoded) and len(e.input_ids) <= model.context_length]
    rows = [e for i in fits if (e := questions[i].encoded)]
    losses = dict(zip(fits, model.losses(rows, _from(tick, done)), strict=True))
    tick(steps(questions))
    if broken := [questions[i].id for i, loss in losses.items() if not math.isfinite(loss.total)]:
        raise ConfigurationError(
            f"spec.model.source: the model computes no number for {len(broken)} of {len(losses)} test rows (first "
            f"{broken[0]}): its weights are damaged, or too large for the type they are stored in; try bfloat16"
        )
    names = [str(metric) for metric in evaluation.metrics]
    answers = [_answer(q, generated.get(i), losses.get(i), tokenizer, names) for i, q in enumerate(questions)]
    tokens = sum(len(g.ids) + g.finished for g in generated.values())
    speed = {"generatedTokens": tokens, "generationSeconds": round(seconds, 3)}
    if seconds:
        speed["tokensPerSecond"] = tokens / seconds
    return Result(answers, summarise(answers) | speed)


def _from(tick: Callable[[int], None], start: int) -> Callable[[int], None]:
    return lambda rows: tick(start + rows)


def _answer(
    question: Question,
    generated: Generated | None,
    loss: RowLoss | None,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
) -> Answer:
    answer = Answer(
        id=question.id,
        role=question.role,
        prompt=question.prompt,
        reference=question.reference,
        expect=question.expect,
        loss=loss.total / loss.tokens if loss and loss.tokens else None,
        loss_tokens=loss.tokens if loss else None,
    )
    if generated is None:
        return answer
    text = str(tokenizer.decode(generated.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return answer.model_copy(
        update={
            "answer": text,
            "finished": generated.finished,
            "tokens": len(generated.ids),
            "scores": grade(question, text, names),
        }
    )
