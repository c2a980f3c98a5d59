"""The gradients of a step: of one batch or of several, in one process or in several."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qsparseprop.training.processes import Processes, processes

from .batches import count_correct
from .diagnosis import NonFiniteLossError, first_bad_layer

__all__ = ["StepFigures", "add_gradients"]


class StepFigures(NamedTuple):
    """What a step's forward passes have shown, in all processes.

    Attributes
    ----------
    loss : Tensor
        Mean of all samples, a scalar.
    samples, correct : int
        Samples, and how many of them were predicted correctly; 0 where nothing is classified.
    """

    loss: torch.Tensor
    samples: int
    correct: int


def add_gradients(
    model: nn.Module,
    forward: Callable[[nn.Module, Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    parts: Sequence[tuple[Any, torch.Tensor]],
    step: int,
    parallel: DistributedDataParallel | None = None,
) -> StepFigures:
    """Add up the gradients of the mean loss of all samples of some batches.

    Parameters
    ----------
    model : nn.Module
    forward : callable
        Gives loss and outputs of a model and a batch; the loss is the mean of its samples.
    parts : sequence of (inputs, targets)
        The batches; a graph lives no longer than its batch.
    step : int
        Number of the step, for messages.
    parallel : DistributedDataParallel, optional
        The model as the processes have it in common.

    Returns
    -------
    StepFigures

    Raises
    ------
    NonFiniteLossError
        If a batch's loss is not finite, in any process; what has been added up by then is still there.
    """
    together = Processes() if parallel is None else processes()
    samples = sum(len(targets) for _, targets in parts)
    sums, mean = [0.0, 0.0, 0.0], []
    for index, (inputs, targets) in enumerate(parts):
        last = index == len(parts) - 1
        # gradients are sent with those of the last batch
        with contextlib.nullcontext() if parallel is None or last else parallel.no_sync():
            loss, outputs = forward(model if parallel is None else parallel, inputs, targets)
            value = loss.item()
            figures = together.total([value * len(targets), len(targets), count_correct(outputs, targets) or 0])
            if not math.isfinite(figures[0]):
                del loss
                layer, sentence = None, "in another process"
                if not math.isfinite(value):
                    layer, sentence = first_bad_layer(model, functools.partial(forward, model, inputs, targets))
                raise NonFiniteLossError(value, step, layer, sentence)
            if len(parts) > 1:
                loss = loss * (len(targets) / samples)
            loss.backward()
        mean.append(loss.detach())
        sums = [a + b for a, b in zip(sums, figures, strict=True)]
    own = sum(mean[1:], start=mean[0])
    joint = own if together.count == 1 else own.new_tensor(sums[0] / sums[1])
    return StepFigures(joint, int(sums[1]), int(sums[2]))
