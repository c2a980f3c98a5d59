"""Dense layers that simulate the quantised sparse ones: to try a scheme out, or to check a layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsparseprop.contents import check_memory_of
from qsparseprop.nn._dense import dense_bias, dense_weight, held, trains_weight
from qsparseprop.nn.autograd.fake_product import DenseProduct, FakeProduct
from qsparseprop.quantization import QuantConfig

__all__ = ["FakeQuantConv2d", "FakeQuantLinear"]

class _FakeQuant(nn.Module):
    """What both layers share; `weight` is dense, `mask` says which entries exist."""

    weight: Tensor
    mask: Tensor
    qconfig: QuantConfig

    def _take_over(self, dense: nn.Module, qconfig: QuantConfig | None) -> None:
        if qconfig is not None and not isinstance(qconfig, QuantConfig):
            raise TypeError(f"qconfig must be a QuantConfig, got {type(qconfig).__name__}")
        check_memory_of(dense)
        weight, mask = dense_weight(dense)
        bias = dense_bias(dense)
        self.weight = nn.Parameter(weight.clone(), trains_weight(dense))
        if bias is not None:
            self.register_parameter("bias", nn.Parameter(bias[0].clone(), bias[1]))
        self.register_buffer("mask", mask.clone())
        self.qconfig = QuantConfig() if qconfig is None else qconfig
        self.train(dense.training)

    def _simulate(self, x: Tensor, product: DenseProduct, layout: tuple[Tensor, ...]) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        with torch.autocast("cpu", enabled=False):
            weight = self.weight.to(torch.float32) * self.mask
            y = FakeProduct.apply(x.to(torch.float32), weight, self.mask, product, layout, self.qconfig)
            bias: Tensor | None = held(self, "bias")
            if bias is not None:
                y = y + bias.to(torch.float32).view(-1, *[1] * (y.ndim - 2))
        return y.to(dtype)


class FakeQuantLinear(_FakeQuant, nn.Linear):
    """Dense layer that computes what `QuantizedSparseLinear` does, in float32, with straight-through gradients.

    Outputs and gradients equal those of the real layer with the same `QuantConfig` and seed, up to float32 rounding.

    Attributes
    ----------
    weight : Parameter
        (out_features, in_features), dense; what is not in the mask has no effect and no gradient.
    mask : Tensor
        bool, of the weight's shape.
    qconfig : QuantConfig
    """

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, qconfig: QuantConfig | None = None) -> FakeQuantLinear:
        """Copy a dense layer, with zeros in its weight or pruned by torch.nn.utils.prune.

        Parameters
        ----------
        linear : torch.nn.Linear
            Not changed.
        qconfig : QuantConfig, optional

        Returns
        -------
        FakeQuantLinear
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{cls.__name__}.from_dense expects torch.nn.Linear, got {type(linear).__qualname__}")
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer._take_over(linear, qconfig)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features).

        Parameters
        ----------
        x : Tensor

        Returns
        -------
        Tensor
            Of x's dtype, or autocast's.
        """
        rows = x.reshape(-1, self.in_features)
        inputs = torch.arange(self.in_features)
        layout = (torch.arange(self.out_features)[:, None], inputs[None, :], inputs)
        return self._simulate(rows, F.linear, layout).view(*x.shape[:-1], self.out_features)


class FakeQuantConv2d(_FakeQuant, nn.Conv2d):
    """Dense convolution that computes what `QuantizedSparseConv2d` does, in float32, with straight-through gradients.

    See `FakeQuantLinear`.
    """

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, vectorizing_over_on: bool | None = None, *, qconfig: QuantConfig | None = None
    ) -> FakeQuantConv2d:
        """Copy a dense convolution; `vectorizing_over_on` is there to be as `QuantizedSparseConv2d.from_dense`.

        Parameters
        ----------
        conv : torch.nn.Conv2d
            Not changed; with zeros in its weight or pruned by torch.nn.utils.prune.
        vectorizing_over_on : bool, optional
            Without effect.
        qconfig : QuantConfig, optional

        Returns
        -------
        FakeQuantConv2d
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"{cls.__name__}.from_dense expects torch.nn.Conv2d, got {type(conv).__qualname__}")
        if conv.padding_mode != "zeros":
            raise NotImplementedError(f"{cls.__name__} pads with zeros; padding_mode={conv.padding_mode!r} is not "
                                      "supported")
        make: Callable[..., FakeQuantConv2d] = cls  # torch types sizes that it takes and sizes that it has otherwise
        layer = make(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                     conv.groups, conv.bias is not None, device="meta")  # fmt: skip
        layer._take_over(conv, qconfig)
        return layer

    def _layout(self) -> tuple[Tensor, Tensor, Tensor]:
        """Groups of weights that share a scale: rows, and input planes (channel and phase of the stride)."""
        per_group = self.in_channels // self.groups
        row = torch.arange(self.out_channels)
        first = row // (self.out_channels // self.groups) * per_group
        channel = (first[:, None] + torch.arange(per_group))[:, :, None, None]
        y, x = (torch.arange(k) * d % s for k, d, s in zip(self.kernel_size, self.dilation, self.stride, strict=True))
        phase = y[:, None] * self.stride[1] + x
        return row[:, None, None, None], channel * math.prod(self.stride) + phase, channel

    def forward(self, x: Tensor) -> Tensor:
        """(images, in_channels, height, width), or without images.

        Parameters
        ----------
        x : Tensor

        Returns
        -------
        Tensor
            (images, out_channels, out_height, out_width), or without images; of x's dtype, or autocast's.
        """
        images = x if x.ndim == 4 else x[None]

        def product(a: Tensor, b: Tensor) -> Tensor:
            return F.conv2d(a, b, None, self.stride, self.padding, self.dilation, self.groups)

        y = self._simulate(images, product, self._layout())
        return y if x.ndim == 4 else y[0]
