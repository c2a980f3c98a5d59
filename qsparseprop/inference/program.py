"""What a frozen model computes: steps over named values, which are codes of 8 bits or ordinary tensors.

This is data alone: it is what files hold (`qsparseprop.inference.files`), what the kernels are set up from
(`qsparseprop.inference.compiled`), and what `qsparseprop.inference.reference` computes in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Add",
    "Call",
    "Codes",
    "Concat",
    "Dequantize",
    "Flatten",
    "Pool",
    "Product",
    "Program",
    "Quantize",
    "Step",
    "Table",
    "Value",
    "Weight",
    "Window",
]


@dataclass(frozen=True, eq=False)
class Codes:
    """How a value is coded: `real = scale[channel] * (code - zero_point)`, codes of 8 bits without a sign.

    Parameters
    ----------
    scale : Tensor
        (channels,), float32, finite and positive.
    zero_point : int
        0 to 255, one for all channels, since it is what stands in the padding of every plane.
    """

    scale: Tensor
    zero_point: int

    def __post_init__(self) -> None:
        scale = self.scale
        if scale.ndim != 1 or scale.dtype is not torch.float32 or not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError("scales of codes must be finite, positive float32, one a channel")
        if not 0 <= self.zero_point <= 255:
            raise ValueError(f"a zero point must lie in [0, 255], got {self.zero_point}")


@dataclass(frozen=True)
class Value:
    """A value of a program.

    Parameters
    ----------
    shape : tuple of int
        Without the batch: (channels, height, width) or (features,) of codes.
    codes : Codes, optional
        How it is coded; without them it is an ordinary tensor, of any shape.
    rows : int
        How many of them there are for each sample of the batch: tokens are many.
    """

    shape: tuple[int, ...]
    codes: Codes | None = None
    rows: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"a value has one row a sample or more, got {self.rows}")
        if self.codes is not None:
            if len(self.shape) not in (1, 3) or min(self.shape) < 1:
                raise ValueError(f"codes must be of (channels, height, width) or (features,), got {self.shape}")
            if self.codes.scale.shape[0] != self.shape[0]:
                raise ValueError(f"{self.shape[0]} channels have {self.codes.scale.shape[0]} scales")

    @property
    def coded(self) -> Codes:
        """How it is coded.

        Raises
        ------
        ValueError
            If it is not.
        """
        if self.codes is None:
            raise ValueError("an ordinary tensor has no codes")
        return self.codes

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of codes; 1 x 1 of features."""
        return (1, 1) if len(self.shape) == 1 else (self.shape[1], self.shape[2])


