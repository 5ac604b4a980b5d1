"""Preference pairs: with a prompt, or with one that both answers begin with; texts or conversations."""

from collections.abc import Mapping
from typing import Any

from finetune_jobs.data.cells import answer_text, filled_text, parsed_turns
from finetune_jobs.data.rows import RowError
from finetune_jobs.data.turns import read_system, read_tools, read_turns, says_something

_EQUAL = "chosen equals rejected, so there is nothing to prefer; change one or remove the row"


def sft_on_chosen(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The training row that a pair of the role ``train`` stands for."""
    prompt, chosen = pair["prompt"], pair["chosen"]
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": chosen}
    return {"messages": [*prompt, *chosen], **({"tools": pair["tools"]} if "tools" in pair else {})}


def read_pair(columns: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    """The content of a pair; ``chat``: a prompt and answers of plain text become a conversation."""
    chosen, rejected = parsed_turns(columns.get("chosen")), parsed_turns(columns.get("rejected"))
    if isinstance(chosen, list) or isinstance(rejected, list):
        pair = _chat_pair(columns, chosen, rejected)
    else:
        pair = _text_pair(columns)
        if chat and columns.get("prompt") is not None:  # a dialogue written out as text stays as it is
            pair = {
                "prompt": [*read_system(columns), {"role": "user", "content": pair["prompt"].strip()}],
                "chosen": [{"role": "assistant", "content": pair["chosen"].strip()}],
                "rejected": [{"role": "assistant", "content": pair["rejected"].strip()}],
            }
    return pair


def _text_pair(columns: Mapping[str, Any]) -> dict[str, Any]:
    chosen, rejected = answer_text(columns, "chosen"), answer_text(columns, "rejected")
    if chosen.strip() == rejected.strip():
        raise RowError(_EQUAL)
    if columns.get("prompt") is not None:
        return {"prompt": filled_text(columns, "prompt"), "chosen": chosen, "rejected": rejected}
    # Whole dialogues that differ at the end: the prompt is what they share, up to a white space so that no word is cut.
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    if not chosen[:shared].strip():
        raise RowError(
            "no column prompt, and chosen and rejected do not begin alike; name the prompt with `columns: {prompt: "
            "<yours>}`"
        )
    if not chosen[shared:].strip() or not rejected[shared:].strip():
        raise RowError(
            "no column prompt, and one answer is only the beginning of the other; write the prompt as a column of its "
            "own"
        )
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _chat_pair(columns: Mapping[str, Any], chosen: Any, rejected: Any) -> dict[str, Any]:
    sides = {}
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        turns = [{"role": "assistant", "content": side}] if isinstance(side, str) else side
        sides[name] = read_turns(turns, name)
    prompt = parsed_turns(columns.get("prompt"))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    before = read_turns(prompt, "prompt") if prompt else []
    # Answers may repeat the conversation (with or without a prompt column); what both share is the prompt.
    shared = 0
    for a, b in zip(sides["chosen"], sides["rejected"], strict=False):
        if a != b:
            break
        shared += 1
    if sides["chosen"] == sides["rejected"]:
        raise RowError(_EQUAL)
    opening, answers = sides["chosen"][:shared], {name: side[shared:] for name, side in sides.items()}
    if opening[: len(before)] == before:
        prompt_turns = opening
    elif opening and before[-1]["role"] == "user" == opening[0]["role"]:
        raise RowError("chosen and rejected begin with another question than the column prompt; give one of the two")
    else:
        prompt_turns = [*before, *opening]
    if not prompt_turns:
        raise RowError("no prompt: give a column prompt, or let chosen and rejected begin with the same question")
    for name, side in answers.items():
        if not side or side[-1]["role"] != "assistant" or not says_something(side[-1]):
            raise RowError(f"{name} does not end with an assistant turn that says something, so no supervised token")
        if any(turn["role"] in ("system", "user") for turn in side):
            raise RowError(
                f"{name} asks something that the other does not, and answers to different questions are no pair; let "
                "both begin with the same turns"
            )
    return {"prompt": prompt_turns, **answers, **read_tools(columns)}
