"""One-dimensional convolutions whose weight is sparse."""

from __future__ import annotations

from torch import nn

from qsparseprop.nn._conv import SparseConvNd
from qsparseprop.nn._docstrings import describes_convolution, describes_quantised

__all__ = ["QuantizedSparseConv1d", "SparseConv1d"]


@describes_convolution
class SparseConv1d(SparseConvNd):
    """1-D convolution with a sparse weight, in float32."""

    _dense_type = nn.Conv1d
    _axes = ("length",)


@describes_quantised
class QuantizedSparseConv1d(SparseConv1d):
    """1-D convolution with a sparse weight, in 8-bit integers forward and backward."""

    quantized = True
    can_defer = True
