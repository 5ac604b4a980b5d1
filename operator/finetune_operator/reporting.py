"""All that lets stages say how far they are, put together: certificate, replicas, server, and whom stages may trust."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime

from finetune_operator.cache import Cache
from finetune_operator.certificates import OwnCertificate
from finetune_operator.kube.client import Client
from finetune_operator.kube.lease import Elector
from finetune_operator.kube.objects import Object
from finetune_operator.lookup import Reported
from finetune_operator.plan.pods import PodSettings
from finetune_operator.progress import PATH, ProgressServer
from finetune_operator.replicas import Replica, Replicas, url_of
from finetune_operator.settings import Settings
from finetune_operator.tokens import SigningKeys, TokenReviews
from finetune_operator.trust import Trust


class Reporting:
    """One replica's part. Does nothing at all where ``settings`` names no Service by which stages reach it."""

    def __init__(
        self,
        client: Client,
        elector: Elector,
        settings: Settings,
        pods: Callable[[], Cache],
        enqueue: Callable[[str], None],
    ) -> None:
        """``client``: one without a fence; ``pods``: the cache, once it is there."""
        self._settings = settings
        self._elector = elector
        self._own = OwnCertificate(settings.progress_names, settings.pod_ip, datetime.now(UTC))
        url = url_of(settings.pod_ip, settings.progress_port)
        self._replicas = Replicas(client, settings.namespace, settings.identity, url, self._own)
        self._trust = Trust(client.fenced(elector.check), self._replicas)
        self._server = ProgressServer(
            # Reviewing tokens is a right over the whole cluster, which an operator of some namespaces does not have.
            SigningKeys(client) if settings.namespaces else TokenReviews(client),
            pod=lambda namespace, name: pods().get(namespace, name),
            enqueue=enqueue,
            leading=lambda: elector.leading,
            leader=self._leader,
        )

    @property
    def pods(self) -> PodSettings:
        """What stages' pods get, the address of the progress server included."""
        names, port = self._settings.progress_names, self._settings.progress_port
        url = f"https://{names[0]}:{port}{PATH}" if names else ""
        return replace(self._settings.pods, progress_url=url)

    def reported(self, pod_uid: str) -> Reported:
        """What that pod said last."""
        return self._server.reported(pod_uid)

    def want(self, namespace: str) -> None:
        """There is an active job in that namespace."""
        if self._settings.progress_names:
            self._trust.want(namespace)

    def on_finetunejob(self, old: Object | None, new: Object | None) -> None:
        """A handler for the cache of FineTuneJobs."""
        self._trust.on_finetunejob(old, new)

    def on_pod(self, old: Object | None, new: Object | None) -> None:
        """A handler for the cache of pods."""
        self._server.on_pod(old, new)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[list[asyncio.Task[None]]]:
        """Serve while the block lasts; gives the tasks that must not end."""
        if not self._settings.progress_names:
            yield []
            return
        async with self._server.serving("", self._settings.progress_port, self._own.tls):
            tasks = [asyncio.create_task(work) for work in (self._replicas.reflector.run(), self._replicas.run())]
            try:
                yield tasks
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def lead(self) -> None:
        """The leader's part, until cancelled: have every namespace with an active job know our certificates."""
        if self._settings.progress_names:
            await self._trust.run()

    def _leader(self) -> Replica | None:
        # The identity in the Lease is the pod's name and a word that changes with each restart.
        return self._replicas.get(self._elector.holder.rpartition("_")[0])
