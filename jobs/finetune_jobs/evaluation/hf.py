"""Answers and losses of a Hugging Face model, maybe with an adapter: greedy, in batches, without any randomness.

Precision: on a CPU everything is float32, whatever type the weights are stored in. On GPUs weights and activations keep
the stored type (bfloat16 as a rule) and only the log-probabilities are float32.
"""

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from finetune_jobs.data.encode import Encoded
from finetune_jobs.evaluation.model import Generated, RowLoss, Tick
from finetune_jobs.padding import left_padded
from finetune_jobs.tuned import tuned

_BATCH_ROWS = 32
_GENERATE_TOKENS = 32_768
"""Cached positions of one batch of answers: rows times (longest prompt + longest answer)."""
_LOSS_TOKENS = 2_048
"""Positions of one batch of losses; the logits, positions times vocabulary in float32, are what takes the memory."""


class HFModel:
    """A causal language model, loaded once."""

    def __init__(self, directory: Path, adapter: Path | None = None, *, trust_remote_code: bool = False) -> None:
        gpu = torch.cuda.is_available()
        options = {"dtype": "auto", "device_map": "auto"} if gpu else {"dtype": torch.float32}
        model: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust_remote_code, **options)
        self._selects = "logits_to_keep" in inspect.signature(model.forward).parameters
        if adapter is not None:
            model = tuned(model, adapter)
        self._model = model.eval()
        self._device = next(model.parameters()).device
        positions: int = getattr(model.config, "max_position_embeddings", 0) or 2**31
        self.context_length = positions - getattr(model, "virtual_tokens", 0)
        self.precision = str(next(model.parameters()).dtype).removeprefix("torch.")

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, stop_ids: Sequence[int], tick: Tick
    ) -> list[Generated]:
        """See ``Model``. Batched and one by one agree, but for ties within float rounding."""
        answers = [Generated() for _ in prompts]
        fits = [i for i, prompt in enumerate(prompts) if 0 < len(prompt) < self.context_length]
        done = len(prompts) - len(fits)
        longest = [(i, len(prompts[i]) + max_new_tokens) for i in fits]
        # Whoever meets the end of the context goes alone, so that it shortens nobody else's answer.
        tight = [[i] for i, length in longest if length > self.context_length]
        roomy = _batches([row for row in longest if row[1] <= self.context_length], _GENERATE_TOKENS)
        for batch in [*roomy, *tight]:
            rows = [(prompts[i], answers[i]) for i in batch]
            self._generate(rows, max_new_tokens, set(stop_ids), partial(_add, tick, done))
            done += len(batch)
        tick(done)
        return answers

    def _generate(
        self, rows: list[tuple[list[int], Generated]], max_new_tokens: int, stop: set[int], tick: Tick
    ) -> None:
        ids, mask, positions = left_padded([prompt for prompt, _ in rows], self._device)
        active = [answer for _, answer in rows]
        cache: Any = None
        for _ in range(min(max_new_tokens, self.context_length - ids.shape[1])):
            output = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **({"logits_to_keep": 1} if self._selects else {}),
            )
            cache = output.past_key_values
            following = output.logits[:, -1].argmax(-1)
            going = []
            for i, token in enumerate(following.tolist()):
                if token in stop:
                    active[i].finished = True
                else:
                    active[i].ids.append(token)
                    going.append(i)
            tick(len(rows) - len(going))
            if not going:
                return
            if len(going) < len(active):  # rows that are done cost nothing more
                kept = torch.tensor(going)  # on the CPU: the cache's layers may be on several GPUs
                cache.batch_select_indices(kept)
                active = [active[i] for i in going]
                mask, positions, following = mask[kept], positions[kept], following[kept]
            ids = following[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            positions = positions[:, -1:] + 1

    @torch.inference_mode()
    def losses(self, rows: Sequence[Encoded], tick: Tick) -> list[RowLoss]:
        """See ``Model``."""
        losses = [RowLoss(0.0, 0)] * len(rows)
        done = 0
        for batch in _batches([(i, len(row.input_ids)) for i, row in enumerate(rows)], _LOSS_TOKENS):
            for i, loss in zip(batch, self._losses([rows[i] for i in batch]), strict=True):
                losses[i] = loss
            done += len(batch)
            tick(done)
        return losses

    def _losses(self, rows: list[Encoded]) -> Iterator[RowLoss]:
        width = max(len(row.input_ids) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, wanted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            length = len(row.input_ids)
            ids[i, :length] = torch.tensor(row.input_ids)
            mask[i, :length] = 1
            wanted[i, :length] = torch.tensor(row.supervised)
        wanted = wanted[:, 1:]  # the logits at position t predict token t + 1
        kept = wanted.any(0).nonzero().flatten()
        if not len(kept):
            yield from (RowLoss(0.0, 0) for _ in rows)
            return
        logits = self._model(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            use_cache=False,
            **({"logits_to_keep": kept.tolist()} if self._selects else {}),
        ).logits
        logits = (logits if self._selects else logits[:, kept]).float()
        following = ids[:, kept + 1].to(logits.device)
        loss = logits.logsumexp(-1) - logits.gather(-1, following[..., None])[..., 0]
        counts = wanted[:, kept]
        for row_loss, count in zip(loss.double().cpu(), counts, strict=True):
            yield RowLoss(float(row_loss[count].sum()), int(count.sum()))


def _add(tick: Tick, before: int, rows: int) -> None:
    tick(before + rows)


def _batches(rows: list[tuple[int, int]], most_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of like length: at most ``_BATCH_ROWS``, and ``most_tokens`` laid out as a rectangle."""
    batch: list[int] = []
    for number, length in sorted(rows, key=lambda row: (row[1], row[0])):
        if batch and (len(batch) == _BATCH_ROWS or (len(batch) + 1) * length > most_tokens):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
