"""Schemes of quantisation: which a layer uses, and tensors in 8 bits or fewer."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeGuard

import torch
from torch import Tensor

from qsparseprop import arguments, ops

__all__ = ["QuantConfig", "QuantizedTensor", "dequantize", "quantize"]

_SCHEMES = ("absmax", "standard", "sawb", "stochastic", "dithered", "luq")

#: Constants c1, c2 of SAWB, clip = c1 sqrt(E x^2) - c2 E|x|, by bit width (Choi et al., arXiv 1807.06964, and what
#: its authors use for 8 bits).
SAWB_CONSTANTS = {2: (3.12, 2.064), 3: (7.509, 6.892), 4: (12.68, 12.80), 5: (17.74, 18.64), 8: (31.76, 35.04)}


@dataclass(frozen=True)
class QuantConfig:
    """How a quantised layer turns weights, inputs and output gradients into 8-bit integers.

    Parameters
    ----------
    weight : {"absmax", "sawb"}
        "absmax": symmetric, scale = max|w| / 127, rounded to nearest even; one scale per output row in the forward pass
        and one per input plane in the backward pass. "sawb": one scale = clip / 127 for the whole weight, clip =
        c1 sqrt(E w^2) - c2 E|w| over all entries, pruned ones included.
    input : {"absmax", "standard", "sawb"}
        "absmax": symmetric around 128, or 0..255 around 0 (scale = max / 255) where no element is negative.
        "standard": affine, [min, max] to 0..255 with a zero point. "sawb": as "absmax", with clip in place of the
        maximum where it is smaller; what is larger becomes clip.
    grad : {"stochastic", "absmax", "dithered", "luq"}
        "stochastic": scale = max|g| / 127, q = floor(g / scale + u) with u uniform in (0, 1), which is unbiased.
        "dithered": the same with scale = step * std(g), or max|g| / 127 if that is larger (arXiv 2004.04729 with a step
        that never saturates); most codes are zeros. "luq": logarithmic, alpha = max|g| / 2^(levels - 1); below alpha
        0 or alpha, above neighbouring alpha 2^k, at random and unbiased (arXiv 2112.10769).
    granularity : {"channel", "tensor"}
        "channel": inputs and gradients have one scale for each channel or feature, multiplied into the weights before
        these are quantised, so that the integer kernels do not know of them. Those of a
        linear layer's gradient that is rounded at random are a sixteenth of the greatest one at least, or weights of
        quiet features would be lost. "tensor": one scale for all of a tensor; a few percent faster, and less accurate
        at very high sparsity (docs/numerics.md).
    grad_weight : {"int8", "float32"}
        Whether the weight's gradient is a product of the codes, or of the float32 input and gradient. The latter keeps
        four bytes of an activation for the backward pass and takes several times as long.
    sawb : (float, float)
        Its constants c1 and c2, see `SAWB_CONSTANTS`.
    sawb_nonzeros : bool
        Take the means over nonzeros only.
    dither_step : float
        Step of "dithered" in standard deviations.
    luq_levels : int
        Powers of two of "luq", 1 to 7; 7 is what 4 bits hold.
    check_finite : bool
        Raise an error that names the tensor where an input or a gradient has NaN or Inf. Otherwise they reach the
        output as NaN or Inf.

    Raises
    ------
    ValueError
        For a scheme that does not exist or does not go with its operand, a value out of range, or an option of a
        scheme that is not used.
    """

    weight: str = "absmax"
    input: str = "absmax"
    grad: str = "stochastic"
    granularity: str = "channel"
    grad_weight: str = "int8"
    sawb: tuple[float, float] = SAWB_CONSTANTS[8]
    sawb_nonzeros: bool = False
    dither_step: float = 1.0
    luq_levels: int = 7
    check_finite: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("weight", ("absmax", "sawb")),
            ("input", ("absmax", "standard", "sawb")),
            ("grad", ("stochastic", "absmax", "dithered", "luq")),
            ("granularity", ("tensor", "channel")),
            ("grad_weight", ("int8", "float32")),
        ):
            arguments.one_of(getattr(self, name), allowed, name)
        for name in ("check_finite", "sawb_nonzeros"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a bool, got {arguments.shown(getattr(self, name))}")
        if isinstance(self.sawb, list):  # as JSON has it
            object.__setattr__(self, "sawb", tuple(self.sawb))
        if not (isinstance(self.sawb, tuple) and len(self.sawb) == 2 and all(_is_number(c) for c in self.sawb)):
            raise ValueError(f"sawb must be a tuple of two finite numbers, got {arguments.shown(self.sawb)}")
        if not _is_number(self.dither_step) or self.dither_step <= 0:
            raise ValueError(f"dither_step must be a positive finite number, got {arguments.shown(self.dither_step)}")
        if type(self.luq_levels) is not int or not 1 <= self.luq_levels <= 7:
            raise ValueError(f"luq_levels must be an integer from 1 to 7, got {arguments.shown(self.luq_levels)}")
        if self.weight == "sawb" and self.granularity == "channel":
            raise ValueError("weight='sawb' has one scale for the whole weight and does not go with "
                             "granularity='channel', which multiplies another factor into each of its columns")
        defaults = {field.name: field.default for field in fields(self)}
        for name, operands, scheme in (
            ("sawb", (self.weight, self.input), "sawb"),
            ("sawb_nonzeros", (self.weight, self.input), "sawb"),
            ("dither_step", (self.grad,), "dithered"),
            ("luq_levels", (self.grad,), "luq"),
        ):
            if scheme not in operands and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} is an option of the scheme {scheme!r}, which nothing here uses")

    @classmethod
    def ancestor(cls) -> QuantConfig:
        """The setting of QSparseProp, for comparison: SAWB with 12.1 and 12.2 over nonzeros, gradients dithered."""
        return cls(weight="sawb", input="sawb", grad="dithered", granularity="tensor", sawb=(12.1, 12.2),
                   sawb_nonzeros=True)

    @property
    def input_options(self) -> tuple[float, ...]:
        """Options of the input's scheme, see `qsparseprop.ops.Scheme`."""
        return (*self.sawb, float(self.sawb_nonzeros)) if self.input == "sawb" else ()

    @property
    def grad_options(self) -> tuple[float, ...]:
        """Options of the gradient's scheme, see `qsparseprop.ops.Scheme`."""
        return {"dithered": (float(self.dither_step),), "luq": (float(self.luq_levels),)}.get(self.grad, ())

    @functools.cached_property
    def input_scheme(self) -> ops.Scheme:
        """The input's scheme as the operators take it."""
        return ops.Scheme(self.input, self.input_options, self.granularity == "channel")

    @functools.cached_property
    def grad_scheme(self) -> ops.Scheme:
        """The gradient's scheme as the operators take it: its codes are around 128, whatever the signs."""
        name = "symmetric" if self.grad == "absmax" else self.grad
        return ops.Scheme(name, self.grad_options, self.granularity == "channel")

    def __getstate__(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # without what is only remembered

    def weight_clip(self, values: Tensor, entries: int) -> Tensor | None:
        """Magnitude that the largest code of a weight stands for.

        Parameters
        ----------
        values : Tensor
            The nonzeros.
        entries : int
            Size of the dense weight.

        Returns
        -------
        Tensor or None
            float32, (1,); None where every row has its own largest magnitude.
        """
        if self.weight != "sawb" or values.numel() == 0:
            return None
        ops.check_storage(values, "the weight")
        x = values.detach().double()
        n = x.count_nonzero().clamp(min=1) if self.sawb_nonzeros else entries
        clip = self.sawb[0] * (x.square().sum() / n).sqrt() - self.sawb[1] * x.abs().sum() / n
        absmax = x.abs().amax()
        return torch.where((clip > 0) & (clip < absmax), clip, absmax).to(torch.float32).view(1)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor as small integers, ``x = scale * (codes - zero_point)``.

    Attributes
    ----------
    codes : Tensor
        int8 around 0, or uint8 where the scheme has a zero point; the shape of the tensor.
    scale, zero_point : Tensor
        float32 and int32, one element for each group, for each element of `dim`, or one.
    scheme : str
    bits : int
    dim, group_size : int or None
        As given to `quantize`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    scheme: str
    bits: int = 8
    dim: int | None = None
    group_size: int | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that the codes stand for, float32 or bfloat16.

        Parameters
        ----------
        dtype : torch.dtype
            float32 or bfloat16.

        Returns
        -------
        Tensor
            Of the codes' shape.
        """
        for name in ("codes", "scale", "zero_point"):
            arguments.instance(getattr(self, name), Tensor, name, "a tensor")
        _check_sharing(self.dim, self.group_size)
        arguments.instance(dtype, torch.dtype, "dtype", "a torch.dtype")
        return ops.dequantize(self.codes, self.scale, self.zero_point, self.dim, self.group_size, dtype)

    def zero_fraction(self) -> float:
        """Share of the elements whose code stands for zero; what a dithered gradient could skip."""
        if self.codes.numel() == 0:
            return 0.0
        return 1.0 - float(self.dequantize().count_nonzero()) / self.codes.numel()


def quantize(
    x: Tensor,
    scheme: str = "absmax",
    *,
    bits: int = 8,
    group_size: int | None = None,
    dim: int | None = None,
    generator: torch.Generator | None = None,
    unsigned: bool | None = None,
    **scheme_options: float | bool | tuple[float, float],
) -> QuantizedTensor:
    """Quantise a tensor.

    Parameters
    ----------
    x : Tensor
        float32 or bfloat16, on the CPU, any shape and strides.
    scheme : {"absmax", "standard", "sawb", "stochastic", "dithered", "luq"}
        See `QuantConfig` for the formulas; 127 there is 2^(bits - 1) - 1 here, 255 is 2^bits - 1.
    bits : int
        2 to 8. Codes take a byte each, whatever it is; "luq" has 8.
    group_size : int, optional
        One scale for every so many consecutive elements (in the order of `x.flatten()`); the last group may be smaller.
    dim : int, optional
        One scale for every index of this dimension. Without both there is one scale.
    generator : torch.Generator, optional
        What the seed of "stochastic", "dithered" and "luq" is drawn from; torch's default one if not given.
    unsigned : bool, optional
        For "absmax" and "sawb": codes are uint8, from 0 where no element is negative, which has twice as many steps,
        and around 2^(bits - 1) otherwise. "standard" is always unsigned, the others never are.
    **scheme_options
        ``constants=(c1, c2)`` and ``nonzeros=True`` of "sawb" (default: `SAWB_CONSTANTS` of the width), ``step`` of
        "dithered" in standard deviations (1.0), ``levels`` of "luq" (7 powers of two).

    Returns
    -------
    QuantizedTensor
        Where NaN or Inf is among the elements that share a scale, the scale is not finite, and so is what they
        dequantise to.

    Raises
    ------
    TypeError, ValueError
        For another dtype or device, a scheme or option that does not exist, or sizes out of range.
    """
    arguments.instance(x, Tensor, "x", "a tensor")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"x must be of dtype torch.float32 or torch.bfloat16, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor, got the layout {x.layout}: x.to_dense()")
    if not isinstance(scheme, str) or scheme not in _SCHEMES:
        raise ValueError(f"unknown scheme {arguments.shown(scheme)}: {', '.join(_SCHEMES)}")
    arguments.whole_number(bits, "bits", 2, 8)
    _check_sharing(dim, group_size)
    if generator is not None:
        arguments.instance(generator, torch.Generator, "generator", "a torch.Generator")
    if unsigned is not None:
        arguments.flag(unsigned, "unsigned")
    if unsigned is None:
        unsigned = scheme == "standard"
    if unsigned != (scheme == "standard") and scheme not in ("absmax", "sawb"):
        raise ValueError(f"the scheme {scheme!r} does not have unsigned={unsigned}")
    if scheme == "luq" and bits != 8:
        raise ValueError(f"codes of luq take 8 bits, got bits={bits}; levels says how many powers of two there are")
    values = _scheme_options(scheme, bits, scheme_options)
    seed = None
    if scheme in ops.RANDOM_SCHEMES:
        seed = torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator)
    codes, scale, zero = ops.quantize(x.detach(), scheme, bits, dim, group_size, not unsigned, seed, values)
    return QuantizedTensor(codes, scale, zero, scheme, bits, dim, group_size)


def dequantize(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that the codes of a `QuantizedTensor` stand for, float32 or bfloat16.

    Parameters
    ----------
    q : QuantizedTensor
    dtype : torch.dtype
        float32 or bfloat16.

    Returns
    -------
    Tensor
        Of the codes' shape.
    """
    arguments.instance(q, QuantizedTensor, "q", "a QuantizedTensor")
    return q.dequantize(dtype)


def _check_sharing(dim: object, group_size: object) -> None:
    """Which elements share a scale; limits depend on the tensor."""
    for name, value in (("dim", dim), ("group_size", group_size)):
        if value is not None:
            arguments.whole_number(value, name, -(1 << 63), (1 << 63) - 1)


def _scheme_options(scheme: str, bits: int, given: Mapping[str, object]) -> tuple[float, ...]:
    known = {"sawb": ("constants", "nonzeros"), "dithered": ("step",), "luq": ("levels",)}.get(scheme, ())
    for name in given:
        if name not in known:
            raise ValueError(f"the scheme {scheme!r} has no option {name!r}"
                             + (f"; it has {', '.join(known)}" if known else ""))
    if scheme == "sawb":
        constants = given.get("constants", SAWB_CONSTANTS.get(bits))
        if constants is None:
            raise ValueError(f"there are no constants of sawb for {bits} bits: give constants=(c1, c2)")
        if not (isinstance(constants, tuple) and len(constants) == 2 and all(_is_number(c) for c in constants)):
            raise ValueError(f"constants must be a tuple of two finite numbers, got {arguments.shown(constants)}")
        return (*map(float, constants), float(bool(given.get("nonzeros", False))))
    numbers = [float(v) for v in given.values() if _is_number(v)]
    if len(numbers) < len(given):
        raise ValueError(f"options of the scheme {scheme!r} must be finite numbers, got "
                         + ", ".join(f"{name}={arguments.shown(v)}" for name, v in given.items()))
    return tuple(numbers)
