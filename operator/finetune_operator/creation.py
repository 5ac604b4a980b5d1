"""Makes what ``plan`` wishes for: Jobs by POST, once each, and before the first on several nodes their Service.

What is there already is success if the owner is ours. What the API server refuses is remembered, so that the status
says why, and tried again later.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api.types import FineTuneJob
from finetune_operator.kube.client import Client, Resource
from finetune_operator.kube.errors import AlreadyExistsError, ForbiddenError, InvalidError, ServerError
from finetune_operator.kube.objects import Object, controller_uid
from finetune_operator.lookup import JOBS
from finetune_operator.plan.children import NewChild, Plan
from finetune_operator.plan.pods import PodSettings, batch_job, node_service

_log = logging.getLogger("finetune.controller")

SERVICES = Resource("", "v1", "services")
_FIRST, _LONGEST = timedelta(seconds=5), timedelta(seconds=60)
"""Before what was refused is tried again: at first, and at most."""


@dataclass
class Refusal:
    """A Job that the API server would not make."""

    words: str
    since: datetime
    again: datetime
    tries: int = 1


Refusals = dict[str, Refusal]
"""By the Job's name."""


async def create(
    client: Client,
    job: FineTuneJob,
    labels: Mapping[str, str],
    planned: Plan,
    settings: PodSettings,
    refused: Refusals,
    now: datetime,
) -> list[timedelta]:
    """Make all in ``planned.create``; when to look again at what was refused, which ``refused`` then says.

    ``labels``: of the FineTuneJob. An outage of the API server is raised: nothing is known then.
    """
    for name in refused.keys() - {child.name for child in planned.create}:
        del refused[name]
    waits = [await _create(client, job, labels, child, settings, refused, now) for child in planned.create]
    return [wait for wait in waits if wait is not None]


async def _create(
    client: Client,
    job: FineTuneJob,
    labels: Mapping[str, str],
    child: NewChild,
    settings: PodSettings,
    refused: Refusals,
    now: datetime,
) -> timedelta | None:
    before = refused.get(child.name)
    if before is not None and timedelta() < before.again - now <= _LONGEST:
        return before.again - now
    service = [(SERVICES, node_service(job))] if child.service else []
    for resource, obj in [*service, (JOBS, batch_job(job, labels, child, settings))]:
        if words := await _make(client, job, resource, obj):
            return _refuse(refused, child.name, words, now)
    refused.pop(child.name, None)
    about = {"job": f"{job.metadata.namespace}/{job.metadata.name}", "stage": child.run.stage}
    _log.info("created", extra={**about, "attempt": child.run.attempt})
    return None


async def _make(client: Client, job: FineTuneJob, resource: Resource, obj: Object) -> str:
    """Have it there; why not, where that was refused."""
    namespace, name = job.metadata.namespace, obj["metadata"]["name"]
    try:
        await client.create(resource, namespace, obj)
    except AlreadyExistsError:
        if controller_uid(await client.get(resource, namespace, name)) != job.metadata.uid:
            return f"a {obj['kind']} {name} that is not ours is there: delete it"
    except (ForbiddenError, InvalidError, ServerError) as error:  # a webhook that is down is a ServerError
        # The path that was asked is of no use to the user.
        return str(error).partition(": ")[2]
    return ""


def _refuse(refused: Refusals, name: str, words: str, now: datetime) -> timedelta:
    """Remember it: the next look, at once, says so in the status; it is tried again later."""
    before = refused.get(name)
    tries = before.tries + 1 if before else 1
    wait = min(_LONGEST, _FIRST * 2 ** min(tries - 1, 10))
    refused[name] = Refusal(words, before.since if before else now, now + wait, tries)
    return wait if before and before.words == words else timedelta()
