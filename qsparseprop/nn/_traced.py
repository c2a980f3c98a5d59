"""A layer as a single operator, for torch.compile and torch.export.

What a module calls in eager mode, an autograd.Function over operators that take the lists of a plan, would make all of
those lists inputs of a graph, and constants of it where the pattern is looked at. These two operators take the pattern
as it is and find the plan when they run, so that a graph stays right when the pattern changes, and can be exported.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from qsparseprop import ops
from qsparseprop.layout.geometry import Geometry, conv_geometry
from qsparseprop.layout.plan import Plan, shared_plan_cache
from qsparseprop.nn._interop import refuse_onnx
from qsparseprop.nn._passes import as_dtype, backward_pass, check_finite, forward_pass, value_gradient
from qsparseprop.quantization import QuantConfig


def config_text(qconfig: QuantConfig | None) -> str:
    """A QuantConfig as an operator's argument; empty for None."""
    return "" if qconfig is None else json.dumps(asdict(qconfig))


@functools.lru_cache(maxsize=64)
def _config(text: str) -> QuantConfig | None:
    if not text:
        return None
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
    return QuantConfig(**settings)


def _geometry(n: Sequence[int]) -> Geometry:
    if len(n) not in (16, 17, 22, 23):
        raise ValueError(f"geometry must be 16 numbers, or 22 for volumes, and one more for transposed layers, got "
                         f"{len(n)}")
    dims = _dimensions(n)
    size, kernel, stride, pads, more_pads, dilation = (tuple(n[2 + i * dims : 2 + (i + 1) * dims]) for i in range(6))
    return conv_geometry(n[0], n[1], size, kernel, stride, pads + more_pads, dilation, n[2 + 6 * dims],
                         bool(n[3 + 6 * dims]), any(n[4 + 6 * dims :]))


def _dimensions(numbers: Sequence[int]) -> int:
    return 3 if len(numbers) > 17 else 2


def _find_plan(crow: Tensor, col: Tensor, numbers: Sequence[int], groups: int) -> Plan:
    geometry, dims = _geometry(numbers), _dimensions(numbers)
    if groups < 1 or numbers[0] % groups or numbers[1] % groups:
        raise ValueError(f"channels ({numbers[0]} and {numbers[1]}) must be multiples of groups={groups}")
    shape = numbers[1], numbers[0] // groups * math.prod(numbers[2 + dims : 2 + 2 * dims])
    return shared_plan_cache(crow, col).get(crow, col, shape, geometry, groups)


