"""Thousands of FineTuneJobs at once against a real API server and etcd; what the operator costs.

``python benchmarks/operator_scale.py [--jobs 5000]``. Each job has two stages, prepare and sft. The operator is a
process of its own, as in its image, and a user of its own, whose requests the API server's audit log counts; a stand-in
here plays Job controller and kubelet in one and ends every attempt at once. API server, etcd, stand-in and operator
share this machine's cores: compare with another controller under the same load, never quote as the speed of a cluster.
Figures that were measured: docs/cluster/README.md.
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
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.builders import SFT, raw_job  # noqa: E402 - from the checkout, not installed
from tests.cluster import processes  # noqa: E402
from tests.cluster.controlplane import ControlPlane, running_control_plane  # noqa: E402
from tests.cluster.definitions import serve_finetunejobs  # noqa: E402
from tests.engine.standin_kubelet import committed  # noqa: E402

from finetune_operator.controller import FINETUNEJOBS  # noqa: E402
from finetune_operator.kube import Client, Reflector  # noqa: E402
from finetune_operator.kube.errors import AlreadyExistsError, KubeError  # noqa: E402
from finetune_operator.lookup import JOBS, PODS  # noqa: E402

NAMESPACE = "load"
AT_ONCE = 32
"""Requests of ours that are under way at a time, as of many users and kubelets."""
METRICS_PORT = 18080
IDLE_SECONDS = 60
STAGES = 2
USER = "operator"
AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [{"level": "Metadata", "users": [USER]}, {"level": "None"}],
}


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
        client, name = self._client, meta["name"]
        async with self._slots:
            await _patient(lambda: client.create(PODS, NAMESPACE, pod))
            await _patient(lambda: client.patch(PODS, NAMESPACE, name, {"status": pod_status}, subresource="status"))
            await _patient(lambda: client.patch(JOBS, NAMESPACE, name, {"status": job_status}, subresource="status"))


async def _patient(request: Callable[[], Awaitable[object]]) -> None:
    """As a kubelet or a user would: again, until the API server takes it."""
    while True:
        try:
            await request()
        except AlreadyExistsError:
            return
        except KubeError:
            await asyncio.sleep(1)
        else:
            return


class Operator:
    """The process, as its image starts it, for all namespaces."""

    def __init__(self, plane: ControlPlane, log: Path) -> None:
        environment = {
            **os.environ,
            "KUBECONFIG": str(plane.kubeconfig_for(USER, "system:masters")),
            "FINETUNE_TRAINER_IMAGE": "trainer:1",
            "FINETUNE_GGUF_IMAGE": "gguf:1",
            "FINETUNE_METRICS_PORT": str(METRICS_PORT),
            "FINETUNE_HEALTH_PORT": str(METRICS_PORT + 1),
            "POD_NAMESPACE": "default",
            "POD_NAME": "bench",
        }
        self._log = log
        self._started = time.monotonic()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "finetune_operator"], env=environment, stdout=output, stderr=output
            )
        self.pid = self._process.pid

    def __enter__(self) -> "Operator":
        """Wait until it is ready."""
        while not _answers("readyz"):
            self.check()
            if time.monotonic() > self._started + 300:
                self._process.kill()
                sys.exit("the operator did not get ready")
            time.sleep(0.2)
        self.ready = time.monotonic() - self._started
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def check(self) -> None:
        """End this program if the operator has ended: a Deployment would start it anew, and the figures be of two."""
        if self._process.poll() is not None:
            sys.exit(f"the operator ended: {self._log.read_text()[-2000:]}")

    @property
    def cpu(self) -> float:
        """Seconds, until now."""
        return cpu_of(self.pid)

    def memory(self, which: str = "VmRSS") -> float:
        """Resident, in MiB; ``VmHWM``: the most that it ever was."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(which)) / 1024

    async def quiet(self) -> None:
        """Return once it has looked at everything and told every Event: it tells them in the background."""
        last = 0.0
        while (now := self.cpu) - last > 0.2:
            last = now
            await asyncio.sleep(5)
            self.check()


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    return float(sum(psutil.Process(pid).cpu_times()[:2]))


def _answers(path: str) -> bool:
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{METRICS_PORT + 1}/{path}", timeout=5)
        return True
    return False


