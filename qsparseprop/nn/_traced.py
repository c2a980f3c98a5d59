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

import torch
from torch import Tensor

from qsparseprop.layout.geometry import Geometry, conv_geometry
from qsparseprop.layout.plan import GatherList, Plan, shared_plan_cache
from qsparseprop.nn._interop import refuse_onnx
from qsparseprop.nn.functional import backward_pass, check_finite, forward_pass, value_gradient
from qsparseprop.quantization import QuantConfig

_library = torch.library.Library("qsparseprop", "FRAGMENT")


def config_text(qconfig: QuantConfig | None) -> str:
    """A QuantConfig as an operator's argument; empty for None."""
    return "" if qconfig is None else json.dumps(asdict(qconfig))


@functools.lru_cache(maxsize=64)
def _config(text: str) -> QuantConfig | None:
    if not text:
        return None
    return QuantConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()})


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


def _fake_plan(crow: Tensor, numbers: Sequence[int]) -> Plan:
    """A plan without its lists, which the shapes of results do not depend on."""
    empty = GatherList(*(crow.new_empty(0),) * 4)
    return Plan(_geometry(numbers), empty, empty)


def _layer(x, values, bias, crow_indices, col_indices, geometry, groups, qconfig, dtype):
    config = _config(qconfig)
    if config is not None and config.check_finite:
        check_finite(x, "the input")
        check_finite(values, "the weight")
    return tuple(forward_pass(x, values, bias, _find_plan(crow_indices, col_indices, geometry, groups), config, dtype))


def _layer_fake(x, values, bias, crow_indices, col_indices, geometry, groups, qconfig, dtype):
    refuse_onnx()
    return tuple(forward_pass(x, values, bias, _fake_plan(crow_indices, geometry), _config(qconfig), dtype))


def _layer_backward(dy, values, planes, scale, zero_point, crow_indices, col_indices, geometry, groups, qconfig,
                    x_shape, grads, x_dtype):
    config = _config(qconfig)
    if config is not None and config.check_finite:
        check_finite(dy, "the gradient of the output")
    plan = _find_plan(crow_indices, col_indices, geometry, groups)
    return tuple(backward_pass(dy, values, (planes, scale, zero_point), plan, config, x_shape, grads, x_dtype))


def _layer_backward_fake(dy, values, planes, scale, zero_point, crow_indices, col_indices, geometry, groups, qconfig,
                         x_shape, grads, x_dtype):
    plan, config = _fake_plan(crow_indices, geometry), _config(qconfig)
    return tuple(backward_pass(dy, values, (planes, scale, zero_point), plan, config, x_shape, grads, x_dtype))


def _define(name: str, schema: str, function, fake, tags: Sequence[torch.Tag] = ()):
    _library.define(f"{name}{schema}", tags=tuple(tags))
    _library.impl(name, function, "CPU")
    torch.library.register_fake(f"qsparseprop::{name}", fake, lib=_library)
    return getattr(torch.ops.qsparseprop, name).default


_sparse_layer = _define(
    "sparse_layer",
    "(Tensor x, Tensor values, Tensor? bias, Tensor crow_indices, Tensor col_indices, int[] geometry, int groups, "
    "str qconfig, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _layer, _layer_fake,
)  # fmt: skip

# It draws its seed itself, as eager mode does, so that both round alike; the tag keeps graphs from merging calls.
_sparse_layer_backward = _define(
    "sparse_layer_backward",
    "(Tensor dy, Tensor values, Tensor? planes, Tensor? scale, Tensor? zero_point, Tensor crow_indices, "
    "Tensor col_indices, int[] geometry, int groups, str qconfig, SymInt[] x_shape, bool[] grads, ScalarType x_dtype) "
    "-> (Tensor, Tensor, Tensor)",
    _layer_backward, _layer_backward_fake, [torch.Tag.nondeterministic_seeded],
)  # fmt: skip


def _setup_context(ctx, inputs, output) -> None:
    x, values, bias, crow, col, ctx.geometry, ctx.groups, ctx.qconfig, _ = inputs
    packed = output[1:] if ctx.needs_input_grad[1] else (None, None, None)
    ctx.save_for_backward(values, crow, col, *packed)
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx, dy, *_):
    values, crow, col, *packed = ctx.saved_tensors
    grads = list(ctx.needs_input_grad[:3])
    dx, dvalues, dbias = _sparse_layer_backward(
        dy, values, *packed, crow, col, ctx.geometry, ctx.groups, ctx.qconfig, ctx.x_shape, grads, ctx.x_dtype
    )
    return (
        dx if grads[0] else None,
        value_gradient(dvalues, values) if grads[1] else None,
        dbias.to(ctx.bias_dtype) if grads[2] else None,
        None, None, None, None, None, None,
    )  # fmt: skip


torch.library.register_autograd("qsparseprop::sparse_layer", _gradients, setup_context=_setup_context, lib=_library)


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
        return _sparse_layer(x, values, bias, crow_indices, col_indices, geometry, groups, qconfig, dtype)[0]
