import asyncio
from types import SimpleNamespace
from typing import Any

from tests.fakes import virtual_time

from finetune_operator.kube.client import Resource
from finetune_operator.kube.errors import ForbiddenError, NotFoundError
from finetune_operator.kube.events import Recorder
from finetune_operator.kube.metrics import Metrics
from finetune_operator.kube.settings import EventSettings

JOB = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"namespace": "n", "name": "bot", "uid": "u"},
}


class Server:
    """Takes Events, unless told otherwise."""

    def __init__(self) -> None:
        self.transport = SimpleNamespace(metrics=Metrics())
        self.events: dict[str, dict[str, Any]] = {}
        self.refuse = False

    async def create(self, resource: Resource, namespace: str, obj: dict[str, Any]) -> dict[str, Any]:
        """Store it."""
        if self.refuse:
            raise ForbiddenError("no")
        assert obj["metadata"]["namespace"] == namespace
        assert obj["metadata"]["name"] not in self.events
        self.events[obj["metadata"]["name"]] = obj
        return obj

    async def patch(self, resource: Resource, namespace: str, name: str, patch: dict[str, Any]) -> dict[str, Any]:
        """Change it."""
        if name not in self.events:
            raise NotFoundError("404")
        self.events[name].update(patch)
        return self.events[name]

    def dropped(self) -> float:
        """How many Events were lost."""
        return self.transport.metrics.registry.get_sample_value("events_dropped_total") or 0.0


def a_recorder(server: Server, **settings: Any) -> Recorder:
    """One in virtual time."""
    clock = asyncio.get_running_loop().time
    return Recorder(server, "operator", "pod-1", EventSettings(**settings), clock=clock)  # type: ignore[arg-type]


@virtual_time
async def test_an_event_says_what_happened_to_whom() -> None:
    """It refers to the object by uid, carries the words, and is sent in the background."""
    server = Server()
    recorder = a_recorder(server)
    sending = asyncio.create_task(recorder.run())
    recorder.record(JOB, "Warning", "StageFailed", "sft failed: " + "x" * 2000)
    assert server.events == {}
    await asyncio.sleep(1)
    (event,) = server.events.values()
    reference = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "namespace": "n", "name": "bot"}
    assert event["involvedObject"] == {**reference, "uid": "u"}
    assert (event["type"], event["reason"], event["count"]) == ("Warning", "StageFailed", 1)
    assert event["message"].startswith("sft failed: xxx")
    assert len(event["message"]) == 1024
    assert event["source"] == {"component": "operator"}
    sending.cancel()


@virtual_time
async def test_repetitions_raise_a_count() -> None:
    """The same words about the same object within the window are one Event; later, or once it has expired, another."""
    server = Server()
    recorder = a_recorder(server, repeat_window=600)
    for _ in range(3):
        recorder.record(JOB, "Normal", "Queued", "waits")
    recorder.record(JOB, "Normal", "Queued", "still waits")
    await recorder.flush()
    assert sorted(event["count"] for event in server.events.values()) == [1, 3]
    server.events.clear()
    recorder.record(JOB, "Normal", "Queued", "waits")
    await recorder.flush()
    assert [event["count"] for event in server.events.values()] == [1]
    await asyncio.sleep(601)
    recorder.record(JOB, "Normal", "Queued", "waits")
    await recorder.flush()
    assert len(server.events) == 2


@virtual_time
async def test_events_are_never_waited_for_nor_piled_up() -> None:
    """While nobody sends, the oldest are dropped and counted; a refusing server loses them; memory is bounded."""
    server = Server()
    recorder = a_recorder(server, waiting=10, remembered=5)
    for number in range(25):
        recorder.record(JOB, "Normal", "Step", str(number))
    assert server.dropped() == 15
    await recorder.flush()
    assert [event["message"] for event in server.events.values()] == [str(number) for number in range(15, 25)]
    assert len(recorder._sent) == 5
    server.refuse = True
    recorder.record(JOB, "Normal", "Step", "lost")
    await recorder.flush()
    assert server.dropped() == 16
