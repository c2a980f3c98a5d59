"""What becomes of what is pending when an operation goes on from there; what the operation saves is part of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from qsparseprop import ops
from qsparseprop.nn.deferred.conditions import step_by_step
from qsparseprop.nn.deferred.passes import Activation, Affine
from qsparseprop.nn.deferred.pending import Codes, Pending, Slopes
from qsparseprop.nn.deferred.tensor import DeferredTensor, pending_of
from qsparseprop.ops import in_memory


class Normalisation(NamedTuple):
    """The arguments of torch.nn.functional.batch_norm besides tensors that get a gradient."""

    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float


def normalise(
    pending: Pending, weight: Tensor | None, bias: Tensor | None, norm: Normalisation, save: bool
) -> tuple[Pending, Codes | None, Tensor]:
    """A batch normalisation; codes of what it reads if they are to be saved, and the statistics that it uses."""
    rows = pending.settled()
    affine, ends, statistics = ops.norm_statistics(rows, weight, bias, norm.running_mean, norm.running_var,
                                                   norm.momentum, norm.eps, norm.training, save)  # fmt: skip
    scale, shift, code_scale, code_shift, decode_scale, decode_shift = affine.unbind()
    codes = Codes(rows, (code_scale, code_shift), (decode_scale, decode_shift)) if save else None
    pending = pending.normalised(Affine(scale, shift), ends if norm.training or save else None, codes)
    if step_by_step() or pending.usage.plain:
        pending.compute()
    return pending, codes, statistics


def activate(pending: Pending, activation: Activation, save: bool) -> tuple[Pending, Slopes | None]:
    """An activation, and what it saves if it is to save anything."""
    pending, slopes = pending.activated(activation, save)
    if step_by_step():
        pending.compute()
    return pending, slopes


def scale_channels(pending: Pending, scale: Tensor | None, shift: Tensor | None) -> Pending:
    """A multiplication or a shift by a number for each channel."""
    pending = pending.mapped(scale, shift)
    if step_by_step() or pending.usage.plain:
        pending.compute()
    return pending


def add(pending: Pending, other: Tensor) -> Pending:
    """An addition."""
    added = pending_of(other)
    if added is not None:
        rows, layout = added.rows(), added.layout
        if layout.channels_first != pending.layout.channels_first:
            rows = pending.layout.rows(layout.view(rows))
    else:
        other = other._pending.plain() if type(other) is DeferredTensor else other
        rows = pending.layout.rows(in_memory(other, "what is added").detach())
    return pending.plus(rows)
