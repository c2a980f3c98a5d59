"""A draft and its scales become a program: weights and tables of codes, and steps from ordinary tensors and to them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qsparseprop.inference.coding import Coding
from qsparseprop.inference.draft import Draft, Flat, Function, Joined, Layer, Node, Pooling, Shape, Sum, renamed
from qsparseprop.inference.program import Program
from qsparseprop.inference.steps import (
    Add,
    Call,
    Codes,
    Concat,
    Dequantize,
    Flatten,
    Pool,
    Product,
    Quantize,
    Step,
    Table,
    Value,
)
from qsparseprop.inference.weights import code_weight

__all__ = ["code_table", "in_runs", "lower"]


def lower(draft: Draft, coding: Coding, codes: dict[str, Codes], dynamic: Collection[str] = ()) -> Program:
    """The program of a draft.

    Parameters
    ----------
    draft : Draft
    coding : Coding
    codes : dict
        Codes of each value that has some.
    dynamic : collection of str
        Values whose tokens have scales of their own.

    Returns
    -------
    Program
    """
    return _Lowering(draft, coding, codes, dynamic).program()


def code_table(node: Function, source: Codes, target: Codes) -> Tensor:
    """The codes of a function of each code, computed in float64: uint8, (256,), or (channels, 256).

    Parameters
    ----------
    node : Function
    source, target : Codes

    Returns
    -------
    Tensor
    """
    scales = torch.stack([source.scale.double(), target.scale.double()], 1)
    if bool((scales == scales[0]).all()):
        scales = scales[:1]
    real = (torch.arange(256, dtype=torch.float64) - source.zero_point) * scales[:, :1]
    table = (node.of(real) / scales[:, 1:]).round() + target.zero_point
    table = table.clamp(0, 255).to(torch.uint8)
    return table[0].clone() if table.shape[0] == 1 else table


class _Lowering:
    def __init__(self, draft: Draft, coding: Coding, codes: dict[str, Codes], dynamic: Collection[str]) -> None:
        self.draft, self.coding, self.codes, self.dynamic = draft, coding, codes, dynamic
        self.steps: list[Step] = []
        self.constants = dict(draft.constants)
        self.values: dict[str, Value] = {name: self._plain_value(name) for name in draft.inputs}
        #: Under which names a value exists, as codes and as an ordinary tensor.
        self.coded: dict[str, str] = {}
        self.plain: dict[str, str] = {name: name for name in (*draft.inputs, *draft.constants)}

    def program(self) -> Program:
        for node in self.draft.nodes:
            if id(node) in self.coding.coded:
                self._code(node)
            else:
                self._call(node)
        outputs = tuple(self._as_plain(name) for name in self.draft.outputs)
        known = (*self.draft.inputs, *self.constants)
        steps = min((in_runs(self.steps, known, calls) for calls in (False, True)), key=_count_runs)
        return Program(self.draft.inputs, outputs, self.values, tuple(steps), self.constants)

    def _plain_value(self, name: str) -> Value:
        return Value(_known(self.draft.shapes.get(name, ())), rows=self.draft.rows.get(name, 1))

    def _as_codes(self, name: str) -> str:
        if name not in self.coded:
            self.coded[name] = coded = f"{name}.codes"
            self.values[coded] = replace(self.values[name], codes=self.codes[name])
            self.steps.append(Quantize((name,), coded, name in self.dynamic))
        return self.coded[name]

    def _as_plain(self, name: str) -> str:
        if name not in self.plain:
            self.plain[name] = plain = f"{name}.real"
            self.values[plain] = replace(self.values[name], codes=None)
            self.steps.append(Dequantize((self.coded[name],), plain))
        return self.plain[name]

    def _call(self, node: Node) -> None:
        own: dict[str, Tensor] = {}
        calls = node.calls(own)
        self.constants.update(own)
        if any(name not in self.plain for name in node.inputs):
            from_codes = {name: self._as_plain(name) for name in node.inputs}
            calls = [renamed(call, from_codes) for call in calls]
        for call in calls:
            self.values[call.output] = self._plain_value(call.output)
            self.steps.append(call)
        self.plain[node.output] = node.output

    def _code(self, node: Node) -> None:
        inputs = tuple(self._as_codes(name) for name in node.inputs)
        output = node.output
        coded = output in self.coding.values
        self.values[output] = replace(self._plain_value(output), codes=self.codes[output] if coded else None)
        self.steps.append(self._step(node, inputs))
        (self.coded if coded else self.plain)[output] = output

    def _step(self, node: Node, inputs: tuple[str, ...]) -> Step:
        output = node.output
        if isinstance(node, Layer):
            weight = code_weight(node, self.values[inputs[0]].coded)
            return Product(inputs, output, weight, node.bias, node.window, node.groups, node.low, node.high)
        if isinstance(node, Pooling):
            return Pool(inputs, output, node.kind, node.window, node.count_padding)
        if isinstance(node, Function):
            return Table(inputs, output, code_table(node, self.values[inputs[0]].coded, self.values[output].coded))
        if isinstance(node, Sum):
            return Add(inputs, output, node.low, node.high)
        if isinstance(node, Joined):
            return Concat(inputs, output)
        assert isinstance(node, Flat)
        return Flatten(inputs, output)


def in_runs(steps: Sequence[Step], known: Iterable[str], calls: bool) -> list[Step]:
    """Steps in another order, in which few calls of torch lie between those on codes: runs are as long as they can be.

    Parameters
    ----------
    steps : sequence of Step
    known : iterable of str
        Values that no step computes.
    calls : bool
        Whether to begin with calls.

    Returns
    -------
    list of Step
    """
    left, ordered = list(steps), []
    there, idle = set(known), 0
    while left:
        rest: list[Step] = []
        for step in left:
            if isinstance(step, Call) == calls and there.issuperset(step.inputs):
                there.add(step.output)
                ordered.append(step)
            else:
                rest.append(step)
        idle = idle + 1 if len(rest) == len(left) else 0
        if idle == 2:
            raise ValueError(f"nothing computes what step {rest[0].output!r} reads")
        left, calls = rest, not calls
    return ordered


def _count_runs(steps: Sequence[Step]) -> int:
    return sum(isinstance(a, Call) != isinstance(b, Call) for a, b in itertools.pairwise(steps))


def _known(shape: Shape) -> tuple[int, ...]:
    """A shape without the batch; other sizes that depend on it are -1."""
    rest = shape[1:] if shape and shape[0] is None else shape
    return tuple(-1 if n is None else n for n in rest)
