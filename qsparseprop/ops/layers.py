"""A layer's forward and backward pass, made of the operators of ``qsparseprop.ops.products``.

A transposed convolution computes what the convolution with the same weight has as its input gradient; its own input
gradient is the convolution's output, and in the weight gradient the two operands change places. So its plan is that of
the convolution, walked the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qsparseprop._kernels import _layer
from qsparseprop._kernels._memory import empty
from qsparseprop._kernels._plan import PlaneLayout, ProductRows
from qsparseprop._kernels._statistics import Scheme
from qsparseprop._kernels._sums import channel_sums
from qsparseprop._torch_compat import profiler_is_on
from qsparseprop.layout.plan import Plan
from qsparseprop.ops._registration import are_plain, check_tensors, in_memory, recorded
from qsparseprop.ops.products import (
    Packed,
    empty_result,
    in_memory_parts,
    multiply_plain,
    pack_plain,
    quantize_pack_plain,
    sddmm_plain,
)
from qsparseprop.ops.threads import thread_count

__all__ = ["Quantisation", "bias_gradient", "is_channels_last", "layer_backward", "layer_forward", "packed_backward"]


class Quantisation(NamedTuple):
    """How a pass of a layer quantises.

    Attributes
    ----------
    scheme : Scheme or None
        Of the input, or of the output's gradient. Without one everything is float32.
    clip : Tensor or None
        Of the weight, see `quantize_weight`.
    seed : Tensor or None
        For schemes that round at random.
    in_floats : bool
        Whether the weight gradient is wanted in float32; only read in the forward pass.
    """

    scheme: Scheme | None = None
    clip: Tensor | None = None
    seed: Tensor | None = None
    in_floats: bool = False


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are what is innermost in the memory of an (images, channels, height, width) tensor.

    Parameters
    ----------
    x : Tensor

    Returns
    -------
    bool
    """
    return x.stride(1) == 1 and not x.is_contiguous()


def _result_like(x: Tensor, rows: ProductRows, dtype: torch.dtype, channels_last: bool | None) -> Tensor:
    """A tensor for the result of a product with x, of as many dimensions."""
    if x.ndim == 2:
        return empty((x.shape[0], rows.target.channels), dtype)
    return empty_result(rows, x.shape[0], dtype, is_channels_last(x) if channels_last is None else channels_last)


def _packed_by(x: Tensor, layout: PlaneLayout, scheme: Scheme | None, seed: Tensor | None) -> Packed:
    return pack_plain(x, layout) if scheme is None else quantize_pack_plain(x, layout, scheme, seed)


def layer_forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    plan: Plan,
    quantisation: Quantisation,
    dtype: torch.dtype,
    channels_last: bool | None = None,
    save: bool = True,
) -> tuple[Tensor, Packed | None]:
    """A layer's forward pass: pack the input, quantise the weight, multiply.

    Parameters
    ----------
    x, values, bias : Tensor
        (images, in_channels, height, width), or (images, in_channels) for images of one pixel; (nonzeros,);
        (out_channels,) or None.
    plan : Plan
    quantisation : Quantisation
        Of the input; scales of channels are folded into the weights before these are quantised.
    dtype : torch.dtype
        Of the output, float32 or bfloat16.
    channels_last : bool, optional
        Memory format of the output; without it x's.
    save : bool
        Whether the packed input is wanted, for the weight gradient.

    Returns
    -------
    out : Tensor
        (images, out_channels, out_height, out_width), or (images, out_channels), as x, of `dtype`.
    packed : Packed or None
        The input: in float32 where the weight gradient is, or without a scheme.
    """
    x, values, bias = in_memory(x, "x"), in_memory(values, "values"), in_memory(bias, "bias")
    check_tensors(clip=quantisation.clip)
    return layer_forward_plain(x, values, bias, plan, quantisation, dtype, channels_last, save)


