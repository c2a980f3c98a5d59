"""Whether there is as much shared memory as the processes of a data loader are going to fill with batches."""

from __future__ import annotations

import shutil
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeGuard

import torch
from torch.utils.data import DataLoader

from .batches import Several

__all__ = ["free_shared_memory", "warn_of_shared_memory", "watched"]

#: Where Linux has it.
_PLACE = "/dev/shm"

#: Seconds for which a batch may be waited for before the memory is looked at.
PATIENCE = 20.0

#: Bytes that count as little while the size of a batch is not known: what a container has of it by default.
_LITTLE = 64 << 20

_WAY_OUT = "(docker run --shm-size=1g), or the loader fewer workers or a smaller prefetch_factor"


def free_shared_memory() -> int | None:
    """Bytes of shared memory that nobody uses; None where that is not known."""
    try:
        return shutil.disk_usage(_PLACE).free
    except OSError:
        return None


def warn_of_shared_memory(loader: object, batch: Any, free: int | None) -> None:
    """Say so where the batches that processes read ahead need more memory than there was before they began.

    Such a process gives up without a word, if a function of the user's puts its batches together, and its loader waits
    for the batch for ever.

    Parameters
    ----------
    loader : object
        Others than torch's, those without processes, and those that do without are left in peace.
    batch
        The first one.
    free : int or None
        Bytes.
    """
    if not _fills_it(loader) or free is None:
        return
    ahead = loader.num_workers * (loader.prefetch_factor or 0)
    size = _bytes(batch.parts[0] if isinstance(batch, Several) else batch)
    if ahead * size > free:
        warnings.warn(
            f"{loader.num_workers} processes read {ahead} batches of {size / 1e6:.1f} MB ahead, and {_PLACE}, by which "
            f"they come, had {free / 1e6:.1f} MB: without memory a batch may be lost, and the training wait for it for "
            f"ever. Give it more {_WAY_OUT}",
            stacklevel=2,
        )  # fmt: skip


def watched(batches: Iterable[Any], loader: object = None) -> Iterator[Any]:
    """Iterate over batches, and say so where one does not come while there is no room for it.

    The first one may be lost already, when it is not known yet how much memory the loader needs.

    Parameters
    ----------
    batches : iterable
    loader : object, optional
        Where they come from, if `batches` iterates over it already. Those that `warn_of_shared_memory` leaves in peace
        are not watched.
    """
    iterator = iter(batches)
    loader = batches if loader is None else loader
    if not _fills_it(loader) or free_shared_memory() is None:
        yield from iterator
        return
    with _Watch(loader.num_workers) as watch:
        while True:
            try:
                batch = watch.next(iterator)
            except StopIteration:
                return
            yield batch


class _Watch:
    """A thread that looks how long a batch is waited for: the loader waits inside of torch."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._size = _LITTLE
        self._since: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="qsparseprop: shared memory", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch; raises what the iterator raises."""
        self._since = time.monotonic()
        try:
            batch = next(batches)
        finally:
            self._since = None
        self._size = _bytes(batch.parts[0] if isinstance(batch, Several) else batch)
        return batch

    def _look(self) -> None:
        while not self._ended.wait(PATIENCE / 4):
            since, free = self._since, free_shared_memory()
            if since is None or free is None or time.monotonic() - since < PATIENCE or free >= self._size:
                continue
            warnings.warn(
                f"no batch has come from the loader's {self._processes} processes for {PATIENCE:.0f} s, and "
                f"{_PLACE}, by which they come, has {free / 1e6:.1f} MB left: if one found no room there, it is lost, "
                f"and the training waits for it for ever. Stop it, and give it more {_WAY_OUT}",
                stacklevel=2,
            )  # fmt: skip
            return


def _fills_it(loader: object) -> TypeGuard[DataLoader[Any]]:
    """Whether processes of a loader hand on batches by shared memory."""
    return isinstance(loader, DataLoader) and loader.num_workers > 0 and not getattr(
        loader, "does_without_shared_memory", False)  # fmt: skip


def _bytes(value: Any) -> int:
    """Memory of the tensors in a batch."""
    if isinstance(value, torch.Tensor):
        return value.nbytes if value.layout is torch.strided else 0
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(_bytes(one) for one in value) if isinstance(value, list | tuple) else 0
