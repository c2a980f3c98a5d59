"""What a program from a file must keep to, beyond what programs check themselves: it may have been made to do harm.

A program that passes here has buffers that fit into offsets of 32 bits, factors that are finite, and calls of operators
that compute and do nothing else, on values that are there. What calls themselves refuse, wrong shapes for instance, or
how much memory they take, only running them shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qsparseprop.inference.calls import Name, find_operator
from qsparseprop.inference.lanes import find_lanes
from qsparseprop.inference.operators import is_training
from qsparseprop.inference.program import Program
from qsparseprop.inference.reference import factors_of, inverse_scale
from qsparseprop.inference.steps import Add, Call, Pool, Product, Quantize, Step, Value, Window
from qsparseprop.layout.geometry import BLOCK_LANES
from qsparseprop.utils.errors import refuse_more_than_memory

__all__ = ["check_limits", "check_pools"]

#: Taps of a window times the phases that it reads: what is looked at one by one when kernels are set up.
_MOST_TAPS = 1 << 24
#: Of which an int32 holds the sum.
_MOST_POOLED = 1 << 22
#: Columns that the kernels take the largest of.
_WIDEST_MAXIMUM = 256
#: Outputs of one axis times taps of a pool, which programs look at one by one.
_MOST_SEEN = 1 << 24


def check_pools(steps: Sequence[Step], values: Mapping[str, Value]) -> None:
    """Refuse pools that a program would take long to check.

    Parameters
    ----------
    steps : sequence of Step
    values : mapping of str to Value
        Of each output.

    Raises
    ------
    ValueError
        With the step.
    """
    for step in steps:
        if isinstance(step, Pool):
            sizes = values[step.output].shape[1:]  # of another output than images programs say so
            seen = max((size * kernel for size, kernel in zip(sizes, step.window.kernel, strict=False)), default=0)
            if seen > _MOST_SEEN or math.prod(step.window.kernel) > _MOST_POOLED:
                raise ValueError(f"step {step.output!r:.60}: a window of {step.window.kernel} pixels is too large")


def check_limits(program: Program) -> None:
    """Refuse a program that could not be run safely.

    Parameters
    ----------
    program : Program

    Raises
    ------
    ValueError
        With what is wrong with it.
    """
    _check_names(program)
    for step in program.steps:
        try:
            _check_step(step, program)
        except ValueError as error:
            raise ValueError(f"step {step.output!r:.60}: {error}") from error
    if any(value.codes is not None for value in program.values.values()):
        _check_lanes(program)


def _demand(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _check_names(program: Program) -> None:
    inputs = set(program.inputs)
    _demand(len(inputs) == len(program.inputs), "an input comes twice")
    _demand(inputs.isdisjoint(program.constants), "an input is a constant, too")
    unknown = inputs - program.values.keys()
    _demand(not unknown, f"the input {min(unknown, default='')!r:.60} has no shape")
    made = {step.output for step in program.steps} | inputs | program.constants.keys()
    lost = program.values.keys() - made
    _demand(not lost, f"nothing computes {min(lost, default='')!r:.60}")
    coded = [name for name in program.constants if name in program.values and program.values[name].codes is not None]
    _demand(not coded, "constants are ordinary tensors")
    read = {name for step in program.steps for name in step.inputs} | set(program.outputs)
    unread = (program.constants.keys() | {step.output for step in program.steps}) - read
    _demand(not unread, f"nothing reads {min(unread, default='')!r:.60}")


def _check_step(step: Step, program: Program) -> None:
    if isinstance(step, Call):
        _check_call(step, program)
        return
    sources, target = [program.values[name] for name in step.inputs], program.values[step.output]
    if isinstance(step, Product):
        _demand(step.weight.rows >= 1, "a weight must have rows")
        _check_taps(step.window)
    elif isinstance(step, Pool):
        wide = (step.window.kernel[1] - 1) * step.window.dilation[1] + 1
        _demand(step.kind == "mean" or wide <= _WIDEST_MAXIMUM, f"a window of a maximum has at most {_WIDEST_MAXIMUM} "
                "columns")  # fmt: skip
    elif isinstance(step, Quantize):
        _demand(bool(inverse_scale(target.coded).isfinite().all()), "a scale is too small")
    if isinstance(step, Product | Add | Pool):
        factors = factors_of(step, sources, target)
        given = [f for f in (factors.multiplier, factors.offset, factors.residual) if f is not None]
        _demand(all(bool(f.isfinite().all()) for f in given), "its scales are too far apart for float32")
        limits = factors.low, factors.high
        _demand(not any(bool(f.isnan().any()) for f in limits), "its limits are no numbers")


def _check_taps(window: Window) -> None:
    taps = math.prod(window.kernel)
    phases = math.prod(min(k, s) for k, s in zip(window.kernel, window.stride, strict=True))
    _demand(taps * phases <= _MOST_TAPS, f"a window of {taps} pixels in {phases} phases is too large")


def _check_call(step: Call, program: Program) -> None:
    names = set(_names([step.arguments, list(step.keywords.values())]))
    hidden = names - set(step.inputs)
    _demand(not hidden, f"its argument {min(hidden, default='')!r:.60} is not among its inputs")
    coded = [n for n in step.inputs if n in program.values and program.values[n].codes is not None]
    _demand(not coded, f"it reads {coded[:1]}, which is coded")
    _demand(all(isinstance(key, str) for key in step.keywords), "keywords are names")
    if step.operator == "getitem":  # takes one of several results
        whole = len(step.arguments) == 2 and type(step.arguments[1]) is int and not step.keywords
        _demand(whole and isinstance(step.arguments[0], Name), "takes a value and a whole number")
        return
    operator = find_operator(step.operator)
    _demand(not is_training(operator, step.arguments, step.keywords), f"{step.operator} is one of training")


def _names(argument: Any) -> Iterator[str]:
    if isinstance(argument, Name):
        yield argument.name
    elif isinstance(argument, list | tuple):
        for each in argument:
            yield from _names(each)


def _check_lanes(program: Program) -> None:
    """That the kernels have a layout for one image and for many, and memory for one."""
    find_lanes(program, BLOCK_LANES)
    lanes = find_lanes(program, 1)
    coded = [value for value in program.values.values() if value.codes is not None]
    needed = sum(lanes[value.image].grid(value.shape[0]).lanes(value.rows) for value in coded)
    refuse_more_than_memory(needed, "the codes of one sample")
