"""Programs on the kernels, for batches of any size."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from qsparseprop._kernels import _dispatch
from qsparseprop._kernels._frozen import give_arena, take_arena
from qsparseprop.inference.calls import call_operator
from qsparseprop.inference.program import Program
from qsparseprop.inference.segments import Lowering, Part
from qsparseprop.inference.steps import Call
from qsparseprop.inference.weights_in_memory import WeightStore
from qsparseprop.ops.threads import thread_count

__all__ = ["CompiledProgram"]

#: Batch sizes that are kept ready.
KEPT_BATCHES = 8


class CompiledProgram:
    """A program on the kernels. Several threads may call it at once.

    What a batch size asks for is made when one first comes, and kept for some of them; weights are shared.

    Parameters
    ----------
    program : Program
    """

    def __init__(self, program: Program) -> None:
        self._program, self._weights = program, WeightStore()
        self._kept: OrderedDict[tuple[int, str], Lowering] = OrderedDict()
        self._lock = threading.Lock()

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
        batch, threads = inputs[0].shape[0], thread_count()
        lowering = self.get(max(batch, 1))
        arena = take_arena(lowering.arena)
        bad: dict[str, Tensor] = {}
        for part in lowering.parts:
            if isinstance(part, Call):
                values[part.output] = call_operator(part, values)
            elif batch:
                self._run(part, values, batch, arena, threads)
                _mark(part, values, bad)
            else:
                shapes = {name: self._program.values[name].shape for name in part.outputs}
                values.update({name: torch.empty(0, *shape, dtype=torch.float32, device="cpu")
                               for name, shape in shapes.items()})  # fmt: skip
        give_arena(arena)
        # nobody is to write into what belongs to the program
        constants = self._program.constants
        return tuple(values[name].clone() if name in constants else values[name] for name in self._program.outputs)

    def _run(self, part: Part, values: dict[str, Any], batch: int, arena: Tensor, threads: int) -> None:
        # kernels read memory, which does not show that a view of it is negated
        results = part.segment(tuple(values[name].resolve_neg() for name in part.inputs), arena, threads)
        for name, result in zip(part.outputs, results, strict=True):
            known = self._program.values[name]
            values[name] = result.view(batch * known.rows, *known.shape)

    def get(self, batch: int) -> Lowering:
        """The steps for a batch of a size, 1 or more, on the instruction set in use."""
        key = batch, _dispatch.active_isa()
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        made = Lowering(self._program, batch, self._weights)
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > KEPT_BATCHES:
                self._kept.popitem(last=False)
        return made

    def __reduce__(self) -> tuple[type[CompiledProgram], tuple[Program]]:
        # what is made for batches is made again
        return CompiledProgram, (self._program,)


def _mark(part: Part, values: dict[str, Any], bad: dict[str, Tensor]) -> None:
    """Make NaN of what comes from rows with NaN or infinities, whose codes would not show it.

    Rows are samples or tokens, which steps on codes keep apart; calls of torch, which may mix or move them, find NaN.

    Parameters
    ----------
    part : Part
    values : dict
        What it took and gave, by name.
    bad : dict
        Which rows are meant, by the names of values that have some; codes of earlier parts may be read by later ones.
    """
    for name in part.limited:
        # a sum finds them in one look, and now and then where there are none
        if not bool(values[name].sum().isfinite()):
            bad[name] = ~values[name].flatten(1).isfinite().all(1)
    if not bad:
        return
    for step in part.steps:
        masks = [bad[name] for name in step.inputs if name in bad]
        if masks:
            bad[step.output] = torch.stack(masks).any(0)
    for name in part.outputs:
        if name in bad:
            values[name][bad[name]] = torch.nan
