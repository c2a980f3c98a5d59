"""Operators of batch normalisation with its activation, for tensors whose channels are neighbours in memory.

They continue ``qsparseprop.ops``: registered with ``torch.library``, without knowledge of modules. All tensors are
matrices (rows, channels), which is how a channels_last tensor looks: a row is a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsparseprop._kernels import _norm
from qsparseprop.epilogue_ops import (
    epilogue,
    epilogue_grad,
    epilogue_grad_pack,
    epilogue_pack,
    epilogue_range,
    epilogue_sums,
)
from qsparseprop.ops import operator


def _words(channels: int) -> int:
    return -(-channels // 16)


@operator("channel_moments(Tensor x) -> Tensor", lambda x: x.new_empty((x.shape[1], 4), dtype=torch.float64))
def channel_moments(x: Tensor) -> Tensor:
    """Mean, sum of squared distances from it, least and greatest element of every channel.

    Parts of the rows are joined by the formula of Chan, Golub and LeVeque (1979), which loses no digits where the mean
    is large.

    Parameters
    ----------
    x : Tensor
        (rows, channels), float32 or bfloat16, contiguous, with at least one row.

    Returns
    -------
    Tensor
        float64, (channels, 4).
    """
    return _norm.moments(x, torch.get_num_threads())


def _norm_statistics_fake(x, weight, bias, running_mean, running_var, momentum, eps, training, save):
    channels = x.shape[1]
    return (x.new_empty((6, channels), dtype=torch.float32), x.new_empty((channels, 2), dtype=torch.float32),
            x.new_empty((7, channels), dtype=torch.float64))  # fmt: skip


@operator(
    "norm_statistics(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "float momentum, float eps, bool training, bool save) -> (Tensor, Tensor, Tensor)",
    _norm_statistics_fake,
)
def norm_statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    training: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What batch normalisation of a tensor multiplies and adds; running statistics are updated.

    As `torch.nn.functional.batch_norm`: with `training` the statistics are those of x, and the running ones move by
    `momentum` to them in place, to the variance with one degree of freedom less.

    Parameters
    ----------
    x : Tensor
        (rows, channels), float32 or bfloat16, contiguous. It is read only if `training` or `save`.
    weight, bias, running_mean, running_var : Tensor or None
        float32, (channels,), contiguous. Both running statistics or neither; without `training` they must be there.
    momentum, eps : float
    training : bool
    save : bool
        Whether x will be saved in 8 bits, over the range of each channel.

    Returns
    -------
    singles : Tensor
        float32, (6, channels): scale and shift, for ``x * scale + shift``; code_scale and code_shift, for
        ``code = 128 + round(x * code_scale + code_shift)``; and scale and shift of the same for codes, ``code * scale +
        shift``. The last four are NaN where x was not read.
    ends : Tensor
        float32, (channels, 2): least and greatest element of ``x * scale + shift``, NaN where an element is not finite,
        or x was not read.
    doubles : Tensor
        float64, (7, channels): mean, variance (biased, or the running one), 1 / std; slope and offset of the normalised
        value ``code * slope + offset``; step and least element of x, which is ``code * step + least``. The last four
        are NaN where x was not read.

    Raises
    ------
    TypeError, ValueError
        Before anything has changed.
    """
    return _norm.statistics(x, weight, bias, running_mean, running_var, momentum, eps, training, save,
                            torch.get_num_threads())  # fmt: skip


def _norm_factors_fake(sums, statistics, weight, count, batch_statistics):
    channels = statistics.shape[1]
    return tuple(sums.new_empty(shape, dtype=torch.float32) for shape in ((3, channels), (channels, 2), (3, channels)))


