"""What blocks compute: the kernels behind an affine map, an addition and an activation, and behind their gradients.

Everything here takes and gives plain matrices (rows, channels) and knows nothing of autograd. Buffers that a node of
autograd has saved already are filled, not returned.
"""

from __future__ import annotations

from torch import Tensor

from qsparseprop import ops
from qsparseprop.layout.geometry import Geometry
from qsparseprop.nn._passes import common_range
from qsparseprop.ops import Activation, Affine, Kept, Packed
from qsparseprop.quantization import QuantConfig

IDENTITY = Activation("identity")
NO_AFFINE = Affine()
NOTHING_KEPT = Kept()


def saved_like(rows: Tensor, activation: Activation) -> Tensor | None:
    """A buffer for what the activation's gradient needs, not filled."""
    return ops.saved_like(rows, activation.name)


def apply(
    rows: Tensor,
    residual: Tensor | None,
    affine: Affine,
    activation: Activation,
    kept: Kept = NOTHING_KEPT,
) -> Tensor:
    """``activation(affine(rows) + residual)``, see `ops.epilogue`; what is kept is filled."""
    return ops.epilogue(rows, residual, *affine, *activation, *kept)


def output_range(rows: Tensor, affine: Affine, activation: Activation, ends: Tensor | None) -> Tensor:
    """Bounds of every channel of the result, (channels, 2); `ends` are those before the activation, if known."""
    if ends is None:
        return ops.epilogue_range(rows, None, *affine, *activation)
    return ops.activation_range(ends, *activation)


def pack(
    rows: Tensor, affine: Affine, activation: Activation, kept: Kept, ranges: Tensor, geometry: Geometry,
    qconfig: QuantConfig, keep: bool
) -> tuple[Tensor | None, Packed]:  # fmt: skip
    """`apply`, quantised and packed on the way: the result if it is wanted, and its packed form.

    `ranges` (channels, 2) are the least and the greatest element of each channel.
    """
    scheme = qconfig.input_scheme
    return ops.epilogue_pack(rows, None, affine, activation, kept, common_range(ranges, scheme), geometry.input_layout,
                             scheme, keep)  # fmt: skip


def sums(dy: Tensor, codes: Tensor | None, saved: Tensor | None, activation: Activation) -> Tensor:
    """Of each channel the sums of g and g * code and the greatest magnitude of g, see `ops.epilogue_sums`."""
    return ops.epilogue_sums(dy, codes, saved, *activation)


def gradient(
    dy: Tensor, codes: Tensor | None, saved: Tensor | None, activation: Activation, factor: Tensor | None
) -> Tensor:
    """See `ops.epilogue_grad`."""
    return ops.epilogue_grad(dy, codes, saved, *activation, factor, False)[0]


def gradient_pack(
    dy: Tensor, codes: Tensor | None, saved: Tensor | None, activation: Activation, factor: Tensor | None,
    ranges: Tensor, geometry: Geometry, qconfig: QuantConfig, want_g: bool
) -> tuple[Packed, Tensor | None]:  # fmt: skip
    """`gradient`, packed; and g where it is wanted.

    `ranges` (channels, 2) are bounds of its elements, of the same magnitude below and above.
    """
    scheme = qconfig.grad_scheme
    seed = ops.draw_seed() if scheme.random else None
    return ops.epilogue_grad_pack(dy, codes, saved, activation, factor, common_range(ranges, scheme),
                                  geometry.output_layout, scheme, seed, want_g)  # fmt: skip
