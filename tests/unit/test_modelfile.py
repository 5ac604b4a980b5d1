import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import pytest

from finetune_jobs.gguf.modelfile import Messages, Turns, modelfile, turns
from finetune_jobs.run.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
SMOLLM2 = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are SmolLM.<|im_end|>\n{% endif %}" + CHATML
LLAMA3 = (
    "<|begin|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
    "{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
GEMMA = (
    "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n"
    "{% endfor %}<start_of_turn>model\n"
)
PHI3 = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n"
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('no system role') }}{% endif %}"
    "{% endfor %}"
)
DATED = "Today is {{ now() }}.\n" + CHATML
TRIMMED = CHATML.replace("m.content", "m.content | trim | replace('\n\n', '\n')")
SYSTEM_IN_USER = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if messages[0].role == 'system' and loop.index0 == 1 %}"
    "<<SYS>>{{ messages[0].content }}<</SYS>>{% endif %}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


def renderer(template: str) -> Any:
    """As the engine renders: refusals are DataErrors."""
    clock = iter(range(1000))

    def refuse(words: str) -> None:
        raise DataError(words)

    environment = jinja2.Environment()
    environment.globals |= {"raise_exception": refuse, "now": lambda: next(clock)}
    compiled = environment.from_string(template, environment.globals)
    return lambda messages: compiled.render(messages=messages)


def go(template: str, messages: Messages) -> str:
    """What Go's text/template makes of the part of its language that we write."""
    pieces = re.split(r"\{\{ (.*?) \}\}", template)
    body: list[tuple[bool, str]] = [(i % 2 == 1, piece) for i, piece in enumerate(pieces)]

    def run(at: int, message: dict[str, str] | None) -> tuple[str, int]:
        out, active, taken = "", True, False
        while at < len(body):
            is_action, text = body[at]
            at += 1
            if not is_action:
                out += text if active else ""
            elif text == "range .Messages":
                ends = at
                for m in messages:
                    shown, ends = run(at, dict(m))
                    out += shown
                at = ends
            elif match := re.fullmatch(r'(?:else )?if eq \.Role "(\w+)"', text):
                assert message is not None
                active = not taken and message["role"] == match[1]
                taken = taken or active
            elif text == "end":
                if message is None or body[at - 1 : at + 1] == body[at : at + 1] * 2 or not _open_if(body, at):
                    return out, at
                active = True
            elif text == ".Content":
                assert message is not None
                out += message["content"] if active else ""
            else:
                out += json.loads(text) if active else ""
        return out, at

    return run(0, None)[0]


def _open_if(body: Sequence[tuple[bool, str]], at: int) -> bool:
    """Whether the ``end`` before ``at`` closes the ``if``: it is the first of the two that we write."""
    return sum(text == "end" for is_action, text in body[:at] if is_action) == 1


CONVERSATIONS: list[Messages] = [
    [{"role": "user", "content": 'He said "{{ .Content }}"\n'}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b"}, {"role": "user", "content": "c\\n"}],
]
SYSTEM: Messages = [{"role": "system", "content": "Short.\n"}, *CONVERSATIONS[1]]


@pytest.mark.parametrize(
    ("template", "bos", "stop", "system", "default"),
    [
        (CHATML, "", "<|im_end|>", True, ""),
        (SMOLLM2, "", "<|im_end|>", True, "You are SmolLM."),
        (LLAMA3, "<|begin|>", "<|eot_id|>", True, ""),
        (GEMMA, "<bos>", "<end_of_turn>", False, ""),
        (PHI3, "", "<|end|>", True, ""),
        (MISTRAL, "<s>", "</s>", False, ""),
    ],
    ids=["chatml", "smollm2", "llama3", "gemma", "phi3", "mistral"],
)
def test_go_template_renders_what_the_chat_template_renders(
    template: str, bos: str, stop: str, system: bool, default: str
) -> None:
    """For the known families the Modelfile's template gives the same prompt, BOS apart, which the server adds."""
    render = renderer(template)
    found = turns(render, bos, stop)
    assert found is not None
    assert ("system" in found.round) is system
    assert found.system == default
    for messages in [*CONVERSATIONS, *([SYSTEM] if system else [])]:
        with_default = (
            messages
            if messages[0]["role"] == "system" or not default
            else [{"role": "system", "content": default}, *messages]
        )
        assert go(found.go, with_default) == render(messages).removeprefix(bos)


@pytest.mark.parametrize(
    "template",
    [DATED, TRIMMED, SYSTEM_IN_USER, "{{ messages[-1].content }}"],
    ids=["dated", "trimmed", "system-in-user", "bare"],
)
def test_template_that_does_more_is_left_out(template: str) -> None:
    """Where texts round the turns cannot say what the template does, there is no TEMPLATE rather than a wrong one."""
    found = turns(renderer(template), "", "</s>" if "</s>" in template else "<|im_end|>")
    assert found is None or (template is SYSTEM_IN_USER and "system" not in found.round)


def test_modelfile_names_files_stops_and_context() -> None:
    """The first GGUF is used, the others are there to be chosen; a long context is cut to what a laptop holds."""
    found = Turns({"user": ("<u>", "\n"), "assistant": ("", "</s>")}, "<a>", "Be kind.")
    text = modelfile(["bot-Q4_K_M.gguf", "bot-Q8_0.gguf"], found, ["</s>"], 131072)
    assert text.splitlines() == [
        "# ollama create NAME -f Modelfile",
        "FROM ./bot-Q4_K_M.gguf",
        "# FROM ./bot-Q8_0.gguf",
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "user" }}{{ "<u>" }}{{ .Content }}{{ "\\n" }}'
        '{{ else if eq .Role "assistant" }}{{ .Content }}{{ "</s>" }}{{ end }}{{ end }}{{ "<a>" }}"""',
        'SYSTEM """Be kind."""',
        'PARAMETER stop "</s>"',
        "PARAMETER num_ctx 8192",
    ]
    without = modelfile(["bot-F16.gguf"], None, ["</s>"], 2048)
    assert "\nTEMPLATE" not in without
    assert "num_ctx 2048" in without
