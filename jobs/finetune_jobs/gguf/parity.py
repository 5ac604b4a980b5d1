"""Is this GGUF the model that was trained? The same prompts, ids and stop token, and nearly the same probabilities.

The Hugging Face model runs once, in float32; what it says is kept in a file (``reference_bytes``) and compared with
every GGUF.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from finetune_api.pipeline import LORA
from finetune_jobs.data.encode import Dropped, LossOn, encode, prompt_ids, prompt_text, stop_ids, where
from finetune_jobs.data.rows import Row
from finetune_jobs.gguf.engine import Array, GGUFModel
from finetune_jobs.gguf.tokenizer import PROBES, disagreement
from finetune_jobs.merging.combine import Change
from finetune_jobs.merging.parity import float32_model
from finetune_jobs.run.errors import ConfigurationError, DataError

_log = logging.getLogger("finetune.gguf")
_ANSWER_TOKENS = 400
"""Enough for what the bounds must tell apart, and a few seconds for a small model on two cores."""
_ROW_TOKENS = 4096
_FILE_BYTES = 1 << 28
_GENERATED_ROWS = 4
BOUNDS: dict[str, tuple[float, float]] = {
    "F32": (1e-4, 0.999),
    "F16": (1e-4, 0.999),
    "BF16": (1e-3, 0.999),
    "Q8_0": (5e-3, 0.99),
    "Q6_K": (2e-2, 0.0),
    "Q5_K_M": (0.1, 0.97),
    "Q4_K_M": (0.1, 0.97),
    LORA: (1e-2, 0.97),  # over its base in full precision: what the merge may lose by rounding (merging/parity.py)
}
"""Highest mean KL divergence (nats) and lowest top-1 agreement (``Parity.top1_sure``); smaller types are recorded only
(reference/practice.md section 5)."""


@dataclass(frozen=True)
class Example:
    """A row in tokens."""

    prompt: list[int]
    answer: list[int]
    """With the stop token."""


@dataclass(frozen=True)
class Reference:
    """What the Hugging Face model says."""

    rows: Sequence[Row]
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Example]
    logprobs: Array
    """(answer tokens of all examples, vocabulary), in a file."""


def rows_for(test: Sequence[Row]) -> Sequence[Row]:
    """The locked test rows; where a job has none, texts in many scripts."""
    return test or [Row(id=f"probe-{i}", source="built in", line=i, text=text) for i, text in enumerate(PROBES, 1)]


def reference(
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    scratch: Path,
    *,
    changes: Mapping[str, Change] | None = None,
    trust_remote_code: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Reference:
    """Run the model on the rows, in float32 whatever its weights are stored in, changed by ``changes`` (merging);
    ``tick`` may raise to stop.
    """
    with float32_model(model, trust_remote_code, changes) as network:
        vocabulary = int(network.get_output_embeddings().weight.shape[0])
        longest = min(_ROW_TOKENS, getattr(network.config, "max_position_embeddings", _ROW_TOKENS))
        examples = _examples(rows, tokenizer, longest, _room(vocabulary))
        shape = (sum(len(e.answer) for e in examples), vocabulary)
        logprobs: Array = np.memmap(scratch / "reference.f32", dtype=np.float32, mode="w+", shape=shape)
        at = 0
        for example in examples:
            tick()
            logprobs[at : at + len(example.answer)] = answer_logprobs(network, example)
            at += len(example.answer)
    return Reference(rows, tokenizer, examples, logprobs)


def reference_bytes(vocabulary: int) -> int:
    """What the file of ``reference`` takes at most, for a model of so many tokens."""
    return 4 * vocabulary * _room(vocabulary)


def _room(vocabulary: int) -> int:
    return min(_ANSWER_TOKENS, _FILE_BYTES // (4 * vocabulary))


def _examples(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, longest: int, room: int) -> list[Example]:
    """The first rows' last answers, ``room`` tokens of them altogether."""
    found: list[Example] = []
    for row in rows:
        learned: LossOn = "all" if "text" in row else "completion"
        encoded = encode(row, tokenizer, loss_on=learned, max_length=longest, overlong="truncate")
        if isinstance(encoded, Dropped):
            continue
        start = max(1, encoded.supervised.index(True))
        answer = encoded.input_ids[start : start + room]
        found.append(Example(encoded.input_ids[:start], answer))
        room -= len(answer)
        if room == 0:
            break
    if not found:
        raise DataError(f"no test row is short enough to compare a GGUF on: each has over {longest} tokens")
    return found


