"""How much a layer has to compute and to move, in closed form: the two sides of a roofline.

Operations are multiplications and additions (two a product of a weight with an activation). Bytes are the compulsory
traffic: every operand is read once and every result written once in a pass, as if caches had room for all. What a
layer packs for the backward pass is written in the forward pass and read in the other.

A dense layer and a sparse one of the same pattern differ in the number of weights and in what a weight costs: a nonzero
comes with a 4-byte offset, and quantised layers make an 8-bit code of its float32 value in every pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from qsparseprop import arguments
from qsparseprop.contents import check_memory, check_memory_of
from qsparseprop.nn._base import SparseModule
from qsparseprop.nn._conv import SparseConvNd
from qsparseprop.nn._dense import held

__all__ = ["LayerCost", "PassCost", "layer_cost", "model_costs"]

_OFFSET_BYTES = 4
_POINTER_BYTES = 4
#: A nonzero's value as the kernels read it, and the code that quantised layers make of it.
_VALUE_BYTES, _CODE_BYTES = 4, 1


@dataclass(frozen=True)
class PassCost:
    """Cost of one pass through a layer.

    Attributes
    ----------
    operations : int
        Multiplications and additions.
    bytes : int
        Compulsory traffic.
    """

    operations: int
    bytes: int

    @property
    def intensity(self) -> float:
        """Operations a byte; 0 where nothing is moved."""
        return self.operations / self.bytes if self.bytes else 0.0

    def __add__(self, other: PassCost) -> PassCost:
        return PassCost(self.operations + other.operations, self.bytes + other.bytes)


@dataclass(frozen=True)
class LayerCost:
    """Cost of one training step of a layer.

    Attributes
    ----------
    name, kind : str
        Qualified name in the model and type.
    input_shape, weight_shape : tuple of int
        Batch included; the weight's as if it were dense.
    nonzeros : int
        Weights that the layer computes with: all of them in a dense one, zeros included.
    forward, backward : PassCost
    saved_bytes : int
        What the layer alone keeps for the backward pass. A dense layer keeps its input, which it may share with others.
    """

    name: str
    kind: str
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    nonzeros: int
    forward: PassCost
    backward: PassCost
    saved_bytes: int

    @property
    def total(self) -> PassCost:
        """Both passes."""
        return self.forward + self.backward


@dataclass(frozen=True)
class _Shape:
    """A layer's product: for each kernel tap, how many weights and how often each is used."""

    weights: int
    uses: int  # products in all
    inputs: int
    outputs: int
    rows: int


