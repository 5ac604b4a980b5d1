"""One replica of an operator, as a process: leads if it may, and writes as fast as it can while it does.

Usage: replica.py KUBECONFIG NAMESPACE IDENTITY
"""

import asyncio
import signal
import sys

from finetune_operator.kube import Client, Elector, LeaseSettings, Resource
from finetune_operator.kube.errors import ConflictError, LeaseLostError, NotLeadingError, RetryableError

CONFIGMAPS = Resource("", "v1", "configmaps")
LEASE = LeaseSettings(duration=8, renew_deadline=6, retry=0.5, attempt_timeout=3)


async def write(client: Client, namespace: str, identity: str) -> None:
    """Count up in a ConfigMap, signed; four at once, so that some write is always on its way."""

    async def count(number: int) -> None:
        while True:
            patch = {"data": {"writer": identity, f"count{number}": str(asyncio.get_running_loop().time())}}
            try:
                await client.patch(CONFIGMAPS, namespace, "counter", patch)
            except NotLeadingError:
                print("fenced", flush=True)
                return
            except (ConflictError, RetryableError):
                await asyncio.sleep(0.1)

    await asyncio.gather(*(count(number) for number in range(4)))


async def main(kubeconfig: str, namespace: str, identity: str) -> None:
    """Take part until told to stop."""
    async with await Client.connect(kubeconfig) as client:
        elector = Elector(client, namespace, "operator", identity, LEASE)

        async def lead() -> None:
            print("leads", flush=True)
            await write(client.fenced(elector.check), namespace, identity)
            await asyncio.sleep(3600)

        task = asyncio.create_task(elector.run(lead))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            print("stopped", flush=True)
        except LeaseLostError:
            print("lost", flush=True)
            sys.exit(1)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
