"""A sparse layer's product: the end of the chain before it, and the beginning of one if that pays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qsparseprop.layout.geometry import Geometry, embedded
from qsparseprop.nn.autograd.blocks import BlockProduct
from qsparseprop.nn.autograd.graph import direct_apply, records_gradients
from qsparseprop.nn.deferred import conditions
from qsparseprop.nn.deferred.layout import Layout
from qsparseprop.nn.deferred.packed import PackedInput
from qsparseprop.nn.deferred.product import ChainCall, begin_chain, multiply_chain
from qsparseprop.nn.deferred.tensor import DeferredTensor, pending_of
from qsparseprop.nn.deferred.usage import Usage
from qsparseprop.ops import is_channels_last
from qsparseprop.quantization import QuantConfig

if TYPE_CHECKING:
    from qsparseprop.nn._base import SparseModule

_apply = direct_apply(BlockProduct)


def _prepare(
    x: Tensor, images: tuple[int, ...], geometry: Geometry, qconfig: QuantConfig
) -> tuple[PackedInput | Tensor, Geometry, bool]:
    """The input, packed or as images, the geometry that fits it, and whether it is channels_last."""
    if type(x) is not DeferredTensor:
        plain = x.detach().reshape(images)
        return plain, geometry, is_channels_last(plain)
    pending = pending_of(x)
    if pending is None or pending.layout.images != images:  # whose rows are others, as of an image's last dimension
        plain = x._pending.plain().reshape(images)
        return plain, geometry, is_channels_last(plain)
    if pending.packed is not None:
        geometry = embedded(geometry, pending.packed.geometry) or geometry
    packed = pending.pack(geometry, qconfig)
    return pending.images() if packed is None else packed, geometry, True


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
        assert qconfig is not None  # of a quantised layer
        operand, geometry, channels_last = _prepare(x, images, geometry, qconfig)
        usage.fed = isinstance(operand, PackedInput)
        weight, _, bias = layer._operands()
        call = ChainCall(layer._plan(geometry, groups), qconfig, dtype, out, images, usage, channels_last, plain_result)
        if trains and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
            return _apply(x, weight, bias, call, operand)[0]
        return begin_chain(multiply_chain(x, weight, bias, call, operand)[0], call)
