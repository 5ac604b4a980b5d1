"""What a tokenizer does at the seams of a text: begin it, go on in the middle of it, end it."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune_jobs.run.errors import ConfigurationError, InputMissingError, first_line

_FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken")
"""One of them is there wherever there is a tokenizer."""


@dataclass(frozen=True)
class Facts:
    """What a tokenizer does; found out once."""

    bos: int | None
    """The id that every text begins with; None if the tokenizer adds none."""
    stops: tuple[int, ...]
    """Ids at which generation ends."""
    stop_texts: tuple[str, ...]
    """The same as a chat template renders them."""
    pads_words: bool
    """The tokenizer puts a space before a text (SentencePiece), which must not happen in the middle of one."""


def load_tokenizer(
    directory: Path, chat_template: str = "", *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; a ``chat_template`` given replaces its own. Never goes to the network.

    Of several named templates the ``default`` is its own, rows with tools included: it is the one that a GGUF answers
    by.
    """
    from transformers import AutoTokenizer  # it brings torch, which not everything that reads rows needs

    if not any(any(directory.glob(pattern)) for pattern in _FILES):
        raise InputMissingError(
            f"spec.model.source: the model has no tokenizer ({', '.join(_FILES)}); copy it beside the weights"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # whatever a damaged tokenizer makes the library raise
        raise ConfigurationError(
            f"spec.model.source: its tokenizer cannot be loaded: {first_line(error)}; copy its files again"
        ) from error
    if chat_template:
        tokenizer.chat_template = chat_template
    elif isinstance(tokenizer.chat_template, dict):
        named: dict[str, str] = tokenizer.chat_template
        if "default" not in named:
            raise ConfigurationError(
                f"spec.model.chatTemplate: the model has several chat templates ({', '.join(sorted(named))}), none of "
                "them named default; write here the one to use"
            )
        tokenizer.chat_template = named["default"]
    return tokenizer


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids at which generation ends: the one with which the chat template closes an answer, then the tokenizer's
    own.
    """
    return list(facts(tokenizer).stops)


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends every text which the chat template does not end; ConfigurationError if there is none."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise ConfigurationError(
            "spec.model.source: its tokenizer has no end-of-text token, so a model could never stop; set eos_token in "
            "it"
        )
    return tokenizer.eos_token_id


def with_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with the BOS that the tokenizer wants, once."""
    bos = facts(tokenizer).bos
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def continued(tokenizer: PreTrainedTokenizerBase, last: int, text: str) -> list[int]:
    """``text`` as it is after something else: after the token ``last`` if that is special, else after a line break."""
    special = last in _special_ids(tokenizer)
    lead = str(tokenizer.convert_ids_to_tokens(last)) if special else "\n"
    alone, both = tokenize(tokenizer, [lead, lead + text])
    return both[len(alone) :] if both[: len(alone)] == alone else tokenize(tokenizer, [text])[0]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Each text as it stands; special tokens written in it count as such, none are added."""
    if not texts:  # which the library takes for a mistake
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}


def facts(tokenizer: PreTrainedTokenizerBase) -> Facts:
    """What the tokenizer, with its present chat template, does."""
    return _facts(tokenizer, tokenizer.chat_template)


@lru_cache(maxsize=8)
def _facts(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> Facts:
    with_special = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ends = [i for i in (_turn_end(tokenizer) if chat_template else None, eos) if isinstance(i, int)]
    stops = tuple(dict.fromkeys(ends))
    first = str(tokenizer.convert_ids_to_tokens(tokenize(tokenizer, ["a"])[0][0]))
    return Facts(
        bos=bos if bos is not None and with_special[:1] == [bos] else None,
        stops=stops,
        stop_texts=tuple(str(tokenizer.convert_ids_to_tokens(i)) for i in stops),
        pads_words=first.startswith("▁"),
    )


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template closes an answer."""
    probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = str(tokenizer.apply_chat_template(probe, tokenize=False))
    except Exception:  # a template that refuses even this is reported with the first row
        return None
    tail = tokenize(tokenizer, [text[text.rfind("answer") + len("answer") :]])[0]
    special = _special_ids(tokenizer)
    return next((i for i in tail if i in special), None)
