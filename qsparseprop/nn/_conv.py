"""What convolutions share: those of one dimension are computed in two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from qsparseprop import arguments
from qsparseprop.layout.geometry import ConvSizes, batch_magnitude, conv_geometry, prefer_batch_innermost
from qsparseprop.nn._base import SparseModule
from qsparseprop.nn._dense import dense_bias, has_bias, trains_weight
from qsparseprop.nn.deferred import ordinary
from qsparseprop.nn.deferred.layout import images as images_layout
from qsparseprop.quantization import QuantConfig

_Conv = TypeVar("_Conv", bound="SparseConvNd")


def check_sizes(**given: object) -> None:
    """Raise a TypeError or ValueError for sizes of a convolution that are none: torch takes whatever it gets."""
    for name, value in given.items():
        if name == "padding" and isinstance(value, str):
            continue
        least = 0 if "channels" in name or "padding" in name else 1
        for size in value if isinstance(value, tuple | list) else (value,):
            arguments.whole_number(size, name, least, (1 << 31) - 1)


class SparseConvNd(SparseModule):
    """Base of the convolutions; `SparseConv1d`, `SparseConv2d` and `SparseConv3d` document it.

    A one-dimensional convolution is a two-dimensional one over images of height 1; the slices of a volume are laid out
    as one image, below each other.
    """

    _axes: ClassVar[tuple[str, ...]]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    vectorizing_over_on: bool | None

    def __init__(  # noqa: PLR0913 - torch's arguments
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        vectorizing_over_on: bool | None = None,
        qconfig: QuantConfig | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride,
                    padding=padding, dilation=dilation, groups=groups)  # fmt: skip
        # torch's checks and its way to write arguments; on "meta" nothing is initialised
        dense = self._dense_type(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
                                 padding_mode, "meta")
        self._set_up_as(dense, vectorizing_over_on, qconfig, device, dtype)

    def _set_up_as(
        self,
        dense: nn.Module,
        vectorizing_over_on: bool | None,
        qconfig: QuantConfig | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Take over the settings of a dense convolution."""
        assert isinstance(dense, _ConvNd)
        if dense.padding_mode != "zeros":
            raise NotImplementedError(f"{type(self).__name__} pads with zeros; padding_mode={dense.padding_mode!r} is "
                                      "not supported (pad with torch.nn.functional.pad first)")
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels
        self.kernel_size, self.stride = dense.kernel_size, dense.stride
        self.padding, self.dilation = dense.padding, dense.dilation
        self.groups, self.padding_mode = dense.groups, dense.padding_mode
        self.vectorizing_over_on = vectorizing_over_on
        self._set_up(dense.bias is not None, qconfig, device, dtype)

    @property
    def _pads(self) -> tuple[int, ...]:
        """Zeros before and after, axis by axis."""
        padding = self.padding
        if padding == "valid":
            return (0, 0) * len(self._axes)
        if padding == "same":  # as torch: an odd zero goes below and to the right
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return tuple(n for t in total for n in (t // 2, t - t // 2))
        assert not isinstance(padding, str)  # torch knows no other word
        return tuple(n for p in padding for n in (p, p))

    @classmethod
    def from_dense(
        cls: type[_Conv],
        conv: nn.Module,
        vectorizing_over_on: bool | None = None,
        *,
        qconfig: QuantConfig | None = None,
    ) -> _Conv:
        """Take over the nonzeros of a dense convolution.

        Parameters
        ----------
        conv : torch.nn.Module
            The convolution of torch.nn of the same name, with zeros in its weight, or pruned by torch.nn.utils.prune or
            torch.ao.pruning (mask attached or removed). It is not changed.
        vectorizing_over_on : bool, optional
            A hint for the order of the lanes; results do not depend on it. False: neighbouring lanes are images of the
            batch, which wastes none on small feature maps with batches of 16 and more. True: they are pixels of
            a row, along the width of the output (ON in SparseProp). None: the module decides by the size of its input.
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
        layer = cls.like(conv, qconfig)._fill(weight, mask, dense_bias(conv), trains_weight(conv))
        layer.vectorizing_over_on = vectorizing_over_on
        return layer

    @classmethod
    def like(cls: type[_Conv], dense: nn.Module, qconfig: QuantConfig | None = None) -> _Conv:
        """A convolution without weights, with the settings of a dense one."""
        assert isinstance(dense, _ConvNd)
        layer = cls(dense.in_channels, dense.out_channels, dense.kernel_size, dense.stride, dense.padding,
                    dense.dilation, dense.groups, has_bias(dense), dense.padding_mode, dense.weight.device,
                    dense.weight.dtype, qconfig=qconfig)  # fmt: skip
        return layer.train(dense.training)

    def to_dense(self) -> nn.Module:
        """A dense convolution with the same weight and bias."""
        return self._fill_dense(lambda **where: self._dense_type(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, **where))  # fmt: skip

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Parameters
        ----------
        input : Tensor
            (images, in_channels, height, width), in one dimension (images, in_channels, length), in three (images,
            in_channels, depth, height, width), or without images; floating point, any strides.

        Returns
        -------
        Tensor
            The same with out_channels and the output's size, of input's dtype, or autocast's where it is on (and input
            not float64, as in torch); channels_last where input is.

        Raises
        ------
        TypeError, ValueError
            For another number of dimensions or channels, an integer or complex dtype, another device, or an image
            smaller than the kernel.
        """
        if self._defers(input) and (y := self._deferred(input)) is not None:
            return y
        images = self._images(input)
        size = tuple(images.shape[2:])
        return self._convolve(input, images, self._layout(size, self._pads), self._output_size(size))

    def _deferred(self, x: Tensor) -> Tensor | None:
        """The deferred result, or None where there can be none."""
        with torch._C.DisableTorchFunctionSubclass():
            shape, dims = tuple(x.shape), len(self._axes)
            if dims > 2 or len(shape) != dims + 2 or shape[1] != self.in_channels:
                return None
            batch, _, *size = shape
            flat = (1,) * (2 - dims)
            batch_innermost = self._batch_innermost(batch, tuple(size), True)
            geometry = conv_geometry(*self._layout(tuple(size), self._pads), batch, batch_innermost)
            out = (batch, self.out_channels, *geometry.output_size[2 - dims:])
            return self._defer(x, (batch, self.in_channels, *flat, *size),
                               lambda channels_last: images_layout(out, not channels_last), geometry, self.groups)

    def _images(self, x: Tensor) -> Tensor:
        """The input, checked, with a dimension of images."""
        x = ordinary(x)
        self._check_input(x)
        dims = len(self._axes)
        if x.ndim not in (dims + 1, dims + 2) or x.shape[-dims - 1] != self.in_channels:
            axes = ", ".join(self._axes)
            raise ValueError(f"{type(self).__name__} expects (images, {self.in_channels}, {axes}) or "
                             f"({self.in_channels}, {axes}), got shape {tuple(x.shape)}")
        return x if x.ndim == dims + 2 else x[None]

    def _output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Size of the output for one of the input."""
        pads = self._pads
        return tuple((n + p + q - d * (k - 1) - 1) // s + 1 for n, p, q, d, k, s in
                     zip(size, pads[::2], pads[1::2], self.dilation, self.kernel_size, self.stride, strict=True))

    def _layout(self, size: tuple[int, ...], pads: tuple[int, ...]) -> ConvSizes:
        """The arguments of `conv_geometry` for a size of the input, without those of the batch."""
        flat = (1,) * (2 - len(self._axes))
        return (self.in_channels, self.out_channels, flat + size, flat + self.kernel_size, flat + self.stride,
                (0, 0) * len(flat) + pads, flat + self.dilation)  # fmt: skip

    def _batch_innermost(self, batch: int, size: tuple[int, ...], channels_last: bool) -> bool:
        """Whether neighbouring lanes are images of the batch."""
        if self.vectorizing_over_on is None:
            return prefer_batch_innermost(batch, size, channels_last)
        return not self.vectorizing_over_on  # ON: the width of the output

    def _convolve(
        self, x: Tensor, images: Tensor, layout: ConvSizes, out_size: tuple[int, ...]
    ) -> Tensor:
        dims = len(self._axes)
        batch = images.shape[0]
        batch_innermost = self._batch_innermost(batch, tuple(images.shape[2:]), images.stride(1) == 1)
        if dims == 1:
            images = images.unsqueeze(2)
        elif dims == 3:
            images = images.flatten(2, 3)  # a view where slices lie one after the other, otherwise a copy
        if torch.compiler.is_compiling():
            numbers = [n for part in layout for n in (part if isinstance(part, tuple) else (part,))]
            numbers += [batch_magnitude(batch), int(batch_innermost), *[1] * self.transposed]
            y = self._trace(images, numbers, self.groups)
            if dims == 1:
                y = y.squeeze(2)
            elif dims == 3:
                y = y.unflatten(2, out_size[:2])
        else:
            geometry = conv_geometry(*layout, batch, batch_innermost, self.transposed)
            shape = None if dims == 2 else (batch, self.out_channels, *out_size)
            y = self._product(images, geometry, self.groups, shape)
        return y if x.ndim == dims + 2 else y[0]

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        if any(self._pads):
            parts.append(f"padding={self.padding!r}")
        if any(n != 1 for n in self.dilation):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        return ", ".join([*parts, f"bias={self.bias is not None}", f"sparsity={self.sparsity:.4f}"])
