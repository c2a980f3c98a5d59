"""What blocks compute: the kernels behind an affine map, an addition and an activation, and behind their gradients.

Everything here takes and gives plain matrices (rows, channels) and knows nothing of autograd. Buffers that a node of
autograd has saved already are filled, not returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qsparseprop import activation_ops, norm_ops
from qsparseprop._kernels import _activation, _norm
from qsparseprop._kernels._memory import empty
from qsparseprop.geometry import Geometry
from qsparseprop.nn.functional import gradient_packing, output_packing
from qsparseprop.ops import shortcut
from qsparseprop.quantization import QuantConfig

INF = float("inf")


class Activation(NamedTuple):
    """An activation as the kernels know it."""

    name: str
    options: tuple[float, ...] = ()


IDENTITY = Activation("identity")
KINDS = ("clamp", "gelu", "gelu_tanh")


def saved_like(rows: int, channels: int, activation: Activation) -> Tensor:
    """A buffer for what the activation's gradient needs, not filled."""
    if activation.name in ("clamp", "leaky_relu"):
        return empty((rows, -(-channels // 16)), torch.int16)
    return empty((rows, channels), torch.uint8)


def statistics(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, momentum: float, eps: float, training: bool, save: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of a batch normalisation, see `norm_ops.norm_statistics`; running statistics are updated."""
    return shortcut("norm_statistics", rows, weight, bias, running_mean, running_var)(
        rows, weight, bias, running_mean, running_var, momentum, eps, training, save
    )


def factors(
    sums: Tensor, statistics: Tensor, weight: Tensor | None, count: int, batch_statistics: bool
) -> tuple[Tensor, Tensor]:
    """Of its gradient, see `norm_ops.norm_factors`."""
    return shortcut("norm_factors", sums, statistics, weight)(sums, statistics, weight, count, batch_statistics)


def _act_name(activation):
    return {(0.0, INF): "relu", (0.0, 6.0): "relu6"}[activation.options] if activation.name == "clamp" else activation.name


def _limits(activation):
    return activation.options if activation.name == "clamp" else (-INF, INF)


def _ones(c):
    return torch.ones(c), torch.zeros(c)


def apply(rows, residual, scale, shift, activation, code, codes, saved) -> Tensor:
    """``act(rows * scale + shift + residual)``; fills ``codes`` and ``saved`` where they are given."""
    n = torch.get_num_threads()
    out = empty(tuple(rows.shape), rows.dtype)
    if scale is None and residual is None:
        if activation.name == "identity":
            return rows
        _activation.act(rows, out, _act_name(activation), saved, n)
        return out
    if scale is None:
        scale, shift = _ones(rows.shape[1])
    if activation.name not in ("identity", "clamp"):
        y = apply(rows, residual, scale, shift, IDENTITY, code, codes, None)
        return apply(y, None, None, None, activation, None, None, saved)
    if codes is None and saved is not None:
        codes, code = empty(tuple(rows.shape), torch.uint8), (scale * 0, shift * 0)
    if codes is not None and saved is None:
        saved = saved_like(*rows.shape, Activation("clamp"))
    _norm.norm(rows, residual, out, scale, shift, *_limits(activation), *(code if codes is not None else (None, None)),
               codes, saved, n)
    return out


def output_range(rows, scale, shift, activation, known) -> Tensor:
    """Bounds of every channel of the result, (channels, 2)."""
    low, high = _limits(activation)
    if activation.name == "identity" or activation.name == "clamp":
        if known is not None:
            return known.t().clamp(low, high).contiguous()
        if scale is None:
            scale, shift = _ones(rows.shape[1])
        return shortcut("norm_act_range")(rows, None, scale, shift, low, high)
    if scale is not None:
        rows = apply(rows, None, scale, shift, IDENTITY, None, None, None)
    ends = activation_ops.act_range(rows, _act_name(activation))
    least_at = {"gelu": -0.7517916, "gelu_tanh": -0.7524614}[activation.name]
    f = lambda x: torch.nn.functional.gelu(x, approximate="none" if activation.name == "gelu" else "tanh")
    least = f(ends[:, 0].maximum(torch.full_like(ends[:, 0], least_at)).minimum(ends[:, 1]))
    return torch.stack([least, f(ends).amax(1)], 1)


def pack(rows, scale, shift, activation, code, codes, saved, images, ranges, geometry: Geometry, qconfig: QuantConfig,
         keep: bool):
    """`apply`, quantised and packed on the way: the result or None, planes, scale, zero point."""
    ranges, grid, views, lanes, scheme, per_channel = output_packing(ranges, images[0], geometry, qconfig)
    n = torch.get_num_threads()
    if activation.name not in ("identity", "clamp") and scale is not None:
        rows = apply(rows, None, scale, shift, IDENTITY, code, codes, None)
        codes = scale = None
    out = empty(tuple(rows.shape), rows.dtype) if keep else None
    scales = grid[4] if per_channel else 1
    planes = empty((lanes,), torch.uint8)
    plane_scale, zero_point = torch.empty(scales), torch.empty(scales, dtype=torch.int32)
    if scale is None and activation.name != "identity":
        _activation.act_pack(rows, out, _act_name(activation), saved, images, ranges, planes, plane_scale, zero_point,
                             grid, views, scheme, per_channel, n)
        return out, planes, plane_scale, zero_point
    if scale is None:
        scale, shift = _ones(rows.shape[1])
    if codes is None and saved is not None:
        codes, code = empty(tuple(rows.shape), torch.uint8), (scale * 0, shift * 0)
    if codes is not None and saved is None:
        saved = saved_like(*rows.shape, Activation("clamp"))
    _norm.norm_pack(rows, None, out, scale, shift, *_limits(activation),
                    *(code if codes is not None else (None, None)), codes, saved, images, ranges, planes, plane_scale,
                    zero_point, grid, views, scheme, per_channel, n)
    return out, planes, plane_scale, zero_point


def pack_codes(codes, scale, shift, activation, images, ranges, geometry, qconfig):
    """The packed form of what codes stand for: planes, scale, zero point."""
    grid = geometry.input_grid
    return shortcut("norm_act_pack")(codes, None, scale, shift, *_limits(activation), None, None, images, ranges,
                                  grid.numbers, geometry.input_views, grid.lanes(images[0]), qconfig.input,
                                  qconfig.granularity == "channel", False)[3:]


def _mask(rows, channels):
    return torch.full((rows, -(-channels // 16)), -1, dtype=torch.int16)


def sums(dy, codes, saved, activation) -> Tensor:
    """Of each channel the sums of g and g * code and the greatest magnitude of g, float64, (channels, 3)."""
    if codes is None and activation.name != "identity":
        s = shortcut("act_sums")(dy, saved, _act_name(activation))
        return torch.stack([s[:, 0], 0 * s[:, 0], s[:, 1]], 1)
    if codes is None:
        codes = torch.zeros(tuple(dy.shape), dtype=torch.uint8)
    if activation.name not in ("identity", "clamp"):
        dy, saved, activation = shortcut("act_grad")(dy, saved, _act_name(activation)), None, IDENTITY
    return shortcut("norm_act_sums")(dy, codes, _mask(*dy.shape) if saved is None else saved)


def gradient(dy, codes, saved, activation, factor) -> Tensor:
    if factor is None:
        if activation.name == "identity":
            return dy
        if activation.name == "clamp":
            return shortcut("act_grad")(dy, saved, "relu")
        return shortcut("act_grad")(dy, saved, _act_name(activation))
    if activation.name not in ("identity", "clamp"):
        dy, saved, activation = shortcut("act_grad")(dy, saved, _act_name(activation)), None, IDENTITY
    return shortcut("norm_act_grad")(dy, codes, _mask(*dy.shape) if saved is None else saved, factor, False)[0]


def gradient_pack(dy, codes, saved, activation, factor, want_g, images, bound, geometry, qconfig):
    """`gradient`, packed: (planes, scale, zero point), and g where it is wanted."""
    packing = gradient_packing(bound, images[0], geometry, qconfig)
    if factor is None and activation.name != "identity":
        return shortcut("act_grad_pack")(dy, saved, _act_name(activation), images, *packing), None
    if activation.name not in ("identity", "clamp"):
        dy, saved, activation = shortcut("act_grad")(dy, saved, _act_name(activation)), None, IDENTITY
    if factor is None:
        factor = torch.zeros(3, dy.shape[1]); factor[0] = 1
        codes = torch.zeros(tuple(dy.shape), dtype=torch.uint8)
    *packed, g = shortcut("norm_act_grad_pack")(dy, codes, _mask(*dy.shape) if saved is None else saved, factor, want_g,
                                             images, *packing)
    return packed, g if want_g else None
