"""Rows to token ids, the same for training, evaluation and the comparison with GGUFs. No torch.

A conversation is cut into pieces at the places where generation starts and stops: everything up to a generation
prompt, then the answer through its stop token, and so on. Each piece is tokenized for itself, so that a model is
trained on exactly the prompt ids that it will be asked with, whatever letter the answer begins with. The pieces come
from the chat template alone: an answer is what ``render(messages[:i+1])`` has beyond ``render(messages[:i],
add_generation_prompt=True)``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from finetune_jobs.data.rows import Message, Row
from finetune_jobs.data.tokenizer import (
    continued,
    end_of_text,
    facts,
    load_tokenizer,
    stop_ids,
    tokenize,
    with_bos,
)
from finetune_jobs.run.errors import ConfigurationError, DataError, first_line

__all__ = [
    "Dropped",
    "Encoded",
    "EncodedPair",
    "encode",
    "encode_pair",
    "encode_pairs",
    "encode_rows",
    "load_tokenizer",
    "prompt_ids",
    "prompt_text",
    "reference",
    "stop_ids",
]

LossOn = Literal["auto", "completion", "assistant", "all"]
Overlong = Literal["drop", "truncate"]
Refused = Callable[[DataError], None]
T = TypeVar("T")
_BATCH = 256
OVERLONG = "longer than maxLength"
NOTHING_LEFT = "nothing left to learn after the cut at maxLength"
REFUSED = "unusable"


@dataclass(frozen=True)
class Encoded:
    """One example; ``supervised[i]`` says whether token i is learned."""

    input_ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class EncodedPair:
    """One pair; each answer ends with its stop token."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class Dropped:
    """Left out and counted under ``reason``."""

    reason: str


Pieces = tuple[list[tuple[str, bool]], bool]
"""A row's texts, each with whether its tokens are supervised; and whether the last already ends with a stop token."""
Ids = tuple[list[tuple[list[int], bool]], bool]
"""The same, tokenized."""


