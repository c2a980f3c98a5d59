"""What layers are made of: packing, the quantiser of their weights, and the two sparse products.

Tensors of a layer are 4-D, (images, channels, height, width), of any strides; a linear layer's are (batch, features, 1,
1). A `PlaneLayout` says where their elements lie in planes of lanes; `ProductRows`, which of them each row multiplies
with which value: as a `GatherList`, which has the nonzeros alone, or as `DenseRows`, a matrix with its zeros, for
products of codes. They were checked when they were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from qsparseprop._kernels import _kept, _matmul, _pack, _weights
from qsparseprop._kernels._memory import empty
from qsparseprop._kernels._plan import PlaneLayout, ProductRows
from qsparseprop._kernels._statistics import Scheme
from qsparseprop._torch_compat import profiler_is_on
from qsparseprop.ops._registration import are_plain, check_tensors, in_memory, recorded, seen_as
from qsparseprop.ops.threads import thread_count

__all__ = ["Packed", "Weights", "empty_result", "gather_weight", "gather_weight_plain", "in_memory_parts", "multiply",
           "multiply_plain", "pack", "pack_plain", "quantize_pack", "quantize_pack_plain", "quantize_weight",
           "quantize_weight_plain", "sddmm", "sddmm_plain", "spmm"]  # fmt: skip


class Packed(NamedTuple):
    """A tensor laid out as planes of lanes.

    Attributes
    ----------
    planes : Tensor
        uint8 codes, or float32; (lanes,).
    scale, zero_point : Tensor or None
        Of codes, float32 and int32, (1,) or (planes,): x = scale * (code - zero_point). None for float32, and where the
        weights were quantised with them.
    """

    planes: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None


class Weights(NamedTuple):
    """The values of the slots of a list.

    Attributes
    ----------
    slots : Tensor
        int8 codes in [-127, 127], or float32; (slots,), zero for padding.
    scale, total : Tensor or None
        Of codes, (rows,): float32, and int64, the sum of a row's codes, each times the zero point of its plane.
    """

    slots: Tensor
    scale: Tensor | None = None
    total: Tensor | None = None


_Parts = TypeVar("_Parts", Packed, Weights)


def in_memory_parts(operand: _Parts) -> _Parts:
    """An operand whose tensors are such that the kernels can read them, see `in_memory`."""
    parts: list[Any] = [in_memory(tensor, "a part of an operand") for tensor in operand]
    return type(operand)(*parts)


def quantize_pack(x: Tensor, layout: PlaneLayout, scheme: Scheme, seed: Tensor | None = None) -> Packed:
    """Quantise a tensor to 8 bits and lay it out as planes of lanes.

    Parameters
    ----------
    x : Tensor
        float32 or bfloat16, (images, channels, height, width), any strides.
    layout : PlaneLayout
    scheme : Scheme
    seed : Tensor, optional
        int64 scalar; only for schemes that round at random.

    Returns
    -------
    Packed
        Gaps hold the zero point.

    Raises
    ------
    TypeError, ValueError
        For another dtype, device or shape, or without a seed that is needed.
    """
    return quantize_pack_plain(in_memory(x, "x"), layout, scheme, seed)


@recorded
def quantize_pack_plain(x: Tensor, layout: PlaneLayout, scheme: Scheme, seed: Tensor | None = None) -> Packed:
    """`quantize_pack` for those who have looked at the tensor already."""
    return Packed(*_pack.quantize_pack(x, layout, scheme, seed, thread_count()))


def pack(x: Tensor, layout: PlaneLayout) -> Packed:
    """Lay a tensor out as planes of lanes without quantising it: in float32, gaps hold zero.

    Parameters
    ----------
    x : Tensor
        As for `quantize_pack`.
    layout : PlaneLayout

    Returns
    -------
    Packed
    """
    return pack_plain(in_memory(x, "x"), layout)


@recorded
def pack_plain(x: Tensor, layout: PlaneLayout) -> Packed:
    """`pack` for those who have looked at the tensor already."""
    return Packed(_pack.pack(x, layout, thread_count()))


def quantize_weight(
    values: Tensor,
    rows: ProductRows,
    factor: Tensor | None = None,
    zero_point: Tensor | None = None,
    clip: Tensor | None = None,
) -> Weights:
    """Quantise the slots of a list, nearest even with one scale a row.

    Parameters
    ----------
    values : Tensor
        float32, (nonzeros,).
    rows : ProductRows
    factor : Tensor, optional
        float32, (planes of the list's source,) or (1,): scales of the other operand, multiplied into the values before
        they are quantised. A sum over planes of different scales is a sum of integers then, with one scale.
    zero_point : Tensor, optional
        int32, as many: zero points of the other operand, multiplied into `total`.
    clip : Tensor, optional
        float32, (1,): magnitude that 127 stands for in every row; without it a row's own largest.

    Returns
    -------
    Weights
    """
    check_tensors(factor=factor, zero_point=zero_point, clip=clip)
    return quantize_weight_plain(in_memory(values, "values"), rows, factor, zero_point, clip)


@recorded
def quantize_weight_plain(
    values: Tensor, rows: ProductRows, factor: Tensor | None, zero_point: Tensor | None, clip: Tensor | None
) -> Weights:
    """`quantize_weight` for those who have looked at the tensors already."""
    weights = Weights(torch.empty(rows.slots, dtype=torch.int8, device="cpu"),
                      torch.empty(rows.rows, dtype=torch.float32, device="cpu"),
                      torch.empty(rows.rows, dtype=torch.int64, device="cpu"))  # fmt: skip
    _weights.quantize_weight(values, rows, factor, zero_point, clip, *weights, thread_count())
    return weights


def gather_weight(values: Tensor, rows: ProductRows) -> Weights:
    """The slots of a list as float32, without quantising them; `values` are float32, (nonzeros,).

    Parameters
    ----------
    values : Tensor
    rows : ProductRows
        A `GatherList`.

    Returns
    -------
    Weights
    """
    return gather_weight_plain(in_memory(values, "values"), rows)


@recorded
def gather_weight_plain(values: Tensor, rows: ProductRows) -> Weights:
    """`gather_weight` for those who have looked at the tensor already."""
    slots = torch.empty(rows.slots, dtype=torch.float32, device="cpu")
    _weights.gather_weight(values, rows, slots)
    return Weights(slots)


def empty_result(rows: ProductRows, images: int, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """A tensor for a product of a list, (images, channels, height, width): zero where that does not reach.

    Parameters
    ----------
    rows : ProductRows
    images : int
    dtype : torch.dtype
    channels_last : bool
        Its memory format.

    Returns
    -------
    Tensor
    """
    out = empty(rows.target.shape(images), dtype, channels_last)
    return out if rows.target.complete else out.zero_()


def _check_limits(limits: Sequence[float], bias: Tensor | None) -> None:
    if limits and (len(limits) != 2 or bias is None):
        raise ValueError(f"limits must be two numbers, and need a bias; got {list(limits)}")


@recorded
def spmm(
    operand: Packed,
    weights: Weights,
    rows: ProductRows,
    images: int,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    limits: Sequence[float] = (),
) -> Tensor:
    """Gather-SpMM and unpacking: ``out[row, lane] = sum_k weights[row, k] * planes[offset[row, k] + lane]``.

    Parameters
    ----------
    operand : Packed
        In the list's source; codes with one scale, or without one where the weights were quantised with them.
    weights : Weights
        Codes where the operand's are.
    rows : ProductRows
    images : int
        In the operand.
    bias : Tensor, optional
        float32, (rows,).
    dtype : torch.dtype
        float32 or bfloat16.
    channels_last : bool
        Memory format of the result.
    limits : sequence of float
        None, or the least and the greatest value of the result; they go with a bias.

    Returns
    -------
    Tensor
        (images, channels, height, width) of the list's target, of `dtype`.
    """
    _check_limits(limits, bias)
    operand, weights, bias = in_memory_parts(operand), in_memory_parts(weights), in_memory(bias, "bias")
    out = empty_result(rows, images, dtype, channels_last)
    _matmul.spmm(operand.planes, *weights, *operand[1:], rows, bias, out, thread_count(), *limits)
    return out


def _spmm(operand: Packed, weights: Weights, rows: ProductRows, out: Tensor, bias: Tensor | None, threads: int,
          *limits: float) -> None:  # fmt: skip
    """`spmm` into a tensor that is there, as a profiler sees it."""
    with seen_as("spmm"):
        _matmul.spmm(operand.planes, *weights, *operand[1:], rows, bias, out, threads, *limits)


def multiply(
    operand: Packed,
    values: Tensor,
    rows: ProductRows,
    out: Tensor,
    bias: Tensor | None = None,
    clip: Tensor | None = None,
    limits: Sequence[float] = (),
) -> Tensor:
    """Quantise the weight, as the scales of the operand want it, and multiply; without scales in float32.

    Parameters
    ----------
    operand : Packed
        In the list's source; its codes may have one scale, or one for each plane.
    values : Tensor
        Floating point, (nonzeros,).
    rows : ProductRows
    out : Tensor
        float32 or bfloat16, (images, channels, height, width), or (images, channels) where images are one pixel; it is
        filled where the list's target has views.
    bias : Tensor, optional
        Floating point, (rows,).
    clip : Tensor, optional
        As for `quantize_weight`.
    limits : sequence of float
        As for `spmm`.

    Returns
    -------
    Tensor
        `out`.
    """
    check_tensors(out=out, clip=clip)
    if not are_plain(out):
        raise ValueError("out must be memory to be written, got a view that changes what it shows, or a subclass")
    return multiply_plain(in_memory_parts(operand), in_memory(values, "values"), rows, out, in_memory(bias, "bias"),
                          clip, limits)  # fmt: skip


def multiply_plain(
    operand: Packed,
    values: Tensor,
    rows: ProductRows,
    out: Tensor,
    bias: Tensor | None,
    clip: Tensor | None,
    limits: Sequence[float] = (),
) -> Tensor:
    """`multiply` for those who have looked at the tensors already."""
    if limits:
        _check_limits(limits, bias)
    planes, scale, zero_point = operand
    threads = thread_count()
    if scale is not None and not profiler_is_on():
        _kept.multiply(values, rows, scale, zero_point, clip, planes, bias, out, threads, True, *limits)
        return out
    if values.dtype is not torch.float32:
        values = values.to(torch.float32)
    if bias is not None and bias.dtype is not torch.float32:
        bias = bias.to(torch.float32)
    if scale is None:
        _spmm(operand, gather_weight_plain(values, rows), rows, out, bias, threads, *limits)
    else:  # a profiler is to see both
        if scale.numel() == 1:
            weights = quantize_weight_plain(values, rows, None, None, clip)
        else:
            weights, operand = quantize_weight_plain(values, rows, scale, zero_point, clip), Packed(planes)
        _spmm(operand, weights, rows, out, bias, threads, *limits)
    return out


def sddmm(operand: Packed, gradient: Packed, rows: ProductRows, images: int, nonzeros: int) -> Tensor:
    """Gather-SDDMM: ``dvalue[row, k] = sum_lane dy[row, lane] * planes[offset[row, k] + lane]``, at the nonzeros only.

    Parameters
    ----------
    operand, gradient : Packed
        In the list's source and target: both codes (the gradient's around 128) or both float32.
    rows : ProductRows
        Its target has one view, or slices that follow each other.
    images : int
    nonzeros : int

    Returns
    -------
    Tensor
        float32, (nonzeros,).
    """
    return sddmm_plain(in_memory_parts(operand), in_memory_parts(gradient), rows, images, nonzeros)


@recorded
def sddmm_plain(operand: Packed, gradient: Packed, rows: ProductRows, images: int, nonzeros: int) -> Tensor:
    """`sddmm` for those who have looked at the tensors already."""
    return _matmul.sddmm(operand.planes, gradient.planes, operand.scale, operand.zero_point, gradient.scale, rows,
                         images, nonzeros, thread_count())  # fmt: skip
