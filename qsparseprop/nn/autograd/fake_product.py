"""A dense product that rounds as a quantised sparse one does, with its straight-through gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsparseprop import ops
from qsparseprop.layout.geometry import linear_geometry
from qsparseprop.nn._passes import check_finite
from qsparseprop.ops.schemes import symmetric_scale
from qsparseprop.quantization import QuantConfig, QuantizedTensor, quantize

#: Of an input and a dense weight.
DenseProduct = Callable[[Tensor, Tensor], Tensor]

_OPTION_NAMES = {"dithered": ("step",), "luq": ("levels",)}


def _quantized_input(x: Tensor, qconfig: QuantConfig) -> tuple[Tensor, Tensor]:
    """Codes minus zero point, as float32, and scales, (1,) or (channels,), of an (images, channels, ...) tensor."""
    options: dict[str, Any] = {}
    if qconfig.input == "sawb":
        options = {"constants": qconfig.sawb, "nonzeros": qconfig.sawb_nonzeros}
    if qconfig.input in ("absmax", "sawb"):
        options["unsigned"] = True
    dim = 1 if qconfig.granularity == "channel" else None
    q: QuantizedTensor = quantize(x, qconfig.input, dim=dim, **options)
    shape = (-1, *[1] * (x.ndim - 2))
    return q.codes.to(torch.float32) - q.zero_point.view(shape), q.scale


def _quantized_gradient(dy: Tensor, qconfig: QuantConfig) -> tuple[Tensor, Tensor]:
    """The same of a gradient; that of a linear layer by what packs it, since a feature's scale depends on others'."""
    last, scheme = dy.movedim(1, -1), qconfig.grad_scheme  # random numbers: channels are counted innermost
    if dy.shape[2:].numel() > 1:
        dim = -1 if qconfig.granularity == "channel" else None
        options: dict[str, Any] = dict(zip(_OPTION_NAMES.get(qconfig.grad, ()), qconfig.grad_options, strict=True))
        if qconfig.grad in ("absmax", "sawb"):
            options["unsigned"] = False
        q: QuantizedTensor = quantize(last, qconfig.grad, dim=dim, **options)
        return (q.codes.to(torch.float32) - q.zero_point).movedim(-1, 1), q.scale
    rows, channels = last.reshape(-1, dy.shape[1]), dy.shape[1]
    layout = linear_geometry(channels, channels).input_layout
    packed = ops.quantize_pack(rows, layout, scheme, ops.draw_seed() if scheme.random else None)
    assert packed.scale is not None
    images, *_, pitch, front, block = layout.numbers
    blocks = -(-len(rows) // images)
    lanes = packed.planes[: blocks * block].view(blocks, block)[:, : channels * pitch].view(blocks, channels, pitch)
    codes = lanes[:, :, front : front + images].transpose(1, 2).reshape(-1, channels)[: len(rows)]
    return (codes.to(torch.float32) - 128).view(last.shape).movedim(-1, 1), packed.scale


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


class FakeProduct(torch.autograd.Function):
    """``product(x, weight)`` of codes, whose gradients are products of codes, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, product: DenseProduct, layout: tuple[Tensor, ...],
                qconfig: QuantConfig) -> Tensor:  # fmt: skip
        """The product; `layout` says which weights share a scale: rows, planes, and the channels of the input."""
        rows, planes, x_channel = layout
        if qconfig.check_finite:
            check_finite(x, "the input")
            check_finite(weight, "the weight")
        clip = qconfig.weight_clip(weight[mask], weight.numel())
        codes, scale = _quantized_input(x, qconfig)
        factor = scale if scale.numel() == 1 else scale[x_channel]
        ctx.save_for_backward(weight, mask, codes, scale, rows, planes, x, clip)
        ctx.product, ctx.qconfig = product, qconfig
        return product(codes, _quantized_weight(weight, rows, factor, clip))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Of the input and the weight."""
        weight, mask, codes, scale, _, planes, x, clip = ctx.saved_tensors
        qconfig = ctx.qconfig
        if qconfig.check_finite:
            check_finite(dy, "the gradient of the output")
        g, dy_scale = _quantized_gradient(dy, qconfig)
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
