"""Images in files of numpy: what their headers say, checked before anything large is read."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from qsparseprop.utils.errors import ConfigurationError

__all__ = ["PARTS", "NpzFile", "count_classes"]

#: Numbers of channels by which images [channels, height, width] are told from [height, width, channels].
_CHANNELS = (1, 3, 4)

#: More classes than this, and than there are images, are no class numbers.
_MANY_CLASSES = 1000

PARTS = ("train", "test")
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class NpzFile:
    """An npz file of images, of which only the labels and the headers have been read and checked.

    Attributes
    ----------
    channels : int
    sizes : tuple of int
        Height and width of the training images.
    labels : list of torch.Tensor
        int64, those of the training and those of the test images.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        with self._refused(), zipfile.ZipFile(path) as archive:
            headers = {key: _npy_header(archive, key) for part in PARTS for key in (f"x_{part}", f"y_{part}")}
        for part in PARTS:
            (x, x_type), (y, y_type) = headers[f"x_{part}"], headers[f"y_{part}"]
            if (len(x) not in (3, 4) or len(y) != 1 or x[0] != y[0] or 0 in x or y_type.kind not in "iu"
                    or x_type.kind not in "biuf"):  # fmt: skip
                raise ConfigurationError(f"{os.fspath(path)}: x_{part} must be images and y_{part} whole numbers, got "
                                         f"shapes {x} of {x_type} and {y} of {y_type}")  # fmt: skip
        self._channels_first = [self._has_channels_first(part, headers[f"x_{part}"][0]) for part in PARTS]
        shapes = [self._shape(headers[f"x_{part}"][0], first)
                  for part, first in zip(PARTS, self._channels_first, strict=True)]  # fmt: skip
        self.channels, *sizes = shapes[0]
        self.sizes = tuple(sizes)
        if shapes[1][0] != self.channels:
            raise ConfigurationError(f"{os.fspath(path)}: images for training have {self.channels} channels, those for "
                                     f"the test {shapes[1][0]}")  # fmt: skip
        self.labels = [torch.from_numpy(self._read(f"y_{part}").astype(np.int64)) for part in PARTS]

    def images(self, part: str) -> np.ndarray:
        """The images of ``"train"`` or ``"test"``, (images, height, width[, channels])."""
        images = self._read(f"x_{part}")
        return np.moveaxis(images, 1, 3) if self._channels_first[PARTS.index(part)] else images

    def _read(self, key: str) -> np.ndarray:
        with self._refused(), np.load(self._path, allow_pickle=False) as content:
            return content[key]

    @contextlib.contextmanager
    def _refused(self) -> Iterator[None]:
        """Errors of reading as `ConfigurationError`.

        Damaged files lead zipfile, its decompressors and numpy's parser of headers to errors of many types.
        """
        try:
            yield
        except MemoryError:
            raise
        except FileNotFoundError as error:
            raise ConfigurationError(f"there is no file {os.fspath(self._path)!r}") from error
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise ConfigurationError(f"{os.fspath(self._path)} is not an npz file with x_train, y_train, x_test and "
                                     f"y_test: {reason}") from error  # fmt: skip

    def _has_channels_first(self, part: str, shape: tuple[int, ...]) -> bool:
        if len(shape) == 3:
            return False
        _, a, b, c = shape
        last = c in _CHANNELS or c < min(a, b)
        first = a in _CHANNELS and (last or b == c or min(b, c) > max(_CHANNELS))
        if last and first and (a == b) != (b == c):
            # both are possible, but images are square more often than not
            first = b == c
            last = not first
        if last == first:
            raise ConfigurationError(
                f"{os.fspath(self._path)}: x_{part} of shape {shape} "
                f"{'may be either' if last else 'is neither'} [images, height, width, channels] "
                f"{'or' if last else 'nor'} [images, channels, height, width] with 1, 3 or 4 channels; "
                f"{'save images of another size' if last else 'bring it into the first order (numpy.moveaxis)'}"
            )
        return first

    @staticmethod
    def _shape(shape: tuple[int, ...], channels_first: bool) -> tuple[int, int, int]:
        """Channels, height and width."""
        if len(shape) == 3:
            return 1, shape[1], shape[2]
        return (shape[1], shape[2], shape[3]) if channels_first else (shape[3], shape[1], shape[2])


def _npy_header(archive: zipfile.ZipFile, key: str) -> tuple[tuple[int, ...], np.dtype]:
    with archive.open(f"{key}.npy") as member:
        version = np.lib.format.read_magic(member)
        if version not in _HEADERS:
            raise ValueError(f"{key} is in version {version} of the npy format")
        shape, _, dtype = _HEADERS[version](member)
    return shape, dtype


def count_classes(labels: Sequence[torch.Tensor], source: str) -> int:
    if min(int(part.min()) for part in labels) < 0:
        raise ConfigurationError(f"{source}: labels must not be negative")
    largest = max(int(part.max()) for part in labels)
    if largest >= max(_MANY_CLASSES, sum(len(part) for part in labels)):
        raise ConfigurationError(f"{source}: labels must be the numbers of classes, from 0 on; the largest is "
                                 f"{largest}")  # fmt: skip
    if largest == 0:
        raise ConfigurationError(f"{source}: all labels are 0: a network learns to tell classes apart, of which there "
                                 "must be two")  # fmt: skip
    return largest + 1
