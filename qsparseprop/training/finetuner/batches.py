"""What a batch consists of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["are_classes", "count_correct", "split_batch"]


def split_batch(batch: Any) -> tuple[Any, torch.Tensor]:
    """Inputs and targets of a batch: ``(inputs, targets)``, or a mapping whose ``"labels"`` are the targets.

    Raises
    ------
    ValueError
        For anything else.
    """
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise ValueError(f"a batch that is a mapping needs the key 'labels', got {sorted(batch)}")
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ValueError(f"a batch must be (inputs, targets) or a mapping with 'labels', got {type(batch).__name__}")
    *inputs, targets = batch
    return (inputs[0] if len(inputs) == 1 else inputs), targets


def are_classes(targets: torch.Tensor) -> bool:
    """Whether targets are class numbers, one a sample."""
    return targets.ndim == 1 and not targets.is_floating_point()


def count_correct(outputs: torch.Tensor, targets: torch.Tensor) -> int | None:
    """How many predictions (batch, classes) are right; None where nothing is classified."""
    if not are_classes(targets) or outputs.ndim != 2:
        return None
    return int((outputs.argmax(dim=1) == targets).sum())
