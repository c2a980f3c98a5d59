"""What layers are made of: packing, the quantiser of their weights, and the two sparse products.

Tensors of a layer are 4-D, (images, channels, height, width), of any strides; a linear layer's are (batch, features, 1,
1). ``grid`` and ``views`` are numbers of ``qsparseprop.layout.geometry``; lists are those of
``qsparseprop.layout.plan``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsparseprop._kernels import _matmul, _pack
from qsparseprop._kernels._memory import empty
from qsparseprop.ops._registration import _direct, operator, shortcut
from qsparseprop.ops.schemes import RANDOM_SCHEMES, mix_seed


def _scales(grid: Sequence[int], per_channel: bool) -> int:
    return max(grid[4], 0) if per_channel and len(grid) > 4 else 1


@operator(
    "quantize_pack(Tensor x, int[] grid, int[] views, int lanes, str scheme, Tensor? seed, bool per_channel=False, "
    "float[] options=[]) -> (Tensor, Tensor, Tensor)",
    lambda x, grid, views, lanes, scheme, seed, per_channel=False, options=(): (
        x.new_empty(lanes, dtype=torch.uint8),
        x.new_empty(_scales(grid, per_channel), dtype=torch.float32),
        x.new_empty(_scales(grid, per_channel), dtype=torch.int32),
    ),
)
def quantize_pack(
    x: Tensor,
    grid: Sequence[int],
    views: Sequence[int],
    lanes: int,
    scheme: str,
    seed: Tensor | None,
    per_channel: bool = False,
    options: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a tensor to 8 bits and lay it out as planes of lanes.

    Parameters
    ----------
    x : Tensor
        float32 or bfloat16, (images, channels, height, width), any strides.
    grid, views, lanes
        Layout, and the size of the result.
    scheme : {"absmax", "symmetric", "standard", "sawb", "stochastic", "dithered", "luq"}
        "absmax" is "symmetric" (around 128), or unsigned (around 0) where no element is negative; so is "sawb".
    seed : Tensor, optional
        int64 scalar; only for the last three.
    per_channel : bool
        One scale and zero point for each channel, and so for each plane.
    options : sequence of float
        None, or for "sawb" its two constants and whether (1 or 0) to look at nonzeros only, for "dithered" the step in
        standard deviations, for "luq" the number of powers of two.

    Returns
    -------
    planes : Tensor
        uint8, (lanes,); gaps hold the zero point.
    scale, zero_point : Tensor
        float32 and int32, (1,) or (planes of the grid,): x = scale * (code - zero_point).
    """
    if scheme in RANDOM_SCHEMES and seed is None:
        raise ValueError(f"the scheme {scheme!r} needs a seed")
    planes = empty((lanes,), torch.uint8)
    scale = torch.empty(_scales(grid, per_channel), dtype=torch.float32)
    zero_point = torch.empty(_scales(grid, per_channel), dtype=torch.int32)
    bits = 0 if seed is None else mix_seed(int(seed))
    _pack.quantize_pack(x, planes, scale, zero_point, grid, views, scheme, options, per_channel, bits,
                        torch.get_num_threads())
    return planes, scale, zero_point


@operator(
    "pack(Tensor x, int[] grid, int[] views, int lanes) -> Tensor",
    lambda x, grid, views, lanes: x.new_empty(lanes, dtype=torch.float32),
)
def pack(x: Tensor, grid: Sequence[int], views: Sequence[int], lanes: int) -> Tensor:
    """Lay a tensor out as planes of lanes without quantising it: float32, (lanes,), gaps hold zero."""
    planes = empty((lanes,), torch.float32)
    _pack.pack(x, planes, grid, views, torch.get_num_threads())
    return planes


