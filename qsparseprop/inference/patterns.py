"""Which operators of a graph can be computed on codes: layers, pools, functions of single elements, sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qsparseprop.inference.calls import Name
from qsparseprop.inference.draft import Draft, Flat, Function, Joined, Layer, Node, Operator, Pooling, Shape, Sum
from qsparseprop.inference.equations import linear_equations
from qsparseprop.inference.steps import Window

__all__ = ["recognise"]

#: Functions of single elements, with numbers for their other arguments.
_FUNCTIONS = {
    "abs.default", "celu.default", "elu.default", "erf.default", "exp.default", "gelu.default", "hardsigmoid.default",
    "hardswish.default", "leaky_relu.default", "log_sigmoid.default", "mish.default", "neg.default", "selu.default",
    "sigmoid.default", "silu.default", "softplus.default", "square.default", "tanh.default", "threshold.default",
    "relu.default", "relu6.default", "hardtanh.default", "clamp.default", "clamp_min.default", "clamp_max.default",
    "mul.Scalar", "add.Scalar", "div.Scalar", "pow.Tensor_Scalar", "hardshrink.default", "softshrink.default",
    "mul.Tensor", "add.Tensor", "sub.Tensor", "div.Tensor",  # with a number
}  # fmt: skip
_VIEWS = {"reshape.default", "flatten.using_ints", "squeeze.dim", "squeeze.dims", "squeeze.default"}


def recognise(draft: Draft) -> None:
    """Put what can be computed on codes in the place of operators, in place; nothing is folded yet.

    Parameters
    ----------
    draft : Draft
        Of operators.
    """
    _Recogniser(draft).run()
    draft.without_unread()


class _Recogniser:
    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.shapes, self.constants = draft.shapes, draft.constants
        self.nodes: list[Node] = []
        #: Of values with other dimensions than codes have, tokens for instance, the same value as codes can be, in
        #: each of the shapes that somebody makes or reads it in.
        self.forms: dict[str, list[str]] = {}

    def run(self) -> None:
        for node in self.draft.nodes:
            assert isinstance(node, Operator)
            name = node.operator.removeprefix("aten.")
            find = _FINDERS.get(name) or (_function if name in _FUNCTIONS else None)
            found = find(self, node) if find is not None and self.floats(node) else None
            self.nodes.extend(found if found is not None else [node])
        self.draft.nodes = self.nodes

    def floats(self, node: Operator) -> bool:
        return node.output in self.draft.floating and all(
            name in self.draft.floating for name in node.inputs if name in self.shapes)

    def shape(self, argument: Any) -> Shape:
        return self.shapes[argument.name]

    def constant(self, argument: Any) -> Tensor | None:
        return self.constants.get(argument.name) if isinstance(argument, Name) else None

    def made(self, name: str, shape: Shape, rows: int = 1) -> str:
        """A value that the graph had not, with so many rows for each sample."""
        self.shapes[name] = shape
        if rows > 1:
            self.draft.rows[name] = rows
        self.draft.floating.add(name)
        return name

    def all_forms(self, name: str) -> list[str]:
        """A value in each shape as which it can be codes, that of its own included."""
        return [*self.forms.get(name, ()), *([name] if self.draft.images(name) else [])]

    def form(self, name: str) -> str | None:
        """A value as codes can be, where it is one; itself or another one."""
        return next(iter(self.all_forms(name)), None)

    def image(self, name: str) -> str | None:
        """A value as codes can be with the same channels, which are not those of rows of tokens."""
        dims = {3: 4}.get(len(self.shapes[name]), len(self.shapes[name]))
        return next((form for form in self.all_forms(name) if len(self.shapes[form]) == dims), None)

    def as_form(self, name: str, shape: Shape, layer: str) -> tuple[str, list[Node]]:
        """A value with other dimensions, and what makes it of the one that the graph has."""
        for known in self.all_forms(name):
            if self.shapes[known] == shape:
                return known, []
        form = self.made(f"{name}.form{len(shape)}", shape, self._rows_for(name, shape))
        self.forms.setdefault(name, []).append(form)
        return form, [_view(name, form, shape, layer)]

    def _rows_for(self, name: str, shape: Shape) -> int:
        """Rows for each sample of a value when it gets another shape."""
        inside = math.prod(n for n in self.shapes[name] if n is not None)
        return self.draft.rows.get(name, 1) * inside // math.prod(n for n in shape if n is not None)

    def result(self, node: Operator, shape: Shape) -> tuple[str, list[Node]]:
        """What to compute in the place of a node's output, and what makes the output of it."""
        output = node.output
        if len(self.shapes[output]) == len(shape):
            return output, []
        form = self.made(f"{output}.form{len(shape)}", shape, self._rows_for(output, shape))
        self.forms.setdefault(output, []).append(form)
        return form, [_view(form, output, self.shapes[output], node.layer)]


