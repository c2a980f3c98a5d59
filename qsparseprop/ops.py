"""The operators: what the compiled kernels do, as functions of tensors.

This is the contract between the modules and the kernels. Every operator is registered with ``torch.library`` (schema,
shapes for tracing, CPU implementation); ``qsparseprop.reference`` has the same functions in plain torch.

Tensors of a layer are 4-D, (images, channels, height, width), of any strides; a linear layer's are (batch, features, 1,
1). ``grid`` and ``views`` are numbers of ``qsparseprop.geometry``; lists are those of ``qsparseprop.pattern``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from qsparseprop._kernels import _matmul, _pack, _statistics
from qsparseprop._kernels._memory import empty
from qsparseprop._kernels._tensor import are_plain, check_storage
from qsparseprop.geometry import all_lanes, buffer_lanes
from qsparseprop.reference import mix_seed

_library = torch.library.Library("qsparseprop", "DEF")

SCHEMES = tuple(_statistics.SCHEMES)

#: Schemes that round at random and want a seed.
RANDOM_SCHEMES = ("stochastic", "dithered", "luq")


_dispatch_modes = torch._C._len_torch_dispatch_stack

#: The implementations behind the operators.
_direct: dict[str, Callable] = {}


def shortcut(name: str, *tensors: Tensor | None) -> Callable:
    """An operator for internal use, without the dispatcher, which costs as much as the kernels of a small layer.

    The dispatcher stays where somebody watches, a profiler or a dispatch mode, and where it has something to do: one of
    the tensors that come from outside is a subclass, a negative view, wrapped, or without its memory (see `are_plain`).
    Operators call others, of which they are made, without tensors: then only a profiler matters.
    """
    if profiler._is_profiler_enabled or (tensors and (_dispatch_modes() or not are_plain(*tensors))):
        return getattr(torch.ops.qsparseprop, name).default
    return _direct[name]


def saved_tensors(ctx: Any) -> tuple[Tensor | None, ...]:
    """What an autograd.Function saved, for those who read it by torch, which reads freed memory."""
    tensors = ctx.saved_tensors  # once: hooks make them anew
    for tensor in tensors:
        check_storage(tensor, "a tensor that was saved for the backward pass")
    return tensors


def _checked(function: Callable) -> Callable:
    """An implementation that refuses tensors whose memory is too small, as nobody else does."""
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: Any) -> Any:
        for name, argument in zip(names, args, strict=False):
            if isinstance(argument, Tensor):
                check_storage(argument, name)
            elif isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
                for i, tensor in enumerate(argument):
                    check_storage(tensor, f"{name}[{i}]")
        return function(*args)

    return checked


_NO_DERIVATIVE = "the operators of qsparseprop have no derivatives: use the modules of qsparseprop.nn"


def _refuse_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    """Without it torch would take the gradient for zero, and warn of that only."""
    raise NotImplementedError(_NO_DERIVATIVE)


def _refuses_derivative(overload: Any) -> Callable:
    """The same for an operator that writes into its arguments, which cannot wait for the backward pass.

    Torch would go on with the history of what was written over, or take the gradient for zero.
    """

    def refusing(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise NotImplementedError(_NO_DERIVATIVE)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return refusing


def operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Register a function as the CPU implementation of an operator.

    Parameters
    ----------
    schema : str
        Its name and arguments, as `torch.library.define` takes them.
    fake : callable
        Gives the shapes and dtypes of the results.
    """

    def register(function: Callable) -> Callable:
        name = schema.partition("(")[0]
        _direct[name] = function
        _library.define(schema)
        _library.impl(name, _checked(function), "CPU")
        torch.library.register_fake(f"qsparseprop::{name}", fake, lib=_library)
        overload = getattr(torch.ops.qsparseprop, name).default
        if overload._schema.is_mutable:
            _library.impl(name, _refuses_derivative(overload), "Autograd", with_keyset=True)
        else:
            torch.library.register_autograd(f"qsparseprop::{name}", _refuse_derivative, lib=_library)
        overload.__doc__ = function.__doc__
        return overload

    return register


def draw_seed() -> Tensor:
    """A seed for one call: a 64-bit number from torch's default generator, shape ()."""
    return torch.empty((), dtype=torch.int64).random_()


