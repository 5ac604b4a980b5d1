"""Thousands of FineTuneJobs at once against a real API server and etcd; what the operator costs.

``python benchmarks/operator_scale.py [--jobs 5000]``. Each job has two stages, prepare and sft. The operator is a
process of its own, as in its image; a stand-in here plays Job controller and kubelet in one and ends every attempt at
once. API server, etcd, stand-in and operator share this machine's cores: compare with another controller under the same
load, never quote as the speed of a cluster.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.builders import SFT, raw_job  # noqa: E402 - from the checkout, not installed
from tests.cluster.controlplane import ControlPlane, running_control_plane  # noqa: E402
from tests.cluster.definitions import serve_finetunejobs  # noqa: E402
from tests.engine.standin_kubelet import committed  # noqa: E402

from finetune_operator.controller import FINETUNEJOBS  # noqa: E402
from finetune_operator.kube import Client, Reflector  # noqa: E402
from finetune_operator.lookup import JOBS, PODS  # noqa: E402

NAMESPACE = "load"
AT_ONCE = 32
"""Requests of ours that are under way at a time, as of many users and kubelets."""
METRICS_PORT = 18080
IDLE_SECONDS = 20


class StandIn:
    """Ends every attempt as soon as it is made: a pod with the termination message, and a Job that is complete."""

    def __init__(self, client: Client) -> None:
        self.made: dict[str, float] = {}
        """When the first Job of each FineTuneJob was seen."""
        self._client = client
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    def on_job(self, old: dict[str, Any] | None, new: dict[str, Any] | None) -> None:
        """A handler for a reflector of Jobs."""
        if old is not None or new is None:
            return
        self.made.setdefault(new["metadata"]["labels"]["finetune.dev/job"], time.monotonic())
        task = asyncio.create_task(self._end(new))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end(self, job: dict[str, Any]) -> None:
        meta, now = job["metadata"], datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": True}
        template = job["spec"]["template"]
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": meta["name"],
                "labels": template["metadata"]["labels"],
                "ownerReferences": [owner],
            },
            "spec": template["spec"],
        }
        message = committed(meta["labels"]["finetune.dev/stage"], parameters=135_000_000)
        ended = {"exitCode": 0, "reason": "Completed", "message": message, "startedAt": now, "finishedAt": now}
        container = {"name": "stage", "image": "x", "imageID": "x", "ready": False, "restartCount": 0}
        pod_status = {"phase": "Succeeded", "containerStatuses": [{**container, "state": {"terminated": ended}}]}
        done = {"status": "True", "lastProbeTime": now, "lastTransitionTime": now}
        job_status = {
            "startTime": now,
            "completionTime": now,
            "succeeded": 1,
            "ready": 0,
            "terminating": 0,
            "uncountedTerminatedPods": {},
            "conditions": [{"type": kind, **done} for kind in ("SuccessCriteriaMet", "Complete")],
        }
        async with self._slots:
            await self._client.create(PODS, NAMESPACE, pod)
            await self._client.patch(PODS, NAMESPACE, meta["name"], {"status": pod_status}, subresource="status")
            await self._client.patch(JOBS, NAMESPACE, meta["name"], {"status": job_status}, subresource="status")


def start_operator(plane: ControlPlane, log: Path) -> subprocess.Popen[bytes]:
    """As its image starts it, for all namespaces."""
    environment = {
        **os.environ,
        "KUBECONFIG": str(plane.kubeconfig),
        "FINETUNE_TRAINER_IMAGE": "trainer:1",
        "FINETUNE_GGUF_IMAGE": "gguf:1",
        "FINETUNE_METRICS_PORT": str(METRICS_PORT),
        "FINETUNE_HEALTH_PORT": str(METRICS_PORT + 1),
        "POD_NAMESPACE": "default",
        "POD_NAME": "bench",
    }
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "finetune_operator"], env=environment, stdout=output, stderr=output
        )


def requests() -> dict[str, float]:
    """What the operator has sent so far, by method."""
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS_PORT}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if line.startswith("rest_client_requests_total{"):
            labels, value = line.rsplit(" ", 1)
            method = labels.partition('method="')[2].partition('"')[0]
            found[method] = found.get(method, 0) + float(value)
    return found


async def measure(plane: ControlPlane, operator: psutil.Process, count: int) -> dict[str, Any]:
    """Create the jobs at once and wait until all are complete."""
    async with await Client.connect(plane.kubeconfig) as client:
        stand_in = StandIn(client)
        finished: set[str] = set()
        over = asyncio.Event()

        def on_finetunejob(old: dict[str, Any] | None, new: dict[str, Any] | None) -> None:
            if new is not None and new.get("status", {}).get("summary") == "Complete":
                finished.add(new["metadata"]["name"])
                if len(finished) == count:
                    over.set()

        reflectors = [
            Reflector(client, JOBS, NAMESPACE, on_change=stand_in.on_job, transform=lambda obj: obj),
            Reflector(client, FINETUNEJOBS, NAMESPACE, on_change=on_finetunejob),
        ]
        watching = [asyncio.create_task(reflector.run()) for reflector in reflectors]
        for reflector in reflectors:
            await reflector.wait_synced()
        before, cpu_before = requests(), sum(operator.cpu_times()[:2])
        idle_memory = operator.memory_info().rss
        created: dict[str, float] = {}
        slots = asyncio.Semaphore(AT_ONCE)

        async def create(name: str) -> None:
            job = raw_job(SFT, evaluation={"skip": True})
            async with slots:
                created[name] = time.monotonic()
                await client.create(FINETUNEJOBS, NAMESPACE, {**job, "metadata": {"name": name}})

        started = time.monotonic()
        peak = asyncio.create_task(_peak(operator))
        await asyncio.gather(*(create(f"job-{number:05d}") for number in range(count)))
        await over.wait()
        total = time.monotonic() - started
        peak.cancel()
        sent = {method: n - before.get(method, 0) for method, n in requests().items()}
        cpu = sum(operator.cpu_times()[:2]) - cpu_before
        quiet = await _quiet()
        await asyncio.sleep(IDLE_SECONDS)
        idle = {method: n - quiet.get(method, 0) for method, n in requests().items() if n != quiet.get(method, 0)}
        for task in watching:
            task.cancel()
        waits = sorted(stand_in.made[name] - created[name] for name in created)
        return {
            "total": total,
            "first": max(stand_in.made.values()) - started,
            "p50": waits[len(waits) // 2],
            "p99": quantiles(waits, n=100)[98] if len(waits) > 1 else waits[0],
            "cpu": cpu,
            "memory": (idle_memory, await _result(peak), operator.memory_info().rss),
            "requests": sent,
            "idle": idle,
        }


async def _quiet() -> dict[str, float]:
    """What was sent until the last Event was: they are told in the background."""
    last: dict[str, float] = {}
    while (sent := requests()).get("POST") != last.get("POST"):
        last = sent
        await asyncio.sleep(5)
    return sent


async def _peak(operator: psutil.Process) -> int:
    highest = 0
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            highest = max(highest, operator.memory_info().rss)
            await asyncio.sleep(0.2)
    return highest


async def _result(task: asyncio.Task[int]) -> int:
    return await task


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=5000)
    count = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as folder, running_control_plane(Path(folder) / "plane") as plane:
        serve_finetunejobs(plane)
        plane.kubectl("create", "namespace", NAMESPACE)
        plane.kubectl("-n", NAMESPACE, "create", "serviceaccount", "default")
        process = start_operator(plane, Path(folder) / "operator.log")
        try:
            _wait_ready()
            found = asyncio.run(measure(plane, psutil.Process(process.pid), count))
        finally:
            process.terminate()
            process.wait()
    before, peak, after = (size / 2**20 for size in found["memory"])
    writes = sum(n for method, n in found["requests"].items() if method not in ("GET", "WATCH"))
    print(f"{count} jobs of 2 stages")
    print(f"{'apply -> first Job, p50':<32}{found['p50']:8.1f} s")
    print(f"{'apply -> first Job, p99':<32}{found['p99']:8.1f} s")
    print(f"{'all first Jobs':<32}{found['first']:8.1f} s")
    print(f"{'all jobs complete':<32}{found['total']:8.1f} s")
    print(f"{'operator CPU':<32}{found['cpu']:8.1f} s")
    print(f"{'operator RSS idle, peak, after':<32}{before:8.0f} {peak:.0f} {after:.0f} MiB")
    print(f"{'requests of the operator':<32}{json.dumps(found['requests'])}")
    print(f"{'writes a job (Events included)':<32}{writes / count:8.2f}")
    print(f"{f'requests in {IDLE_SECONDS} idle seconds':<32}{json.dumps(found['idle'])}")


def _wait_ready() -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{METRICS_PORT + 1}/readyz", timeout=5)
            return
        time.sleep(0.2)
    sys.exit("the operator did not get ready")


if __name__ == "__main__":
    main()
