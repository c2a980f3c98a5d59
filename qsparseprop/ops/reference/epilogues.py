"""What follows a product, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsparseprop._kernels._plan import PlaneLayout
from qsparseprop.ops import epilogues
from qsparseprop.ops.reference._signature import reference_of
from qsparseprop.ops.reference.masks import bits, words
from qsparseprop.ops.reference.products import pack_codes

__all__ = ["activation_range", "epilogue", "epilogue_grad", "epilogue_grad_pack", "epilogue_pack", "epilogue_range",
           "epilogue_sums"]  # fmt: skip


def _exp_minus(t: Tensor) -> Tensor:
    n = (t * 1.44269504088896341).round()
    r = n * 0.693359375 - t - n * 2.12194440e-4
    p = torch.full_like(t, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + c
    return torch.ldexp(r * r * p + r + 1.0, -n)


#: Activations whose slopes are kept, and in which steps.
_SLOPE_STEPS = {"silu": 200.0, "hardswish": 120.0, "gelu": 200.0, "gelu_tanh": 200.0}


def _curved(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """An activation that has a slope everywhere, and the magnitude of the slope's distance from 1/2."""
    a = x.abs()
    if activation == "hardswish":
        rises = torch.where(a < 3.0, a * torch.tensor(1 / 3) - 0.5, 0.0)
        return x * ((x + 3.0).clamp(0.0, 6.0) * torch.tensor(1 / 6)), rises + 0.5
    b = a.clamp(max=87.0 if activation == "silu" else 9.5)
    square = b * b
    if activation == "gelu":
        e = _exp_minus(square * 0.5)
        t = 1.0 / (1.0 + b * 0.231641888)
        p = torch.full_like(t, 1.061405429)
        for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            p = p * t + c
        above = 0.5 * (1.0 - p * t * e)
        density = e * 0.398942280401432678
    else:
        cubic = square * 0.0713548163
        e = _exp_minus(b * (cubic + 1.59576912161) if activation == "gelu_tanh" else b)
        q = 1.0 / (1.0 + e)
        above = 0.5 * (1.0 - e) * q
        density = q * q * e
        if activation == "gelu_tanh":
            density = density * (cubic * 3.0 + 1.59576912161)
    return 0.5 * x + a * above, above + b * density


def _activate(v: Tensor, activation: str, options: Sequence[float]) -> tuple[Tensor, Tensor | None]:
    """The activation of float32 values, and what its gradient needs."""
    if activation == "identity":
        return v, None
    if activation == "clamp":
        low, high = options
        return v.clamp(low, high), words((v > low) & (v < high))
    if activation == "leaky_relu":
        return torch.where(v > 0, v, v * options[0]), words(v > 0)
    y, distance = _curved(v, activation)
    return y, (torch.copysign(distance * _SLOPE_STEPS[activation], v).round() + 128).to(torch.uint8)


def _before(x: Tensor, residual: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """What is activated, float32."""
    v = x.to(torch.float32)
    if scale is not None and shift is not None:
        v = v * scale + shift
    return v if residual is None else v + residual.to(torch.float32)


@reference_of(epilogues.epilogue)
def epilogue(x, residual, scale, shift, activation, options, code_scale, code_shift, codes, saved):
    """See `qsparseprop.ops.epilogue`."""
    if codes is not None and code_scale is not None and code_shift is not None:
        codes.copy_((x.to(torch.float32) * code_scale + code_shift).round().clamp(-128, 127) + 128)
    y, kept = _activate(_before(x, residual, scale, shift), activation, options)
    if saved is not None and kept is not None:
        saved.copy_(kept)
    return y.to(x.dtype)


@reference_of(epilogues.activation_range)
def activation_range(ranges, activation, options):
    """See `qsparseprop.ops.activation_range`: in float64, where it is least by itself."""
    least_at = {"silu": -1.2784645, "hardswish": -1.5, "gelu": -0.7517916, "gelu_tanh": -0.7524614}
    at = torch.tensor(0.0 if activation == "leaky_relu" and options[0] < 0 else least_at.get(activation, -torch.inf))
    low, high = ranges.double().unbind(1)
    points = torch.stack([low, high, at.double().clamp(low, high)])
    points = _activate(points.float(), activation, options)[0]
    ends = torch.stack([points.amin(0), points[:2].amax(0)], 1)
    return torch.where((ends.isfinite().all(1) & ~ranges.isnan().any(1))[:, None], ends, torch.nan)


@reference_of(epilogues.epilogue_range)
def epilogue_range(x, residual, scale, shift, activation, options):
    """See `qsparseprop.ops.epilogue_range`."""
    before = _before(x, residual, scale, shift)
    if activation == "clamp":
        before = before.clamp(*options)
    ends = torch.stack([before.amin(0), before.amax(0)], 1)
    return activation_range(torch.where(before.isfinite().all(0)[:, None], ends, torch.nan), activation, options)


def _gradient(dy: Tensor, saved: Tensor | None, activation: str, options: Sequence[float]) -> Tensor:
    """The gradient behind the activation, float32."""
    g = dy.to(torch.float32)
    if activation == "identity":
        return g
    assert saved is not None
    if activation in _SLOPE_STEPS:
        steps = _SLOPE_STEPS[activation]
        return g * ((saved.to(torch.float32) + (steps / 2 - 128)) * torch.tensor(1 / steps))
    return torch.where(bits(saved, dy.shape[1]), g, g * options[0] if activation == "leaky_relu" else 0.0)


@reference_of(epilogues.epilogue_sums)
def epilogue_sums(dy, codes, saved, activation, options):
    """See `qsparseprop.ops.epilogue_sums`."""
    g = _gradient(dy, saved, activation, options).to(torch.float64)
    dot = torch.zeros(g.shape[1], dtype=torch.float64) if codes is None else (g * codes).sum(0)
    most = torch.where(g.isfinite().all(0), g.abs().amax(0), torch.nan)
    return torch.stack([g.sum(0), dot, most], 1)


@reference_of(epilogues.epilogue_grad)
def epilogue_grad(dy, codes, saved, activation, options, factor, want_g):
    """See `qsparseprop.ops.epilogue_grad`."""
    g = _gradient(dy, saved, activation, options)
    dx = g
    if factor is not None:
        dx = g * factor[0] + (factor[2] if codes is None else codes.to(torch.float32) * factor[1] + factor[2])
    return dx.to(dy.dtype), g.to(dy.dtype) if want_g else dy.new_empty(0)


def _images(rows: Tensor, layout: PlaneLayout) -> Tensor:
    """Rows of channels as the images whose pixels they are."""
    return rows.view(-1, *layout.image, rows.shape[1]).permute(0, 3, 1, 2)


@reference_of(epilogues.epilogue_pack)
def epilogue_pack(x, residual, affine, activation, kept, ranges, layout, scheme, keep):
    """See `qsparseprop.ops.epilogue_pack`."""
    y = epilogue(x, residual, *affine, *activation, *kept)
    exact, _ = _activate(_before(x, residual, *affine), *activation)
    return y if keep else None, pack_codes(_images(exact, layout), layout, scheme, None, ranges)


@reference_of(epilogues.epilogue_grad_pack)
def epilogue_grad_pack(dy, codes, saved, activation, factor, ranges, layout, scheme, seed, want_g):
    """See `qsparseprop.ops.epilogue_grad_pack`."""
    _, g = epilogue_grad(dy, codes, saved, *activation, factor, want_g)
    exact, _ = epilogue_grad(dy.to(torch.float32), codes, saved, *activation, factor, False)
    return pack_codes(_images(exact, layout), layout, scheme, seed, ranges), g if want_g else None
