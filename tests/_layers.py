"""Convolutions of any number of dimensions, transposed or not: what they are drawn from and checked against."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from qsparseprop import nn as qnn
from qsparseprop import ops
from qsparseprop.nn._base import SparseModule
from qsparseprop.ops import reference
from qsparseprop.quantization import QuantConfig

from ._helpers import (
    FLOAT_SUM,
    ROUNDING,
    dequantized,
    dequantized_weight,
    generator,
    relative_error,
    set_weight,
    value_gradient,
)


@dataclass(frozen=True)
class LayerCase:
    """A convolution, its input's shape and the seed of all values."""

    kind: str
    channels: tuple[int, int]
    settings: dict
    shape: tuple[int, ...]
    hint: bool | None
    density: float
    seed: int

    def dense(self) -> nn.Module:
        return set_weight(getattr(nn, self.kind)(*self.channels, **self.settings), self.density, self.seed)

    def sparse(self, prefix: str, **settings) -> SparseModule:
        return getattr(qnn, f"{prefix}{self.kind}").from_dense(self.dense(), self.hint, **settings)


@st.composite
def layer_cases(draw: Callable, kinds: tuple[str, ...]) -> LayerCase:
    kind = draw(st.sampled_from(kinds))
    dims = int(kind[-2])

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, padding, dilation = each(1, 3), each(1, 3), each(0, 2), each(1, 2)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = tuple(groups * draw(st.sampled_from([1, 2, 3, 17])) for _ in range(2))
    settings = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
                "bias": draw(st.booleans())}  # fmt: skip
    if "Transpose" in kind:
        settings["output_padding"] = tuple(draw(st.integers(0, max(s, d) - 1))
                                           for s, d in zip(stride, dilation, strict=True))  # fmt: skip
        least = [max(1, -(-(2 * p - d * (k - 1) - e) // s) + 1) for p, d, k, e, s in
                 zip(padding, dilation, kernel, settings["output_padding"], stride, strict=True)]  # fmt: skip
    else:
        least = [max(1, d * (k - 1) + 1 - 2 * p) for p, d, k in zip(padding, dilation, kernel, strict=True)]
    size = tuple(n + draw(st.integers(0, 12 // dims)) for n in least)
    batch = draw(st.sampled_from([1, 2, 3, 17, 65] if math.prod(size) < 30 else [1, 2, 3]))
    return LayerCase(kind, channels, settings, (batch, channels[0], *size), draw(st.sampled_from([None, False, True])),
                     draw(st.sampled_from([0.0, 0.1, 0.4, 1.0])), draw(st.integers(0, 1000)))  # fmt: skip


def image(t: Tensor) -> Tensor:
    """A tensor as the kernels see it, of four dimensions."""
    if t.ndim < 4:
        return t[(...,) + (None,) * (4 - t.ndim)] if t.ndim == 2 else t.unsqueeze(2)
    return t.flatten(2, 3) if t.ndim == 5 else t


def run(layer: nn.Module, x: Tensor, dy: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Output and all gradients: of the input, of the weight, and of the bias."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    torch.manual_seed(seed)
    y.backward(dy)
    bias = None if layer.bias is None else layer.bias.grad.clone()
    return y.detach(), x.grad, value_gradient(layer).clone(), bias


def output_like(dense: nn.Module, x: Tensor, seed: int) -> Tensor:
    """A gradient for a layer's output."""
    return torch.randn(dense(x).shape, generator=generator(seed))


def check_float(case: LayerCase, x: Tensor) -> None:
    """Output and gradients are those of the dense layer in float64."""
    dense = case.dense()
    dy = output_like(dense, x, case.seed)
    actual = run(case.sparse("Sparse"), x, dy)
    wanted = run(copy.deepcopy(dense).double(), x.double(), dy.double())
    for a, w in zip(actual[:2], wanted[:2], strict=True):
        assert relative_error(a, w) < FLOAT_SUM
    assert relative_error(actual[2], wanted[2][dense.weight != 0]) < FLOAT_SUM
    _check_bias(actual[3], dy)


def _check_bias(actual: Tensor | None, dy: Tensor) -> None:
    if actual is not None:
        others = (0, *range(2, dy.ndim))
        magnitude = dy.double().abs().sum(others).max() if dy.numel() else 0
        assert (actual.double() - dy.double().sum(others)).abs().max() <= 5e-6 * magnitude


def _planes(dense: nn.Module) -> Tensor:
    """Number of the plane (channel and phase of the stride) that each weight reads on the side of the phases."""
    rows, per_group, *kernel = dense.weight.shape
    channel = torch.arange(rows)[:, None] // (rows // dense.groups) * per_group + torch.arange(per_group)
    number = channel.view(rows, per_group, *[1] * len(kernel))
    for i, (k, d, s) in enumerate(zip(kernel, dense.dilation, dense.stride, strict=True)):
        phase = (torch.arange(k) * d % s).view(-1, *[1] * (len(kernel) - 1 - i))
        number = number * s + phase
    return number.expand(dense.weight.shape)


def check_quantised(case: LayerCase, x: Tensor, qconfig: QuantConfig | None = None) -> None:
    """Output and gradients are those of the dense layer in float64 on what the codes stand for."""
    dense, qconfig = case.dense(), qconfig or QuantConfig()
    dy = output_like(dense, x, case.seed)
    actual = run(case.sparse("QuantizedSparse", qconfig=qconfig), x, dy, case.seed)
    torch.manual_seed(case.seed)
    drawn = ops.draw_seed() if qconfig.grad == "stochastic" else None
    per_channel = qconfig.granularity == "channel"
    transposed = "Transpose" in case.kind

    def codes(t: Tensor, scheme: str, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        values, scale = dequantized(image(t), scheme, seed, per_channel)
        return values.reshape(t.shape), scale

    xq, x_scale = codes(x, qconfig.input)
    dq, dy_scale = codes(dy, qconfig.grad.replace("absmax", "symmetric"), drawn)
    # the weight gradient of a transposed layer takes codes around 128
    xw = codes(x, "symmetric")[0] if transposed else xq
    weight = dense.weight.detach()
    one = [1] * (weight.ndim - 2)
    rows = torch.arange(weight.shape[0]).view(-1, 1, *one).expand(weight.shape)

    def by_column(scale: Tensor) -> Tensor:
        if not per_channel:
            return scale
        return scale.view(dense.groups, 1, -1, *one).expand(-1, weight.shape[0] // dense.groups, *[-1] * (1 + len(one)),
                                                            ).flatten(0, 1)  # fmt: skip

    def by_row(scale: Tensor) -> Tensor:
        return scale.view(-1, 1, *one)

    if transposed:
        forward = dequantized_weight(weight, _planes(dense), by_row(x_scale))
        backward = dequantized_weight(weight, rows, by_column(dy_scale))
    else:
        forward = dequantized_weight(weight, rows, by_column(x_scale))
        backward = dequantized_weight(weight, _planes(dense), by_row(dy_scale))
    double = copy.deepcopy(dense).double()

    def passes(operand: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        double.weight = nn.Parameter(weight)
        operand = operand.clone().requires_grad_()
        y = double(operand)
        return y.detach(), *torch.autograd.grad(y, (operand, double.weight), dq)

    y, _, _ = passes(xq, forward)
    _, dx, _ = passes(xq, backward)
    _, _, dw = passes(xw, forward)
    sizes = [t.abs().sum().item() for t in (xq, weight.double(), dq)]
    assert relative_error(actual[0], y, sizes[0] * sizes[1]) < ROUNDING
    assert relative_error(actual[1], dx, sizes[1] * sizes[2]) < ROUNDING
    assert relative_error(actual[2], dw[weight != 0], sizes[0] * sizes[2]) < ROUNDING
    _check_bias(actual[3], dy)


def check_reference(layer: SparseModule, dense: nn.Module, x: Tensor, plan) -> None:
    """A quantised layer gives the bits of `qsparseprop.ops.reference` for its lists, with one thread and with two."""
    g, config = plan.geometry, layer.qconfig
    dy = output_like(dense, x, 1)
    values = layer.weight.detach()
    rows, columns = (plan.backward, plan.forward) if g.transposed else (plan.forward, plan.backward)

    def packed(t: Tensor, layout: ops.PlaneLayout, scheme: str, seed: Tensor | None = None) -> ops.Packed:
        return reference.quantize_pack(image(t), layout, ops.Scheme(scheme, (), True), seed)

    def product(operand: ops.Packed, lists: ops.GatherList, bias: Tensor | None, images: int) -> Tensor:
        weights = reference.quantize_weight(values, lists, *operand[1:])
        if bias is not None:
            bias = bias.repeat(lists.rows // len(bias))
        return reference.spmm(ops.Packed(operand.planes), weights, lists, images, bias)

    torch.manual_seed(0)
    dy_codes = packed(dy, columns.source, config.grad, ops.draw_seed())
    x_codes = packed(x, rows.source, config.input)
    if g.transposed:  # taps read the front of their own plane
        grid = g.output_grid
        x_codes[0].as_strided((-(-len(x) // grid.images), grid.planes, grid.front), (grid.block, grid.pitch, 1)).copy_(
            x_codes[2].view(-1, 1))  # fmt: skip
    y = product(x_codes, rows, layer.bias, len(x)).view(dy.shape)
    dx = product(dy_codes, columns, None, len(x)).view(x.shape)
    inner, outer = (dy_codes, packed(x, rows.source, "symmetric")) if g.transposed else (x_codes, dy_codes)
    dw = reference.sddmm(inner, outer, plan.forward, len(x), len(values))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for actual, wanted in zip(run(layer, x, dy), (y, dx, dw), strict=False):
            assert torch.equal(actual, wanted.detach())
