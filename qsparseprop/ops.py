"""The operators: what the compiled kernels do, as functions of tensors.

This is the contract between the modules and the kernels. Every operator is registered with ``torch.library`` (schema,
shapes for tracing, CPU implementation); ``qsparseprop.reference`` has the same functions in plain torch.

Tensors of a layer are 4-D, (images, channels, height, width), of any strides; a linear layer's are (batch, features, 1,
1). ``grid`` and ``views`` are numbers of ``qsparseprop.geometry``; lists are those of ``qsparseprop.pattern``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qsparseprop._kernels import _matmul, _pack

_library = torch.library.Library("qsparseprop", "DEF")

SCHEMES = {"absmax": _pack.ABSMAX, "stochastic": _pack.STOCHASTIC, "standard": _pack.AFFINE}


def _operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Register a function as the CPU implementation of an operator."""

    def register(function: Callable) -> Callable:
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, function, "CPU")
        torch.library.register_fake(f"qsparseprop::{name}", fake, lib=_library)
        overload = getattr(torch.ops.qsparseprop, name).default
        overload.__doc__ = function.__doc__
        return overload

    return register


def draw_seed() -> Tensor:
    """A seed for one call: a 64-bit number from torch's default generator, shape ()."""
    return torch.empty((), dtype=torch.int64).random_()


@_operator(
    "quantize_pack(Tensor x, int[] grid, int[] views, int lanes, str scheme, Tensor? seed) -> (Tensor, Tensor, Tensor)",
    lambda x, grid, views, lanes, scheme, seed: (
        x.new_empty(lanes, dtype=torch.uint8),
        x.new_empty(1, dtype=torch.float32),
        x.new_empty(1, dtype=torch.int32),
    ),
)
def quantize_pack(
    x: Tensor, grid: Sequence[int], views: Sequence[int], lanes: int, scheme: str, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a tensor to 8 bits and lay it out as planes of lanes.

    Parameters
    ----------
    x : Tensor
        float32 or bfloat16, (images, channels, height, width), any strides.
    grid, views, lanes
        Layout, and the size of the result.
    scheme : {"absmax", "stochastic", "standard"}
    seed : Tensor, optional
        int64 scalar; only for "stochastic".

    Returns
    -------
    planes : Tensor
        uint8, (lanes,); gaps hold the zero point.
    scale, zero_point : Tensor
        float32 and int32, (1,): x = scale * (code - zero_point).
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if scheme == "stochastic" and seed is None:
        raise ValueError("the stochastic scheme needs a seed")
    planes = torch.empty(lanes, dtype=torch.uint8)
    scale = torch.empty(1, dtype=torch.float32)
    zero_point = torch.empty(1, dtype=torch.int32)
    bits = 0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF
    _pack.quantize_pack(x, planes, scale, zero_point, grid, views, SCHEMES[scheme], bits, torch.get_num_threads())
    return planes, scale, zero_point


@_operator(
    "pack(Tensor x, int[] grid, int[] views, int lanes) -> Tensor",
    lambda x, grid, views, lanes: x.new_empty(lanes, dtype=torch.float32),
)
def pack(x: Tensor, grid: Sequence[int], views: Sequence[int], lanes: int) -> Tensor:
    """Lay a tensor out as planes of lanes without quantising it: float32, (lanes,), gaps hold zero."""
    planes = torch.empty(lanes, dtype=torch.float32)
    _pack.pack(x, planes, grid, views, torch.get_num_threads())
    return planes


@_operator(
    "quantize_weight(Tensor values, Tensor index, Tensor group_ptr) -> (Tensor, Tensor, Tensor)",
    lambda values, index, group_ptr: (
        values.new_empty(index.shape, dtype=torch.int8),
        values.new_empty(group_ptr.shape[0] - 1, dtype=torch.float32),
        values.new_empty(group_ptr.shape[0] - 1, dtype=torch.int32),
    ),
)
def quantize_weight(values: Tensor, index: Tensor, group_ptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise the slots of a list, absmax with one scale a row.

    Parameters
    ----------
    values : Tensor
        float32, (nonzeros,).
    index, group_ptr : Tensor
        Of a `GatherList`.

    Returns
    -------
    codes : Tensor
        int8, (slots,), in [-127, 127]; padding is zero.
    scale : Tensor
        float32, (rows,).
    total : Tensor
        int32, (rows,): sum of a row's codes, which the zero point of the other operand is multiplied with.
    """
    rows = group_ptr.numel() - 1
    codes = torch.empty(index.numel(), dtype=torch.int8)
    scale = torch.empty(rows, dtype=torch.float32)
    total = torch.empty(rows, dtype=torch.int32)
    _matmul.quantize_weight(values, index, group_ptr, codes, scale, total, torch.get_num_threads())
    return codes, scale, total


def _spmm_fake(planes, weights, group_ptr, offset, scale, total, x_scale, x_zero_point, bias, grid, views, shape,
               channels_last, zeros):
    return planes.new_empty(
        shape, dtype=torch.float32, memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


@_operator(
    "spmm(Tensor planes, Tensor weights, Tensor group_ptr, Tensor offset, Tensor? scale, Tensor? total, "
    "Tensor? x_scale, Tensor? x_zero_point, Tensor? bias, int[] grid, int[] views, SymInt[] shape, "
    "bool channels_last, bool zeros) -> Tensor",
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
) -> Tensor:
    """Gather-SpMM and unpacking: ``out[row, lane] = sum_k weights[row, k] * planes[offset[row, k] + lane]``.

    Parameters
    ----------
    planes, weights : Tensor
        uint8 (lanes,) and int8 (slots,), or both float32.
    group_ptr, offset : Tensor
        Of a `GatherList`.
    scale, total, x_scale, x_zero_point : Tensor or None
        For codes: of the weights (rows,) and of the planes (1,).
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

    Returns
    -------
    Tensor
        float32, of `shape`.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(tuple(shape), dtype=torch.float32, memory_format=memory_format)
    if zeros:
        out.zero_()
    _matmul.spmm(planes, weights, group_ptr, offset, scale, total, x_scale, x_zero_point, bias, out, grid, views,
                 torch.get_num_threads())
    return out


@_operator(
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
        For codes, (1,) each.
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
