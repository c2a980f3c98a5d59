"""The product of a sparse layer as the beginning of a chain, and its gradients at the end of the chain's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qsparseprop import ops
from qsparseprop.layout.plan import Plan
from qsparseprop.nn._passes import backward_pass, check_finite, forward_pass
from qsparseprop.nn._values import plain
from qsparseprop.nn.deferred.layout import Layout
from qsparseprop.nn.deferred.packed import PackedInput, PackedSource, packs_gradient
from qsparseprop.nn.deferred.passes import Activation
from qsparseprop.nn.deferred.pending import Pending
from qsparseprop.nn.deferred.results import gradient_of, gradient_rows
from qsparseprop.nn.deferred.tensor import DeferredTensor, pending_of
from qsparseprop.nn.deferred.usage import Usage
from qsparseprop.quantization import QuantConfig


class ChainCall(NamedTuple):
    """What the product at the beginning of a chain needs besides its operands.

    Attributes
    ----------
    plan : Plan
    qconfig : QuantConfig
    dtype : torch.dtype
        Of the result.
    layout : Layout
        Of the result.
    images : tuple of int
        Shape of the input, as images.
    usage : Usage
    channels_last : bool
        Whether the input is.
    plain_result : bool
        Whether nothing is deferred.
    """

    plan: Plan
    qconfig: QuantConfig
    dtype: torch.dtype
    layout: Layout
    images: tuple[int, ...]
    usage: Usage
    channels_last: bool
    plain_result: bool


class KeptInput(NamedTuple):
    """What the gradient of the values needs of the input.

    Attributes
    ----------
    tensors : tuple
        The parts of the packed input, or what it can be made of again.
    activation : Activation or None
        In the latter case that of the `PackedSource`.
    """

    tensors: tuple[Tensor | None, ...]
    activation: Activation | None = None


def multiply_chain(
    x: Tensor, values: Tensor, bias: Tensor | None, call: ChainCall, operand: PackedInput | Tensor
) -> tuple[Tensor, KeptInput]:
    """The product as images, and what its backward pass needs of the input x, given packed or as images."""
    plan, qconfig = call.plan, call.qconfig
    channels_last = call.layout.by_rows or not call.plain_result
    if qconfig.check_finite:
        if isinstance(operand, Tensor):
            check_finite(operand, "the input")
        check_finite(values, "the weight")
    values = plain(values)
    if isinstance(operand, Tensor):
        z, parts = forward_pass(operand, values, bias, plan, qconfig, call.dtype, channels_last)
        assert parts is not None  # which was to be saved
        if qconfig.grad_weight == "int8" and (pending := pending_of(x)) is not None:
            pending.keep_packed(PackedInput(parts, plan.geometry, qconfig.input_scheme))
        return z, KeptInput(parts)
    rows = plan.multiplied(operand.parts.scale is not None)
    z = ops.empty_result(rows, call.images[0], call.dtype, channels_last)
    ops.multiply(operand.parts, values, rows, z, bias, qconfig.weight_clip(values, plan.entries))
    if operand.source is None:
        return z, KeptInput(operand.parts)
    return z, KeptInput(operand.source.tensors, operand.source.activation)


def packed_again(kept: Sequence[Tensor], activation: Activation | None, call: ChainCall) -> ops.Packed:
    """The packed input of the tensors of a `KeptInput`, and its activation."""
    if activation is None:
        return ops.Packed(*kept)
    codes, scale, shift, ranges = kept
    return PackedSource(codes, scale, shift, ranges, activation).pack(call.plan.geometry, call.qconfig)


def begin_chain(z: Tensor, call: ChainCall) -> Tensor:
    """The layer's result, of the product as images."""
    layout = call.layout
    if call.plain_result and not layout.by_rows:  # written in the order that is wanted
        call.usage.read = True
        return z.view(layout.shape).detach()  # no view: it may be changed in place
    pending = Pending(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), layout, call.usage)
    return pending.plain() if call.plain_result else DeferredTensor(pending, call.dtype)


def chain_gradients(
    dy: Tensor, values: Tensor, packed: ops.Packed | None, call: ChainCall, need: Sequence[bool], x_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of the input as images, the values and the bias, as far as `need` wants them."""
    plan, qconfig, layout = call.plan, call.qconfig, call.layout
    dx = dvalues = dbias = None
    pending = gradient_of(dy, layout)
    if pending is None or qconfig.check_finite or not packs_gradient(qconfig, layout.images[1]):
        rows = gradient_rows(dy, layout, call.dtype)
        if qconfig.check_finite:
            check_finite(rows, "the gradient of the output")
        if not (need[0] or need[1]):
            return None, None, ops.bias_gradient(rows)
        return backward_pass(layout.image_view(rows), values, packed, plan, qconfig, need, x_dtype, call.channels_last)
    gradient, total = pending.pack(plan.geometry, qconfig)
    if need[2]:  # a copy, for the bias to keep
        dbias = total.clone(memory_format=torch.contiguous_format)
    if need[0] or need[1]:
        values = plain(values)
        dx, dvalues = ops.packed_backward(gradient, values, packed, plan, call.images[0],
                                          qconfig.weight_clip(values, plan.entries), need[:2], x_dtype,
                                          call.channels_last)  # fmt: skip
    return dx, dvalues, dbias
