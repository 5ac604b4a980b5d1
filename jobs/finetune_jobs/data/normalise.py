"""From a file's columns, under their standard names, to a row's content."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.types import DataFormat
from finetune_jobs.data.cells import answer_text, checked_text, filled_text, kind_of, listed, parsed_turns, text_of
from finetune_jobs.data.labels import read_label
from finetune_jobs.data.pairs import read_pair
from finetune_jobs.data.rows import DroppedRowError, Message, RowError
from finetune_jobs.data.turns import read_history, read_messages, read_system, read_tools, read_turns, says_something


@dataclass(frozen=True)
class Shape:
    """How the rows of one file are read."""

    format: DataFormat
    chat: bool
    """The tokenizer has a chat template: instructions become conversations."""
    chat_pairs: bool
    """Pairs, and answers with labels, of plain texts become conversations."""


def normalise(columns: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """The content of a row for training, evaluation or pairs. Raises RowError or DroppedRowError."""
    match shape.format:
        case DataFormat.MESSAGES:
            return _conversation(columns)
        case DataFormat.PROMPT_COMPLETION:
            return _prompt_completion(columns)
        case DataFormat.INSTRUCTION:
            return _instruction(columns, chat=shape.chat)
        case DataFormat.TEXT:
            return {"text": answer_text(columns, "text")}
        case DataFormat.LABELS:
            return {**_answer(columns, chat=shape.chat_pairs), "label": read_label(columns)}
        case _:
            return read_pair(columns, chat=shape.chat_pairs)


def question(columns: Mapping[str, Any], role: str, *, chat: bool) -> dict[str, Any]:
    """The content of a ``general`` row (with ``reference``) or a ``refusals`` row (with ``expect``).

    The reference is the column of that name, else the row's own answer.
    """
    messages, answer = asked(columns)
    content: dict[str, Any] = {"messages": messages}
    if not chat:
        content = {"prompt": instruction_prompt("\n\n".join(m["content"] for m in messages), "")}
    if role == "general":
        reference = columns.get("reference", answer)
        if not isinstance(reference, str) or not reference.strip():
            raise RowError("no `reference`: rows of `general` carry the answer to compare with, as text")
        return content | {"reference": checked_text(reference, "column reference").strip()}
    if columns.get("expect") not in ("refuse", "answer"):
        raise RowError(f"`expect` must be refuse or answer, got {columns.get('expect')!r}")
    return content | {"expect": columns["expect"]}


def asked(columns: Mapping[str, Any]) -> tuple[list[Message], Any]:
    """The turns up to the answer, and the answer as the row has it, nothing if it has none.

    A conversation, an instruction, a prompt or a text, whichever column is there.
    """
    answer: Any = ""
    if columns.keys() & {"messages", "conversations"}:
        messages = read_messages(columns)
        if messages[-1]["role"] == "assistant":
            answer = messages.pop()["content"]
    elif "instruction" in columns:
        messages = [*read_system(columns), {"role": "user", "content": _instruction_text(columns)}]
        answer = columns.get("output")
    elif isinstance(turns := parsed_turns(columns.get("prompt")), list):
        messages = read_turns(turns, "prompt")
        answer = columns.get("completion")
    elif column := next((c for c in ("prompt", "text") if c in columns), None):
        messages = [*read_system(columns), {"role": "user", "content": filled_text(columns, column)}]
        answer = columns.get("completion")
    else:
        raise RowError(
            f"rows need messages, instruction, prompt or text, but the file has {listed(columns)}; name yours with "
            f"`columns: {{prompt: <yours>}}`"
        )
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise RowError("no question: the last turn before the answer must be the user's")
    return messages, answer


def instruction_prompt(instruction: str, extra: str) -> str:
    """The prompt for models without a chat template; the answer follows it directly."""
    parts = [f"### Instruction:\n{instruction}", *([f"### Input:\n{extra}"] if extra else []), "### Response:\n"]
    return "\n\n".join(parts)


def _conversation(columns: Mapping[str, Any]) -> dict[str, Any]:
    messages = read_messages(columns)
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise RowError("no assistant turn, so no supervised token; add the answer or remove the row")
    if not any(says_something(m) for m in answers):
        raise RowError("the assistant's turns are empty, so no supervised token; add the answer or remove the row")
    if len(answers) == 1 and messages[0] is answers[0]:
        raise RowError("nothing stands before the assistant's only turn, so no supervised token; add the question")
    if messages[-1]["role"] != "assistant":
        raise DroppedRowError("conversation does not end with an assistant turn")
    if not all(says_something(m) for m in answers):
        raise DroppedRowError("one of several assistant turns is empty")
    return {"messages": messages, **read_tools(columns)}


def _prompt_completion(columns: Mapping[str, Any]) -> dict[str, Any]:
    prompt, completion = parsed_turns(columns.get("prompt")), parsed_turns(columns.get("completion"))
    if isinstance(prompt, list):
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if not isinstance(completion, list):
            raise RowError(f"column completion: must be text or messages, got {kind_of(completion)}")
        return _conversation({**columns, "messages": [*prompt, *completion]})
    return {"prompt": text_of(columns, "prompt"), "completion": answer_text(columns, "completion")}


def _answer(columns: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    content = _prompt_completion(columns)
    if not chat or "messages" in content:
        return content
    asked: list[Message] = [*read_system(columns), {"role": "user", "content": filled_text(columns, "prompt").strip()}]
    return {"messages": [*asked, {"role": "assistant", "content": content["completion"].strip()}]}


def _instruction(columns: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    output = answer_text(columns, "output")
    system, history = read_system(columns), read_history(columns)
    if chat:
        turns: list[Message] = [*system, *history, {"role": "user", "content": _instruction_text(columns)}]
        return {"messages": [*turns, {"role": "assistant", "content": output}]}
    past = [m["content"] for m in [*system, *history]]
    asked = instruction_prompt(filled_text(columns, "instruction"), text_of(columns, "input", optional=True))
    return {"prompt": "\n\n".join([*past, asked]), "completion": output}


def _instruction_text(columns: Mapping[str, Any]) -> str:
    extra = text_of(columns, "input", optional=True)
    asked = filled_text(columns, "instruction")
    return f"{asked}\n\n{extra}" if extra.strip() else asked
