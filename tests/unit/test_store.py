import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.kube.objects import Object, controller_uid, key_of, split_key
from finetune_operator.kube.store import Store


def an_object(name: str, uid: str = "u", version: int = 1, owner: str = "", **more: Any) -> Object:
    """A dict like those that the apiserver sends."""
    owners = [{"uid": "other"}, {"uid": owner, "controller": True}] if owner else []
    metadata = {"namespace": "n", "name": name, "uid": uid, "resourceVersion": str(version), "ownerReferences": owners}
    return {"metadata": metadata, **more}


def by_owner(obj: Object) -> Iterable[str]:
    """The index that controllers need most."""
    return [owner] if (owner := controller_uid(obj)) else []


def test_keys_are_those_of_client_go() -> None:
    """namespace/name, or the name alone, there and back."""
    assert key_of({"metadata": {"namespace": "n", "name": "a"}}) == "n/a"
    assert key_of({"metadata": {"name": "a"}}) == "a"
    assert split_key("n/a") == ("n", "a")
    assert split_key("a") == ("", "a")


def test_put_tells_before_and_after_and_nothing_for_the_same_version() -> None:
    """A handler sees both states; an object listed again in the same version is no change."""
    store = Store()
    first, second = an_object("a", version=1), an_object("a", version=2)
    assert store.put(first) == [(None, first)]
    assert store.put(an_object("a", version=1)) == []
    assert store.get("n", "a") == first
    assert store.put(second) == [(first, second)]
    assert len(store) == 1


def test_one_of_the_same_name_with_another_uid_is_a_deletion_and_a_creation() -> None:
    """Whoever missed the deletion learns of it, and is not told that one object became the other."""
    store = Store({"owner": by_owner})
    first, second = an_object("a", "u1", 1, owner="x"), an_object("a", "u2", 2, owner="y")
    store.put(first)
    assert store.put(second) == [(first, None), (None, second)]
    assert store.by_index("owner", "x") == []
    assert store.by_index("owner", "y") == [second]


def test_remove_hands_over_the_last_state() -> None:
    """The state that came with the deletion (a pod's exit code) if it came, else the last one held; once."""
    store = Store()
    last = an_object("a", version=3)
    store.put(an_object("a"))
    assert store.remove("n/a", last) == [(last, None)]
    assert store.remove("n/a", last) == []
    held = an_object("b")
    store.put(held)
    assert store.remove("n/b") == [(held, None)]


def test_an_index_follows_its_objects() -> None:
    """Objects move from value to value with their content; empty values take no memory."""
    store = Store({"owner": by_owner})
    for number in range(10):
        store.put(an_object(f"o{number}", owner=f"x{number % 2}"))
    assert [o["metadata"]["name"] for o in store.by_index("owner", "x0")] == ["o0", "o2", "o4", "o6", "o8"]
    store.put(an_object("o0", version=2, owner="x1"))
    assert len(store.by_index("owner", "x0")) == 4
    assert len(store.by_index("owner", "x1")) == 6
    for key in sorted(store.keys()):
        store.remove(key)
    assert store._indexes == {"owner": {}}
    assert store.by_index("owner", "never") == []


CHANGES = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["u1", "u2"]), st.sampled_from(["", "x", "y"]), st.booleans())
)


@given(CHANGES)
def test_index_and_changes_agree_with_the_objects(changes: list[tuple[str, str, str, bool]]) -> None:
    """After any changes the index equals one computed from scratch, and replaying the told changes gives the store."""
    store = Store({"owner": by_owner})
    replayed: dict[str, Object] = {}
    for version, (name, uid, owner, removed) in enumerate(changes):
        told = store.remove(f"n/{name}") if removed else store.put(an_object(name, uid, version, owner))
        for old, new in told:
            if new is None:
                assert old is not None
                assert replayed.pop(key_of(old)) == old
            else:
                assert replayed.get(key_of(new)) == old
                replayed[key_of(new)] = new
    assert {key_of(obj): obj for obj in store} == replayed
    assert store.counts("owner") == Counter(owner for obj in replayed.values() for owner in by_owner(obj))
    for owner in ("x", "y"):
        wanted = [obj for obj in replayed.values() if owner in by_owner(obj)]
        assert sorted(map(key_of, store.by_index("owner", owner))) == sorted(map(key_of, wanted))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.lists(JSON))
def test_what_is_read_is_what_was_put(specs: list[object]) -> None:
    """Whatever JSON it is, and whatever came before it."""
    store = Store()
    for number, spec in enumerate(specs):
        store.put(an_object(f"o{number}", spec=spec))
    assert [store.at(f"n/o{number}") for number in range(len(specs))] == [
        an_object(f"o{number}", spec=spec) for number, spec in enumerate(specs)
    ]


def test_what_is_read_is_the_readers_own() -> None:
    """Changing it changes nothing for the next reader, nor for the handler that is told the old state."""
    store = Store({"owner": by_owner})
    store.put(an_object("a", owner="x"))
    for found in (store.get("n", "a"), *store.by_index("owner", "x"), *store):
        assert found is not None
        found["metadata"]["uid"] = "changed"
    assert store.put(an_object("a", version=2, owner="x")) == [
        (an_object("a", owner="x"), an_object("a", version=2, owner="x"))
    ]


def test_objects_that_are_alike_take_little_memory() -> None:
    """Of each but the first only what is its own is held, in a tenth of its JSON."""
    store = Store()
    spec = {f"field{number}": f"value of field {number}" for number in range(100)}
    for number in range(100):
        store.put(an_object(f"o{number}", uid=f"uid-{number}", version=number + 1, spec=spec))
    assert sum(len(held.packed) for held in store._objects.values()) < 0.1 * sum(len(json.dumps(o)) for o in store)
