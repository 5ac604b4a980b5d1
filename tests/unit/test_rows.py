import json
from typing import Any

import pytest

from finetune_api.types import DataFormat
from finetune_jobs.data.cells import check_names, detect, rename
from finetune_jobs.data.labels import sft_on_desirable
from finetune_jobs.data.normalise import Shape, normalise, question
from finetune_jobs.data.pairs import sft_on_chosen
from finetune_jobs.data.rows import DroppedRowError, RowError
from finetune_jobs.run.errors import ConfigurationError

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}
PAIR = {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]}


def spoken(who: str, words: str) -> dict[str, str]:
    """A turn as ShareGPT writes it."""
    return {"from": who, "value": words}


def read(
    columns: dict[str, Any], *, chat: bool = True, chat_pairs: bool = True, wanted: DataFormat = DataFormat.AUTO
) -> dict[str, Any]:
    """The row as a role of training reads it."""
    found = detect(columns, wanted, preference=False)
    return normalise(columns, Shape(found, chat, chat_pairs))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"messages": [USER, BOT]}, {"messages": [USER, BOT]}),
        ({"messages": json.dumps([USER, BOT])}, {"messages": [USER, BOT]}),
        (
            {"conversations": [spoken("system", "s"), spoken("human", "q"), spoken("gpt", "a")]},
            {"messages": [SYSTEM, USER, BOT]},
        ),
        ({"conversations": [USER, BOT], "system": "s"}, {"messages": [SYSTEM, USER, BOT]}),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, BOT]}, {"messages": [USER, BOT]}),
        (
            {"messages": [USER, {**CALL, "content": None, "name": None}], "tools": [{"f": 1}]},
            {"messages": [USER, CALL], "tools": [{"f": 1}]},
        ),
        ({"prompt": "q", "completion": " a", "more": 1}, {"prompt": "q", "completion": " a"}),
        ({"prompt": "q", "completion": '[{"a": 1}]'}, {"prompt": "q", "completion": '[{"a": 1}]'}),
        ({"prompt": [USER], "completion": [BOT]}, {"messages": [USER, BOT]}),
        ({"instruction": "q", "output": "a"}, {"messages": [USER, BOT]}),
        ({"instruction": "q", "input": None, "output": "a"}, {"messages": [USER, BOT]}),
        ({"instruction": "q", "input": "x", "output": "a"}, {"messages": [{"role": "user", "content": "q\n\nx"}, BOT]}),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["q", "b"]]},
            {"messages": [SYSTEM, USER, OTHER, USER, BOT]},
        ),
        ({"text": "abc"}, {"text": "abc"}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR),
        (PAIR, PAIR),
        ({"prompt": "q", "chosen": [BOT], "rejected": [OTHER]}, PAIR),
        ({"chosen": [USER, BOT], "rejected": [USER, OTHER]}, PAIR),
        ({"prompt": "q", "chosen": [USER, BOT], "rejected": [USER, OTHER]}, PAIR),
        (
            {"chosen": "Human: q\nBot: yes", "rejected": "Human: q\nBot: no"},
            {"prompt": "Human: q\nBot: ", "chosen": "yes", "rejected": "no"},
        ),
    ],
    ids=[
        *("messages", "messages as csv", "sharegpt", "sharegpt with system", "parts", "tools", "completion"),
        *("json completion", "chat completion", "instruction", "null input", "input", "alpaca history", "text"),
        *("text pair", "chat pair", "mixed pair", "implicit pair", "repeated prompt", "dialogue pair"),
    ],
)
def test_auto_tells_every_format(columns: dict[str, Any], expected: dict[str, Any]) -> None:
    """The columns alone say how a row is read."""
    assert read(columns) == expected


def test_an_instruction_without_chat_template_is_a_prompt() -> None:
    """A base model without template gets sections of plain text, history and system first."""
    found = read({"instruction": "q", "input": "x", "output": "a", "system": "s"}, chat=False)
    assert found == {"prompt": "s\n\n### Instruction:\nq\n\n### Input:\nx\n\n### Response:\n", "completion": "a"}


def test_text_pairs_stay_text_beside_text_rows() -> None:
    """Where the model learns from plain texts, pairs of plain texts stay so."""
    found = read({"prompt": "q", "chosen": "a", "rejected": "b"}, chat_pairs=False)
    assert found == {"prompt": "q", "chosen": "a", "rejected": "b"}


