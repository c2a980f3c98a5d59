"""Gradients that are computed when the layer before the chain takes them, in the pass that packs them for it."""

from __future__ import annotations

import functools
import threading
import weakref

import torch
from torch import Tensor

from qsparseprop._torch_compat import at_the_end_of_backward, current_backward
from qsparseprop.layout.geometry import Geometry
from qsparseprop.nn.deferred import passes
from qsparseprop.nn.deferred.layout import Layout
from qsparseprop.nn.deferred.passes import Activation
from qsparseprop.ops import Packed
from qsparseprop.quantization import QuantConfig


class PendingGradient:
    """``g * factor[0] + codes * factor[1] + factor[2]`` with ``g = dy * slope of the activation``, or g alone.

    Attributes
    ----------
    layout : Layout
        Of the tensor that it is the gradient of.
    dy : Tensor
        Rows of the gradient behind the activation.
    saved : Tensor or None
        What the activation has saved.
    activation : Activation
    codes, factor : Tensor or None
        Of a batch normalisation, see `ops.norm_factors`.
    ranges : Tensor or None
        Bounds for each channel, of the same magnitude below and above.
    total : Tensor or None
        The sum over rows.
    """

    def __init__(
        self,
        layout: Layout,
        dy: Tensor,
        saved: Tensor | None,
        activation: Activation,
        codes: Tensor | None = None,
        factor: Tensor | None = None,
        ranges: Tensor | None = None,
        total: Tensor | None = None,
        behind: PendingGradient | None = None,
    ) -> None:
        self.layout, self.dy, self.saved, self.activation, self.codes = layout, dy, saved, activation, codes
        self.factor, self.ranges, self.total = factor, ranges, total
        # of g, which somebody else may want, too: then one pass gives both
        self._behind = None if behind is None else weakref.ref(behind)
        self._values: Tensor | None = None
        self._lock = threading.RLock()
        _compute_at_the_end(self)

    @property
    def open(self) -> bool:
        """Whether nobody has seen the values."""
        return self._values is None

    def plain(self) -> Tensor:
        """The values as an ordinary tensor."""
        with self._lock:
            if self._values is None:
                with torch.no_grad():
                    return self._take(passes.gradient(self.dy, self.codes, self.saved, self.activation, self.factor))
            return self._values

    def _take(self, rows: Tensor) -> Tensor:
        self._values = self.layout.tensor(rows).detach()
        return self._values

    def pack(self, geometry: Geometry, qconfig: QuantConfig) -> tuple[Packed, Tensor]:
        """The packed form for the layer before, and the sum over rows, part of a larger tensor."""
        with self._lock:
            ranges, total = self.ranges, self.total
            if ranges is None or total is None:
                total, _, most = passes.sums(self.dy, None, self.saved, self.activation).float().unbind(1)
                ranges = torch.stack([-most, most], 1)
            behind = None if self._behind is None else self._behind()
            packed, g = passes.gradient_pack(self.dy, self.codes, self.saved, self.activation, self.factor, ranges,
                                             geometry, qconfig, behind is not None and behind.open)  # fmt: skip
            if behind is not None and g is not None:
                with behind._lock:
                    if behind.open:
                        behind._take(g)
            return packed, total


_open = threading.local()  # gradients that are not computed yet, of each backward pass that runs in the thread


def _compute_at_the_end(gradient: PendingGradient) -> None:
    """See to it that a gradient whose memory others might change later is computed before the backward pass ends."""
    task = current_backward()
    if task is None:  # somebody calls a node by hand
        gradient.plain()
        return
    tasks = _open.__dict__.setdefault("tasks", {})
    gradients = tasks.get(task)
    if gradients is None:
        for old in [key for key, others in tasks.items() if not any(ref() for ref in others)]:
            del tasks[old]  # of passes that have failed
        gradients = tasks[task] = []
        at_the_end_of_backward(functools.partial(_compute_open, task))
    gradients.append(weakref.ref(gradient))


def _compute_open(task: int) -> None:
    for reference in _open.tasks.pop(task, ()):
        gradient = reference()
        if gradient is not None:
            gradient.plain()
