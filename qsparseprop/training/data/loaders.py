"""Batches of images: their order, who reads them, and which share a process gets."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler, get_worker_info

from qsparseprop._torch_compat import forget_shared_storages
from qsparseprop.utils.errors import ConfigurationError

from ._npz import PARTS
from .augmentation import Augmentation
from .images import ImageData, ImageFiles, ImageSet, StoredImages

__all__ = ["ImageLoader", "Share", "evaluation_loader", "image_loader", "training_loader"]


#: glibc's number of the size from which memory is mapped and unmapped by itself, and that size in reading processes.
#: Unless it is set, glibc raises it to that of the largest block which was freed.
_M_MMAP_THRESHOLD, _MAPPED = -3, 2**19


class Share(NamedTuple):
    """Which of the images of every batch a process gets: every `processes`-th one, from `rank` on."""

    rank: int = 0
    processes: int = 1


#: Indices of a batch's images, and the random numbers with which each is augmented; a process gets arrays faster than
#: tensors, which would come in memory of their own.
_Key = tuple[np.ndarray, np.ndarray | None]


class _Order(Sampler[_Key]):
    """What the batches consist of.

    All random numbers are drawn here, so that images are the same with any number of processes that read them, and with
    any number that train.
    """

    def __init__(self, count: int, batch_size: int, seed: int | None, draws: int, share: Share) -> None:
        self.sampler: Sampler[int]
        if seed is None:
            self.sampler = SequentialSampler(range(count))
        else:
            self.sampler = RandomSampler(range(count), generator=torch.Generator().manual_seed(seed))
        self.count, self.batch_size, self.draws, self.share = count, batch_size, draws, share

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.batch_size)
        return whole + (isinstance(self.sampler, SequentialSampler) and rest > 0)

    def __iter__(self) -> Iterator[_Key]:
        order = torch.tensor(list(self.sampler))
        for batch in range(len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            draws = None
            if self.draws and isinstance(self.sampler, RandomSampler):
                every = torch.rand((len(indices), self.draws), dtype=torch.float64, generator=self.sampler.generator)
                draws = every[self.share.rank :: self.share.processes].numpy()
            mine = indices[self.share.rank :: self.share.processes].numpy()
            if len(mine):
                yield mine, draws


class _Unreadable(NamedTuple):
    """What a reading process gives instead of a batch: an error of its own would come with its whole traceback."""

    error: str


class _Batches(Dataset[Any]):
    """Whole batches by what an `_Order` says."""

    def __init__(self, images: ImageSet, augmentation: Augmentation | None) -> None:
        self.images, self.augmentation = images, augmentation

    def __getitem__(self, key: _Key) -> Any:
        indices, draws = torch.from_numpy(key[0]), key[1]
        try:
            pixels = self.images.read(indices)
            if draws is not None and self.augmentation is not None:
                pixels = self.augmentation(pixels, torch.from_numpy(draws), self.images.black)
        except ConfigurationError as error:
            return _Unreadable(str(error))
        labels = self.images.labels[indices]
        return (pixels, labels) if get_worker_info() is None else (_sent(pixels), _sent(labels))


def _sent(values: Tensor) -> Tensor | np.ndarray:
    """What a reading process sends: a tensor in shared memory, or, where there is none left, an array by the pipe.

    Left to the queue, which shares tensors in a thread of its own, a lack of memory would lose the batch, and this
    process would wait for it for ever. Containers often have 64 MB.
    """
    try:
        return values.share_memory_()
    except RuntimeError:
        return values.numpy()


def _begin(worker: int) -> None:
    """Have a reading process give its memory back: batches of some MB otherwise leave hundreds in holes of the heap."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system or C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED)


def _as_it_is(batch: Any) -> Any:
    # in place of torch's conversion, which makes tensors of arrays before they are sent
    return batch