@dataclass
class Requests:
    """What the operator asked of the API server, by the audit log."""

    log: Path
    offset: int = 0

    def new(self) -> "Counter[str]":
        """Those since the last call, as ``verb resource``; a watch counts when it ends."""
        found: Counter[str] = Counter()
        with self.log.open("rb") as lines:
            lines.seek(self.offset)
            for line in lines:
                event = json.loads(line)
                about = event.get("objectRef") or {}
                parts = [about.get("resource") or event["requestURI"], about.get("subresource")]
                found[f"{event['verb']} {'/'.join(filter(None, parts))}"] += 1
            self.offset = lines.tell()
        return found


async def measure(plane: ControlPlane, operator: Operator, requests: Requests, count: int) -> dict[str, str]:
    """Create the jobs at once and wait until all are complete; the table's rows."""
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
        requests.new()
        idle, cpu = operator.memory(), operator.cpu
        created: dict[str, float] = {}
        slots = asyncio.Semaphore(AT_ONCE)

        async def create(name: str) -> None:
            job = raw_job(SFT, evaluation={"skip": True})
            async with slots:
                created[name] = time.monotonic()
                await _patient(lambda: client.create(FINETUNEJOBS, NAMESPACE, {**job, "metadata": {"name": name}}))

        started = time.monotonic()
        await asyncio.gather(*(create(f"job-{number:05d}") for number in range(count)))
        all_created = time.monotonic() - started
        while not over.is_set():
            operator.check()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), 5)
        total = time.monotonic() - started
        for task in watching:
            task.cancel()
    await operator.quiet()
    cpu, sent = operator.cpu - cpu, requests.new()
    memory = operator.memory()
    await asyncio.sleep(IDLE_SECONDS)
    operator.check()
    waits = sorted(stand_in.made[name] - created[name] for name in created)
    writes = sum(n for what, n in sent.items() if what.split()[0] not in ("get", "list", "watch"))
    writes -= sum(n for what, n in sent.items() if what.endswith((" events", " leases")))
    rows = {
        "all created": f"{all_created:.1f} s",
        "apply -> first Job, p50": f"{waits[len(waits) // 2]:.1f} s",
        "apply -> first Job, p99": f"{quantiles(waits, n=100)[98]:.1f} s",
        "apply -> first Job, longest": f"{waits[-1]:.1f} s",
        "all first Jobs": f"{max(stand_in.made.values()) - started:.1f} s",
        "all jobs complete": f"{total:.1f} s",
        "CPU of the operator": f"{cpu:.1f} s, {1000 * cpu / count:.1f} ms a job",
        "RSS before, peak, after": f"{idle:.0f} {operator.memory('VmHWM'):.0f} {memory:.0f} MiB",
        "writes a job, Events apart": f"{writes / count:.2f} (allowed: {3 * STAGES + 3})",
        "requests": _listed(sent),
        f"requests in {IDLE_SECONDS} idle seconds": _listed(requests.new()),
    }
    return rows


async def restarted(operator: Operator, requests: Requests, count: int) -> dict[str, str]:
    """What a new leader does with the jobs that are there; the table's rows."""
    await operator.quiet()
    rows = {
        "new leader: caches filled": f"{operator.ready:.1f} s",
        "new leader: CPU until idle": f"{operator.cpu:.1f} s, {1000 * operator.cpu / count:.1f} ms a job",
        "new leader: RSS peak, after": f"{operator.memory('VmHWM'):.0f} {operator.memory():.0f} MiB",
        "new leader: requests": _listed(requests.new()),
    }
    return rows


def _listed(sent: "Counter[str]") -> str:
    return ", ".join(f"{what} {n}" for what, n in sent.most_common())


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=5000)
    count = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "audit.yaml").write_text(json.dumps(AUDIT))
        requests = Requests(here / "audit.log")
        flags = (f"--audit-policy-file={here / 'audit.yaml'}", f"--audit-log-path={requests.log}")
        with running_control_plane(here / "plane", flags=flags) as plane:
            serve_finetunejobs(plane)
            plane.kubectl("create", "namespace", NAMESPACE)
            plane.kubectl("-n", NAMESPACE, "create", "serviceaccount", "default")
            with Operator(plane, here / "operator.log") as operator:
                rows = asyncio.run(measure(plane, operator, requests, count))
            servers = {psutil.Process(pid).name(): cpu_of(pid) for pid in processes.of(plane.directory)}
            servers["this program"] = cpu_of(os.getpid())
            rows["CPU of the rest"] = ", ".join(f"{name} {n:.0f} s" for name, n in servers.items())
            requests.new()
            with Operator(plane, here / "operator.log") as operator:
                rows |= asyncio.run(restarted(operator, requests, count))
    print(f"{count} jobs of {STAGES} stages")
    for name, value in rows.items():
        print(f"{name:<32}{value}")


if __name__ == "__main__":
    main()
