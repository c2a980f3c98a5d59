"""Schemes, and their rounding at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsparseprop.ops import quantization
from qsparseprop.ops.reference._signature import reference_of
from qsparseprop.ops.schemes import mix_seed, symmetric_scale

__all__ = ["dequantize", "limited_inverse", "quantize", "quantize_values", "random_bits", "round_to_power", "sawb_clip",
           "stochastic_round"]  # fmt: skip

_MASK = 0xFFFFFFFFFFFFFFFF


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def random_bits(seed: int, index: Tensor) -> Tensor:
    """The 16 random bits of elements `index` (int64) of the call with `seed` (64 bits), as int64.

    Three rounds of ``x ^= low half * multiplier`` on 64 bits (which wrap around in int64 as they do there), halves
    exchanged between them. Elements 4 i to 4 i + 3 share a result, the lowest bits first.
    """
    low = 0xFFFFFFFF
    x = (index >> 2) * _signed(0x9E3779B97F4A7C15) + _signed(seed & _MASK)
    x = x ^ (x & low) * 0xD2511F52
    x = (x >> 32) & low | x << 32
    x = x ^ (x & low) * 0xCD9E8D56
    x = (x >> 32) & low | x << 32
    x = x ^ (x & low) * 0x846CA68A
    return x >> 16 * (index & 3) & 0xFFFF


def stochastic_round(value: Tensor, seed: int, index: Tensor) -> Tensor:
    """floor(value + u), u uniform in [0, 1) with 16 bits, of float32 values in [-127, 127].

    128 + u has 24 bits; what is added to it is positive and rounded to 16 bits behind the point or more.
    """
    dither = 128 + random_bits(seed, index).to(torch.float32) / 65536
    return (value + dither).to(torch.int64) - 128


def limited_inverse(scale: Tensor, absmax: Tensor, most: int) -> Tensor:
    """1 / scale, or less by as little as it takes for absmax times it not to be beyond `most`."""
    inverse = 1 / scale
    while absmax * inverse > most:
        inverse = torch.nextafter(inverse, torch.zeros(()))
    return inverse


def round_to_power(value: Tensor, seed: int, index: Tensor) -> Tensor:
    """Round to a neighbouring power of two at random, below 1 to 0 or 1, in fixed point of 16 fractional bits.

    With 2^e <= |value| < 2^(e + 1) the result is sign(value) floor(|value| / 2^e + u) 2^e.
    """
    fixed = (value * 65536.0).round().to(torch.int64)
    magnitude = fixed.abs()
    e = (torch.frexp(magnitude.to(torch.float64)).exponent.to(torch.int64) - 1 - 16).clamp(min=0)
    whole = (magnitude + (random_bits(seed, index) << e)) >> (16 + e)
    return fixed.sign() * (whole << e)


def sawb_clip(x: Tensor, c1: float, c2: float, nonzeros: bool) -> Tensor:
    """Clip of SAWB, c1 sqrt(E x^2) - c2 E|x|: at most max|x|, which it also is where the formula is not positive."""
    absmax = x.abs().amax()
    n = int(x.count_nonzero()) if nonzeros else x.numel()
    wide = x.to(torch.float64)
    clip = c1 * (wide.square().sum() / n).sqrt() - c2 * (wide.abs().sum() / n)
    return torch.where((clip > 0) & (clip < absmax), clip, absmax.to(torch.float64)).to(torch.float32)


def quantize_values(
    x: Tensor,
    scheme: str,
    seed: int,
    index: Tensor,
    options: Sequence[float] = (),
    bits: int = 8,
    around_zero: bool = False,
    bounds: Tensor | None = None,
    least: float = 0.0,
) -> tuple[Tensor, Tensor, int]:
    """Codes, scale and zero point of some values that share them.

    Parameters
    ----------
    x : Tensor
        float32, any shape.
    scheme : str
    seed : int
        Mixed.
    index : Tensor
        int64, the elements' numbers.
    options
        As `qsparseprop.ops.quantize_pack`.
    bits : int
    around_zero : bool
        Whether codes are int8 around 0, otherwise uint8.
    bounds : Tensor, optional
        (2,): the least and the greatest value in place of x's own.
    least : float
        The scale, if it is not larger than that; of schemes that round at random.
    """
    levels = 2 ** (bits - 1) - 1
    top, zero_point = 2 * levels + 1, 0 if around_zero else levels + 1
    dtype = torch.int8 if around_zero else torch.uint8
    absmax = x.abs().amax() if x.numel() else x.new_zeros(())
    if bounds is None:
        bounds = torch.stack([x.amin(), x.amax()]) if x.numel() else x.new_zeros(2)
    else:
        absmax = bounds.abs().amax() if bounds.isfinite().all() else torch.full((), torch.nan)
    low, high = bounds[0].clamp(max=0), bounds[1].clamp(min=0)
    if not torch.isfinite(absmax):  # every element a zero; the scale keeps the result from looking like a number
        return torch.full(x.shape, zero_point, dtype=dtype), absmax, zero_point
    if scheme == "sawb" and x.numel():
        absmax = sawb_clip(x, *(options or (31.76, 35.04, 0)))
    scale = symmetric_scale(absmax, levels)
    if scheme == "standard":
        scale = symmetric_scale(high / top - low / top, 1)
        zero_point = int((-low * (1 / scale)).round().clamp(0, top))
    elif scheme in ("absmax", "sawb") and not around_zero and low >= 0:
        scale, zero_point = symmetric_scale(absmax, top), 0
    elif scheme == "luq":
        levels = 2 ** ((int(options[0]) if options else 7) - 1)
        scale = symmetric_scale(absmax, levels)
    elif scheme == "dithered" and x.numel():
        wide = x.to(torch.float64)
        variance = (wide.square().mean() - wide.mean().square()).clamp(min=0)
        step = ((options[0] if options else 1.0) * variance.sqrt()).to(torch.float32)
        scale = torch.where(step > scale, step, scale)
    scale = scale.clamp(min=least)
    inverse = 1 / scale
    if scheme in ("stochastic", "dithered", "luq"):
        inverse = limited_inverse(scale, absmax, levels)
    value = x * inverse
    if scheme in ("stochastic", "dithered"):
        value = stochastic_round(value, seed, index)
    else:
        value = round_to_power(value, seed, index) if scheme == "luq" else value.round()
    least, greatest = (-levels, levels) if around_zero else (max(-zero_point, -levels), top - zero_point)
    if scheme == "standard":
        least = -zero_point
    return (value.clamp(least, greatest) + zero_point).to(dtype), scale, zero_point


def _parts(shape: Sequence[int], dim: int | None, group_size: int | None) -> list[Tensor]:
    """Numbers of the elements that share a scale, for each scale."""
    index = torch.arange(torch.Size(shape).numel())
    if group_size is not None:
        return list(index.split(group_size)) if index.numel() else []
    if dim is None:
        return [index]
    return list(index.view(shape).movedim(dim, 0).reshape(shape[dim], index.numel() // max(shape[dim], 1)))


@reference_of(quantization.quantize)
def quantize(x, scheme, bits, dim, group_size, around_zero, seed, options):
    """See `qsparseprop.ops.quantize`."""
    flat = x.to(torch.float32).reshape(-1)
    parts = _parts(x.shape, dim, group_size)
    mixed = 0 if seed is None else mix_seed(int(seed))
    codes = torch.empty(flat.shape, dtype=torch.int8 if around_zero else torch.uint8)
    scale, zero_point = torch.empty(len(parts)), torch.empty(len(parts), dtype=torch.int32)
    for i, index in enumerate(parts):
        codes[index], scale[i], zero_point[i] = quantize_values(flat[index], scheme, mixed, index, options, bits,
                                                                around_zero)
    return codes.view(x.shape), scale, zero_point


@reference_of(quantization.dequantize)
def dequantize(codes, scale, zero_point, dim, group_size, dtype):
    """See `qsparseprop.ops.dequantize`."""
    out = torch.empty(codes.numel(), dtype=torch.float32)
    for i, index in enumerate(_parts(codes.shape, dim, group_size)):
        out[index] = (codes.reshape(-1)[index].to(torch.int32) - zero_point[i]).to(torch.float32) * scale[i]
    return out.view(codes.shape).to(dtype)
