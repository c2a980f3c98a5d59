"""Whether a step of a program goes with the values that it reads and computes."""

from __future__ import annotations

import math
from typing import Any

import torch

from qsparseprop.inference.steps import (
    Add,
    Call,
    Concat,
    Dequantize,
    Flatten,
    Pool,
    Product,
    Quantize,
    Step,
    Table,
    Value,
    Weight,
    Window,
)

__all__ = ["check_step", "sees_pixels"]


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


def sees_pixels(window: Window, image: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a pixel of the image is under the window of every output; with a dilation padding may be all there is.

    Parameters
    ----------
    window : Window
    image, size : (int, int)
        Height and width of input and output.

    Returns
    -------
    bool
    """
    for axis in range(2):
        first = torch.arange(size[axis]) * window.stride[axis] - window.padding[2 * axis]
        seen = torch.zeros(size[axis], dtype=torch.bool)
        for tap in range(window.kernel[axis]):
            place = first + tap * window.dilation[axis]
            seen |= (place >= 0) & (place < image[axis])
            if bool(seen.all()):
                break
        else:
            return False
    return True


def _check_pool(step: Pool, sources: list[Value], target: Value) -> None:
    source = _one(sources)
    _demand(step.kind in ("max", "mean") and target.codes is not None, "pools are max or mean, and give codes")
    size = step.window.output_size(source.image)
    _demand(len(source.shape) == 3 and min(size) >= 1 and target.shape == (source.shape[0], *size),
            f"gives {(source.shape[0], *size)}, not {target.shape}")
    _demand(sees_pixels(step.window, source.image, size), "a window must not lie in the padding alone")
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
