"""Trainings by several processes, on one machine or on several: who they are, and what they tell each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from qsparseprop.utils.errors import ConfigurationError

__all__ = ["Processes", "distribute", "joined", "processes", "undistributed"]

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Processes:
    """The processes that train together.

    Attributes
    ----------
    rank : int
        The number of this one, from 0 on.
    count : int
        How many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and tells what happens."""
        return self.rank == 0

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The sum over all processes, of each of some numbers.

        Parameters
        ----------
        numbers : sequence of float

        Returns
        -------
        list of float
        """
        if self.count == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return [float(value) for value in sums.tolist()]

    def from_first(self, value: _Value) -> _Value:
        """What the first process has.

        Parameters
        ----------
        value
            Of this process; only that of the first one counts. Tensors and plain containers.

        Returns
        -------
        object
        """
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def of_all(self, value: _Value) -> list[_Value]:
        """What each process has, in their order.

        Parameters
        ----------
        value
            Of this process.

        Returns
        -------
        list
        """
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values


def processes() -> Processes:
    """The processes of the default group of ``torch.distributed``; where there is none, this one alone."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return Processes()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that ``torchrun`` has started with this one, if it has, until the end.

    Raises
    ------
    ConfigurationError
        If this torch has no gloo, by which processes without GPUs speak with each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        yield Processes()
        return
    if not dist.is_available() or not dist.is_gloo_available():
        raise ConfigurationError("several processes need a torch that was built with gloo")
    # it keeps the group as a default argument of its functions: imported later, it would outlive the group
    import torch.distributed.nn  # noqa: F401

    dist.init_process_group("gloo")
    try:
        yield processes()
    finally:
        # gloo's threads must not outlive the interpreter
        dist.destroy_process_group()


class _Sent:
    """Counts the bytes of gradients that a process sends."""

    def __init__(self) -> None:
        self.bytes = 0

    def hook(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self.bytes += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # the default group


def distribute(model: nn.Module) -> nn.Module:
    """A model whose gradients are averaged over all processes; the model itself where there is one.

    Only nonzero weights have gradients, so that a tenth of the weights sends a tenth of the bytes, which are counted:
    ``result.sent.bytes``.

    Parameters
    ----------
    model : nn.Module
        The same in all processes.

    Returns
    -------
    nn.Module
    """
    if processes().count == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    sent = _Sent()
    wrapped.register_comm_hook(None, sent.hook)
    wrapped.sent = sent  # type: ignore[assignment]  # a plain object, which is no module
    return wrapped


def undistributed(model: nn.Module) -> nn.Module:
    """The model that `distribute`, or torch's ``DistributedDataParallel``, was given; another one as it is."""
    from torch.nn.parallel import DistributedDataParallel

    return model.module if isinstance(model, DistributedDataParallel) else model