@torch.inference_mode()
def answer_logprobs(network: Any, example: Example) -> Array:
    """(answer tokens, vocabulary): what a Hugging Face model says at each place of the answer."""
    ids = torch.tensor([[*example.prompt, *example.answer][:-1]])
    logits = network(input_ids=ids, use_cache=False).logits[0, len(example.prompt) - 1 :]
    return np.asarray(logits.double().log_softmax(-1).float().numpy())


def token_divergences(theirs: Array, ours: Array) -> list[float]:
    """KL(theirs || ours) in nats at each place, of log-probabilities (places, vocabulary)."""
    divergences = (np.exp(theirs, dtype=np.float64) * (theirs.astype(np.float64) - ours)).sum(-1)
    return [float(one) for one in divergences]


def _sure(theirs: Array) -> npt.NDArray[np.bool_]:
    """Where one token has more than 1/2: elsewhere a little noise may turn the choice."""
    sure: npt.NDArray[np.bool_] = theirs.max(-1) > np.log(0.5)
    return sure


def stop_places(theirs: Array, stops: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Where a model with these log-probabilities (places, vocabulary) would stop for sure."""
    return np.isin(theirs.argmax(-1), stops) & _sure(theirs)


@dataclass(frozen=True)
class Parity:
    """How one GGUF stands to the Hugging Face model."""

    kl: float
    """Mean KL(Hugging Face || GGUF) over the answer tokens, in nats."""
    kl_error: float
    """Standard error of that mean."""
    top1: float
    """Share of the answer tokens at which both find the same token likeliest."""
    top1_sure: float
    """The same, but where the model gives no token more than 1/2, any choice counts as agreed. Raw agreement on free
    text is below the bounds even for F16 (docs/adr/006-gguf.md)."""
    tokens: int
    rows: int
    prompts: int
    """Conversations rendered by both; 0 when the model has no chat template."""
    texts: int
    """Texts tokenized by both."""
    differences: list[str]
    """Prompts and token ids that differ, in words; a good GGUF has none."""
    stop_token: str
    """With which the training closed an answer."""
    stop_known: bool
    """llama.cpp ends an answer at that token by itself."""
    stops: int
    stops_expected: int
    """Of the places where the Hugging Face model would stop for sure (over 1/2), at how many the GGUF would."""
    generated: int
    finished: int
    """Of the answers that the GGUF wrote to real prompts, how many it ended by itself."""

    def failures(self, kind: str) -> list[str]:
        """Why the GGUF must not be used; none for a good one. ``kind`` decides on the bounds."""
        words = [*self.differences[:3]]
        if not self.stop_known:
            words.append(
                f"llama.cpp does not end an answer at {self.stop_token!r}, with which the model was taught to stop"
            )
        if self.stops * 2 < self.stops_expected and self.stops_expected > 1:  # one place is no evidence either
            words.append(f"it would stop at {self.stops} of the {self.stops_expected} places where the model does")
        limit, agreement = BOUNDS.get(kind, (float("inf"), 0.0))
        # Beyond what so few tokens can tell; written so that NaN fails.
        if not self.kl - 2 * self.kl_error <= limit:
            words.append(
                f"mean KL divergence {self.kl:.2e} +- {self.kl_error:.0e} over {self.tokens} tokens, at most {limit:g}"
            )
        if (1 - self.top1_sure) * self.tokens > max(1.0, (1 - agreement) * self.tokens):  # one token is no evidence
            words.append(f"top-1 agreement {self.top1_sure:.4f} over {self.tokens} tokens, at least {agreement:g}")
        return words


def compare(
    path: Path,
    known: Reference,
    *,
    max_new_tokens: int,
    lora: Path | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Parity:
    """Hold a GGUF, maybe with an adapter over it, against the reference. Memory: the mapped file and one row's
    probabilities.
    """
    tokenizer = known.tokenizer
    with GGUFModel(path, lora=lora) as model:
        prompts, texts, differences = _same_prompts(model, known.rows, tokenizer)
        stops = stop_ids(tokenizer)
        ends = [*stops, *model.end_of_generation]
        divergences: list[float] = []
        same = contradicted = tokens = stopped = expected = 0
        found = model.answer_logprobs((e.prompt, e.answer) for e in known.examples)
        for example, ours in zip(known.examples, found, strict=True):
            tick()
            theirs = known.logprobs[tokens : tokens + len(example.answer)]
            if ours.shape != theirs.shape:
                raise ConfigurationError(
                    f"{path.name} has {ours.shape[1]} tokens in its vocabulary, the model {theirs.shape[1]}"
                )
            divergences += token_divergences(theirs, ours)
            best, wanted = ours.argmax(-1), theirs.argmax(-1)
            same += int((best == wanted).sum())
            contradicted += int(((best != wanted) & _sure(theirs)).sum())
            tokens += len(theirs)
            places = stop_places(theirs, stops)
            expected += int(places.sum())
            stopped += int((places & np.isin(best, ends)).sum())
        asked = [ids for row in known.rows if "text" not in row and (ids := prompt_ids(row, tokenizer))][
            :_GENERATED_ROWS
        ]
        answers = model.generate(asked, max_new_tokens, stops, lambda done: tick())
        return Parity(
            kl=float(np.mean(divergences)),
            kl_error=float(np.std(divergences)) / tokens**0.5,
            top1=same / tokens,
            top1_sure=1 - contradicted / tokens,
            tokens=tokens,
            rows=len(known.examples),
            prompts=prompts,
            texts=texts,
            differences=differences,
            stop_token=model.token_text(stops[0]),
            stop_known=stops[0] in model.end_of_generation,
            stops=stopped,
            stops_expected=expected,
            generated=len(answers),
            finished=sum(a.finished for a in answers),
        )


def _same_prompts(
    model: GGUFModel, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int, list[str]]:
    """How many prompts and texts were compared, and where they differ."""
    differences: list[str] = []
    prompts = 0
    texts: list[tuple[str, list[int]]] = []
    for row in rows:
        text = row["text"] if "text" in row else prompt_text(row, tokenizer)
        texts.append((text, _ids(tokenizer, text) if "text" in row else prompt_ids(row, tokenizer)))
        if (messages := _asked(row)) is None:
            continue
        prompts += 1
        try:
            rendered = model.render(messages, row.get("tools"))
        except DataError as error:
            differences.append(f"{where(row)}: {error}")
            continue
        if rendered != text:
            differences.append(f"{where(row)}: it renders the prompt {_from_there(rendered, text)}")
    texts += [(probe, _ids(tokenizer, probe)) for probe in PROBES]
    for text, expected in texts:
        if (found := model.tokenize(text)) != expected:
            differences.append(disagreement(text, found, expected))
    return prompts, len(texts), differences


def _asked(row: Row) -> Sequence[Any] | None:
    """The conversation that the prompt is made of; None for a row without one."""
    if "messages" in row:
        messages = row["messages"]
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    prompt = row.get("prompt")
    return prompt if isinstance(prompt, list) else None


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])


def _from_there(rendered: str, expected: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(rendered, expected, strict=False)) if a != b),
        min(len(rendered), len(expected)),
    )
    return f"otherwise from character {at + 1}: {rendered[at : at + 30]!r} instead of {expected[at : at + 30]!r}"
