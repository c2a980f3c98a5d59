"""A sparse convolution with the batch normalisation, addition and activation that follow it, as one module.

Blocks compute in channels_last order. Two passes over the convolution's output do all that follows it: one for mean and
variance, one that normalises, adds, limits and saves. What is kept for the backward pass is the convolution's input
and output in 8 bits, and one bit an element for the activation; torch's modules keep both in floating point.

The modules hold the parameters of the convolution only. The batch normalisation stays a module of the model at its
own place, whose parameters, statistics and mode are used, so that a fused model has the state_dict of the unfused one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qsparseprop import norm_ops
from qsparseprop.geometry import Geometry, conv_geometry, prefer_batch_innermost
from qsparseprop.nn._conv import SparseConvNd
from qsparseprop.nn._handover import PackedInput, PackedTensor, hand_over, handed_over
from qsparseprop.nn.conv2d import QuantizedSparseConv2d
from qsparseprop.nn.functional import (
    NoSecondDerivative,
    backward_pass,
    check_finite,
    forward_pass,
    packed_backward_pass,
    packed_forward_pass,
    packed_gradient,
    packed_input,
)
from qsparseprop.ops import is_channels_last
from qsparseprop.pattern import Plan
from qsparseprop.quantization import QuantConfig


def _rows(x: Tensor) -> Tensor:
    """(pixels, channels) of an (images, channels, height, width) tensor, a view where it is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def _images(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return rows.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)


@dataclass
class _Settings:
    """What a block's function needs besides tensors."""

    plan: Plan
    qconfig: QuantConfig
    dtype: torch.dtype
    x_channels_last: bool
    batch_statistics: bool
    eps: float
    low: float
    high: float
    saves: bool  # whether there will be a backward pass
    packed: PackedInput | None  # of the input
    consumer: tuple[Geometry, QuantConfig] | None  # of the convolution that reads the output
    keep: bool  # whether anybody else reads it
    input: PackedInput | None = None  # what was packed here
    output: PackedInput | None = None


