"""Conversations: OpenAI's ``role``/``content``, ShareGPT's ``from``/``value``, Alpaca's ``history``."""

from collections.abc import Mapping
from typing import Any

from finetune_jobs.data.cells import checked_text, kind_of, parsed_list, parsed_turns, text_of
from finetune_jobs.data.rows import Message, RowError

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def read_tools(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The conversation's tools, if it has any."""
    tools = parsed_list(columns.get("tools"))
    if tools in (None, [], ""):
        return {}
    if not isinstance(tools, list):
        raise RowError(f"column tools: must be a list, got {kind_of(tools)}")
    return {"tools": tools}


def read_system(columns: Mapping[str, Any]) -> list[Message]:
    """A column ``system`` as a first turn."""
    system = text_of(columns, "system", optional=True)
    return [{"role": "system", "content": system}] if system.strip() else []


def read_history(columns: Mapping[str, Any]) -> list[Message]:
    """Alpaca's earlier turns."""
    turns = parsed_list(columns.get("history")) or []
    found: list[Message] = []
    for turn in turns if isinstance(turns, list) else [None]:
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
            raise RowError("column history: must be a list of [question, answer] pairs")
        found += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return found


def read_messages(columns: Mapping[str, Any]) -> list[Message]:
    """The turns of ``messages`` or ``conversations``."""
    column = "messages" if columns.get("messages") is not None else "conversations"
    messages = read_turns(parsed_turns(columns.get(column)), column)
    system = columns.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def read_turns(value: Any, column: str) -> list[Message]:
    """A list of turns; RowError names ``column`` and the turn."""
    if not isinstance(value, list) or not value:
        raise RowError(f"column {column}: must be a list of messages, got {kind_of(value)}")
    return [_turn(turn, f"{column}[{i}]") for i, turn in enumerate(value)]


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{where}: must be an object with role and content, got {kind_of(turn)}")
    if "from" in turn and turn.get("role") is None:
        speaker = str(turn["from"])
        role: Any
        role, content = _SHAREGPT.get(speaker.lower(), speaker), turn.get("value")
    else:
        role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or role not in ROLES:
        got = repr(role) if isinstance(role, str) else kind_of(role)
        raise RowError(f"{where}.role: must be one of {', '.join(ROLES)}, got {got}")
    extra = {key: turn[key] for key in ("tool_calls", "tool_call_id", "name", "reasoning_content") if turn.get(key)}
    calls = extra.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"{where}.tool_calls: must be a list of objects, got {kind_of(calls)}")
    if content is None and "tool_calls" in extra:
        content = ""
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
            for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise RowError(f"{where}.content: only parts of type text can be used")
        content = "".join(str(part) for part in parts)
    message: Message = {"role": role, "content": checked_text(content, f"{where}.content")}
    message.update(extra)  # type: ignore[typeddict-item]
    return message


def says_something(message: Message) -> bool:
    """The turn has words or calls a tool."""
    return bool(message["content"].strip() or message.get("tool_calls"))
