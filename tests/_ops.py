"""Operands of the operators: layers to draw, packed inputs, weights, and arguments of both passes."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import strategies as st

from qsparseprop import ops
from qsparseprop.layout.geometry import linear_geometry
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import make_plan

from ._helpers import conv_cases, generator, laid_out, random_mask, random_values

SCHEMES = tuple(ops.SCHEMES)
SEEDS = st.integers(-(2**63), 2**63 - 1)


@st.composite
def linear_cases(draw):
    """A linear layer seen as a convolution of single pixels, with what `ConvCase` has."""
    inputs, outputs = draw(st.integers(1, 90)), draw(st.sampled_from([1, 2, 15, 16, 17, 64, 67, 130]))
    batch, seed = draw(st.sampled_from([0, 1, 7, 63, 64, 65, 130])), draw(st.integers(0, 1000))
    density = draw(st.sampled_from([0.0, 0.1, 0.4, 1.0]))

    def plan():
        weight = torch.randn(outputs, inputs, generator=generator(seed))
        crow, col, flat = dense_pattern(random_mask(weight.shape, density, seed))
        return make_plan(crow, col, linear_geometry(inputs, outputs)), weight.view(-1)[flat]

    return SimpleNamespace(shape=(batch, inputs, 1, 1), out_channels=outputs, bias=draw(st.booleans()), seed=seed,
                           geometry=lambda: linear_geometry(inputs, outputs), plan=plan)


CASES = st.one_of(conv_cases(), linear_cases())


def assert_same(actual, expected):
    """Bit for bit, NaN of whatever bits included."""
    for a, e in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (actual, expected)), strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        assert torch.equal(a.nan_to_num(nan=0.5), e.nan_to_num(nan=0.5))
        assert torch.equal(a.isnan(), e.isnan())


def seed_for(scheme, seed=0):
    return torch.tensor(seed) if scheme in ops.RANDOM_SCHEMES else None


def sides(case):
    """Layout of the input and of the output, and the shape of the tensor."""
    g = case.geometry()
    return (g.input_layout, case.shape), (g.output_layout, (case.shape[0], case.out_channels, *g.output_size))


def scheme_of(name, per_channel=False):
    return ops.Scheme(name, (), per_channel)


# ---- products ----


def weights_of(values, rows, codes):
    return ops.quantize_weight(values, rows) if codes else ops.gather_weight(values, rows)


def operand(x, layout, scheme, seed=0):
    if scheme is None:
        return ops.pack(x, layout)
    return ops.quantize_pack(x, layout, scheme_of(scheme), seed_for(scheme, seed))


def spmm_arguments(case, scheme, backward, bias=None, kind="normal"):
    """Operand, weights, list, images and bias."""
    plan, values = case.plan()
    rows = plan.backward if backward else plan.forward
    x = random_values(rows.source.shape(case.shape[0]), kind, case.seed)
    return operand(x, rows.source, scheme), weights_of(values, rows, scheme is not None), rows, case.shape[0], bias


def sddmm_arguments(case, input_scheme, grad_scheme, kind="normal"):
    plan, values = case.plan()
    (in_layout, in_shape), (out_layout, out_shape) = sides(case)
    x = operand(random_values(in_shape, kind, case.seed), in_layout, input_scheme)
    # the gradient's zero point is always 128
    grad_scheme = "stochastic" if grad_scheme == "absmax" else grad_scheme
    dy = operand(random_values(out_shape, "normal", case.seed + 1), out_layout, grad_scheme)
    return x, dy, plan.forward, case.shape[0], values.numel()


# ---- whole layers ----


def quantisation(scheme, per_channel=False, seed=0):
    return ops.Quantisation(None if scheme is None else scheme_of(scheme, per_channel), None, seed_for(scheme, seed))


def layer_arguments(
    case, scheme, grad_scheme, layout="contiguous", dtype=torch.float32, grads=(True, True, True), per_channel=False
):
    """Arguments of both passes; the backward pass lacks the packed input, which the forward pass returns."""
    plan, values = case.plan()
    (_, in_shape), (_, out_shape) = sides(case)
    x = laid_out(random_values(in_shape, "normal", case.seed).to(dtype), layout)
    dy = laid_out(random_values(out_shape, "skewed", case.seed + 1).to(dtype), layout)
    bias = torch.randn(case.out_channels, generator=generator(case.seed)) if case.bias else None
    forward = (x, values, bias, plan, quantisation(scheme, per_channel), dtype)
    backward = (plan, quantisation(grad_scheme, per_channel, 3), grads, dtype)
    return forward, dy, backward
