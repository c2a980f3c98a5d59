"""Two-dimensional convolutions whose weight is sparse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsparseprop.geometry import conv_geometry, prefer_batch_innermost
from qsparseprop.nn._base import SparseModule, dense_bias, trains_weight
from qsparseprop.quantization import QuantConfig


class SparseConv2d(SparseModule):
    """2-D convolution with a sparse weight, in float32.

    Any kernel size, stride, padding (zeros), dilation and groups. Made by `from_dense`.

    Attributes
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        As in torch.nn.Conv2d.
    vectorizing_over_on : bool or None
        Order of the lanes, see `from_dense`.
    weight, bias, crow_indices, col_indices
        See `SparseModule`.
    """

    _dense_type = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        vectorizing_over_on: bool | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.groups, self.padding_mode = groups, "zeros"
        self.vectorizing_over_on = vectorizing_over_on
        if padding == "same":  # as torch: an odd zero goes below and to the right
            total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
            self._pads = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
        else:
            y, x = (0, 0) if padding == "valid" else padding
            self._pads = (y, y, x, x)

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, vectorizing_over_on: bool | None = None, *, qconfig: QuantConfig | None = None
    ) -> SparseConv2d:
        """Take over the nonzeros of a dense convolution.

        Parameters
        ----------
        conv : torch.nn.Conv2d
            With zeros in its weight, or pruned by torch.nn.utils.prune (mask attached or removed). It is not changed.
        vectorizing_over_on : bool, optional
            A hint for the order of the lanes; results do not depend on it. True: neighbouring lanes are images of the
            batch, which wastes none on small feature maps with batches of 16 and more. False: they are pixels of
            a row. None: the module decides by the size of its input.
        qconfig : QuantConfig, optional
            For quantised layers.

        Raises
        ------
        TypeError
            For another kind of module, or an integer weight.
        ValueError
            If the weight has NaN or Inf, or is not on the CPU.
        NotImplementedError
            For another padding mode than zeros.
        """
        weight, mask = cls._check_dense(conv)
        if conv.padding_mode != "zeros":
            raise NotImplementedError(f"{cls.__name__} pads with zeros; padding_mode={conv.padding_mode!r} is not "
                                      "supported (pad with torch.nn.functional.pad first)")
        layer = cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                    conv.groups, vectorizing_over_on)
        layer._configure(qconfig)
        layer._set_weight(weight, mask, dense_bias(conv), trains_weight(conv))
        return layer.train(conv.training)

    def to_dense(self) -> nn.Conv2d:
        """A dense convolution with the same weight and bias."""
        # on "meta": a dense layer that initialises itself would draw random numbers
        conv = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
                         self.dilation, self.groups, self.bias is not None, device="meta", dtype=self.weight.dtype)
        conv.to_empty(device="cpu")
        with torch.no_grad():
            conv.weight.copy_(self.dense_weight())
            conv.weight.requires_grad_(self.weight.requires_grad)
            if self.bias is not None:
                conv.bias.copy_(self.bias)
                conv.bias.requires_grad_(self.bias.requires_grad)
        return conv.train(self.training)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the dense weight."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Parameters
        ----------
        x : Tensor
            (images, in_channels, height, width) or (in_channels, height, width), floating point, any strides.

        Returns
        -------
        Tensor
            (images, out_channels, out_height, out_width) or without images, of x's dtype, or autocast's where it is
            on; channels_last where x is.

        Raises
        ------
        TypeError, ValueError
            For another number of dimensions or channels, an integer or complex dtype, another device, or an image
            smaller than the kernel.
        """
        self._check_input(x)
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(f"{type(self).__name__} expects (images, {self.in_channels}, height, width) or "
                             f"({self.in_channels}, height, width), got shape {tuple(x.shape)}")
        images = x if x.ndim == 4 else x[None]
        batch, size = images.shape[0], tuple(images.shape[2:])
        batch_innermost = self.vectorizing_over_on
        if batch_innermost is None:
            batch_innermost = prefer_batch_innermost(batch, size, images.stride(1) == 1)
        geometry = conv_geometry(
            self.in_channels, self.out_channels, size, self.kernel_size, self.stride, self._pads, self.dilation, batch,
            batch_innermost,
        )  # fmt: skip
        y = self._multiply(images, self._plan(geometry, self.groups))
        return y if x.ndim == 4 else y[0]

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        if self._pads != (0, 0, 0, 0):
            parts.append(f"padding={self.padding!r}")
        if self.dilation != (1, 1):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        return ", ".join([*parts, f"bias={self.bias is not None}", f"sparsity={self.sparsity:.4f}"])


class QuantizedSparseConv2d(SparseConv2d):
    """2-D convolution with a sparse weight, in 8-bit integers forward and backward.

    The float32 weight is requantised at every step that trains it; see `QuantConfig` for the schemes. Made by
    `from_dense`.
    """

    quantized = True