def prompt_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model is asked with: all before the row's last answer, generation prompt included; empty for text."""
    if "messages" in row:
        messages = row["messages"]
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return _render(row, tokenizer, asked, generate=True)
    prompt = row.get("prompt", "")
    return prompt if isinstance(prompt, str) else _render(row, tokenizer, prompt, generate=True)


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``prompt_text`` as ids, with the BOS that the tokenizer wants, once."""
    return with_bos(tokenize(tokenizer, [prompt_text(row, tokenizer)])[0], tokenizer)


def reference(row: Row) -> str:
    """The answer that the row holds up as right; empty where there is none to compare with (text and ``refusals``
    rows).
    """
    if "reference" in row:
        return row["reference"]
    if "messages" in row and row["messages"][-1]["role"] == "assistant":
        return row["messages"][-1]["content"].strip()
    answer = row.get("completion", row.get("chosen", ""))
    return (answer if isinstance(answer, str) else answer[-1]["content"]).strip()


def encode(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, loss_on: LossOn, max_length: int, overlong: Overlong
) -> Encoded | Dropped:
    """One training row. Raises DataError naming its file and line, ConfigurationError for a template that cannot be
    trained on.
    """
    return next(encode_rows([row], tokenizer, loss_on=loss_on, max_length=max_length, overlong=overlong))


def encode_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    loss_on: LossOn,
    max_length: int | None,
    overlong: Overlong = "drop",
    refused: Refused | None = None,
) -> Iterator[Encoded | Dropped]:
    """``encode`` for many rows, in order and faster; ``max_length`` None: no limit. ``refused`` takes the errors in
    the rows.
    """
    for some in _batches(rows):
        pieces = [_guarded(partial(_pieces, row, tokenizer, loss_on), refused) for row in some]
        ids = iter(_ids(tokenizer, [p for p in pieces if p is not None]))
        for row, piece in zip(some, pieces, strict=True):
            joined = None if piece is None else _guarded(partial(_joined, row, next(ids), tokenizer), refused)
            yield Dropped(REFUSED) if joined is None else _limit(joined, max_length, overlong)


def encode_pair(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, max_length: int, overlong: Overlong
) -> EncodedPair | Dropped:
    """One pair; ``max_length`` bounds prompt and answer together, for each of the two."""
    return next(encode_pairs([row], tokenizer, max_length=max_length, overlong=overlong))


def encode_pairs(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    overlong: Overlong = "drop",
    refused: Refused | None = None,
) -> Iterator[EncodedPair | Dropped]:
    """``encode_pair`` for many rows, in order and faster; ``max_length`` None: no limit. ``refused`` takes the errors
    in the rows.
    """
    for some in _batches(rows):
        pieces = [_guarded(partial(_pair_pieces, row, tokenizer), refused) for row in some]
        ids = iter(_ids(tokenizer, [side for pair in pieces if pair is not None for side in pair]))
        for row, pair in zip(some, pieces, strict=True):
            joined = (
                None if pair is None else _guarded(partial(_joined_pair, row, next(ids), next(ids), tokenizer), refused)
            )
            yield Dropped(REFUSED) if joined is None else _limit_pair(joined, max_length, overlong)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    left = iter(rows)
    while some := list(islice(left, _BATCH)):
        yield some


def _guarded(work: Callable[[], T], refused: Refused | None) -> T | None:
    if refused is None:
        return work()
    try:
        return work()
    except DataError as error:
        refused(error)
        return None


def where(row: Row) -> str:
    """``train.jsonl:17``, for messages."""
    return f"{row['source']}:{row['line']}"


def _limit(encoded: Encoded, max_length: int | None, overlong: Overlong) -> Encoded | Dropped:
    if max_length is None or len(encoded.input_ids) <= max_length:
        return encoded
    if overlong == "drop":
        return Dropped(OVERLONG)
    if not any(encoded.supervised[1:max_length]):
        return Dropped(NOTHING_LEFT)
    return Encoded(encoded.input_ids[:max_length], encoded.supervised[:max_length])


def _limit_pair(pair: EncodedPair, max_length: int | None, overlong: Overlong) -> EncodedPair | Dropped:
    longest = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
    if max_length is None or longest <= max_length:
        return pair
    if overlong == "drop":
        return Dropped(OVERLONG)
    room = max(0, max_length - len(pair.prompt_ids))
    cut = EncodedPair(pair.prompt_ids, pair.chosen_ids[:room], pair.rejected_ids[:room])
    return cut if cut.chosen_ids != cut.rejected_ids else Dropped(NOTHING_LEFT)


def _joined(row: Row, tokenized: Ids, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    pieces, closed = tokenized
    ids, supervised = [i for piece, _ in pieces for i in piece], [learned for piece, learned in pieces for _ in piece]
    ids = _closed(ids, closed, tokenizer)
    supervised += [pieces[-1][1]] * (len(ids) - len(supervised))
    whole = with_bos(ids, tokenizer)
    supervised = [False] * (len(whole) - len(ids)) + supervised
    if not any(supervised[1:]):  # nothing predicts the first token
        raise DataError(f"{where(row)}: no supervised token; the answer must be longer")
    return Encoded(whole, supervised)


def _joined_pair(row: Row, chosen: Ids, rejected: Ids, tokenizer: PreTrainedTokenizerBase) -> EncodedPair:
    prompt = with_bos(chosen[0][0][0], tokenizer)
    answers = [_closed(pieces[1][0], closed, tokenizer) for pieces, closed in (chosen, rejected)]
    if answers[0] == answers[1]:
        raise DataError(f"{where(row)}: chosen and rejected are the same tokens; change one or remove the row")
    return EncodedPair(prompt, *answers)


def _closed(ids: list[int], closed: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every example ends with a stop token: without one the model never learns to stop."""
    return ids if closed else [*ids, end_of_text(tokenizer)]


