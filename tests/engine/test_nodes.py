"""Stages on several nodes, with the real Job controller: all pods or none, and one Service for a job."""

import asyncio
import json
from typing import Any

from tests.builders import SFT, raw_job
from tests.cluster.controlplane import ControlPlane
from tests.engine.standin_kubelet import End, committed
from tests.engine.test_controller import (  # noqa: F401 - fixtures
    World,
    attempts,
    eventually,
    is_,
    line,
    namespace,
    plane,
    world,
)

from finetune_api.validate import parse
from finetune_operator.creation import SERVICES
from finetune_operator.kube.objects import controller_uid, uid_of
from finetune_operator.plan.pods import node_service

TWO: dict[str, Any] = {**SFT, "resources": {"nodes": 2}}


def a_job(**spec: Any) -> dict[str, Any]:
    """One training on two nodes."""
    return raw_job(TWO, evaluation={"skip": True}, **spec)


async def services(here: World) -> list[dict[str, Any]]:
    """All of the namespace."""
    return await here.client.list(SERVICES, here.namespace)


async def training_pods(here: World) -> list[dict[str, Any]]:
    """Those of the training that are there, by index."""
    found = [p for p in await here.pods() if p["metadata"]["labels"]["finetune.dev/stage"] == "sft"]
    return sorted(found, key=lambda p: str(p["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]))


def test_two_pods_find_each_other_and_end_as_one(plane: ControlPlane, namespace: str) -> None:  # noqa: F811
    """The names that they are told are theirs; the first one's end is the attempt's, and the other is stopped."""

    async def scenario() -> None:
        ends = {"sft": [End(seconds=3, message=committed("sft"))], "sft/1": [End(waits=True)]}
        async with world(plane, namespace, **ends) as here:
            await here.apply(a_job())
            await here.until(lambda j: line(j, "sft").get("state") == "Running")
            first, second = await training_pods(here)
            (service,) = await services(here)
            variables = {v["name"]: v.get("value") for v in second["spec"]["containers"][0]["env"]}
            host, subdomain = first["spec"]["hostname"], first["spec"]["subdomain"]
            assert variables["FINETUNE_RENDEZVOUS"] == f"{host}.{subdomain}.{namespace}.svc:29500"
            assert subdomain == second["spec"]["subdomain"] == service["metadata"]["name"]
            assert "JOB_COMPLETION_INDEX" in variables
            assert service["spec"]["selector"].items() <= second["metadata"]["labels"].items()
            job = await here.until(is_("Complete"))
            assert controller_uid(service) == uid_of(job)
            assert (line(job, "sft")["attempt"], line(job, "sft")["failures"]) == (1, 0)
            assert sorted(here.kubelet.started) == [("prepare", 1), ("sft", 1), ("sft/1", 1)]

    asyncio.run(scenario())


def test_one_that_is_lost_ends_the_attempt_for_all(plane: ControlPlane, namespace: str) -> None:  # noqa: F811
    """Its own words are told, it counts once, and the next attempt has both again, with the same Service."""

    async def scenario() -> None:
        ends = {
            "sft": [End(waits=True)],
            "sft/1": [End(code=70, seconds=1, message=json.dumps({"error": "KeyError: 1"}))],
        }
        async with world(plane, namespace, **ends) as here:
            await here.apply(a_job())
            job = await here.until(lambda j: line(j, "sft").get("state") == "Retrying")
            assert (line(job, "sft")["reason"], line(job, "sft")["message"]) == ("StageError", "KeyError: 1")
            before = await services(here)
            job = await here.until(is_("Complete"))
            assert (line(job, "sft")["attempt"], line(job, "sft")["failures"]) == (2, 1)
            assert sorted(here.kubelet.started)[1:] == [("sft", 1), ("sft", 2), ("sft/1", 1), ("sft/1", 2)]
            assert [uid_of(s) for s in await services(here)] == [uid_of(s) for s in before]

    asyncio.run(scenario())


def test_suspending_stops_all_of_it(plane: ControlPlane, namespace: str) -> None:  # noqa: F811
    """Suspended is True once no pod runs; what both had to do is not counted, and goes on with both."""

    async def scenario() -> None:
        async with world(plane, namespace, **{"sft": [End(waits=True)], "sft/1": [End(waits=True)]}) as here:
            await here.apply(a_job())
            await here.until(lambda j: line(j, "sft").get("state") == "Running")
            await here.patch({"suspend": True})
            await here.until(is_("Suspended"))
            assert [p for p in await here.pods() if p["status"]["phase"] == "Running"] == []
            await here.patch({"suspend": False})
            job = await here.until(is_("Complete"))
            assert (line(job, "sft")["attempt"], line(job, "sft")["failures"]) == (2, 0)

    asyncio.run(scenario())


def test_an_operator_that_died_between_service_and_job(plane: ControlPlane, namespace: str) -> None:  # noqa: F811
    """The next one goes on with the Service that is there; deleting the job takes it along."""

    async def scenario() -> None:
        async with world(plane, namespace, operator=False) as before:
            await before.apply(a_job())
            made = await before.client.create(SERVICES, namespace, node_service(parse(await before.job())))
        async with world(plane, namespace) as here:
            await here.until(is_("Complete"))
            assert [uid_of(s) for s in await services(here)] == [uid_of(made)]
            assert await attempts(here) == [("prepare", "1"), ("sft", "1")]
            await asyncio.to_thread(plane.kubectl, "-n", namespace, "delete", "ftj", "bot")

            async def gone() -> bool:
                return not await services(here)

            await eventually(gone)

    asyncio.run(scenario())
