"""What nodes are given and give: tensors of chains, and gradients of these."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qsparseprop.nn.deferred.gradient import PendingGradient
from qsparseprop.nn.deferred.layout import Layout
from qsparseprop.nn.deferred.pending import Pending
from qsparseprop.nn.deferred.tensor import DeferredTensor
from qsparseprop.ops import in_memory

if TYPE_CHECKING:
    from qsparseprop.nn.deferred.tensor import ChainTensor


def result(pending: Pending, dtype: torch.dtype) -> Tensor:
    """The tensor that a layer or an operation gives: deferred, unless only its values were wanted the last time."""
    if pending.usage.plain:
        return pending.plain()
    return DeferredTensor(pending, dtype)


def result_of(pending: Pending, source: ChainTensor, in_place: bool) -> Tensor:
    """What an operation on a tensor gives: a tensor of its own, or in place the same one."""
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


def plain_gradient(gradient: Tensor) -> Tensor:
    """A gradient as an ordinary tensor."""
    return gradient._pending.plain() if type(gradient) is DeferredTensor else gradient


def gradient_rows(gradient: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The rows of a gradient."""
    gradient = plain_gradient(gradient)
    return layout.rows(in_memory(gradient, "the gradient of the output").detach().to(dtype))


def deferred_gradient(pending: PendingGradient, dtype: torch.dtype) -> Tensor:
    """A gradient that is still to be computed, as what a node gives."""
    if torch.is_grad_enabled():  # create_graph=True
        return pending.plain()
    return DeferredTensor(pending, dtype)
