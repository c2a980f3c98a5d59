"""Sets of labelled images: in memory as they were stored, or in files that are read when a batch wants them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qsparseprop.utils.errors import refuse_more_than_memory

from ._reading import read_image

__all__ = ["ImageData", "ImageFiles", "ImageKind", "ImageSet", "StoredImages"]


@dataclass(frozen=True)
class ImageKind:
    """What a network has to know of images.

    Attributes
    ----------
    channels : int
    height, width : int
        In pixels.
    num_classes : int
    classes : tuple of str, optional
        What the classes are called, where somebody knows it.
    """

    channels: int
    height: int
    width: int
    num_classes: int
    classes: tuple[str, ...] | None = None


class ImageSet(Protocol):
    """Labelled images of one size.

    Attributes
    ----------
    labels : torch.Tensor
        int64, (images,).
    black : torch.Tensor or None
        float32, (channels,): what a pixel without light is in what `read` gives; None for 0.
    """

    labels: Tensor
    black: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that `read` gives."""
        ...

    def read(self, indices: Tensor) -> Tensor:
        """Some of the images.

        Parameters
        ----------
        indices : torch.Tensor
            int64, (n,).

        Returns
        -------
        torch.Tensor
            uint8 or float32, (n, channels, height, width).
        """
        ...

    def take(self, indices: Tensor) -> ImageSet:
        """A set of some of the images.

        Parameters
        ----------
        indices : torch.Tensor
            int64, (n,).

        Returns
        -------
        ImageSet
        """
        ...

    def names(self) -> Sequence[str]:
        """What tells this set from another one, beside its labels."""
        ...


class StoredImages:
    """Images in memory, in the type that they were stored in: 60,000 small colour images take 184 MB as bytes.

    Parameters
    ----------
    pixels : torch.Tensor
        uint8 or float32, (images, channels, height, width).
    labels : torch.Tensor
        int64, (images,).
    size : tuple of int, optional
        Height and width that every batch is scaled to.
    black : torch.Tensor, optional
        See `ImageSet`.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, size: tuple[int, int] | None = None, black: Tensor | None = None
    ) -> None:
        self.pixels, self.labels, self.black = pixels, labels, black
        self.size = None if size == tuple(pixels.shape[2:]) else size

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        _, channels, height, width = self.pixels.shape
        return (channels, *(self.size or (height, width)))

    def read(self, indices: Tensor) -> Tensor:
        """Some of the images, scaled.

        Parameters
        ----------
        indices : torch.Tensor
            int64, (n,).

        Returns
        -------
        torch.Tensor
            In the type that they are stored in, (n, channels, height, width).
        """
        return scaled(self.pixels[indices], self.size)

    def take(self, indices: Tensor) -> StoredImages:
        """A set of some of the images, copied.

        Parameters
        ----------
        indices : torch.Tensor
            int64, (n,).

        Returns
        -------
        StoredImages
        """
        return StoredImages(self.pixels[indices], self.labels[indices], self.size, self.black)

    def names(self) -> Sequence[str]:
        """The first and the last image's bytes."""
        return [hashlib.sha256(self.pixels[i].contiguous().numpy().tobytes()).hexdigest() for i in (0, -1)]


class ImageFiles:
    """Images in files, which are read, made RGB and scaled when a batch wants them.

    Parameters
    ----------
    files : sequence of str
    labels : torch.Tensor
        int64, (files,).
    size : int
        Height and width that they are scaled to.
    """

    black: Tensor | None = None

    def __init__(self, files: Sequence[str], labels: Tensor, size: int) -> None:
        # one array of names: a list of a million would be copied, page by page, into every process that reads it
        self.files = np.asarray(files, dtype=np.str_)
        self.labels, self.size = labels, size

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return 3, self.size, self.size

    def read(self, indices: Tensor) -> Tensor:
        """Some of the images, read from their files.

        Parameters
        ----------
        indices : torch.Tensor
            int64, (n,).

        Returns
        -------
        torch.Tensor
            uint8, (n, 3, size, size).

        Raises
        ------
        ConfigurationError
            If one of them is none; the sentence names its file.
        """
        images = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        for place, index in enumerate(indices.tolist()):
            images[place] = read_image(str(self.files[index]), self.size)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def take(self, indices: Tensor) -> ImageFiles:
        """A set of some of the files.

        Parameters
        ----------
        indices : torch.Tensor
            int64, (n,).

        Returns
        -------
        ImageFiles
        """
        return ImageFiles(self.files[indices.numpy()].tolist(), self.labels[indices], self.size)

    def names(self) -> Sequence[str]:
        """Names of the files and of their folders, wherever these lie."""
        return ["/".join(Path(str(file)).parts[-2:]) for file in self.files]


def black_of(pixels: Tensor) -> Tensor | None:
    """What black is in training images: 0, or where some are below, as normalised ones are, the lowest of a channel."""
    if pixels.dtype is torch.uint8 or not pixels.numel():
        return None
    lowest = pixels.amin((0, 2, 3)).clamp(max=0)
    return lowest if bool((lowest < 0).any()) else None


