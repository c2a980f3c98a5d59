"""How the matrix (pixels, channels) that blocks compute on looks to those who see the tensor."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

from torch import Tensor

from qsparseprop import ops


@dataclass(frozen=True)
class Layout:
    """A tensor's shape and strides, and the images that its rows are the pixels of.

    Attributes
    ----------
    shape : tuple of int
        Of the tensor: (images, channels, height, width), (images, channels, length) or (..., channels).
    images : tuple of int
        (images, channels, height, width), one pixel each where there are no images.
    channels_first : bool
        Whether channels are the second dimension of the tensor, not the last one.
    contiguous : bool
        Whether the tensor is contiguous; otherwise channels are neighbours in memory.
    strides : tuple of int
        Of the tensor.
    by_rows : bool
        Whether the tensor is a view of its rows.
    """

    shape: tuple[int, ...]
    images: tuple[int, ...]
    channels_first: bool
    contiguous: bool
    strides: tuple[int, ...] = field(init=False)
    by_rows: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "strides", self._strides())
        object.__setattr__(self, "by_rows", not (self.channels_first and self.contiguous)
                           or math.prod(self.shape[2:]) == 1)  # fmt: skip

    def _strides(self) -> tuple[int, ...]:
        if self.contiguous or not self.channels_first:
            return tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        channels, *size = self.shape[1:]
        inner = [channels * math.prod(size[i + 1 :]) for i in range(len(size))]
        return (channels * math.prod(size), 1, *inner)

    def view(self, rows: Tensor) -> Tensor:
        """The tensor as a view of its rows, of other strides unless `by_rows`."""
        if not self.channels_first or (self.contiguous and self.by_rows):
            return rows.view(self.shape)
        n, c, *size = self.shape
        return rows.view(n, *size, c).movedim(-1, 1)

    def tensor(self, rows: Tensor) -> Tensor:
        """The tensor, a view of its rows where that is possible."""
        if self.by_rows:
            return self.view(rows)
        n, c, *size = self.shape
        return ops.transpose(rows, n, math.prod(size), c).view(self.shape)

    def rows(self, tensor: Tensor) -> Tensor:
        """Rows of a tensor of the same shape and any strides, a view where that is possible."""
        if self.channels_first:
            if not self.by_rows and tensor.is_contiguous():
                n, c, *size = self.shape
                return ops.transpose(tensor, n, c, math.prod(size)).view(-1, c)
            tensor = tensor.movedim(1, -1)
        return tensor.reshape(-1, self.shape[1 if self.channels_first else -1]).contiguous()

    def image_view(self, rows: Tensor) -> Tensor:
        """The rows as channels_last images."""
        n, c, h, w = self.images
        return rows.view(n, h, w, c).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=1024)
def linear(shape: tuple[int, ...]) -> Layout:
    """Of what a linear layer gives."""
    if len(shape) == 2:  # both are right: channels are the second and the last dimension
        return Layout(shape, (*shape, 1, 1), True, True)
    return Layout(shape, (math.prod(shape[:-1]), shape[-1], 1, 1), False, True)


@functools.lru_cache(maxsize=1024)
def images(shape: tuple[int, ...], contiguous: bool) -> Layout:
    """Of what a convolution gives, in one dimension or two."""
    n, c, *size = shape
    return Layout(shape, (n, c, *(1,) * (2 - len(size)), *size), True, contiguous)