def test_a_pair_under_train_is_learned_by_its_chosen_answer() -> None:
    """SFT on chosen, for chats and for texts."""
    assert sft_on_chosen(PAIR) == {"messages": [USER, BOT]}
    assert sft_on_chosen({"prompt": "q", "chosen": "a", "rejected": "b"}) == {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"messages": [USER]}, "no assistant turn, so no supervised token"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "no supervised token"),
        ({"messages": [{"role": "developer", "content": "x"}, BOT]}, r"messages\[0\]\.role: must be one of"),
        (
            {"messages": [USER, {"role": "assistant", "content": 5}]},
            r"messages\[1\]\.content: must be text, got a number",
        ),
        ({"messages": [USER, "a"]}, r"messages\[1\]: must be an object"),
        ({"messages": []}, "column messages: must be a list of messages"),
        ({"messages": "hello"}, "must be a list of messages, got text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, BOT]}, "only parts of type text"),
        ({"prompt": "q", "completion": ""}, "column completion: is empty, so no supervised token"),
        ({"prompt": "q", "completion": None}, "column completion: must be text, got nothing"),
        ({"prompt": 3, "completion": "a"}, r"column prompt: must be text, got a number \(3\)"),
        ({"instruction": "", "output": "a"}, "column instruction: is empty"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "column history"),
        ({"text": "a\ud800"}, "half a surrogate pair at character 2"),
        ({"prompt": "q", "chosen": "a", "rejected": "a "}, "chosen equals rejected"),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [BOT]}, "chosen equals rejected"),
        ({"chosen": "yes", "rejected": "no"}, "no column prompt"),
        ({"chosen": "Q: x A: ", "rejected": "Q: x A: no"}, "only the beginning of the other"),
        ({"chosen": [BOT], "rejected": [OTHER]}, "no prompt"),
        ({"chosen": [USER, BOT, USER], "rejected": [USER, OTHER]}, "chosen does not end with an assistant turn"),
        ({"question": "q", "answer": "a"}, r"file has answer, question; name yours with `columns:"),
        ({"messages": [BOT]}, "nothing stands before the assistant's only turn, .*; add the question"),
        ({"messages": [{"content": "q"}, BOT]}, r"messages\[0\].role: must be one of .*, got nothing"),
        ({"messages": [USER, {**CALL, "tool_calls": "x"}]}, r"messages\[1\].tool_calls: must be a list of objects"),
        ({"messages": [USER, {**CALL, "tool_calls": [1]}]}, r"messages\[1\].tool_calls: must be a list of objects"),
        (
            {"prompt": "p", "chosen": [USER, BOT], "rejected": [USER, OTHER]},
            "chosen and rejected begin with another question than the column prompt",
        ),
        (
            {"prompt": [USER], "chosen": [USER, BOT], "rejected": [{"role": "user", "content": "p"}, OTHER]},
            "chosen asks something that the other does not",
        ),
    ],
)
def test_an_unusable_row_says_why_and_what_to_do(columns: dict[str, Any], words: str) -> None:
    """Every mistake in words, with the column."""
    with pytest.raises(RowError, match=words):
        read(columns)


@pytest.mark.parametrize(
    "messages",
    [[USER, BOT, USER], [USER, {"role": "assistant", "content": ""}, USER, BOT]],
    ids=["trailing user", "empty turn"],
)
def test_a_row_of_no_use_beside_good_ones_is_left_out(messages: list[Any]) -> None:
    """A conversation that ends with a question, or with one of several answers empty, is counted, not fatal."""
    with pytest.raises(DroppedRowError):
        read({"messages": messages})


def test_columns_are_renamed() -> None:
    """Standard name to the file's own; what is not renamed stays."""
    assert rename({"question": "q", "answer": "a", "id": 1}, {"prompt": "question", "completion": "answer"}) == {
        "prompt": "q",
        "completion": "a",
        "id": 1,
    }
    with pytest.raises(RowError, match=r"'qestion'.*did you mean 'question'"):
        rename({"question": "q"}, {"prompt": "qestion"})


def test_columns_written_the_wrong_way_round_are_told() -> None:
    """``columns`` maps standard names to the file's; the field is named."""
    check_names({"prompt": "question"}, "spec.data.train[0]")
    with pytest.raises(ConfigurationError, match=r"spec\.data\.train\[0\]\.columns: 'promt'.*did you mean 'prompt'"):
        check_names({"promt": "question"}, "spec.data.train[0]")


