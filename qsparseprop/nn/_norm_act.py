"""Batch normalisation, addition and activation as one function, with the convolution before them or without.

Two passes over the convolution's output do all that follows it: one for mean and variance, one that normalises, adds,
limits, saves, and packs for the next convolution. What is kept for the backward pass is the output of the convolution
in 8 bits and one bit an element for the activation; torch's modules keep both in floating point. The packed input of
the next convolution is kept only where it cannot be made again from these 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qsparseprop import norm_ops
from qsparseprop.geometry import Geometry
from qsparseprop.nn._handover import PackedInput, PackedSource, PackedTensor, hand_over, handed_over
from qsparseprop.nn.functional import (
    backward_pass,
    block_gradients,
    check_finite,
    forward_pass,
    output_packing,
    packed_backward_pass,
    packed_forward_pass,
    packed_gradient,
    refuse_forward_mode,
    value_gradient,
)
from qsparseprop.ops import check_storage, saved_tensors
from qsparseprop.pattern import Plan
from qsparseprop.quantization import QuantConfig


def _rows(x: Tensor) -> Tensor:
    """(pixels, channels) of an (images, channels, height, width) tensor, a view where it is channels_last."""
    check_storage(x, "x")
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def _images(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    # detached: torch lets nobody change a view in place that a function has made, as what follows a block may want to
    return rows.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2).detach()


@dataclass
class Convolution:
    """What of a sparse convolution the function needs besides its parameters."""

    plan: Plan
    qconfig: QuantConfig
    channels_last: bool  # whether the input is
    packed: PackedInput | None  # the input
    input: PackedInput | None = None  # what was packed here


@dataclass
class Settings:
    """What the function needs besides tensors."""

    dtype: torch.dtype
    batch_statistics: bool
    eps: float
    low: float
    high: float
    saves: bool  # whether there will be a backward pass
    consumer: tuple[Geometry, QuantConfig] | None  # of the convolution that reads the output
    keep: bool  # whether anybody else reads it
    convolution: Convolution | None = None
    output: PackedInput | None = None


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor | None,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        s: Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, packed, source = (x, (), None) if s.convolution is None else _convolved(x, values, bias, s)
        shape = tuple(z.shape)
        z = _rows(z)
        moments = None
        if s.batch_statistics or s.saves:
            moments = norm_ops.channel_moments(z)
        if s.batch_statistics:
            mean, variance = moments[:, 0], moments[:, 1] / z.shape[0]
        else:
            mean, variance = mean.double(), variance.double()
        rstd, scale, shift = affine(mean, variance, s.eps, gamma, beta)
        code_scale = code_shift = step = least = None
        if s.saves:
            least = moments[:, 2]
            step = (moments[:, 3] - least) / 255
            step = torch.where(step > 0, step, 1.0)
            code_scale, code_shift = (1 / step).float(), (-least / step - 128).float()
        add = None if residual is None else _rows(residual)
        arguments = (z, add, scale.float(), shift.float(), s.low, s.high, code_scale, code_shift)
        if s.consumer is None:
            y, codes, mask = norm_ops.norm_act(*arguments)
            y = _images(y, shape)
        else:
            y, codes, mask, ranges = _packed_output(s, arguments, shape, moments)
            if s.saves and add is None:  # z = code * step + least
                s.output.source = PackedSource(codes, (step * scale).float(), (least * scale + shift).float(), ranges,
                                               s.low, s.high, shape)
        ctx.mark_non_differentiable(mean, variance)
        if s.saves:
            kept: tuple[Tensor, ...] = ()  # of the convolution's input
            if ctx.needs_input_grad[1]:
                kept = packed if source is None else source.tensors
            # normalised = code * slope + offset
            ctx.save_for_backward(codes, mask, gamma, rstd, step * rstd, (least - mean) * rstd, values, *kept)
            ctx.settings, ctx.shape, ctx.x_shape, ctx.x_dtype = s, shape, x.shape, x.dtype
            ctx.limits = None if source is None else source.limits
            ctx.dtypes = [None if t is None else t.dtype for t in (bias, gamma, beta)]
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _NormAct._gradients(ctx, dy)
        return *block_gradients(gradients), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        refuse_forward_mode()

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        codes, mask, gamma, rstd, slope, offset, values, *kept = saved_tensors(ctx)
        s: Settings = ctx.settings
        conv = s.convolution
        if conv is not None and conv.qconfig.check_finite:
            check_finite(dy, "the gradient of the output")
        need = ctx.needs_input_grad
        bias_dtype, gamma_dtype, beta_dtype = ctx.dtypes
        check_storage(dy, "the gradient of the output")
        dy = _rows(dy.to(s.dtype))
        total, with_codes, greatest = norm_ops.norm_act_sums(dy, codes, mask).unbind(1)
        with_normalised = slope * with_codes + offset * total
        k = rstd if gamma is None else rstd * gamma
        factor = torch.zeros((3, k.shape[0]), dtype=torch.float64)
        factor[0] = k
        if s.batch_statistics:
            count = dy.shape[0]
            factor[1] = -k * slope * with_normalised / count
            factor[2] = -k * (total + offset * with_normalised) / count
        factor = factor.float()
        dx = dvalues = dbias = dresidual = None
        if conv is None and not need[0] and not need[5]:
            pass
        elif conv is None or need[2] or not packs_gradient(conv.qconfig, ctx.shape):
            dz, dresidual = norm_ops.norm_act_grad(dy, codes, mask, factor, need[5])
            dx = _images(dz, ctx.shape)
            if conv is not None:
                dx, dvalues, dbias = backward_pass(
                    dx, values, _packed(ctx, kept), conv.plan, conv.qconfig, ctx.x_shape, need[:3], ctx.x_dtype,
                    conv.channels_last,
                )  # fmt: skip
        else:
            # a bound in the order of the kernel's roundings: no element is larger
            rest = torch.stack([factor[2], 255 * factor[1] + factor[2]]).abs().amax(0)
            bound = greatest.float() * factor[0].abs() + rest + 0 * total.float()
            dz, dresidual = packed_gradient(dy, codes, mask, factor, need[5], ctx.shape, bound, conv.plan, conv.qconfig)
            dx, dvalues = packed_backward_pass(dz, values, _packed(ctx, kept), conv.plan, conv.qconfig, ctx.x_shape,
                                               ctx.shape, need[:2], ctx.x_dtype, conv.channels_last)
        return (
            dx if need[0] else None,
            value_gradient(dvalues, values) if need[1] else None,
            dbias.to(bias_dtype) if need[2] else None,
            with_normalised.to(gamma_dtype) if need[3] else None,
            total.to(beta_dtype) if need[4] else None,
            _images(dresidual, ctx.shape) if need[5] else None,
        )  # fmt: skip


def _convolved(
    x: Tensor, values: Tensor, bias: Tensor | None, s: Settings
) -> tuple[Tensor, tuple[Tensor, ...], PackedSource | None]:
    """The convolution's output, and its packed input with what that can be made of again."""
    conv = s.convolution
    if conv.qconfig.check_finite:
        check_finite(x, "the input")
        check_finite(values, "the weight")
    if conv.packed is not None:
        given, conv.packed = conv.packed, None
        z = packed_forward_pass(given.parts, x.shape[0], values, bias, conv.plan, conv.qconfig, s.dtype)
        return z, given.parts, given.source
    z, *packed = forward_pass(x, values, bias, conv.plan, conv.qconfig, s.dtype, True)
    if conv.qconfig.grad_weight == "int8":
        conv.input = PackedInput(*packed, conv.plan.geometry, conv.qconfig.input, conv.qconfig.granularity)
    return z, tuple(packed), None