class Window(NamedTuple):
    """What one output pixel of a convolution or of pooling sees."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    #: Above, below, left, right.
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def output_size(self, image: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for an image; below 1 where the window does not fit."""
        padding = self.padding[:2], self.padding[2:]
        sizes = [(n + p + q - d * (k - 1) - 1) // s + 1
                 for n, (p, q), k, s, d in zip(image, padding, self.kernel, self.stride, self.dilation, strict=True)]
        return sizes[0], sizes[1]


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight in codes: `real[row, column] = scale[row] * code[row, column]`, those of zeros left out.

    Scales of the input's channels are in it: what a row multiplies are codes without their scales.

    Parameters
    ----------
    crow_indices, col_indices : Tensor
        CSR pattern of (rows, columns), int32; columns are (input channel of the group, tap).
    codes : Tensor
        int8, (nonzeros,), -127 to 127.
    scale : Tensor
        float32, (rows,).
    columns : int
    """

    crow_indices: Tensor
    col_indices: Tensor
    codes: Tensor
    scale: Tensor
    columns: int

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.scale.shape[0]

    def dense(self) -> Tensor:
        """Codes with the zeros, int8, (rows, columns)."""
        counts = self.crow_indices.diff().long()
        out = torch.zeros(self.rows, self.columns, dtype=torch.int8)
        out[torch.arange(self.rows).repeat_interleave(counts), self.col_indices.long()] = self.codes
        return out


@dataclass(frozen=True)
class Step:
    """One computation. Subclasses say what; `inputs` and `output` are names of values."""

    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Quantize(Step):
    """An ordinary tensor, (batch, *shape), to codes: to nearest, those outside of the range to its ends.

    Parameters
    ----------
    dynamic : bool
        Whether each token has a scale of its own, found when it is there, beside those of the channels:
        `real = token scale * scale[channel] * (code - 128)`, the largest magnitude being 127. Only of features, and
        only read by products that give ordinary tensors.
    """

    dynamic: bool = False


@dataclass(frozen=True)
class Dequantize(Step):
    """Codes to an ordinary float32 tensor."""


@dataclass(frozen=True, eq=False)
class Product(Step):
    """A convolution or linear layer, with what follows it.

    The output is `limit(sum + bias + residual)`. The first input is coded, a second one, of the output's shape, is the
    residual. The output is coded, or an ordinary float32 tensor, then without residual.

    Parameters
    ----------
    weight : Weight
    bias : Tensor
        float32, (rows,).
    window : Window
    groups : int
    low, high : float
        Limits of the result, as of ReLU (0, inf).
    """

    weight: Weight
    bias: Tensor
    window: Window = field(default_factory=Window)
    groups: int = 1
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Pool(Step):
    """The largest or the mean code under a window.

    Padding is never the largest, and counts in the mean as zeros where `count_padding`. Codes of a maximum have the
    scales of the input.
    """

    kind: str
    window: Window
    count_padding: bool = True


@dataclass(frozen=True, eq=False)
class Table(Step):
    """A function of every element, by its code.

    Parameters
    ----------
    table : Tensor
        uint8, (256,), or (channels, 256) where channels have scales of their own.
    """

    table: Tensor


@dataclass(frozen=True)
class Add(Step):
    """The sum of two values of one shape, limited as a `Product`'s."""

    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Concat(Step):
    """Values one behind the other along the channels; the output has all of their scales and their zero point."""


@dataclass(frozen=True)
class Flatten(Step):
    """(channels, height, width) to (channels * height * width,)."""


