"""One kind in all namespaces, or in those that the operator was told to serve."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from finetune_operator.kube.client import Client, Resource
from finetune_operator.kube.objects import Object
from finetune_operator.kube.reflector import OnChange, Reflector
from finetune_operator.kube.store import IndexFunction


class Cache:
    """Reads over one reflector, or over one for each namespace."""

    def __init__(
        self,
        client: Client,
        resource: Resource,
        namespaces: Sequence[str],
        on_change: OnChange,
        *,
        label_selector: str = "",
        indexes: Mapping[str, IndexFunction] | None = None,
        transform: Callable[[Object], Object] | None = None,
    ) -> None:
        """``namespaces``: empty for all."""
        everywhere: list[str | None] = [None]
        self.reflectors = [
            Reflector(client, resource, name, label_selector, on_change, indexes=indexes, transform=transform)
            for name in (namespaces or everywhere)
        ]

    def get(self, namespace: str, name: str) -> Object | None:
        """That object."""
        return next((o for r in self.reflectors if (o := r.store.get(namespace, name)) is not None), None)

    def by_index(self, index: str, value: str) -> list[Object]:
        """All that the index function of that name gave that value for."""
        return [obj for reflector in self.reflectors for obj in reflector.store.by_index(index, value)]

    def __iter__(self) -> Iterator[str]:
        """Over the keys of all objects of this moment, ``namespace/name``."""
        for reflector in self.reflectors:
            yield from reflector.store.keys()

    def counts(self, index: str) -> Mapping[str, int]:
        """How many objects the index function of that name gave each value for."""
        found: Counter[str] = Counter()
        for reflector in self.reflectors:
            found.update(reflector.store.counts(index))
        return found

    @property
    def synced(self) -> bool:
        """Whether it has held everything at least once."""
        return all(reflector.synced for reflector in self.reflectors)

    async def wait_synced(self) -> None:
        """Return once it has."""
        for reflector in self.reflectors:
            await reflector.wait_synced()
