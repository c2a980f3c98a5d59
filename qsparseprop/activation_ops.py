"""Operators of activations behind linear layers, for matrices (rows, channels).

They continue ``qsparseprop.norm_ops``. The activations are "relu", "relu6", "gelu" (with the error function, Hendrycks
and Gimpel 2016) and "gelu_tanh" (its approximation by tanh). Of what the gradient needs, the operators keep whether it
passes, one bit an element, for the first two; and the slope in 8 bits, in steps of 1/200, for the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qsparseprop.epilogue_ops import (
    epilogue,
    epilogue_grad,
    epilogue_grad_pack,
    epilogue_pack,
    epilogue_range,
    epilogue_sums,
)
from qsparseprop.ops import operator

_EPILOGUES = {
    "relu": ("clamp", [0.0, math.inf]),
    "relu6": ("clamp", [0.0, 6.0]),
    "gelu": ("gelu", []),
    "gelu_tanh": ("gelu_tanh", []),
}


def _activation(name: str) -> tuple[str, list[float]]:
    if name not in _EPILOGUES:
        raise ValueError(f"the activation must be one of {', '.join(_EPILOGUES)}, got {name!r}")
    return _EPILOGUES[name]


def _saved_like(x: Tensor, activation: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of what is kept of a tensor."""
    if activation.startswith("gelu"):
        return tuple(x.shape), torch.uint8
    return (*x.shape[:-1], -(-x.shape[-1] // 16)), torch.int16


def _saved_fake(x, activation, save):
    shape, dtype = _saved_like(x, activation) if save else (0, torch.uint8)
    return x.new_empty(shape, dtype=dtype)


@operator(
    "act(Tensor x, str activation, bool save) -> (Tensor, Tensor)",
    lambda x, activation, save: (torch.empty_like(x), _saved_fake(x, activation, save)),
)
def act(x: Tensor, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    """Activate, and keep what the backward pass needs.

    Parameters
    ----------
    x : Tensor
        (rows, channels), float32 or bfloat16, contiguous.
    activation : str
        "relu", "relu6", "gelu" or "gelu_tanh".
    save : bool

    Returns
    -------
    y : Tensor
        Like x.
    saved : Tensor
        For "relu" and "relu6" int16, (rows, ceil(channels / 16)): bit i of a word tells whether the gradient of element
        i passes; otherwise uint8, like x: ``128 + round(200 * (slope - 1/2))``. Empty without `save`.
    """
    y, _, saved = epilogue(x, None, None, None, *_activation(activation), None, None, save)
    return y, saved


@operator(
    "act_range(Tensor x, str activation) -> Tensor",
    lambda x, activation: x.new_empty((x.shape[1], 2), dtype=torch.float32),
)
def act_range(x: Tensor, activation: str) -> Tensor:
    """Least and greatest element of each channel of a tensor, limited as by "relu" or "relu6".

    Parameters
    ----------
    x, activation
        As for `act`; at least one row.

    Returns
    -------
    Tensor
        float32, (channels, 2); NaN where an element (after the limits) is not finite.
    """
    name, options = _activation(activation)
    return epilogue_range(x, None, None, None, *(("identity", []) if name != "clamp" else (name, options)))


def _act_pack_fake(x, activation, save, images, ranges, grid, views, lanes, scheme, per_channel, keep):
    scales = grid[4] if per_channel else 1
    return (
        torch.empty_like(x) if keep else x.new_empty(0), _saved_fake(x, activation, save),
        x.new_empty(lanes, dtype=torch.uint8), x.new_empty(scales, dtype=torch.float32),
        x.new_empty(scales, dtype=torch.int32),
    )  # fmt: skip


@operator(
    "act_pack(Tensor x, str activation, bool save, int[] images, Tensor ranges, int[] grid, int[] views, int lanes, "
    "str scheme, bool per_channel, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _act_pack_fake,
)
def act_pack(
    x: Tensor,
    activation: str,
    save: bool,
    images: Sequence[int],
    ranges: Tensor,
    grid: Sequence[int],
    views: Sequence[int],
    lanes: int,
    scheme: str,
    per_channel: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`act` and `ops.quantize_pack` of its result in one pass.

    Parameters
    ----------
    x, activation, save
        As for `act`; at least two channels.
    images, ranges, grid, views, lanes, scheme, per_channel, keep
        As for `norm_ops.norm_act_pack`.

    Returns
    -------
    y, saved : Tensor
        Of `act`; y empty without `keep`.
    planes, plane_scale, zero_point : Tensor
        Of `quantize_pack`.
    """
    y, _, saved, *packed = epilogue_pack(x, None, None, None, *_activation(activation), None, None, save, images,
                                         ranges, grid, views, lanes, scheme, per_channel, keep)  # fmt: skip
    return y, saved, *packed


@operator(
    "act_sums(Tensor dy, Tensor saved, str activation) -> Tensor",
    lambda dy, saved, activation: dy.new_empty((dy.shape[1], 2), dtype=torch.float64),
)
def act_sums(dy: Tensor, saved: Tensor, activation: str) -> Tensor:
    """Of each channel the sum of the gradient ``dy * slope``, and its greatest magnitude.

    Parameters
    ----------
    dy : Tensor
        (rows, channels), float32 or bfloat16, contiguous.
    saved, activation
        Of `act`.

    Returns
    -------
    Tensor
        float64, (channels, 2); the magnitude is NaN where an element is not finite.
    """
    return epilogue_sums(dy, None, saved, *_activation(activation))[:, ::2].contiguous()


@operator(
    "act_grad(Tensor dy, Tensor saved, str activation) -> Tensor", lambda dy, saved, activation: torch.empty_like(dy)
)
def act_grad(dy: Tensor, saved: Tensor, activation: str) -> Tensor:
    """``dy * slope``, like dy; parameters as for `act_sums`."""
    return epilogue_grad(dy, None, saved, *_activation(activation), None, False)[0]


def _act_grad_pack_fake(dy, saved, activation, images, ranges, grid, views, lanes, scheme, seed, per_channel,
                        options=()):
    scales = grid[4] if per_channel else 1
    return (
        dy.new_empty(lanes, dtype=torch.uint8), dy.new_empty(scales, dtype=torch.float32),
        dy.new_empty(scales, dtype=torch.int32),
    )  # fmt: skip


@operator(
    "act_grad_pack(Tensor dy, Tensor saved, str activation, int[] images, Tensor ranges, int[] grid, int[] views, "
    "int lanes, str scheme, Tensor? seed, bool per_channel, float[] options=[]) -> (Tensor, Tensor, Tensor)",
    _act_grad_pack_fake,
)
def act_grad_pack(
    dy: Tensor,
    saved: Tensor,
    activation: str,
    images: Sequence[int],
    ranges: Tensor,
    grid: Sequence[int],
    views: Sequence[int],
    lanes: int,
    scheme: str,
    seed: Tensor | None,
    per_channel: bool,
    options: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """`act_grad` and `ops.quantize_pack` of its result in one pass.

    Parameters
    ----------
    dy, saved, activation
        As for `act_sums`; at least two channels.
    images, ranges, grid, views, lanes, scheme, seed, per_channel, options
        As for `norm_ops.norm_act_grad_pack`.

    Returns
    -------
    planes, plane_scale, zero_point : Tensor
        Of `quantize_pack`.
    """
    return epilogue_grad_pack(dy, None, saved, *_activation(activation), None, False, images, ranges, grid, views,
                              lanes, scheme, seed, per_channel, options)[:3]  # fmt: skip
