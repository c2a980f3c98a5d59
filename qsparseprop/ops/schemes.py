"""What the schemes of quantisation share: names, seeds, and the smallest scale."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparseprop._kernels import _statistics

__all__ = ["MIN_SCALE", "QUIETEST", "RANDOM_SCHEMES", "SCHEMES", "draw_seed", "mix_seed", "seed_bits",
           "symmetric_scale"]  # fmt: skip

SCHEMES = tuple(_statistics.SCHEMES)

#: Schemes that round at random and want a seed.
RANDOM_SCHEMES = ("stochastic", "dithered", "luq")

#: The smallest scale: so that 2**16 / scale is finite.
MIN_SCALE = 2.0**-111
#: The least scale of a linear layer's gradient, relative to that of the loudest feature, see QSP_QUIETEST.
QUIETEST = 2.0**-4

_MASK = 0xFFFFFFFFFFFFFFFF
_SEED = torch.empty((), dtype=torch.int64)  # one like it is made sooner than from its parts


def draw_seed() -> Tensor:
    """A seed for one call: a 64-bit number from torch's default generator, shape ()."""
    return torch.empty_like(_SEED).random_()


def seed_bits(scheme: str, seed: Tensor | None) -> int:
    """A seed as the kernels take it, 0 where there is none.

    Raises
    ------
    ValueError
        If the scheme needs one.
    """
    if seed is None:
        if scheme in RANDOM_SCHEMES:
            raise ValueError(f"the scheme {scheme!r} needs a seed")
        return 0
    return mix_seed(int(seed))


def mix_seed(seed: int) -> int:
    """Spread a seed over 64 bits (finaliser of splitmix64)."""
    z = (seed + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def symmetric_scale(absmax: Tensor, levels: float) -> Tensor:
    """Scale that maps [-absmax, absmax] to [-levels, levels], at least `MIN_SCALE`."""
    scale = absmax / levels
    return torch.where(scale < MIN_SCALE, MIN_SCALE, scale)
