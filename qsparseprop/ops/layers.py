"""A layer's forward and backward pass, made of the operators of ``qsparseprop.ops.products``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsparseprop.layout.geometry import all_lanes, buffer_lanes
from qsparseprop.ops._registration import operator, shortcut
from qsparseprop.ops.products import _check_limits, _multiply, _packed, _scales, _spmm_fake


def _layer_forward_fake(x, values, bias, rows, grid, views, out_views, shape, scheme, seed, dtype, per_channel=False,
                        options=(), clip=None, keep_floats=False, channels_last=None):
    channels_last = is_channels_last(x) if channels_last is None else channels_last
    out = _spmm_fake(x, None, None, None, None, None, None, None, None, None, None, shape, channels_last, False, dtype)
    size = 0 if scheme is None else _scales(grid, per_channel)
    kept = torch.float32 if scheme is None or keep_floats else torch.uint8
    planes = x.new_empty(buffer_lanes(grid, x.shape[0]), dtype=kept)
    return out, planes, x.new_empty(size, dtype=torch.float32), x.new_empty(size, dtype=torch.int32)


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are what is innermost in the memory of an (images, channels, height, width) tensor."""
    return x.stride(1) == 1 and not x.is_contiguous()


@operator(
    "layer_forward(Tensor x, Tensor values, Tensor? bias, Tensor[] rows, int[] grid, int[] views, int[] out_views, "
    "SymInt[] shape, str? scheme, Tensor? seed, ScalarType dtype, bool per_channel=False, "
    "float[] options=[], Tensor? clip=None, bool keep_floats=False, bool? channels_last=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _layer_forward_fake,
)
def layer_forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    rows: Sequence[Tensor],
    grid: Sequence[int],
    views: Sequence[int],
    out_views: Sequence[int],
    shape: Sequence[int],
    scheme: str | None,
    seed: Tensor | None,
    dtype: torch.dtype,
    per_channel: bool = False,
    options: Sequence[float] = (),
    clip: Tensor | None = None,
    keep_floats: bool = False,
    channels_last: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer's forward pass: pack the input, quantise the weight, multiply.

    Parameters
    ----------
    x, values, bias : Tensor
        (images, channels, height, width), (nonzeros,), (out_channels,) or None.
    rows : sequence of Tensor
        The forward `GatherList`.
    grid, views, out_views
        Layout of the input, and of the output on the same lanes.
    shape : sequence of int
        Of the output.
    scheme, seed
        Of the input; without a scheme everything is float32.
    dtype : torch.dtype
        Of the output, float32 or bfloat16.
    per_channel : bool
        One scale for each channel of the input, folded into the weights before they are quantised.
    options, clip
        Of the input's scheme (`quantize_pack`) and of the weight (`quantize_weight`).
    keep_floats : bool
        Return the input packed without quantisation, for a weight gradient in float32.
    channels_last : bool, optional
        Memory format of the output; without it x's.

    Returns
    -------
    out : Tensor
        Of `shape` and `dtype`.
    planes, scale, zero_point : Tensor
        The packed input; scale and zero point are empty without a scheme.
    """
    lanes = buffer_lanes(grid, x.shape[0])
    packed, x_scale, x_zero_point = _packed(x, grid, views, lanes, scheme, seed, per_channel, options)
    out = shortcut("packed_forward")(packed, x_scale, x_zero_point, values, bias, rows, grid, out_views, shape, dtype,
                                     clip, is_channels_last(x) if channels_last is None else channels_last)
    if scheme is None:
        x_scale, x_zero_point = torch.empty(0), torch.empty(0, dtype=torch.int32)
    elif keep_floats:
        packed = shortcut("pack")(x, grid, views, lanes)
    return out, packed, x_scale, x_zero_point


def _packed_forward_fake(planes, x_scale, x_zero_point, values, bias, rows, grid, out_views, shape, dtype, clip,
                         channels_last, factor=None, limits=()):
    return _spmm_fake(planes, None, None, None, None, None, None, None, None, None, None, shape, channels_last, False,
                      dtype)


@operator(
    "packed_forward(Tensor planes, Tensor? x_scale, Tensor? x_zero_point, Tensor values, Tensor? bias, Tensor[] rows, "
    "int[] grid, int[] out_views, SymInt[] shape, ScalarType dtype, Tensor? clip, bool channels_last, "
    "Tensor? factor=None, float[] limits=[]) -> Tensor",
    _packed_forward_fake,
)
def packed_forward(
    planes: Tensor,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    values: Tensor,
    bias: Tensor | None,
    rows: Sequence[Tensor],
    grid: Sequence[int],
    out_views: Sequence[int],
    shape: Sequence[int],
    dtype: torch.dtype,
    clip: Tensor | None,
    channels_last: bool,
    factor: Tensor | None = None,
    limits: Sequence[float] = (),
) -> Tensor:
    """A layer's forward pass on an input that is packed already: quantise the weight, multiply.

    Parameters
    ----------
    planes, x_scale, x_zero_point : Tensor
        Of `quantize_pack`, or of `pack` and None.
    values, bias, rows, grid, out_views, shape, dtype, clip, channels_last
        As for `layer_forward`.
    factor : Tensor, optional
        float32, (out_channels,): multiplied into the product before the bias is added.
    limits : sequence of float
        As for `spmm`.

    Returns
    -------
    Tensor
        Of `shape` and `dtype`.
    """
    _check_limits(limits, bias)
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.to(torch.float32)
    return _multiply(planes, values, rows, x_scale, x_zero_point, clip, bias, grid, out_views, shape, channels_last,
                     False, dtype, factor=factor, limits=limits)


def _layer_backward_fake(dy, values, planes, x_scale, x_zero_point, rows, columns, grid, dy_grid, views, dy_views,
                         x_shape, complete, scheme, seed, grads, x_dtype, per_channel=False, options=(),
                         clip=None, channels_last=None):
    make = torch.float32
    channels_last = is_channels_last(dy) if channels_last is None else channels_last
    dx = _spmm_fake(dy, None, None, None, None, None, None, None, None, None, None, x_shape, channels_last, False,
                    x_dtype)
    return (
        dx if grads[0] else dy.new_empty(0, dtype=make),
        dy.new_empty(values.shape if grads[1] else 0, dtype=make),
        dy.new_empty(dy.shape[1] if grads[2] else 0, dtype=make),
    )


@operator(
    "layer_backward(Tensor dy, Tensor values, Tensor? planes, Tensor? x_scale, Tensor? x_zero_point, Tensor[] rows, "
    "Tensor[] columns, int[] grid, int[] dy_grid, int[] views, int[] dy_views, SymInt[] x_shape, bool complete, "
    "str? scheme, Tensor? seed, bool[] grads, ScalarType x_dtype, bool per_channel=False, "
    "float[] options=[], Tensor? clip=None, bool? channels_last=None) -> (Tensor, Tensor, Tensor)",
    _layer_backward_fake,
)
def layer_backward(
    dy: Tensor,
    values: Tensor,
    planes: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    grid: Sequence[int],
    dy_grid: Sequence[int],
    views: Sequence[int],
    dy_views: Sequence[int],
    x_shape: Sequence[int],
    complete: bool,
    scheme: str | None,
    seed: Tensor | None,
    grads: Sequence[bool],
    x_dtype: torch.dtype,
    per_channel: bool = False,
    options: Sequence[float] = (),
    clip: Tensor | None = None,
    channels_last: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's backward pass: pack the output's gradient once, for the input's and the weight's.

    Parameters
    ----------
    dy, values : Tensor
        (images, out_channels, height, width), (nonzeros,).
    planes, x_scale, x_zero_point : Tensor or None
        The packed input; only read for the weight gradient, which is computed in float32 if the planes are.
    rows, columns : sequence of Tensor
        The forward and the backward `GatherList`.
    grid, dy_grid, views, dy_views
        Layouts of input and output.
    x_shape : sequence of int
    complete : bool
        Whether the views cover the input; the gradient of the rest is zero.
    scheme, seed
        Of the gradient; without a scheme everything is float32.
    grads : sequence of bool
        Which gradients are wanted: of the input, the values, the bias.
    x_dtype : torch.dtype
        Of the input's gradient, float32 or bfloat16.
    per_channel : bool
        One scale for each channel of the gradient.
    options, clip
        Of the gradient's scheme (`quantize_pack`) and of the weight (`quantize_weight`).

    Returns
    -------
    dx, dvalues, dbias : Tensor
        The latter two in float32; empty where not wanted.
    """
    dx = dvalues = dbias = None
    if grads[1] and planes is None:
        raise ValueError("the gradient of the values needs the packed input, got planes=None")
    if scheme == "absmax":
        scheme = "symmetric"  # sddmm wants gradients around 128, whatever their signs
    lanes = buffer_lanes(dy_grid, dy.shape[0])
    in_floats = scheme is None or (grads[1] and planes.dtype == torch.float32)
    packed = dy_scale = dy_zero_point = None
    if grads[0] or not in_floats:
        packed, dy_scale, dy_zero_point = _packed(dy, dy_grid, dy_views, lanes, scheme, seed, per_channel, options)
    if grads[0]:
        dx = _multiply(packed, values, columns, dy_scale, dy_zero_point, clip, None, dy_grid, views, x_shape,
                       is_channels_last(dy) if channels_last is None else channels_last, not complete, x_dtype)
    if grads[1]:
        if in_floats:
            x_scale = x_zero_point = dy_scale = None
            if packed is None or packed.dtype != torch.float32:
                packed = shortcut("pack")(dy, dy_grid, dy_views, lanes)
        dvalues = shortcut("sddmm")(planes, packed, *rows, x_scale, x_zero_point, dy_scale, grid, dy_grid,
                                    *all_lanes(dy_views, dy.shape, dy_grid), values.shape[0])
    if grads[2]:
        dbias = dy.sum((0, 2, 3), dtype=torch.float32)
    # each an own tensor: an operator's results may not be the same one
    return (
        torch.empty(0) if dx is None else dx,
        torch.empty(0) if dvalues is None else dvalues,
        torch.empty(0) if dbias is None else dbias,
    )


