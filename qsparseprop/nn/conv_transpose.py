"""Transposed convolutions of one, two and three dimensions whose weight is sparse."""

from __future__ import annotations

from torch import nn

from qsparseprop.nn._conv_transpose import SparseConvTransposeNd

__all__ = [
    "QuantizedSparseConvTranspose1d",
    "QuantizedSparseConvTranspose2d",
    "QuantizedSparseConvTranspose3d",
    "SparseConvTranspose1d",
    "SparseConvTranspose2d",
    "SparseConvTranspose3d",
]


class SparseConvTranspose1d(SparseConvTransposeNd):
    """1-D transposed convolution with a sparse weight, in float32.

    Any kernel size, stride, padding, output padding, dilation and groups. Usually made by `from_dense`; the constructor
    makes a layer without weights, for `load_state_dict` and `regrow`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode, \
device, dtype
        As in torch.nn.ConvTranspose1d; the bias starts at zero.
    vectorizing_over_on : bool, optional
        Order of the lanes, see `from_dense`.
    qconfig : QuantConfig, optional
        For quantised layers.

    Attributes
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, dilation, groups, padding_mode
        As in torch.nn.ConvTranspose1d.
    weight, bias, crow_indices, col_indices
        See `SparseWeight`; a row of the pattern is a channel of the input.
    """

    _dense_type = nn.ConvTranspose1d
    _axes = ("length",)


class QuantizedSparseConvTranspose1d(SparseConvTranspose1d):
    """1-D transposed convolution with a sparse weight, in 8-bit integers forward and backward.

    The float32 weight is requantised at every step that trains it; see `QuantConfig` for the schemes.
    """

    quantized = True



class SparseConvTranspose2d(SparseConvTransposeNd):
    """2-D transposed convolution with a sparse weight, in float32.

    Any kernel size, stride, padding, output padding, dilation and groups. Usually made by `from_dense`; the constructor
    makes a layer without weights, for `load_state_dict` and `regrow`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode, \
device, dtype
        As in torch.nn.ConvTranspose2d; the bias starts at zero.
    vectorizing_over_on : bool, optional
        Order of the lanes, see `from_dense`.
    qconfig : QuantConfig, optional
        For quantised layers.

    Attributes
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, dilation, groups, padding_mode
        As in torch.nn.ConvTranspose2d.
    weight, bias, crow_indices, col_indices
        See `SparseWeight`; a row of the pattern is a channel of the input.
    """

    _dense_type = nn.ConvTranspose2d
    _axes = ("height", "width")


class QuantizedSparseConvTranspose2d(SparseConvTranspose2d):
    """2-D transposed convolution with a sparse weight, in 8-bit integers forward and backward.

    The float32 weight is requantised at every step that trains it; see `QuantConfig` for the schemes.
    """

    quantized = True



class SparseConvTranspose3d(SparseConvTransposeNd):
    """3-D transposed convolution with a sparse weight, in float32.

    Any kernel size, stride, padding, output padding, dilation and groups. Usually made by `from_dense`; the constructor
    makes a layer without weights, for `load_state_dict` and `regrow`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode, \
device, dtype
        As in torch.nn.ConvTranspose3d; the bias starts at zero.
    vectorizing_over_on : bool, optional
        Order of the lanes, see `from_dense`.
    qconfig : QuantConfig, optional
        For quantised layers.

    Attributes
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, dilation, groups, padding_mode
        As in torch.nn.ConvTranspose3d.
    weight, bias, crow_indices, col_indices
        See `SparseWeight`; a row of the pattern is a channel of the input.
    """

    _dense_type = nn.ConvTranspose3d
    _axes = ("depth", "height", "width")


class QuantizedSparseConvTranspose3d(SparseConvTranspose3d):
    """3-D transposed convolution with a sparse weight, in 8-bit integers forward and backward.

    The float32 weight is requantised at every step that trains it; see `QuantConfig` for the schemes.
    """

    quantized = True