def _view(source: str, output: str, shape: Shape, layer: str) -> Operator:
    sizes = [-1 if n is None else n for n in shape]
    return Operator(inputs=(source,), output=output, layer=layer, operator="aten.reshape.default",
                    arguments=(Name(source), sizes))  # fmt: skip


def _bias(found: _Recogniser, node: Operator, rows: int) -> Tensor | None:
    """The bias of a layer, zeros where it has none; None where it is no constant."""
    argument = node.arguments[2] if len(node.arguments) > 2 else None
    return torch.zeros(rows) if argument is None else found.constant(argument)


def _linear(found: _Recogniser, node: Operator) -> list[Node] | None:
    weight = found.constant(node.arguments[1])
    if weight is None or weight.ndim != 2 or node.arguments[0].name in found.constants:
        return None
    bias = _bias(found, node, weight.shape[0])
    return None if bias is None else _rows(found, node, node.arguments[0].name, weight, bias)


def _addmm(found: _Recogniser, node: Operator) -> list[Node] | None:
    bias, source, weight = node.arguments
    held, moved = found.constant(weight), found.constant(bias)
    if held is None or moved is None or moved.shape != held.shape[1:]:
        return None
    if node.keywords or source.name in found.constants:
        return None
    return _rows(found, node, source.name, held.t().contiguous(), moved)


def _matmul(found: _Recogniser, node: Operator) -> list[Node] | None:
    """A product with a constant matrix on the right, which is a linear layer."""
    return _times(found, node, *node.arguments[:2])


def _times(found: _Recogniser, node: Operator, source: Any, weight: Any, turned: bool = True) -> list[Node] | None:
    held = found.constant(weight)
    if held is None or held.ndim != 2 or source.name in found.constants:
        return None
    rows = held.t().contiguous() if turned else held
    return _rows(found, node, source.name, rows, torch.zeros(rows.shape[0]))


def _einsum(found: _Recogniser, node: Operator) -> list[Node] | None:
    equation, operands = node.arguments[:2]
    for source, weight, read in zip(operands, operands[::-1], linear_equations(equation, len(operands)), strict=False):
        if read is not None and found.constant(weight) is not None:
            return _times(found, node, source, weight, read)
    return None


def _rows(found: _Recogniser, node: Operator, source: str, weight: Tensor, bias: Tensor) -> list[Node] | None:
    """A linear layer; one on tokens is one on rows."""
    shape = found.shapes[source]
    if len(shape) == 2 and shape[0] is None:
        return [Layer(inputs=(source,), output=node.output, layer=node.layer, weight=weight, bias=bias, kind="Linear")]
    if len(shape) < 2 or shape.count(None) != 1 or -1 in shape or 0 in shape:
        return None
    rows, before = found.as_form(source, (None, weight.shape[1]), node.layer)
    output, after = found.result(node, (None, weight.shape[0]))
    layer = Layer(inputs=(rows,), output=output, layer=node.layer, weight=weight, bias=bias, kind="Linear")
    return [*before, layer, *after]


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def _settings(node: Operator, *defaults: Any) -> list[Any]:
    """Arguments from the fourth on, those that are left out by default."""
    return _filled(node.arguments[3:], defaults)


def _filled(given: Sequence[Any], defaults: Sequence[Any]) -> list[Any]:
    return [*given, *defaults[len(given):]]


