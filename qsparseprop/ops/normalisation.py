"""Operators of batch normalisation: what it multiplies and adds, and what its gradient is made of.

All tensors are matrices (rows, channels), which is how a channels_last tensor looks: a row is a pixel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsparseprop._kernels import _norm
from qsparseprop.ops._registration import operator
from qsparseprop.ops.threads import thread_count

__all__ = ["norm_factors", "norm_statistics"]


def _norm_statistics_fake(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
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
                            thread_count())  # fmt: skip


def _norm_factors_fake(sums: Tensor, statistics: Tensor, *others: Any) -> tuple[Tensor, ...]:
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