def _scales(grid: Sequence[int], per_channel: bool) -> int:
    return max(grid[4], 0) if per_channel and len(grid) > 4 else 1


@operator(
    "quantize_pack(Tensor x, int[] grid, int[] views, int lanes, str scheme, Tensor? seed, bool per_channel=False, "
    "float[] options=[]) -> (Tensor, Tensor, Tensor)",
    lambda x, grid, views, lanes, scheme, seed, per_channel=False, options=(): (
        x.new_empty(lanes, dtype=torch.uint8),
        x.new_empty(_scales(grid, per_channel), dtype=torch.float32),
        x.new_empty(_scales(grid, per_channel), dtype=torch.int32),
    ),
)
def quantize_pack(
    x: Tensor,
    grid: Sequence[int],
    views: Sequence[int],
    lanes: int,
    scheme: str,
    seed: Tensor | None,
    per_channel: bool = False,
    options: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a tensor to 8 bits and lay it out as planes of lanes.

    Parameters
    ----------
    x : Tensor
        float32 or bfloat16, (images, channels, height, width), any strides.
    grid, views, lanes
        Layout, and the size of the result.
    scheme : {"absmax", "symmetric", "standard", "sawb", "stochastic", "dithered", "luq"}
        "absmax" is "symmetric" (around 128), or unsigned (around 0) where no element is negative; so is "sawb".
    seed : Tensor, optional
        int64 scalar; only for the last three.
    per_channel : bool
        One scale and zero point for each channel, and so for each plane.
    options : sequence of float
        None, or for "sawb" its two constants and whether (1 or 0) to look at nonzeros only, for "dithered" the step in
        standard deviations, for "luq" the number of powers of two.

    Returns
    -------
    planes : Tensor
        uint8, (lanes,); gaps hold the zero point.
    scale, zero_point : Tensor
        float32 and int32, (1,) or (planes of the grid,): x = scale * (code - zero_point).
    """
    if scheme in RANDOM_SCHEMES and seed is None:
        raise ValueError(f"the scheme {scheme!r} needs a seed")
    planes = empty((lanes,), torch.uint8)
    scale = torch.empty(_scales(grid, per_channel), dtype=torch.float32)
    zero_point = torch.empty(_scales(grid, per_channel), dtype=torch.int32)
    bits = 0 if seed is None else mix_seed(int(seed))
    _pack.quantize_pack(x, planes, scale, zero_point, grid, views, scheme, options, per_channel, bits,
                        torch.get_num_threads())
    return planes, scale, zero_point


@operator(
    "pack(Tensor x, int[] grid, int[] views, int lanes) -> Tensor",
    lambda x, grid, views, lanes: x.new_empty(lanes, dtype=torch.float32),
)
def pack(x: Tensor, grid: Sequence[int], views: Sequence[int], lanes: int) -> Tensor:
    """Lay a tensor out as planes of lanes without quantising it: float32, (lanes,), gaps hold zero."""
    planes = empty((lanes,), torch.float32)
    _pack.pack(x, planes, grid, views, torch.get_num_threads())
    return planes


@operator(
    "quantize_weight(Tensor values, Tensor index, Tensor group_ptr, Tensor? plane=None, Tensor? factor=None, "
    "Tensor? zero_point=None, Tensor? clip=None) -> (Tensor, Tensor, Tensor)",
    lambda values, index, group_ptr, plane=None, factor=None, zero_point=None, clip=None: (
        values.new_empty(index.shape, dtype=torch.int8),
        values.new_empty(group_ptr.shape[0] - 1, dtype=torch.float32),
        values.new_empty(group_ptr.shape[0] - 1, dtype=torch.int64),
    ),
)
def quantize_weight(
    values: Tensor,
    index: Tensor,
    group_ptr: Tensor,
    plane: Tensor | None = None,
    factor: Tensor | None = None,
    zero_point: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise the slots of a list, nearest even with one scale a row.

    Parameters
    ----------
    values : Tensor
        float32, (nonzeros,).
    index, group_ptr : Tensor
        Of a `GatherList`.
    plane : Tensor, optional
        Of a `GatherList`; needed where one of the following differs from plane to plane.
    factor : Tensor, optional
        float32, (planes,) or (1,): scales of the other operand, multiplied into the values before they are quantised.
        A sum over planes of different scales is a sum of integers then, with one scale.
    zero_point : Tensor, optional
        int32, (planes,) or (1,): zero points of the other operand, multiplied into `total`.
    clip : Tensor, optional
        float32, (1,): magnitude that 127 stands for in every row; without it a row's own largest.

    Returns
    -------
    codes : Tensor
        int8, (slots,), in [-127, 127]; padding is zero.
    scale : Tensor
        float32, (rows,).
    total : Tensor
        int64, (rows,): sum of a row's codes, each times the zero point of its plane.
    """
    rows = group_ptr.numel() - 1
    if rows < 0:
        raise ValueError("group_ptr must have at least 1 element, got 0")
    codes = torch.empty(index.numel(), dtype=torch.int8)
    scale = torch.empty(rows, dtype=torch.float32)
    total = torch.empty(rows, dtype=torch.int64)
    _matmul.quantize_weight(values, index, group_ptr, plane, factor, zero_point, clip, codes, scale, total,
                            torch.get_num_threads())
    return codes, scale, total


def _spmm_fake(planes, weights, group_ptr, offset, scale, total, x_scale, x_zero_point, bias, grid, views, shape,
               channels_last, zeros, dtype=torch.float32, limits=()):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=planes.device, memory_format=memory_format)


