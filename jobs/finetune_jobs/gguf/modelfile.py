"""An Ollama ``Modelfile`` beside the GGUFs.

Ollama uses the template inside a GGUF only if it knows it, so the Modelfile brings one, in Go's template language. It
is not looked up by the model's name but found out from what the chat template writes round each turn, and it is left
out where those pieces do not put together again exactly what the chat template renders.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from finetune_jobs.run.errors import DataError

Messages = Sequence[Mapping[str, str]]
Render = Callable[[Messages], str]
"""A conversation as a prompt, up to where the answer begins. Raises DataError where the template refuses."""


@dataclass(frozen=True)
class Turns:
    """What stands round the words of each role, and what asks for an answer."""

    round: dict[str, tuple[str, str]]
    """Role to the texts before and after; without ``system`` where the template has no such role."""
    ask: str
    system: str
    """The system message that the template puts in where there is none."""

    def render(self, messages: Messages) -> str:
        """The prompt that Ollama makes of it, BOS apart."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        parts = (self.round[m["role"]] for m in messages)
        return "".join(a + m["content"] + z for m, (a, z) in zip(messages, parts, strict=True)) + self.ask

    @property
    def go(self) -> str:
        """As a Go template; the literals are Go strings, so that no white space is lost."""
        cases = [f'eq .Role "{role}" }}}}{_go(a)}{{{{ .Content }}}}{_go(z)}' for role, (a, z) in self.round.items()]
        return f"{{{{ range .Messages }}}}{{{{ if {'{{ else if '.join(cases)}{{{{ end }}}}{{{{ end }}}}{_go(self.ask)}"


def _go(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


_WORDS = ("Say: {{ x }}\n1 < 2", "Yes.", "And?", "No.\n\nWhy?", "So?")


def _conversation(*contents: str, system: str = "") -> Messages:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def turns(render: Render, bos: str, stop: str) -> Turns | None:
    """What the template writes round each turn; None where it does more than that (dates, tools, trimmed words)."""

    def pieces(messages: Messages) -> list[str] | None:
        try:
            rest = render(messages).removeprefix(bos)
        except DataError:
            return None
        found = []
        for message in messages:
            before, word, rest = rest.partition(message["content"])
            if not word:
                return None
            found.append(before)
        return [*found, rest]

    without = pieces(_conversation("Quebec", "Alfa", "Romeo"))
    if without is None or stop not in without[2]:
        return None
    first, to_answer, to_user, ask = without
    cut = to_user.index(stop) + len(stop)
    while cut < len(to_user) and to_user[cut].isspace():
        cut += 1
    after_answer, before_user = to_user[:cut], to_user[cut:]
    # Mostly the user's turn ends as the answer does; if not, let what follows it count as the beginning of the answer.
    after_user = after_answer if ask.startswith(after_answer) and to_answer.startswith(after_answer) else ""
    round_ = {
        "user": (before_user, after_user),
        "assistant": (to_answer.removeprefix(after_user), after_answer),
    }
    default = ""
    given = pieces(_conversation("Quebec", "Alfa", "Romeo", system="Sierra"))
    if given is not None and given[1].endswith(before_user):
        before, after = given[0], given[1].removesuffix(before_user)
        round_ = {"system": (before, after), **round_}
        if first != before_user and first.startswith(before) and first.endswith(given[1]):
            default = first.removeprefix(before).removesuffix(given[1])
    found = Turns(round_, ask.removeprefix(after_user), default)
    return found if _agrees(found, render, bos) else None


def _agrees(found: Turns, render: Render, bos: str) -> bool:
    systems = ["", "Be brief."] if "system" in found.round else [""]
    for count in (1, 3, 5):
        for system in systems:
            messages = _conversation(*_WORDS[:count], system=system)
            try:
                if render(messages).removeprefix(bos) != found.render(messages):
                    return False
            except DataError:
                return False
    return True


def modelfile(files: Sequence[str], found: Turns | None, stops: Sequence[str], context_length: int) -> str:
    """The file's text. ``files``: the GGUFs, the one to use first. ``context_length``: what the model was made for."""
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{files[0]}"]
    lines += [f"# FROM ./{file}" for file in files[1:]]
    if found is None:
        lines += [
            "# No TEMPLATE: the model has no chat template, or one that does more than put texts round the turns.",
            "# Ollama uses the one in the GGUF if it knows it: look at `ollama show --template NAME`.",
        ]
    else:
        lines.append(f'TEMPLATE """{found.go}"""')
        if found.system:
            lines.append(f'SYSTEM """{found.system}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines.append(f"PARAMETER num_ctx {min(context_length, 8192)}")
    return "\n".join(lines) + "\n"
