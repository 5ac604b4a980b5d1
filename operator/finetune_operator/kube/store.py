"""What a reflector knows: objects by key, and by whatever else they are looked up by.

Holds what the server holds and nothing more: a deleted object is handed to whoever asked to be told, then forgotten.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from finetune_operator.kube.objects import Object, key_for, key_of, uid_of

IndexFunction = Callable[[Object], Iterable[str]]
"""The values that an object is found under. It must depend on nothing but the object."""
Change = tuple[Object | None, Object | None]
"""Before and after; None: not there."""


class Store:
    """Not for threads, and what it returns is shared: callers copy before they change anything."""

    def __init__(self, indexes: Mapping[str, IndexFunction] | None = None) -> None:
        self._objects: dict[str, Object] = {}
        self._functions = dict(indexes or {})
        self._indexes: dict[str, dict[str, dict[str, Object]]] = {name: {} for name in self._functions}
        self.synced = False
        """Whether it has held everything at least once."""

    def __len__(self) -> int:
        return len(self._objects)

    def __iter__(self) -> Iterator[Object]:
        """Over the objects of this moment."""
        return iter(list(self._objects.values()))

    def keys(self) -> set[str]:
        """Of all objects."""
        return set(self._objects)

    def get(self, namespace: str | None, name: str) -> Object | None:
        """That object; an empty namespace for kinds that have none."""
        return self._objects.get(key_for(namespace, name))

    def by_index(self, index: str, value: str) -> list[Object]:
        """All that the index function named so gave that value for, in the order of their arrival."""
        return list(self._indexes[index].get(value, {}).values())

    def put(self, obj: Object) -> list[Change]:
        """Take it in; what that changed.

        Nothing if it is held as it is. Two changes if one of the same name, with another uid, was there: its deletion
        was missed, and nobody must take the new one for it.
        """
        key = key_of(obj)
        old = self._objects.get(key)
        if old is not None and uid_of(old) != uid_of(obj):
            return [*self.remove(key), *self.put(obj)]
        version = obj["metadata"].get("resourceVersion")
        if old is not None and version and old["metadata"].get("resourceVersion") == version:
            return []
        if old is not None:
            self._unindex(key, old)
        self._objects[key] = obj
        for name, function in self._functions.items():
            for value in function(obj):
                self._indexes[name].setdefault(value, {})[key] = obj
        return [(old, obj)]

    def remove(self, key: str, last: Object | None = None) -> list[Change]:
        """Forget it; ``last`` is its state as it was deleted, where the server told: it may say more than what we had.

        Nothing if it is not there.
        """
        old = self._objects.pop(key, None)
        if old is None:
            return []
        self._unindex(key, old)
        return [(last or old, None)]

    def _unindex(self, key: str, obj: Object) -> None:
        for name, function in self._functions.items():
            index = self._indexes[name]
            for value in function(obj):
                held = index.get(value, {})
                held.pop(key, None)
                if not held:
                    index.pop(value, None)