def _check_limits(limits: Sequence[float], bias: Tensor | None) -> None:
    if limits and (len(limits) != 2 or bias is None):
        raise ValueError(f"limits must be two numbers, and need a bias; got {list(limits)}")


def _result(shape: Sequence[int], channels_last: bool, zeros: bool, dtype: torch.dtype) -> Tensor:
    out = empty(tuple(shape), dtype, channels_last)
    return out.zero_() if zeros else out


@operator(
    "spmm(Tensor planes, Tensor weights, Tensor group_ptr, Tensor offset, Tensor? scale, Tensor? total, "
    "Tensor? x_scale, Tensor? x_zero_point, Tensor? bias, int[] grid, int[] views, SymInt[] shape, "
    "bool channels_last, bool zeros, ScalarType dtype=float, float[] limits=[]) -> Tensor",
    _spmm_fake,
)
def spmm(
    planes: Tensor,
    weights: Tensor,
    group_ptr: Tensor,
    offset: Tensor,
    scale: Tensor | None,
    total: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    bias: Tensor | None,
    grid: Sequence[int],
    views: Sequence[int],
    shape: Sequence[int],
    channels_last: bool,
    zeros: bool,
    dtype: torch.dtype = torch.float32,
    limits: Sequence[float] = (),
) -> Tensor:
    """Gather-SpMM and unpacking: ``out[row, lane] = sum_k weights[row, k] * planes[offset[row, k] + lane]``.

    Parameters
    ----------
    planes, weights : Tensor
        uint8 (lanes,) and int8 (slots,), or both float32.
    group_ptr, offset : Tensor
        Of a `GatherList`.
    scale, total : Tensor or None
        For codes: of the weights, (rows,).
    x_scale, x_zero_point : Tensor or None
        For codes: of the planes, (1,); None where the weights were quantised with them.
    bias : Tensor or None
        float32, (rows,).
    grid, views
        Of the planes, and where the rows go in the result.
    shape : sequence of int
        (images, channels, height, width) of the result.
    channels_last : bool
        Memory format of the result.
    zeros : bool
        Whether the views leave something out that must be zero.
    dtype : torch.dtype
        float32 or bfloat16.
    limits : sequence of float
        None, or the least and the greatest value of the result; they go with a bias.

    Returns
    -------
    Tensor
        Of `shape` and `dtype`.
    """
    _check_limits(limits, bias)
    out = _result(shape, channels_last, zeros, dtype)
    _matmul.spmm(planes, weights, group_ptr, offset, scale, total, x_scale, x_zero_point, bias, out, grid, views,
                 torch.get_num_threads(), *limits)
    return out


