"""The product of a sparse layer as the beginning of a chain, and as the end of the one before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qsparseprop import ops
from qsparseprop.layout.geometry import Geometry, embedded
from qsparseprop.layout.plan import Plan
from qsparseprop.nn._passes import as_dtype, backward_pass, check_finite, forward_pass, value_gradient
from qsparseprop.nn._values import plain
from qsparseprop.nn.deferred import conditions
from qsparseprop.nn.deferred.layout import Layout
from qsparseprop.nn.deferred.nodes import gradient_of, gradient_rows
from qsparseprop.nn.deferred.packed import PackedInput, PackedSource, packs_gradient
from qsparseprop.nn.deferred.pending import Pending
from qsparseprop.nn.deferred.tensor import DeferredTensor, pending_of
from qsparseprop.nn.deferred.usage import Usage
from qsparseprop.nn.functional import (
    block_gradients,
    direct_apply,
    link_to_inputs,
    records_gradients,
    refuse_forward_mode,
    without_graph,
)
from qsparseprop.ops import is_channels_last, saved_tensors
from qsparseprop.quantization import QuantConfig

if TYPE_CHECKING:
    from qsparseprop.nn._base import SparseModule


@dataclass
class _Call:
    """What a product needs besides its tensors."""

    plan: Plan
    qconfig: QuantConfig
    dtype: torch.dtype
    layout: Layout  # of the result
    images: tuple[int, ...]  # shape of the input
    usage: Usage
    packed: PackedInput | None  # the input
    plain: Tensor | None  # the input as images, where it is not packed
    channels_last: bool  # whether the input is
    plain_result: bool


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        z, kept, rest = _compute(x, values, bias, call)
        wanted = ctx.needs_input_grad[1]
        link = link_to_inputs()
        ctx.save_for_backward(link, values, *(kept if wanted else ()))
        ctx.rest = rest if wanted else None
        ctx.plan, ctx.qconfig, ctx.layout, ctx.images = call.plan, call.qconfig, call.layout, call.images
        ctx.x_shape, ctx.x_dtype, ctx.channels_last, ctx.dtype = x.shape, x.dtype, call.channels_last, call.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return _start(z, call), link

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        link, values, *kept = saved_tensors(ctx)
        with without_graph():
            gradients = _gradients(ctx, dy, values, kept)
        return *block_gradients(gradients, dy, link), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        refuse_forward_mode()


_apply = direct_apply(_Product)


def _compute(x: Tensor, values: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, tuple[Any, ...], Any]:
    """The product as images; tensors and the rest of what its backward pass needs of the input."""
    plan, qconfig, packed = call.plan, call.qconfig, call.packed
    channels_last = call.layout.by_rows or not call.plain_result
    if qconfig.check_finite:
        if call.plain is not None:
            check_finite(call.plain, "the input")
        check_finite(values, "the weight")
    kept: tuple[Any, ...]
    values = plain(values)
    if packed is None:
        z, parts = forward_pass(call.plain, values, bias, plan, qconfig, call.dtype, channels_last)
        if qconfig.grad_weight == "int8" and (pending := pending_of(x)) is not None:
            pending.keep_packed(PackedInput(parts, plan.geometry, qconfig.input_scheme))
        kept, rest = parts, None
    else:
        rows = plan.multiplied(packed.parts.scale is not None)
        z = ops.empty_result(rows, call.images[0], call.dtype, channels_last)
        ops.multiply(packed.parts, values, rows, z, bias, qconfig.weight_clip(values, plan.entries))
        kept, rest = packed.parts, None
        if packed.source is not None:
            kept, rest = packed.source.tensors, packed.source.rest
    call.packed = call.plain = None
    return z, kept, rest


def _start(z: Tensor, call: _Call) -> Tensor:
    layout = call.layout
    if call.plain_result and not layout.by_rows:  # written in the order that is wanted
        call.usage.read = True
        return z.view(layout.shape).detach()  # no view: it may be changed in place
    pending = Pending(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), layout, call.usage)
    return pending.plain() if call.plain_result else DeferredTensor(pending, call.dtype)


def _gradients(ctx: Any, dy: Tensor, values: Tensor, kept: list[Any]) -> tuple[Tensor | None, ...]:
    plan, qconfig, layout, need = ctx.plan, ctx.qconfig, ctx.layout, ctx.needs_input_grad
    dx = dvalues = dbias = None
    pending = gradient_of(dy, layout)
    if qconfig.check_finite or (pending is not None and not packs_gradient(qconfig, layout.images[1])):
        pending = None
    if need[0] or need[1]:
        if not kept:
            packed = None
        elif ctx.rest is None:
            packed = ops.Packed(*kept)
        else:
            packed = PackedSource(*kept, *ctx.rest).pack(plan.geometry, qconfig)
    if pending is None:
        rows = gradient_rows(dy, layout, ctx.dtype)
        if qconfig.check_finite:
            check_finite(rows, "the gradient of the output")
        if need[0] or need[1]:
            dx, dvalues, dbias = backward_pass(layout.image_view(rows), values, packed, plan, qconfig, need[:3],
                                               ctx.x_dtype, ctx.channels_last)  # fmt: skip
        else:
            dbias = ops.bias_gradient(rows)
    else:
        gradient, total = pending.pack(plan.geometry, qconfig)
        if need[2]:  # a copy, for the bias to keep
            dbias = total.clone(memory_format=torch.contiguous_format)
        if need[0] or need[1]:
            dx, dvalues = ops.packed_backward(gradient, plain(values), packed, plan, ctx.images[0],
                                              qconfig.weight_clip(values, plan.entries), need[:2], ctx.x_dtype,
                                              ctx.channels_last)  # fmt: skip
    return (
        dx.view(ctx.x_shape) if need[0] else None,
        value_gradient(dvalues, values) if need[1] else None,
        as_dtype(dbias, ctx.bias_dtype) if need[2] else None,
    )  # fmt: skip


def _prepare(x: Tensor, images: tuple[int, ...], geometry: Geometry, qconfig: QuantConfig) -> Any:
    """The input, packed or as images, the geometry that fits it, and whether it is channels_last."""
    if type(x) is not DeferredTensor:
        plain = x.detach().reshape(images)
        return None, plain, geometry, is_channels_last(plain)
    pending = pending_of(x)
    if pending is None or pending.layout.images != images:  # whose rows are others, as of an image's last dimension
        plain = x._pending.plain().reshape(images)
        return None, plain, geometry, is_channels_last(plain)
    if pending.packed is not None:
        geometry = embedded(geometry, pending.packed.geometry) or geometry
    packed = pending.pack(geometry, qconfig)
    return packed, None if packed is not None else pending.images(), geometry, True


def deferred_product(
    layer: SparseModule,
    x: Tensor,
    images: tuple[int, ...],
    layout: Callable[[bool], Layout],
    geometry: Geometry,
    groups: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Multiply, and give a tensor that what follows can be recorded on.

    None where the layer had better do as if nothing were deferred: its input is an ordinary tensor, and its result is
    small, or all that was wanted of the last one were the values.

    Parameters
    ----------
    layer : SparseModule
        Quantised.
    x : Tensor
        float32 or bfloat16, deferred or not.
    images : tuple of int
        Its shape as images.
    layout : callable
        Layout of the result, by whether the input's is channels_last.
    geometry : Geometry
    groups : int
    dtype : torch.dtype
        Of the result, float32 or bfloat16.
    """
    with torch._C.DisableTorchFunctionSubclass():
        usage, trains, out = Usage(), records_gradients(), layout(x.ndim == 4 and is_channels_last(x))
        plain_result = math.prod(out.images) < conditions.LEAST_ELEMENTS
        if not plain_result:
            usage = layer.__dict__.setdefault("_usages", {}).setdefault(trains, usage)
            plain_result = usage.begin().plain
        if plain_result and pending_of(x) is None:
            usage.read = True
            return None
        qconfig = layer._qconfig
        packed, plain, geometry, channels_last = _prepare(x, images, geometry, qconfig)
        usage.fed = packed is not None
        weight, _, bias = layer._operands()
        call = _Call(layer._plan(geometry, groups), qconfig, dtype, out, images, usage, packed, plain, channels_last,
                     plain_result)
        if trains and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
            return _apply(x, weight, bias, call)[0]
        return _start(_compute(x, weight, bias, call)[0], call)
