"""Operators of transposed layers: those of a layer with the same weight, walked the other way round.

A transposed convolution computes what the convolution with the same weight has as
its input gradient; its own input gradient is the convolution's output, and in the weight gradient the two operands
change places. So all lists and layouts are those of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsparseprop.layout.geometry import all_lanes, buffer_lanes
from qsparseprop.ops._registration import operator, shortcut
from qsparseprop.ops.layers import is_channels_last
from qsparseprop.ops.products import _multiply, _packed, _scales


def _empty_out(shape, dtype, like, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def _forward_fake(x, values, bias, columns, grid, views, out_views, shape, scheme, dtype, per_channel=False, options=(),
                  clip=None, keep_floats=False, save=True, channels_last=None):
    channels_last = is_channels_last(x) if channels_last is None else channels_last
    out = _empty_out(shape, dtype, x, channels_last)
    scales = _scales(grid, per_channel) if save and scheme is not None and not keep_floats else 0
    kept = torch.float32 if scheme is None or keep_floats else torch.uint8
    planes = x.new_empty(buffer_lanes(grid, x.shape[0]) if save else 0, dtype=kept)
    return out, planes, x.new_empty(scales, dtype=torch.float32), x.new_empty(scales, dtype=torch.int32)


@operator(
    "transposed_forward(Tensor x, Tensor values, Tensor? bias, Tensor[] columns, int[] grid, int[] views, "
    "int[] out_views, SymInt[] shape, str? scheme, ScalarType dtype, bool per_channel=False, float[] options=[], "
    "Tensor? clip=None, bool keep_floats=False, bool save=True, bool? channels_last=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
def transposed_forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    columns: Sequence[Tensor],
    grid: Sequence[int],
    views: Sequence[int],
    out_views: Sequence[int],
    shape: Sequence[int],
    scheme: str | None,
    dtype: torch.dtype,
    per_channel: bool = False,
    options: Sequence[float] = (),
    clip: Tensor | None = None,
    keep_floats: bool = False,
    save: bool = True,
    channels_last: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A transposed layer's forward pass.

    Parameters
    ----------
    x, values, bias : Tensor
        (images, in_channels, height, width), (nonzeros,), (out_channels,) or None.
    columns : sequence of Tensor
        The backward `GatherList` of the convolution.
    grid, views, out_views
        Layout of the convolution's output, which is `x`, and of its input, all of which the views must cover.
    shape : sequence of int
        Of the result.
    scheme, dtype, per_channel, options, clip, keep_floats, channels_last
        As for `qsparseprop.ops.layer_forward`.
    save : bool
        Whether the packed input is wanted, for the weight gradient.

    Returns
    -------
    out : Tensor
        Of `shape` and `dtype`.
    planes, scale, zero_point : Tensor
        The packed input, its codes around 128 (in the weight gradient the input stands where a layer's gradient does);
        empty without `save`, the last two also without a scheme.
    """
    lanes = buffer_lanes(grid, x.shape[0])
    packed, scale, zero_point = _packed(x, grid, views, lanes, scheme, None, per_channel, options)
    if scheme is not None and per_channel:
        # the packer gives a plane's front the zero point of the plane before it, whose taps read on behind its lanes;
        # here taps read lanes before those of their own plane
        _, _, _, _, planes, pitch, front, block = grid
        fronts = packed.as_strided((-(-x.shape[0] // grid[0]), planes, front), (block, pitch, 1))
        fronts.copy_(zero_point.view(-1, 1))
    rows = columns[0].shape[0] - 1
    if bias is not None:  # a plane for each phase of the stride
        if bias.ndim != 1 or not bias.shape[0] or rows % bias.shape[0]:
            raise ValueError(f"a bias of shape {tuple(bias.shape)} does not go with {rows} planes")
        bias = bias.to(torch.float32).repeat(rows // bias.shape[0])
    out = _multiply(packed, values, columns, scale, zero_point, clip, bias, grid, out_views, shape,
                    is_channels_last(x) if channels_last is None else channels_last, False, dtype)
    in_floats = scheme is None or keep_floats
    if not save or in_floats:
        scale, zero_point = torch.empty(0), torch.empty(0, dtype=torch.int32)
    if not save:
        return out, torch.empty(0, dtype=torch.float32 if in_floats else torch.uint8), scale, zero_point
    if in_floats:
        return out, packed if scheme is None else shortcut("pack")(x, grid, views, lanes), scale, zero_point
    # sddmm wants codes around 128 that are not less than 1
    if scheme == "standard" or not (zero_point == 128).all():
        packed, scale, zero_point = _packed(x, grid, views, lanes, "symmetric", None, per_channel, ())
    return out, packed, scale, zero_point


def _backward_fake(dy, values, planes, x_scale, rows, grid, dy_grid, x_views, dy_views, x_shape, scheme, seed, grads,
                   x_dtype, per_channel=False, options=(), clip=None, channels_last=None):
    channels_last = is_channels_last(dy) if channels_last is None else channels_last
    return (
        _empty_out(x_shape, x_dtype, dy, channels_last) if grads[0] else dy.new_empty(0, dtype=torch.float32),
        dy.new_empty(values.shape if grads[1] else 0, dtype=torch.float32),
        dy.new_empty(dy.shape[1] if grads[2] else 0, dtype=torch.float32),
    )


@operator(
    "transposed_backward(Tensor dy, Tensor values, Tensor? planes, Tensor? x_scale, Tensor[] rows, int[] grid, "
    "int[] dy_grid, int[] x_views, int[] dy_views, SymInt[] x_shape, str? scheme, Tensor? seed, bool[] grads, "
    "ScalarType x_dtype, bool per_channel=False, float[] options=[], Tensor? clip=None, bool? channels_last=None) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
def transposed_backward(
    dy: Tensor,
    values: Tensor,
    planes: Tensor | None,
    x_scale: Tensor | None,
    rows: Sequence[Tensor],
    grid: Sequence[int],
    dy_grid: Sequence[int],
    x_views: Sequence[int],
    dy_views: Sequence[int],
    x_shape: Sequence[int],
    scheme: str | None,
    seed: Tensor | None,
    grads: Sequence[bool],
    x_dtype: torch.dtype,
    per_channel: bool = False,
    options: Sequence[float] = (),
    clip: Tensor | None = None,
    channels_last: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A transposed layer's backward pass: pack the output's gradient once, for the input's and the weight's.

    Parameters
    ----------
    dy, values : Tensor
        (images, out_channels, height, width), (nonzeros,).
    planes, x_scale : Tensor or None
        Of `transposed_forward`; only read for the weight gradient, which is computed in float32 if the planes are.
    rows : sequence of Tensor
        The forward `GatherList` of the convolution.
    grid, dy_grid, x_views, dy_views
        Layouts of the layer's input and output, which are the convolution's output and input.
    x_shape : sequence of int
    scheme, seed, grads, x_dtype, per_channel, options, clip, channels_last
        As for `qsparseprop.ops.layer_backward`.

    Returns
    -------
    dx, dvalues, dbias : Tensor
        The latter two in float32; empty where not wanted.
    """
    dx = dvalues = dbias = None
    if grads[1] and planes is None:
        raise ValueError("the gradient of the values needs the packed input, got planes=None")
    if scheme == "absmax":
        scheme = "symmetric"  # as in all layers
    lanes = buffer_lanes(dy_grid, dy.shape[0])
    in_floats = scheme is None or (grads[1] and planes.dtype == torch.float32)
    packed = scale = zero_point = None
    if grads[0] or (grads[1] and not in_floats):
        packed, scale, zero_point = _packed(dy, dy_grid, dy_views, lanes, scheme, seed, per_channel, options)
    if grads[0]:
        dx = _multiply(packed, values, rows, scale, zero_point, clip, None, dy_grid, x_views, x_shape,
                       is_channels_last(dy) if channels_last is None else channels_last, False, x_dtype)
    if grads[1]:
        if in_floats:
            scale = zero_point = x_scale = None
            if packed is None or packed.dtype != torch.float32:
                packed = shortcut("pack")(dy, dy_grid, dy_views, lanes)
        dvalues = shortcut("sddmm")(packed, planes, *rows, scale, zero_point, x_scale, dy_grid, grid,
                                    *all_lanes(x_views, x_shape, grid), values.shape[0])
    if grads[2]:
        dbias = dy.sum((0, 2, 3), dtype=torch.float32)
    return (
        torch.empty(0) if dx is None else dx,
        torch.empty(0) if dvalues is None else dvalues,
        torch.empty(0) if dbias is None else dbias,
    )