def _empty_image(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    memory_format = torch.channels_last if ops.is_channels_last(like) else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def _layer_fake(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    geometry: Sequence[int],
    groups: int,
    qconfig: str,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    refuse_onnx()
    g, config = _geometry(geometry), _config(qconfig)
    grid, shape = g.input_grid, (x.shape[0], g.output_grid.planes, *g.output_image)
    if g.transposed:
        grid, shape = g.output_grid, (x.shape[0], g.in_channels, *g.input_image)
    in_codes, scales = False, 0
    if config is not None and config.grad_weight == "int8":
        in_codes, scales = True, grid.planes if config.granularity == "channel" else 1
    return (
        _empty_image(x, shape, dtype),
        x.new_empty(grid.lanes(x.shape[0]), dtype=torch.uint8 if in_codes else torch.float32),
        x.new_empty(scales, dtype=torch.float32),
        x.new_empty(scales, dtype=torch.int32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, values, bias, crow, col, ctx.geometry, ctx.groups, ctx.qconfig, _ = inputs
    packed = output[1:] if ctx.needs_input_grad[1] else (None, None, None)
    ctx.save_for_backward(values, crow, col, *packed)
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    values, crow, col, *packed = ctx.saved_tensors
    grads = list(ctx.needs_input_grad[:3])
    dx, dvalues, dbias = sparse_layer_backward.overload(
        dy, values, *packed, crow, col, ctx.geometry, ctx.groups, ctx.qconfig, ctx.x_shape, grads, ctx.x_dtype
    )
    return (
        dx if grads[0] else None,
        value_gradient(dvalues, values) if grads[1] else None,
        as_dtype(dbias, ctx.bias_dtype) if grads[2] else None,
        None, None, None, None, None, None,
    )  # fmt: skip


@ops.operator(
    "sparse_layer(Tensor x, Tensor values, Tensor? bias, Tensor crow_indices, Tensor col_indices, int[] geometry, "
    "int groups, str qconfig, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _layer_fake,
    backward=_backward,
    setup_context=_setup_context,
)
def sparse_layer(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    geometry: Sequence[int],
    groups: int,
    qconfig: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer's forward pass, which finds its plan when it runs.

    Parameters
    ----------
    x : Tensor
        (images, channels, height, width).
    values, bias, crow_indices, col_indices, geometry, groups, qconfig, dtype
        As for `traced_product`.

    Returns
    -------
    out, planes, scale, zero_point : Tensor
        The result and the packed input; the latter two are empty where that is float32.
    """
    config = _config(qconfig)
    if config is not None and config.check_finite:
        check_finite(x, "the input")
        check_finite(values, "the weight")
    plan = _find_plan(crow_indices, col_indices, geometry, groups)
    out, packed = forward_pass(x, values, bias, plan, config, dtype)
    assert packed is not None  # which was to be saved
    return out, packed.planes, _or_empty(packed.scale), _or_empty(packed.zero_point, torch.int32)


def _or_empty(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(0, dtype=dtype) if tensor is None else tensor


def _layer_backward_fake(dy: Tensor, values: Tensor, *others: Any) -> tuple[Tensor, ...]:
    x_shape, grads, x_dtype = others[-3:]
    make = torch.float32
    return (
        _empty_image(dy, x_shape, x_dtype) if grads[0] else dy.new_empty(0, dtype=make),
        dy.new_empty(values.shape if grads[1] else 0, dtype=make),
        dy.new_empty(dy.shape[1] if grads[2] else 0, dtype=make),
    )


# It draws its seed itself, as eager mode does, so that both round alike; the tag keeps graphs from merging calls.
@ops.operator(
    "sparse_layer_backward(Tensor dy, Tensor values, Tensor? planes, Tensor? scale, Tensor? zero_point, "
    "Tensor crow_indices, Tensor col_indices, int[] geometry, int groups, str qconfig, SymInt[] x_shape, bool[] grads, "
    "ScalarType x_dtype) -> (Tensor, Tensor, Tensor)",
    _layer_backward_fake,
    tags=[torch.Tag.nondeterministic_seeded],
)
def sparse_layer_backward(
    dy: Tensor,
    values: Tensor,
    planes: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    geometry: Sequence[int],
    groups: int,
    qconfig: str,
    x_shape: Sequence[int],
    grads: Sequence[bool],
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of `sparse_layer`.

    Parameters
    ----------
    dy : Tensor
        Of its result.
    planes, scale, zero_point : Tensor or None
        As it gave them; only read for the weight gradient.
    x_shape, x_dtype
        Of its input.
    grads : sequence of bool
        Which gradients are wanted: of the input, the values, the bias.
    values, crow_indices, col_indices, geometry, groups, qconfig
        As for `sparse_layer`.

    Returns
    -------
    dx, dvalues, dbias : Tensor
        The latter two in float32; empty where not wanted.
    """
    config = _config(qconfig)
    if config is not None and config.check_finite:
        check_finite(dy, "the gradient of the output")
    plan = _find_plan(crow_indices, col_indices, geometry, groups)
    packed = None if planes is None else ops.Packed(planes, scale, zero_point)
    dx, dvalues, dbias = backward_pass(dy, values, packed, plan, config, grads, x_dtype)
    return _or_empty(dx), _or_empty(dvalues), _or_empty(dbias)


def traced_product(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    geometry: Sequence[int],
    groups: int,
    qconfig: str,
    dtype: torch.dtype,
) -> Tensor:
    """`functional.sparse_product` as one operator that finds its plan when it runs.

    Parameters
    ----------
    x, values, bias, dtype
        As for `functional.sparse_product`.
    crow_indices, col_indices : Tensor
        CSR pattern of the weight seen as (out_channels, in_channels / groups * taps), int32; for transposed layers
        the channels are those of the convolution that is transposed.
    geometry : sequence of int
        The arguments of `conv_geometry`, one after the other; the last one only where it is true.
    groups : int
    qconfig : str
        Of `config_text`.

    Raises
    ------
    TypeError, ValueError
        When it runs, for a pattern that is not valid, see `check_pattern`.
    """
    with torch._C.DisableTorchFunctionSubclass():  # torch 2.8 cannot trace what values refuse
        return sparse_layer.overload(x, values, bias, crow_indices, col_indices, geometry, groups, qconfig, dtype)[0]
