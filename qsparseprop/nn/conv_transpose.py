"""Transposed convolutions of one, two and three dimensions whose weight is sparse."""

from __future__ import annotations

from torch import nn

from qsparseprop.nn._conv_transpose import SparseConvTransposeNd
from qsparseprop.nn._docstrings import describes_convolution, describes_quantised

__all__ = [
    "QuantizedSparseConvTranspose1d",
    "QuantizedSparseConvTranspose2d",
    "QuantizedSparseConvTranspose3d",
    "SparseConvTranspose1d",
    "SparseConvTranspose2d",
    "SparseConvTranspose3d",
]


@describes_convolution
class SparseConvTranspose1d(SparseConvTransposeNd):
    """1-D transposed convolution with a sparse weight, in float32."""

    _dense_type = nn.ConvTranspose1d
    _axes = ("length",)


@describes_quantised
class QuantizedSparseConvTranspose1d(SparseConvTranspose1d):
    """1-D transposed convolution with a sparse weight, in 8-bit integers forward and backward."""

    quantized = True


@describes_convolution
class SparseConvTranspose2d(SparseConvTransposeNd):
    """2-D transposed convolution with a sparse weight, in float32."""

    _dense_type = nn.ConvTranspose2d
    _axes = ("height", "width")


@describes_quantised
class QuantizedSparseConvTranspose2d(SparseConvTranspose2d):
    """2-D transposed convolution with a sparse weight, in 8-bit integers forward and backward."""

    quantized = True


@describes_convolution
class SparseConvTranspose3d(SparseConvTransposeNd):
    """3-D transposed convolution with a sparse weight, in float32."""

    _dense_type = nn.ConvTranspose3d
    _axes = ("depth", "height", "width")


@describes_quantised
class QuantizedSparseConvTranspose3d(SparseConvTranspose3d):
    """3-D transposed convolution with a sparse weight, in 8-bit integers forward and backward."""

    quantized = True
