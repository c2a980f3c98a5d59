"""Operators of activations behind linear layers, for matrices (rows, channels).

They continue ``qsparseprop.norm_ops``. The activations are "relu", "relu6", "gelu" (with the error function, Hendrycks
and Gimpel 2016) and "gelu_tanh" (its approximation by tanh). Of what the gradient needs, the operators keep whether it
passes, one bit an element, for the first two; and the slope in 8 bits, in steps of 1/200, for the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsparseprop._kernels import _activation
from qsparseprop._kernels._memory import empty
from qsparseprop.ops import RANDOM_SCHEMES, operator
from qsparseprop.reference import mix_seed


def _saved_like(x: Tensor, activation: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of what is kept of a tensor."""
    if activation.startswith("gelu"):
        return tuple(x.shape), torch.uint8
    return (*x.shape[:-1], -(-x.shape[-1] // 16)), torch.int16


def _saved(x: Tensor, activation: str, save: bool) -> Tensor | None:
    return empty(*_saved_like(x, activation)) if save else None


def _saved_fake(x, activation, save):
    shape, dtype = _saved_like(x, activation) if save else (0, torch.uint8)
    return x.new_empty(shape, dtype=dtype)


def _or_empty(tensor: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype) if tensor is None else tensor


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
    out, saved = empty(tuple(x.shape), x.dtype), _saved(x, activation, save)
    _activation.act(x, out, activation, saved, torch.get_num_threads())
    return out, _or_empty(saved, torch.uint8)


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
    return _activation.act_range(x, activation, torch.get_num_threads())


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
    scales = grid[4] if per_channel else 1
    out, saved = empty(tuple(x.shape), x.dtype) if keep else None, _saved(x, activation, save)
    planes = empty((lanes,), torch.uint8)
    plane_scale = torch.empty(scales, dtype=torch.float32)
    zero_point = torch.empty(scales, dtype=torch.int32)
    _activation.act_pack(x, out, activation, saved, images, ranges, planes, plane_scale, zero_point, grid, views,
                         scheme, per_channel, torch.get_num_threads())  # fmt: skip
    return _or_empty(out, x.dtype), _or_empty(saved, torch.uint8), planes, plane_scale, zero_point


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
    return _activation.act_sums(dy, saved, activation, torch.get_num_threads())


@operator(
    "act_grad(Tensor dy, Tensor saved, str activation) -> Tensor", lambda dy, saved, activation: torch.empty_like(dy)
)
def act_grad(dy: Tensor, saved: Tensor, activation: str) -> Tensor:
    """``dy * slope``, like dy; parameters as for `act_sums`."""
    dx = empty(tuple(dy.shape), dy.dtype)
    _activation.act_grad(dy, saved, activation, dx, torch.get_num_threads())
    return dx


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
    if scheme in RANDOM_SCHEMES and seed is None:
        raise ValueError(f"the scheme {scheme!r} needs a seed")
    scales = grid[4] if per_channel else 1
    planes = empty((lanes,), torch.uint8)
    plane_scale = torch.empty(scales, dtype=torch.float32)
    zero_point = torch.empty(scales, dtype=torch.int32)
    _activation.act_grad_pack(dy, saved, activation, images, ranges, planes, plane_scale, zero_point, grid, views,
                              scheme, options, per_channel, 0 if seed is None else mix_seed(int(seed)),
                              torch.get_num_threads())  # fmt: skip
    return planes, plane_scale, zero_point
