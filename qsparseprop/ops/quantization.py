"""The operators that quantise whole tensors; see `qsparseprop.ops` for those of the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qsparseprop._kernels import _quantize
from qsparseprop._kernels._memory import empty
from qsparseprop.ops._registration import operator
from qsparseprop.ops.schemes import seed_bits
from qsparseprop.ops.threads import thread_count

__all__ = ["dequantize", "line_sizes", "quantize"]


def line_sizes(shape: Sequence[int], dim: int | None, group_size: int | None) -> tuple[int, int, int]:
    """Channels, elements of a channel that are neighbours, and elements of a group (then channels is 0).

    Raises
    ------
    ValueError
        If both `dim` and `group_size` are given, or one of them is out of range.
    """
    if group_size is not None:
        if dim is not None:
            raise ValueError("give dim or group_size, not both")
        if group_size < 1:
            raise ValueError(f"group_size must be positive, got {group_size}")
        return 0, 1, group_size
    if dim is None:
        return 1, 1, 1
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"dim must lie in [{-len(shape)}, {len(shape)}), got {dim}")
    dim %= len(shape)
    return shape[dim], max(math.prod(shape[dim + 1 :]), 1), 1


def _scales(x: Tensor, dim: int | None, group_size: int | None) -> int:
    channels, _, group = line_sizes(x.shape, dim, group_size)
    return channels or -(-x.numel() // group)


@operator(
    "quantize(Tensor x, str scheme, int bits, int? dim, int? group_size, bool around_zero, Tensor? seed, "
    "float[] options) -> (Tensor, Tensor, Tensor)",
    lambda x, scheme, bits, dim, group_size, around_zero, seed, options: (
        x.new_empty(x.shape, dtype=torch.int8 if around_zero else torch.uint8),
        x.new_empty(_scales(x, dim, group_size), dtype=torch.float32),
        x.new_empty(_scales(x, dim, group_size), dtype=torch.int32),
    ),
)
def quantize(
    x: Tensor,
    scheme: str,
    bits: int,
    dim: int | None,
    group_size: int | None,
    around_zero: bool,
    seed: Tensor | None,
    options: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a tensor; see `qsparseprop.quantization.quantize` for the arguments.

    Parameters
    ----------
    x, scheme, bits, dim, group_size
        As for `qsparseprop.quantization.quantize`.
    around_zero : bool
        Whether codes are signed.
    seed : Tensor or None
        int64 scalar; for schemes that round at random.
    options : sequence of float
        Of the scheme, see `Scheme`.

    Returns
    -------
    codes : Tensor
        int8 around 0 if `around_zero`, otherwise uint8; x's shape, contiguous.
    scale, zero_point : Tensor
        float32 and int32, one element for each group, element of `dim`, or one.
    """
    bits_of_seed = seed_bits(scheme, seed)
    if scheme == "standard" and around_zero:
        raise ValueError("codes of the scheme 'standard' have a zero point and cannot be around zero")
    sizes = line_sizes(x.shape, dim, group_size)
    x = x.contiguous()
    codes = empty(tuple(x.shape), torch.int8 if around_zero else torch.uint8)
    scale = torch.empty(_scales(x, dim, group_size), dtype=torch.float32, device="cpu")
    zero_point = torch.empty(scale.shape, dtype=torch.int32, device="cpu")
    if scale.numel():
        _quantize.quantize(x, codes, scale, zero_point, *sizes, scheme, bits, options,
                           bits_of_seed, thread_count())  # fmt: skip
    return codes, scale, zero_point


@operator(
    "dequantize(Tensor codes, Tensor scale, Tensor zero_point, int? dim, int? group_size, ScalarType dtype=float) "
    "-> Tensor",
    lambda codes, scale, zero_point, dim, group_size, dtype=torch.float32: codes.new_empty(codes.shape, dtype=dtype),
)
def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    dim: int | None,
    group_size: int | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values that codes stand for, ``(codes - zero_point) * scale``, float32 or bfloat16; arguments as `quantize`.

    Parameters
    ----------
    codes, scale, zero_point : Tensor
        Of `quantize`.
    dim, group_size
        As for `quantize`.
    dtype : torch.dtype
        float32 or bfloat16.

    Returns
    -------
    Tensor
        Of the codes' shape, contiguous.
    """
    out = empty(tuple(codes.shape), dtype)
    if codes.numel():
        _quantize.dequantize(codes.contiguous(), scale, zero_point, out, *line_sizes(codes.shape, dim, group_size),
                             thread_count())  # fmt: skip
    return out
