"""Frozen against float on the calibration data, layer by layer: errors are measured, and corrected in biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsparseprop.inference.draft import Draft, Layer, Node, compute
from qsparseprop.inference.program import Program
from qsparseprop.inference.reference import Tokens, run_step
from qsparseprop.inference.steps import Codes, Product, Step, Window
from qsparseprop.inference.weights import real_weight

__all__ = ["SAMPLES", "refine"]

#: Samples of the calibration data that are looked at.
SAMPLES = 256


def refine(
    draft: Draft, program: Program, batches: Sequence[Sequence[Tensor]], correct: bool
) -> tuple[Program, dict[str, float]]:
    """Compute a draft and its program side by side.

    Parameters
    ----------
    draft : Draft
    program : Program
    batches : sequence of sequence of Tensor
        Inputs.
    correct : bool
        Whether to add to the bias of each product what its sums, and the residual that is added to them, are too small
        on average in each channel: the mean of the float layer's minus the mean of the frozen layer's. The latter's
        input comes from frozen layers that are corrected already. It is exact: layers are linear, so that the mean of
        an output is the output of the mean.

    Returns
    -------
    Program
    dict
        By the output of each product: its error, the root mean square of the difference divided by that of the float
        values.
    """
    sweep = _Sweep(draft, program, _few(batches))
    steps = [sweep.step(step, correct) for step in program.steps]
    return replace(program, steps=tuple(steps)), sweep.errors


def _few(batches: Sequence[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """The first batches, so many as have `SAMPLES`, the last one whole."""
    kept: list[Sequence[Tensor]] = []
    for batch in batches:
        kept.append(batch)
        if sum(each[0].shape[0] for each in kept) >= SAMPLES:
            break
    return kept


class _Sweep:
    """All batches at once, step by step."""

    def __init__(self, draft: Draft, program: Program, batches: Sequence[Sequence[Tensor]]) -> None:
        self.draft, self.program = draft, program
        self.nodes: dict[str, Node] = {node.output: node for node in draft.nodes}
        self.exact: list[dict[str, Any]] = [dict(zip(draft.inputs, batch, strict=True)) for batch in batches]
        self.frozen: list[dict[str, Any]] = [dict(values) for values in self.exact]
        self.errors: dict[str, float] = {}
        self.last = _last_use(program.steps, program.outputs)
        in_order = [self.nodes[step.output] for step in program.steps if step.output in self.nodes]
        self.last_exact = _last_use(in_order, draft.outputs)

    def step(self, step: Step, correct: bool) -> Step:
        """Compute a step on all batches; gives it with its corrected bias."""
        node = self.nodes.get(step.output)
        if isinstance(step, Product) and correct:
            assert isinstance(node, Layer)
            step = replace(step, bias=(step.bias.double() + self._missing(step, node)).float())
        with torch.no_grad():
            for exact, frozen in zip(self.exact, self.frozen, strict=True):
                known = {name: frozen[name] if name in frozen else self.program.constants[name] for name in step.inputs}
                frozen[step.output] = run_step(step, self.program.values, known)
                if node is not None:
                    exact[step.output] = compute(node, exact, self.draft.constants)
        if isinstance(step, Product):
            self.errors[step.output] = self._error(step.output)
        for values, last in ((self.frozen, self.last), (self.exact, self.last_exact)):
            for each in values:
                for name in last.get(step.output, ()):
                    each.pop(name, None)
        return step

    def _real(self, name: str, values: Tensor | Tokens) -> Tensor:
        codes = self.program.values[name].codes
        if isinstance(values, Tokens):
            assert codes is not None
            return _real(values.codes, codes) * values.scale.double()
        return values.double() if codes is None else _real(values, codes)

    def _means(self, name: str, exact_name: str) -> tuple[Tensor, Tensor]:
        """Mean over all samples of what a value should be, and of what it is: float64."""
        count = sum(values[exact_name].shape[0] for values in self.exact)
        exact = torch.stack([values[exact_name].double().sum(0) for values in self.exact]).sum(0)
        frozen = torch.stack([self._real(name, values[name]).sum(0) for values in self.frozen]).sum(0)
        return exact / count, frozen / count

    def _missing(self, step: Product, node: Layer) -> Tensor:
        source = self.program.values[step.inputs[0]].coded
        exact, frozen = self._means(step.inputs[0], node.inputs[0])
        wanted = _linear(node, node.weight.double(), exact)
        missing = wanted - _linear(node, real_weight(node, step.weight, source), frozen)
        if len(step.inputs) == 2:
            exact, frozen = self._means(step.inputs[1], node.inputs[1])
            missing = missing + (exact - frozen).view_as(missing)
        return missing.flatten(1).mean(1)

    def _error(self, name: str) -> float:
        difference = sum(float((self._real(name, frozen[name]) - exact[name].double()).square().sum())
                         for exact, frozen in zip(self.exact, self.frozen, strict=True))  # fmt: skip
        size = sum(float(exact[name].double().square().sum()) for exact in self.exact)
        return (difference / size) ** 0.5 if size else float(difference > 0)


def _real(values: Tensor, codes: Codes) -> Tensor:
    scale = codes.scale.double().view(1, -1, *[1] * (values.ndim - 2))
    return (values.double() - codes.zero_point) * scale


def _linear(node: Layer, weight: Tensor, image: Tensor) -> Tensor:
    """A layer without its bias on one sample: (rows, height, width)."""
    image = image.view(image.shape[0], *(image.shape[1:] if image.ndim == 3 else (1, 1)))
    window: Window = node.window
    top, bottom, left, right = window.padding
    filters = weight.view(*weight.shape, *[1] * (4 - weight.ndim))
    padded = F.pad(image.unsqueeze(0), (left, right, top, bottom))
    return F.conv2d(padded, filters, None, window.stride, 0, window.dilation, node.groups)[0]


def _last_use(steps: Sequence[Step] | Sequence[Node], outputs: Sequence[str]) -> dict[str, list[str]]:
    """Values that nobody needs after a step, by its output."""
    last: dict[str, str] = {}
    for step in steps:
        last.update(dict.fromkeys((*step.inputs, step.output), step.output))
    found: dict[str, list[str]] = {}
    for name, after in last.items():
        if name not in outputs:
            found.setdefault(after, []).append(name)
    return found
