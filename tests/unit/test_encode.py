import json
from pathlib import Path
from typing import Any

import pytest
from tests.tinymodel import CHATML, byte_tokenizer, padding_tokenizer

from finetune_jobs.data.encode import (
    NOTHING_LEFT,
    OVERLONG,
    Dropped,
    Encoded,
    EncodedPair,
    encode,
    encode_pair,
    encode_rows,
    load_tokenizer,
    prompt_ids,
    prompt_text,
    reference,
    stop_ids,
)
from finetune_jobs.run.errors import ConfigurationError, DataError

CHAT = byte_tokenizer()
PADDING = padding_tokenizer()


def row(**content: Any) -> Any:
    """A row of that content."""
    return {"id": "1", "source": "train.jsonl", "line": 7, **content}


def chat(*turns: str, system: str = "") -> Any:
    """A conversation: user, assistant, user, ..."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return row(messages=[*([{"role": "system", "content": system}] if system else []), *messages])


def encoded(content: Any, tokenizer: Any = CHAT, loss_on: Any = "auto", **more: Any) -> Encoded:
    """Encoded with room for everything."""
    found = encode(
        content,
        tokenizer,
        loss_on=loss_on,
        max_length=more.get("max_length", 9999),
        overlong=more.get("overlong", "drop"),
    )
    assert isinstance(found, Encoded)
    return found


def learned(found: Encoded, tokenizer: Any = CHAT) -> list[str]:
    """The supervised stretches as text."""
    stretches: list[list[int]] = []
    before = False
    for token, supervised in zip(found.input_ids, found.supervised, strict=True):
        if supervised:
            if not before:
                stretches.append([])
            stretches[-1].append(token)
        before = supervised
    return [tokenizer.decode(s) for s in stretches]


def test_every_answer_is_learned_through_its_stop_token_and_nothing_else() -> None:
    """In a conversation of two answers both are supervised, stop tokens included, and neither questions nor line
    breaks.
    """
    found = encoded(chat("What is 1?", "1", "And 2?", "It is 2", system="Be short"))
    assert learned(found) == ["1<|im_end|>", "It is 2<|im_end|>"]
    text = CHAT.decode(found.input_ids)
    assert text == (
        "<|im_start|>system\nBe short<|im_end|>\n<|im_start|>user\nWhat is "
        "1?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
        "<|im_start|>user\nAnd 2?<|im_end|>\n<|im_start|>assistant\nIt is 2<|im_end|>"
    )


def test_a_greeting_before_any_question_is_context() -> None:
    """ShareGPT's conversations often begin with one; nothing would ever ask for it."""
    turns = [{"role": "assistant", "content": "welcome"}, *chat("q", "answer")["messages"]]
    assert learned(encoded(row(messages=turns))) == ["answer<|im_end|>"]


def test_rows_that_are_all_refused_are_all_told() -> None:
    """A batch of which nothing is left is no mistake of ours."""
    refused: list[DataError] = []
    raising = byte_tokenizer("{{ raise_exception('no') }}")
    rows = [chat("q", "a")] * 3
    found = list(encode_rows(rows, raising, loss_on="auto", max_length=None, refused=refused.append))
    assert (len(found), len(refused)) == (3, 3)


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("auto", ["1<|im_end|>", "2<|im_end|>"]),
        ("assistant", ["1<|im_end|>", "2<|im_end|>"]),
        ("completion", ["2<|im_end|>"]),
        (
            "all",
            [
                "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"
            ],
        ),
    ],
    ids=["auto", "assistant", "completion", "all"],
)
def test_loss_on_chooses_what_is_learned(loss_on: str, expected: list[str]) -> None:
    """Of a conversation: every answer, the last one, or everything."""
    assert learned(encoded(chat("a", "1", "b", "2"), loss_on=loss_on)) == expected