@dataclass(frozen=True)
class Call(Step):
    """An operator of torch on ordinary tensors.

    Parameters
    ----------
    operator : str
        Such as ``aten.softmax.int``.
    arguments : tuple
        The positional ones; an input is a `Name`, tensors of the program are `Name` of a constant.
    keywords : dict
    """

    operator: str = ""
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Program:
    """Steps in the order in which they are computed.

    Parameters
    ----------
    inputs, outputs : tuple of str
        Names of ordinary tensors.
    values : dict
        Of each name. Those of a batch of any size.
    steps : tuple of Step
    constants : dict
        Tensors that calls take, by name.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: dict[str, Value]
    steps: tuple[Step, ...]
    constants: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {*self.inputs, *self.constants}
        for step in self.steps:
            missing = [name for name in step.inputs if name not in known]
            if missing:
                raise ValueError(f"step {step.output!r} reads {missing[0]!r}, which nothing before it computes")
            if step.output in known or step.output not in self.values:
                raise ValueError(f"step {step.output!r} must compute a value of its own")
            check_step(step, self.values)
            if isinstance(step, Quantize) and step.dynamic:
                self._check_readers(step)
            known.add(step.output)
        lost = [name for name in self.outputs if name not in known]
        if lost:
            raise ValueError(f"nothing computes the output {lost[0]!r}")
        coded = [name for name in (*self.inputs, *self.outputs)
                 if name in self.values and self.values[name].codes is not None]
        if coded:
            raise ValueError(f"inputs and outputs are ordinary tensors, {coded[0]!r} is coded")

    def _check_readers(self, step: Quantize) -> None:
        for reader in self.users(step.output):
            if not isinstance(reader, Product) or self.values[reader.output].codes is not None:
                raise ValueError(f"step {reader.output!r} reads codes with scales of tokens, which only products do "
                                 "that give ordinary tensors")

    def users(self, name: str) -> Iterator[Step]:
        """The steps that read a value."""
        return (step for step in self.steps if name in step.inputs)


def check_step(step: Step, values: dict[str, Value]) -> None:
    """Check that a step goes with the values that it reads and computes.

    Parameters
    ----------
    step : Step
    values : dict
        Value of each name.

    Raises
    ------
    ValueError
        With the output's name.
    """
    try:
        if isinstance(step, Call):
            _demand(values[step.output].codes is None, "the result of a call is an ordinary tensor")
            return
        sources, target = [values[name] for name in step.inputs], values[step.output]
        _demand({source.rows for source in sources} == {target.rows}, "values have different numbers of rows")
        _CHECKS[type(step)](step, sources, target)
    except (ValueError, KeyError) as error:
        raise ValueError(f"step {step.output!r}: {error}") from None


def _demand(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _one(sources: list[Value], coded: bool = True) -> Value:
    _demand(len(sources) == 1, "takes one value")
    _demand((sources[0].codes is not None) == coded, f"takes {'codes' if coded else 'an ordinary tensor'}")
    return sources[0]


def _check_quantize(step: Quantize, sources: list[Value], target: Value) -> None:
    source = _one(sources, coded=False)
    _demand(target.codes is not None and source.shape == target.shape, "gives codes of the shape that it takes")
    _demand(not step.dynamic or (len(target.shape) == 1 and target.coded.zero_point == 128),
            "tokens have scales of their own where codes are features around 128")


def _check_dequantize(step: Step, sources: list[Value], target: Value) -> None:
    source = _one(sources)
    _demand(target.codes is None and source.shape == target.shape, "gives an ordinary tensor of the shape of its codes")


def _check_weight(weight: Weight, inner: int) -> None:
    crow, col, codes = weight.crow_indices, weight.col_indices, weight.codes
    _demand(all(t.dtype is torch.int32 and t.ndim == 1 for t in (crow, col)), "patterns are int32")
    _demand(codes.dtype is torch.int8 and codes.shape == col.shape, "a weight has an int8 code for each column index")
    _demand(weight.scale.dtype is torch.float32 and weight.scale.ndim == 1 and bool(weight.scale.isfinite().all()),
            "scales of a weight are finite float32, one a row")
    _demand(weight.columns == inner and inner <= 1 << 16, f"a weight of {weight.columns} columns, not of {inner}, or "
            "of more than 65,536")
    _demand(crow.shape[0] == weight.rows + 1 and int(crow[0]) == 0 and int(crow[-1]) == col.shape[0]
            and bool((crow.diff() >= 0).all()), "crow_indices must ascend from 0 to the number of nonzeros")
    _demand(not col.numel() or (int(col.min()) >= 0 and int(col.max()) < inner),
            f"col_indices must lie in [0, {inner})")
    inside = torch.ones(max(col.numel() - 1, 0), dtype=torch.bool)
    inside[crow[1:-1][(crow[1:-1] > 0) & (crow[1:-1] < col.numel())].long() - 1] = False  # where a row begins
    _demand(bool((col.diff() > 0)[inside].all()), "col_indices must ascend in each row")
    _demand(not codes.numel() or int(codes.min()) >= -127, "codes of a weight lie in [-127, 127]")


def _check_product(step: Product, sources: list[Value], target: Value) -> None:
    _demand(len(sources) in (1, 2) and all(s.codes is not None for s in sources), "takes codes, and a residual")
    source, weight, window = sources[0], step.weight, step.window
    _demand(step.groups >= 1 and source.shape[0] % step.groups == 0 and weight.rows % step.groups == 0,
            f"{step.groups} groups do not divide the channels")
    _check_weight(weight, source.shape[0] // step.groups * math.prod(window.kernel))
    _demand(step.bias.dtype is torch.float32 and step.bias.shape == (weight.rows,)
            and bool(step.bias.isfinite().all()), "a bias is finite float32, one a row")
    size = window.output_size(source.image)
    _demand(min(size) >= 1, "the window does not fit into the image")
    shape = (weight.rows,) if len(source.shape) == 1 else (weight.rows, *size)
    _demand(target.shape == shape, f"gives {shape}, not {target.shape}")
    _demand(len(sources) == 1 or (target.codes is not None and sources[1].shape == shape),
            "a residual has the output's shape, and the output is coded")
    _demand(step.low <= step.high, "limits must be in order")


def _sees_pixels(window: Window, image: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a pixel of the image is under the window of every output; with a dilation padding may be all there is."""
    for axis in range(2):
        first = torch.arange(size[axis]) * window.stride[axis] - window.padding[2 * axis]
        places = first[:, None] + torch.arange(window.kernel[axis]) * window.dilation[axis]
        if not bool(((places >= 0) & (places < image[axis])).any(1).all()):
            return False
    return True