def _packed_backward_fake(dy, dy_scale, dy_zero_point, values, planes, x_scale, x_zero_point, rows, columns, grid,
                          dy_grid, views, dy_views, x_shape, dy_shape, complete, grads, x_dtype, clip, channels_last):
    dx = _spmm_fake(dy, None, None, None, None, None, None, None, None, None, None, x_shape, channels_last, False,
                    x_dtype)
    return (
        dx if grads[0] else dy.new_empty(0, dtype=torch.float32),
        dy.new_empty(values.shape if grads[1] else 0, dtype=torch.float32),
    )


@operator(
    "packed_backward(Tensor dy, Tensor dy_scale, Tensor dy_zero_point, Tensor values, Tensor? planes, "
    "Tensor? x_scale, Tensor? x_zero_point, Tensor[] rows, Tensor[] columns, int[] grid, int[] dy_grid, int[] views, "
    "int[] dy_views, SymInt[] x_shape, SymInt[] dy_shape, bool complete, bool[] grads, ScalarType x_dtype, "
    "Tensor? clip, bool channels_last) -> (Tensor, Tensor)",
    _packed_backward_fake,
)
def packed_backward(
    dy: Tensor,
    dy_scale: Tensor,
    dy_zero_point: Tensor,
    values: Tensor,
    planes: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    grid: Sequence[int],
    dy_grid: Sequence[int],
    views: Sequence[int],
    dy_views: Sequence[int],
    x_shape: Sequence[int],
    dy_shape: Sequence[int],
    complete: bool,
    grads: Sequence[bool],
    x_dtype: torch.dtype,
    clip: Tensor | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """A layer's backward pass from a gradient that is packed already.

    Parameters
    ----------
    dy, dy_scale, dy_zero_point : Tensor
        The packed gradient, of shape `dy_shape`.
    grads : sequence of bool
        Whether the gradients of the input and of the values are wanted.
    values, planes, x_scale, x_zero_point, rows, columns, grid, dy_grid, views, dy_views, x_shape, complete, x_dtype, \
clip, channels_last
        As for `layer_backward`.

    Returns
    -------
    dx, dvalues : Tensor
        The latter in float32; empty where not wanted.
    """
    dx = dvalues = None
    if grads[0]:
        dx = _multiply(dy, values, columns, dy_scale, dy_zero_point, clip, None, dy_grid, views, x_shape, channels_last,
                       not complete, x_dtype)
    if grads[1]:
        dvalues = shortcut("sddmm")(planes, dy, *rows, x_scale, x_zero_point, dy_scale, grid, dy_grid, dy_views,
                                    dy_shape, values.shape[0])
    return torch.empty(0) if dx is None else dx, torch.empty(0) if dvalues is None else dvalues
