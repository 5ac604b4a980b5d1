import random
from typing import Any

import pytest

from finetune_jobs.data import audit
from finetune_jobs.data.audit import NearIndex, exact_duplicates, exact_overlap, foreign_markers, summary
from finetune_jobs.data.encode import NOTHING_LEFT, OVERLONG
from finetune_jobs.data.lengths import Lengths, usage

WORDS = [f"word{i}" for i in range(500)]


def text(content: str, number: int = 0) -> Any:
    """A row of plain text."""
    return {"id": f"{number}:{content[:20]}", "source": "t", "line": number, "text": content}


def sentence(seed: int, words: int = 60) -> list[str]:
    """Random words, the same for the same seed."""
    return random.Random(seed).choices(WORDS, k=words)


def test_exact_duplicates_ignore_case_spacing_and_unicode_form() -> None:
    """What the eye takes for equal is equal."""
    assert (
        exact_duplicates([text("Café  au\nlait"), text("café au lait"), text("cafe\u0301 AU lait"), text("tea")]) == 2
    )
    assert exact_overlap([text("A b")], [text("a  B"), text("c")]) == [text("a  B")]


def test_near_duplicates_are_found_and_others_are_not() -> None:
    """One changed word of sixty: near; sixty other words, or an exact copy: not."""
    rows = [text(" ".join(sentence(i)), i) for i in range(200)]
    changed = [text(" ".join([*sentence(i)[:-1], "changed"]), 1000 + i) for i in range(50)]
    assert NearIndex(rows).duplicates == 0
    assert NearIndex(rows + changed).duplicates == 50
    assert NearIndex(rows + rows[:20]).duplicates == 0
    index = NearIndex(rows)
    assert [index.near(row) for row in changed] == [True] * 50
    assert not index.near(text(" ".join(sentence(999))))


def test_near_duplicates_need_no_spaces() -> None:
    """Chinese has none."""
    letters = [chr(0x4E00 + i) for i in range(3000)]
    long = "".join(random.Random(1).choices(letters, k=200))
    assert NearIndex([text(long), text(long[:-3] + "一二三", 1)]).duplicates == 1


def test_many_equal_rows_take_no_quadratic_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is compared with a bounded number of others, whatever the set."""
    compared = 0
    plain = audit._jaccard

    def counting(a: Any, b: Any) -> float:
        nonlocal compared
        compared += 1
        return plain(a, b)

    monkeypatch.setattr(audit, "_jaccard", counting)
    NearIndex([text("the very same words again and again", i) for i in range(300)])
    assert compared <= 300 * audit._COMPARED * audit._BANDS


def test_a_sample_is_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit a fixed sample is looked at, whatever the order."""
    monkeypatch.setattr(audit, "SAMPLE_ROWS", 10)
    rows = [text(" ".join(sentence(i)), i) for i in range(50)]
    sample = NearIndex(rows).rows
    assert len(sample) == 10
    assert list(NearIndex(rows[::-1]).rows) == list(sample)


def test_summary() -> None:
    """Checked against the definition by hand."""
    assert summary([1, 2, 3, 4, 100]) == {
        "total": 110,
        "min": 1,
        "mean": 22.0,
        "p50": 3,
        "p90": 100,
        "p99": 100,
        "max": 100,
        "histogram": [{"upTo": 1, "rows": 1}, {"upTo": 2, "rows": 1}, {"upTo": 4, "rows": 2}, {"upTo": 128, "rows": 1}],
    }
    assert summary([]) == {}


@pytest.mark.parametrize(
    ("overlong", "expected"),
    [
        ("drop", {"rows": 2, "tokens": 15, "supervisedTokens": 8, "cut": 0, "dropped": {OVERLONG: 2}}),
        ("truncate", {"rows": 3, "tokens": 25, "supervisedTokens": 9, "cut": 1, "dropped": {NOTHING_LEFT: 1}}),
    ],
)
def test_what_a_length_limit_costs(overlong: str, expected: dict[str, Any]) -> None:
    """Four rows, limit 10: two fit, one loses half its answer, one all of it."""
    lengths = Lengths(tokens=[5, 10, 12, 20], learned=[[(2, 5)], [(5, 10)], [(9, 12)], [(15, 20)]], first=[2, 5, 9, 15])
    assert usage(lengths, 10, overlong) == expected


def test_foreign_chat_markers_are_counted() -> None:
    """Markers that the model's own template has, or that stand in conversations, are none of our business."""
    chat: Any = {"id": "1", "source": "t", "line": 1, "messages": [{"role": "user", "content": "[INST]"}]}
    rows = [text("<|im_start|>user"), text("[INST] x [/INST]"), text("plain"), chat]
    assert foreign_markers(rows, "{{ '<|im_start|>' }}") == {"[INST]": 1}
