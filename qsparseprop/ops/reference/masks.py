"""A bit an element, and the ReLU that keeps it."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparseprop.ops import masks
from qsparseprop.ops.reference._signature import reference_of

__all__ = ["bits", "keep_masked", "relu_mask", "relu_mask_", "words"]


def words(bits: Tensor) -> Tensor:
    """Bits (rows, columns) in words of 16, from the lowest on: int16, (rows, ceil(columns / 16))."""
    count = -(-bits.shape[1] // 16)
    padded = torch.nn.functional.pad(bits, (0, 16 * count - bits.shape[1])).view(len(bits), count, 16)
    return (padded.to(torch.int32) << torch.arange(16, dtype=torch.int32)).sum(2).to(torch.int16)


def bits(words: Tensor, columns: int) -> Tensor:
    """The bits in words of `words`: bool, (rows, columns)."""
    spread = words.to(torch.int32)[:, :, None] >> torch.arange(16, dtype=torch.int32) & 1
    return spread.flatten(1)[:, :columns].bool()


def _in_memory(x: Tensor) -> Tensor:
    """The elements of a tensor without gaps in the order of memory."""
    return x.as_strided((x.numel(),), (1,))


@reference_of(masks.relu_mask)
def relu_mask(x):
    """See `qsparseprop.ops.relu_mask`."""
    return x.relu(), words(_in_memory(~(x <= 0))[None])[0]


@reference_of(masks.relu_mask_)
def relu_mask_(x):
    """See `qsparseprop.ops.relu_mask_`."""
    y, mask = relu_mask(x)
    x.copy_(y)
    return mask


@reference_of(masks.keep_masked)
def keep_masked(x, mask):
    """See `qsparseprop.ops.keep_masked`."""
    out = torch.empty_like(x)
    _in_memory(out).copy_(torch.where(bits(mask[None], x.numel())[0], _in_memory(x), 0))
    return out
