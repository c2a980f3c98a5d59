"""Weights in codes: quantised once, with the scales of what they multiply in them."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparseprop.inference.draft import Layer
from qsparseprop.inference.steps import Codes, Weight

__all__ = ["code_weight", "real_weight"]


def code_weight(layer: Layer, source: Codes) -> Weight:
    """The weight of a layer in codes.

    Each entry is multiplied by the scale of the channel that it is for, `w * scale`; the largest of a row, in
    magnitude, gets the code 127. Entries whose code is zero are left out.

    Parameters
    ----------
    layer : Layer
    source : Codes
        Of its input.

    Returns
    -------
    Weight
    """
    rows = layer.weight.shape[0]
    real = (layer.weight.double() * _input_scales(layer, source)).flatten(1)
    scale = (real.abs().amax(1) / 127).float()
    scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)  # a row of zeros
    codes = (real / scale.double().unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
    kept = codes != 0
    crow = torch.zeros(rows + 1, dtype=torch.int32)
    crow[1:] = kept.sum(1).cumsum(0)
    return Weight(crow, kept.nonzero()[:, 1].int().contiguous(), codes[kept], scale, real.shape[1])


def real_weight(layer: Layer, weight: Weight, source: Codes) -> Tensor:
    """What a weight in codes stands for, in the shape of the layer's: float64.

    Parameters
    ----------
    layer : Layer
    weight : Weight
        Of `code_weight`.
    source : Codes

    Returns
    -------
    Tensor
    """
    real = weight.dense().double() * weight.scale.double().unsqueeze(1)
    return real.view(layer.weight.shape) / _input_scales(layer, source)


def _input_scales(layer: Layer, source: Codes) -> Tensor:
    """The scale of what each entry multiplies, as far as the shape of the weight needs it: float64."""
    rows, inner = layer.weight.shape[:2]
    scales = source.scale.double().view(layer.groups, 1, inner).expand(layer.groups, rows // layer.groups, inner)
    return scales.reshape(rows, inner, *[1] * (layer.weight.ndim - 2))
