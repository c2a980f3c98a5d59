"""Random changes of training images: small operations on whole batches, and torchvision's where it is installed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qsparseprop.training._packages import import_optional
from qsparseprop.training.named_functions import import_function
from qsparseprop.utils.errors import ConfigurationError

__all__ = ["OPERATIONS", "Augmentation"]

#: Share of the height and width by which `crop` moves an image at most.
_MARGIN = 8
#: Share of the area, and ratio of width to height, that `resized-crop` cuts out.
_AREA, _RATIO = (0.25, 1.0), (3 / 4, 4 / 3)


def _flip(images: Tensor, draws: Tensor, black: Tensor | None) -> Tensor:
    return torch.where((draws[:, 0] < 0.5).view(-1, 1, 1, 1), images.flip(-1), images)


def _crop(images: Tensor, draws: Tensor, black: Tensor | None) -> Tensor:
    count, _, height, width = images.shape
    margins = height // _MARGIN, width // _MARGIN
    rows, columns = (
        torch.arange(size) + ((2 * margin + 1) * draw).long()[:, None] - margin
        for size, margin, draw in zip((height, width), margins, draws.T, strict=True)
    )
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    each = torch.arange(count).view(-1, 1, 1)
    # indices on both sides of the channels: these come last
    moved = images[each, :, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]]
    nothing = moved.new_zeros(()) if black is None else black.to(moved.dtype)
    return torch.where(inside[..., None], moved, nothing).permute(0, 3, 1, 2)


def _resized_crop(images: Tensor, draws: Tensor, black: Tensor | None) -> Tensor:
    height, width = images.shape[2:]
    result = torch.empty_like(images)
    for index, (area, ratio, y, x) in enumerate(draws.tolist()):
        share = _AREA[0] + (_AREA[1] - _AREA[0]) * area
        aspect = math.exp(math.log(_RATIO[0]) + (math.log(_RATIO[1]) - math.log(_RATIO[0])) * ratio)
        rows = min(height, max(1, round(height * math.sqrt(share / aspect))))
        columns = min(width, max(1, round(width * math.sqrt(share * aspect))))
        top, left = int((height - rows + 1) * y), int((width - columns + 1) * x)
        part = images[index : index + 1, :, top : top + rows, left : left + columns]
        result[index] = F.interpolate(part, size=(height, width), mode="bilinear", antialias=True)[0]
    return result


class _Operation(NamedTuple):
    """What is done to a batch, with how many random numbers for each image."""

    draws: int
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]


OPERATIONS = {
    "flip": _Operation(1, _flip),
    "crop": _Operation(2, _crop),
    "resized-crop": _Operation(4, _resized_crop),
}


class Augmentation:
    """Random changes of images, made of random numbers that come with them.

    An image gets the same change whatever else is in its batch, and whichever process makes it.

    Parameters
    ----------
    names : sequence of str
        What is done, one after the other: ``flip`` (left to right, every other image), ``crop`` (moved by up to an
        eighth, black where nothing is left), ``resized-crop`` (a random part, scaled to the whole); the name of a
        transform in ``torchvision.transforms.v2`` that needs no arguments, such as ``TrivialAugmentWide``; or
        ``package.module:function`` for one of your own, which gets an image (channels, height, width), bytes as a
        rule, and returns one; it draws from torch's default generator.

    Attributes
    ----------
    draws : int
        Random numbers that an image needs.

    Raises
    ------
    ConfigurationError
        If there is no such change.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._operations = [_find(name) for name in self.names]
        self.draws = sum(operation.draws for operation in self._operations)

    def __call__(self, images: Tensor, draws: Tensor, black: Tensor | None = None) -> Tensor:
        """Change a batch.

        Parameters
        ----------
        images : torch.Tensor
            uint8 or float, (images, channels, height, width).
        draws : torch.Tensor
            float64, (images, `draws`), in [0, 1).
        black : torch.Tensor, optional
            What is black, (channels,): 0 unless given.

        Returns
        -------
        torch.Tensor
            Like `images`, which stay as they are.
        """
        used = 0
        for operation in self._operations:
            images = operation.apply(images, draws[:, used : used + operation.draws], black)
            used += operation.draws
        return images

    def __reduce__(self) -> tuple[Any, ...]:
        # for processes that do not inherit it; functions of users need not be picklable
        return Augmentation, (self.names,)


def _find(name: str) -> _Operation:
    if name in OPERATIONS:
        return OPERATIONS[name]
    if ":" in name:
        return _Operation(1, _one_by_one(name, import_function(name, "augmentation")))
    known = f"{', '.join(OPERATIONS)} and package.module:function"
    v2 = import_optional("torchvision.transforms.v2", f"{name!r} is none of {known}; a transform of torchvision")
    kind = getattr(v2, name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        raise ConfigurationError(f"{name!r} is none of {known}, nor has torchvision a transform of that name")
    try:
        return _Operation(1, _from_zero(_one_by_one(name, kind())))
    except TypeError as error:
        raise ConfigurationError(f"torchvision's {name} needs arguments: name a function of your own that calls it, "
                                 "package.module:function") from error  # fmt: skip


def _from_zero(apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Callable[..., Tensor]:
    """An operation for which black is 0, as torchvision's fill what is empty, made one for other images, too."""

    def shifted(images: Tensor, draws: Tensor, black: Tensor | None) -> Tensor:
        if black is None:
            return apply(images, draws, None)
        black = black.to(images.dtype).view(-1, 1, 1)
        return apply(images - black, draws, None) + black

    return shifted


def _one_by_one(
    name: str, transform: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A batch operation made of one on an image, with its random number as torch's seed."""

    def apply(images: Tensor, draws: Tensor, black: Tensor | None) -> Tensor:
        results = []
        with torch.random.fork_rng(devices=[]):
            for image, draw in zip(images, draws[:, 0].tolist(), strict=True):
                torch.manual_seed(int(draw * 2**53))
                result = transform(image)
                if not isinstance(result, Tensor) or result.shape != image.shape or result.dtype != image.dtype:
                    got = (f"{tuple(result.shape)} of {result.dtype}" if isinstance(result, Tensor)
                           else type(result).__name__)  # fmt: skip
                    raise ConfigurationError(f"the augmentation {name} must give an image as it gets it, "
                                             f"{tuple(image.shape)} of {image.dtype}; it gave {got}")  # fmt: skip
                results.append(result)
        return torch.stack(results)

    return apply