@recorded
def layer_forward_plain(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    plan: Plan,
    quantisation: Quantisation,
    dtype: torch.dtype,
    channels_last: bool | None = None,
    save: bool = True,
) -> tuple[Tensor, Packed | None]:
    """`layer_forward` for those who have looked at the tensors already."""
    scheme, clip, seed, in_floats = quantisation
    transposed = plan.geometry.transposed
    rows = plan.multiplied(scheme is not None, transposed)
    if transposed:
        bias = _bias_of_phases(bias, rows.rows)
    out = _result_like(x, rows, dtype, channels_last)
    own_fronts = transposed and scheme is not None and scheme.per_channel
    if scheme is None or own_fronts or profiler_is_on():  # which is to see each
        packed = _packed_by(x, rows.source, scheme, seed)
        if own_fronts:
            _give_own_fronts(packed, plan, x.shape[0])
        multiply_plain(packed, values, rows, out, bias, clip)
    else:
        packed = Packed(*_layer.forward(x, values, bias, rows, scheme, seed, clip, out, save,
                                        thread_count()))  # fmt: skip
    if not save:
        return out, None
    if scheme is not None and in_floats:
        packed = pack_plain(x, rows.source)
    elif scheme is not None and transposed and not _is_around_128(packed, scheme):
        packed = quantize_pack_plain(x, rows.source, Scheme("symmetric", (), scheme.per_channel))
    return out, packed