@pytest.mark.parametrize("answer", ["Paris", "\n\nParis", " Paris", "1", "123 4", "é", "  \n x"], ids=repr)
@pytest.mark.parametrize("tokenizer", [CHAT, byte_tokenizer(bos=True), PADDING], ids=["bytes", "bos", "padding"])
def test_the_trained_prompt_is_the_one_that_generation_sees(tokenizer: Any, answer: str) -> None:
    """Whatever letter the answer begins with, the tokens before it are exactly ``prompt_ids``."""
    content = chat("What is the capital?", answer)
    found = encoded(content, tokenizer)
    asked = prompt_ids(content, tokenizer)
    assert found.input_ids[: len(asked)] == asked
    assert not any(found.supervised[: len(asked)])
    assert all(found.supervised[len(asked) :])
    assert found.input_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("tokenizer", [CHAT, PADDING], ids=["bytes", "padding"])
def test_pieces_add_up_to_the_whole(tokenizer: Any) -> None:
    """Where the answer begins with a letter, tokens are those of the whole rendered text, over several turns."""
    content = chat("What is 1?", "Hello world", "And 2?", "Paris")
    whole = tokenizer.apply_chat_template(content["messages"], tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    found = encoded(content, tokenizer).input_ids
    assert found == ids[: len(found)]
    assert len(ids) - len(found) <= 1  # the line break after the last stop token


@pytest.mark.parametrize(
    ("tokenizer", "content"),
    [
        (byte_tokenizer(bos=True), chat("a", "b")),
        (byte_tokenizer("<|bos|>" + CHATML, bos=True), chat("a", "b")),
        (byte_tokenizer(bos=True), row(prompt="a", completion="b")),
        (byte_tokenizer(bos=True), row(text="<|bos|>abc")),
        (PADDING, chat("a", "b", "c", "d")),
    ],
    ids=["added", "rendered by the template", "plain", "in the text", "llama 2"],
)
def test_bos_stands_once(tokenizer: Any, content: Any) -> None:
    """A tokenizer that wants a BOS gets exactly one, whether or not the template renders it."""
    ids = encoded(content, tokenizer).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_no_bos_where_the_tokenizer_adds_none() -> None:
    """A tokenizer without BOS gets none."""
    assert encoded(row(text="abc")).input_ids == [*CHAT("abc")["input_ids"], CHAT.eos_token_id]


def test_plain_text_is_tokenized_in_two_parts_and_closed() -> None:
    """Prompt and completion are tokenized for themselves, the end-of-text token is appended and learned."""
    found = encoded(row(prompt="What is", completion=" the capital"))
    prompt, answer = CHAT("What is")["input_ids"], CHAT(" the capital")["input_ids"]
    assert found.input_ids == [*prompt, *answer, CHAT.eos_token_id]
    assert found.supervised == [False] * len(prompt) + [True] * (len(answer) + 1)


def test_a_text_is_learned_whole() -> None:
    """All of a text row is supervised, its end too."""
    assert all(encoded(row(text="Hello world")).supervised)


def test_a_template_without_stop_token_gets_one() -> None:
    """Where the template closes an answer with no special token, the end-of-text token is appended and learned."""
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
        "{% endif %}"
    )
    found = encoded(chat("a", "1"), tokenizer)
    assert tokenizer.decode(found.input_ids) == "user: a\nassistant: 1<|endoftext|>"
    assert found.supervised[-1]


def test_stop_ids_are_the_turn_end_and_the_eos() -> None:
    """Generation ends at the template's end of turn and at the tokenizer's end of text."""
    tokenizer = byte_tokenizer(CHATML.replace("", ""))
    tokenizer.eos_token = "<|endoftext|>"
    assert stop_ids(tokenizer) == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert stop_ids(byte_tokenizer(None)) == [tokenizer.eos_token_id]


def test_stop_words_in_an_answer_do_not_end_it() -> None:
    """An answer that speaks of the stop token is learned to its real end."""
    assert learned(encoded(chat("a", "say <|im_end|> twice")))[-1].endswith(" twice<|im_end|>")


