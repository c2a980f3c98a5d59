"""The gradients of a step, of one batch or of several."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .diagnosis import NonFiniteLossError, first_bad_layer

__all__ = ["add_gradients"]


def add_gradients(
    model: nn.Module,
    forward: Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    parts: Sequence[tuple[Any, torch.Tensor]],
    step: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Add up the gradients of the mean loss of all samples of some batches.

    Parameters
    ----------
    model : nn.Module
    forward : callable
        Gives loss and outputs of a batch; the loss is the mean of its samples.
    parts : sequence of (inputs, targets)
        The batches; a graph lives no longer than its batch.
    step : int
        Number of the step, for messages.

    Returns
    -------
    loss : Tensor
        Of all samples.
    outputs : list of Tensor
        Of each batch.

    Raises
    ------
    NonFiniteLossError
        If a batch's loss is not finite; what has been added up by then is still there.
    """
    samples = sum(len(targets) for _, targets in parts)
    losses, all_outputs = [], []
    for inputs, targets in parts:
        loss, outputs = forward(inputs, targets)
        value = loss.item()
        if not math.isfinite(value):
            del loss
            layer, sentence = first_bad_layer(model, functools.partial(forward, inputs, targets))
            raise NonFiniteLossError(value, step, layer, sentence)
        if len(parts) > 1:
            loss = loss * (len(targets) / samples)
        loss.backward()
        losses.append(loss.detach())
        all_outputs.append(outputs)
    return sum(losses[1:], start=losses[0]), all_outputs
