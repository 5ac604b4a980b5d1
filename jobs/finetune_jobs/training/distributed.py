"""The processes of one stage: what they add up, agree on and tell each other. With a single one nothing is sent.

Gradients are added up once a step by ourselves rather than averaged by DistributedDataParallel: a sum is what the loss
of ``loop.py`` needs, and processes may have different numbers of micro-batches, or none.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune_jobs.run.errors import PeerLostError
from finetune_jobs.run.preemption import Stop

T = TypeVar("T")
_BUCKET = 16 * 2**20
"""Numbers of gradient that are sent at a time."""
_PATIENCE = timedelta(hours=24)
"""Others wait while rank 0 downloads; a process that dies is noticed at once all the same, its connection closes."""


class Peers:
    """This process among those of the stage."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        """``local_rank`` of ``local_size``: among the processes of this node, which share its disk."""
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size

    @property
    def first(self) -> bool:
        """Rank 0 alone speaks to the store, saves and reports."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, for all."""
        if self.size == 1:
            return make()
        box: list[Any] = [make() if self.first else None]
        _guarded(lambda: dist.broadcast_object_list(box, src=0))
        made: T = box[0]
        return made

    def share_on_node(self, make: Callable[[], T]) -> T:
        """What the first process of each node makes, for all of that node: files, mostly."""
        if self.size == 1:
            return make()
        made: list[Any] = [None] * self.size
        own = make() if self.local_rank == 0 else None
        _guarded(lambda: dist.all_gather_object(made, own))
        here: T = made[self.rank - self.local_rank]
        return here

    def any(self, flag: bool) -> bool:
        """Whether it is true in one of them."""
        return flag if self.size == 1 else bool(self.sum(np.array([float(flag)]))[0])

    def least(self, value: float) -> float:
        """The lowest of all."""
        if self.size == 1:
            return value
        lowest = torch.tensor([value], dtype=torch.float64)
        _guarded(lambda: dist.all_reduce(lowest, op=dist.ReduceOp.MIN))
        return float(lowest[0])

    def leave(self) -> None:
        """Nothing more is to be said to the others."""
        if self.size > 1:
            dist.destroy_process_group()

    def check(self, stop: Stop) -> None:
        """``stop.check`` for all at once: none is left waiting for one that obeyed a moment before."""
        if self.any(stop.requested):
            stop.request()
            stop.check()

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Element by element over all processes."""
        if self.size == 1:
            return values
        total = torch.from_numpy(values.copy())
        _guarded(lambda: dist.all_reduce(total))
        return total.numpy()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the sum of all gradients; one that had nothing to do adds nothing."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(g.numel() for g in bucket) >= _BUCKET:
                self._sum_bucket(bucket)
                bucket = []
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, gradients: Sequence[Tensor]) -> None:
        flat = torch.cat([g.flatten() for g in gradients])
        _guarded(lambda: dist.all_reduce(flat))
        for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def connect() -> Peers:
    """Meet the other processes that the launcher started; alone without a launcher."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Peers()
    rank, local_rank, local_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if not dist.is_initialized():
        _guarded(lambda: dist.init_process_group(backend, rank=rank, world_size=size, timeout=_PATIENCE))
    return Peers(rank, size, local_rank, local_size)


@contextmanager
def peer_errors() -> Iterator[None]:
    """Tell a failed collective from other errors, for passes that have collectives inside (``sharding.py``)."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo's have no class of their own
            raise _lost(error) from error
        raise


def _guarded(collective: Callable[[], object]) -> None:
    try:
        collective()
    except (RuntimeError, OSError) as error:  # torch's errors for a closed connection are all RuntimeErrors
        raise _lost(error) from error


def _lost(error: Exception) -> PeerLostError:
    return PeerLostError(f"another process of this stage went away: {error}")
