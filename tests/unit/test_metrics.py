import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_jobs.evaluation import metrics
from finetune_jobs.evaluation.answers import Answer, summarise

DEEP = "[" * 100_000

CASES = {
    # answer, reference: exactMatch, containsReference, tokenF1
    "equal": ("Paris", "Paris", 1, 1, 1),
    "white space at the ends": ("  Paris\n", "Paris", 1, 1, 1),
    "white space inside": ("New  York", "New York", 0, 1, 1),
    "case": ("paris", "Paris", 0, 1, 1),
    "inside a sentence": ("It is Paris.", "Paris", 0, 1, 2 / 4),
    "part of a word": ("14", "4", 0, 0, 0),
    "before a decimal point": ("4.5", "4", 0, 1, 0),
    "punctuation as reference": ("a + b", "+", 0, 1, 0),
    "articles do not count": ("the answer is a cat", "answer is cat", 0, 0, 1),
    "a word counts as often as in both": ("yes yes no", "yes", 0, 1, 2 / 4),
    "nothing alike": ("London", "Paris", 0, 0, 0),
    "both empty": ("", "", 1, 1, 1),
    "empty answer": (" ", "Paris", 0, 0, 0),
    "empty reference": ("Paris", "", 0, 0, 0),
    "only punctuation in the answer": ("...", "Paris", 0, 0, 0),
    "letters of other scripts": ("Das ist K\u00f6ln", "K\u00d6LN", 0, 1, 2 / 4),
    "special characters of patterns": ("f(x) = [a]*", "f(x) = [a]*", 1, 1, 1),
}


@pytest.mark.parametrize(("answer", "reference", "exact", "contains", "f1"), CASES.values(), ids=CASES.keys())
def test_each_metric_has_the_value_that_its_definition_gives(
    answer: str, reference: str, exact: float, contains: float, f1: float
) -> None:
    """Every score of a pair of texts can be worked out by hand from docs/stages/evaluate.md."""
    assert metrics.exact_match(answer, reference) == exact
    assert metrics.contains_reference(answer, reference) == contains
    assert metrics.token_f1(answer, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ('{"a": 1}', 1),
        (' [1, "x", null]\n', 1),
        ("42", 1),
        ("1" * 5000, 1),
        ("{'a': 1}", 0),
        ('{"a": 1,}', 0),
        ('{"a": NaN}', 0),
        ("Infinity", 0),
        ("", 0),
        ('Here: {"a": 1}', 0),
        (DEEP, 0),
    ],
    ids=["object", "list", "number", "long", "python", "comma", "nan", "infinity", "empty", "words", "deep"],
)
def test_an_answer_is_json_only_as_a_whole_and_only_by_the_standard(answer: str, valid: float) -> None:
    """What Python alone would take (NaN), or what needs cutting out, is not valid JSON."""
    assert metrics.json_valid(answer) == valid


@given(st.text(), st.text())
def test_scores_stay_within_their_range_for_any_text(answer: str, reference: str) -> None:
    """No text makes a metric fail or leave [0, 1], and an equal text has full marks."""
    for score in metrics.TEXT_METRICS.values():
        assert 0.0 <= score(answer, reference) <= 1.0
    assert metrics.exact_match(answer, answer) == 1.0
    assert metrics.token_f1(answer, answer) == 1.0


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_whatever_json_writes_is_valid(value: object) -> None:
    """The metric accepts everything that a JSON writer makes."""
    assert metrics.json_valid(json.dumps(value)) == 1.0


def test_a_mean_over_nothing_is_refused() -> None:
    """A score of no rows is no score, not 0 and not 1."""
    with pytest.raises(ValueError, match="no values"):
        metrics.mean([])


def test_the_loss_weighs_tokens_not_rows() -> None:
    """A row of 30 tokens counts three times as much as one of 10; rows without a loss do not count."""
    rows = [
        Answer(id="a", role="test", prompt="", loss=1.0, loss_tokens=10),
        Answer(id="b", role="test", prompt="", loss=2.0, loss_tokens=30),
        Answer(id="c", role="test", prompt=""),
    ]
    scores = summarise(rows)
    assert scores["loss"] == pytest.approx((10 + 60) / 40)
    assert (scores["lossTokens"], scores["lossRows"], scores["testRows"]) == (40, 2, 3)
    assert "exactMatch" not in scores


def test_figures_are_means_over_the_rows_of_their_role() -> None:
    """Test rows, general rows and the two kinds of refusals rows are averaged each for itself."""
    rows = [
        Answer(id="1", role="test", prompt="p", answer="x", finished=True, scores={"exactMatch": 1.0, "tokenF1": 1.0}),
        Answer(id="2", role="test", prompt="p", answer="x", finished=False, scores={"exactMatch": 0.0, "tokenF1": 0.5}),
        Answer(id="1", role="general", prompt="p", answer="x", scores={"containsReference": 1.0}),
        Answer(id="1", role="refusals", prompt="p", expect="refuse", answer="x", scores={"asExpected": 0.0}),
        Answer(id="2", role="refusals", prompt="p", expect="answer", answer="x", scores={"asExpected": 1.0}),
        Answer(id="3", role="refusals", prompt="p", expect="answer", answer="x", scores={"asExpected": 1.0}),
    ]
    scores = summarise(rows)
    assert (scores["exactMatch"], scores["tokenF1"], scores["general"]) == (0.5, 0.75, 1.0)
    assert scores["refusals"] == pytest.approx(2 / 3)
    assert (scores["refusedWhenAsked"], scores["answeredWhenHarmless"]) == (0.0, 1.0)
    assert scores["unfinished"] == 1
