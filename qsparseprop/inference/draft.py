"""What a frozen model computes, before anything is coded: layers, pools, functions and other operators on floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qsparseprop.inference.calls import Name, call_operator
from qsparseprop.inference.steps import Call, Window

__all__ = ["Draft", "Flat", "Function", "Joined", "Layer", "Node", "Operator", "Pooling", "Shape", "Sum"]

_ONE_PIXEL = Window()

#: Sizes of a tensor; None where one is the batch or a multiple of it, -1 where it depends on the batch otherwise.
Shape = tuple[int | None, ...]


@dataclass(eq=False, kw_only=True)
class Node:
    """One computation on ordinary tensors.

    Parameters
    ----------
    inputs : tuple of str
        Names of values, of constants as well.
    output : str
    layer : str
        Qualified name of the module that it comes from.
    """

    inputs: tuple[str, ...]
    output: str
    layer: str = ""

    def calls(self, constants: dict[str, Tensor]) -> list[Call]:
        """The same as operators of torch; those before the last have outputs of their own.

        Parameters
        ----------
        constants : dict
            Gets the tensors that they take.

        Returns
        -------
        list of Call
        """
        raise NotImplementedError


@dataclass(eq=False, kw_only=True)
class Operator(Node):
    """Any operator, as a `Call`."""

    operator: str
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)

    def calls(self, constants: dict[str, Tensor]) -> list[Call]:
        """See `Node.calls`."""
        return [Call(self.inputs, self.output, self.operator, self.arguments, self.keywords)]


@dataclass(eq=False, kw_only=True)
class Layer(Node):
    """A convolution or linear layer: `limit(sum + bias + residual)`, the residual a second input.

    Parameters
    ----------
    weight : Tensor
        float32, (rows, channels of a group, height, width), or (rows, features of a group).
    bias : Tensor
        float32, (rows,).
    window : Window
    groups : int
    low, high : float
    affine : bool
        Whether it only scales channels or moves them, which is nothing to code a value for.
    kind : str
        For people.
    """

    weight: Tensor
    bias: Tensor
    window: Window = _ONE_PIXEL
    groups: int = 1
    low: float = -math.inf
    high: float = math.inf
    affine: bool = False
    kind: str = ""

    @property
    def limited(self) -> bool:
        """Whether the result has limits."""
        return (self.low, self.high) != (-math.inf, math.inf)

    @property
    def columns(self) -> int:
        """Weights of a row, zeros included."""
        return self.weight.shape[1:].numel()

    def calls(self, constants: dict[str, Tensor]) -> list[Call]:
        """See `Node.calls`."""
        out = self.output
        weight, bias = f"{out}.weight", f"{out}.bias"
        constants[weight], constants[bias] = self.weight, self.bias
        source, found = self.inputs[0], []
        if self.weight.ndim == 2 and self.groups == 1:
            found.append(_call(f"{out}.sum", "aten.linear.default", Name(source), Name(weight), Name(bias)))
        elif self.weight.ndim == 2:
            features = self.weight.shape[1] * self.groups
            assert self.weight.shape[1] == 1  # channels scaled one by one
            constants[weight] = self.weight.view(features)
            found.append(_call(f"{out}.scaled", "aten.mul.Tensor", Name(source), Name(weight)))
            found.append(_call(f"{out}.sum", "aten.add.Tensor", Name(f"{out}.scaled"), Name(bias)))
        else:
            top, bottom, left, right = self.window.padding
            padding = [top, left]
            if (top, left) != (bottom, right):
                found.append(_call(f"{out}.padded", "aten.constant_pad_nd.default", Name(source),
                                   [left, right, top, bottom]))  # fmt: skip
                source, padding = f"{out}.padded", [0, 0]
            found.append(_call(f"{out}.sum", "aten.conv2d.default", Name(source), Name(weight), Name(bias),
                               list(self.window.stride), padding, list(self.window.dilation), self.groups))  # fmt: skip
        if len(self.inputs) == 2:
            found.append(_call(f"{out}.added", "aten.add.Tensor", Name(found[-1].output), Name(self.inputs[1])))
        return _finished(found, out, self.low, self.high)


@dataclass(eq=False, kw_only=True)
class Pooling(Node):
    """The largest or the mean element under a window, see `qsparseprop.inference.program.Pool`."""

    kind: str
    window: Window
    count_padding: bool = True

    def calls(self, constants: dict[str, Tensor]) -> list[Call]:
        """See `Node.calls`."""
        source, found, window = self.inputs[0], [], self.window
        top, bottom, left, right = window.padding
        padding = [top, left]
        if self.kind == "mean":
            found.append(_call(self.output, "aten.avg_pool2d.default", Name(source), list(window.kernel),
                               list(window.stride), padding, False, self.count_padding))  # fmt: skip
            return found
        if any(window.padding):
            found.append(_call(f"{self.output}.padded", "aten.constant_pad_nd.default", Name(source),
                               [left, right, top, bottom], -math.inf))  # fmt: skip
            source = f"{self.output}.padded"
        found.append(_call(self.output, "aten.max_pool2d.default", Name(source), list(window.kernel),
                           list(window.stride), [0, 0], list(window.dilation)))  # fmt: skip
        return found


@dataclass(eq=False, kw_only=True)
class Function(Operator):
    """An operator that maps each element of its one input by itself.

    Parameters
    ----------
    limits : tuple of float, optional
        Of a function that only limits: what it limits to.
    """

    limits: tuple[float, float] | None = None

    def of(self, x: Tensor) -> Tensor:
        """What it makes of a tensor, in its precision."""
        return call_operator(self.calls({})[0], {self.inputs[0]: x})


@dataclass(eq=False, kw_only=True)
class Sum(Node):
    """The sum of two values of one shape, limited."""

    low: float = -math.inf
    high: float = math.inf

    def calls(self, constants: dict[str, Tensor]) -> list[Call]:
        """See `Node.calls`."""
        first, second = self.inputs
        return _finished([_call(f"{self.output}.sum", "aten.add.Tensor", Name(first), Name(second))], self.output,
                         self.low, self.high)  # fmt: skip


@dataclass(eq=False, kw_only=True)
class Joined(Node):
    """Values one behind the other along the channels."""

    def calls(self, constants: dict[str, Tensor]) -> list[Call]:
        """See `Node.calls`."""
        return [_call(self.output, "aten.cat.default", [Name(name) for name in self.inputs], 1)]


@dataclass(eq=False, kw_only=True)
class Flat(Node):
    """(batch, channels, height, width) to (batch, features)."""

    def calls(self, constants: dict[str, Tensor]) -> list[Call]:
        """See `Node.calls`."""
        return [_call(self.output, "aten.flatten.using_ints", Name(self.inputs[0]), 1)]


def _call(output: str, operator: str, *arguments: Any) -> Call:
    return Call(tuple(dict.fromkeys(names_in(arguments))), output, operator, arguments)


def _finished(found: list[Call], output: str, low: float, high: float) -> list[Call]:
    """Calls with limits behind the last one, which has the output."""
    if (low, high) != (-math.inf, math.inf):
        bounds = [None if math.isinf(limit) else limit for limit in (low, high)]
        return [*found, _call(output, "aten.clamp.default", Name(found[-1].output), *bounds)]
    last = found[-1]
    return [*found[:-1], Call(last.inputs, output, last.operator, last.arguments)]


@dataclass(eq=False)
class Draft:
    """Nodes in the order in which they are computed.

    Parameters
    ----------
    inputs, outputs : tuple of str
    nodes : list of Node
    constants : dict
        Tensors by name.
    shapes : dict
        Of each value.
    floating : set of str
        Values that are float32.
    rows : dict
        Of values whose sizes of None are multiples of the batch, the factor.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: list[Node]
    constants: dict[str, Tensor]
    shapes: dict[str, Shape]
    floating: set[str]
    rows: dict[str, int] = field(default_factory=dict)

    def readers(self) -> dict[str, list[Node]]:
        """Nodes that read each value; one that reads it twice is there twice."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                found.setdefault(name, []).append(node)
        return found

    def without_unread(self) -> None:
        """Take out nodes that nobody reads."""
        wanted = set(self.outputs)
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if node.output in wanted:
                wanted.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]
        self.constants = {name: tensor for name, tensor in self.constants.items() if name in wanted}

    def images(self, name: str) -> bool:
        """Whether a value is of (batch, channels, height, width) or (batch, features), and so can be coded."""
        shape = self.shapes.get(name, ())
        return (name in self.floating and name not in self.constants and len(shape) in (2, 4) and shape[0] is None
                and all(n is not None and n > 0 for n in shape[1:]))  # fmt: skip


def compute(node: Node, values: dict[str, Any], constants: dict[str, Tensor]) -> Any:
    """What a node makes of values, in float32.

    Parameters
    ----------
    node : Node
    values : dict
        Those that it reads; constants need not be there.
    constants : dict
        Of the draft.

    Returns
    -------
    Tensor or tuple of Tensor
    """
    own: dict[str, Tensor] = {}
    calls = node.calls(own)
    known = {**{name: constants[name] for name in node.inputs if name in constants}, **own,
             **{name: values[name] for name in node.inputs if name in values}}  # fmt: skip
    for call in calls:
        known[call.output] = call_operator(call, known)
    return known[node.output]


def run_draft(
    draft: Draft, inputs: Iterable[Tensor], see: Callable[[str, Any], None] = lambda name, value: None
) -> tuple[Tensor, ...]:
    """The outputs of a draft, in float32.

    Parameters
    ----------
    draft : Draft
    inputs : iterable of Tensor
    see : callable, optional
        Called with the name of each value and the value, as it comes.

    Returns
    -------
    tuple of Tensor
    """
    values: dict[str, Any] = dict(zip(draft.inputs, inputs, strict=True))
    for name, value in values.items():
        see(name, value)
    last = last_readers(draft)
    with torch.no_grad():
        for node in draft.nodes:
            values[node.output] = compute(node, values, draft.constants)
            see(node.output, values[node.output])
            for name in last.get(id(node), ()):
                values.pop(name, None)
    return tuple(values[name] if name in values else draft.constants[name] for name in draft.outputs)


def last_readers(draft: Draft) -> dict[int, list[str]]:
    """Values that nobody needs after a node, by its id."""
    last: dict[str, Node] = {}
    for node in draft.nodes:
        last.update(dict.fromkeys(node.inputs, node))
    found: dict[int, list[str]] = {}
    for name, node in last.items():
        if name not in draft.outputs:
            found.setdefault(id(node), []).append(name)
    return found


def renamed(call: Call, names: dict[str, str]) -> Call:
    """A call that reads other values in the place of some.

    Parameters
    ----------
    call : Call
    names : dict
        The other's name by that of the one that is read now.

    Returns
    -------
    Call
    """

    def other(argument: Any) -> Any:
        if isinstance(argument, Name):
            return Name(names.get(argument.name, argument.name))
        if isinstance(argument, list | tuple):
            return type(argument)(other(each) for each in argument)
        return argument

    keywords = {key: other(value) for key, value in call.keywords.items()}
    inputs = tuple(names.get(name, name) for name in call.inputs)
    return Call(inputs, call.output, call.operator, other(call.arguments), keywords)


def names_in(arguments: Any) -> Iterator[str]:
    """The names of values among arguments of an operator."""
    if isinstance(arguments, Name):
        yield arguments.name
    elif isinstance(arguments, list | tuple):
        for each in arguments:
            yield from names_in(each)
    elif isinstance(arguments, dict):
        yield from names_in(list(arguments.values()))