@pytest.mark.parametrize(
    ("columns", "wanted", "preference", "words"),
    [
        (
            ["prompt", "completion"],
            DataFormat.MESSAGES,
            False,
            r"format messages need the columns messages, but the file has completion, prompt",
        ),
        (["prompt", "completion"], DataFormat.AUTO, True, r"chosen \+ rejected"),
        (["a"], DataFormat.TEXT, False, r"columns: \{text: <yours>\}"),
    ],
    ids=["explicit", "pairs needed", "text"],
)
def test_a_format_that_does_not_fit_names_the_columns(
    columns: list[str], wanted: DataFormat, preference: bool, words: str
) -> None:
    """What the format needs, what the file has, and how to rename."""
    with pytest.raises(RowError, match=words):
        detect(columns, wanted, preference=preference)


ANSWER = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("label", "expected"),
    [(True, True), (False, False), (1, True), (0, False), ("true", True), (" False ", False), ("0", False)],
    ids=repr,
)
def test_labels_are_truth_values(label: Any, expected: bool) -> None:
    """As JSON, numbers or CSV write them; the answer takes the form of pairs."""
    columns = {**ANSWER, "label": label}
    assert detect(columns, DataFormat.AUTO, preference=True) is DataFormat.LABELS
    assert read(columns, wanted=DataFormat.LABELS) == {"messages": [USER, BOT], "label": expected}
    assert read(columns, wanted=DataFormat.LABELS, chat_pairs=False) == {**ANSWER, "label": expected}
    spoken = {"prompt": [USER], "completion": [BOT], "label": label}
    assert read(spoken, wanted=DataFormat.LABELS, chat_pairs=False) == {"messages": [USER, BOT], "label": expected}


@pytest.mark.parametrize("label", [2, 0.5, "yes", "", None, [True]], ids=repr)
def test_other_labels_are_refused(label: Any) -> None:
    """Nobody knows what they mean."""
    with pytest.raises(RowError, match=r"column label: must be true \(a desirable answer\) or false"):
        read({**ANSWER, "label": label}, wanted=DataFormat.LABELS)


def test_labels_in_training_rows_leave_out_undesirable_answers() -> None:
    """Truth values are such labels, names of classes are none."""
    assert detect({**ANSWER, "label": False}, DataFormat.AUTO, preference=False) is DataFormat.LABELS
    assert detect({**ANSWER, "label": "sports"}, DataFormat.AUTO, preference=False) is DataFormat.PROMPT_COMPLETION
    assert sft_on_desirable({**ANSWER, "label": True}) == ANSWER
    with pytest.raises(DroppedRowError, match="labelled undesirable"):
        sft_on_desirable({**ANSWER, "label": False})


def test_an_explicit_format_decides_between_several() -> None:
    """A file with the columns of two formats is read as told."""
    columns = {"messages": [USER, BOT], "chosen": [USER, BOT], "rejected": [USER, OTHER]}
    assert detect(columns, DataFormat.AUTO, preference=False) is DataFormat.MESSAGES
    assert detect(columns, DataFormat.AUTO, preference=True) is DataFormat.PREFERENCE
    assert detect(columns, DataFormat.PREFERENCE, preference=False) is DataFormat.PREFERENCE


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"messages": [USER], "reference": " r "}, {"messages": [USER], "reference": "r"}),
        ({"messages": [USER, BOT]}, {"messages": [USER], "reference": "a"}),
        ({"prompt": "q", "completion": "a"}, {"messages": [USER], "reference": "a"}),
        ({"instruction": "q", "output": "a"}, {"messages": [USER], "reference": "a"}),
    ],
    ids=["reference", "last answer", "completion", "instruction"],
)
def test_general_rows_are_questions_with_a_reference(columns: dict[str, Any], expected: dict[str, Any]) -> None:
    """Whatever the format, a question and what it is compared with."""
    assert question(columns, "general", chat=True) == expected


def test_questions_for_a_model_without_template_are_prompts() -> None:
    """The built-in questions can be asked of any model."""
    assert question({"messages": [USER], "expect": "refuse"}, "refusals", chat=False) == {
        "prompt": "### Instruction:\nq\n\n### Response:\n",
        "expect": "refuse",
    }


@pytest.mark.parametrize(
    ("columns", "role", "words"),
    [
        ({"messages": [USER]}, "general", "no `reference`"),
        ({"messages": [USER], "expect": "maybe"}, "refusals", "must be refuse or answer, got 'maybe'"),
        ({"question": "q"}, "general", "columns: {prompt: <yours>}"),
        ({"messages": [BOT], "reference": "x"}, "general", "no question"),
    ],
    ids=["no reference", "expect", "columns", "no question"],
)
def test_questions_that_cannot_be_scored_are_refused(columns: dict[str, Any], role: str, words: str) -> None:
    """No reference, no expectation, no question."""
    with pytest.raises(RowError, match=words):
        question(columns, role, chat=True)
