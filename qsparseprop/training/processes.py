"""Trainings by several processes, on one machine or on several: who they are, and what they tell each other."""

from __future__ import annotations

import contextlib
import gc
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qsparseprop._torch_compat import options_of_parallel
from qsparseprop.utils.errors import ConfigurationError

__all__ = ["Processes", "distribute", "joined", "processes", "sent_bytes", "share_buffers", "undistributed"]

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

    def highest(self, number: int) -> int:
        """The largest of what all processes have.

        Parameters
        ----------
        number : int
            Of this process.

        Returns
        -------
        int
        """
        if self.count == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def from_first(self, compute: Callable[[], _Value]) -> _Value:
        """What a function gives in the first process, in all of them; what it raises there is raised in all of them.

        Parameters
        ----------
        compute : callable
            Called without arguments, in the first process only. Gives tensors and plain containers.

        Returns
        -------
        object
        """
        if self.count == 1:
            return compute()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = compute()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        result: _Value = box[0]
        return result

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

    Yields
    ------
    Processes

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
        # gloo's threads must not outlive the interpreter: nothing may hold the group
        gc.collect()
        dist.destroy_process_group()


#: Bytes of gradients that this process has sent for a model, for each that `distribute` has made.
_sent: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def sent_bytes(model: nn.Module) -> int:
    """Bytes of gradients that this process has sent for a model of `distribute`.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    int
    """
    return _sent.get(model, 0)


def distribute(model: nn.Module, like: DistributedDataParallel | None = None) -> DistributedDataParallel:
    """A model whose gradients are averaged over the processes of the default group.

    Only nonzero weights have gradients, so that a tenth of the weights sends a tenth of the bytes: `sent_bytes`.

    Parameters
    ----------
    model : nn.Module
        The same in all processes; what the first one has counts.
    like : DistributedDataParallel, optional
        One that was made before, of a model with other parameters: options and hooks are taken over.

    Returns
    -------
    DistributedDataParallel
    """
    options, hooks = ({"gradient_as_bucket_view": True}, []) if like is None else options_of_parallel(like)
    if like is not None and like not in _sent:
        # somebody else's
        wrapped = DistributedDataParallel(model, **options)
        for hook, state in hooks:
            wrapped.register_comm_hook(state, hook)
        return wrapped
    # not at the top: a torch that was built without processes has none of it
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    wrapped = DistributedDataParallel(model, **options)
    _sent[wrapped] = 0
    itself = weakref.ref(wrapped)

    def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if (model := itself()) is not None:
            _sent[model] += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None is the default group

    count.__annotations__.clear()  # torch compares them with types, and ours are strings
    wrapped.register_comm_hook(None, count)
    return wrapped


def share_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of the first one, such as running statistics, which each of them has of its own.

    Parameters
    ----------
    model : nn.Module
    """
    if processes().count > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def undistributed(model: nn.Module) -> nn.Module:
    """The model that `distribute`, or torch's ``DistributedDataParallel``, was given; another one as it is.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    nn.Module
    """
    return model.module if isinstance(model, DistributedDataParallel) else model
