import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_jobs.data.split import eval_size, locked_size, mix, question_key, row_key, take


def row(prompt: str, completion: str, number: int = 0) -> Any:
    """A row to complete."""
    return {
        "id": f"{prompt}/{completion}/{number}",
        "source": "t",
        "line": 1,
        "prompt": prompt,
        "completion": completion,
    }


def rows(count: int) -> list[Any]:
    """All different."""
    return [row(f"question {i}", f"answer {i}") for i in range(count)]


@pytest.mark.parametrize(
    ("count", "test", "evaluation"),
    [
        (1, 1, 0),
        (2, 1, 1),
        (5, 1, 1),
        (50, 10, 2),
        (100, 20, 5),
        (399, 20, 20),
        (1000, 50, 50),
        (4000, 200, 200),
        (10**6, 200, 500),
    ],
    ids=str,
)
def test_sizes(count: int, test: int, evaluation: int) -> None:
    """5 %: 20 to 200 but at most a fifth for the test, at most 500 for the evaluation, at least 1."""
    assert (locked_size(count), eval_size(count)) == (test, evaluation)


def test_the_order_of_the_file_does_not_matter() -> None:
    """The same rows are taken, in the same order, however the file is sorted; another seed takes others."""
    given_rows = rows(200)
    shuffled = random.Random(1).sample(given_rows, 200)
    taken = take(given_rows, 20, 42, "test")[0]
    assert take(shuffled, 20, 42, "test")[0] == taken
    assert take(given_rows, 20, 43, "test")[0] != taken
    assert take(given_rows, 20, 42, "eval")[0] != taken


def test_added_rows_do_not_reshuffle() -> None:
    """With a tenth more rows, at least 80 % of the test rows are the same."""
    before = {r["id"] for r in take(rows(1000), 50, 42, "test")[0]}
    after = {r["id"] for r in take(rows(1100), 55, 42, "test")[0]}
    assert len(before & after) >= 40


def test_one_question_stays_on_one_side() -> None:
    """Rows that ask the same (whatever case and spacing) are all taken or all left."""
    many = [row(f"Question {i // 3}" if i % 3 else f"  question  {i // 3} ", f"answer {i}") for i in range(300)]
    taken, left = take(many, 30, 42, "test")
    assert len(taken) == 30
    assert {question_key(r) for r in taken}.isdisjoint({question_key(r) for r in left})


def test_one_question_for_all_is_split_by_the_whole_row() -> None:
    """Rows that differ only in the answer can still be split; copies go together."""
    many = [row("the same", f"answer {i // 2}", i) for i in range(40)]
    taken, left = take(many, 4, 42, "test")
    assert len(taken) == 4
    assert len(left) == 36
    assert {row_key(r) for r in taken}.isdisjoint({row_key(r) for r in left})


def test_of_rows_that_all_repeat_one_copy_is_taken() -> None:
    """Two texts, three times each, one row wanted: one is taken and its copies are on neither side."""
    many = [row("q", f"a{i % 2}", i) for i in range(6)]
    taken, left = take(many, 1, 42, "test")
    assert (len(taken), len(left)) == (1, 3)


def test_equal_rows_cannot_be_split() -> None:
    """One row, or one row many times: nothing is taken."""
    for many in ([row("q", "a")], [row("q", "a", i) for i in range(5)]):
        assert take(many, 1, 42, "test") == ([], many)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=40), st.integers(1, 8), st.integers(0, 3))
def test_no_row_is_on_both_sides(pairs: list[tuple[int, int]], count: int, seed: int) -> None:
    """Whatever the rows: at most ``count`` are taken, no content stands on both sides, something is left, nothing is
    made up.
    """
    many = [row(f"q{a}", f"a{b}", i) for i, (a, b) in enumerate(pairs)]
    taken, left = take(many, count, seed, "test")
    assert len(taken) <= count
    assert {row_key(r) for r in taken}.isdisjoint({row_key(r) for r in left})
    assert bool(left) == bool(many)
    ids = [r["id"] for r in taken + left]
    assert len(ids) == len(set(ids))
    assert set(ids) <= {r["id"] for r in many}
    if len({row_key(r) for r in many}) > 1:
        assert taken


@pytest.mark.parametrize(("weight", "copies"), [(1.0, 100), (2.0, 200), (0.5, 50), (1.25, 125), (0.001, 1)], ids=str)
def test_weights_repeat_and_sample(weight: float, copies: int) -> None:
    """A row of weight 2 stands there twice; of weight 0.5, half of the rows; each with its own id, the same each
    time.
    """
    mixed = mix([(1.0, rows(10)), (weight, [row(f"other {i}", "a") for i in range(100)])], 42)
    others = [r for r in mixed if r["prompt"].startswith("other")]
    assert (len(mixed) - len(others), len(others)) == (10, copies)
    assert len({r["id"] for r in mixed}) == len(mixed)
    assert max(sum(r["prompt"] == f"other {i}" for r in others) for i in range(100)) == max(1, -(-copies // 100))
    assert mix([(1.0, rows(10)), (weight, [row(f"other {i}", "a") for i in range(100)])], 42) == mixed
