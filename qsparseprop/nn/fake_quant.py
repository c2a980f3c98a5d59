"""Dense layers that simulate the quantised sparse ones: to try a scheme out, or to check a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qsparseprop.nn._dense import dense_bias, dense_weight, held, trains_weight
from qsparseprop.nn.functional import check_finite
from qsparseprop.ops.schemes import symmetric_scale
from qsparseprop.quantization import QuantConfig, QuantizedTensor, quantize

__all__ = ["FakeQuantConv2d", "FakeQuantLinear"]

_Product = Callable[[Tensor, Tensor], Tensor]

_OPTION_NAMES = {"dithered": ("step",), "luq": ("levels",)}


def _quantized(x: Tensor, scheme: str, qconfig: QuantConfig, gradient: bool) -> tuple[Tensor, Tensor]:
    """Codes minus zero point, as float32, and scales, (1,) or (channels,), of an (images, channels, ...) tensor."""
    options: dict[str, Any] = {}
    if scheme == "sawb":
        options = {"constants": qconfig.sawb, "nonzeros": qconfig.sawb_nonzeros}
    elif gradient:
        options = dict(zip(_OPTION_NAMES.get(scheme, ()), qconfig.grad_options, strict=True))
    if scheme in ("absmax", "sawb"):
        options["unsigned"] = not gradient
    last = x.movedim(1, -1)  # random numbers belong to elements counted with channels innermost
    q: QuantizedTensor = quantize(last, scheme, dim=-1 if qconfig.granularity == "channel" else None, **options)
    return (q.codes.to(torch.float32) - q.zero_point).movedim(-1, 1), q.scale


def _quantized_weight(weight: Tensor, group: Tensor, factor: Tensor, clip: Tensor | None) -> Tensor:
    """Weight times `factor` after quantisation with one scale for every number in `group`."""
    if factor.numel() == 1:  # a factor of the result
        common, values = factor.reshape(()), weight.reshape(-1)
    else:
        finite = factor[torch.isfinite(factor)]
        common = torch.ldexp(torch.ones(()), torch.frexp(finite.max() if finite.numel() else torch.ones(())).exponent)
        values = (weight * (factor / common)).reshape(-1)
    index = group.expand(weight.shape).reshape(-1)
    absmax = torch.zeros(int(group.max()) + 1).scatter_reduce(0, index, values.abs(), "amax")
    scale = symmetric_scale(absmax if clip is None else clip.expand_as(absmax), 127)
    codes = (values * (1 / scale)[index]).round().clamp(-127, 127)
    return (codes * (scale * common)[index]).view(weight.shape)


class _FakeProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, product: _Product, layout: tuple[Tensor, ...],
                qconfig: QuantConfig) -> Tensor:  # fmt: skip
        rows, planes, x_channel = layout
        if qconfig.check_finite:
            check_finite(x, "the input")
            check_finite(weight, "the weight")
        clip = qconfig.weight_clip(weight[mask], weight.numel())
        codes, scale = _quantized(x, qconfig.input, qconfig, False)
        factor = scale if scale.numel() == 1 else scale[x_channel]
        ctx.save_for_backward(weight, mask, codes, scale, rows, planes, x, clip)
        ctx.product, ctx.qconfig = product, qconfig
        return product(codes, _quantized_weight(weight, rows, factor, clip))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask, codes, scale, _, planes, x, clip = ctx.saved_tensors
        qconfig = ctx.qconfig
        if qconfig.check_finite:
            check_finite(dy, "the gradient of the output")
        g, dy_scale = _quantized(dy, qconfig.grad, qconfig, True)
        factor = dy_scale.view(-1, *[1] * (weight.ndim - 1))
        dx = dweight = None
        with torch.enable_grad():
            if ctx.needs_input_grad[0]:
                operand = torch.zeros_like(codes).requires_grad_()
                y = ctx.product(operand, _quantized_weight(weight, planes, factor, clip))
                (dx,) = torch.autograd.grad(y, operand, g)
            if ctx.needs_input_grad[1]:
                operand = torch.zeros_like(weight).requires_grad_()
                if qconfig.grad_weight == "float32":
                    (dweight,) = torch.autograd.grad(ctx.product(x, operand), operand, dy)
                else:
                    shape = (-1, *[1] * (codes.ndim - 2))
                    values = codes * scale.view(shape)
                    (dweight,) = torch.autograd.grad(ctx.product(values, operand), operand, g * dy_scale.view(shape))
                dweight = dweight * mask
        return dx, dweight, None, None, None, None


class _FakeQuant(nn.Module):
    """What both layers share; `weight` is dense, `mask` says which entries exist."""

    weight: Tensor
    mask: Tensor
    qconfig: QuantConfig

    def _take_over(self, dense: nn.Module, qconfig: QuantConfig | None) -> None:
        if qconfig is not None and not isinstance(qconfig, QuantConfig):
            raise TypeError(f"qconfig must be a QuantConfig, got {type(qconfig).__name__}")
        weight, mask = dense_weight(dense)
        bias = dense_bias(dense)
        self.weight = nn.Parameter(weight.clone(), trains_weight(dense))
        if bias is not None:
            self.register_parameter("bias", nn.Parameter(bias[0].clone(), bias[1]))
        self.register_buffer("mask", mask.clone())
        self.qconfig = QuantConfig() if qconfig is None else qconfig
        self.train(dense.training)

    def _simulate(self, x: Tensor, product: _Product, layout: tuple[Tensor, ...]) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        with torch.autocast("cpu", enabled=False):
            weight = self.weight.to(torch.float32) * self.mask
            y = _FakeProduct.apply(x.to(torch.float32), weight, self.mask, product, layout, self.qconfig)
            bias: Tensor | None = held(self, "bias")
            if bias is not None:
                y = y + bias.to(torch.float32).view(-1, *[1] * (y.ndim - 2))
        return y.to(dtype)


class FakeQuantLinear(_FakeQuant, nn.Linear):
    """Dense layer that computes what `QuantizedSparseLinear` does, in float32, with straight-through gradients.

    Outputs and gradients equal those of the real layer with the same `QuantConfig` and seed, up to float32 rounding.

    Attributes
    ----------
    weight : Parameter
        (out_features, in_features), dense; what is not in the mask has no effect and no gradient.
    mask : Tensor
        bool, of the weight's shape.
    qconfig : QuantConfig
    """

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, qconfig: QuantConfig | None = None) -> FakeQuantLinear:
        """Copy a dense layer, with zeros in its weight or pruned by torch.nn.utils.prune.

        Parameters
        ----------
        linear : torch.nn.Linear
            Not changed.
        qconfig : QuantConfig, optional

        Returns
        -------
        FakeQuantLinear
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{cls.__name__}.from_dense expects torch.nn.Linear, got {type(linear).__qualname__}")
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer._take_over(linear, qconfig)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features).

        Parameters
        ----------
        x : Tensor

        Returns
        -------
        Tensor
            Of x's dtype, or autocast's.
        """
        rows = x.reshape(-1, self.in_features)
        inputs = torch.arange(self.in_features)
        layout = (torch.arange(self.out_features)[:, None], inputs[None, :], inputs)
        return self._simulate(rows, F.linear, layout).view(*x.shape[:-1], self.out_features)


class FakeQuantConv2d(_FakeQuant, nn.Conv2d):
    """Dense convolution that computes what `QuantizedSparseConv2d` does, in float32, with straight-through gradients.

    See `FakeQuantLinear`.
    """

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, vectorizing_over_on: bool | None = None, *, qconfig: QuantConfig | None = None
    ) -> FakeQuantConv2d:
        """Copy a dense convolution; `vectorizing_over_on` is there to be as `QuantizedSparseConv2d.from_dense`.

        Parameters
        ----------
        conv : torch.nn.Conv2d
            Not changed; with zeros in its weight or pruned by torch.nn.utils.prune.
        vectorizing_over_on : bool, optional
            Without effect.
        qconfig : QuantConfig, optional

        Returns
        -------
        FakeQuantConv2d
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"{cls.__name__}.from_dense expects torch.nn.Conv2d, got {type(conv).__qualname__}")
        if conv.padding_mode != "zeros":
            raise NotImplementedError(f"{cls.__name__} pads with zeros; padding_mode={conv.padding_mode!r} is not "
                                      "supported")
        make: Callable[..., FakeQuantConv2d] = cls  # torch types sizes that it takes and sizes that it has otherwise
        layer = make(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                     conv.groups, conv.bias is not None, device="meta")  # fmt: skip
        layer._take_over(conv, qconfig)
        return layer

    def _layout(self) -> tuple[Tensor, Tensor, Tensor]:
        """Groups of weights that share a scale: rows, and input planes (channel and phase of the stride)."""
        per_group = self.in_channels // self.groups
        row = torch.arange(self.out_channels)
        first = row // (self.out_channels // self.groups) * per_group
        channel = (first[:, None] + torch.arange(per_group))[:, :, None, None]
        y, x = (torch.arange(k) * d % s for k, d, s in zip(self.kernel_size, self.dilation, self.stride, strict=True))
        phase = y[:, None] * self.stride[1] + x
        return row[:, None, None, None], channel * math.prod(self.stride) + phase, channel

    def forward(self, x: Tensor) -> Tensor:
        """(images, in_channels, height, width), or without images.

        Parameters
        ----------
        x : Tensor

        Returns
        -------
        Tensor
            (images, out_channels, out_height, out_width), or without images; of x's dtype, or autocast's.
        """
        images = x if x.ndim == 4 else x[None]

        def product(a: Tensor, b: Tensor) -> Tensor:
            return F.conv2d(a, b, None, self.stride, self.padding, self.dilation, self.groups)

        y = self._simulate(images, product, self._layout())
        return y if x.ndim == 4 else y[0]
