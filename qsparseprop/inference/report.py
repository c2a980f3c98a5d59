"""What `freeze` did to each layer, what that costs, and what a model's accuracy is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qsparseprop import arguments
from qsparseprop.contents import check_memory_of
from qsparseprop.utils._classes import check_classes

__all__ = ["FreezeReport", "LayerReport", "measure_accuracy"]


@dataclass
class LayerReport:
    """What became of one layer.

    Attributes
    ----------
    name, kind : str
        Qualified name in the model, and what it is.
    zeros : float or None
        Fraction of zeros in its weight.
    quantised : bool
        Whether it computes on codes.
    reason : str
        Why it does not.
    error : float or None
        Root mean square of the difference to the float layer's output on the calibration data, divided by that of the
        output itself; errors of the layers before it are in it.
    """

    name: str
    kind: str
    zeros: float | None
    quantised: bool
    reason: str = ""
    error: float | None = None


class FreezeReport(list[LayerReport]):
    """A `LayerReport` for every layer with weights; prints as a table.

    Parameters
    ----------
    layers : iterable of LayerReport

    Attributes
    ----------
    whole : bool
        Whether the model is one program; otherwise parts of it are.
    reason : str
        Why it is not.
    metric_before, metric_after : float or None
        Of the model and of the frozen one, where `freeze` was given a metric.
    """

    def __init__(self, layers: Iterable[LayerReport] = ()) -> None:
        super().__init__(layers)
        self.whole = True
        self.reason = ""
        self.metric_before: float | None = None
        self.metric_after: float | None = None

    def __copy__(self) -> FreezeReport:
        new = FreezeReport(self)
        vars(new).update(vars(self))
        return new

    def worst(self, count: int = 10) -> list[LayerReport]:
        """The layers with the largest errors, the largest first.

        Parameters
        ----------
        count : int
            How many at most.

        Returns
        -------
        list of LayerReport
        """
        measured = [layer for layer in self if layer.error is not None]
        return sorted(measured, key=lambda layer: -(layer.error or 0.0))[:count]

    def as_dicts(self) -> list[dict[str, Any]]:
        """For JSON.

        Returns
        -------
        list of dict
        """
        return [asdict(layer) for layer in self]

    def summary(self) -> str:
        """How many layers compute on codes, in a few words.

        Returns
        -------
        str
        """
        return f"{sum(layer.quantised for layer in self)} of {len(self)} layers on codes"

    def __str__(self) -> str:
        rows = [("layer", "type", "zeros", "error", "computes on")]
        for layer in self:
            rows.append((
                layer.name or "-", layer.kind, "-" if layer.zeros is None else f"{100 * layer.zeros:.1f} %",
                "-" if layer.error is None else f"{100 * layer.error:.2f} %",
                "codes" if layer.quantised else f"floats: {layer.reason}",
            ))  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        lines.append(f"{self.summary()}; errors are relative, of outputs on the calibration data")
        if worst := self.worst(3):
            lines.append("largest errors: " + ", ".join(f"{w.name} {100 * (w.error or 0.0):.2f} %" for w in worst))
        if not self.whole:
            lines.append(f"frozen part by part: {self.reason}")
        if self.metric_before is not None and self.metric_after is not None:
            lines.append(f"metric {self.metric_before:.4g} before, {self.metric_after:.4g} after")
        return "\n".join(lines)


def _check_labels(labels: Any, result: Any, metric: str) -> None:
    """Refuse labels that are not one for each output: a single one would be compared with all of them."""
    if not isinstance(result, Tensor) or result.dim() < 2:
        what = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise ValueError(f"{metric} needs a model that gives a tensor (samples, classes, ...), this one gave {what}: "
                         "measure a function of the result and the labels instead")  # fmt: skip
    arguments.instance(labels, Tensor, "labels", "a tensor")
    rows, classes = result.shape[:2]
    if labels.numel() != rows:
        raise ValueError(f"{metric} needs the number of a class for each of {rows} outputs, got labels of shape "
                         f"{tuple(labels.shape)}")  # fmt: skip
    if rows and (largest := int(labels.max())) >= classes:
        raise ValueError(f"the model has outputs for {classes} classes, from 0 on, and there is a label {largest}")


@torch.no_grad()
def measure_accuracy(
    model: nn.Module, batches: Iterable[Sequence[Tensor]], metric: str | Callable[[Any, Tensor], float] = "top1"
) -> float:
    """Accuracy of a model, or the mean of a metric, on batches of (inputs, labels).

    Parameters
    ----------
    model : torch.nn.Module
        Frozen or not; in evaluation mode while it is measured.
    batches : iterable of (Tensor or tuple of Tensor, Tensor)
        Such as a DataLoader.
    metric : str or callable
        "top1", "top5", the percentage of samples whose label is among the largest outputs; or a function of the model's
        result and the labels, whose mean over all samples is given.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If there are no batches, no such metric, or labels that are not one class for each output; or if model and
        batches both say by their attribute ``classes`` what the classes are called, as frozen models and image loaders
        do, and these are others.
    """
    arguments.model(model)
    check_memory_of(model)
    if metric not in ("top1", "top5") if isinstance(metric, str) else not callable(metric):
        raise ValueError(f"metric must be 'top1', 'top5' or a function, got {arguments.shown(metric)}")
    here, there = (getattr(one, "classes", None) for one in (batches, model))
    if isinstance(here, tuple) and isinstance(there, tuple):
        check_classes(here, there, ("the model", "the images"), "measure it on images of its own")
    training = [module for module in model.modules() if module.training]
    model.eval()
    total, samples = 0.0, 0
    try:
        for inputs, labels in batches:
            given = inputs if isinstance(inputs, list | tuple) else (inputs,)
            result = model(*given)
            samples += len(labels)
            if isinstance(metric, str):
                _check_labels(labels, result, metric)
                chosen = result.topk(min(int(metric[3:]), result.shape[1]), 1).indices
                total += 100.0 * float((chosen == labels.view(-1, 1)).any(1).sum())
            else:
                total += float(metric(result, labels)) * len(labels)
    finally:
        for module in training:
            module.training = True
    if not samples:
        raise ValueError("there are no batches to measure the accuracy on")
    return total / samples
