"""What programs of frozen models are made of: values, codes, weights, and the steps that compute them."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, dataclass, field, fields
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

    def __repr__(self) -> str:
        least, most = (f"{float(each):.3g}" for each in self.scale.aminmax())
        return f"scale {least if least == most else f'{least} to {most}'}, zero {self.zero_point}"

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

    def __repr__(self) -> str:
        return f"{self.rows} x {self.columns}, {self.codes.numel()} nonzeros"

    def dense(self) -> Tensor:
        """Codes with the zeros, int8, (rows, columns)."""
        counts = self.crow_indices.diff().long()
        out = torch.zeros(self.rows, self.columns, dtype=torch.int8)
        out[torch.arange(self.rows).repeat_interleave(counts), self.col_indices.long()] = self.codes
        return out


def _short(value: Any) -> str:
    """A setting in a few words: of tensors what they are, not what they hold; values by their names."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Window):
        defaults = Window._field_defaults
        own = [f"{name}={each}" for name, each in value._asdict().items() if each != defaults[name]]
        return f"({', '.join(own)})"
    if isinstance(value, tuple) and hasattr(value, "name"):
        return str(value.name)
    if isinstance(value, list | tuple):
        inside = ", ".join(map(_short, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(each)}" for name, each in value.items()) + "}"
    return repr(value)


def _is_default(value: Any, of: Field[Any]) -> bool:
    default = of.default_factory() if of.default_factory is not MISSING else of.default
    return default is not MISSING and not isinstance(value, Tensor) and bool(value == default)


@dataclass(frozen=True, repr=False)
class Step:
    """One computation. Subclasses say what; `inputs` and `output` are names of values."""

    inputs: tuple[str, ...]
    output: str

    def __repr__(self) -> str:
        own = [f for f in fields(self) if f.name not in ("inputs", "output")]
        given = [(f.name, getattr(self, f.name)) for f in own]
        settings = [f"{name}={_short(value)}" for (name, value), f in zip(given, own, strict=True)
                    if not _is_default(value, f)]  # fmt: skip
        return f"{self.output} = {type(self).__name__}({', '.join((*self.inputs, *settings))})"


@dataclass(frozen=True, repr=False)
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


@dataclass(frozen=True, repr=False)
class Dequantize(Step):
    """Codes to an ordinary float32 tensor."""


@dataclass(frozen=True, eq=False, repr=False)
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


@dataclass(frozen=True, repr=False)
class Pool(Step):
    """The largest or the mean code under a window.

    Padding is never the largest, and counts in the mean as zeros where `count_padding`. Codes of a maximum have the
    scales of the input.
    """

    kind: str
    window: Window
    count_padding: bool = True


@dataclass(frozen=True, eq=False, repr=False)
class Table(Step):
    """A function of every element, by its code.

    Parameters
    ----------
    table : Tensor
        uint8, (256,), or (channels, 256) where channels have scales of their own.
    """

    table: Tensor


@dataclass(frozen=True, repr=False)
class Add(Step):
    """The sum of two values of one shape, limited as a `Product`'s."""

    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, repr=False)
class Concat(Step):
    """Values one behind the other along the channels; the output has all of their scales and their zero point."""


@dataclass(frozen=True, repr=False)
class Flatten(Step):
    """(channels, height, width) to (channels * height * width,)."""


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        keywords = [f"{name}={_short(each)}" for name, each in self.keywords.items()]
        return f"{self.output} = {self.operator}({', '.join([*map(_short, self.arguments), *keywords])})"
