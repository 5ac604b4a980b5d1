"""Lets stages know whom they may tell their progress: the replicas' certificates, in a ConfigMap of each namespace.

Written when a namespace gets its first job and when a replica's certificate changes, never for a stage. The pods mount
it as optional: without it they start all the same, and say nothing of their progress until it is there.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from finetune_operator.kube.client import Client
from finetune_operator.kube.errors import KubeError, NotFoundError
from finetune_operator.kube.objects import Object
from finetune_operator.plan.pods import MANAGED_BY, PROGRESS_CA_KEY, PROGRESS_CONFIG_MAP
from finetune_operator.replicas import CONFIG_MAPS, Replicas

_log = logging.getLogger("finetune.progress")

_LOOK_SECONDS = 1.0
_CHECK_SECONDS = 3600.0
"""After which we look whether somebody else has changed or deleted it."""
_FORGET_SECONDS = 7200.0
"""A namespace for which nobody has asked for so long has no active job."""
_AGAIN_SECONDS = 30.0
"""After a failure."""
_TIDY_SECONDS = 60.0


@dataclass
class _Namespace:
    wanted: float
    """When somebody last asked for it."""
    tried: str = ""
    """The certificates that we last wrote, saw there, or failed to write."""
    again: float = 0.0
    """When to look at it even if those are still the right ones."""


class Trust:
    """The leader's. ``client``: its fenced one."""

    def __init__(self, client: Client, replicas: Replicas, *, ticks: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._replicas = replicas
        self._ticks = ticks
        self._namespaces: dict[str, _Namespace] = {}
        self._jobs: Counter[str] = Counter()
        """How many FineTuneJobs there are in each namespace, active or not."""
        self._tidy = float("-inf")

    def want(self, namespace: str) -> None:
        """There is an active job. Cheap: call it whenever one is seen, at least once an hour while it is active."""
        self._namespaces.setdefault(namespace, _Namespace(0.0)).wanted = self._ticks()

    def on_finetunejob(self, old: Object | None, new: Object | None) -> None:
        """A handler for the cache of FineTuneJobs. A namespace without any may be another when it has one again."""
        namespace = (new or old or {})["metadata"]["namespace"]
        self._jobs[namespace] += (new is not None) - (old is not None)
        if self._jobs[namespace] <= 0:
            del self._jobs[namespace]
            self._namespaces.pop(namespace, None)

    async def run(self) -> None:
        """Until cancelled. No error of the API server ends it."""
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        """Do what is due."""
        if not self._replicas.reflector.synced:
            return  # without the other replicas' certificates it would be worse than what is there
        if self._ticks() >= self._tidy:
            self._tidy = self._ticks() + _TIDY_SECONDS
            try:
                await self._replicas.prune(self._client)
            except KubeError as error:
                _log.warning("cannot take old certificates out: %s", error)
        bundle = self._replicas.bundle()
        for name, known in list(self._namespaces.items()):
            if self._namespaces.get(name) is not known:
                continue  # forgotten while we waited for another
            if self._ticks() >= known.wanted + _FORGET_SECONDS:
                del self._namespaces[name]
            elif known.tried != bundle or self._ticks() >= known.again:
                known.tried = bundle
                known.again = self._ticks() + (_CHECK_SECONDS if await self._ensure(name, bundle) else _AGAIN_SECONDS)

    async def _ensure(self, namespace: str, bundle: str) -> bool:
        """Have the ConfigMap say so; whether that could be done."""
        data = {PROGRESS_CA_KEY: bundle}
        try:
            try:
                there = await self._client.get(CONFIG_MAPS, namespace, PROGRESS_CONFIG_MAP)
            except NotFoundError:
                labels = {"app.kubernetes.io/managed-by": MANAGED_BY}
                made = {
                    "metadata": {"name": PROGRESS_CONFIG_MAP, "namespace": namespace, "labels": labels},
                    "data": data,
                }
                # Applied, not created: the right to that is limited to this name.
                await self._client.apply(
                    CONFIG_MAPS, namespace, {"apiVersion": "v1", "kind": "ConfigMap", **made}, MANAGED_BY
                )
            else:
                if (there.get("data") or {}).get(PROGRESS_CA_KEY) != bundle:
                    await self._client.patch(CONFIG_MAPS, namespace, PROGRESS_CONFIG_MAP, {"data": data})
        except KubeError as error:  # one namespace that is being deleted, or forbids it, is no matter for the others
            _log.warning("namespace %s gets no progress until its ConfigMap can be written: %s", namespace, error)
            return False
        return True