def scaled(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Scale images (images, channels, height, width) to a height and width; None leaves them as they are."""
    if size is None or tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


@dataclass(frozen=True)
class ImageData:
    """Labelled images, split in two, and how their pixels become what a network gets: ``pixel * scale + shift``.

    Attributes
    ----------
    train, test : ImageSet
    num_classes : int
        Number of different labels.
    name : str
        What the images are, for reports.
    scale, shift : torch.Tensor
        float32, (channels,).
    classes : tuple of str, optional
        What the classes are called, in the order of their labels; None where the data does not say it.
    """

    train: ImageSet
    test: ImageSet
    num_classes: int
    name: str
    scale: Tensor
    shift: Tensor
    classes: tuple[str, ...] | None = None

    @classmethod
    def from_tensors(
        cls, train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor, num_classes: int,
        name: str, classes: Sequence[str] | None = None,
    ) -> ImageData:  # fmt: skip
        """Images (images, channels, height, width) that are normalised already, and their labels (images,).

        Parameters
        ----------
        train_images : torch.Tensor
            float32.
        train_labels : torch.Tensor
            int64.
        test_images, test_labels : torch.Tensor
            The same.
        num_classes : int
        name : str
        classes : sequence of str, optional
            What the classes are called.

        Returns
        -------
        ImageData
        """
        channels, black = train_images.shape[1], black_of(train_images)
        return cls(StoredImages(train_images, train_labels, black=black),
                   StoredImages(test_images, test_labels, black=black), num_classes, name, torch.ones(channels),
                   torch.zeros(channels), None if classes is None else tuple(classes))  # fmt: skip

    @property
    def kind(self) -> ImageKind:
        """What a network has to know of the images."""
        return ImageKind(*self.train.shape, self.num_classes, self.classes)

    def normalised(self, pixels: Tensor) -> Tensor:
        """What a network gets of pixels.

        Parameters
        ----------
        pixels : torch.Tensor
            (images, channels, height, width), as `ImageSet.read` gives them; may be returned as they are.

        Returns
        -------
        torch.Tensor
            float32, (images, channels, height, width).
        """
        if bool((self.scale == 1).all()) and bool((self.shift == 0).all()):
            return pixels.float()
        scale, shift = self.scale.view(-1, 1, 1), self.shift.view(-1, 1, 1)
        return pixels.to(torch.float32, copy=True).mul_(scale).add_(shift)

    def first(self, images: int | None) -> ImageData:
        """The same with so many training and test images at most, taken at equal distances.

        Parameters
        ----------
        images : int, optional
            None: all of them.

        Returns
        -------
        ImageData
        """
        if images is None:
            return self
        return ImageData(_spread(self.train, images), _spread(self.test, images), self.num_classes, self.name,
                         self.scale, self.shift, self.classes)  # fmt: skip

    def fingerprint(self) -> str:
        """A number that is another one for other images: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(repr((part.shape, len(part.labels))).encode())
            digest.update(part.labels.numpy().tobytes())
            # names of files need not be text
            digest.update("\n".join(part.names()).encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    @property
    def train_labels(self) -> Tensor:
        """Labels of the training images, int64, (images,)."""
        return self.train.labels

    @property
    def test_labels(self) -> Tensor:
        """Labels of the test images, int64, (images,)."""
        return self.test.labels

    @cached_property
    def train_images(self) -> Tensor:
        """All training images at once, float32 and normalised: for small sets."""
        return self._all(self.train)

    @cached_property
    def test_images(self) -> Tensor:
        """All test images at once, float32 and normalised: for small sets."""
        return self._all(self.test)

    def _all(self, part: ImageSet) -> Tensor:
        channels, height, width = part.shape
        refuse_more_than_memory(2 * 4 * len(part.labels) * channels * height * width,
                                f"{len(part.labels)} images of {height} x {width} pixels, all at once,")  # fmt: skip
        return self.normalised(part.read(torch.arange(len(part.labels)))).contiguous()

    def state(self) -> dict[str, Any]:
        """Everything, in tensors and plain containers, for `from_state` in another process."""
        parts = [
            {**vars(part), "files": part.files.tolist()} if isinstance(part, ImageFiles) else dict(vars(part))
            for part in (self.train, self.test)
        ]
        return {"parts": parts, "num_classes": self.num_classes, "name": self.name, "scale": self.scale,
                "shift": self.shift, "classes": self.classes}  # fmt: skip

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ImageData:
        """What `state` was called on.

        Parameters
        ----------
        state : mapping

        Returns
        -------
        ImageData
        """
        train, test = (ImageFiles(**part) if "files" in part else StoredImages(**part) for part in state["parts"])
        return cls(train, test, state["num_classes"], state["name"], state["scale"], state["shift"],
                   state["classes"])  # fmt: skip


def _spread(part: ImageSet, images: int) -> ImageSet:
    have = len(part.labels)
    if images >= have:
        return part
    return part.take(torch.arange(images) * have // images)

