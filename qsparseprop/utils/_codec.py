"""Flat float tensors as 8-bit codes in groups, decoded as a whole.

An affine group holds [low, high], widened to contain 0, in 0..255: ``x ~ scale * (code - zero_point)``, off by half a
scale at most. float32 and bfloat16 go through the package's kernels; other dtypes, and values whose sign has to be
kept, through torch, chunk by chunk in a scratch that stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsparseprop import ops

__all__ = ["SCHEMES", "Codes", "encode"]

#: "standard": affine, from the smallest to the largest value; "absmax": symmetric around zero.
SCHEMES = ("standard", "absmax")

_CHUNK = 1 << 18  # elements: 1 MB of float32
_TINY = 2.0**-126


@dataclass(frozen=True)
class Codes:
    """An encoded tensor.

    Attributes
    ----------
    codes : Tensor
        (elements,) uint8.
    scale, zero_point : Tensor
        (groups,) float32, and int32 where the kernels made it; the last group may be shorter than the others.
    group_size : int
    dtype : torch.dtype
        Of what was encoded.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    group_size: int
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Everything that takes memory."""
        return self.codes, self.scale, self.zero_point

    def decode(self) -> Tensor:
        """The values that the codes stand for: (elements,), of the original dtype."""
        if self.zero_point.dtype == torch.int32:
            return ops.dequantize(self.codes, self.scale, self.zero_point, None, self.group_size, self.dtype)
        out = torch.empty(self.codes.numel(), dtype=self.dtype)
        offset = -self.zero_point * self.scale
        for codes, values, groups in _chunks(self.group_size, self.codes, out):
            scale, shift = self.scale[groups, None], offset[groups, None]
            if out.dtype == torch.float32:
                values.copy_(codes).mul_(scale).add_(shift)
            else:
                values.copy_(codes.float().mul_(scale).add_(shift))
        return out


def _chunks(group_size: int, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Pieces of whole groups, as matrices with a row a group, and which groups they are."""
    count = tensors[0].numel()
    whole = count // group_size
    step = max(1, _CHUNK // group_size)
    for start in range(0, whole, step):
        end = min(start + step, whole)
        yield (*(t[start * group_size : end * group_size].view(-1, group_size) for t in tensors), slice(start, end))
    if whole * group_size < count:
        yield (*(t[whole * group_size :].view(1, -1) for t in tensors), slice(whole, whole + 1))


def encode(x: Tensor, scheme: str, group_size: int, keep_sign: bool = False) -> Codes | None:
    """Encode a flat tensor.

    Parameters
    ----------
    x : Tensor
        (elements,) floating point, contiguous.
    scheme : {"standard", "absmax"}
    group_size : int
        Consecutive elements that share a scale.
    keep_sign : bool
        A positive value never becomes zero, however small it is.

    Returns
    -------
    Codes or None
        None where a value is not finite, or the range of a group does not fit into float32.
    """
    if not keep_sign and x.dtype in (torch.float32, torch.bfloat16):
        codes, scale, zero = ops.quantize(x, scheme, 8, None, group_size, False, None, ())
        # a NaN is greater than everything
        finite = not scale.numel() or math.isfinite(scale.max().item())
        return Codes(codes, scale, zero, group_size, x.dtype) if finite else None
    groups = -(-x.numel() // group_size)
    low, high = torch.empty(groups), torch.empty(groups)
    for values, index in _chunks(group_size, x):
        # two reductions along rows are much faster than aminmax
        low[index] = values.amin(1)
        high[index] = values.amax(1)
    if scheme == "absmax":
        high = torch.maximum(high.abs(), low.abs())
        scale = (high / 127).clamp_(min=_TINY)
        zero_point = torch.full_like(scale, 128)
    else:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        scale = (high / 255 - low / 255).clamp_(min=_TINY)
        # one code is left for what is positive
        zero_point = (-low / scale).round_().clamp_(max=254)
    # NaN and Inf have come through both reductions
    if not torch.isfinite(high + low + scale).all():
        return None
    inverse = 1 / scale
    codes = torch.empty(x.numel(), dtype=torch.uint8)
    scratch = torch.empty(min(x.numel(), max(_CHUNK, group_size)))
    positive = torch.empty_like(scratch) if keep_sign else None
    for values, target, index in _chunks(group_size, x, codes):
        level = scratch[: values.numel()].view(values.shape)
        if values.dtype == torch.float32:
            torch.mul(values, inverse[index, None], out=level)
        else:
            level.copy_(values).mul_(inverse[index, None])
        # conversion to integers cuts off, so that adding a half rounds
        level.add_(zero_point[index, None] + 0.5).clamp_(0, 255)
        if positive is not None:
            least = positive[: values.numel()].view(values.shape)
            least.copy_(values > 0).mul_(zero_point[index, None] + 1)
            torch.maximum(level, least, out=level)
        target.copy_(level)
    return Codes(codes, scale, zero_point, group_size, x.dtype)
