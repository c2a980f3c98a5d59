"""The packed form of an activation, as a sparse layer reads it, and what it can be made of again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from qsparseprop.layout.geometry import Geometry
from qsparseprop.nn.deferred import passes
from qsparseprop.ops import Packed, Scheme
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
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor
    ranges: Tensor
    activation: passes.Activation

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All but the last attribute."""
        return self[:4]

    def pack(self, geometry: Geometry, qconfig: QuantConfig) -> Packed:
        """The packed form of what the codes stand for."""
        affine = passes.Affine(self.scale, self.shift)
        return passes.pack(self.codes, affine, self.activation, passes.NOTHING_KEPT, self.ranges, geometry, qconfig,
                           False)[1]  # fmt: skip


@dataclass
class PackedInput:
    """A tensor as a layer reads it.

    Attributes
    ----------
    parts : Packed
        Of `ops.quantize_pack`.
    geometry : Geometry
        Of the layer that it was packed for.
    scheme : Scheme
        How it was quantised.
    source : PackedSource, optional
        Kept for the backward pass in place of the planes.
    """

    parts: Packed
    geometry: Geometry
    scheme: Scheme
    source: PackedSource | None = None

    def fits(self, geometry: Geometry, qconfig: QuantConfig) -> bool:
        """Whether a layer can read it."""
        same = self.geometry is geometry or self.geometry.input_layout == geometry.input_layout
        return same and self.scheme == qconfig.input_scheme and qconfig.grad_weight == "int8"


def packs_input(qconfig: QuantConfig, geometry: Geometry) -> bool:
    """Whether a layer's input can be packed while it is computed."""
    return (qconfig.input != "sawb" and qconfig.grad_weight == "int8" and geometry.in_channels > 1
            and geometry.covers_input)  # fmt: skip


def packs_gradient(qconfig: QuantConfig, channels: int) -> bool:
    """Whether the gradient of a layer's output can be packed while it is computed.

    Its scale must follow from its range.
    """
    return qconfig.grad != "dithered" and qconfig.grad_weight == "int8" and channels > 1
