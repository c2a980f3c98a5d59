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
from qsparseprop.nn._norm_act import affine as _affine
from qsparseprop.nn.functional import gradient_packing, output_packing
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


def statistics(z, weight, bias, running_mean, running_var, momentum, eps, training, save):
    count = z.shape[0]
    moments = norm_ops.channel_moments(z) if training or save else None
    if training:
        mean, var = moments[:, 0], moments[:, 1] / count
        if running_mean is not None:
            running_mean.mul_(1 - momentum).add_(mean.float(), alpha=momentum)
            running_var.mul_(1 - momentum).add_((var * (count / (count - 1))).float(), alpha=momentum)
    else:
        mean, var = running_mean.double(), running_var.double()
    rstd, scale, shift = _affine(mean, var, eps, weight, bias)
    nan = torch.full_like(mean, float("nan"))
    step = least = slope = offset = code_scale = code_shift = low = high = nan
    if moments is not None:
        least = moments[:, 2]
        step = (moments[:, 3] - least) / 255
        step = torch.where(step > 0, step, 1.0)
        code_scale, code_shift = 1 / step, -least / step - 128
        slope, offset = step * rstd, (least - mean) * rstd
        a, b = least * scale + shift, moments[:, 3] * scale + shift
        low, high = torch.minimum(a, b), torch.maximum(a, b)
    return (torch.stack([scale, shift, code_scale, code_shift, low, high]).float(),
            torch.stack([mean, var, rstd, slope, offset, step, least]))


def factors(sums, stats, weight, count, batch_statistics):
    total, with_codes, greatest = sums.unbind(1)
    mean, var, rstd, slope, offset, step, least = stats
    with_normalised = slope * with_codes + offset * total
    k = rstd if weight is None else rstd * weight
    factor = torch.zeros((3, k.shape[0]), dtype=torch.float64)
    factor[0] = k
    dsum = k * total
    if batch_statistics:
        factor[1] = -k * slope * with_normalised / count
        factor[2] = -k * (total + offset * with_normalised) / count
        dsum = torch.zeros_like(k)
    factor = factor.float()
    rest = torch.stack([factor[2], 255 * factor[1] + factor[2]]).abs().amax(0)
    bound = greatest.float() * factor[0].abs() + rest + 0 * total.float()
    return torch.cat([factor, bound[None]]), torch.stack([with_normalised, total, dsum])


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
        return norm_ops.norm_act_range(rows, None, scale, shift, low, high)
    from qsparseprop.nn._linear_act import output_range as r
    if scale is not None:
        rows = apply(rows, None, scale, shift, IDENTITY, None, None, None)
    return r(rows, _act_name(activation))


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
    return norm_ops.norm_act_pack(codes, None, scale, shift, *_limits(activation), None, None, images, ranges,
                                  grid.numbers, geometry.input_views, grid.lanes(images[0]), qconfig.input,
                                  qconfig.granularity == "channel", False)[3:]


def _mask(rows, channels):
    return torch.full((rows, -(-channels // 16)), -1, dtype=torch.int16)


def sums(dy, codes, saved, activation) -> Tensor:
    """Of each channel the sums of g and g * code and the greatest magnitude of g, float64, (channels, 3)."""
    if codes is None and activation.name != "identity":
        s = activation_ops.act_sums(dy, saved, _act_name(activation))
        return torch.stack([s[:, 0], 0 * s[:, 0], s[:, 1]], 1)
    if codes is None:
        codes = torch.zeros(tuple(dy.shape), dtype=torch.uint8)
    if activation.name not in ("identity", "clamp"):
        dy, saved, activation = activation_ops.act_grad(dy, saved, _act_name(activation)), None, IDENTITY
    return norm_ops.norm_act_sums(dy, codes, _mask(*dy.shape) if saved is None else saved)


def gradient(dy, codes, saved, activation, factor) -> Tensor:
    if factor is None:
        if activation.name == "identity":
            return dy
        if activation.name == "clamp":
            return activation_ops.act_grad(dy, saved, "relu")
        return activation_ops.act_grad(dy, saved, _act_name(activation))
    if activation.name not in ("identity", "clamp"):
        dy, saved, activation = activation_ops.act_grad(dy, saved, _act_name(activation)), None, IDENTITY
    return norm_ops.norm_act_grad(dy, codes, _mask(*dy.shape) if saved is None else saved, factor, False)[0]


def gradient_pack(dy, codes, saved, activation, factor, want_g, images, bound, geometry, qconfig):
    """`gradient`, packed: (planes, scale, zero point), and g where it is wanted."""
    packing = gradient_packing(bound, images[0], geometry, qconfig)
    if factor is None and activation.name != "identity":
        return activation_ops.act_grad_pack(dy, saved, _act_name(activation), images, *packing), None
    if activation.name not in ("identity", "clamp"):
        dy, saved, activation = activation_ops.act_grad(dy, saved, _act_name(activation)), None, IDENTITY
    if factor is None:
        factor = torch.zeros(3, dy.shape[1]); factor[0] = 1
        codes = torch.zeros(tuple(dy.shape), dtype=torch.uint8)
    *packed, g = norm_ops.norm_act_grad_pack(dy, codes, _mask(*dy.shape) if saved is None else saved, factor, want_g,
                                             images, *packing)
    return packed, g if want_g else None
