"""The operations of blocks as nodes of autograd.

Each node saves what its own backward pass needs, in buffers that may be filled later, and gives the layer before it a
gradient that is still to be computed, so that the last one can do it all in one pass. A gradient that meets others on
its way, or that somebody looks at, is an ordinary tensor from then on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from qsparseprop import ops
from qsparseprop.nn._passes import as_dtype, value_gradient
from qsparseprop.nn.autograd.graph import NoSecondDerivative, without_graph
from qsparseprop.nn.deferred import passes, steps
from qsparseprop.nn.deferred.gradient import PendingGradient
from qsparseprop.nn.deferred.packed import PackedInput
from qsparseprop.nn.deferred.passes import IDENTITY, Activation
from qsparseprop.nn.deferred.pending import Pending
from qsparseprop.nn.deferred.product import ChainCall, begin_chain, chain_gradients, multiply_chain, packed_again
from qsparseprop.nn.deferred.results import (
    deferred_gradient,
    gradient_of,
    gradient_rows,
    plain_gradient,
    result,
    result_of,
)
from qsparseprop.nn.deferred.tensor import DeferredTensor
from qsparseprop.ops import saved_tensors

if TYPE_CHECKING:
    from qsparseprop.nn.deferred.tensor import ChainTensor


class _BlockNode(torch.autograd.Function):
    """Without derivatives in forward mode."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise NotImplementedError("blocks have no forward-mode derivatives: use reverse mode (backward), or the model "
                                  "that swap_modules_with_dense gives")


def _link_to_inputs() -> Tensor:
    """A tensor without elements which a node of a block gives and saves beside its result.

    So gradients can be made to depend on the node's inputs, without keeping these, see `_differentiable_once`.
    """
    return torch.empty(0)


