"""A plain training loop that records losses, step times and evaluations.

Nothing in it knows of sparsity: a swapped model trains like any other one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Evaluation", "Finetuner", "History"]


@dataclass(frozen=True)
class Evaluation:
    """Accuracy at one point of a training.

    Attributes
    ----------
    step : int
        Steps done so far.
    train_seconds : float
        Time spent in these steps.
    top1 : float
        Share of correct predictions, in percent.
    """

    step: int
    train_seconds: float
    top1: float


@dataclass
class History:
    """What a training has recorded, one entry a step.

    Attributes
    ----------
    losses : list of float
        Training loss of each step.
    step_seconds : list of float
        Duration of each step: everything from the zeroed gradients to the updated weights.
    warmup_steps : set of int
        Indices of steps that are no fair measure of speed; they count for everything but `median_step_seconds`.
    evaluations : list of Evaluation
        In the order they were made.
    """

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    warmup_steps: set[int] = field(default_factory=set)
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def train_seconds(self) -> float:
        """Time spent in training steps, in seconds."""
        return sum(self.step_seconds)

    def timed_seconds(self) -> list[float]:
        """Return the durations of the steps that are not warm-up; of all steps, if there are no others."""
        timed = [seconds for step, seconds in enumerate(self.step_seconds) if step not in self.warmup_steps]
        return timed or list(self.step_seconds)

    def median_step_seconds(self) -> float:
        """Return the median duration of the steps that are not warm-up, in seconds.

        Raises
        ------
        statistics.StatisticsError
            If no step was made.
        """
        return statistics.median(self.timed_seconds())


class Finetuner:
    """Trains and evaluates a classifier.

    Parameters
    ----------
    model : nn.Module
        Put into the right mode (train or eval) by each call. It is converted to `memory_format` in place.
    optimizer : torch.optim.Optimizer
        Over the model's parameters.
    scheduler : torch.optim.lr_scheduler.LRScheduler, optional
        Stepped after every training step.
    loss_function : callable
        Called as ``loss_function(logits, targets)``; returns a scalar tensor.
    autocast_dtype : torch.dtype, optional
        Run forward passes under ``torch.autocast("cpu", dtype=...)``; ``None`` leaves them in float32.
    memory_format : torch.memory_format
        Layout of the inputs and of the model's 4-D weights: contiguous or channels_last.
    after_step : callable, optional
        Called without arguments after each update of the weights, and timed as a part of the step: the place for
        masks.

    Attributes
    ----------
    history : History
        Everything recorded so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        loss_function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
        autocast_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        self.model = model.to(memory_format=memory_format)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.loss_function = loss_function
        self.autocast_dtype = autocast_dtype
        self.memory_format = memory_format
        self.after_step = after_step
        self.history = History()

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Run the model on ``[batch, channels, height, width]`` inputs in this object's precision and layout."""
        with torch.autocast("cpu", dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self.model(inputs.to(memory_format=self.memory_format))

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss of a batch, in float32 and with its graph."""
        return self.loss_function(self.logits(inputs).float(), targets)

    def train_step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Do one step on one batch and record it; the model is left in training mode.

        Parameters
        ----------
        inputs : torch.Tensor
            ``[batch, channels, height, width]``.
        targets : torch.Tensor
            What the loss function compares with; class numbers by default.

        Returns
        -------
        float
            The loss before the update.

        Raises
        ------
        FloatingPointError
            If the loss is not finite; the step is not recorded.
        """
        self.model.train()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(inputs, targets)
        loss.backward()
        self.optimizer.step()
        if self.after_step is not None:
            self.after_step()
        seconds = time.perf_counter() - start
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} in training step {len(self.history.losses) + 1}")
        if self.scheduler is not None:
            self.scheduler.step()
        self.history.losses.append(value)
        self.history.step_seconds.append(seconds)
        return value

    def train(
        self,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        *,
        warmup: int = 0,
        on_step: Callable[[float], None] | None = None,
    ) -> None:
        """Do one step on each of the batches.

        Parameters
        ----------
        batches : iterable of (inputs, targets)
            For instance a ``DataLoader``: one epoch.
        warmup : int
            So many steps of this call are marked as warm-up.
        on_step : callable, optional
            Called with the loss after each step, outside the timed part.
        """
        for index, (inputs, targets) in enumerate(batches):
            if index < warmup:
                self.history.warmup_steps.add(len(self.history.losses))
            loss = self.train_step(inputs, targets)
            if on_step is not None:
                on_step(loss)

    def evaluate(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """Measure top-1 accuracy without gradients and record it; the model is left in evaluation mode.

        Parameters
        ----------
        batches : iterable of (inputs, targets)
            Targets are class numbers ``[batch]``.

        Returns
        -------
        float
            Percent of correct predictions.

        Raises
        ------
        ValueError
            If there is not a single sample.
        """
        self.model.eval()
        correct = total = 0
        # Not inference_mode: what a module caches during it could not be used for training afterwards.
        with torch.no_grad():
            for inputs, targets in batches:
                correct += int((self.logits(inputs).argmax(dim=1) == targets).sum())
                total += len(targets)
        if total == 0:
            raise ValueError("cannot evaluate on an empty set")
        top1 = 100 * correct / total
        self.history.evaluations.append(Evaluation(len(self.history.losses), self.history.train_seconds, top1))
        return top1
