"""A GGUF that answers: greedy decoding of many prompts at once, and the probabilities of given answers.

On the low-level interface, because the high-level one of llama-cpp-python answers one prompt at a time and keeps the
last prompt's cache, which changes greedy answers (reference/practice.md section 5). Here every group of prompts starts
from an empty cache and each prompt has a part of it to itself: what a prompt is answered does not depend on those
beside it, but for the rounding of float sums.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from finetune_jobs.gguf.library import api, detokenize, last_errors, loaded, threads, tokenize
from finetune_jobs.run.errors import DataError, InputMissingError, StageError

Array = np.ndarray[Any, np.dtype[np.float32]]
Tick = Callable[[int], None]
_ARRAYS = {f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges", "scores")}
"""llama.cpp gives only their beginnings, of no use to anyone."""
_BATCH = 512
"""Tokens in one ``llama_decode``; bounds the memory of logits and of intermediate results."""
_CACHE_BYTES = 2 << 30
"""Larger caches get fewer prompts at a time."""


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt."""

    ids: list[int]
    """Without the stop token."""
    text: str
    """Of ``ids``, control tokens left out."""
    finished: bool
    """It ended with a stop token, not by its length."""
    stop_id: int | None


class GGUFModel:
    """A loaded model; a context manager, since the library's memory is not Python's."""

    def __init__(self, path: Path, *, context_length: int = 0, parallel: int = 16, lora: Path | None = None) -> None:
        """Load ``path``, with an adapter over it. ``context_length``: longest prompt with its answer; 0 for all that
        the model takes. Raises InputMissingError for an adapter of another model.
        """
        self._stack = ExitStack()
        self._model = self._stack.enter_context(loaded(path))
        self._vocab = api.llama_model_get_vocab(self._model)
        self._path = path
        self._lora = None  # freed with the model
        if lora is not None and not (found := api.llama_adapter_lora_init(self._model, str(lora).encode())):
            self._stack.close()
            raise InputMissingError(f"{lora} cannot be laid over {path.name}: {last_errors()}")
        elif lora is not None:
            self._lora = found
        limit = int(api.llama_model_n_ctx_train(self._model))
        self.context_length: int = min(context_length, limit) if context_length else limit
        self._parallel = parallel
        self.vocab_size: int = api.llama_vocab_n_tokens(self._vocab)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The file's key-value pairs as text; arrays are left out."""
        found = {}
        for i in range(api.llama_model_meta_count(self._model)):
            key = _text(api.llama_model_meta_key_by_index, self._model, i)
            found[key] = _text(api.llama_model_meta_val_str_by_index, self._model, i)
        return {key: value for key, value in found.items() if key not in _ARRAYS}

    @property
    def chat_template(self) -> str | None:
        """The template in the file."""
        return self.metadata.get("tokenizer.chat_template")

    @cached_property
    def end_of_generation(self) -> list[int]:
        """The tokens at which llama.cpp ends an answer by itself (EOS, EOT and the like)."""
        return [i for i in range(self.vocab_size) if api.llama_vocab_is_eog(self._vocab, i)]

    @property
    def eos(self) -> int:
        """End-of-sequence token; -1 if there is none."""
        return int(api.llama_vocab_eos(self._vocab))

    @property
    def bos(self) -> int:
        """Beginning-of-sequence token; -1 if there is none."""
        return int(api.llama_vocab_bos(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """llama.cpp puts the BOS before a text by itself; a model may name one and not want that (SmolLM2)."""
        return bool(api.llama_vocab_get_add_bos(self._vocab)) and self.bos >= 0

    def token_text(self, token: int) -> str:
        """How a token is written in the vocabulary; empty for -1."""
        return str(api.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace")) if token >= 0 else ""

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
        """The prompt that llama-cpp-python makes of a conversation by the file's template, up to the answer.

        Raises DataError when the file has no template or the template refuses the conversation.
        """
        if self.chat_template is None:
            raise DataError(f"{self._path.name} has no chat template")
        try:
            return str(self._formatter(messages=[dict(m) for m in messages], tools=tools).prompt)
        except Exception as error:  # templates raise whatever they like
            raise DataError(f"the chat template in {self._path.name} refuses the conversation: {error}") from error

    @cached_property
    def _formatter(self) -> Any:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        return Jinja2ChatFormatter(
            template=self.chat_template or "", eos_token=self.token_text(self.eos), bos_token=self.token_text(self.bos)
        )

    def tokenize(self, text: str) -> list[int]:
        """Token ids, control tokens recognised; BOS first where the file asks for it and the text does not have it."""
        ids = tokenize(self._vocab, text)
        return [self.bos, *ids] if self.adds_bos and ids[:1] != [self.bos] else ids

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Iterable[int] = (),
        tick: Tick = lambda done: None,
    ) -> list[Generation]:
        """The likeliest next token, again and again, until one of ``stop_ids``, the model's own end, or the limit.

        Answers come in the order of the prompts; the same call gives the same answers. An empty prompt and one that
        fills the context get an empty, unfinished answer. ``tick`` is called after every step with the number of
        answers done; it may raise to end the work.
        """
        stops = {*stop_ids, *self.end_of_generation}
        answers = [Generation([], "", False, None) for _ in prompts]
        fits = [i for i, prompt in enumerate(prompts) if 0 < len(prompt) < self.context_length]
        if not fits or max_new_tokens < 1:
            return answers
        length = min(self.context_length, max(len(prompts[i]) for i in fits) + max_new_tokens)
        parallel = max(1, min(self._parallel, len(fits), _CACHE_BYTES // (length * self._cache_bytes_per_token)))
        done = len(prompts) - len(fits)
        with self._context(length, parallel) as context:
            for start in range(0, len(fits), parallel):
                group = fits[start : start + parallel]
                found = self._group(context, [prompts[i] for i in group], max_new_tokens, stops, tick, done)
                for i, answer in zip(group, found, strict=True):
                    answers[i] = answer
                done += len(group)
        tick(done)
        return answers

    def _group(
        self,
        context: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: set[int],
        tick: Tick,
        done: int,
    ) -> list[Generation]:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        answers: list[list[int]] = [[] for _ in prompts]
        ended: dict[int, int] = {}
        entries = [(s, p, t, p == len(prompt) - 1) for s, prompt in enumerate(prompts) for p, t in enumerate(prompt)]
        while entries:
            following = []
            for sequence, position, token in self._decode(context, entries, lambda logits: int(np.argmax(logits))):
                if token in stops:
                    ended[sequence] = token
                    continue
                answers[sequence].append(token)
                if len(answers[sequence]) < max_new_tokens and position + 2 < self.context_length:
                    following.append((sequence, position + 1, token, True))
            entries = following
            tick(done + len(prompts) - len(entries))
        texts = [detokenize(self._vocab, ids) for ids in answers]
        return [Generation(ids, texts[s], s in ended, ended.get(s)) for s, ids in enumerate(answers)]

    def answer_logprobs(self, sequences: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Array]:
        """For each (prompt, answer) the log-probabilities of every token at every place of the answer.

        Arrays of (answer length, vocabulary), one at a time. The prompt must not be empty. Raises DataError for a pair
        longer than the context.
        """
        for i, (prompt, answer) in enumerate(sequences):
            ids = [*prompt, *answer][:-1]  # the last token predicts nothing that is asked for
            if len(ids) > self.context_length:
                raise DataError(f"row {i + 1} has {len(ids) + 1} tokens; {self._path.name} takes {self.context_length}")
            found = np.empty((len(answer), self.vocab_size), dtype=np.float32)
            entries = [(0, at, token, at >= len(prompt) - 1) for at, token in enumerate(ids)]
            with self._context(len(ids), 1) as context:
                for row, (_, _, values) in enumerate(self._decode(context, entries, log_softmax)):
                    found[row] = values
            yield found

    def _decode(
        self, context: Any, entries: Sequence[tuple[int, int, int, bool]], read: Any
    ) -> Iterator[tuple[int, int, Any]]:
        """Run (sequence, position, token, wanted) entries; (sequence, position, read(logits)) for those wanted."""
        for start in range(0, len(entries), _BATCH):
            part = entries[start : start + _BATCH]
            batch = api.llama_batch_init(len(part), 0, 1)
            try:
                batch.n_tokens = len(part)
                for i, (sequence, position, token, wanted) in enumerate(part):
                    batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                if api.llama_decode(context, batch) != 0:
                    raise StageError(f"llama.cpp failed on {self._path.name}: {last_errors()}")
            finally:
                api.llama_batch_free(batch)
            for i, (sequence, position, _, wanted) in enumerate(part):
                if wanted:
                    logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), (self.vocab_size,))
                    yield sequence, position, read(logits)

    @contextmanager
    def _context(self, length: int, parallel: int) -> Iterator[Any]:
        parameters = api.llama_context_default_params()
        parameters.n_ctx = -(-length // 256) * 256 * parallel  # llama.cpp wants each part a multiple of 256
        parameters.n_seq_max = parallel
        parameters.n_batch = parameters.n_ubatch = _BATCH
        parameters.n_threads = parameters.n_threads_batch = threads()
        parameters.kv_unified = False
        parameters.no_perf = True
        context = api.llama_init_from_model(self._model, parameters)
        if not context:
            raise StageError(f"no memory for {parallel} x {length} tokens of {self._path.name}: {last_errors()}")
        if self._lora is not None:
            adapters = (api.llama_adapter_lora_p_ctypes * 1)(self._lora)
            api.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
        try:
            yield context
        finally:
            api.llama_free(context)

    @property
    def _cache_bytes_per_token(self) -> int:
        head = api.llama_model_n_embd(self._model) // api.llama_model_n_head(self._model)
        keys = api.llama_model_n_layer(self._model) * api.llama_model_n_head_kv(self._model) * head
        return int(2 * 2 * keys)  # as many values, both in float16


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis, the sum taken in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), dtype=np.float32)


def _text(call: Any, model: Any, index: int) -> str:
    """A text of unknown length from a C function of the ``snprintf`` kind."""
    size = 256
    while True:
        buffer = ctypes.create_string_buffer(size)
        length = call(model, index, buffer, size)
        if length < size:
            return buffer.value.decode("utf-8", "replace")
        size = length + 1