def _pieces(row: Row, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> Pieces:
    if "messages" in row:
        return _chat_pieces(row, tokenizer, loss_on)
    if "text" in row:
        if loss_on in ("completion", "assistant"):
            raise ConfigurationError(
                f"training.lossOn: {loss_on} does not fit text rows ({where(row)}), which have no answer; use auto or "
                "all"
            )
        return [(row["text"], True)], False
    return [(str(row["prompt"]), loss_on == "all"), (row["completion"], True)], False


def _chat_pieces(row: Row, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> Pieces:
    messages = row["messages"]
    # A greeting before any question is context: nothing would ever ask for it.
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > 0]
    if loss_on == "completion":
        answers = answers[-1:]
    full = _render(row, tokenizer, messages)
    pieces: list[tuple[str, bool]] = []
    at, closed = 0, False
    for i in answers:
        before = _render(row, tokenizer, messages[:i], generate=True)
        upto = full if i == len(messages) - 1 else _render(row, tokenizer, messages[: i + 1])
        end, closed = _answer_end(upto, len(before), messages[i]["content"], tokenizer)
        if not (upto.startswith(before) and full.startswith(upto[:end]) and at <= len(before) < end):
            raise _not_incremental(row, loss_on)
        pieces += [(full[at : len(before)], loss_on == "all"), (full[len(before) : end], True)]
        at = end
    return pieces, closed


def _pair_pieces(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Pieces]:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return [([(prompt, False), (str(answer), True)], False) for answer in (row["chosen"], row["rejected"])]
    before = _render(row, tokenizer, prompt, generate=True)
    sides: list[Pieces] = []
    for answer in (row["chosen"], row["rejected"]):
        assert not isinstance(answer, str)  # rows.py makes all three of a kind
        full = _render(row, tokenizer, [*prompt, *answer])
        end, closed = _answer_end(full, len(before), answer[-1]["content"], tokenizer)
        if not full.startswith(before) or end <= len(before):
            raise _not_incremental(row, "completion")
        sides.append(([(before, False), (full[len(before) : end], True)], closed))
    return sides


def _answer_end(text: str, start: int, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, bool]:
    """Where the answer that begins at ``start`` ends, its stop token included, and whether there is one."""
    said = text.rfind(content.strip(), start)
    after = said + len(content.strip()) if said >= 0 else start
    ends = [(text.find(stop, after), len(stop)) for stop in facts(tokenizer).stop_texts]
    found = [(at, length) for at, length in ends if at >= 0]
    if not found:
        return len(text.rstrip()) if said < 0 else after, False
    at, length = min(found)
    return at + length, True


def _not_incremental(row: Row, loss_on: LossOn) -> ConfigurationError:
    if loss_on == "completion" or sum(m["role"] == "assistant" for m in row.get("messages", [])) < 2:
        return ConfigurationError(
            "spec.model.chatTemplate: the template does not put an answer right after its generation prompt "
            f"({where(row)}), so the model would "
            "learn another text than it is asked with; write a template for training, in which it does"
        )
    return ConfigurationError(
        "spec.model.chatTemplate: the template renders earlier turns of a conversation otherwise than at the time "
        f"they were said ({where(row)}), "
        "so not every assistant turn can be learned; set training.lossOn: completion, or write a template that keeps "
        "them"
    )


def _render(
    row: Row, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generate: bool = False
) -> str:
    if not tokenizer.chat_template:
        raise ConfigurationError(
            f"spec.model.chatTemplate: the model's tokenizer has no chat template, but {where(row)} is a "
            "conversation; write the template, or use "
            "promptCompletion rows"
        )
    turns: Any = list(messages)  # the library's type knows only texts as values
    try:
        return str(
            tokenizer.apply_chat_template(turns, tools=row.get("tools"), tokenize=False, add_generation_prompt=generate)
        )
    except TemplateError as error:
        raise DataError(
            f"{where(row)}: the model's chat template refuses the conversation: {first_line(error)}; change the row "
            "or spec.model.chatTemplate"
        ) from error
    except Exception as error:  # templates are programs: they stumble over types and missing keys in any way
        raise DataError(f"{where(row)}: the chat template fails on the conversation: {first_line(error)}") from error


def _ids(tokenizer: PreTrainedTokenizerBase, rows: list[Pieces]) -> list[Ids]:
    """The pieces of each row as ids. One call for all rows, unless the tokenizer pads words: then each piece needs the
    one before.
    """
    if facts(tokenizer).pads_words:
        found = []
        for pieces, closed in rows:
            ids: list[tuple[list[int], bool]] = []
            for text, learned in pieces:
                before = next((p for p, _ in reversed(ids) if p), None)
                ids.append(
                    (
                        tokenize(tokenizer, [text])[0] if before is None else continued(tokenizer, before[-1], text),
                        learned,
                    )
                )
            found.append((ids, closed))
        return found
    flat = iter(tokenize(tokenizer, [text for pieces, _ in rows for text, _ in pieces]))
    return [([(next(flat), learned) for _, learned in pieces], closed) for pieces, closed in rows]
