"""The operations that blocks take up, as nodes of autograd.

Each node saves what its own backward pass needs, in buffers that may be filled later, and gives the layer before it a
gradient that is still to be computed, so that the last one can do it all in one pass. A gradient that meets others on
its way, or that somebody looks at, is an ordinary tensor from then on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from qsparseprop import ops
from qsparseprop.nn.deferred import passes
from qsparseprop.nn.deferred.conditions import step_by_step
from qsparseprop.nn.deferred.gradient import PendingGradient
from qsparseprop.nn.deferred.layout import Layout
from qsparseprop.nn.deferred.passes import IDENTITY, Activation, Affine
from qsparseprop.nn.deferred.pending import Codes, Pending
from qsparseprop.nn.deferred.tensor import DeferredTensor, pending_of
from qsparseprop.nn.functional import (
    block_gradients,
    direct_apply,
    link_to_inputs,
    records_gradients,
    refuse_forward_mode,
    without_graph,
)
from qsparseprop.ops import in_memory, saved_tensors

if TYPE_CHECKING:
    from qsparseprop.nn.deferred.tensor import ChainTensor


def result(pending: Pending, dtype: torch.dtype) -> Tensor:
    """The tensor that a layer or an operation gives: deferred, unless only its values were wanted the last time."""
    if pending.usage.plain:
        return pending.plain()
    return DeferredTensor(pending, dtype)


def _give(pending: Pending, source: ChainTensor, in_place: bool) -> Tensor:
    if not in_place:
        return result(pending, source.dtype)
    pending.inference = source._pending.inference
    source._pending = pending
    return source


def gradient_of(gradient: Tensor, layout: Layout) -> PendingGradient | None:
    """What is still to be computed of a gradient, if it is such a one and its rows are those of a layout.

    They are not where tensors were added whose channels are different dimensions.
    """
    if type(gradient) is not DeferredTensor:
        return None
    pending = gradient._pending
    if not isinstance(pending, PendingGradient) or not pending.open or pending.layout.images != layout.images:
        return None
    return pending


def gradient_rows(gradient: Tensor, layout: Any, dtype: torch.dtype) -> Tensor:
    """The rows of a gradient."""
    if type(gradient) is DeferredTensor:
        gradient = gradient._pending.plain()
    return layout.rows(in_memory(gradient, "the gradient of the output").detach().to(dtype))


def _deferred(pending: PendingGradient, dtype: torch.dtype) -> Tensor:
    if torch.is_grad_enabled():  # create_graph=True
        return pending.plain()
    return DeferredTensor(pending, dtype)


class Normalisation(NamedTuple):
    """The arguments of torch.nn.functional.batch_norm besides tensors that get a gradient."""

    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float


def _normalise(
    pending: Pending, weight: Tensor | None, bias: Tensor | None, norm: Normalisation, save: bool
) -> tuple[Pending, Codes | None, Tensor]:
    rows = pending.settled()
    affine, ends, statistics = ops.norm_statistics(rows, weight, bias, norm.running_mean, norm.running_var,
                                                   norm.momentum, norm.eps, norm.training, save)  # fmt: skip
    scale, shift, *others = affine.unbind()
    codes = None
    if save:
        codes = Codes(rows, Affine(*others[:2]), Affine(*others[2:]))
    pending = pending.normalised(Affine(scale, shift), ends if norm.training or save else None, codes)
    if step_by_step() or pending.usage.plain:
        pending.compute()
    return pending, codes, statistics


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, source: ChainTensor, weight: Tensor | None, bias: Tensor | None, norm: Normalisation
    ) -> tuple[Tensor, Tensor]:
        pending, codes, statistics = _normalise(source._pending, weight, bias, norm, True)
        link = link_to_inputs()
        ctx.save_for_backward(link, codes.codes, statistics, weight)
        ctx.codes, ctx.layout, ctx.dtype, ctx.batch_statistics = codes, pending.layout, source.dtype, norm.training
        ctx.set_materialize_grads(False)
        return result(pending, source.dtype), link

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
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
            dx = _deferred(PendingGradient(ctx.layout, rows, saved, activation, codes, factor, ranges, total, behind),
                           ctx.dtype)  # fmt: skip
        # copies: parameters keep their gradients, and these share memory
        gradients = dx, dweight.clone() if need[1] else None, dbias.clone() if need[2] else None
        return *block_gradients(gradients, dy, link), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        refuse_forward_mode()


def batch_norm(source: ChainTensor, weight: Tensor | None, bias: Tensor | None, norm: Normalisation) -> Tensor:
    """Record a batch normalisation."""
    if records_gradients() and any(t is not None and t.requires_grad for t in (source, weight, bias)):
        return _APPLY[_BatchNorm](source, weight, bias, norm)[0]
    return result(_normalise(source._pending, weight, bias, norm, False)[0], source.dtype)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: ChainTensor, activation: Activation, in_place: bool) -> tuple[Tensor, Tensor]:
        pending, slopes = _activate(source._pending, activation, True)
        link = link_to_inputs()
        ctx.save_for_backward(link, slopes.saved)
        ctx.slopes, ctx.layout, ctx.dtype, ctx.activation = slopes, pending.layout, source.dtype, activation
        if in_place:
            ctx.mark_dirty(source)
        ctx.set_materialize_grads(False)
        return _give(pending, source, in_place), link

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None
        link, saved = saved_tensors(ctx)
        with without_graph():
            ctx.slopes.fill()
            rows = gradient_rows(dy, ctx.layout, ctx.dtype)
        dx = _deferred(PendingGradient(ctx.layout, rows, saved, ctx.activation), ctx.dtype)
        return *block_gradients((dx,), dy, link), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        refuse_forward_mode()


def _activate(pending: Pending, activation: Activation, save: bool) -> tuple[Pending, Any]:
    pending, slopes = pending.activated(activation, save)
    if step_by_step():
        pending.compute()
    return pending, slopes


def activate(source: ChainTensor, activation: Activation, in_place: bool) -> Tensor:
    """Record an activation."""
    if records_gradients() and source.requires_grad:
        return _APPLY[_Activation](source, activation, in_place)[0]
    pending, _ = _activate(source._pending, activation, False)
    return _changed(_give(pending, source, in_place), in_place)


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: ChainTensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.set_materialize_grads(False)
        return result(_map(source._pending, scale, shift), source.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        (scale,) = saved_tensors(ctx)
        if scale is None or dy is None:
            return dy, None, None
        if type(dy) is DeferredTensor:
            dy = dy._pending.plain()
        return dy * scale, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        refuse_forward_mode()


def _map(pending: Pending, scale: Tensor | None, shift: Tensor | None) -> Pending:
    pending = pending.mapped(scale, shift)
    if step_by_step() or pending.usage.plain:
        pending.compute()
    return pending


def channel_map(source: ChainTensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Record a multiplication or a shift by a number for each channel, which gets no gradient."""
    if records_gradients() and source.requires_grad:
        return _APPLY[_Map](source, scale, shift)
    return result(_map(source._pending, scale, shift), source.dtype)


