"""Two-dimensional convolutions whose weight is sparse."""

from __future__ import annotations

from torch import nn

from qsparseprop.nn._conv import SparseConvNd

__all__ = ["QuantizedSparseConv2d", "SparseConv2d"]


class SparseConv2d(SparseConvNd):
    """2-D convolution with a sparse weight, in float32.

    Any kernel size, stride, padding (zeros), dilation and groups. Usually made by `from_dense`; the constructor makes
    a layer without weights, for `load_state_dict` and `regrow`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        As in torch.nn.Conv2d; the bias starts at zero.
    vectorizing_over_on : bool, optional
        Order of the lanes, see `from_dense`.
    qconfig : QuantConfig, optional
        For quantised layers.

    Attributes
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        As in torch.nn.Conv2d.
    weight, bias, crow_indices, col_indices
        See `SparseWeight`.
    """

    _dense_type = nn.Conv2d
    _axes = ("height", "width")


class QuantizedSparseConv2d(SparseConv2d):
    """2-D convolution with a sparse weight, in 8-bit integers forward and backward.

    The float32 weight is requantised at every step that trains it; see `QuantConfig` for the schemes.
    """

    quantized = True
    can_defer = True
