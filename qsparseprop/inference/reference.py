"""What a program computes, in plain torch: the oracle of the kernels, bit for bit.

Sums are exact integers. What follows is float32, each operation rounded once, in the order that is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qsparseprop.inference.calls import call_operator
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

__all__ = ["Factors", "Tokens", "factors_of", "run_reference", "run_step"]


class Factors(NamedTuple):
    """What turns sums into codes: `sum * multiplier + offset + residual code * residual`, within [low, high].

    Attributes
    ----------
    multiplier, offset : Tensor
        float32, (channels,).
    residual : Tensor or None
    low, high : Tensor
        float32, (channels,), within [0, 255] where codes are made.
    """

    multiplier: Tensor
    offset: Tensor
    residual: Tensor | None
    low: Tensor
    high: Tensor


def factors_of(step: Product | Add | Pool, sources: Sequence[Value], target: Value) -> Factors:
    """Factors behind the sums of a step, computed in float64 and rounded once.

    Parameters
    ----------
    step : Product, Add or Pool
        Of an `Add` the sums are the codes of its first value; of a `Pool`, of means, the sums of codes without the
        zero point.
    sources : sequence of Value
        What it reads.
    target : Value
        What it computes. Of an ordinary tensor limits are real numbers.

    Returns
    -------
    Factors
    """
    codes = target.codes
    channels = step.weight.rows if isinstance(step, Product) else target.shape[0]
    out = torch.ones(channels, dtype=torch.float64) if codes is None else codes.scale.double()
    zero = 0.0 if codes is None else float(codes.zero_point)
    offset = torch.full((channels,), zero, dtype=torch.float64)
    residual = None
    if isinstance(step, Product):
        multiplier = step.weight.scale.double() / out
        offset = offset + step.bias.double() / out
    else:
        multiplier = sources[0].coded.scale.double() / out
    if isinstance(step, Add):
        offset = offset - sources[0].coded.zero_point * multiplier
    if len(sources) == 2:
        residual = sources[1].coded.scale.double() / out
        offset = offset - sources[1].coded.zero_point * residual
        residual = residual.float()
    low = torch.full((channels,), -torch.inf, dtype=torch.float64)
    high = -low
    if not isinstance(step, Pool):
        low, high = (torch.full_like(low, limit) / out + zero for limit in (step.low, step.high))
    if codes is not None:
        low, high = (limit.clamp(0, 255) for limit in (low, high))
    return Factors(multiplier.float(), offset.float(), residual, low.float(), high.float())


class Tokens(NamedTuple):
    """Codes of tokens that have scales of their own: uint8, (tokens, features), and float32, (tokens, 1)."""

    codes: Tensor
    scale: Tensor


def _channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (like.ndim - 2))


def _to_codes(values: Tensor) -> Tensor:
    """Nearest, even where two are equally near."""
    return values.round().to(torch.uint8)


def _finished(sums: Tensor, residual: Tensor | None, factors: Factors, scale: Tensor | None = None) -> Tensor:
    out = sums.to(torch.float32) * _channels(factors.multiplier, sums)
    if scale is not None:
        out = out * scale
    out = out + _channels(factors.offset, sums)
    if residual is not None:
        assert factors.residual is not None
        out = out + residual.to(torch.float32) * _channels(factors.residual, sums)
    return torch.minimum(torch.maximum(out, _channels(factors.low, sums)), _channels(factors.high, sums))


def _quantize(step: Quantize, sources: list[Value], target: Value, x: Tensor) -> Tensor | Tokens:
    codes = target.coded
    scaled = x.to(torch.float32) * _channels(inverse_scale(codes), x)
    if not step.dynamic:
        return _limited(scaled, codes.zero_point)
    scale, inverse = token_scales(scaled)
    return Tokens(_limited(scaled * inverse, codes.zero_point), scale)


def _limited(scaled: Tensor, zero_point: int) -> Tensor:
    # what is not a number goes to the upper end, as the packer has it
    limited = scaled.nan_to_num(1024.0).clamp(-zero_point, 255 - zero_point)
    return (limited.round() + zero_point).to(torch.uint8)


def token_scales(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Scale of each token, (tokens, 1), and one over it. The least scale is that of all schemes, 2^-111."""
    scale = (scaled.abs().amax(1, keepdim=True) / 127).clamp(min=2.0**-111)
    return scale, 1 / scale


def inverse_scale(codes: Codes) -> Tensor:
    """What values are multiplied by to become codes: float32, (channels,)."""
    return torch.ones((), dtype=torch.float32) / codes.scale


