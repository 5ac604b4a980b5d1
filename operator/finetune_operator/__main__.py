"""``python -m finetune_operator``: watch FineTuneJobs and run them, as one of several replicas."""

import asyncio
import logging
import secrets
import signal
import sys

from prometheus_client import CollectorRegistry

from finetune_operator import health, logs, slim
from finetune_operator.cache import Cache
from finetune_operator.controller import FINETUNEJOBS, Controller
from finetune_operator.kube.client import Client
from finetune_operator.kube.errors import CredentialsError, KubeError, LeaseLostError
from finetune_operator.kube.events import Recorder
from finetune_operator.kube.lease import Elector
from finetune_operator.kube.metrics import Metrics
from finetune_operator.kube.objects import Object, controller_uid, key_of
from finetune_operator.kube.workers import run_workers
from finetune_operator.kube.workqueue import WorkQueue
from finetune_operator.lookup import JOBS, OWNER, PODS
from finetune_operator.metrics import JobMetrics, JobStates, state
from finetune_operator.plan.pods import MANAGED_BY, STAGE_LABEL
from finetune_operator.reporting import Reporting
from finetune_operator.schema import missing
from finetune_operator.settings import Settings, SettingsError, from_environment

_log = logging.getLogger("finetune.operator")
_GRACE_SECONDS = 10.0
"""For reconciliations that are under way when we are told to stop."""
_SCHEMA_SECONDS = 5.0
"""Between two looks at the served schema, until it is as new as ours."""
_STATE = "state"
"""The index of FineTuneJobs that are counted."""


async def operate(settings: Settings, client: Client, registry: CollectorRegistry, stop: asyncio.Event) -> None:
    """Serve until told to stop. Raises LeaseLostError when a term as leader ended: start the process anew."""
    metrics = client.transport.metrics
    # A restarted container has its pod's name again, and must not take the dead one's Lease for its own.
    elector = Elector(client, settings.namespace, settings.lease_name, f"{settings.identity}_{secrets.token_hex(4)}")
    fenced = client.fenced(elector.check)
    queue = WorkQueue[str]("finetunejobs", metrics=metrics)
    recorder = Recorder(fenced, MANAGED_BY, settings.identity)
    indexes = {OWNER: lambda obj: [controller_uid(obj)]}
    reporting = Reporting(client, elector, settings, lambda: pods, queue.add)

    leads = asyncio.Event()

    def enqueue(key: str) -> None:
        if leads.is_set():  # nobody takes a follower's keys: they would only become more
            queue.add(key)

    def on_finetunejob(old: Object | None, new: Object | None) -> None:
        if leads.is_set() and new is not None and _asked(old) != _asked(new):
            queue.add(key_of(new), urgent=True)  # somebody waits for the answer; what runs already can wait a moment
        controller.on_finetunejob(old, new)
        reporting.on_finetunejob(old, new)

    def on_job(old: Object | None, new: Object | None) -> None:
        controller.on_job(old, new)

    def on_pod(old: Object | None, new: Object | None) -> None:
        controller.on_pod(old, new)
        reporting.on_pod(old, new)

    finetunejobs = Cache(
        client,
        FINETUNEJOBS,
        settings.namespaces,
        on_finetunejob,
        indexes={_STATE: lambda obj: [state(obj)]},
        transform=slim.finetunejob,
    )
    managed = f"app.kubernetes.io/managed-by={MANAGED_BY}"
    jobs = Cache(client, JOBS, settings.namespaces, on_job, label_selector=managed, indexes=indexes, transform=slim.job)
    pods = Cache(
        client, PODS, settings.namespaces, on_pod, label_selector=STAGE_LABEL, indexes=indexes, transform=slim.pod
    )
    registry.register(JobStates(lambda: finetunejobs.counts(_STATE)))
    controller = Controller(
        fenced,
        finetunejobs=finetunejobs,
        jobs=jobs,
        pods=pods,
        enqueue=enqueue,
        recorder=recorder,
        settings=reporting.pods,
        metrics=JobMetrics(registry),
        reported=reporting.reported,
        active=reporting.want,
    )
    caches = (finetunejobs, jobs, pods)
    lacking = ["FineTuneJob"]  # until we know

    def not_ready() -> str:
        if lacking:
            return (
                f"the served FineTuneJob is older than this operator, apply its CRD: it lacks {', '.join(lacking[:5])}"
            )
        return "" if all(cache.synced for cache in caches) else "the caches are not filled yet"

    async def compare_schemas() -> None:
        while lacking:
            try:
                lacking[:] = await missing(client)
            except KubeError as error:
                _log.warning("cannot see which FineTuneJob is served: %s", error)
            await asyncio.sleep(_SCHEMA_SECONDS)

    async def lead() -> None:
        # Nothing is judged by half a cache: a Job that is not there yet would be made again.
        for cache in caches:
            await cache.wait_synced()
        _log.info("leading")
        leads.set()
        for key in finetunejobs:
            queue.add(key)
        async with asyncio.TaskGroup() as work:
            beside = [work.create_task(recorder.run()), work.create_task(reporting.lead())]
            await run_workers(queue, controller.reconcile, settings.workers)
            for task in beside:
                task.cancel()

    async with (
        health.serving(not_ready, registry, health_port=settings.health_port, metrics_port=settings.metrics_port),
        reporting.serving() as telling,
    ):
        election = asyncio.create_task(elector.run(lead))
        stopping = asyncio.create_task(stop.wait())
        watching = [asyncio.create_task(r.run()) for cache in caches for r in cache.reflectors]
        comparing = asyncio.create_task(compare_schemas())
        tasks = {election, stopping, *watching, *telling}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stopping in done and elector.leading:
                queue.close()  # what was begun is finished, and the Lease given back
                await asyncio.wait({election}, timeout=_GRACE_SECONDS)
            for task in done:
                task.result()
        finally:
            for task in (comparing, *tasks):
                task.cancel()
            await asyncio.gather(comparing, *tasks, return_exceptions=True)


def _asked(obj: Object | None) -> int:
    """Which of its user's wishes a FineTuneJob holds: each change of its spec is another."""
    return int(obj["metadata"].get("generation", 0)) if obj is not None else 0


async def run(settings: Settings) -> int:
    """Until SIGTERM, or until a lease is lost; the exit code."""
    registry = CollectorRegistry()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with await Client.connect(metrics=Metrics(registry)) as client:
        try:
            await operate(settings, client, registry, stop)
        except LeaseLostError as lost:
            _log.error("%s: exiting, so that nothing of this term goes on", lost)
            return 1
    return 0


def main() -> int:
    """The exit code: 0 after SIGTERM, 64 for wrong settings, 1 when the lease was lost."""
    try:
        settings = from_environment()
        logs.configure(settings.log_level)
        return asyncio.run(run(settings))
    except (SettingsError, CredentialsError) as error:
        print(f"finetune-operator: {error}", file=sys.stderr)
        return 64


if __name__ == "__main__":
    sys.exit(main())