class _ConvNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        s: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if s.qconfig.check_finite:
            check_finite(x, "the input")
            check_finite(values, "the weight")
        if s.packed is None:
            z, *packed = forward_pass(x, values, bias, s.plan, s.qconfig, s.dtype, True)
            if s.qconfig.grad_weight == "int8":
                s.input = PackedInput(*packed, s.plan.geometry, s.qconfig.input, s.qconfig.granularity)
        else:
            packed, s.packed = s.packed.parts, None
            z = packed_forward_pass(packed, x.shape[0], values, bias, s.plan, s.qconfig, s.dtype)
        shape = tuple(z.shape)
        z = _rows(z)
        moments = None
        if s.batch_statistics or s.saves:
            moments = norm_ops.channel_moments(z)
        if s.batch_statistics:
            mean, variance = moments[:, 0], moments[:, 1] / z.shape[0]
        else:
            mean, variance = mean.double(), variance.double()
        rstd, scale, shift = _affine(mean, variance, s.eps, gamma, beta)
        code_scale = code_shift = None
        if s.saves:
            least = moments[:, 2]
            step = (moments[:, 3] - least) / 255
            step = torch.where(step > 0, step, 1.0)
            code_scale, code_shift = (1 / step).float(), (-least / step - 128).float()
        add = None if residual is None else _rows(residual.to(s.dtype))
        arguments = (z, add, scale.float(), shift.float(), s.low, s.high, code_scale, code_shift)
        if s.consumer is None:
            y, codes, mask = norm_ops.norm_act(*arguments)
            y = _images(y, shape)
        else:
            y, codes, mask = _packed_output(s, arguments, shape, moments)
        ctx.mark_non_differentiable(mean, variance)
        if s.saves:
            # normalised = code * slope + offset
            slope, offset = step * rstd, (least - mean) * rstd
            ctx.save_for_backward(values, *packed, codes, mask, gamma, rstd, slope, offset)
            ctx.settings, ctx.shape, ctx.x_shape, ctx.x_dtype = s, shape, x.shape, x.dtype
            ctx.dtypes = [None if t is None else t.dtype for t in (bias, gamma, beta, residual)]
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _ConvNormAct._gradients(ctx, dy)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = NoSecondDerivative.apply(dy, ctx.saved_tensors[0], *gradients)
        return *gradients, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError("sparse modules have no forward-mode derivatives: use reverse mode (backward), or "
                                  "the dense module that to_dense() gives")

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        values, planes, x_scale, x_zero, codes, mask, gamma, rstd, slope, offset = ctx.saved_tensors
        s: _Settings = ctx.settings
        if s.qconfig.check_finite:
            check_finite(dy, "the gradient of the output")
        need = ctx.needs_input_grad
        bias_dtype, gamma_dtype, beta_dtype, residual_dtype = ctx.dtypes
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
        packed = (planes, x_scale, x_zero)
        if need[2] or not _packs_gradient(s.qconfig, ctx.shape):
            dz, dresidual = norm_ops.norm_act_grad(dy, codes, mask, factor, need[5])
            dx, dvalues, dbias = backward_pass(
                _images(dz, ctx.shape), values, packed, s.plan, s.qconfig, ctx.x_shape, need[:3], ctx.x_dtype,
                s.x_channels_last,
            )  # fmt: skip
        else:
            dbias = None
            # a bound in the order of the kernel's roundings: no element is larger
            rest = torch.stack([factor[2], 255 * factor[1] + factor[2]]).abs().amax(0)
            bound = greatest.float() * factor[0].abs() + rest + 0 * total.float()
            dz, dresidual = packed_gradient(dy, codes, mask, factor, need[5], ctx.shape, bound, s.plan, s.qconfig)
            dx, dvalues = packed_backward_pass(dz, values, packed, s.plan, s.qconfig, ctx.x_shape, ctx.shape, need[:2],
                                               ctx.x_dtype, s.x_channels_last)
        return (
            dx if need[0] else None,
            dvalues.to(values.dtype) if need[1] else None,
            dbias.to(bias_dtype) if need[2] else None,
            with_normalised.to(gamma_dtype) if need[3] else None,
            total.to(beta_dtype) if need[4] else None,
            _images(dresidual, ctx.shape).to(residual_dtype) if need[5] else None,
        )  # fmt: skip