@operator(
    "sddmm(Tensor planes, Tensor dy, Tensor group_ptr, Tensor offset, Tensor index, Tensor plane, Tensor? x_scale, "
    "Tensor? x_zero_point, Tensor? dy_scale, int[] grid, int[] dy_grid, int[] views, SymInt[] shape, SymInt nonzeros) "
    "-> Tensor",
    lambda planes, dy, group_ptr, offset, index, plane, x_scale, x_zero_point, dy_scale, grid, dy_grid, views, shape,
    nonzeros: planes.new_empty(nonzeros, dtype=torch.float32),
)
def sddmm(
    planes: Tensor,
    dy: Tensor,
    group_ptr: Tensor,
    offset: Tensor,
    index: Tensor,
    plane: Tensor,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    dy_scale: Tensor | None,
    grid: Sequence[int],
    dy_grid: Sequence[int],
    views: Sequence[int],
    shape: Sequence[int],
    nonzeros: int,
) -> Tensor:
    """Gather-SDDMM: ``dvalue[row, k] = sum_lane dy[row, lane] * planes[offset[row, k] + lane]``, at the nonzeros only.

    Parameters
    ----------
    planes, dy : Tensor
        Packed input and output gradient: both uint8 (the gradient around 128) or both float32.
    group_ptr, offset, index, plane : Tensor
        The forward `GatherList`.
    x_scale, x_zero_point, dy_scale : Tensor or None
        For codes, (1,) each or one for each plane of x (the first two) and each row.
    grid, dy_grid, views, shape
        Layout of both, the view of the gradient and the shape of its tensor.
    nonzeros : int

    Returns
    -------
    Tensor
        float32, (nonzeros,).
    """
    out = torch.empty(nonzeros, dtype=torch.float32)
    _matmul.sddmm(planes, dy, group_ptr, offset, index, plane, x_scale, x_zero_point, dy_scale, out, grid, dy_grid,
                  views, shape, torch.get_num_threads())
    return out


def _gather_weights(values: Tensor, index: Tensor) -> Tensor:
    """Slots of a float list: values, and zero where the index is -1."""
    return torch.cat([values, values.new_zeros(1)])[index]


def _multiply(
    packed: Tensor,
    values: Tensor,
    rows: Sequence[Tensor],
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    clip: Tensor | None,
    *where: object,
    factor: Tensor | None = None,
    limits: Sequence[float] = (),
) -> Tensor:
    """Quantise the weight, as the scale of the planes wants it, and multiply; the rest is as for `spmm`.

    `factor` (rows,) is multiplied into the product before the bias.
    """
    master = values if values.dtype == torch.float32 else values.to(torch.float32)
    group_ptr, offset, index, plane = rows
    spmm = shortcut("spmm")
    if x_scale is None:
        weights = _gather_weights(master, index)
        if factor is not None:
            weights = weights * torch.repeat_interleave(factor, group_ptr.diff().long() * 4)
        return spmm(packed, weights, group_ptr, offset, None, None, None, None, *where, limits)
    if spmm is _direct["spmm"]:  # in one call: half of what a small layer costs is calls
        bias, grid, views, shape, channels_last, zeros, dtype = where
        out = _result(shape, channels_last, zeros, dtype)
        _matmul.quantized_spmm(master, index, group_ptr, offset, plane, x_scale, x_zero, clip, packed, bias, out, grid,
                               views, torch.get_num_threads(), factor, *limits)
        return out
    quantize = shortcut("quantize_weight")
    if x_scale.shape[0] == 1:
        codes, scale, total = quantize(master, index, group_ptr, None, None, None, clip)
    else:
        codes, scale, total = quantize(master, index, group_ptr, plane, x_scale, x_zero, clip)
        x_scale = x_zero = None
    if factor is not None:
        scale = scale * factor
    return spmm(packed, codes, group_ptr, offset, scale, total, x_scale, x_zero, *where, limits)