KEEPS_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}(thought){% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = CHATML.replace("assistant\n{% endif %}", "assistant\n(think){% endif %}")


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_mend() -> None:
    """Earlier answers rendered otherwise than when they were said: an error that names lossOn, which then works."""
    tokenizer = byte_tokenizer(KEEPS_LAST)
    with pytest.raises(ConfigurationError, match=r"train\.jsonl:7.*lossOn: completion"):
        encoded(chat("a", "1", "b", "2"), tokenizer)
    assert learned(encoded(chat("a", "1", "b", "2"), tokenizer, "completion")) == ["(thought)2<|im_end|>"]
    assert learned(encoded(chat("a", "1"), tokenizer)) == ["(thought)1<|im_end|>"]


def test_a_generation_prompt_that_answers_do_not_follow_is_refused() -> None:
    """A template whose generation prompt is not what stands before an answer cannot be trained on."""
    with pytest.raises(ConfigurationError, match=r"spec\.model\.chatTemplate.*generation prompt"):
        encoded(chat("a", "1"), byte_tokenizer(THINKS))


def test_no_template_for_a_conversation_names_the_field() -> None:
    """Chat rows and a tokenizer without template: the field to fill in is named."""
    with pytest.raises(ConfigurationError, match=r"spec\.model\.chatTemplate.*no chat template"):
        encoded(chat("a", "1"), byte_tokenizer(None))


def test_a_template_that_refuses_a_row_names_the_row() -> None:
    """The words of the template's own exception, with file and line."""
    template = "{{ raise_exception('no system role') if messages[0].role == 'system' }}" + CHATML
    with pytest.raises(DataError, match=r"train\.jsonl:7.*no system role"):
        encoded(chat("a", "1", system="s"), byte_tokenizer(template))


def test_text_rows_have_no_completion() -> None:
    """lossOn: completion on text rows is refused."""
    with pytest.raises(ConfigurationError, match=r"training\.lossOn"):
        encoded(row(text="abc"), loss_on="completion")


def test_overlong_rows_are_dropped_or_cut() -> None:
    """One token too long: dropped; with truncate: cut at the end; and dropped when only the question is left."""
    content = chat("What?", "Hello world, Hello world")
    full = encoded(content)
    length, asked = len(full.input_ids), full.supervised.index(True)
    assert len(encoded(content, max_length=length).input_ids) == length
    assert encode(content, CHAT, loss_on="auto", max_length=length - 1, overlong="drop") == Dropped(OVERLONG)
    cut = encoded(content, max_length=length - 1, overlong="truncate")
    assert (cut.input_ids, cut.supervised) == (full.input_ids[:-1], full.supervised[:-1])
    assert encode(content, CHAT, loss_on="auto", max_length=asked, overlong="truncate") == Dropped(NOTHING_LEFT)


def pair(prompt: Any, chosen: Any, rejected: Any) -> Any:
    """A preference row."""
    return row(prompt=prompt, chosen=chosen, rejected=rejected)


CHAT_PAIR = pair(
    [{"role": "user", "content": "What?"}],
    [{"role": "assistant", "content": "Paris"}],
    [{"role": "assistant", "content": "Paris is not"}],
)


def test_pairs_share_the_prompt_and_end_with_stop() -> None:
    """Both answers follow the prompt that generation would see, and both end with the stop token."""
    found = encode_pair(CHAT_PAIR, CHAT, max_length=999, overlong="drop")
    assert isinstance(found, EncodedPair)
    assert found.prompt_ids == prompt_ids(CHAT_PAIR, CHAT)
    assert CHAT.decode(found.chosen_ids) == "Paris<|im_end|>"
    assert CHAT.decode(found.rejected_ids) == "Paris is not<|im_end|>"
    plain = encode_pair(pair("What?", " Paris", " Rome"), byte_tokenizer(bos=True), max_length=999, overlong="drop")
    assert isinstance(plain, EncodedPair)
    assert plain.prompt_ids[0] != plain.prompt_ids[1]
    assert plain.chosen_ids[-1] == plain.rejected_ids[-1] == CHAT.convert_tokens_to_ids("<|im_end|>")


def test_overlong_pairs() -> None:
    """Length counts prompt and longer answer; a cut after which both are equal drops the pair."""
    full = encode_pair(CHAT_PAIR, CHAT, max_length=999, overlong="drop")
    assert isinstance(full, EncodedPair)
    length = len(full.prompt_ids) + len(full.rejected_ids)
    assert encode_pair(CHAT_PAIR, CHAT, max_length=length, overlong="drop") == full
    assert encode_pair(CHAT_PAIR, CHAT, max_length=length - 1, overlong="drop") == Dropped(OVERLONG)
    cut = encode_pair(CHAT_PAIR, CHAT, max_length=length - 1, overlong="truncate")
    assert cut == EncodedPair(full.prompt_ids, full.chosen_ids, full.rejected_ids[:-1])
    shared = len(full.prompt_ids) + 1
    assert encode_pair(CHAT_PAIR, CHAT, max_length=shared, overlong="truncate") == Dropped(NOTHING_LEFT)


def test_pairs_of_equal_tokens_are_refused() -> None:
    """Answers that a trimming template renders alike teach nothing: file and line."""
    trims = byte_tokenizer(CHATML.replace("m.content", "m.content | trim"))
    same = pair(CHAT_PAIR["prompt"], [{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": "x "}])
    with pytest.raises(DataError, match=r"train\.jsonl:7"):
        encode_pair(same, trims, max_length=99, overlong="drop")


def test_many_rows_are_encoded_as_one_by_one() -> None:
    """Batches change nothing, and errors in rows go to the collector with all other rows intact."""
    rows = [chat(f"question {i}", f"answer {i}" * (i % 7 + 1)) for i in range(600)]
    template = "{{ raise_exception('too odd') if messages[0].content == 'question 13' }}" + CHATML
    tokenizer = byte_tokenizer(template)
    errors: list[DataError] = []
    found = list(encode_rows(rows, tokenizer, loss_on="auto", max_length=None, refused=errors.append))
    assert len(found) == 600
    assert isinstance(found[13], Dropped)
    assert ["too odd" in str(e) for e in errors] == [True]
    assert [found[i] for i in (0, 12, 14, 255, 256, 599)] == [
        encoded(rows[i], tokenizer) for i in (0, 12, 14, 255, 256, 599)
    ]


@pytest.mark.parametrize(
    ("content", "asked", "answer"),
    [
        (
            chat("a", "1", "b", "2"),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n",
            "2",
        ),
        (chat("a"), "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", ""),
        (row(prompt="a ", completion=" b"), "a ", "b"),
        (row(text="abc"), "", ""),
        (
            row(messages=[{"role": "user", "content": "a"}], reference="r"),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
            "r",
        ),
        (CHAT_PAIR, "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n", "Paris"),
    ],
    ids=["last answer", "open question", "plain", "text", "general", "pair"],
)
def test_prompt_and_reference(content: Any, asked: str, answer: str) -> None:
    """What is asked ends with the generation prompt; the reference is the last answer."""
    assert prompt_text(content, CHAT) == asked
    assert reference(content) == answer


def test_the_jobs_template_wins(tmp_path: Path) -> None:
    """A template given replaces the tokenizer's; a folder without tokenizer is refused by field."""
    byte_tokenizer(None).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    assert load_tokenizer(tmp_path, CHATML).chat_template == CHATML
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"spec\.model\.source"):
        load_tokenizer(tmp_path)


def test_of_several_templates_the_default_is_used(tmp_path: Path) -> None:
    """Rows with tools included, whose prompt is then the GGUF's; without a default the job must say which."""
    byte_tokenizer(None).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())

    def named(*names: str) -> None:
        templates = [{"name": name, "template": CHATML if name == "default" else "{# other #}"} for name in names]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": templates}))

    named("tool_use", "default")
    tokenizer = load_tokenizer(tmp_path)
    asked = chat("What?", "This")
    assert prompt_text({**asked, "tools": [{"type": "function"}]}, tokenizer) == prompt_text(asked, CHAT)
    assert learned(encoded(asked, tokenizer)) == ["This<|im_end|>"]
    named("tool_use", "rag")
    with pytest.raises(ConfigurationError, match=r"^spec\.model\.chatTemplate: .*\(rag, tool_use\), none .*default"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, CHATML).chat_template == CHATML
