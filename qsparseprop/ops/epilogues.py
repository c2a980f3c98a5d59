"""Operators of what follows a product: ``activation(x * scale + shift + residual)``, every part optional.

All tensors are matrices (rows, channels), which is how a channels_last tensor looks (a row is a pixel) and a linear
layer's result.

An activation is a name and a list of options:

==============  ===================  =================================================================
name            options              kept for the gradient
==============  ===================  =================================================================
``identity``    none                 nothing
``clamp``       least, greatest      a bit an element: it lies strictly between the limits
``leaky_relu``  slope below zero     a bit an element: it is above zero
``silu``        none                 the slope in 8 bits, in steps of 1/200
``hardswish``   none                 the slope in 8 bits, in steps of 1/120
``gelu``        none                 the slope in 8 bits, in steps of 1/200
``gelu_tanh``   none                 the slope in 8 bits, in steps of 1/200
==============  ===================  =================================================================

ReLU is a clamp to 0 and infinity, ReLU6 and Hardtanh are clamps. A code of 8 bits stands for 1/2 plus its distance from
128 in these steps; bits are in words of 16, from the lowest on. NaN stays NaN.

What the gradient needs goes into buffers of the caller's (`codes_like`, `saved_like`), who may have given them to
autograd before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qsparseprop._kernels import _epilogue
from qsparseprop._kernels._memory import empty
from qsparseprop._kernels._plan import PlaneLayout
from qsparseprop._kernels._statistics import Scheme
from qsparseprop.ops._registration import check_tensors, operator, recorded
from qsparseprop.ops.products import Packed
from qsparseprop.ops.threads import thread_count

__all__ = ["ACTIVATIONS", "Activation", "Affine", "Kept", "activation_range", "codes_like", "epilogue", "epilogue_grad",
           "epilogue_grad_pack", "epilogue_pack", "epilogue_range", "epilogue_sums", "saved_like"]  # fmt: skip

#: Names of the activations.
ACTIVATIONS = _epilogue.ACTIVATIONS

_BITS = ("clamp", "leaky_relu")


class Activation(NamedTuple):
    """An activation, see above.

    Attributes
    ----------
    name : str
        One of `ACTIVATIONS`.
    options : tuple of float
    """

    name: str
    options: tuple[float, ...] = ()


class Affine(NamedTuple):
    """``x * scale + shift`` for each channel, float32, (channels,); both or neither.

    Attributes
    ----------
    scale, shift : Tensor or None
    """

    scale: Tensor | None = None
    shift: Tensor | None = None


class Kept(NamedTuple):
    """What the backward pass needs, to be filled on the way: x in 8 bits, and what the activation saves.

    The first three go together: ``codes = 128 + round(x * code_scale + code_shift)``; see `epilogue`.

    Attributes
    ----------
    code_scale, code_shift, codes, saved : Tensor or None
        As for `epilogue`.
    """

    code_scale: Tensor | None = None
    code_shift: Tensor | None = None
    codes: Tensor | None = None
    saved: Tensor | None = None


_X = "Tensor x, Tensor? residual, Tensor? scale, Tensor? shift, str activation, float[] options"
_FILLED = "Tensor? code_scale, Tensor? code_shift, Tensor(a!)? codes, Tensor(b!)? saved"
_DY = "Tensor dy, Tensor? codes, Tensor? saved, str activation, float[] options"


def codes_like(x: Tensor) -> Tensor:
    """A buffer for x in 8 bits, not filled: uint8, like x.

    Parameters
    ----------
    x : Tensor
        (rows, channels).

    Returns
    -------
    Tensor
    """
    return empty(tuple(x.shape), torch.uint8)


def saved_like(x: Tensor, activation: str) -> Tensor | None:
    """A buffer for what the gradient of an activation of x needs, not filled: see above; None for "identity".

    It is int16, (rows, ceil(channels / 16)), for bits, and uint8, like x, for slopes.

    Parameters
    ----------
    x : Tensor
        (rows, channels).
    activation : str

    Returns
    -------
    Tensor or None
    """
    if activation == "identity":
        return None
    if activation in _BITS:
        return empty((*x.shape[:-1], -(-x.shape[-1] // 16)), torch.int16)
    return empty(tuple(x.shape), torch.uint8)


def _or_empty(tensor: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device="cpu") if tensor is None else tensor


@operator(
    f"epilogue({_X}, {_FILLED}) -> Tensor",
    lambda x, residual, scale, shift, activation, options, code_scale, code_shift, codes, saved: torch.empty_like(x),
)
def epilogue(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    options: Sequence[float],
    code_scale: Tensor | None,
    code_shift: Tensor | None,
    codes: Tensor | None,
    saved: Tensor | None,
) -> Tensor:
    """``activation(x * scale + shift + residual)``, and what its backward pass needs.

    Parameters
    ----------
    x, residual : Tensor
        (rows, channels), float32 or bfloat16, contiguous; residual may be None.
    scale, shift : Tensor or None
        float32, (channels,), contiguous; both or neither.
    activation : str
    options : sequence of float
    code_scale, code_shift, codes : Tensor or None
        All or none: float32, (channels,), twice, and uint8, like x, which is filled with x in 8 bits, ``128 + round(x *
        code_scale + code_shift)``.
    saved : Tensor or None
        If the gradient of the activation is wanted: of `saved_like`, and filled with what it needs.

    Returns
    -------
    Tensor
        Like x.

    Raises
    ------
    TypeError, ValueError
        If a tensor is not as said, or the activation or its options are unknown.
    """
    out = empty(tuple(x.shape), x.dtype)
    _epilogue.epilogue(x, residual, out, scale, shift, activation, options, code_scale, code_shift, codes, saved,
                       thread_count())  # fmt: skip
    return out


@operator(
    f"epilogue_range({_X}) -> Tensor",
    lambda x, residual, scale, shift, activation, options: x.new_empty((x.shape[1], 2), dtype=torch.float32),
)
def epilogue_range(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    options: Sequence[float],
) -> Tensor:
    """Bounds of each channel of what `epilogue` gives, before it is rounded to x's dtype.

    They are its least and greatest element, except that where an activation falls and rises, its least value is taken
    for an element if it lies within the channel's range.

    Parameters
    ----------
    x, residual, scale, shift, activation, options
        As for `epilogue`; at least one row.

    Returns
    -------
    Tensor
        float32, (channels, 2); NaN where an element is not finite.
    """
    return _epilogue.epilogue_range(x, residual, scale, shift, activation, options, thread_count())


@operator(
    "activation_range(Tensor ranges, str activation, float[] options) -> Tensor",
    lambda ranges, activation, options: torch.empty_like(ranges, memory_format=torch.contiguous_format),
)
def activation_range(ranges: Tensor, activation: str, options: Sequence[float]) -> Tensor:
    """Bounds of what an activation makes of numbers in given ranges.

    Parameters
    ----------
    ranges : Tensor
        float32, (channels, 2), contiguous: least and greatest.
    activation : str
    options : sequence of float

    Returns
    -------
    Tensor
        Like `ranges`; NaN where they are, or the result is not finite.
    """
    return _epilogue.activation_range(ranges, activation, options)


@recorded
def epilogue_pack(
    x: Tensor,
    residual: Tensor | None,
    affine: Affine,
    activation: Activation,
    kept: Kept,
    ranges: Tensor,
    layout: PlaneLayout,
    scheme: Scheme,
    keep: bool,
) -> tuple[Tensor | None, Packed]:
    """`epilogue` and `quantize_pack` of its result in one pass.

    The result is quantised before it is rounded to x's dtype, with scales from `ranges` in place of its own range.

    Parameters
    ----------
    x, residual : Tensor
        As for `epilogue`; at least two channels, and the rows of whole images. x may be uint8 codes, read as the
        numbers 0 to 255, where there is no residual, nothing is saved and only the packed result is wanted.
    affine : Affine
    activation : Activation
    kept : Kept
        What its backward pass needs.
    ranges : Tensor
        float32, (channels, 2), or (1, 2) where the channels share a scale: bounds of the result, least and greatest.
    layout : PlaneLayout
        Of the images whose pixels are the rows. Pixels in no view are left out of all results.
    scheme : Scheme
        "absmax", "symmetric" or "standard".
    keep : bool
        Whether the result itself is wanted as well.

    Returns
    -------
    y : Tensor or None
        Of `epilogue`; None if not wanted.
    packed : Packed
    """
    check_tensors(x=x, residual=residual, ranges=ranges, **affine._asdict(), **kept._asdict())
    out = empty(tuple(x.shape), x.dtype) if keep else None
    packed = _epilogue.epilogue_pack(x, residual, out, *affine, *activation, *kept, ranges, layout, scheme,
                                     thread_count())  # fmt: skip
    return out, Packed(*packed)


@operator(
    f"epilogue_sums({_DY}) -> Tensor",
    lambda dy, codes, saved, activation, options: dy.new_empty((dy.shape[1], 3), dtype=torch.float64),
)
def epilogue_sums(
    dy: Tensor, codes: Tensor | None, saved: Tensor | None, activation: str, options: Sequence[float]
) -> Tensor:
    """Of each channel the sums of the gradient ``g = dy * slope`` and of g * code, and the greatest magnitude of g.

    Parameters
    ----------
    dy : Tensor
        (rows, channels), float32 or bfloat16, contiguous.
    codes, saved : Tensor or None
        As `epilogue` filled them: None where nothing was kept.
    activation, options
        As for `epilogue`.

    Returns
    -------
    Tensor
        float64, (channels, 3); the second is 0 without codes, the magnitude NaN where an element is not finite.
    """
    return _epilogue.epilogue_sums(dy, codes, saved, activation, options, thread_count())


@operator(
    f"epilogue_grad({_DY}, Tensor? factor, bool want_g) -> (Tensor, Tensor)",
    lambda dy, codes, saved, activation, options, factor, want_g: (
        torch.empty_like(dy), torch.empty_like(dy) if want_g else dy.new_empty(0)
    ),
)  # fmt: skip
def epilogue_grad(
    dy: Tensor,
    codes: Tensor | None,
    saved: Tensor | None,
    activation: str,
    options: Sequence[float],
    factor: Tensor | None,
    want_g: bool,
) -> tuple[Tensor, Tensor]:
    """``g * factor[0] + code * factor[1] + factor[2]``, with ``g = dy * slope``; without factors g.

    Parameters
    ----------
    dy, codes, saved, activation, options
        As for `epilogue_sums`. Without codes ``code * factor[1]`` is left out.
    factor : Tensor or None
        float32, (3, channels).
    want_g : bool
        Whether g itself is wanted, which is the residual's gradient.

    Returns
    -------
    dx, g : Tensor
        Like dy; the latter empty if not wanted.
    """
    dx, g = empty(tuple(dy.shape), dy.dtype), empty(tuple(dy.shape), dy.dtype) if want_g else None
    _epilogue.epilogue_grad(dy, codes, saved, activation, options, factor, dx, g, thread_count())
    return dx, _or_empty(g, dy.dtype)


@recorded
def epilogue_grad_pack(
    dy: Tensor,
    codes: Tensor | None,
    saved: Tensor | None,
    activation: Activation,
    factor: Tensor | None,
    ranges: Tensor,
    layout: PlaneLayout,
    scheme: Scheme,
    seed: Tensor | None,
    want_g: bool,
) -> tuple[Packed, Tensor | None]:
    """`epilogue_grad` and `quantize_pack` of its dx in one pass.

    Parameters
    ----------
    dy, codes, saved, activation, factor
        As for `epilogue_grad`; at least two channels.
    ranges, layout
        As for `epilogue_pack`.
    scheme, seed
        As for `quantize_pack`; "symmetric", "stochastic" or "luq".
    want_g
        As for `epilogue_grad`.

    Returns
    -------
    packed : Packed
    g : Tensor or None
        Of `epilogue_grad`; None if not wanted.
    """
    check_tensors(dy=dy, codes=codes, saved=saved, factor=factor, ranges=ranges, seed=seed)
    g = empty(tuple(dy.shape), dy.dtype) if want_g else None
    packed = _epilogue.epilogue_grad_pack(dy, codes, saved, *activation, factor, g, ranges, layout, scheme, seed,
                                          thread_count())  # fmt: skip
    return Packed(*packed), g
