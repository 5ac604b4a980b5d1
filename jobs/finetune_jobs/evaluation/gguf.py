"""A GGUF as a model to score: llama.cpp on the CPU, many prompts at a time."""

from collections.abc import Sequence

from finetune_jobs.data.encode import Encoded
from finetune_jobs.evaluation.model import Generated, RowLoss, Tick
from finetune_jobs.gguf.engine import GGUFModel


class ScoredGGUF:
    """Wraps a loaded GGUF. Its own end-of-generation tokens end an answer too, as they do for its users."""

    precision = "llama.cpp: the file's types, activations and cache as llama.cpp chooses"

    def __init__(self, model: GGUFModel) -> None:
        self._model = model
        self.context_length = model.context_length

    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, stop_ids: Sequence[int], tick: Tick
    ) -> list[Generated]:
        """See ``Model``."""
        found = self._model.generate(prompts, max_new_tokens, stop_ids, tick)
        return [Generated(answer.ids, answer.finished) for answer in found]

    def losses(self, rows: Sequence[Encoded], tick: Tick) -> list[RowLoss]:
        """See ``Model``."""
        # From the first supervised token that something stands before, to the last one.
        spans = [[at for at, learned in enumerate(row.supervised) if learned and at] for row in rows]
        both = [(row.input_ids, at) for row, at in zip(rows, spans, strict=True)]
        logprobs = self._model.answer_logprobs((ids[: at[0]], ids[at[0] : at[-1] + 1]) for ids, at in both if at)
        found: list[RowLoss] = []
        for ids, at in both:
            if at:
                table = next(logprobs)
                found.append(RowLoss(-sum(float(table[i - at[0], ids[i]]) for i in at), len(at)))
            else:
                found.append(RowLoss(0.0, 0))
            tick(len(found))
        return found