def _conv2d(found: _Recogniser, node: Operator) -> list[Node] | None:
    weight, source = found.constant(node.arguments[1]), node.arguments[0].name
    stride, padding, dilation, groups = _settings(node, 1, 0, 1, 1)
    if weight is None or weight.ndim != 4 or not found.draft.images(source):
        return None
    bias = _bias(found, node, weight.shape[0])
    if bias is None:
        return None
    kernel = _pair(weight.shape[2:])
    if isinstance(padding, str):
        sizes = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, _pair(dilation), strict=True)]
        sides = [side for size in sizes for side in (size // 2, size - size // 2)]
    else:
        sides = [side for size in _pair(padding) for side in (size, size)]
    window = Window(kernel, _pair(stride), (sides[0], sides[1], sides[2], sides[3]), _pair(dilation))
    return [Layer(inputs=(source,), output=node.output, layer=node.layer, weight=weight, bias=bias, window=window,
                  groups=groups, kind="Conv2d")]  # fmt: skip


def _conv1d(found: _Recogniser, node: Operator) -> list[Node] | None:
    """One of height 1, whose input and output have a dimension more."""
    weight, source = found.constant(node.arguments[1]), node.arguments[0].name
    stride, padding, dilation, groups = _settings(node, 1, 0, 1, 1)
    shape, output = found.shapes[source], found.shapes[node.output]
    if weight is None or len(shape) != 3 or shape[0] is not None or None in shape[1:] or source in found.constants:
        return None
    bias = _bias(found, node, weight.shape[0])
    if bias is None:
        return None
    (step, _), (spread, _) = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        size = spread * (weight.shape[2] - 1) if padding == "same" else 0
        sides = (size // 2, size - size // 2)
    else:
        sides = _pair(padding)[:1] * 2
    window = Window((1, weight.shape[2]), (1, step), (0, 0, *sides), (1, spread))
    image, before = found.as_form(source, (None, shape[1], 1, shape[2]), node.layer)
    result, after = found.result(node, (None, output[1], 1, output[2]))
    layer = Layer(inputs=(image,), output=result, layer=node.layer, weight=weight.unsqueeze(2), bias=bias,
                  window=window, groups=groups, kind="Conv1d")  # fmt: skip
    return [*before, layer, *after]


def _batch_norm(found: _Recogniser, node: Operator) -> list[Node] | None:
    source, scale, shift, mean, variance, training, _, epsilon = node.arguments[:8]
    held = [None if argument is None else found.constant(argument) for argument in (scale, shift, mean, variance)]
    known = held[2] is not None and held[3] is not None and (scale is None) == (held[0] is None) and (
        (shift is None) == (held[1] is None))
    form = found.image(source.name)
    if training or not known or form is None:
        return None
    average, spread = held[2].double(), held[3].double()  # type: ignore[union-attr]  # they are known
    factor = (1.0 if held[0] is None else held[0].double()) / (spread + epsilon).sqrt()
    moved = (0.0 if held[1] is None else held[1].double()) - average * factor
    ones = [1] * (len(found.shapes[form]) - 2)
    output, after = found.result(node, found.shapes[form])
    layer = Layer(inputs=(form,), output=output, layer=node.layer, kind="BatchNorm", affine=True,
                  groups=factor.shape[0], weight=factor.float().view(-1, 1, *ones), bias=moved.float())  # fmt: skip
    return [layer, *after]


def _mean(found: _Recogniser, node: Operator) -> list[Node] | None:
    source, dims = node.arguments[0].name, node.arguments[1]
    kept = len(node.arguments) > 2 and node.arguments[2]
    if not found.draft.images(source) or len(found.shapes[source]) != 4 or node.keywords:
        return None
    if sorted(d % 4 for d in dims or ()) != [2, 3]:
        return None
    return _whole_mean(found, node, source, flat=not kept)


def _whole_mean(found: _Recogniser, node: Operator, source: str, flat: bool) -> list[Node]:
    image = _sizes(found.shapes[source][2:])
    pool = node.output
    if flat:
        shape = (None, found.shapes[source][1], 1, 1)
        pool = found.made(f"{node.output}.pool", shape, found.draft.rows.get(source, 1))
    pooled = Pooling(inputs=(source,), output=pool, layer=node.layer, kind="mean", window=Window(image, image))
    return [pooled, Flat(inputs=(pool,), output=node.output, layer=node.layer)] if flat else [pooled]


def _sizes(shape: Shape) -> tuple[int, int]:
    height, width = shape
    assert height is not None
    assert width is not None
    return height, width


def _adaptive(found: _Recogniser, node: Operator) -> list[Node] | None:
    source = node.arguments[0].name
    if not found.draft.images(source) or len(found.shapes[source]) != 4:
        return None
    image, output = _sizes(found.shapes[source][2:]), _sizes(found.shapes[node.output][2:])
    if any(n % m for n, m in zip(image, output, strict=True)):
        return None
    window = (image[0] // output[0], image[1] // output[1])
    return [Pooling(inputs=(source,), output=node.output, layer=node.layer, kind="mean", window=Window(window, window))]


def _pool(found: _Recogniser, node: Operator) -> list[Node] | None:
    source, kernel = node.arguments[0].name, _pair(node.arguments[1])
    if not found.draft.images(source) or len(found.shapes[source]) != 4:
        return None
    mean = "avg" in node.operator
    settings = _filled(node.arguments[2:], [[], 0, False, True, None] if mean else [[], 0, 1, False])
    stride, padding, rest = settings[0], settings[1], settings[2:]
    stride, (vertical, horizontal) = (kernel if not stride and stride != 0 else _pair(stride)), _pair(padding)
    dilation = (1, 1) if mean else _pair(rest[0])
    counted, divisor = (rest[1], rest[2]) if mean else (True, None)
    image, output = _sizes(found.shapes[source][2:]), _sizes(found.shapes[node.output][2:])
    # what rounding up adds is more padding behind
    more = [(m - 1) * s + d * (k - 1) + 1 - (n + 2 * p) for n, m, k, s, d, p in
            zip(image, output, kernel, stride, dilation, (vertical, horizontal), strict=True)]  # fmt: skip
    down, across = (max(0, extra) for extra in more)
    if divisor is not None or (mean and (down or across)):
        return None
    window = Window(kernel, stride, (vertical, vertical + down, horizontal, horizontal + across), dilation)
    return [Pooling(inputs=(source,), output=node.output, layer=node.layer, kind="mean" if mean else "max",
                    window=window, count_padding=bool(counted))]  # fmt: skip


def _function(found: _Recogniser, node: Operator) -> list[Node] | None:
    source = node.arguments[0]
    rest = [*node.arguments[1:], *node.keywords.values()]
    if not isinstance(source, Name) or source.name in found.constants or any(isinstance(a, Name) for a in rest):
        return None
    limits = _limits(node)
    form = found.form(source.name)
    if form is None:
        return None
    output, after = found.result(node, found.shapes[form])
    function = Function(inputs=(form,), output=output, layer=node.layer, operator=node.operator, limits=limits,
                        arguments=(Name(form), *node.arguments[1:]), keywords=node.keywords)  # fmt: skip
    return [function, *after]


def _limits(node: Operator) -> tuple[float, float] | None:
    """What a function limits to, of one that does nothing else."""
    name, rest = node.operator.removeprefix("aten.").split(".")[0], list(node.arguments[1:])
    if name in ("relu", "relu6"):
        return 0.0, 6.0 if name == "relu6" else math.inf
    if name == "hardtanh":
        low, high = _filled(rest, [-1.0, 1.0])
    elif name == "clamp":
        low, high = _filled(rest, [None, None])
        low, high = node.keywords.get("min", low), node.keywords.get("max", high)
    elif name in ("clamp_min", "clamp_max"):
        low, high = (rest[0], None) if name == "clamp_min" else (None, rest[0])
    else:
        return None
    low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return (low, high) if low <= high else None


def _add(found: _Recogniser, node: Operator) -> list[Node] | None:
    first, second = node.arguments[:2]
    if not isinstance(second, Name):
        return _function(found, node)
    if node.keywords.get("alpha", 1) != 1 or found.shape(first) != found.shape(second):
        return None
    forms = next(((one, other) for one in found.all_forms(first.name) for other in found.all_forms(second.name)
                  if found.shapes[one] == found.shapes[other]), None)  # fmt: skip
    if forms is None:
        return None
    output, after = found.result(node, found.shapes[forms[0]])
    return [Sum(inputs=forms, output=output, layer=node.layer), *after]


def _cat(found: _Recogniser, node: Operator) -> list[Node] | None:
    parts = node.arguments[0]
    dim = node.arguments[1] if len(node.arguments) > 1 else 0
    if not all(found.draft.images(part.name) for part in parts) or dim % len(found.shape(parts[0])) != 1:
        return None
    return [Joined(inputs=tuple(part.name for part in parts), output=node.output, layer=node.layer)]


def _flatten(found: _Recogniser, node: Operator) -> list[Node] | None:
    source = node.arguments[0].name
    if not found.draft.images(source) or not found.draft.images(node.output):
        return None
    shape, output = found.shapes[source], found.shapes[node.output]
    # others make rows of pixels
    if len(shape) != 4 or len(output) != 2 or math.prod(_sizes(shape[1:3])) * (shape[3] or 0) != output[1]:
        return None
    return [Flat(inputs=(source,), output=node.output, layer=node.layer)]


def _slice(found: _Recogniser, node: Operator) -> list[Node] | None:
    """Every second pixel, for instance, which is the largest of one."""
    source, dim, start, end, step = _filled(node.arguments, [None, 0, None, None, 1])
    if not found.draft.images(source.name) or start not in (0, None) or dim not in (2, 3):
        return None
    size = found.shape(source)[dim]
    if size is None or (end is not None and end < size):
        return None
    stride = (step, 1) if dim == 2 else (1, step)
    return [Pooling(inputs=(source.name,), output=node.output, layer=node.layer, kind="max",
                    window=Window((1, 1), stride))]  # fmt: skip


def _pad(found: _Recogniser, node: Operator) -> list[Node] | None:
    """Channels of zeros around those of the input: a layer that copies the others. Or zeros around a signal."""
    source, sides = node.arguments[0].name, list(node.arguments[1])
    rest = [*node.arguments[2:], *node.keywords.values()]
    if len(sides) == 2 and len(found.shapes[source]) == 3 and source not in found.constants:
        return _pad_signal(found, node, source)
    if not found.draft.images(source) or len(found.shapes[source]) != 4:
        return None
    if any(value not in ("constant", 0, None) for value in rest):
        return None
    if len(sides) != 6 or any(sides[:4]) or min(sides) < 0:
        return None
    channels = int(found.shapes[source][1] or 0)
    copied = torch.zeros(channels + sides[4] + sides[5], channels, 1, 1)
    copied[sides[4]:sides[4] + channels, :, 0, 0] = torch.eye(channels)
    return [Layer(inputs=(source,), output=node.output, layer=node.layer, weight=copied, affine=True, kind="pad",
                  bias=torch.zeros(copied.shape[0]))]  # fmt: skip


def _pad_signal(found: _Recogniser, node: Operator, source: str) -> list[Node] | None:
    """As an image of height 1, whose convolution takes the padding over."""
    shape, output = found.shapes[source], found.shapes[node.output]
    if shape[0] is not None or any(n is None or n < 1 for n in (*shape[1:], *output[1:])):
        return None
    image, before = found.as_form(source, (None, shape[1], 1, shape[2]), node.layer)
    result, after = found.result(node, (None, output[1], 1, output[2]))
    padded = Operator(inputs=(image,), output=result, layer=node.layer, operator=node.operator, keywords=node.keywords,
                      arguments=(Name(image), [*node.arguments[1], 0, 0], *node.arguments[2:]))  # fmt: skip
    return [*before, padded, *after]


_FINDERS: dict[str, Callable[[_Recogniser, Operator], list[Node] | None]] = {
    "linear.default": _linear,
    "addmm.default": _addmm,
    "matmul.default": _matmul,
    "mm.default": _matmul,
    "einsum.default": _einsum,
    "conv2d.default": _conv2d,
    "conv2d.padding": _conv2d,
    "conv1d.default": _conv1d,
    "conv1d.padding": _conv1d,
    "batch_norm.default": _batch_norm,
    "mean.dim": _mean,
    "adaptive_avg_pool2d.default": _adaptive,
    "avg_pool2d.default": _pool,
    "max_pool2d.default": _pool,
    "add.Tensor": _add,
    "cat.default": _cat,
    "slice.Tensor": _slice,
    "pad.default": _pad,
    "constant_pad_nd.default": _pad,
    **dict.fromkeys(_VIEWS, _flatten),
}