def _differentiable_once(gradients: tuple[Tensor | None, ...], dy: Tensor, link: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a block, made without a graph, which refuse to be differentiated where that is wanted.

    They depend on the gradient that was given, and on the inputs even where that does not; `link` is that of
    `_link_to_inputs`.
    """
    if not torch.is_grad_enabled():  # no create_graph=True
        return gradients
    return NoSecondDerivative.apply(dy, link, *gradients)


class BlockProduct(_BlockNode):
    """The product of a sparse layer in a block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, call: ChainCall,
                operand: PackedInput | Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The beginning of a chain, see `multiply_chain`."""
        z, kept = multiply_chain(x, values, bias, call, operand)
        wanted = ctx.needs_input_grad[1]
        link = _link_to_inputs()
        ctx.save_for_backward(link, values, *(kept.tensors if wanted else ()))
        ctx.call, ctx.activation = call, kept.activation
        ctx.x_shape, ctx.x_dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return begin_chain(z, call), link

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        """Of the input, the values and the bias."""
        if dy is None:
            return None, None, None, None, None
        link, values, *kept = saved_tensors(ctx)
        need = ctx.needs_input_grad[:3]
        with without_graph():
            packed = packed_again(kept, ctx.activation, ctx.call) if need[1] else None
            dx, dvalues, dbias = chain_gradients(dy, values, packed, ctx.call, need, ctx.x_dtype)
            gradients = (None if dx is None else dx.view(ctx.x_shape), value_gradient(dvalues, values),
                         as_dtype(dbias, ctx.bias_dtype))  # fmt: skip
        return *_differentiable_once(gradients, dy, link), None, None


class BlockStart(_BlockNode):
    """A deferred tensor with the values of an ordinary one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pending: Pending) -> Tensor:
        """The beginning of a chain; `pending` is of x."""
        ctx.set_materialize_grads(False)
        return DeferredTensor(pending, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of x."""
        return None if dy is None else plain_gradient(dy), None


class BlockBatchNorm(_BlockNode):
    """A batch normalisation, which saves its input in 8 bits."""

    @staticmethod
    def forward(
        ctx: Any, source: ChainTensor, weight: Tensor | None, bias: Tensor | None, norm: steps.Normalisation
    ) -> tuple[Tensor, Tensor]:
        """Deferred but for the statistics."""
        pending, codes, statistics = steps.normalise(source._pending, weight, bias, norm, True)
        assert codes is not None  # which it was to save
        link = _link_to_inputs()
        ctx.save_for_backward(link, codes.codes, statistics, weight)
        ctx.codes, ctx.layout, ctx.dtype, ctx.batch_statistics = codes, pending.layout, source.dtype, norm.training
        ctx.set_materialize_grads(False)
        return result(pending, source.dtype), link

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        """Of the tensor, the weight and the bias."""
        if dy is None:
            return None, None, None, None
        link, codes, statistics, weight = saved_tensors(ctx)
        with without_graph():
            ctx.codes.fill()
            behind, saved, activation = gradient_of(dy, ctx.layout), None, IDENTITY
            if behind is not None and behind.codes is None:
                rows, saved, activation = behind.dy, behind.saved, behind.activation
            else:
                behind, rows = None, gradient_rows(dy, ctx.layout, ctx.dtype)
            sums = passes.sums(rows, codes, saved, activation)
            factor, ranges, gradients = ops.norm_factors(sums, statistics, weight, len(rows), ctx.batch_statistics)
            dweight, dbias, total = gradients.unbind()
        need, dx = ctx.needs_input_grad, None
        if need[0]:
            dx = deferred_gradient(PendingGradient(ctx.layout, rows, saved, activation, codes, factor, ranges, total,
                                                   behind), ctx.dtype)  # fmt: skip
        # copies: parameters keep their gradients, and these share memory
        gradients = dx, dweight.clone() if need[1] else None, dbias.clone() if need[2] else None
        return *_differentiable_once(gradients, dy, link), None


class BlockActivation(_BlockNode):
    """An activation, which saves bits or slopes."""

    @staticmethod
    def forward(ctx: Any, source: ChainTensor, activation: Activation, in_place: bool) -> tuple[Tensor, Tensor]:
        """Deferred."""
        pending, slopes = steps.activate(source._pending, activation, True)
        assert slopes is not None  # which it was to save
        link = _link_to_inputs()
        ctx.save_for_backward(link, slopes.saved)
        ctx.slopes, ctx.layout, ctx.dtype, ctx.activation = slopes, pending.layout, source.dtype, activation
        if in_place:
            ctx.mark_dirty(source)
        ctx.set_materialize_grads(False)
        return result_of(pending, source, in_place), link

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        """Of the tensor."""
        if dy is None:
            return None, None, None
        link, saved = saved_tensors(ctx)
        with without_graph():
            ctx.slopes.fill()
            rows = gradient_rows(dy, ctx.layout, ctx.dtype)
        dx = deferred_gradient(PendingGradient(ctx.layout, rows, saved, ctx.activation), ctx.dtype)
        return *_differentiable_once((dx,), dy, link), None, None


class BlockChannelMap(_BlockNode):
    """A multiplication or a shift by a number for each channel, which gets no gradient."""

    @staticmethod
    def forward(ctx: Any, source: ChainTensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        """Deferred."""
        ctx.save_for_backward(scale)
        ctx.set_materialize_grads(False)
        return result(steps.scale_channels(source._pending, scale, shift), source.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of the tensor."""
        (scale,) = saved_tensors(ctx)
        if scale is None or dy is None:
            return dy, None, None
        return plain_gradient(dy) * scale, None, None


class BlockAddition(_BlockNode):
    """An addition of two tensors of the same shape."""

    @staticmethod
    def forward(ctx: Any, source: ChainTensor, other: Tensor, in_place: bool) -> Tensor:
        """Computed together with the map before it."""
        pending = steps.add(source._pending, other)
        if in_place:
            ctx.mark_dirty(source)
        ctx.set_materialize_grads(False)
        return result_of(pending, source, in_place)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of both."""
        return dy, dy, None
