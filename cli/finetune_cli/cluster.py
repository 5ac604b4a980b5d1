"""Jobs of a cluster, for the commands: what the API server says of them, with the user's own rights."""

import asyncio
import difflib
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finetune_api.status import JobStatus
from finetune_api.types import API_VERSION, FineTuneJob
from finetune_api.validate import InvalidSpec, parse
from finetune_cli.errors import CommandError
from finetune_cli.job import LogLine, Told
from finetune_cli.ledger import home
from finetune_operator.kube.client import Client, Resource
from finetune_operator.kube.errors import GoneError, KubeError, NotFoundError, RetryableError
from finetune_operator.kube.objects import Object
from finetune_operator.kube.settings import HTTPSettings
from finetune_operator.plan.status import holds

if TYPE_CHECKING:
    from finetune_jobs.store.client import Store

T = TypeVar("T")
_GROUP, _, _VERSION = API_VERSION.partition("/")
FINETUNEJOBS = Resource(_GROUP, _VERSION, "finetunejobs")
_AGAIN_SECONDS = 1.0


class Cluster:
    """One namespace of a cluster, spoken to in one thread, one request after the other. Errors are KubeErrors."""

    def __init__(self, runner: asyncio.Runner, client: Client, namespace: str, kubectl: Sequence[str]) -> None:
        self._runner = runner
        self.client = client
        self.namespace = namespace
        self.kubectl = kubectl
        """Arguments with which kubectl speaks to the same cluster."""
        self.closed = False

    def do(self, request: Coroutine[Any, Any, T]) -> T:
        """Its answer."""
        return self._runner.run(request)

    def stream(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """Each of them as it comes."""

        async def following() -> T | None:
            return await anext(items, None)

        try:
            while (item := self._runner.run(following())) is not None:
                yield item
        finally:
            if not self.closed:  # an iterator may outlive us, in the frames of an error
                self._runner.run(items.aclose())

    def find(self, name: str, endpoint: str = "") -> "ClusterJob":
        """That job; an unknown name is a CommandError with the nearest known ones. ``endpoint``: its store's."""
        try:
            return ClusterJob(self, self.do(self.client.get(FINETUNEJOBS, self.namespace, name)), endpoint)
        except NotFoundError:
            pass
        names = [job.name for job in self.all()]
        elsewhere: list[Object] = []
        with suppress(KubeError):  # whoever may see one namespace may not see all
            elsewhere = self.do(self.client.list(FINETUNEJOBS, field_selector=f"metadata.name={name}"))
        if elsewhere:
            place = elsewhere[0]["metadata"]["namespace"]
            hint = f"there is one in the namespace {place}: -n {place}"
        elif near := difflib.get_close_matches(name, names, n=3, cutoff=0.5):
            hint = f"did you mean {' or '.join(near)}?"
        elif names:
            hint = f"known: {', '.join(names[:10])}"
        else:
            hint = "there is none yet: `kubectl apply -f FILE` starts one"
        raise CommandError(f"no job {name!r} in the namespace {self.namespace}; {hint}")

    def all(self) -> "list[ClusterJob]":
        """Every job of the namespace, by name. CommandError if the cluster does not know the kind."""
        try:
            found = self.do(self.client.list(FINETUNEJOBS, self.namespace))
        except NotFoundError:
            raise CommandError(
                f"this cluster does not know FineTuneJobs of {API_VERSION}: install the operator's chart, "
                "or name another cluster with --context"
            ) from None
        return [ClusterJob(self, raw) for raw in found]


@contextmanager
def connected(namespace: str = "", context: str = "", kubeconfig: Path | None = None) -> Iterator[Cluster]:
    """The cluster and namespace that kubectl would use with these options."""
    options = {"--context": context, "--kubeconfig": str(kubeconfig or "")}
    settings = HTTPSettings(user_agent="kubectl-finetune", attempts=2)  # somebody waits
    with asyncio.Runner() as runner:
        client = runner.run(Client.connect(kubeconfig, context or None, settings=settings))
        try:
            kubectl = [f"{option}={value}" for option, value in options.items() if value]
            cluster = Cluster(runner, client, namespace or runner.run(client.namespace()), kubectl)
            try:
                yield cluster
            finally:
                cluster.closed = True
        finally:
            runner.run(client.close())


class ClusterJob:
    """A FineTuneJob as the API server had it last."""

    command = "kubectl finetune"

    def __init__(self, cluster: Cluster, raw: Object, endpoint: str = "") -> None:
        self.cluster = cluster
        self.raw = raw
        self._endpoint = endpoint

    @property
    def name(self) -> str:
        """``metadata.name``."""
        return str(self.raw["metadata"]["name"])

    @property
    def created(self) -> str:
        """``metadata.creationTimestamp``: what is older is of another job of this name."""
        return str(self.raw["metadata"]["creationTimestamp"])

    @property
    def downloads(self) -> Path:
        """By uid too: other clusters, and later jobs, may have the same names."""
        meta: dict[str, str] = self.raw["metadata"]
        return home() / "cluster" / meta["namespace"] / f"{self.name}-{meta['uid'][:8]}"

    def definition(self) -> FineTuneJob:
        """As the operator reads it."""
        try:
            return parse(self.raw)
        except InvalidSpec as error:
            raise CommandError(f"{self.name} can never run:\n{error}") from None

    def resource(self) -> dict[str, Any]:
        """What the server said, but who manages which field."""
        meta = {key: value for key, value in self.raw["metadata"].items() if key != "managedFields"}
        return {**self.raw, "metadata": meta}

    def status(self) -> JobStatus:
        """Empty until the operator has seen the job."""
        try:
            status = JobStatus.model_validate(self.raw.get("status") or {})
        except ValueError:
            raise CommandError(
                f"{self.name} has a status that this command does not know: the operator is newer; "
                "install the package of the same version here"
            ) from None
        if not self.raw.get("status"):
            status = status.model_copy(update={"summary": "not seen by the operator yet"})
        return status

    def since(self) -> datetime | None:
        """Its creation."""
        return datetime.fromisoformat(self.created)

    def updates(self) -> Iterator[JobStatus]:
        """By a watch, until it is complete or has failed: a suspended one may be resumed. CommandError: deleted."""
        yield self.status()
        while not self.ended:
            with suppress(GoneError, RetryableError):
                for kind, raw in self.cluster.stream(self._changes()):
                    if kind == "DELETED":
                        raise self._deleted()
                    if kind == "BOOKMARK":
                        continue
                    self.raw = raw
                    yield self.status()
                    if self.ended:
                        return
            time.sleep(_AGAIN_SECONDS)  # a watch ends now and then: look, and begin another
            self.look_again()
            yield self.status()

    @property
    def ended(self) -> bool:
        """Complete or Failed, as far as we know."""
        return any(holds(self.status(), end) for end in ("Complete", "Failed"))

    def _changes(self) -> AsyncGenerator[tuple[str, Object], None]:
        return self.cluster.client.watch(
            FINETUNEJOBS,
            self.cluster.namespace,
            resource_version=self.raw["metadata"]["resourceVersion"],
            field_selector=f"metadata.name={self.name}",
        )

    def look_again(self) -> None:
        """Ask for it anew. CommandError: it was deleted."""
        uid = self.raw["metadata"]["uid"]
        try:
            self.raw = self.cluster.do(self.cluster.client.get(FINETUNEJOBS, self.cluster.namespace, self.name))
        except NotFoundError:
            raise self._deleted() from None
        if self.raw["metadata"]["uid"] != uid:
            raise self._deleted()

    def _deleted(self) -> CommandError:
        return CommandError(f"{self.name} was deleted; its results stay in the store")

    def log_lines(self, stage: str, *, follow: bool, node: int = 0) -> Iterator[LogLine]:
        """From the pods, of stages on several nodes from that one's; of those that are gone from the store."""
        from finetune_cli.clusterlogs import log_lines

        return log_lines(self, stage, follow=follow, node=node)

    @contextmanager
    def store(self, told: Told | None) -> "Iterator[Store]":
        """The one that the spec names, by whatever way leads there from here."""
        from finetune_cli.clusterstore import opened

        with (
            opened(self.cluster, self.definition().spec.storage, self._endpoint) as access,
            access.store(told) as store,
        ):
            yield store

    def suspend(self, wanted: bool) -> None:
        """Stop its stages, which save what they have; or let them go on."""
        body = {"spec": {"suspend": wanted}}
        self.raw = self.cluster.do(self.cluster.client.patch(FINETUNEJOBS, self.cluster.namespace, self.name, body))
