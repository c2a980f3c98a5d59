"""Two-dimensional convolutions whose weight is sparse."""

from __future__ import annotations

from torch import nn

from qsparseprop.nn._conv import SparseConvNd
from qsparseprop.nn._docstrings import describes_convolution, describes_quantised

__all__ = ["QuantizedSparseConv2d", "SparseConv2d"]


@describes_convolution
class SparseConv2d(SparseConvNd):
    """2-D convolution with a sparse weight, in float32."""

    _dense_type = nn.Conv2d
    _axes = ("height", "width")


@describes_quantised
class QuantizedSparseConv2d(SparseConv2d):
    """2-D convolution with a sparse weight, in 8-bit integers forward and backward."""

    quantized = True
    can_defer = True