class _Addition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: ChainTensor, other: Tensor, in_place: bool) -> Tensor:
        pending = _add(source._pending, other)
        if in_place:
            ctx.mark_dirty(source)
        ctx.set_materialize_grads(False)
        return _give(pending, source, in_place)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return dy, dy, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        refuse_forward_mode()


def _add(pending: Pending, other: Tensor) -> Pending:
    added = pending_of(other)
    if added is not None:
        rows, layout = added.rows(), added.layout
        if layout.channels_first != pending.layout.channels_first:
            rows = pending.layout.rows(layout.view(rows))
    else:
        other = other._pending.plain() if type(other) is DeferredTensor else other
        rows = pending.layout.rows(in_memory(other, "what is added").detach())
    return pending.plus(rows)


def add(source: ChainTensor, other: Tensor, in_place: bool) -> Tensor:
    """Record an addition."""
    if records_gradients() and (source.requires_grad or other.requires_grad):
        return _APPLY[_Addition](source, other, in_place)
    return _changed(_give(_add(source._pending, other), source, in_place), in_place)


def _changed(tensor: Tensor, in_place: bool) -> Tensor:
    if in_place and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
    return tensor


_APPLY = {function: direct_apply(function) for function in (_BatchNorm, _Activation, _Map, _Addition)}
