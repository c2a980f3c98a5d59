"""The one function behind every sparse module, with its gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsparseprop import ops
from qsparseprop.pattern import Plan
from qsparseprop.quantization import QuantConfig


def _check_finite(tensor: Tensor, name: str) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} has NaN or Inf (check_finite is on)")


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, values: Tensor, bias: Tensor | None, plan: Plan, qconfig: QuantConfig | None, dtype: torch.dtype
    ) -> Tensor:
        g = plan.geometry
        if qconfig is not None and qconfig.check_finite:
            _check_finite(x, "the input")
            _check_finite(values, "the weight")
        out, *packed = ops.layer_forward(
            x, values, bias, plan.forward, g.input_grid.numbers, g.input_views, g.output_views,
            (x.shape[0], g.output_grid.planes, *g.output_size), None if qconfig is None else qconfig.input, None,
            dtype, qconfig is not None and qconfig.granularity == "channel",
        )  # fmt: skip
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(values, *packed)
        elif ctx.needs_input_grad[0]:
            ctx.save_for_backward(values, None, None, None)
        ctx.plan, ctx.qconfig = plan, qconfig
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        plan, qconfig, g = ctx.plan, ctx.qconfig, ctx.plan.geometry
        grads = ctx.needs_input_grad[:3]
        if qconfig is not None and qconfig.check_finite:
            _check_finite(dy, "the gradient of the output")
        if not (grads[0] or grads[1]):
            return None, None, dy.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype), None, None, None
        values, planes, x_scale, x_zero_point = ctx.saved_tensors
        if dy.dtype not in (torch.float32, torch.bfloat16):
            dy = dy.to(torch.float32)
        scheme = None if qconfig is None else qconfig.grad
        dx, dvalues, dbias = ops.layer_backward(
            dy, values, planes, x_scale, x_zero_point, plan.forward, plan.backward, g.input_grid.numbers,
            g.output_grid.numbers, g.input_views, g.output_views, ctx.x_shape, g.covers_input, scheme,
            ops.draw_seed() if scheme == "stochastic" else None, grads, ctx.x_dtype,
            qconfig is not None and qconfig.granularity == "channel",
        )  # fmt: skip
        return (
            dx if grads[0] else None,
            dvalues.to(values.dtype) if grads[1] else None,
            dbias.to(ctx.bias_dtype) if grads[2] else None,
            None,
            None,
            None,
        )


def sparse_product(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    plan: Plan,
    qconfig: QuantConfig | None = None,
    dtype: torch.dtype | None = None,
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
    dtype : torch.dtype, optional
        Of the result, float32 or bfloat16; x's without one.

    Returns
    -------
    Tensor
        (images, out_channels, out_height, out_width); channels_last where x is. Differentiable once with respect to
        `x`, `values` and `bias`.
    """
    return _SparseProduct.apply(x, values, bias, plan, qconfig, x.dtype if dtype is None else dtype)
