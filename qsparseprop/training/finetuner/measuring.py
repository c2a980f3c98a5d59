"""Accuracy and loss of a model, without gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from qsparseprop.training.processes import share_buffers

from .batches import at_least_float32, count_correct, split_batch
from .checkpoint import random_state, set_random_state
from .history import Evaluation
from .shared_memory import watched

if TYPE_CHECKING:
    from .trainer import Finetuner

__all__ = ["measure"]


def measure(tuner: Finetuner, batches: Iterable[Any]) -> Evaluation:
    """What `Finetuner.measure` does, on the batches of all processes.

    Raises
    ------
    ValueError
        If there is not a single sample.
    """
    tuner.model.eval()
    if tuner.parallel is not None:
        share_buffers(tuner.model)
    sums = [0.0, 0.0, 0.0, 0.0]  # of losses, samples, correct ones, and batches in which nothing is classified
    state = random_state()
    try:
        # Not inference_mode: what a module caches during it could not be used for training afterwards.
        with torch.no_grad():
            for batch in watched(batches):
                inputs, targets = split_batch(batch)
                outputs = at_least_float32(tuner.logits(inputs))
                loss = len(targets) * tuner.loss_function(outputs, targets).item()
                right = count_correct(outputs, targets)
                found = (loss, len(targets), right or 0, right is None)
                sums = [a + b for a, b in zip(sums, found, strict=True)]
    finally:
        set_random_state(state)
    loss, total, correct, unclassified = tuner.together.total(sums)
    if total == 0:
        raise ValueError("cannot evaluate on an empty set")
    top1 = None if unclassified else 100 * correct / total
    return Evaluation(len(tuner.history.losses), tuner.history.train_seconds, top1, loss / total)
