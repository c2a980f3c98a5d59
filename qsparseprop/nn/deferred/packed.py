"""The packed form of an activation, as a sparse layer reads it, and what it can be made of again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from qsparseprop.layout.geometry import Geometry
from qsparseprop.nn.deferred import passes
from qsparseprop.quantization import QuantConfig


class PackedSource(NamedTuple):
    """What a packed input can be made of again: the 8-bit codes that batch normalisation keeps for its gradient.

    They hold what batch normalisation read, to half a step; the packed input made of them differs from the first one by
    as much as that.

    Attributes
    ----------
    codes : Tensor
        uint8, (pixels, channels).
    scale, shift : Tensor
        float32, (channels,): ``activation(code * scale + shift)`` is what is packed.
    ranges : Tensor
        Of `passes.pack`; they give the same scales as the first time.
    activation : Activation
    images : tuple of int
        (images, channels, height, width).
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor
    ranges: Tensor
    activation: passes.Activation
    images: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The first four attributes."""
        return self[:4]

    @property
    def rest(self) -> tuple[Any, ...]:
        """The others."""
        return self[4:]

    def pack(self, geometry: Geometry, qconfig: QuantConfig) -> tuple[Tensor, ...]:
        """Planes, scale and zero point."""
        affine = passes.Affine(self.scale, self.shift)
        return passes.pack_codes(self.codes, affine, self.activation, self.images, self.ranges, geometry, qconfig)


@dataclass
class PackedInput:
    """A tensor as a layer reads it.

    Attributes
    ----------
    planes, scale, zero_point : Tensor
        Of `ops.quantize_pack`.
    geometry : Geometry
        Of the layer that it was packed for.
    scheme, granularity : str
        How it was quantised.
    source : PackedSource, optional
        Kept for the backward pass in place of the planes.
    """

    planes: Tensor
    scale: Tensor
    zero_point: Tensor
    geometry: Geometry
    scheme: str
    granularity: str
    source: PackedSource | None = None

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Planes, scale and zero point."""
        return self.planes, self.scale, self.zero_point

    def fits(self, geometry: Geometry, qconfig: QuantConfig) -> bool:
        """Whether a layer can read it."""
        own = self.geometry
        same = own is geometry or (own.input_grid == geometry.input_grid and own.input_views == geometry.input_views)
        return (same and self.scheme == qconfig.input and self.granularity == qconfig.granularity
                and qconfig.grad_weight == "int8")  # fmt: skip


def packs_input(qconfig: QuantConfig, geometry: Geometry) -> bool:
    """Whether a layer's input can be packed while it is computed."""
    return (qconfig.input != "sawb" and qconfig.grad_weight == "int8" and geometry.in_channels > 1
            and geometry.covers_input)  # fmt: skip


def packs_gradient(qconfig: QuantConfig, channels: int) -> bool:
    """Whether the gradient of a layer's output can be packed while it is computed.

    Its scale must follow from its range.
    """
    return qconfig.grad != "dithered" and qconfig.grad_weight == "int8" and channels > 1