def _bias_of_phases(bias: Tensor | None, rows: int) -> Tensor | None:
    """The bias of a transposed layer, whose output has planes for each phase of the stride."""
    if bias is None:
        return None
    if bias.ndim != 1 or not bias.shape[0] or rows % bias.shape[0]:
        raise ValueError(f"a bias of shape {tuple(bias.shape)} does not go with {rows} planes")
    return bias.to(torch.float32).repeat(rows // bias.shape[0])


def _give_own_fronts(packed: Packed, plan: Plan, images: int) -> None:
    """Give the front of each plane its own zero point.

    The packer gives it that of the plane before it, whose taps read on behind its lanes; in transposed layers taps read
    lanes before those of their own plane.
    """
    grid = plan.geometry.output_grid
    shape, strides = (-(-images // grid.images), grid.planes, grid.front), (grid.block, grid.pitch, 1)
    if packed.zero_point is not None:
        packed.planes.as_strided(shape, strides).copy_(packed.zero_point.view(-1, 1))


def _is_around_128(packed: Packed, scheme: Scheme) -> bool:
    """Whether codes can be the second operand of sddmm, which wants them around 128 and not less than 1."""
    zero_point = packed.zero_point
    return scheme.name != "standard" and zero_point is not None and bool((zero_point == 128).all())


def layer_backward(
    dy: Tensor,
    values: Tensor,
    packed: Packed | None,
    plan: Plan,
    quantisation: Quantisation,
    grads: Sequence[bool],
    x_dtype: torch.dtype,
    channels_last: bool | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A layer's backward pass: pack the output's gradient once, for the input's and the weight's.

    Parameters
    ----------
    dy, values : Tensor
        (images, out_channels, height, width), or (images, out_channels) for images of one pixel; (nonzeros,).
    packed : Packed or None
        Of `layer_forward`; only read for the weight gradient, which is computed in float32 if it is.
    plan : Plan
    quantisation : Quantisation
        Of the gradient.
    grads : sequence of bool
        Which gradients are wanted: of the input, the values, the bias.
    x_dtype : torch.dtype
        Of the input's gradient, float32 or bfloat16.
    channels_last : bool, optional
        Memory format of the input's gradient; without it dy's.

    Returns
    -------
    dx, dvalues, dbias : Tensor or None
        The latter two in float32; None where not wanted.
    """
    dy, values, packed = in_memory(dy, "dy"), in_memory(values, "values"), packed and in_memory_parts(packed)
    check_tensors(clip=quantisation.clip)
    return layer_backward_plain(dy, values, packed, plan, quantisation, grads, x_dtype, channels_last)


@recorded
def layer_backward_plain(
    dy: Tensor,
    values: Tensor,
    packed: Packed | None,
    plan: Plan,
    quantisation: Quantisation,
    grads: Sequence[bool],
    x_dtype: torch.dtype,
    channels_last: bool | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`layer_backward` for those who have looked at the tensors already."""
    scheme, clip, seed, _ = quantisation
    if scheme is not None and scheme.name == "absmax":
        scheme = Scheme("symmetric", (), scheme.per_channel)  # around 128, whatever the signs
    transposed = plan.geometry.transposed
    rows = plan.multiplied(scheme is not None, not transposed)
    in_floats = grads[1] and _is_in_floats(packed)
    dx = _result_like(dy, rows, x_dtype, channels_last) if grads[0] else None
    dvalues = gradient = None
    dbias = bias_gradient(dy) if grads[2] else None  # first: packing, which comes next, finds dy in the cache
    if scheme is not None and not in_floats and (grads[0] or grads[1]) and not profiler_is_on():
        differentiated = plan.differentiated(True) if grads[1] else None
        dvalues = _layer.backward(dy, values, packed, rows, differentiated, scheme, seed, clip, dx, transposed,
                                  thread_count())  # fmt: skip
        return dx, dvalues, dbias
    if grads[0] or (grads[1] and not in_floats):
        gradient = _packed_by(dy, rows.source, scheme, seed)
        if dx is not None:
            multiply_plain(gradient, values, rows, dx, None, clip)
    if grads[1]:
        if in_floats and (gradient is None or scheme is not None):
            gradient = pack_plain(dy, rows.source)
        operands = (gradient, packed) if transposed else (packed, gradient)
        dvalues = sddmm_plain(*operands, plan.differentiated(not in_floats), dy.shape[0], values.shape[0])
    return dx, dvalues, dbias


def bias_gradient(dy: Tensor) -> Tensor:
    """The sum of a gradient over all but its channels, float32.

    Parameters
    ----------
    dy : Tensor
        (images, channels, height, width), or (images, channels).

    Returns
    -------
    Tensor
        (channels,).

    Raises
    ------
    TypeError
        If it is no tensor of real floating-point numbers.
    """
    if not dy.is_floating_point():
        raise TypeError(f"dy must be floating point, got {dy.dtype}")
    if are_plain(dy) and dy.dtype in (torch.float32, torch.bfloat16):
        return channel_sums(dy, thread_count())
    dims = 0 if dy.ndim == 2 else (0, 2, 3)
    return dy.sum(dims) if dy.dtype is torch.float32 else dy.sum(dims, dtype=torch.float32)


def _is_in_floats(packed: Packed | None) -> bool:
    """Whether the weight gradient is a product of float32, as what was packed for it is."""
    if packed is None:
        raise ValueError("the gradient of the values needs the packed input, got None")
    return packed.planes.dtype is torch.float32


@recorded
def packed_backward(
    dy: Packed,
    values: Tensor,
    packed: Packed | None,
    plan: Plan,
    images: int,
    clip: Tensor | None,
    grads: Sequence[bool],
    x_dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The backward pass of a layer, not a transposed one, from a gradient that is packed already.

    Parameters
    ----------
    dy : Packed
        The gradient.
    values, packed, plan
        As for `layer_backward`.
    images : int
        In the gradient.
    clip : Tensor or None
        Of the weight.
    grads : sequence of bool
        Whether the gradients of the input and of the values are wanted.
    x_dtype, channels_last
        As for `layer_backward`.

    Returns
    -------
    dx, dvalues : Tensor or None
        The latter in float32; None where not wanted.
    """
    dy, values, packed = in_memory_parts(dy), in_memory(values, "values"), packed and in_memory_parts(packed)
    check_tensors(clip=clip)
    dx = dvalues = None
    if grads[0]:
        rows = plan.multiplied(dy.scale is not None, swapped=True)
        out = empty_result(rows, images, x_dtype, channels_last)
        dx = multiply_plain(dy, values, rows, out, None, clip)
    if grads[1]:
        rows = plan.differentiated(not _is_in_floats(packed))
        dvalues = sddmm_plain(packed, dy, rows, images, values.shape[0])
    return dx, dvalues
