"""The one function behind every sparse module, with its gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsparseprop import ops
from qsparseprop.pattern import GatherList, Plan
from qsparseprop.quantization import QuantConfig

#: A packed operand: planes, scale and zero point; the latter two are None for float planes.
Packed = tuple[Tensor, Tensor | None, Tensor | None]


def _pack(x: Tensor, grid, views, scheme: str | None) -> Packed:
    lanes = grid.lanes(x.shape[0])
    if scheme is None:
        return ops.pack(x, grid.numbers, views, lanes), None, None
    seed = ops.draw_seed() if scheme == "stochastic" else None
    return ops.quantize_pack(x, grid.numbers, views, lanes, scheme, seed)


def _weights(values: Tensor, rows: GatherList, quantized: bool) -> Packed:
    if quantized:
        return ops.quantize_weight(values, rows.index, rows.group_ptr)
    return torch.cat([values, values.new_zeros(1)])[rows.index], None, None  # index -1 is the zero


def _check_finite(tensor: Tensor, name: str) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} has NaN or Inf (check_finite is on)")


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, values: Tensor, bias: Tensor | None, plan: Plan, qconfig: QuantConfig | None
    ) -> Tensor:
        g = plan.geometry
        master = values.detach().to(torch.float32)
        if qconfig is not None and qconfig.check_finite:
            _check_finite(x, "the input")
            _check_finite(master, "the weight")
        packed = _pack(x, g.input_grid, g.input_views, qconfig and qconfig.input)
        weights, scale, total = _weights(master, plan.forward, qconfig is not None)
        channels_last = x.ndim == 4 and x.stride(1) == 1 and not x.is_contiguous()
        out = ops.spmm(
            packed[0], weights, plan.forward.group_ptr, plan.forward.offset, scale, total, packed[1], packed[2],
            None if bias is None else bias.detach().to(torch.float32), g.input_grid.numbers, g.output_views,
            (x.shape[0], g.output_grid.planes, *g.output_size), channels_last, False,
        )  # fmt: skip
        x_grad, values_grad, _ = ctx.needs_input_grad[:3]
        ctx.save_for_backward(values if x_grad else None, *(packed if values_grad else (None, None, None)))
        ctx.plan, ctx.qconfig = plan, qconfig
        ctx.x_shape, ctx.x_dtype, ctx.values_shape, ctx.values_dtype = x.shape, x.dtype, values.shape, values.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        values, planes, x_scale, x_zero_point = ctx.saved_tensors
        plan, qconfig, g = ctx.plan, ctx.qconfig, ctx.plan.geometry
        x_grad, values_grad, bias_grad = ctx.needs_input_grad[:3]
        dx = dvalues = dbias = None
        if qconfig is not None and qconfig.check_finite:
            _check_finite(dy, "the gradient of the output")
        if dy.dtype not in (torch.float32, torch.bfloat16):
            dy = dy.to(torch.float32)
        if x_grad or values_grad:
            packed, dy_scale, dy_zero_point = _pack(dy, g.output_grid, g.output_views, qconfig and qconfig.grad)
        if x_grad:
            rows = plan.backward
            weights, scale, total = _weights(values.detach().to(torch.float32), rows, qconfig is not None)
            channels_last = dy.stride(1) == 1 and not dy.is_contiguous()
            dx = ops.spmm(
                packed, weights, rows.group_ptr, rows.offset, scale, total, dy_scale, dy_zero_point, None,
                g.output_grid.numbers, g.input_views, ctx.x_shape, channels_last, not g.covers_input,
            ).to(ctx.x_dtype)  # fmt: skip
        if values_grad:
            rows = plan.forward
            dvalues = ops.sddmm(
                planes, packed, rows.group_ptr, rows.offset, rows.index, rows.plane, x_scale, x_zero_point, dy_scale,
                g.input_grid.numbers, g.output_grid.numbers, g.output_views, dy.shape, ctx.values_shape[0],
            ).to(ctx.values_dtype)  # fmt: skip
        if bias_grad:
            dbias = dy.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dvalues, dbias, None, None


def sparse_product(
    x: Tensor, values: Tensor, bias: Tensor | None, plan: Plan, qconfig: QuantConfig | None = None
) -> Tensor:
    """Product of a sparse weight with an input, as a convolution whose geometry is in the plan.

    Parameters
    ----------
    x : Tensor
        (images, channels, height, width), float32 or bfloat16, any strides.
    values : Tensor
        (nonzeros,) in the order of the pattern that the plan was made of.
    bias : Tensor, optional
        (out_channels,).
    plan : Plan
    qconfig : QuantConfig, optional
        Without one the computation is in float32.

    Returns
    -------
    Tensor
        (images, out_channels, out_height, out_width) in x's dtype; channels_last where x is. Differentiable once with
        respect to `x`, `values` and `bias`.
    """
    return _SparseProduct.apply(x, values, bias, plan, qconfig)
