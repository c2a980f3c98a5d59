"""Which quantisation a layer uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantConfig:
    """How a quantised layer turns weights, inputs and output gradients into 8-bit integers.

    Parameters
    ----------
    weight : {"absmax"}
        Symmetric, scale = max|w| / 127, rounded to nearest even; one scale per output row in the forward pass and one
        per input plane in the backward pass.
    input : {"absmax", "standard"}
        "absmax": symmetric around 128, or 0..255 around 0 (scale = max / 255) where no element is negative.
        "standard": affine, [min, max] to 0..255 with a zero point.
    grad : {"stochastic", "absmax"}
        "stochastic": scale = max|g| / 127, q = floor(g / scale + u) with u uniform in (0, 1), which is unbiased.
    granularity : {"tensor", "channel"}
        One scale for an input or a gradient, or one for each of its channels or features. The latter are multiplied
        into the weights before these are quantised, so that the integer kernels do not know of them.
    check_finite : bool
        Raise an error that names the tensor where an input or a gradient has NaN or Inf. Otherwise they reach the
        output as NaN or Inf.

    Raises
    ------
    ValueError
        For a scheme that does not exist or does not go with its operand.
    """

    weight: str = "absmax"
    input: str = "absmax"
    grad: str = "stochastic"
    granularity: str = "tensor"
    check_finite: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("weight", ("absmax",)),
            ("input", ("absmax", "standard")),
            ("grad", ("stochastic", "absmax")),
            ("granularity", ("tensor", "channel")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if not isinstance(self.check_finite, bool):
            raise ValueError(f"check_finite must be a bool, got {self.check_finite!r}")
