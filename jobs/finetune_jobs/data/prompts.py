"""Prompts: what a model is asked while it learns by reinforcement, with the right answer where a reward needs it."""

from collections.abc import Mapping
from typing import Any

from finetune_jobs.data.cells import checked_text, filled_text, kind_of
from finetune_jobs.data.normalise import asked, instruction_prompt
from finetune_jobs.data.rows import Message, Row, RowError
from finetune_jobs.data.turns import read_tools


def read_prompt(columns: Mapping[str, Any], *, chat: bool, chat_prompts: bool) -> dict[str, Any]:
    """The content of a row of ``prompts``: a conversation up to the answer or a text to go on from, and ``reference``
    where the row has one or an answer.

    ``chat``: instructions become conversations, ``chat_prompts``: prompts of plain text do.
    """
    messages, answer = asked(columns)
    content: dict[str, Any] = {"messages": messages, **read_tools(columns)}
    if isinstance(columns.get("prompt"), str) and not chat_prompts and "instruction" not in columns:
        content = {"prompt": filled_text(columns, "prompt")}
    elif "instruction" in columns and not chat:
        content = {"prompt": instruction_prompt("\n\n".join(m["content"] for m in messages), "")}
    reference = columns.get("reference")
    if reference is None:
        reference = answer[-1].get("content") if isinstance(answer, list) and answer else answer
    if reference is None or reference == "":
        return content
    if not isinstance(reference, str):
        raise RowError(f"column reference: must be text, got {kind_of(reference)}; put it in quotes")
    return content | {"reference": checked_text(reference, "column reference").strip()}


def answered(row: Row) -> Row:
    """The same with its reference as the answer: a row to score answers by."""
    made: Row = {"id": row["id"], "source": row["source"], "line": row["line"]}
    if "messages" in row:
        answer: Message = {"role": "assistant", "content": row["reference"]}
        made["messages"] = [*row["messages"], answer]
        if "tools" in row:
            made["tools"] = row["tools"]
    else:
        made |= {"prompt": row["prompt"], "completion": row["reference"]}
    return made