def _dequantize(step: Dequantize, sources: list[Value], target: Value, x: Tensor) -> Tensor:
    codes = sources[0].coded
    return (x.to(torch.float32) - codes.zero_point) * _channels(codes.scale, x)


def _product(
    step: Product, sources: list[Value], target: Value, x: Tensor | Tokens, residual: Tensor | None = None
) -> Tensor:
    source, window, weight = sources[0], step.window, step.weight
    x, scale = x if isinstance(x, Tokens) else (x, None)
    image = x.view(x.shape[0], source.shape[0], *source.image).to(torch.int64) - source.coded.zero_point
    top, bottom, left, right = window.padding
    # float64 holds every sum exactly
    filters = weight.dense().double().view(weight.rows, -1, *window.kernel)
    sums = F.conv2d(F.pad(image.double(), (left, right, top, bottom)), filters, None, window.stride, 0,
                    window.dilation, step.groups)  # fmt: skip
    sums = sums.round().to(torch.int64).view(x.shape[0], *target.shape)
    out = _finished(sums, residual, factors_of(step, sources, target), scale)
    return out if target.codes is None else _to_codes(out)


def _pool(step: Pool, sources: list[Value], target: Value, x: Tensor) -> Tensor:
    window, zero = step.window, sources[0].coded.zero_point
    top, bottom, left, right = window.padding
    pads = (left, right, top, bottom)
    planes = F.pad(x.double() - zero, pads, value=-256.0 if step.kind == "max" else 0.0)
    patches = F.unfold(planes.flatten(0, 1).unsqueeze(1), window.kernel, window.dilation, 0, window.stride)
    if step.kind == "max":
        return (patches.amax(1) + zero).to(torch.uint8).view(x.shape[0], *target.shape)
    sums = patches.sum(1).view(x.shape[0], *target.shape)
    kernel = window.kernel[0] * window.kernel[1]
    ones = F.pad(torch.ones(1, 1, *x.shape[2:], dtype=torch.float64), pads)
    inside = F.unfold(ones, window.kernel, window.dilation, 0, window.stride).sum(1).view(1, 1, *target.shape[1:])
    count = torch.full_like(inside, kernel) if step.count_padding else inside
    factors = factors_of(step, sources, target)
    # a division a pixel: means of windows at the edge are of fewer
    means = sums.float() / count.float()
    out = means * _channels(factors.multiplier, means) + _channels(factors.offset, means)
    return _to_codes(out.clamp(0, 255))


def _table(step: Table, sources: list[Value], target: Value, x: Tensor) -> Tensor:
    table = step.table.expand(x.shape[1], 256)
    index = x.long().transpose(0, 1).flatten(1)
    return table.gather(1, index).view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


def _add(step: Add, sources: list[Value], target: Value, x: Tensor, other: Tensor) -> Tensor:
    return _to_codes(_finished(x, other, factors_of(step, sources, target)))


def _concat(step: Concat, sources: list[Value], target: Value, *parts: Tensor) -> Tensor:
    return torch.cat(parts, 1)


def _flatten(step: Flatten, sources: list[Value], target: Value, x: Tensor) -> Tensor:
    return x.flatten(1)


_STEPS: dict[type[Step], Callable[..., Any]] = {
    Quantize: _quantize,
    Dequantize: _dequantize,
    Product: _product,
    Pool: _pool,
    Table: _table,
    Add: _add,
    Concat: _concat,
    Flatten: _flatten,
}


def run_step(step: Step, values: dict[str, Value], known: dict[str, Any]) -> Any:
    """What one step computes.

    Parameters
    ----------
    step : Step
    values : dict
        Of the program.
    known : dict
        What its inputs are, by name; codes as uint8.

    Returns
    -------
    Tensor or tuple of Tensor
    """
    if isinstance(step, Call):
        return call_operator(step, known)
    sources = [values[name] for name in step.inputs]
    return _STEPS[type(step)](step, sources, values[step.output], *(known[name] for name in step.inputs))


def run_reference(program: Program, *inputs: Tensor, watched: dict[str, Any] | None = None) -> tuple[Tensor, ...]:
    """The outputs of a program.

    Parameters
    ----------
    program : Program
    *inputs : Tensor
        (batch, ...) each.
    watched : dict, optional
        Gets every value under its name; codes as uint8.

    Returns
    -------
    tuple of Tensor
    """
    values: dict[str, Any] = {**program.constants, **dict(zip(program.inputs, inputs, strict=True))}
    for step in program.steps:
        values[step.output] = run_step(step, program.values, values)
    if watched is not None:
        watched.update(values)
    return tuple(values[name] for name in program.outputs)
