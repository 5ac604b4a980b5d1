"""What a reflector knows: objects by key, and by whatever else they are looked up by.

Holds what the server holds and nothing more: a deleted object is handed to whoever asked to be told, then forgotten.

Objects are held as compressed JSON, with another of them as the dictionary, since those of one kind are much alike:
a Job that takes 2.9 KB as dicts takes 0.1 KB, and 25 microseconds to pack or to unpack.
"""

import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from finetune_operator.kube.objects import Object, key_for, key_of, uid_of

IndexFunction = Callable[[Object], Iterable[str]]
"""The values that an object is found under. It must depend on nothing but the object."""
Change = tuple[Object | None, Object | None]
"""Before and after; None: not there."""
_WINDOW = 8192
"""Bytes that zlib looks back, the dictionary included. More would take longer to set up than it saves."""
_BITS = -13
"""The window's size as zlib wants it; negative: without header and checksum."""
_MEMORY = 6
_LEVEL = 6


@dataclass(frozen=True, slots=True)
class _Held:
    uid: str
    version: str
    values: tuple[tuple[str, str], ...]
    """Index and value of each that it is found under."""
    packed: bytes
    dictionary: bytes


class Store:
    """Not for threads. What it returns is made for the caller, who may keep or change it."""

    def __init__(self, indexes: Mapping[str, IndexFunction] | None = None) -> None:
        self._objects: dict[str, _Held] = {}
        self._functions = dict(indexes or {})
        self._indexes: dict[str, dict[str, dict[str, None]]] = {name: {} for name in self._functions}
        self._dictionary = b""
        """For the next ones. Objects come to say more of themselves: one that is half as long again takes its place."""
        self.synced = False
        """Whether it has held everything at least once."""

    def __len__(self) -> int:
        return len(self._objects)

    def __iter__(self) -> Iterator[Object]:
        """Over the objects of this moment."""
        return map(_unpack, list(self._objects.values()))

    def keys(self) -> set[str]:
        """Of all objects."""
        return set(self._objects)

    def get(self, namespace: str | None, name: str) -> Object | None:
        """That object; an empty namespace for kinds that have none."""
        return self.at(key_for(namespace, name))

    def at(self, key: str) -> Object | None:
        """The object of that key."""
        held = self._objects.get(key)
        return None if held is None else _unpack(held)

    def by_index(self, index: str, value: str) -> list[Object]:
        """All that the index function named so gave that value for, in the order of their arrival."""
        return [_unpack(self._objects[key]) for key in self._indexes[index].get(value, ())]

    def counts(self, index: str) -> dict[str, int]:
        """How many objects are found under each value."""
        return {value: len(keys) for value, keys in self._indexes[index].items()}

    def put(self, obj: Object) -> list[Change]:
        """Take it in; what that changed.

        Nothing if it is held as it is. Two changes if one of the same name, with another uid, was there: its deletion
        was missed, and nobody must take the new one for it.
        """
        key = key_of(obj)
        held = self._objects.get(key)
        if held is not None and held.uid != uid_of(obj):
            return [*self.remove(key), *self.put(obj)]
        version = obj["metadata"].get("resourceVersion", "")
        if held is not None and version and held.version == version:
            return []
        values = tuple((name, sys.intern(value)) for name, found in self._functions.items() for value in found(obj))
        self._objects[key] = _Held(sys.intern(uid_of(obj)), version, values, *self._pack(obj))
        if held is None or held.values != values:
            self._unindex(key, held)
            for name, value in values:
                self._indexes[name].setdefault(value, {})[key] = None
        return [(None if held is None else _unpack(held), obj)]

    def remove(self, key: str, last: Object | None = None) -> list[Change]:
        """Forget it; ``last`` is its state as it was deleted, where the server told: it may say more than what we had.

        Nothing if it is not there.
        """
        held = self._objects.pop(key, None)
        if held is None:
            return []
        self._unindex(key, held)
        return [(last or _unpack(held), None)]

    def _unindex(self, key: str, held: _Held | None) -> None:
        for name, value in held.values if held is not None else ():
            keys = self._indexes[name].get(value, {})
            keys.pop(key, None)
            if not keys:
                self._indexes[name].pop(value, None)

    def _pack(self, obj: Object) -> tuple[bytes, bytes]:
        plain = json.dumps(obj, separators=(",", ":")).encode()
        if 2 * min(len(plain), _WINDOW) > 3 * len(self._dictionary):
            self._dictionary = plain[-_WINDOW:]
        packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _BITS, _MEMORY, zdict=self._dictionary)
        return packer.compress(plain) + packer.flush(), self._dictionary


def _unpack(held: _Held) -> Object:
    plain: Object = json.loads(zlib.decompressobj(_BITS, zdict=held.dictionary).decompress(held.packed))
    return plain
