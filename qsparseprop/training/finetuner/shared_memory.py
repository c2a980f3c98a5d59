"""Whether there is as much shared memory as the processes of a data loader are going to fill with batches."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from .batches import Several

__all__ = ["free_shared_memory", "warn_of_shared_memory"]

#: Where Linux has it.
_PLACE = "/dev/shm"


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
    if not isinstance(loader, DataLoader) or getattr(loader, "does_without_shared_memory", False) or free is None:
        return
    ahead = loader.num_workers * (loader.prefetch_factor or 0)
    size = _bytes(batch.parts[0] if isinstance(batch, Several) else batch)
    if ahead * size > free:
        warnings.warn(
            f"{loader.num_workers} processes read {ahead} batches of {size / 1e6:.1f} MB ahead, and {_PLACE}, by which "
            f"they come, had {free / 1e6:.1f} MB: without memory a batch may be lost, and the training wait for it for "
            "ever. Give it more (docker run --shm-size=1g), or the loader fewer workers or a smaller prefetch_factor",
            stacklevel=2,
        )  # fmt: skip


def _bytes(value: Any) -> int:
    """Memory of the tensors in a batch."""
    if isinstance(value, torch.Tensor):
        return value.nbytes if value.layout is torch.strided else 0
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(_bytes(one) for one in value) if isinstance(value, list | tuple) else 0
