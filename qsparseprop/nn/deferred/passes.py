"""What blocks compute: the kernels behind an affine map, an addition and an activation, and behind their gradients.

Everything here takes and gives plain matrices (rows, channels) and knows nothing of autograd. Buffers that a node of
autograd has saved already are filled, not returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from qsparseprop import ops
from qsparseprop.layout.geometry import Geometry
from qsparseprop.nn.functional import gradient_packing, output_packing
from qsparseprop.ops import shortcut
from qsparseprop.quantization import QuantConfig


class Activation(NamedTuple):
    """An activation as the kernels know it, see `qsparseprop.ops.epilogues`."""

    name: str
    options: tuple[float, ...] = ()


IDENTITY = Activation("identity")


class Affine(NamedTuple):
    """``x * scale + shift`` for each channel, float32, (channels,)."""

    scale: Tensor | None = None
    shift: Tensor | None = None


NO_AFFINE = Affine()


def saved_like(rows: Tensor, activation: Activation) -> Tensor | None:
    """A buffer for what the activation's gradient needs, not filled."""
    return ops.saved_like(rows, activation.name)


def statistics(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, momentum: float, eps: float, training: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of a batch normalisation, see `ops.norm_statistics`; running statistics are updated."""
    return shortcut("norm_statistics", rows, weight, bias, running_mean, running_var)(
        rows, weight, bias, running_mean, running_var, momentum, eps, training, save
    )


def factors(
    sums: Tensor, statistics: Tensor, weight: Tensor | None, count: int, batch_statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of its gradient, see `ops.norm_factors`."""
    return shortcut("norm_factors", sums, statistics, weight)(sums, statistics, weight, count, batch_statistics)


def apply(
    rows: Tensor,
    residual: Tensor | None,
    affine: Affine,
    activation: Activation,
    coding: Affine = NO_AFFINE,
    codes: Tensor | None = None,
    saved: Tensor | None = None,
) -> Tensor:
    """``activation(affine(rows) + residual)``, see `ops.epilogue`.

    `codes`, which take the rows in 8 bits by `coding`, and `saved` are filled where they are given.
    """
    return shortcut("epilogue", rows, residual)(rows, residual, *affine, *activation, *coding, codes, saved)


def output_range(rows: Tensor, affine: Affine, activation: Activation, ends: Tensor | None) -> Tensor:
    """Bounds of every channel of the result, (channels, 2); `ends` are those before the activation, if known."""
    if ends is None:
        return shortcut("epilogue_range")(rows, None, *affine, *activation)
    return shortcut("activation_range")(ends, *activation)


def pack(
    rows: Tensor,
    affine: Affine,
    activation: Activation,
    coding: Affine,
    codes: Tensor | None,
    saved: Tensor | None,
    images: Sequence[int],
    ranges: Tensor,
    geometry: Geometry,
    qconfig: QuantConfig,
    keep: bool,
) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor]]:
    """`apply`, quantised and packed on the way: the result if it is wanted, and planes, scale, zero point."""
    packing = output_packing(ranges, images[0], geometry, qconfig)
    out, *packed = shortcut("epilogue_pack", rows)(rows, None, *affine, *activation, *coding, codes, saved, images,
                                                   *packing, keep)  # fmt: skip
    return out if keep else None, tuple(packed)


def pack_codes(
    codes: Tensor, affine: Affine, activation: Activation, images: Sequence[int], ranges: Tensor, geometry: Geometry,
    qconfig: QuantConfig
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The packed form of what codes stand for."""
    return pack(codes, affine, activation, NO_AFFINE, None, None, images, ranges, geometry, qconfig, False)[1]


def sums(dy: Tensor, codes: Tensor | None, saved: Tensor | None, activation: Activation) -> Tensor:
    """Of each channel the sums of g and g * code and the greatest magnitude of g, see `ops.epilogue_sums`."""
    return shortcut("epilogue_sums", dy, codes, saved)(dy, codes, saved, *activation)


def gradient(
    dy: Tensor, codes: Tensor | None, saved: Tensor | None, activation: Activation, factor: Tensor | None
) -> Tensor:
    """See `ops.epilogue_grad`."""
    return shortcut("epilogue_grad", dy, codes, saved)(dy, codes, saved, *activation, factor, False)[0]


def gradient_pack(
    dy: Tensor,
    codes: Tensor | None,
    saved: Tensor | None,
    activation: Activation,
    factor: Tensor | None,
    want_g: bool,
    images: Sequence[int],
    ranges: Tensor,
    geometry: Geometry,
    qconfig: QuantConfig,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """`gradient`, packed: planes, scale and zero point; and g where it is wanted.

    `ranges` (channels, 2) are bounds of its elements, of the same magnitude below and above.
    """
    packing = gradient_packing(ranges, images[0], geometry, qconfig)
    *packed, g = shortcut("epilogue_grad_pack", dy, codes, saved)(dy, codes, saved, *activation, factor, want_g, images,
                                                                  *packing)
    return tuple(packed), g if want_g else None
