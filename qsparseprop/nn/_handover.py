"""Activations that are handed from one block to the next as the packed input of the latter.

A block knows its range before it has computed its output, so that it can quantise and pack on the way what the next
block would otherwise read again twice. The packed form travels on the tensor that the block returns; everybody else
sees an ordinary tensor. Where only the next block reads the output, the tensor is a `PackedTensor`, which has no other
memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from qsparseprop import norm_ops
from qsparseprop.geometry import Geometry
from qsparseprop.pattern import tensor_version
from qsparseprop.quantization import QuantConfig


@dataclass
class PackedSource:
    """What a packed input can be made of again: the 8-bit codes that batch normalisation keeps for its gradient.

    They hold what batch normalisation read, to half a step; the packed input made of them differs from the first one by
    as much as that.

    Attributes
    ----------
    codes : Tensor
        uint8, (pixels, channels).
    scale, shift : Tensor
        float32, (channels,): ``clamp(code * scale + shift, low, high)`` is what is packed.
    ranges : Tensor
        Of `norm_ops.norm_act_pack`; they give the same scales as the first time.
    low, high : float
    shape : tuple of int
        (images, channels, height, width).
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor
    ranges: Tensor
    low: float
    high: float
    shape: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The first four attributes."""
        return self.codes, self.scale, self.shift, self.ranges

    @property
    def limits(self) -> tuple[Any, ...]:
        """The others."""
        return self.low, self.high, self.shape

    def pack(self, geometry: Geometry, qconfig: QuantConfig) -> tuple[Tensor, ...]:
        """Planes, scale and zero point."""
        grid = geometry.input_grid
        return norm_ops.norm_act_pack(
            self.codes, None, self.scale, self.shift, self.low, self.high, None, None, self.shape, self.ranges,
            grid.numbers, geometry.input_views, grid.lanes(self.shape[0]), qconfig.input,
            qconfig.granularity == "channel", False,
        )[3:]  # fmt: skip


@dataclass
class PackedInput:
    """A tensor as a convolution reads it.

    Attributes
    ----------
    planes, scale, zero_point : Tensor
        Of `ops.quantize_pack`.
    geometry : Geometry
        Of the convolution that it was packed for.
    scheme, granularity : str
        How it was quantised.
    source : PackedSource, optional
        Kept for the backward pass in place of the planes.
    version : int
        Of the tensor that it stands for.
    """

    planes: Tensor
    scale: Tensor
    zero_point: Tensor
    geometry: Geometry
    scheme: str
    granularity: str
    source: PackedSource | None = None
    version: int = 0

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Planes, scale and zero point."""
        return self.planes, self.scale, self.zero_point

    def fits(self, geometry: Geometry, qconfig: QuantConfig) -> bool:
        """Whether a convolution can read it."""
        own = self.geometry
        same = own is geometry or (own.input_grid == geometry.input_grid and own.input_views == geometry.input_views)
        return (same and self.scheme == qconfig.input and self.granularity == qconfig.granularity
                and qconfig.grad_weight == "int8")  # fmt: skip


def hand_over(tensor: Tensor, packed: PackedInput) -> None:
    """Attach its packed form to a tensor, if it can be told whether that changes afterwards."""
    if tensor.is_inference() and not isinstance(tensor, PackedTensor):
        return
    packed.version = tensor_version(tensor)
    tensor._packed_input = packed


def handed_over(tensor: Tensor) -> PackedInput | None:
    """The packed form of a tensor, unless it has changed since."""
    packed = getattr(tensor, "_packed_input", None)
    return packed if packed is not None and packed.version == tensor_version(tensor) else None


def unpack(packed: PackedInput, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The values that the codes stand for, channels_last."""
    views, grid = packed.geometry.input_views, packed.geometry.input_grid
    images, channels = shape[:2]
    out = torch.empty(tuple(shape), dtype=dtype, memory_format=torch.channels_last)
    scale, zero = (t.expand(grid.planes).view(-1, 1, 1) for t in (packed.scale, packed.zero_point))
    for i in range(0, len(views), 9):
        plane, _, origin, rows, cols, y0, x0, ystep, xstep = views[i : i + 9]
        if not rows or not cols:
            continue
        codes = packed.planes.as_strided(
            (-(-images // grid.images), grid.images, channels, rows, cols),
            (grid.block, grid.lane_b, grid.pitch, grid.lane_y, grid.lane_x), plane * grid.pitch + grid.front + origin,
        ).reshape(-1, channels, rows, cols)[:images]  # fmt: skip
        own = slice(plane, plane + channels)
        values = (codes.to(torch.int32) - zero[own]) * scale[own]
        out[:, :, y0 : y0 + (rows - 1) * ystep + 1 : ystep, x0 : x0 + (cols - 1) * xstep + 1 : xstep] = values
    return out


class PackedTensor(Tensor):
    """A tensor of which only the packed form exists, until somebody other than the next block wants its values.

    Every operation but reading what was handed over works on an ordinary tensor, made at the first of them; one that
    changes it in place ends the packed form.
    """

    _values: Tensor | None
    _own: PackedInput
    _images: Sequence[int]
    _channels_last: bool

    @staticmethod
    def __new__(
        cls, packed: PackedInput, images: Sequence[int], dtype: torch.dtype, shape: Sequence[int] | None = None
    ) -> PackedTensor:
        """A channels_last tensor of the shape of the packed images, or a contiguous one of another shape.

        The latter has the pixels in the order in which they follow each other in channels_last images.
        """
        _, c, h, w = images
        strides: Sequence[int] = (c * h * w, 1, w * c, c)
        if shape is not None:
            strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        tensor = Tensor._make_wrapper_subclass(cls, tuple(images if shape is None else shape), strides=strides,
                                               dtype=dtype)  # fmt: skip
        tensor._values, tensor._own, tensor._images, tensor._channels_last = None, packed, images, shape is None
        return tensor

    def values(self) -> Tensor:
        """An ordinary tensor."""
        if self._values is None:
            values = unpack(self._own, self._images, self.dtype)
            self._values = values if self._channels_last else values.permute(0, 2, 3, 1).reshape(self.shape)
        return self._values

    def __repr__(self, **_: Any) -> str:
        """What an ordinary tensor prints."""
        return repr(self.detach())

    def __reduce_ex__(self, protocol: int) -> Any:
        """Saved as an ordinary tensor."""
        return self.detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def tolist(self) -> Any:
        """As of an ordinary tensor; torch refuses it for subclasses."""
        return self.detach().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """As of an ordinary tensor; torch refuses it for subclasses."""
        return (self.detach() if force or not self.requires_grad else self * 1).numpy(force=force)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on the values."""
        packed = []

        def values(tensor: PackedTensor) -> Tensor:
            packed.append(tensor)
            if tensor.is_inference():  # there is no version counter that would tell of changes by a view
                tensor._packed_input = None
            return tensor.values()

        args, kwargs = tree_map_only(PackedTensor, values, (args, kwargs or {}))
        result = func(*args, **kwargs)
        for tensor in packed:
            if result is tensor._values:  # in place: the result is the tensor that was given
                tensor._packed_input = None
                return tensor
        return result
