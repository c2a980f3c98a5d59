"""The passes of layers, made of the other operators one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparseprop._kernels._gather_list import GatherList
from qsparseprop._kernels._plan import PlaneLayout
from qsparseprop._kernels._statistics import Scheme
from qsparseprop.ops import layers
from qsparseprop.ops.products import Packed
from qsparseprop.ops.reference._signature import reference_of
from qsparseprop.ops.reference.products import multiply, pack, quantize_pack, sddmm

__all__ = ["layer_backward", "layer_forward", "packed_backward"]


def _packed(x: Tensor, layout: PlaneLayout, scheme: Scheme | None, seed: Tensor | None) -> Packed:
    return pack(x, layout) if scheme is None else quantize_pack(x, layout, scheme, seed)


def _around_128(scheme: Scheme) -> Scheme:
    return Scheme("symmetric", (), scheme.per_channel)


def _is_around_128(packed: Packed) -> bool:
    return packed.zero_point is not None and bool((packed.zero_point == 128).all())


def _last(x: Tensor, channels_last: bool | None) -> bool:
    """Whether a result is channels_last."""
    return x.stride(1) == 1 and not x.is_contiguous() if channels_last is None else channels_last


def _result(rows: GatherList, images: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(rows.target.shape(images), dtype=dtype, memory_format=memory_format)


@reference_of(layers.layer_forward)
def layer_forward(x, values, bias, plan, quantisation, dtype, channels_last, save):
    """See `qsparseprop.ops.layer_forward`."""
    scheme, clip, seed, in_floats = quantisation
    transposed = plan.geometry.transposed
    rows = plan.backward if transposed else plan.forward
    packed = _packed(x, rows.source, scheme, seed)
    if transposed:
        bias = None if bias is None else bias.repeat(rows.rows // len(bias))
        # taps read the front of their own plane
        if scheme is not None and scheme.per_channel and packed.zero_point is not None:
            grid = plan.geometry.output_grid
            blocks = packed.planes[: -(-len(x) // grid.images) * grid.block].view(-1, grid.block)
            for plane in range(grid.planes):
                blocks[:, plane * grid.pitch : plane * grid.pitch + grid.front] = packed.zero_point[plane].item()
    out = multiply(packed, values, rows, _result(rows, len(x), dtype, _last(x, channels_last)), bias, clip)
    if not save:
        return out, None
    if scheme is None or in_floats:
        return out, pack(x, rows.source)
    if transposed and (scheme.name == "standard" or not _is_around_128(packed)):
        packed = quantize_pack(x, rows.source, _around_128(scheme))
    return out, packed


@reference_of(layers.layer_backward)
def layer_backward(dy, values, packed, plan, quantisation, grads, x_dtype, channels_last):
    """See `qsparseprop.ops.layer_backward`."""
    scheme, clip, seed, _ = quantisation
    if scheme is not None and scheme.name == "absmax":
        scheme = _around_128(scheme)
    transposed = plan.geometry.transposed
    rows = plan.forward if transposed else plan.backward
    dx = dvalues = None
    gradient = _packed(dy, rows.source, scheme, seed)
    if grads[0]:
        dx = multiply(gradient, values, rows, _result(rows, len(dy), x_dtype, _last(dy, channels_last)), None, clip)
    if grads[1]:
        assert packed is not None
        if packed.planes.dtype == torch.float32:
            gradient = pack(dy, rows.source)
        operand, gradient = (gradient, packed) if transposed else (packed, gradient)
        dvalues = sddmm(operand, gradient, plan.forward, len(dy), len(values))
    return dx, dvalues, dy.to(torch.float64).sum((0, 2, 3)).to(torch.float32) if grads[2] else None


@reference_of(layers.packed_backward)
def packed_backward(dy, values, packed, plan, images, clip, grads, x_dtype, channels_last):
    """See `qsparseprop.ops.packed_backward`."""
    dx = dvalues = None
    if grads[0]:
        dx = multiply(dy, values, plan.backward, _result(plan.backward, images, x_dtype, channels_last), None, clip)
    if grads[1]:
        assert packed is not None
        dvalues = sddmm(packed, dy, plan.forward, images, len(values))
    return dx, dvalues