def _packed(ctx: Any, kept: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The convolution's packed input in the backward pass; Nones where nobody needs it."""
    conv = ctx.settings.convolution
    if not kept:
        return None, None, None
    if ctx.limits is None:
        return tuple(kept)
    return PackedSource(*kept, *ctx.limits).pack(conv.plan.geometry, conv.qconfig)


def affine(
    mean: Tensor, variance: Tensor, eps: float, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation as 1 / std, and as ``x * scale + shift``; float64, (channels,)."""
    rstd = (variance + eps).rsqrt()
    scale = rstd if gamma is None else rstd * gamma
    return rstd, scale, -mean * scale if beta is None else beta - mean * scale


def _packed_output(
    s: Settings, arguments: tuple[Any, ...], shape: tuple[int, ...], moments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output for the consumer, codes and mask for the backward pass, and the ranges."""
    z, add, scale, shift, low, high, *_ = arguments
    if add is None and moments is not None:  # batch normalisation is monotone: its ends are those of its input
        ranges = moments[:, 2:].float() * scale[:, None] + shift[:, None]
        ranges = torch.stack([ranges.amin(1), ranges.amax(1)], 1).clamp(low, high)
    else:
        ranges = norm_ops.norm_act_range(z, add, scale, shift, low, high)
    geometry, qconfig = s.consumer
    ranges, *packing = output_packing(ranges, shape[0], geometry, qconfig)
    y, codes, mask, *packed = norm_ops.norm_act_pack(*arguments, shape, ranges, *packing, s.keep)
    s.output = PackedInput(*packed, geometry, qconfig.input, qconfig.granularity)
    y = _images(y, shape) if s.keep else PackedTensor(s.output, shape, s.dtype)
    return y, codes, mask, ranges


def packs_gradient(qconfig: QuantConfig, shape: Sequence[int]) -> bool:
    """Whether the gradient of an output of that shape can be packed while it is computed.

    Its scale must follow from its range.
    """
    return qconfig.grad != "dithered" and qconfig.grad_weight == "int8" and shape[1] > 1


def packs_input(qconfig: QuantConfig, geometry: Geometry) -> bool:
    """Whether a convolution's input can be packed while it is computed."""
    return (qconfig.input != "sawb" and qconfig.grad_weight == "int8" and geometry.in_channels > 1
            and geometry.covers_input)  # fmt: skip


def uses_batch_statistics(norm: nn.BatchNorm2d, shape: tuple[int, ...]) -> bool:
    """Whether a batch normalisation takes mean and variance from an input of that shape.

    Raises
    ------
    ValueError
        If it has one value per channel only.
    """
    if not norm.training and norm.running_mean is not None:
        return False
    if norm.training and shape[0] * math.prod(shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    return True


def norm_act(
    x: Tensor,
    norm: nn.BatchNorm2d,
    settings: Settings,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply a block and keep its batch normalisation's statistics.

    Parameters
    ----------
    x : Tensor
        (images, channels, height, width), of a dtype of the kernels.
    norm : torch.nn.BatchNorm2d
    settings : Settings
    residual : Tensor, optional
        Of the output's shape and dtype.
    weight, bias : Tensor, optional
        Of the convolution that the settings have.

    Returns
    -------
    Tensor
        Channels_last, of the settings' dtype, with its packed form attached where the settings name a consumer.
    """
    mean, variance = (None, None) if settings.batch_statistics else (norm.running_mean, norm.running_var)
    y, mean, variance = _NormAct.apply(x, weight, bias, norm.weight, norm.bias, residual, mean, variance, settings)
    if settings.output is not None:
        hand_over(y, settings.output)
    conv = settings.convolution
    if conv is not None:
        # not on a tensor that the user may keep; where there is one already it stays, so that recomputation under
        # checkpointing meets the same as the first time
        if conv.input is not None and x.grad_fn is not None and handed_over(x) is None:
            hand_over(x, conv.input)
        conv.input = None
    settings.output = None
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        _update_statistics(norm, mean, variance, y.numel() // y.shape[1])
    return y


@torch.no_grad()
def _update_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    norm.num_batches_tracked.add_(1)
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), share)