def _affine(
    mean: Tensor, variance: Tensor, eps: float, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation as 1 / std, and as ``x * scale + shift``; float64, (channels,)."""
    rstd = (variance + eps).rsqrt()
    scale = rstd if gamma is None else rstd * gamma
    return rstd, scale, -mean * scale if beta is None else beta - mean * scale


def _packed_output(
    s: _Settings, arguments: tuple[Any, ...], shape: tuple[int, ...], moments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The output for the consumer, and codes and mask for the backward pass."""
    z, add, scale, shift, low, high, *_ = arguments
    if add is None and moments is not None:  # batch normalisation is monotone: its ends are those of its input
        ranges = moments[:, 2:].float() * scale[:, None] + shift[:, None]
        ranges = torch.stack([ranges.amin(1), ranges.amax(1)], 1).clamp(low, high)
    else:
        ranges = norm_ops.norm_act_range(z, add, scale, shift, low, high)
    geometry, qconfig = s.consumer
    per_channel, grid = qconfig.granularity == "channel", geometry.input_grid
    if not per_channel:
        ranges = torch.stack([ranges[:, 0].amin(), ranges[:, 1].amax()])[None]
    y, codes, mask, *packed = norm_ops.norm_act_pack(
        *arguments, shape, ranges, grid.numbers, geometry.input_views, grid.lanes(shape[0]), qconfig.input, per_channel,
        s.keep,
    )  # fmt: skip
    s.output = PackedInput(*packed, geometry, qconfig.input, qconfig.granularity)
    return _images(y, shape) if s.keep else PackedTensor(s.output, shape, s.dtype), codes, mask


def _packs_gradient(qconfig: QuantConfig, shape: tuple[int, ...]) -> bool:
    """Whether the gradient can be packed while it is computed: its scale must follow from its range."""
    return qconfig.grad != "dithered" and qconfig.grad_weight == "int8" and shape[1] > 1


def _packs_input(qconfig: QuantConfig, geometry: Geometry) -> bool:
    """Whether a convolution's input can be packed while it is computed."""
    return (qconfig.input != "sawb" and qconfig.grad_weight == "int8" and geometry.in_channels > 1
            and geometry.covers_input)  # fmt: skip


class QuantizedSparseConvBn2d(QuantizedSparseConv2d):
    """A sparse convolution and the batch normalisation of its output.

    Made by `fuse`, or by ``swap_modules_with_sparse(model, ..., fuse=True)``.

    Attributes
    ----------
    norm : torch.nn.BatchNorm2d
        Not a submodule: it belongs to the model, see the module's description.
    low, high : float
        Limits of the activation.
    """

    low, high = -math.inf, math.inf
    #: The block whose convolution reads the output, and whether anybody else does; set where a model is fused.
    _consumer: tuple[QuantizedSparseConvBn2d | None, bool] = (None, True)

    @property
    def norm(self) -> nn.BatchNorm2d:
        """The batch normalisation."""
        return self._norm[0]

    @classmethod
    def fuse(cls, conv: QuantizedSparseConv2d, norm: nn.BatchNorm2d, high: float = math.inf) -> QuantizedSparseConvBn2d:
        """A block of a sparse convolution, which gives it its parameters, and a batch normalisation.

        Parameters
        ----------
        conv : QuantizedSparseConv2d
        norm : torch.nn.BatchNorm2d
            Of the same channels.
        high : float
            Upper limit of the activation: 6 for ReLU6.

        Raises
        ------
        TypeError
            For other modules.
        ValueError
            If the channels differ.
        """
        if type(conv) is not QuantizedSparseConv2d:
            raise TypeError(f"{cls.__name__}.fuse expects a QuantizedSparseConv2d, got {type(conv).__name__}")
        if type(norm) is not nn.BatchNorm2d:
            raise TypeError(f"{cls.__name__}.fuse expects a torch.nn.BatchNorm2d, got {type(norm).__name__}")
        if norm.num_features != conv.out_channels:
            raise ValueError(f"the batch normalisation has {norm.num_features} features, the convolution "
                             f"{conv.out_channels} channels")
        block = cls.__new__(cls)
        block.__dict__.update(conv.__dict__)
        block._norm = (norm,)  # in a tuple, so that it does not become a submodule
        if cls.low == 0:
            block.high = high
        return block

    def unfuse(self) -> QuantizedSparseConv2d:
        """The convolution alone, with the same parameters."""
        conv = QuantizedSparseConv2d.__new__(QuantizedSparseConv2d)
        conv.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("_norm", "high", "_consumer")})
        return conv

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply the block.

        Parameters
        ----------
        x : Tensor
            (images, in_channels, height, width), floating point, any strides.
        residual : Tensor, optional
            Of the output's shape, added before the activation; only of `QuantizedSparseConvBnAddReLU2d`.

        Returns
        -------
        Tensor
            (images, out_channels, out_height, out_width) of x's dtype, or autocast's where it is on, channels_last.

        Raises
        ------
        TypeError, ValueError
            As from the convolution and from torch.nn.BatchNorm2d; for a residual of another shape.
        """
        if torch.compiler.is_compiling() or x.ndim != 4 or x.numel() == 0 or 0 in self.weight_shape:
            return self._one_by_one(x, residual)
        self._check_input(x)
        if x.shape[1] != self.in_channels:
            return self._one_by_one(x, residual)  # which says what is wrong
        norm = self.norm
        batch = x.shape[0]
        geometry = self._geometry(batch, tuple(x.shape[2:]))
        packed = handed_over(x)
        if packed is not None and not packed.fits(geometry, self._qconfig):
            packed = None
        if packed is None and isinstance(x, PackedTensor):
            x = x.view_as(x)  # an ordinary tensor
        x, kernel_dtype, dtype = self._dtypes(x)
        shape = (batch, self.out_channels, *geometry.output_size)
        if residual is not None and tuple(residual.shape) != shape:
            raise ValueError(f"the residual must have shape {shape}, got {tuple(residual.shape)}")
        mean = variance = None
        batch_statistics = norm.training or norm.running_mean is None
        if not batch_statistics:
            mean, variance = norm.running_mean, norm.running_var
        elif batch * math.prod(geometry.output_size) == 1 and norm.training:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
        saves = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad
            for t in (x, self.weight, self.bias, norm.weight, norm.bias, residual)
        )  # fmt: skip
        if not saves and not batch_statistics and residual is None:
            y = self._folded(x, packed, geometry, kernel_dtype)
            return y if y.dtype == dtype else y.to(dtype)
        consumer, keep = self._consumer
        reader = None
        if consumer is not None and dtype == kernel_dtype:
            reader = consumer._geometry(batch, geometry.output_size)
            reader = (reader, consumer._qconfig) if _packs_input(consumer._qconfig, reader) else None
        settings = _Settings(
            self._plan(geometry, self.groups), self._qconfig, kernel_dtype, is_channels_last(x), batch_statistics,
            norm.eps, self.low, self.high, saves, packed, reader, keep,
        )  # fmt: skip
        y, mean, variance = _ConvNormAct.apply(x, self.weight, self.bias, norm.weight, norm.bias, residual, mean,
                                               variance, settings)
        if settings.output is not None:
            hand_over(y, settings.output)
        if settings.input is not None and x.grad_fn is not None:  # not on a tensor that the user may keep
            hand_over(x, settings.input)
        settings.input = settings.output = None
        if norm.training and norm.track_running_stats and norm.running_mean is not None:
            self._update_statistics(mean, variance, y.numel() // self.out_channels)
        return y if y.dtype == dtype else y.to(dtype)

    def _geometry(self, batch: int, size: tuple[int, int]) -> Geometry:
        """Where everything of the convolution lies for channels_last images of a size."""
        images_last = self.vectorizing_over_on
        if images_last is None:
            images_last = prefer_batch_innermost(batch, size, True)
        return conv_geometry(self.in_channels, self.out_channels, size, self.kernel_size, self.stride, self._pads,
                             self.dilation, batch, images_last)

    def _folded(self, x: Tensor, packed: PackedInput | None, geometry: Geometry, dtype: torch.dtype) -> Tensor:
        """Inference: batch normalisation in the scales and the bias of the product, the activation where it is written.

        One pass over the output in place of three.
        """
        norm, plan, qconfig = self.norm, self._plan(geometry, self.groups), self._qconfig
        if qconfig.check_finite:
            check_finite(x, "the input")
            check_finite(self.weight, "the weight")
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        _, scale, shift = _affine(mean, variance, norm.eps, norm.weight, norm.bias)
        if self.bias is not None:
            shift = shift + self.bias * scale
        parts = packed_input(x, plan, qconfig) if packed is None else packed.parts
        return packed_forward_pass(parts, x.shape[0], self.weight, shift.float(), plan, qconfig, dtype, scale.float(),
                                   (self.low, self.high))

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        norm = self.norm
        norm.num_batches_tracked.add_(1)
        share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), share)

    def _one_by_one(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = self.norm(SparseConvNd.forward(self, x))
        if residual is not None:
            y = y + residual
        return y if self.low == -math.inf else y.clamp(self.low, self.high)

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        activation = "" if self.low == -math.inf else f", activation=[{self.low:g}, {self.high:g}]"
        return super().extra_repr() + activation


class QuantizedSparseConvBnReLU2d(QuantizedSparseConvBn2d):
    """A sparse convolution, batch normalisation and ReLU (or ReLU6)."""

    low = 0.0


class QuantizedSparseConvBnAddReLU2d(QuantizedSparseConvBnReLU2d):
    """A sparse convolution, batch normalisation, the addition of a residual, and ReLU: the end of a residual block."""
