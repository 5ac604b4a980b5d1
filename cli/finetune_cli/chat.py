"""Talk to a GGUF on this machine, through llama.cpp and the chat template inside the file."""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_cli.errors import INVALID, CommandError

Message = dict[str, str]


class Chat:
    """A conversation with a loaded GGUF. Greedy unless a temperature is given: the same question, the same answer."""

    def __init__(
        self,
        path: Path,
        *,
        adapter: Path | None = None,
        system: str = "",
        context: int = 4096,
        max_tokens: int = 512,
        temperature: float = 0.0,
    ) -> None:
        """Load it, a LoRA adapter over it, with a context of that many tokens or the model's own if that is smaller.

        What llama.cpp cannot read is a CommandError.
        """
        for file in (path, adapter):
            if file is not None:
                _check(file)
        self._model = _load(path, context, adapter)
        self._options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "stream": True}
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[Message] = []
        self.has_template = "tokenizer.chat_template" in self._model.metadata
        """Without one there is no conversation: each text is only continued."""

    def ask(self, text: str) -> Iterator[str]:
        """The answer, piece by piece. ValueError when the conversation no longer fits the context: ``clear`` it."""
        if not self.has_template:
            for chunk in _until_full(self._model.create_completion(text, **self._options)):
                yield chunk["choices"][0]["text"]
            return
        question = {"role": "user", "content": text}
        answer = ""
        messages = [*self._system, *self._turns, question]
        for chunk in _until_full(self._model.create_chat_completion(messages, **self._options)):
            piece = chunk["choices"][0]["delta"].get("content") or ""
            answer += piece
            yield piece
        self._turns += [question, {"role": "assistant", "content": answer}]

    def clear(self) -> None:
        """Forget what was said."""
        self._turns.clear()


def _until_full(chunks: Iterator[Any]) -> Iterator[Any]:
    """An answer that fills the context ends there: llama.cpp finds no room for one more token."""
    try:
        yield from chunks
    except RuntimeError as error:
        if str(error) != "llama_decode returned 1":
            raise


def _check(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}", INVALID) from error
    if magic != b"GGUF":
        raise CommandError(f"{path} is not a GGUF file", INVALID)


def _load(path: Path, context: int, adapter: Path | None) -> Any:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads would spin and slow the busy ones
    try:
        import llama_cpp
    except ImportError as error:
        raise CommandError(f"chat needs llama-cpp-python ({error}): install the extra `gguf`") from error
    global _quiet
    _quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    try:
        over = str(adapter) if adapter is not None else None
        model = llama_cpp.Llama(str(path), n_ctx=context, n_gpu_layers=-1, verbose=False, lora_path=over)
        architecture = model.metadata.get("general.architecture", "")
        own = int(model.metadata.get(f"{architecture}.context_length", context))
        if own < context:  # beyond it the model has learned nothing
            model = llama_cpp.Llama(str(path), n_ctx=own, n_gpu_layers=-1, verbose=False, lora_path=over)
    except (ValueError, OSError, RuntimeError) as error:
        raise CommandError(f"llama.cpp cannot load {path}: {error}") from error
    return model


_quiet: Any = None
"""llama.cpp keeps a pointer to this function, so Python must keep the function."""


def interactive(chat: Chat) -> None:
    """Questions from the terminal until end of file; Ctrl-C cuts an answer short."""
    print("Ctrl-D ends, /clear forgets what was said, Ctrl-C cuts an answer short.", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if text == "/clear":
            chat.clear()
        elif text:
            try:
                for piece in chat.ask(text):
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                pass
            except ValueError as error:
                print(f"{error}\n/clear and ask again", file=sys.stderr)
            print()
