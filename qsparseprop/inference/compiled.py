"""Programs on the kernels: runs of steps, and calls of torch between them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from qsparseprop._kernels import _dispatch
from qsparseprop._kernels._frozen import Segment
from qsparseprop.inference.calls import call_operator
from qsparseprop.inference.program import Call, Program, Quantize, Step
from qsparseprop.inference.segments import Lowering
from qsparseprop.inference.weights_in_memory import WeightStore

__all__ = ["CompiledProgram"]

#: Batch sizes that a run keeps ready.
KEPT_BATCHES = 8


class _Run:
    """Steps between two calls of torch, for the batch sizes that they were last used with.

    Parameters
    ----------
    program : Program
    steps : list of Step
    wanted : set of str
        Values that others read.
    weights : WeightStore
    """

    def __init__(self, program: Program, steps: list[Step], wanted: set[str], weights: WeightStore) -> None:
        self._program, self._steps, self._wanted, self._weights = program, steps, wanted, weights
        self._kept: OrderedDict[tuple[int, str], tuple[Lowering, Segment]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, values: dict[str, Any]) -> dict[str, Tensor]:
        """The values that others read."""
        sources = {name for step in self._steps if isinstance(step, Quantize) for name in step.inputs}
        sizes = {values[name].shape[0] for name in sources}
        if len(sizes) != 1:
            raise ValueError(f"inputs must be of one batch, got {sorted(sizes)}")
        (batch,) = sizes
        shapes = {name: (batch, *self._program.values[name].shape) for name in self._wanted_here()}
        if not batch:
            return {name: torch.empty(shape) for name, shape in shapes.items()}
        lowering, segment = self._get(batch)
        results = segment(tuple(values[name] for name in lowering.inputs), torch.get_num_threads())
        return {name: result.view(shapes[name]) for name, result in zip(lowering.outputs, results, strict=True)}

    def _wanted_here(self) -> list[str]:
        values = self._program.values
        names = [step.output for step in self._steps if step.output in self._wanted]
        return [name for name in names if values[name].codes is None]

    def _get(self, images: int) -> tuple[Lowering, Segment]:
        key = images, _dispatch.active_isa()
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        lowering = Lowering(self._program, self._steps, self._wanted, images, self._weights)
        made = lowering, lowering.segment()
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > KEPT_BATCHES:
                self._kept.popitem(last=False)
        return made


class CompiledProgram:
    """A program on the kernels, for batches of any size. Several threads may call it at once.

    What a batch size asks for is made when one first comes, and kept for some of them; weights are shared.

    Parameters
    ----------
    program : Program
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        weights, runs = WeightStore(), _runs(program)
        self._parts: list[_Run | Call] = []
        for place, run in enumerate(runs):
            if isinstance(run, Call):
                self._parts.append(run)
                continue
            later = {name for other in runs[place + 1:] for name in _read(other)} | set(program.outputs)
            self._parts.append(_Run(program, run, later, weights))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs.

        Parameters
        ----------
        *inputs : Tensor
            (batch, ...) each; float32 or bfloat16 where they become codes.

        Returns
        -------
        tuple of Tensor
        """
        values: dict[str, Any] = {**self._program.constants, **dict(zip(self._program.inputs, inputs, strict=True))}
        for part in self._parts:
            if isinstance(part, Call):
                values[part.output] = call_operator(part, values)
            else:
                values.update(part(values))
        return tuple(values[name] for name in self._program.outputs)


def _runs(program: Program) -> list[list[Step] | Call]:
    """Steps in runs without calls of torch between them; tokens, of which there are more, in runs of their own."""
    runs: list[list[Step] | Call] = []
    for step in program.steps:
        last = runs[-1] if runs else None
        if isinstance(step, Call):
            runs.append(step)
        elif isinstance(last, list) and program.values[last[-1].output].rows == program.values[step.output].rows:
            last.append(step)
        else:
            runs.append([step])
    return runs


def _read(run: list[Step] | Call) -> set[str]:
    return {name for step in (run if isinstance(run, list) else [run]) for name in step.inputs}
