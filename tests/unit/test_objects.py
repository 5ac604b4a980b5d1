import json

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.kube.objects import compact

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_compact_changes_nothing(value: object) -> None:
    """The copy equals the original, whatever JSON it is."""
    assert compact(value) == value


def test_compact_shares_strings_between_documents() -> None:
    """Keys and short values of two events are the same objects in memory; long values are left alone."""
    text = json.dumps({"metadata": {"namespace": "team-a", "annotation": "x" * 100}})
    one, two = compact(json.loads(text)), compact(json.loads(text))
    assert next(iter(one["metadata"])) is next(iter(two["metadata"]))
    assert one["metadata"]["namespace"] is two["metadata"]["namespace"]
    assert one["metadata"]["annotation"] is not two["metadata"]["annotation"]