@operator(
    "norm_factors(Tensor sums, Tensor statistics, Tensor? weight, int count, bool batch_statistics) -> "
    "(Tensor, Tensor, Tensor)",
    _norm_factors_fake,
)
def norm_factors(
    sums: Tensor, statistics: Tensor, weight: Tensor | None, count: int, batch_statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of batch normalisation's parameters, and what makes that of its input.

    Parameters
    ----------
    sums : Tensor
        float64, (channels, 3): sums over the rows of the gradient g, of g * code, and the greatest magnitude of g.
    statistics : Tensor
        float64, (7, channels), of `norm_statistics`.
    weight : Tensor or None
        float32, (channels,).
    count : int
        How many rows there are.
    batch_statistics : bool
        Whether the statistics were those of the rows.

    Returns
    -------
    factor : Tensor
        float32, (3, channels): for ``dx = g * factor[0] + code * factor[1] + factor[2]``.
    ranges : Tensor
        float32, (channels, 2): what no element of dx goes beyond, NaN where one is not finite.
    gradients : Tensor
        float32, (3, channels): of weight and bias, and the sum of dx over the rows, which is the gradient of a bias
        before: exactly 0 with batch statistics.
    """
    return _norm.factors(sums, statistics, weight, count, batch_statistics)


def _norm_act_fake(x, residual, scale, shift, low, high, code_scale, code_shift):
    saved = code_scale is not None
    return (
        torch.empty_like(x),
        x.new_empty(x.shape if saved else 0, dtype=torch.uint8),
        x.new_empty((x.shape[0], _words(x.shape[1])) if saved else 0, dtype=torch.int16),
    )


@operator(
    "norm_act(Tensor x, Tensor? residual, Tensor scale, Tensor shift, float low, float high, Tensor? code_scale, "
    "Tensor? code_shift) -> (Tensor, Tensor, Tensor)",
    _norm_act_fake,
)
def norm_act(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    low: float,
    high: float,
    code_scale: Tensor | None,
    code_shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``clamp(x * scale + shift + residual, low, high)``, and what its backward pass needs.

    Parameters
    ----------
    x, residual : Tensor
        (rows, channels), float32 or bfloat16, contiguous; residual may be None.
    scale, shift : Tensor
        float32, (channels,): normalisation and its affine part in one.
    low, high : float
        Limits of the activation; infinite without one.
    code_scale, code_shift : Tensor or None
        float32, (channels,): ``code = 128 + round(x * code_scale + code_shift)``. None: nothing is saved.

    Returns
    -------
    y : Tensor
        Like x.
    codes : Tensor
        uint8, like x: x in 8 bits; empty if nothing is saved.
    mask : Tensor
        int16, (rows, ceil(channels / 16)): bit i of a word tells whether element i lies between the limits.
    """
    saves = code_scale is not None
    y, codes, mask = epilogue(x, residual, scale, shift, "clamp", [low, high], code_scale, code_shift, saves)
    return y, codes, mask if saves else mask.to(torch.int16)


@operator(
    "norm_act_range(Tensor x, Tensor? residual, Tensor scale, Tensor shift, float low, float high) -> Tensor",
    lambda x, residual, scale, shift, low, high: x.new_empty((x.shape[1], 2), dtype=torch.float32),
)
def norm_act_range(
    x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, low: float, high: float
) -> Tensor:
    """Least and greatest element of each channel of what `norm_act` gives, before it is rounded to x's dtype.

    Parameters
    ----------
    x, residual, scale, shift, low, high
        As for `norm_act`; at least one row.

    Returns
    -------
    Tensor
        float32, (channels, 2); NaN where an element is not finite.
    """
    return epilogue_range(x, residual, scale, shift, "clamp", [low, high])


def _norm_act_pack_fake(x, residual, scale, shift, low, high, code_scale, code_shift, images, ranges, grid, views,
                        lanes, scheme, per_channel, keep):
    out, codes, mask = _norm_act_fake(x, residual, scale, shift, low, high, code_scale, code_shift)
    scales = grid[4] if per_channel else 1
    return (
        out if keep else x.new_empty(0), codes, mask, x.new_empty(lanes, dtype=torch.uint8),
        x.new_empty(scales, dtype=torch.float32), x.new_empty(scales, dtype=torch.int32),
    )  # fmt: skip


@operator(
    "norm_act_pack(Tensor x, Tensor? residual, Tensor scale, Tensor shift, float low, float high, Tensor? code_scale, "
    "Tensor? code_shift, int[] images, Tensor ranges, int[] grid, int[] views, int lanes, str scheme, "
    "bool per_channel, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _norm_act_pack_fake,
)
def norm_act_pack(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    low: float,
    high: float,
    code_scale: Tensor | None,
    code_shift: Tensor | None,
    images: Sequence[int],
    ranges: Tensor,
    grid: Sequence[int],
    views: Sequence[int],
    lanes: int,
    scheme: str,
    per_channel: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`norm_act` and `ops.quantize_pack` of its result in one pass.

    The result is quantised before it is rounded to x's dtype, with scales from `ranges` in place of its own range.

    Parameters
    ----------
    x, residual, scale, shift, low, high, code_scale, code_shift
        As for `norm_act`; at least two channels. x may be uint8 codes, read as the numbers 0 to 255, where there is no
        residual, nothing is saved and only the packed result is wanted.
    images : sequence of int
        (images, channels, height, width) of the channels_last tensor whose rows x has.
    ranges : Tensor
        float32, (channels, 2), or (1, 2) without `per_channel`: bounds of the result, least and greatest.
    grid, views, lanes, scheme, per_channel
        As for `quantize_pack`; "absmax", "symmetric" or "standard". Pixels in no view are left out of all results.
    keep : bool
        Whether the result itself is wanted as well.

    Returns
    -------
    y, codes, mask : Tensor
        Of `norm_act`; y empty if not wanted.
    planes, plane_scale, zero_point : Tensor
        Of `quantize_pack`.
    """
    saves = code_scale is not None
    y, codes, mask, *packed = epilogue_pack(
        x, residual, scale, shift, "clamp", [low, high], code_scale, code_shift, saves, images, ranges, grid, views,
        lanes, scheme, per_channel, keep,
    )  # fmt: skip
    return y, codes, mask if saves else mask.to(torch.int16), *packed


@operator(
    "norm_act_sums(Tensor dy, Tensor codes, Tensor mask) -> Tensor",
    lambda dy, codes, mask: dy.new_empty((dy.shape[1], 3), dtype=torch.float64),
)
def norm_act_sums(dy: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """Of each channel the sums of the masked gradient g and of g * code, and the greatest magnitude of g.

    Parameters
    ----------
    dy : Tensor
        (rows, channels), float32 or bfloat16, contiguous.
    codes, mask : Tensor
        Of `norm_act`.

    Returns
    -------
    Tensor
        float64, (channels, 3).
    """
    return epilogue_sums(dy, codes, mask, "clamp", [0.0, 0.0])


@operator(
    "norm_act_grad(Tensor dy, Tensor codes, Tensor mask, Tensor factor, bool residual) -> (Tensor, Tensor)",
    lambda dy, codes, mask, factor, residual: (
        torch.empty_like(dy), torch.empty_like(dy) if residual else dy.new_empty(0)
    ),
)  # fmt: skip
def norm_act_grad(dy: Tensor, codes: Tensor, mask: Tensor, factor: Tensor, residual: bool) -> tuple[Tensor, Tensor]:
    """``g * factor[0] + code * factor[1] + factor[2]``, with g the masked gradient.

    Parameters
    ----------
    dy, codes, mask : Tensor
        As for `norm_act_sums`.
    factor : Tensor
        float32, (3, channels).
    residual : bool
        Whether g itself is wanted, which is the residual's gradient.

    Returns
    -------
    dx, dresidual : Tensor
        Like dy; the latter empty if not wanted.
    """
    return epilogue_grad(dy, codes, mask, "clamp", [0.0, 0.0], factor, residual)


def _norm_act_grad_pack_fake(dy, codes, mask, factor, residual, images, ranges, grid, views, lanes, scheme, seed,
                             per_channel, options=()):
    scales = grid[4] if per_channel else 1
    return (
        dy.new_empty(lanes, dtype=torch.uint8), dy.new_empty(scales, dtype=torch.float32),
        dy.new_empty(scales, dtype=torch.int32), torch.empty_like(dy) if residual else dy.new_empty(0),
    )  # fmt: skip


@operator(
    "norm_act_grad_pack(Tensor dy, Tensor codes, Tensor mask, Tensor factor, bool residual, int[] images, "
    "Tensor ranges, int[] grid, int[] views, int lanes, str scheme, Tensor? seed, bool per_channel, "
    "float[] options=[]) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_act_grad_pack_fake,
)
def norm_act_grad_pack(
    dy: Tensor,
    codes: Tensor,
    mask: Tensor,
    factor: Tensor,
    residual: bool,
    images: Sequence[int],
    ranges: Tensor,
    grid: Sequence[int],
    views: Sequence[int],
    lanes: int,
    scheme: str,
    seed: Tensor | None,
    per_channel: bool,
    options: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`norm_act_grad` and `ops.quantize_pack` of its dx in one pass.

    Parameters
    ----------
    dy, codes, mask, factor, residual
        As for `norm_act_grad`; at least two channels.
    images, ranges, grid, views, lanes, per_channel
        As for `norm_act_pack`.
    scheme, seed, options
        As for `quantize_pack`; "symmetric", "stochastic" or "luq".

    Returns
    -------
    planes, plane_scale, zero_point : Tensor
        Of `quantize_pack`.
    dresidual : Tensor
        Of `norm_act_grad`.
    """
    return epilogue_grad_pack(dy, codes, mask, "clamp", [0.0, 0.0], factor, residual, images, ranges, grid, views,
                              lanes, scheme, seed, per_channel, options)  # fmt: skip