def _valid_positions(size: int, kernel: int, stride: int, before: int, dilation: int, out: int) -> list[int]:
    """For each tap of one dimension, the number of outputs for which it reads the input and not its padding."""
    counts = []
    for tap in range(kernel):
        first = tap * dilation - before  # coordinate that the first output reads
        low = max(0, -(first // stride))  # ceil(-first / stride)
        high = min(out, (size - 1 - first) // stride + 1)
        counts.append(max(0, high - low))
    return counts


def _pairs(value: Any, dimensions: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dimensions if len(values) == 1 else values


def _padding(module: _ConvNd | SparseConvNd, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and after the data in each dimension."""
    if module.padding == "valid":
        return [(0, 0)] * len(kernel)
    if module.padding == "same":  # as torch: the odd one goes behind
        return [((d * (k - 1)) // 2, d * (k - 1) - (d * (k - 1)) // 2) for k, d in zip(kernel, dilation, strict=True)]
    return [(p, p) for p in _pairs(module.padding, len(kernel))]


def _weights_by_tap(module: nn.Module, shape: tuple[int, ...], taps: int) -> list[int]:
    """How many weights of a layer lie at each kernel tap."""
    if isinstance(module, SparseModule):
        return torch.bincount(module.col_indices.long() % taps, minlength=taps).tolist()
    return [math.prod(shape) // taps] * taps


def _linear_shape(module: nn.Module, input_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> _Shape:
    outs, ins = reversed(weight_shape) if _is_transposed(module) else weight_shape
    if not input_shape or input_shape[-1] != ins:
        raise ValueError(f"the layer expects {ins} features, got an input of shape {input_shape}")
    batch = math.prod(input_shape[:-1])
    weights = module.nonzeros if isinstance(module, SparseModule) else math.prod(weight_shape)
    return _Shape(weights, weights * batch, math.prod(input_shape), batch * outs, outs)


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, _ConvTransposeNd) or (isinstance(module, SparseModule) and module.transposed)


def _transposed_shape(module: _ConvNd | SparseConvNd, input_shape: tuple[int, ...], weight_shape: tuple[int, ...],
                      count_padding: bool) -> _Shape:  # fmt: skip
    """Of a transposed convolution: that of the convolution with the same weight, whose input has the output's size."""
    dimensions = len(weight_shape) - 2
    batched = input_shape if len(input_shape) == dimensions + 2 else (1, *input_shape)
    if len(batched) != dimensions + 2 or batched[1] != weight_shape[0]:
        raise ValueError(f"the layer expects (batch, {weight_shape[0]}, {dimensions} sizes), got an input of shape "
                         f"{input_shape}")
    stride, dilation, extra = (_pairs(v, dimensions) for v in (module.stride, module.dilation, module.output_padding))
    padding = _padding(module, weight_shape[2:], dilation)
    sizes = [(n - 1) * s - p - q + d * (k - 1) + 1 + e for n, s, (p, q), d, k, e in
             zip(batched[2:], stride, padding, dilation, weight_shape[2:], extra, strict=True)]  # fmt: skip
    padding = [(p, q - e) for (p, q), e in zip(padding, extra, strict=True)]
    shape = _conv_shape(module, (batched[0], weight_shape[1] * module.groups, *sizes), weight_shape, count_padding,
                        padding)  # fmt: skip
    return _Shape(shape.weights, shape.uses, shape.outputs, shape.inputs, weight_shape[1] * module.groups)


def _conv_shape(module: _ConvNd | SparseConvNd, input_shape: tuple[int, ...], weight_shape: tuple[int, ...],
                count_padding: bool, padding: Sequence[tuple[int, int]]) -> _Shape:  # fmt: skip
    kernel = weight_shape[2:]
    dimensions = len(kernel)
    if len(input_shape) == dimensions + 1:
        input_shape = (1, *input_shape)
    if len(input_shape) != dimensions + 2 or input_shape[1] != weight_shape[1] * module.groups:
        raise ValueError(f"the layer expects (batch, {weight_shape[1] * module.groups}, {dimensions} sizes), got an "
                         f"input of shape {input_shape}")  # fmt: skip
    stride, dilation = _pairs(module.stride, dimensions), _pairs(module.dilation, dimensions)
    if not len(stride) == len(dilation) == dimensions or min(*kernel, *stride, *dilation) < 1:
        raise ValueError(f"kernel, stride and dilation must be {dimensions} positive sizes, got {kernel}, {stride} and "
                         f"{dilation}")  # fmt: skip
    valid, outs = [], []
    for size, k, s, d, (before, after) in zip(
        input_shape[2:], kernel, stride, dilation, padding, strict=True
    ):
        out = (size + before + after - d * (k - 1) - 1) // s + 1
        if out < 1:
            raise ValueError(f"the padded input of shape {input_shape} is smaller than the kernel")
        outs.append(out)
        valid.append([out] * k if count_padding else _valid_positions(size, k, s, before, d, out))
    positions = torch.tensor(valid[0])
    for counts in valid[1:]:
        positions = (positions[:, None] * torch.tensor(counts)).flatten()
    by_tap = _weights_by_tap(module, weight_shape, math.prod(kernel))
    uses = input_shape[0] * sum(w * p for w, p in zip(by_tap, positions.tolist(), strict=True))
    outputs = input_shape[0] * weight_shape[0] * math.prod(outs)
    return _Shape(sum(by_tap), uses, math.prod(input_shape), outputs, weight_shape[0])


def layer_cost(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    input_grad: bool = True,
    count_padding: bool = True,
    name: str = "",
) -> LayerCost:
    """Cost of a training step of a layer.

    Parameters
    ----------
    module : nn.Module
        ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``, a transposed convolution, or a sparse module. A
        dense one counts its zeros: it computes with them.
    input_shape : sequence of int
        Batch included.
    dtype : torch.dtype
        Of input, output and their gradients, and of a dense layer's weight; what autocast sets.
    input_grad : bool
        Whether the backward pass has to go on to the layer before.
    count_padding : bool
        Count products with the zeros that a convolution pads its input with, as is usual (and as
        ``torch.utils.flop_counter`` does); otherwise only those with data.
    name : str
        For the result.

    Returns
    -------
    LayerCost

    Raises
    ------
    TypeError
        For another kind of module.
    ValueError
        If the input does not go with the layer.
    """
    sparse = isinstance(module, SparseModule)
    if not (sparse or isinstance(module, (nn.Linear, _ConvNd))):
        raise TypeError(f"no cost is known of a {type(module).__name__}")
    input_shape = tuple(int(n) for n in input_shape)
    weight_shape = tuple(module.weight_shape if isinstance(module, SparseModule) else held(module, "weight").shape)
    if not isinstance(module, _ConvNd | SparseConvNd):
        shape = _linear_shape(module, input_shape, weight_shape)
    elif _is_transposed(module):
        shape = _transposed_shape(module, input_shape, weight_shape, count_padding)
    else:
        dilation = _pairs(module.dilation, len(weight_shape) - 2)
        shape = _conv_shape(module, input_shape, weight_shape, count_padding,
                            _padding(module, weight_shape[2:], dilation))

    bias = 0 if module.bias is None else shape.rows
    item = dtype.itemsize
    if sparse:
        quantized = module.quantized
        weight_bytes = shape.weights * (_VALUE_BYTES + _OFFSET_BYTES + (_CODE_BYTES if quantized else 0))
        weight_bytes += _POINTER_BYTES * (shape.rows + 1)
        weight_grad_bytes = shape.weights * _VALUE_BYTES
        saved = shape.inputs * (1 if quantized else 4)
        # the packed input is an extra copy
        packing = saved
    else:
        weight_bytes = weight_grad_bytes = shape.weights * item
        saved, packing = shape.inputs * item, 0
    bias_bytes = bias * (_VALUE_BYTES if sparse else item)
    forward = PassCost(
        2 * shape.uses + (shape.outputs if bias else 0),
        shape.inputs * item + packing + weight_bytes + bias_bytes + shape.outputs * item,
    )
    # two products: of the output's gradient with the weight, and with the input
    backward = PassCost(
        2 * shape.uses * (2 if input_grad else 1) + (shape.outputs if bias else 0),
        shape.outputs * item + saved + weight_grad_bytes + bias_bytes
        + (weight_bytes + shape.inputs * item if input_grad else 0),
    )  # fmt: skip
    return LayerCost(name, type(module).__name__, input_shape, weight_shape, shape.weights, forward, backward, saved)


def model_costs(
    model: nn.Module, example: Tensor | Sequence[int], *, dtype: torch.dtype = torch.float32, count_padding: bool = True
) -> list[LayerCost]:
    """Cost of each layer of a model that `layer_cost` knows, at the sizes of a real forward pass.

    Parameters
    ----------
    model : nn.Module
        Run once, in evaluation mode and without gradients; its state does not change.
    example : Tensor, or sequence of int
        An input of the model, or the shape of a float32 one.
    dtype, count_padding
        See `layer_cost`.

    Returns
    -------
    list of LayerCost
        One an entry a call, in the order of the calls; a shared layer appears several times. The first layer's input
        needs no gradient.
    """
    arguments.model(model)
    check_memory_of(model)
    if isinstance(example, Tensor):
        x = example
    else:
        arguments.instance(example, (list, tuple), "example", "a tensor or a shape")
        for size in example:
            arguments.whole_number(size, "each size of example")
        x = torch.zeros(tuple(map(int, example)))
    check_memory(x, "example")
    costs: list[LayerCost] = []
    handles = []

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            costs.append(layer_cost(module, value.shape, dtype=dtype, input_grad=bool(costs),
                                    count_padding=count_padding, name=name))  # fmt: skip

        return hook

    modes = [(module, module.training) for module in model.modules()]
    try:
        for name, module in model.named_modules():
            if isinstance(module, (SparseModule, nn.Linear, _ConvNd)):
                handles.append(module.register_forward_pre_hook(record(name), with_kwargs=True))
        model.eval()
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return costs
