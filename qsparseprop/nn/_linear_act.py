"""A sparse linear layer and the activation behind it as one function.

One pass over the product finds its range, a second one activates, saves and packs for the linear layer that reads the
result. What is kept of the activation for the backward pass is one bit an element (ReLU) or its slope in 8 bits (GELU);
torch keeps its input, or its result, in floating point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qsparseprop import activation_ops
from qsparseprop.geometry import Geometry
from qsparseprop.nn._handover import PackedInput, PackedTensor, hand_over
from qsparseprop.nn._norm_act import packs_gradient
from qsparseprop.nn.functional import (
    backward_pass,
    block_gradients,
    check_finite,
    forward_pass,
    gradient_packing,
    output_packing,
    packed_backward_pass,
    packed_forward_pass,
    refuse_forward_mode,
    value_gradient,
)
from qsparseprop.ops import check_storage, saved_tensors
from qsparseprop.pattern import Plan
from qsparseprop.quantization import QuantConfig

#: The activations by torch; None is no activation.
FUNCTIONS = {
    None: lambda x: x,
    "relu": torch.relu,
    "relu6": functional.relu6,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}

#: Where GELU is least.
_LEAST_AT = {"gelu": -0.7517916, "gelu_tanh": -0.7524614}


@dataclass
class Settings:
    """What the function needs besides tensors."""

    activation: str | None
    plan: Plan
    qconfig: QuantConfig
    dtype: torch.dtype
    saves: bool  # whether there will be a backward pass
    packed: PackedInput | None  # the input
    consumer: tuple[Geometry, QuantConfig] | None  # of the layer that reads the output
    keep: bool  # whether anybody else reads it
    output: PackedInput | None = None


def output_range(x: Tensor, activation: str) -> Tensor:
    """Bounds of what an activation gives for each channel, found from the range of its input.

    Parameters
    ----------
    x : Tensor
        (rows, channels), float32 or bfloat16, contiguous, with at least one row.
    activation : str

    Returns
    -------
    Tensor
        float32, (channels, 2): least and greatest; NaN where an element is not finite.
    """
    ends = activation_ops.act_range(x, activation)
    if activation not in _LEAST_AT:
        return ends
    # it falls up to there and rises behind
    function, least_at = FUNCTIONS[activation], torch.full_like(ends[:, 0], _LEAST_AT[activation])
    least = function(ends[:, 0].maximum(least_at).minimum(ends[:, 1]))
    return torch.stack([least, function(ends).amax(1)], 1)


class _LinearAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, s: Settings) -> Tensor:
        if s.qconfig.check_finite:
            check_finite(x, "the input")
            check_finite(values, "the weight")
        leading = tuple(x.shape[:-1])
        rows = math.prod(leading)
        if s.packed is None:
            images = x.reshape(rows, x.shape[-1], 1, 1)
            z, *packed = forward_pass(images, values, bias, s.plan, s.qconfig, s.dtype)
        else:
            packed, s.packed = s.packed.parts, None
            z = packed_forward_pass(packed, rows, values, bias, s.plan, s.qconfig, s.dtype)
        z = z.view(z.shape[:2])
        shape = (*leading, z.shape[1])
        saved = None
        if s.activation is None:
            y = z
        elif s.consumer is None:
            y, saved = activation_ops.act(z, s.activation, s.saves)
        else:
            y, saved = _packed_output(s, z, shape)
        if not isinstance(y, PackedTensor):  # detached for the same reason as in `functional`
            y = y.view(shape).detach()
        if s.saves:
            kept = packed if ctx.needs_input_grad[1] else (None, None, None)
            ctx.save_for_backward(values, saved, *kept)
            ctx.settings, ctx.x_shape, ctx.x_dtype = s, tuple(x.shape), x.dtype
            ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _LinearAct._gradients(ctx, dy)
        return *block_gradients(gradients), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        refuse_forward_mode()

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        values, saved, *packed = saved_tensors(ctx)
        s: Settings = ctx.settings
        if s.qconfig.check_finite:
            check_finite(dy, "the gradient of the output")
        need = ctx.needs_input_grad[:3]
        rows = math.prod(ctx.x_shape[:-1])
        x_shape = (rows, ctx.x_shape[-1], 1, 1)
        check_storage(dy, "the gradient of the output")
        dy = dy.to(s.dtype).reshape(rows, dy.shape[-1]).contiguous()
        dx = dvalues = None
        if s.activation is not None and packs_gradient(s.qconfig, dy.shape):
            dbias, greatest = activation_ops.act_sums(dy, saved, s.activation).unbind(1)
            if not need[0] and not need[1]:
                return None, None, dbias.to(ctx.bias_dtype)
            packing = gradient_packing(greatest.float(), rows, s.plan.geometry, s.qconfig)
            dz = activation_ops.act_grad_pack(dy, saved, s.activation, (*dy.shape, 1, 1), *packing)
            dx, dvalues = packed_backward_pass(dz, values, packed, s.plan, s.qconfig, x_shape, (*dy.shape, 1, 1),
                                               need[:2], ctx.x_dtype, False)
        else:
            dz = dy if s.activation is None else activation_ops.act_grad(dy, saved, s.activation)
            dx, dvalues, dbias = backward_pass(dz.view(*dz.shape, 1, 1), values, packed, s.plan, s.qconfig, x_shape,
                                               need, ctx.x_dtype)
        return (
            dx.view(ctx.x_shape) if need[0] else None,
            value_gradient(dvalues, values) if need[1] else None,
            dbias.to(ctx.bias_dtype) if need[2] else None,
        )


def _packed_output(s: Settings, z: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The output for the consumer, and what the backward pass needs."""
    geometry, qconfig = s.consumer
    images = (*z.shape, 1, 1)
    packing = output_packing(output_range(z, s.activation), len(z), geometry, qconfig)
    y, saved, *packed = activation_ops.act_pack(z, s.activation, s.saves, images, *packing, s.keep)
    s.output = PackedInput(*packed, geometry, qconfig.input, qconfig.granularity)
    return y if s.keep else PackedTensor(s.output, images, s.dtype, shape), saved


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """Apply a layer and its activation.

    Parameters
    ----------
    x : Tensor
        (..., in_features), of a dtype of the kernels.
    weight, bias : Tensor
        The nonzeros, and (out_features,) or None.
    settings : Settings

    Returns
    -------
    Tensor
        (..., out_features) of the settings' dtype, with its packed form attached where the settings name a consumer.
    """
    y = _LinearAct.apply(x, weight, bias, settings)
    if settings.output is not None:
        hand_over(y, settings.output)
        settings.output = None
    return y