@operator(
    "quantize_weight(Tensor values, Tensor index, Tensor group_ptr, Tensor? plane=None, Tensor? factor=None, "
    "Tensor? zero_point=None, Tensor? clip=None) -> (Tensor, Tensor, Tensor)",
    lambda values, index, group_ptr, plane=None, factor=None, zero_point=None, clip=None: (
        values.new_empty(index.shape, dtype=torch.int8),
        values.new_empty(group_ptr.shape[0] - 1, dtype=torch.float32),
        values.new_empty(group_ptr.shape[0] - 1, dtype=torch.int64),
    ),
)
def quantize_weight(
    values: Tensor,
    index: Tensor,
    group_ptr: Tensor,
    plane: Tensor | None = None,
    factor: Tensor | None = None,
    zero_point: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise the slots of a list, nearest even with one scale a row.

    Parameters
    ----------
    values : Tensor
        float32, (nonzeros,).
    index, group_ptr : Tensor
        Of a `GatherList`.
    plane : Tensor, optional
        Of a `GatherList`; needed where one of the following differs from plane to plane.
    factor : Tensor, optional
        float32, (planes,) or (1,): scales of the other operand, multiplied into the values before they are quantised.
        A sum over planes of different scales is a sum of integers then, with one scale.
    zero_point : Tensor, optional
        int32, (planes,) or (1,): zero points of the other operand, multiplied into `total`.
    clip : Tensor, optional
        float32, (1,): magnitude that 127 stands for in every row; without it a row's own largest.

    Returns
    -------
    codes : Tensor
        int8, (slots,), in [-127, 127]; padding is zero.
    scale : Tensor
        float32, (rows,).
    total : Tensor
        int64, (rows,): sum of a row's codes, each times the zero point of its plane.
    """
    rows = group_ptr.numel() - 1
    if rows < 0:
        raise ValueError("group_ptr must have at least 1 element, got 0")
    codes = torch.empty(index.numel(), dtype=torch.int8)
    scale = torch.empty(rows, dtype=torch.float32)
    total = torch.empty(rows, dtype=torch.int64)
    _matmul.quantize_weight(values, index, group_ptr, plane, factor, zero_point, clip, codes, scale, total,
                            torch.get_num_threads())
    return codes, scale, total


def _spmm_fake(planes, weights, group_ptr, offset, scale, total, x_scale, x_zero_point, bias, grid, views, shape,
               channels_last, zeros, dtype=torch.float32, limits=()):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=planes.device, memory_format=memory_format)


def _check_limits(limits: Sequence[float], bias: Tensor | None) -> None:
    if limits and (len(limits) != 2 or bias is None):
        raise ValueError(f"limits must be two numbers, and need a bias; got {list(limits)}")


def _result(shape: Sequence[int], channels_last: bool, zeros: bool, dtype: torch.dtype) -> Tensor:
    out = empty(tuple(shape), dtype, channels_last)
    return out.zero_() if zeros else out


@operator(
    "spmm(Tensor planes, Tensor weights, Tensor group_ptr, Tensor offset, Tensor? scale, Tensor? total, "
    "Tensor? x_scale, Tensor? x_zero_point, Tensor? bias, int[] grid, int[] views, SymInt[] shape, "
    "bool channels_last, bool zeros, ScalarType dtype=float, float[] limits=[]) -> Tensor",
    _spmm_fake,
)
def spmm(
    planes: Tensor,
    weights: Tensor,
    group_ptr: Tensor,
    offset: Tensor,
    scale: Tensor | None,
    total: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    bias: Tensor | None,
    grid: Sequence[int],
    views: Sequence[int],
    shape: Sequence[int],
    channels_last: bool,
    zeros: bool,
    dtype: torch.dtype = torch.float32,
    limits: Sequence[float] = (),
) -> Tensor:
    """Gather-SpMM and unpacking: ``out[row, lane] = sum_k weights[row, k] * planes[offset[row, k] + lane]``.

    Parameters
    ----------
    planes, weights : Tensor
        uint8 (lanes,) and int8 (slots,), or both float32.
    group_ptr, offset : Tensor
        Of a `GatherList`.
    scale, total : Tensor or None
        For codes: of the weights, (rows,).
    x_scale, x_zero_point : Tensor or None
        For codes: of the planes, (1,); None where the weights were quantised with them.
    bias : Tensor or None
        float32, (rows,).
    grid, views
        Of the planes, and where the rows go in the result.
    shape : sequence of int
        (images, channels, height, width) of the result.
    channels_last : bool
        Memory format of the result.
    zeros : bool
        Whether the views leave something out that must be zero.
    dtype : torch.dtype
        float32 or bfloat16.
    limits : sequence of float
        None, or the least and the greatest value of the result; they go with a bias.

    Returns
    -------
    Tensor
        Of `shape` and `dtype`.
    """
    _check_limits(limits, bias)
    out = _result(shape, channels_last, zeros, dtype)
    _matmul.spmm(planes, weights, group_ptr, offset, scale, total, x_scale, x_zero_point, bias, out, grid, views,
                 torch.get_num_threads(), *limits)
    return out


@operator(
    "sddmm(Tensor planes, Tensor dy, Tensor group_ptr, Tensor offset, Tensor index, Tensor plane, Tensor? x_scale, "
    "Tensor? x_zero_point, Tensor? dy_scale, int[] grid, int[] dy_grid, int[] views, SymInt[] shape, SymInt nonzeros) "
    "-> Tensor",
    lambda planes, dy, group_ptr, offset, index, plane, x_scale, x_zero_point, dy_scale, grid, dy_grid, views, shape,
    nonzeros: planes.new_empty(nonzeros, dtype=torch.float32),
)
def sddmm(
    planes: Tensor,
    dy: Tensor,
    group_ptr: Tensor,
    offset: Tensor,
    index: Tensor,
    plane: Tensor,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    dy_scale: Tensor | None,
    grid: Sequence[int],
    dy_grid: Sequence[int],
    views: Sequence[int],
    shape: Sequence[int],
    nonzeros: int,
) -> Tensor:
    """Gather-SDDMM: ``dvalue[row, k] = sum_lane dy[row, lane] * planes[offset[row, k] + lane]``, at the nonzeros only.

    Parameters
    ----------
    planes, dy : Tensor
        Packed input and output gradient: both uint8 (the gradient around 128) or both float32.
    group_ptr, offset, index, plane : Tensor
        The forward `GatherList`.
    x_scale, x_zero_point, dy_scale : Tensor or None
        For codes, (1,) each or one for each plane of x (the first two) and each row.
    grid, dy_grid, views, shape
        Layout of both, the view of the gradient and the shape of its tensor.
    nonzeros : int

    Returns
    -------
    Tensor
        float32, (nonzeros,).
    """
    out = torch.empty(nonzeros, dtype=torch.float32)
    _matmul.sddmm(planes, dy, group_ptr, offset, index, plane, x_scale, x_zero_point, dy_scale, out, grid, dy_grid,
                  views, shape, torch.get_num_threads())
    return out


def _gather_weights(values: Tensor, index: Tensor) -> Tensor:
    """Slots of a float list: values, and zero where the index is -1."""
    return torch.cat([values, values.new_zeros(1)])[index]


def _multiply(
    packed: Tensor,
    values: Tensor,
    rows: Sequence[Tensor],
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    clip: Tensor | None,
    *where: object,
    factor: Tensor | None = None,
    limits: Sequence[float] = (),
) -> Tensor:
    """Quantise the weight, as the scale of the planes wants it, and multiply; the rest is as for `spmm`.

    `factor` (rows,) is multiplied into the product before the bias.
    """
    master = values if values.dtype == torch.float32 else values.to(torch.float32)
    group_ptr, offset, index, plane = rows
    spmm = shortcut("spmm")
    if x_scale is None:
        weights = _gather_weights(master, index)
        if factor is not None:
            weights = weights * torch.repeat_interleave(factor, group_ptr.diff().long() * 4)
        return spmm(packed, weights, group_ptr, offset, None, None, None, None, *where, limits)
    if spmm is _direct["spmm"]:  # in one call: half of what a small layer costs is calls
        bias, grid, views, shape, channels_last, zeros, dtype = where
        out = _result(shape, channels_last, zeros, dtype)
        _matmul.quantized_spmm(master, index, group_ptr, offset, plane, x_scale, x_zero, clip, packed, bias, out, grid,
                               views, torch.get_num_threads(), factor, *limits)
        return out
    quantize = shortcut("quantize_weight")
    if x_scale.shape[0] == 1:
        codes, scale, total = quantize(master, index, group_ptr, None, None, None, clip)
    else:
        codes, scale, total = quantize(master, index, group_ptr, plane, x_scale, x_zero, clip)
        x_scale = x_zero = None
    if factor is not None:
        scale = scale * factor
    return spmm(packed, codes, group_ptr, offset, scale, total, x_scale, x_zero, *where, limits)


def _packed(
    x: Tensor,
    grid: Sequence[int],
    views: Sequence[int],
    lanes: int,
    scheme: str | None,
    seed: Tensor | None,
    per_channel: bool,
    options: Sequence[float],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if scheme is None:
        return shortcut("pack")(x, grid, views, lanes), None, None
    return shortcut("quantize_pack")(x, grid, views, lanes, scheme, seed, per_channel, options)