def _check_pool(step: Pool, sources: list[Value], target: Value) -> None:
    source = _one(sources)
    _demand(step.kind in ("max", "mean") and target.codes is not None, "pools are max or mean, and give codes")
    size = step.window.output_size(source.image)
    _demand(len(source.shape) == 3 and min(size) >= 1 and target.shape == (source.shape[0], *size),
            f"gives {(source.shape[0], *size)}, not {target.shape}")
    _demand(_sees_pixels(step.window, source.image, size), "a window must not lie in the padding alone")
    same = source.coded.zero_point == target.coded.zero_point and torch.equal(source.coded.scale, target.coded.scale)
    _demand(step.kind == "mean" or same, "a maximum has the codes of what it is taken of")


def _check_table(step: Table, sources: list[Value], target: Value) -> None:
    source = _one(sources)
    _demand(target.codes is not None and source.shape == target.shape, "gives codes of the shape that it takes")
    _demand(step.table.dtype is torch.uint8 and step.table.shape in ((256,), (source.shape[0], 256)),
            "a table has 256 bytes, or 256 a channel")


def _check_add(step: Add, sources: list[Value], target: Value) -> None:
    _demand(len(sources) == 2 and all(s.codes is not None and s.shape == target.shape for s in sources)
            and target.codes is not None, "adds codes of one shape")
    _demand(step.low <= step.high, "limits must be in order")


def _check_concat(step: Concat, sources: list[Value], target: Value) -> None:
    _demand(len(sources) >= 1 and all(s.codes is not None for s in sources), "takes codes")
    rest = {s.shape[1:] for s in sources} | {target.shape[1:]}
    _demand(len(rest) == 1 and target.shape[0] == sum(s.shape[0] for s in sources), "shapes do not go together")
    _demand({s.coded.zero_point for s in sources} == {target.coded.zero_point}
            and torch.equal(torch.cat([s.coded.scale for s in sources]), target.coded.scale),
            "the output has the scales of what it is made of, and all have one zero point")


def _check_flatten(step: Flatten, sources: list[Value], target: Value) -> None:
    source = _one(sources)
    pixels = math.prod(source.shape[1:])
    _demand(target.shape == (source.shape[0] * pixels,), f"gives {source.shape[0] * pixels} features")
    _demand(source.coded.zero_point == target.coded.zero_point
            and torch.equal(source.coded.scale.repeat_interleave(pixels), target.coded.scale),
            "has the codes of what it takes")


_CHECKS: dict[type[Step], Any] = {
    Quantize: _check_quantize,
    Dequantize: _check_dequantize,
    Product: _check_product,
    Pool: _check_pool,
    Table: _check_table,
    Add: _check_add,
    Concat: _check_concat,
    Flatten: _check_flatten,
}


def nonzeros(steps: Iterable[Step]) -> int:
    """Nonzeros of all weights."""
    return sum(step.weight.codes.numel() for step in steps if isinstance(step, Product))