class ImageLoader(DataLoader[Any]):
    """Batches ``(images, labels)``: float32 (images, channels, height, width), and int64 (images,).

    What other processes read comes over as bytes, a quarter of the memory, and is normalised here.

    Parameters
    ----------
    data : ImageData
        How pixels are normalised.
    images : ImageSet
        One of its parts.
    order : sampler
    augmentation : Augmentation or None
    workers : int
        Processes that read; 0: this one.

    Attributes
    ----------
    classes : tuple of str or None
        What the classes are called, see `ImageData`.
    """

    does_without_shared_memory = True

    def __init__(
        self, data: ImageData, images: ImageSet, order: _Order, augmentation: Augmentation | None, workers: int
    ) -> None:
        # a batch is one item, so that images in memory are gathered at once
        super().__init__(_Batches(images, augmentation), sampler=order, batch_size=None, num_workers=workers,
                         collate_fn=_as_it_is, worker_init_fn=_begin)  # fmt: skip
        self._normalised, self.classes = data.normalised, data.classes

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # nobody asks it for more
        for batch in super().__iter__():
            if isinstance(batch, _Unreadable):
                raise ConfigurationError(batch.error)
            pixels, labels = (torch.as_tensor(part) for part in batch)
            normalised = self._normalised(pixels)
            del pixels, batch
            forget_shared_storages()
            yield normalised, labels


def image_loader(
    data: ImageData, part: str, batch_size: int, *, seed: int | None = None, augment: Augmentation | None = None,
    workers: int | None = None, share: Share | None = None,
) -> ImageLoader:  # fmt: skip
    """Batches of one part of some images.

    Parameters
    ----------
    data : ImageData
    part : {"train", "test"}
    batch_size : int
        Images in a batch of all processes together.
    seed : int, optional
        Shuffle, newly every epoch, and drop a last, smaller batch, so that every step does the same amount of work;
        otherwise images come in the order of the data, and all of them do.
    augment : Augmentation, optional
        What is done to shuffled images.
    workers : int, optional
        Processes that read; by default one for each thread that torch computes with, at most 4, where images are in
        files, and none where they are in memory.
    share : Share, optional
        Which of the images of every batch this process gets; by default all.

    Returns
    -------
    ImageLoader

    Raises
    ------
    ConfigurationError
        If the batch is larger than the set, or cannot be shared out evenly.
    """
    share = Share() if share is None else share
    if part not in PARTS:
        raise ConfigurationError(f"part must be 'train' or 'test', got {part!r}")
    if batch_size < 1:
        raise ConfigurationError(f"batch_size must be at least 1, got {batch_size}")
    images = data.train if part == "train" else data.test
    count = len(images.labels)
    if seed is not None:
        if batch_size > count:
            raise ConfigurationError(f"batch size {batch_size} is larger than the {count} training images")
        if batch_size % share.processes:
            raise ConfigurationError(f"batches of {batch_size} images cannot be shared out evenly to {share.processes} "
                                     "processes: choose a multiple of their number")  # fmt: skip
    if workers is None:
        workers = min(4, torch.get_num_threads()) if isinstance(images, ImageFiles) else 0
    order = _Order(count, batch_size, seed, 0 if augment is None else augment.draws, share)
    return ImageLoader(data, images, order, augment, workers)


def training_loader(images: Tensor, labels: Tensor, batch_size: int, seed: int) -> ImageLoader:
    """Batches of images in memory in random order, newly shuffled every epoch; the same seed gives the same batches.

    A last, smaller batch is dropped, so that every step does the same amount of work and step times compare.

    Parameters
    ----------
    images : torch.Tensor
        Normalised already, (images, channels, height, width).
    labels : torch.Tensor
        (images,).
    batch_size : int
        Images in a batch; at most as many as there are.
    seed : int
        Seed of the order, independent of torch's default generator.

    Returns
    -------
    ImageLoader
        Yields ``(images, labels)``.

    Raises
    ------
    ConfigurationError
        (a ValueError) If `batch_size` is larger than the set: there would be no batch at all.
    """
    return image_loader(_in_memory(images, labels), "train", batch_size, seed=seed)


def evaluation_loader(images: Tensor, labels: Tensor, batch_size: int) -> ImageLoader:
    """Batches of images in memory in their order, the last one smaller if need be.

    Parameters
    ----------
    images : torch.Tensor
        Normalised already, (images, channels, height, width).
    labels : torch.Tensor
        (images,).
    batch_size : int
        Images in a batch.

    Returns
    -------
    ImageLoader
        Yields ``(images, labels)``.
    """
    return image_loader(_in_memory(images, labels), "test", batch_size)


def _in_memory(images: Tensor, labels: Tensor) -> ImageData:
    part, channels = StoredImages(images, labels), images.shape[1]
    return ImageData(part, part, 0, "", torch.ones(channels), torch.zeros(channels))
