"""Three-dimensional convolutions whose weight is sparse."""

from __future__ import annotations

from torch import nn

from qsparseprop.nn._conv import SparseConvNd
from qsparseprop.nn._docstrings import describes_convolution, describes_quantised

__all__ = ["QuantizedSparseConv3d", "SparseConv3d"]


@describes_convolution
class SparseConv3d(SparseConvNd):
    """3-D convolution with a sparse weight, in float32."""

    _dense_type = nn.Conv3d
    _axes = ("depth", "height", "width")


@describes_quantised
class QuantizedSparseConv3d(SparseConv3d):
    """3-D convolution with a sparse weight, in 8-bit integers forward and backward."""

    quantized = True