def _packed(
    x: Tensor,
    grid: Sequence[int],
    views: Sequence[int],
    lanes: int,
    scheme: str | None,
    seed: Tensor | None,
    per_channel: bool,
    options: Sequence[float],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if scheme is None:
        return shortcut("pack")(x, grid, views, lanes), None, None
    return shortcut("quantize_pack")(x, grid, views, lanes, scheme, seed, per_channel, options)


def _layer_forward_fake(x, values, bias, rows, grid, views, out_views, shape, scheme, seed, dtype, per_channel=False,
                        options=(), clip=None, keep_floats=False, channels_last=None):
    channels_last = is_channels_last(x) if channels_last is None else channels_last
    out = _spmm_fake(x, None, None, None, None, None, None, None, None, None, None, shape, channels_last, False, dtype)
    size = 0 if scheme is None else _scales(grid, per_channel)
    kept = torch.float32 if scheme is None or keep_floats else torch.uint8
    planes = x.new_empty(buffer_lanes(grid, x.shape[0]), dtype=kept)
    return out, planes, x.new_empty(size, dtype=torch.float32), x.new_empty(size, dtype=torch.int32)


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are what is innermost in the memory of an (images, channels, height, width) tensor."""
    return x.stride(1) == 1 and not x.is_contiguous()


@operator(
    "layer_forward(Tensor x, Tensor values, Tensor? bias, Tensor[] rows, int[] grid, int[] views, int[] out_views, "
    "SymInt[] shape, str? scheme, Tensor? seed, ScalarType dtype, bool per_channel=False, "
    "float[] options=[], Tensor? clip=None, bool keep_floats=False, bool? channels_last=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _layer_forward_fake,
)
def layer_forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    rows: Sequence[Tensor],
    grid: Sequence[int],
    views: Sequence[int],
    out_views: Sequence[int],
    shape: Sequence[int],
    scheme: str | None,
    seed: Tensor | None,
    dtype: torch.dtype,
    per_channel: bool = False,
    options: Sequence[float] = (),
    clip: Tensor | None = None,
    keep_floats: bool = False,
    channels_last: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer's forward pass: pack the input, quantise the weight, multiply.

    Parameters
    ----------
    x, values, bias : Tensor
        (images, channels, height, width), (nonzeros,), (out_channels,) or None.
    rows : sequence of Tensor
        The forward `GatherList`.
    grid, views, out_views
        Layout of the input, and of the output on the same lanes.
    shape : sequence of int
        Of the output.
    scheme, seed
        Of the input; without a scheme everything is float32.
    dtype : torch.dtype
        Of the output, float32 or bfloat16.
    per_channel : bool
        One scale for each channel of the input, folded into the weights before they are quantised.
    options, clip
        Of the input's scheme (`quantize_pack`) and of the weight (`quantize_weight`).
    keep_floats : bool
        Return the input packed without quantisation, for a weight gradient in float32.
    channels_last : bool, optional
        Memory format of the output; without it x's.

    Returns
    -------
    out : Tensor
        Of `shape` and `dtype`.
    planes, scale, zero_point : Tensor
        The packed input; scale and zero point are empty without a scheme.
    """
    lanes = buffer_lanes(grid, x.shape[0])
    packed, x_scale, x_zero_point = _packed(x, grid, views, lanes, scheme, seed, per_channel, options)
    out = shortcut("packed_forward")(packed, x_scale, x_zero_point, values, bias, rows, grid, out_views, shape, dtype,
                                     clip, is_channels_last(x) if channels_last is None else channels_last)
    if scheme is None:
        x_scale, x_zero_point = torch.empty(0), torch.empty(0, dtype=torch.int32)
    elif keep_floats:
        packed = shortcut("pack")(x, grid, views, lanes)
    return out, packed, x_scale, x_zero_point


def _packed_forward_fake(planes, x_scale, x_zero_point, values, bias, rows, grid, out_views, shape, dtype, clip,
                         channels_last, factor=None, limits=()):
    return _spmm_fake(planes, None, None, None, None, None, None, None, None, None, None, shape, channels_last, False,
                      dtype)


@operator(
    "packed_forward(Tensor planes, Tensor? x_scale, Tensor? x_zero_point, Tensor values, Tensor? bias, Tensor[] rows, "
    "int[] grid, int[] out_views, SymInt[] shape, ScalarType dtype, Tensor? clip, bool channels_last, "
    "Tensor? factor=None, float[] limits=[]) -> Tensor",
    _packed_forward_fake,
)
def packed_forward(
    planes: Tensor,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    values: Tensor,
    bias: Tensor | None,
    rows: Sequence[Tensor],
    grid: Sequence[int],
    out_views: Sequence[int],
    shape: Sequence[int],
    dtype: torch.dtype,
    clip: Tensor | None,
    channels_last: bool,
    factor: Tensor | None = None,
    limits: Sequence[float] = (),
) -> Tensor:
    """A layer's forward pass on an input that is packed already: quantise the weight, multiply.

    Parameters
    ----------
    planes, x_scale, x_zero_point : Tensor
        Of `quantize_pack`, or of `pack` and None.
    values, bias, rows, grid, out_views, shape, dtype, clip, channels_last
        As for `layer_forward`.
    factor : Tensor, optional
        float32, (out_channels,): multiplied into the product before the bias is added.
    limits : sequence of float
        As for `spmm`.

    Returns
    -------
    Tensor
        Of `shape` and `dtype`.
    """
    _check_limits(limits, bias)
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.to(torch.float32)
    return _multiply(planes, values, rows, x_scale, x_zero_point, clip, bias, grid, out_views, shape, channels_last,
                     False, dtype, factor=factor, limits=limits)


def _layer_backward_fake(dy, values, planes, x_scale, x_zero_point, rows, columns, grid, dy_grid, views, dy_views,
                         x_shape, complete, scheme, seed, grads, x_dtype, per_channel=False, options=(),
                         clip=None, channels_last=None):
    make = torch.float32
    channels_last = is_channels_last(dy) if channels_last is None else channels_last
    dx = _spmm_fake(dy, None, None, None, None, None, None, None, None, None, None, x_shape, channels_last, False,
                    x_dtype)
    return (
        dx if grads[0] else dy.new_empty(0, dtype=make),
        dy.new_empty(values.shape if grads[1] else 0, dtype=make),
        dy.new_empty(dy.shape[1] if grads[2] else 0, dtype=make),
    )


@operator(
    "layer_backward(Tensor dy, Tensor values, Tensor? planes, Tensor? x_scale, Tensor? x_zero_point, Tensor[] rows, "
    "Tensor[] columns, int[] grid, int[] dy_grid, int[] views, int[] dy_views, SymInt[] x_shape, bool complete, "
    "str? scheme, Tensor? seed, bool[] grads, ScalarType x_dtype, bool per_channel=False, "
    "float[] options=[], Tensor? clip=None, bool? channels_last=None) -> (Tensor, Tensor, Tensor)",
    _layer_backward_fake,
)
def layer_backward(
    dy: Tensor,
    values: Tensor,
    planes: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    grid: Sequence[int],
    dy_grid: Sequence[int],
    views: Sequence[int],
    dy_views: Sequence[int],
    x_shape: Sequence[int],
    complete: bool,
    scheme: str | None,
    seed: Tensor | None,
    grads: Sequence[bool],
    x_dtype: torch.dtype,
    per_channel: bool = False,
    options: Sequence[float] = (),
    clip: Tensor | None = None,
    channels_last: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's backward pass: pack the output's gradient once, for the input's and the weight's.

    Parameters
    ----------
    dy, values : Tensor
        (images, out_channels, height, width), (nonzeros,).
    planes, x_scale, x_zero_point : Tensor or None
        The packed input; only read for the weight gradient, which is computed in float32 if the planes are.
    rows, columns : sequence of Tensor
        The forward and the backward `GatherList`.
    grid, dy_grid, views, dy_views
        Layouts of input and output.
    x_shape : sequence of int
    complete : bool
        Whether the views cover the input; the gradient of the rest is zero.
    scheme, seed
        Of the gradient; without a scheme everything is float32.
    grads : sequence of bool
        Which gradients are wanted: of the input, the values, the bias.
    x_dtype : torch.dtype
        Of the input's gradient, float32 or bfloat16.
    per_channel : bool
        One scale for each channel of the gradient.
    options, clip
        Of the gradient's scheme (`quantize_pack`) and of the weight (`quantize_weight`).

    Returns
    -------
    dx, dvalues, dbias : Tensor
        The latter two in float32; empty where not wanted.
    """
    dx = dvalues = dbias = None
    if grads[1] and planes is None:
        raise ValueError("the gradient of the values needs the packed input, got planes=None")
    if scheme == "absmax":
        scheme = "symmetric"  # sddmm wants gradients around 128, whatever their signs
    lanes = buffer_lanes(dy_grid, dy.shape[0])
    in_floats = scheme is None or (grads[1] and planes.dtype == torch.float32)
    packed = dy_scale = dy_zero_point = None
    if grads[0] or not in_floats:
        packed, dy_scale, dy_zero_point = _packed(dy, dy_grid, dy_views, lanes, scheme, seed, per_channel, options)
    if grads[0]:
        dx = _multiply(packed, values, columns, dy_scale, dy_zero_point, clip, None, dy_grid, views, x_shape,
                       is_channels_last(dy) if channels_last is None else channels_last, not complete, x_dtype)
    if grads[1]:
        if in_floats:
            x_scale = x_zero_point = dy_scale = None
            if packed is None or packed.dtype != torch.float32:
                packed = shortcut("pack")(dy, dy_grid, dy_views, lanes)
        dvalues = shortcut("sddmm")(planes, packed, *rows, x_scale, x_zero_point, dy_scale, grid, dy_grid,
                                    *all_lanes(dy_views, dy.shape, dy_grid), values.shape[0])
    if grads[2]:
        dbias = dy.sum((0, 2, 3), dtype=torch.float32)
    # each an own tensor: an operator's results may not be the same one
    return (
        torch.empty(0) if dx is None else dx,
        torch.empty(0) if dvalues is None else dvalues,
        torch.empty(0) if dbias is None else dbias,
    )


def _packed_backward_fake(dy, dy_scale, dy_zero_point, values, planes, x_scale, x_zero_point, rows, columns, grid,
                          dy_grid, views, dy_views, x_shape, dy_shape, complete, grads, x_dtype, clip, channels_last):
    dx = _spmm_fake(dy, None, None, None, None, None, None, None, None, None, None, x_shape, channels_last, False,
                    x_dtype)
    return (
        dx if grads[0] else dy.new_empty(0, dtype=torch.float32),
        dy.new_empty(values.shape if grads[1] else 0, dtype=torch.float32),
    )


@operator(
    "packed_backward(Tensor dy, Tensor dy_scale, Tensor dy_zero_point, Tensor values, Tensor? planes, "
    "Tensor? x_scale, Tensor? x_zero_point, Tensor[] rows, Tensor[] columns, int[] grid, int[] dy_grid, int[] views, "
    "int[] dy_views, SymInt[] x_shape, SymInt[] dy_shape, bool complete, bool[] grads, ScalarType x_dtype, "
    "Tensor? clip, bool channels_last) -> (Tensor, Tensor)",
    _packed_backward_fake,
)
def packed_backward(
    dy: Tensor,
    dy_scale: Tensor,
    dy_zero_point: Tensor,
    values: Tensor,
    planes: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    grid: Sequence[int],
    dy_grid: Sequence[int],
    views: Sequence[int],
    dy_views: Sequence[int],
    x_shape: Sequence[int],
    dy_shape: Sequence[int],
    complete: bool,
    grads: Sequence[bool],
    x_dtype: torch.dtype,
    clip: Tensor | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """A layer's backward pass from a gradient that is packed already.

    Parameters
    ----------
    dy, dy_scale, dy_zero_point : Tensor
        The packed gradient, of shape `dy_shape`.
    grads : sequence of bool
        Whether the gradients of the input and of the values are wanted.
    values, planes, x_scale, x_zero_point, rows, columns, grid, dy_grid, views, dy_views, x_shape, complete, x_dtype, \
clip, channels_last
        As for `layer_backward`.

    Returns
    -------
    dx, dvalues : Tensor
        The latter in float32; empty where not wanted.
    """
    dx = dvalues = None
    if grads[0]:
        dx = _multiply(dy, values, columns, dy_scale, dy_zero_point, clip, None, dy_grid, views, x_shape, channels_last,
                       not complete, x_dtype)
    if grads[1]:
        dvalues = shortcut("sddmm")(planes, dy, *rows, x_scale, x_zero_point, dy_scale, grid, dy_grid, dy_views,
                                    dy_shape, values.shape[0])
    return torch.empty(0) if dx is None else dx, torch.empty(0) if dvalues is None else dvalues
