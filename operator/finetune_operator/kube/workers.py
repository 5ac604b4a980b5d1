"""What an error of the handler means for the queue."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from finetune_operator.kube.errors import ConflictError, NotLeadingError, RetryableError, TerminalError
from finetune_operator.kube.workqueue import QueueClosedError, WorkQueue

_log = logging.getLogger(__name__)
Handler = Callable[[str], Awaitable[float | None]]
"""Works on a key; seconds until it must be looked at again even if nothing changes, or None."""


async def run_workers(queue: WorkQueue[str], handler: Handler, n: int) -> None:
    """Work with ``n`` at a time until the queue is closed: what was begun is finished, the rest stays undone.

    Cancelling stops at once, in the middle of handlers. What a handler raises ends nothing:

    - RetryableError: again, ever later; a warning.
    - ConflictError: the same without a word: the next look will see what changed. It is no error.
    - TerminalError: not again until the key is added anew; an error in the log.
    - NotLeadingError: again, quietly: we are about to be cancelled, or were wrong about that.
    - anything else is a bug or something unforeseen: again, ever later, with its traceback.
    """
    async with asyncio.TaskGroup() as tasks:
        for _ in range(n):
            tasks.create_task(_work(queue, handler))


async def _work(queue: WorkQueue[str], handler: Handler) -> None:
    while True:
        try:
            async with queue.take() as key:
                await _handle(queue, handler, key)
        except QueueClosedError:
            return


async def _handle(queue: WorkQueue[str], handler: Handler, key: str) -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    try:
        again = await handler(key)
    except (ConflictError, NotLeadingError) as error:
        _log.debug("%s %s: %s; again in %.2f s", queue.name, key, error, queue.retry(key))
    except RetryableError as error:
        queue.metrics.reconcile_errors.labels(queue.name).inc()
        _log.warning("%s %s: %s; again in %.2f s", queue.name, key, error, queue.retry(key))
    except TerminalError as error:
        queue.metrics.reconcile_errors.labels(queue.name).inc()
        queue.forget(key)
        _log.error("%s %s: %s; not tried again until something changes", queue.name, key, error)
    except Exception:
        queue.metrics.reconcile_errors.labels(queue.name).inc()
        _log.exception("%s %s failed; again in %.2f s", queue.name, key, queue.retry(key))
    else:
        queue.forget(key)
        if again is not None:
            queue.add_after(key, again)
    finally:
        queue.metrics.reconcile_time.labels(queue.name).observe(loop.time() - started)
