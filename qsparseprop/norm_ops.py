"""Operators of batch normalisation with its activation, for tensors whose channels are neighbours in memory.

They continue ``qsparseprop.ops``: registered with ``torch.library``, without knowledge of modules. All tensors are
matrices (rows, channels), which is how a channels_last tensor looks: a row is a pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsparseprop._kernels import _norm
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
    out = torch.empty_like(x)
    codes = mask = None
    if code_scale is not None:
        codes = torch.empty(x.shape, dtype=torch.uint8)
        mask = torch.empty((x.shape[0], _words(x.shape[-1])), dtype=torch.int16)
    _norm.norm(x, residual, out, scale, shift, low, high, code_scale, code_shift, codes, mask, torch.get_num_threads())
    if codes is None:
        return out, torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int16)
    return out, codes, mask


@operator(
    "norm_act_sums(Tensor dy, Tensor codes, Tensor mask) -> Tensor",
    lambda dy, codes, mask: dy.new_empty((dy.shape[1], 2), dtype=torch.float64),
)
def norm_act_sums(dy: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """Sums over each channel of the masked gradient g, and of g * code.

    Parameters
    ----------
    dy : Tensor
        (rows, channels), float32 or bfloat16, contiguous.
    codes, mask : Tensor
        Of `norm_act`.

    Returns
    -------
    Tensor
        float64, (channels, 2).
    """
    return _norm.norm_sums(dy, codes, mask, torch.get_num_threads())


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
    dx = torch.empty_like(dy)
    dresidual = torch.empty_like(dy) if residual else None
    _norm.norm_grad(dy, codes, mask, factor, dx, dresidual, torch.get_num_threads())
    return dx, dy.new_empty(0) if dresidual is None else dresidual
