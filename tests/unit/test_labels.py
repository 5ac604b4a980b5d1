from typing import Any

import pytest

from finetune_api.types import KTO
from finetune_jobs.data.labels import unbalanced

PAIR: Any = {"chosen": "a", "rejected": "b"}
GOOD: Any = {"label": True}
BAD: Any = {"label": False}


@pytest.mark.parametrize(
    ("rows", "weights", "words"),
    [
        ([PAIR], {}, None),
        ([GOOD] * 4 + [BAD] * 3, {}, None),
        ([GOOD] * 5 + [BAD] * 3, {}, "1.67 to 1, where 1 to 1.33 is usual: kto.desirableWeight 0.6 to 0.8 would be"),
        ([GOOD] * 5 + [BAD] * 3, {"desirable_weight": 0.7}, None),
        ([GOOD, *[PAIR] * 3, BAD, BAD], {}, "kto.desirableWeight 1.25 to 1.67"),
        ([GOOD, *[PAIR] * 3, BAD, BAD], {"undesirable_weight": 0.8}, None),
        ([GOOD], {}, "all answers are desirable"),
        ([BAD], {}, "all answers are undesirable"),
    ],
    ids=["pairs", "4 to 3", "5 to 3", "weighed", "mixed", "mixed, weighed", "no undesirable", "no desirable"],
)
def test_weights_that_leave_one_kind_outweighed_are_told(
    rows: list[Any], weights: dict[str, float], words: str | None
) -> None:
    """With the weights that would do; a pair is one of each kind."""
    found = unbalanced(rows, KTO(**weights))
    assert found is None if words is None else words in (found or "")
