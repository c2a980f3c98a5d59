"""Batch normalisation: what it multiplies and adds, and what its gradient is made of."""

from __future__ import annotations

import torch

from qsparseprop.ops import normalisation
from qsparseprop.ops.reference._signature import reference_of

__all__ = ["norm_factors", "norm_statistics"]


@reference_of(normalisation.norm_statistics)
def norm_statistics(x, weight, bias, running_mean, running_var, momentum, eps, training, save):
    """See `qsparseprop.ops.norm_statistics`."""
    v, channels = x.to(torch.float64), x.shape[1]
    if training:
        mean, variance = v.mean(0), v.var(0, correction=0)
        for running, found in ((running_mean, mean), (running_var, v.var(0))):
            if running is not None:
                running.copy_((1 - momentum) * running.double() + momentum * found)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, variance = running_mean.double(), running_var.double()
    rstd = 1 / (variance + eps).sqrt()
    scale = rstd if weight is None else rstd * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    least = greatest = step = torch.full((channels,), torch.nan, dtype=torch.float64)
    if training or save:
        least, greatest = v.amin(0), v.amax(0)
        step = (greatest - least) / 255
        step = torch.where(step > 0, step, 1.0)
    ends = torch.stack([least, greatest]).float() * scale.float() + shift.float()
    ends = torch.where(ends.isfinite().all(0) & v.isfinite().all(0), ends, torch.nan)
    singles = torch.stack([scale, shift, 1 / step, -least / step - 128, step * scale, least * scale + shift]).float()
    doubles = torch.stack([mean, variance, rstd, step * rstd, (least - mean) * rstd, step, least])
    return singles, ends.sort(0)[0].t().contiguous(), doubles


@reference_of(normalisation.norm_factors)
def norm_factors(sums, statistics, weight, count, batch_statistics):
    """See `qsparseprop.ops.norm_factors`."""
    total, with_codes, greatest = sums.unbind(1)
    _, _, rstd, slope, offset, _, _ = statistics
    normalised = slope * with_codes + offset * total
    k = rstd if weight is None else rstd * weight
    factor = torch.zeros(3, len(k), dtype=torch.float64)
    factor[0] = k
    if batch_statistics:
        factor[1] = -k * slope * normalised / count
        factor[2] = -k * (total + offset * normalised) / count
    factor = factor.float()
    rest = torch.stack([factor[2], 255 * factor[1] + factor[2]]).abs().amax(0)
    bound = greatest.float() * factor[0].abs() + rest + 0 * total.float()
    before = 0 * k * total if batch_statistics else k * total
    return factor, torch.stack([-bound, bound], 1), torch.stack([normalised, total, before]).float()
