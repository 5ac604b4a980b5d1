"""What every model that is scored can do, whether Hugging Face or GGUF. Importable without torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from finetune_jobs.data.encode import Encoded


@dataclass
class Generated:
    """One answer as token ids, without the stop token."""

    ids: list[int] = field(default_factory=list)
    finished: bool = False
    """The model ended it with a stop token; otherwise it ran into the limit."""


@dataclass(frozen=True)
class RowLoss:
    """Negative log-likelihood, in nats, summed over the supervised tokens of one row."""

    total: float
    tokens: int


Tick = Callable[[int], None]
"""Called often, with the number of rows done so far; may raise to end the work."""


class Model(Protocol):
    """A loaded model."""

    @property
    def context_length(self) -> int:
        """Most tokens that it can take in, prompt and answer together."""

    @property
    def precision(self) -> str:
        """In which it computes, in words."""

    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, stop_ids: Sequence[int], tick: Tick
    ) -> list[Generated]:
        """The greedy answer to each prompt: at every position the most likely token, until a stop token or the limit.

        Nothing of a model's generation config applies (temperature, repetition penalty): the argmax of the logits, so
        that anyone can repeat it. A prompt that leaves no room in the context gets an empty, unfinished answer.
        """

    def losses(self, rows: Sequence[Encoded], tick: Tick) -> list[RowLoss]:
        """The summed loss of each row. A first token has nothing before it to be predicted from, and does not count."""
