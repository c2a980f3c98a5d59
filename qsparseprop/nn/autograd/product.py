"""The product of a sparse module as a node of autograd."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from qsparseprop import ops
from qsparseprop.nn._passes import as_dtype, check_finite, value_gradient
from qsparseprop.nn._product import ProductCall, multiply, product_gradients
from qsparseprop.nn._values import plain
from qsparseprop.nn.autograd.graph import NoSecondDerivative, without_graph


class SparseProduct(torch.autograd.Function):
    """``weight @ x + bias``; what is saved is the weight, and the packed input where the weight is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: ProductCall) -> Tensor:
        """See `functional.sparse_product`."""
        needs_x, needs_values, *_ = ctx.needs_input_grad
        out, packed = multiply(x, bias, call, needs_values)
        if packed is not None:
            ctx.save_for_backward(weight, *packed)
        elif needs_x:
            ctx.save_for_backward(weight)
        ctx.call, ctx.x_shape, ctx.out_shape = call, x.shape, out.shape
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return call.shaped(out)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of the input, the weight and the bias."""
        if dy is None:  # as torch's layers: no gradient, rather than zeros, which optimizers would step by
            return None, None, None, None
        qconfig, grads = ctx.call.qconfig, ctx.needs_input_grad[:3]
        if qconfig is not None and qconfig.check_finite:
            check_finite(dy, "the gradient of the output")
        gradients: tuple[Tensor | None, ...]
        weight = None
        again = torch.is_grad_enabled()  # create_graph=True
        if grads[0] or grads[1]:
            weight, *packed = ctx.saved_tensors
            values = plain(weight)
            with without_graph():
                images = dy
                if dy.shape != ctx.out_shape:
                    ops.check_storage(dy, "the gradient of the output")  # before it may be copied
                    images = dy.reshape(ctx.out_shape)
                dx, dvalues, dbias = product_gradients(images, values, ops.Packed(*packed) if packed else None,
                                                       ctx.call, grads, ctx.x_shape, ctx.x_dtype)  # fmt: skip
            gradients = dx, value_gradient(dvalues, values), as_dtype(dbias, ctx.bias_dtype)
        else:
            ops.check_storage(dy, "the gradient of the output")
            dbias = ops.bias_gradient(dy.detach().reshape(ctx.out_shape))
            gradients = None, None, as_dtype(dbias, ctx.bias_dtype)
        if again:
            gradients = NoSecondDerivative.apply(dy, weight, *gradients)  # with its graph, which plain() cuts off
        return *gradients, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        """Refuse."""
        raise NotImplementedError("sparse modules have no forward-mode derivatives: use reverse mode (backward), or "
                                  "the dense module that to_dense() gives")
