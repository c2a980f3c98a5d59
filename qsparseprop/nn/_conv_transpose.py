"""What transposed convolutions share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from qsparseprop.nn._base import SparseModule
from qsparseprop.nn._conv import SparseConvNd, check_sizes
from qsparseprop.nn._dense import has_bias
from qsparseprop.quantization import QuantConfig

_Conv = TypeVar("_Conv", bound="SparseConvTransposeNd")


class SparseConvTransposeNd(SparseConvNd):
    """Base of the transposed convolutions; `SparseConvTranspose1d` and its siblings document it.

    The weight, (in_channels, out_channels / groups, ...), is that of the convolution from the output to the input, and
    so are the pattern and the plans, which the products walk the other way round.
    """

    transposed = True
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]

    def __init__(  # noqa: PLR0913 - torch's arguments
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        vectorizing_over_on: bool | None = None,
        qconfig: QuantConfig | None = None,
    ) -> None:
        SparseModule.__init__(self)
        check_sizes(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride,
                    padding=padding, output_padding=output_padding, dilation=dilation, groups=groups)  # fmt: skip
        dense = self._dense_type(in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
                                 dilation, padding_mode, "meta")
        assert isinstance(dense, _ConvNd)
        self.output_padding = dense.output_padding
        self._set_up_as(dense, vectorizing_over_on, qconfig, device, dtype)

    @classmethod
    def like(cls: type[_Conv], dense: nn.Module, qconfig: QuantConfig | None = None) -> _Conv:
        """A transposed convolution without weights, with the settings of a dense one."""
        assert isinstance(dense, _ConvTransposeNd)
        assert not isinstance(dense.padding, str)  # which only convolutions know
        layer = cls(dense.in_channels, dense.out_channels, dense.kernel_size, dense.stride, dense.padding,
                    dense.output_padding, dense.groups, has_bias(dense), dense.dilation, dense.padding_mode,
                    dense.weight.device, dense.weight.dtype, qconfig=qconfig)  # fmt: skip
        return layer.train(dense.training)

    def to_dense(self) -> nn.Module:
        """A dense transposed convolution with the same weight and bias."""
        return self._fill_dense(lambda **where: self._dense_type(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.output_padding,
            self.groups, self.bias is not None, self.dilation, **where))  # fmt: skip

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self.in_channels, self.out_channels // self.groups, *self.kernel_size

    @property
    def _outputs(self) -> int:
        return self.out_channels

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply the layer.

        Parameters
        ----------
        input : Tensor
            (images, in_channels, height, width), in one dimension (images, in_channels, length), in three (images,
            in_channels, depth, height, width), or without images; floating point, any strides.
        output_size : sequence of int, optional
            Size of the output, with or without images and channels, in place of what `output_padding` makes it.

        Returns
        -------
        Tensor
            The same with out_channels and the output's size, of input's dtype, or autocast's where it is on (and input
            not float64, as in torch); channels_last where input is.

        Raises
        ------
        TypeError, ValueError
            For another number of dimensions or channels, an integer or complex dtype, another device, an output of
            no size, one that `output_size` cannot be, or an `output_padding` that is not smaller than stride or
            dilation.
        """
        images = self._images(input)
        size = tuple(images.shape[2:])
        least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in
                 zip(size, self.stride, self.padding, self.dilation, self.kernel_size, strict=True)]  # fmt: skip
        extra = self.output_padding if output_size is None else self._extra(input, list(output_size), least)
        for e, s, d in zip(extra, self.stride, self.dilation, strict=True):
            if not 0 <= e < max(s, d):
                raise ValueError(f"output_padding must be smaller than stride or dilation, got {tuple(extra)} with "
                                 f"stride={self.stride} and dilation={self.dilation}")
        out_size = tuple(n + e for n, e in zip(least, extra, strict=True))
        if min(out_size) < 1 or min(size) < 1:
            raise ValueError(f"the output would have size {out_size} for an input of size {size}")
        # as the convolution that is transposed, what the output has more lies beyond its padding
        pads = tuple(n for p, e in zip(self.padding, extra, strict=True) for n in (p, p - e))
        incoming, outgoing, flat_size, kernel, stride, pads, dilation = self._layout(out_size, pads)
        return self._convolve(input, images, (outgoing, incoming, flat_size, kernel, stride, pads, dilation), out_size)

    def _extra(self, x: Tensor, wanted: list[int], least: list[int]) -> tuple[int, ...]:
        """What an output of the wanted size has more than the smallest one."""
        dims = len(self._axes)
        if len(wanted) == x.ndim:
            wanted = wanted[-dims:]
        if len(wanted) != dims:
            raise ValueError(f"output_size must have {dims} or {x.ndim} elements, got {len(wanted)}")
        most = [n + s - 1 for n, s in zip(least, self.stride, strict=True)]
        if any(not n <= w <= m for n, w, m in zip(least, wanted, most, strict=True)):
            raise ValueError(f"output_size must lie between {least} and {most} for an input of shape {tuple(x.shape)}, "
                             f"got {wanted}")
        return tuple(w - n for w, n in zip(wanted, least, strict=True))

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        text, bias = super().extra_repr().split(", bias=")
        if any(self.output_padding):
            text += f", output_padding={self.output_padding}"
        return f"{text}, bias={bias}"
