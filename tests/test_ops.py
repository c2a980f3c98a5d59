"""The compiled operators, on every instruction set, against `qsparseprop.ops.reference`."""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsparseprop import ops
from qsparseprop._kernels import _dispatch
from qsparseprop.layout.geometry import UNIT, conv_geometry, linear_geometry
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import Plan, make_plan
from qsparseprop.nn._traced import config_text
from qsparseprop.ops import reference, schemes
from qsparseprop.ops.reference import products
from qsparseprop.quantization import QuantConfig

from ._helpers import (
    LAYOUTS,
    VALUES,
    conv_cases,
    generator,
    laid_out,
    random_mask,
    random_values,
    run_python,
)

SCHEMES = tuple(ops.SCHEMES)
#: Those that map the largest magnitude to the last code, in equal steps; tests/test_quantization.py has the others.
LINEAR_SCHEMES = ("absmax", "symmetric", "standard", "stochastic")
DTYPES = (torch.float32, torch.bfloat16)
SEEDS = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture(autouse=True)
def _one_thread(_seeded):
    """Small tensors only: on a busy machine a team of threads costs more than the work. Some tests set their own."""
    torch.set_num_threads(1)


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


# ---- packing ----


@given(case=CASES, side=st.booleans(), scheme=st.sampled_from(SCHEMES), kind=st.sampled_from(VALUES),
       layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES), seed=SEEDS,
       per_channel=st.booleans())  # fmt: skip
@settings(max_examples=250)
def test_quantize_pack_is_the_reference(isa, case, side, scheme, kind, layout, dtype, seed, per_channel):
    layout, shape = sides(case)[side]
    x = laid_out(random_values(shape, kind, case.seed).to(dtype), layout)
    if per_channel and kind == "normal":
        x = x.clone() if layout == "expanded" else x
        x[:, ::2] = x[:, ::2].abs()  # around 0 or 128 by channel
    arguments = (x, layout, scheme_of(scheme, per_channel), seed_for(scheme, seed))
    planes, scale, zero_point = ops.quantize_pack(*arguments)
    assert scale.shape == zero_point.shape == (layout.planes if per_channel else 1,)
    assert_same((planes, scale, zero_point), reference.quantize_pack(*arguments))


@given(case=CASES, side=st.booleans(), scheme=st.sampled_from(SCHEMES))
@settings(max_examples=60)
def test_gaps_stand_for_zero(isa, case, side, scheme):
    """They are what a convolution pads with, those behind the last plane included."""
    hypothesis.assume(case.shape[0])
    layout, shape = sides(case)[side]
    x = random_values(shape, "skewed", case.seed)
    planes, _, zero = ops.quantize_pack(x, layout, scheme_of(scheme), seed_for(scheme))
    gap = torch.ones(planes.shape, dtype=torch.bool)
    pitch, front = layout.numbers[5:7]
    for view, _ in products._views(layout.views):
        lanes = products._lanes(layout.numbers, view, shape[0]) + front
        gap[(lanes + (view[0] + torch.arange(view[1]))[:, None, None, None] * pitch).view(-1)] = False
    gap[-UNIT:] = False  # no tap leads there, only whole units do
    assert (planes[gap] == zero).all()


@given(case=CASES, side=st.booleans(), layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES))
@settings(max_examples=80)
def test_pack_is_the_reference(isa, case, side, layout, dtype):
    layout, shape = sides(case)[side]
    x = laid_out(random_values(shape, "normal", case.seed).to(dtype), layout)
    assert_same(ops.pack(x, layout).planes, reference.pack(x, layout).planes)


@given(case=CASES, side=st.booleans(), scheme=st.sampled_from(SCHEMES), layout=st.sampled_from(LAYOUTS), seed=SEEDS)
@settings(max_examples=60)
def test_strides_do_not_change_codes(isa, case, side, scheme, layout, seed):
    layout, shape = sides(case)[side]
    x = laid_out(random_values(shape, "normal", case.seed), layout)
    rest = (layout, scheme_of(scheme), seed_for(scheme, seed))
    assert_same(ops.quantize_pack(x, *rest), ops.quantize_pack(x.contiguous(), *rest))
    assert_same(ops.pack(x, layout).planes, ops.pack(x.contiguous(), layout).planes)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channels_with_threads_are_the_reference(isa, scheme, memory_format):
    """Long runs, many channels, and channels of which one is not finite."""
    shape = (9, 37, 15, 17)
    g = conv_geometry(37, 8, shape[2:], (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), shape[0], False)
    x = torch.randn(shape, generator=generator(3)).mul_(torch.logspace(-9, 9, 37)[:, None, None])
    x[:, 5], x[:, 7], x[3, 11, 2, 2], x[0, 36, 0, 0] = 0, x[:, 7].abs(), float("nan"), float("inf")
    x = x.contiguous(memory_format=memory_format)
    arguments = (x, g.input_layout, scheme_of(scheme, True), seed_for(scheme, 4))
    expected = reference.quantize_pack(*arguments)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same(ops.quantize_pack(*arguments), expected)
    assert expected[1].isfinite().logical_not().nonzero().flatten().tolist() == [11, 36]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_million_elements_are_the_reference(isa, scheme):
    """For what rounds otherwise once in ten thousand elements."""
    shape = (64, 64, 16, 16)
    g = conv_geometry(64, 64, shape[2:], (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), shape[0], False)
    x = torch.rand(shape, generator=generator(1)) * 2 - 1
    x[0, 0, 0, 0] = -1.0
    arguments = (x, g.input_layout, scheme_of(scheme), seed_for(scheme, 2**40 + 7))
    assert_same(ops.quantize_pack(*arguments), reference.quantize_pack(*arguments))


def quantize(x, scheme, seed=None):
    """Codes of a 1-D tensor, scale and zero point."""
    g = linear_geometry(x.numel(), 1)
    planes, scale, zero = ops.quantize_pack(x.view(1, -1, 1, 1), g.input_layout, scheme_of(scheme), seed)
    return planes[g.input_grid.front :: g.input_grid.pitch][: x.numel()].clone(), scale.item(), zero.item()


EXTREMES = {
    "denormal": lambda: torch.linspace(-1, 1, 63) * 1e-40,
    "smallest": lambda: torch.tensor([0.0, 1e-45, -1e-45]),
    "around the smallest normal": lambda: torch.tensor([1, -1, 100, -126.5]) * torch.finfo(torch.float32).tiny,
    "largest": lambda: torch.linspace(-1, 1, 63) * torch.finfo(torch.float32).max,
    "largest of one sign": lambda: torch.linspace(-1, 0, 63) * torch.finfo(torch.float32).max,
    "constant": lambda: torch.full((17,), 3.7),
    "negative constant": lambda: torch.full((17,), -3.7),
    "zero": lambda: torch.zeros(5),
    "negative zero": lambda: -torch.zeros(5),
    "one": lambda: torch.tensor([-2.5]),
    "outlier": lambda: torch.cat([torch.linspace(-1e-3, 1e-3, 40), torch.tensor([100.0])]),
    "mostly negative": lambda: torch.linspace(-1, 0.2, 61),
    "negative": lambda: torch.linspace(-5, -4, 61),
    "mostly positive": lambda: torch.linspace(-0.2, 1, 61),
    "ties": lambda: torch.arange(-127, 128) / 2,
}  # fmt: skip


@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
@pytest.mark.parametrize("kind", EXTREMES)
def test_quantisation_error_is_within_its_guarantee(isa, scheme, kind):
    x = EXTREMES[kind]()
    codes, scale, zero = quantize(x, scheme, seed_for(scheme, 5))
    assert 0 < scale < float("inf")
    assert 0 <= zero <= 255
    error = (codes.double() - zero) * scale - x.double()
    # half a step, or a whole one where rounding is random; plus the rounding of x / scale itself
    bound = scale * (1.0 if scheme == "stochastic" else 0.5) + 2e-5 * scale
    assert error.abs().max() <= bound
    if scheme != "standard":
        assert zero in (0, 128)
        if zero == 128:
            assert codes.min() >= 1, "-128 must not appear"
    # the scale is as small as the range allows
    if scheme == "standard":
        span = x.max().clamp(min=0).double() - x.min().clamp(max=0).double()
        assert scale == pytest.approx(max(span.item() / 255, schemes.MIN_SCALE), rel=1e-5)
    else:
        levels = 255 if scheme == "absmax" and x.min() >= 0 else 127
        assert scale == pytest.approx(max(x.abs().max().item() / levels, schemes.MIN_SCALE), rel=1e-5)
    assert codes[x == 0].eq(zero).all(), "zero must stay zero"


@given(x=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
       scheme=st.sampled_from(LINEAR_SCHEMES))  # fmt: skip
def test_quantisation_error_of_any_values(isa, x, scheme):
    x = torch.tensor(x)
    codes, scale, zero = quantize(x, scheme, seed_for(scheme, 3))
    error = (codes.double() - zero) * scale - x.double()
    assert error.abs().max() <= scale * (1.0 if scheme == "stochastic" else 0.5) + 2e-5 * scale
    if scheme == "stochastic":
        assert codes.min() >= 1


@given(count=st.integers(1, 200), scale=st.sampled_from([1e-42, 1e-3, 1.0, 3e37]), seed=SEEDS)
def test_minus_128_never_appears(isa, count, scale, seed):
    x = torch.randn(count, generator=generator(count)).mul_(scale)
    x[0] = -x.abs().max()
    for scheme in ("absmax", "symmetric", "stochastic", "sawb", "dithered", "luq"):
        codes, _, zero = quantize(x, scheme, seed_for(scheme, seed))
        assert zero == 128
        assert codes.min() >= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scheme", SCHEMES)
@given(case=conv_cases(most_channels=3), layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES),
       place=st.integers(0, 10**6), kind=st.sampled_from(["normal", "positive", "zero"]))  # fmt: skip
@settings(max_examples=20)
def test_one_bad_element_anywhere_makes_the_scale_not_finite(isa, bad, scheme, case, layout, dtype, place, kind):
    layout, shape = sides(case)[0]
    x = random_values(shape, kind, case.seed).to(dtype)
    x.view(-1)[0 if layout == "expanded" else place % x.numel()] = bad
    x = laid_out(x, layout)
    arguments = (x, layout, scheme_of(scheme), seed_for(scheme))
    planes, scale, zero = ops.quantize_pack(*arguments)
    assert not torch.isfinite(scale).any()
    assert_same((planes, scale, zero), reference.quantize_pack(*arguments))


# ---- random rounding ----


def test_the_seed_decides_the_codes(isa):
    x = torch.randn(4001)
    first = quantize(x, "stochastic", torch.tensor(12345))[0]
    assert torch.equal(first, quantize(x, "stochastic", torch.tensor(12345))[0])
    for bit in range(64):  # every bit of the seed counts
        other = torch.tensor(12345) ^ torch.tensor(1 << bit if bit < 63 else -(1 << 63))
        assert (first != quantize(x, "stochastic", other)[0]).double().mean() > 0.02, bit


def test_draw_seed_follows_manual_seed():
    torch.manual_seed(3)
    seeds = [int(ops.draw_seed()) for _ in range(4)]
    torch.manual_seed(3)
    assert seeds == [int(ops.draw_seed()) for _ in range(4)]
    assert len(set(seeds)) == 4
    assert max(seeds) > 2**40


def test_random_rounding_is_unbiased(isa):
    """For each element over seeds, and over the elements of one seed: within five standard errors of x."""
    x = torch.cat([torch.rand(500, generator=generator(1)) * 2 - 1, torch.tensor([1.0, -1.0, 0.0, 0.5, -0.5])])
    seeds = torch.randint(2**63 - 1, (600,), generator=generator(2)).tolist()
    values = torch.stack([quantize(x, "stochastic", torch.tensor(s))[0].double() - 128 for s in seeds])
    wanted = x.double() * 127
    p = wanted - wanted.floor()
    error = values.mean(0) - wanted
    # 16 random bits: a probability is off by 2**-17 at most
    assert (error.abs() <= 5 * (p * (1 - p) / len(seeds)).sqrt() + 2**-16).all()
    assert abs(error.mean()) <= 5 * ((p * (1 - p)).mean() / values.numel()).sqrt() + 2**-16
    residual = values - wanted
    assert (residual.mean(1).abs() <= 5 * ((p * (1 - p)).mean() / x.numel()).sqrt()).all()
    # neither neighbours nor successive seeds share their random numbers
    for shift, dim in ((1, 1), (2, 1), (16, 1), (1, 0)):
        n = residual.shape[dim] - shift
        product = residual.narrow(dim, 0, n) * residual.narrow(dim, shift, n)
        assert abs(product.mean()) <= 5 * (p * (1 - p)).mean() / product.numel() ** 0.5


def test_calls_are_unrelated(isa):
    x = torch.full((4096,), 0.3)
    x[0] = 1.0
    codes = torch.stack([quantize(x, "stochastic", ops.draw_seed())[0] for _ in range(64)]).double()[:, 1:]
    correlation = torch.corrcoef(codes) - torch.eye(64)
    assert correlation.abs().max() < 6 / 4095**0.5


# ---- weights ----


@given(case=CASES, kind=st.sampled_from(["normal", "small", "large", "zero", "bad"]),
       factors=st.sampled_from(["one", "normal", "small", "large", "zero", "bad"]),
       zeros=st.sampled_from(["none", "one", "same", "mixed"]))  # fmt: skip
@settings(max_examples=150)
def test_weights_with_folded_scales_are_the_reference(isa, case, kind, factors, zeros):
    plan, values = case.plan()
    values = values * {"small": 1e-41, "large": 1e37, "zero": 0.0, "bad": float("nan")}.get(kind, 1.0)
    for rows in (plan.forward, plan.backward):
        planes = rows.source.planes
        factor = torch.rand(planes, generator=generator(case.seed)) + 0.01
        factor *= {"small": 1e-33, "large": 1e38, "zero": 0.0}.get(factors, 1.0)
        if factors == "bad":
            factor[0], factor[-1] = float("nan"), float("inf")
        zero = torch.tensor([0, 128, 77], dtype=torch.int32).repeat(planes)[:planes]
        zero = {"none": None, "one": zero[:1], "same": zero[:1].expand(planes).contiguous(), "mixed": zero}[zeros]
        factor = factor[:1] if factors == "one" else factor
        arguments = (values, rows, factor, zero)
        codes, scale, total = ops.quantize_weight(*arguments)
        assert_same((codes, scale, total), reference.quantize_weight(*arguments))
        assert codes.numel() == 0 or codes.min() >= -127
        if kind in ("normal", "zero") and factors not in ("bad", "zero"):  # products that keep their digits
            slot_row = torch.repeat_interleave(torch.arange(scale.numel()), 4 * rows.group_ptr.diff().long())
            wanted = torch.cat([values, torch.zeros(1)])[rows.index.long()].double()
            wanted *= factor.double().expand(planes)[rows.plane.long()]
            error = (codes * scale[slot_row].double() - wanted).abs()
            assert error.le(0.5001 * scale[slot_row].double() + 1e-45).all()


@given(case=CASES, kind=st.sampled_from(["normal", "small", "large", "zero", "bad"]))
@settings(max_examples=100)
def test_quantize_weight_is_the_reference(isa, case, kind):
    plan, values = case.plan()
    if kind == "bad" and values.numel():
        place = torch.randint(values.numel(), (3,), generator=generator(case.seed))
        values[place] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    else:
        values = values * {"small": 1e-41, "large": 1e37, "zero": 0.0}.get(kind, 1.0)
    for rows in (plan.forward, plan.backward):
        arguments = (values, rows)
        codes, scale, total = ops.quantize_weight(*arguments)
        assert_same((codes, scale, total), reference.quantize_weight(*arguments))
        assert codes.numel() == 0 or codes.min() >= -127
        assert (codes[rows.index < 0] == 0).all()
        slot_row = torch.repeat_interleave(torch.arange(scale.numel()), 4 * rows.group_ptr.diff().long())
        sums = torch.zeros(scale.numel(), dtype=torch.int64).index_add(0, slot_row, codes.long())
        assert torch.equal(sums, total.long())
        slots = torch.cat([values, torch.zeros(1)])[rows.index.long()]
        finite = torch.ones(scale.numel(), dtype=torch.bool)
        finite[slot_row[~slots.isfinite()]] = False
        assert torch.equal(scale.isfinite(), finite)  # a bad value spoils its own row, and no other
        slot_row, codes, slots = (t[finite[slot_row]] for t in (slot_row, codes, slots))
        assert (codes * scale[slot_row].double() - slots).abs().le(0.50001 * scale[slot_row].double()).all()


def test_long_rows_of_weights(isa):
    """More nonzeros than fit into any buffer of a row, in one row and as one of many."""
    counts = [0, 3, 300_001, 17]
    ptr = torch.tensor([0, *counts]).cumsum(0).add(3).div(4, rounding_mode="floor").tolist()
    groups = [(n + 3) // 4 for n in counts]
    ptr = torch.tensor([0, *groups]).cumsum(0).to(torch.int32)
    index = torch.full((int(ptr[-1]) * 4,), -1, dtype=torch.int32)
    start = 0
    for r, n in enumerate(counts):
        index[4 * ptr[r] : 4 * ptr[r] + n] = torch.arange(start, start + n, dtype=torch.int32)
        start += n
    values, g = torch.randn(start), linear_geometry(1, len(counts))
    rows = ops.GatherList(ptr, torch.zeros_like(index), index, torch.zeros_like(index), g.input_layout, g.output_layout)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_same(ops.quantize_weight(values, rows), reference.quantize_weight(values, rows))


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


@given(case=CASES, backward=st.booleans(), scheme=st.sampled_from(SCHEMES), channels_last=st.booleans(),
       kind=st.sampled_from(["normal", "positive", "skewed"]), dtype=st.sampled_from(DTYPES))  # fmt: skip
@settings(max_examples=150)
def test_spmm_on_codes_is_the_reference(isa, case, backward, scheme, channels_last, kind, dtype):
    bias = torch.randn(case.out_channels) if case.bias and not backward else None
    arguments = (*spmm_arguments(case, scheme, backward, bias, kind), dtype, channels_last)
    out = ops.spmm(*arguments)
    assert out.dtype == dtype
    if bias is None:
        assert_same(out, reference.spmm(*arguments))
    else:  # whether product and bias are rounded together is the kernels' own business
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(out, reference.spmm(*arguments), rtol=tolerance, atol=1e-6)
        without = (*arguments[:4], None, *arguments[5:])
        assert_same(ops.spmm(*without), reference.spmm(*without))
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@given(case=CASES, backward=st.booleans(), channels_last=st.booleans())
@settings(max_examples=80)
def test_spmm_on_floats_is_close_to_float64(isa, case, backward, channels_last):
    bias = torch.randn(case.out_channels) if case.bias and not backward else None
    arguments = (*spmm_arguments(case, None, backward, bias), torch.float32, channels_last)
    out = ops.spmm(*arguments)
    (planes, *_), (slots, *_), rows, images, *_ = arguments
    magnitude = reference.spmm(ops.Packed(planes.abs()), ops.Weights(slots.abs()), rows, images).double()
    assert ((out.double() - reference.spmm(*arguments)).abs() <= 3e-6 * magnitude + 1e-6).all()


def sddmm_arguments(case, input_scheme, grad_scheme, kind="normal"):
    plan, values = case.plan()
    (in_layout, in_shape), (out_layout, out_shape) = sides(case)
    x = operand(random_values(in_shape, kind, case.seed), in_layout, input_scheme)
    # the gradient's zero point is always 128
    grad_scheme = "stochastic" if grad_scheme == "absmax" else grad_scheme
    dy = operand(random_values(out_shape, "normal", case.seed + 1), out_layout, grad_scheme)
    return x, dy, plan.forward, case.shape[0], values.numel()


@given(case=CASES, scheme=st.sampled_from(SCHEMES), kind=st.sampled_from(["normal", "positive", "skewed"]))
@settings(max_examples=150)
def test_sddmm_on_codes_is_the_reference(isa, case, scheme, kind):
    arguments = sddmm_arguments(case, scheme, "stochastic", kind)
    assert_same(ops.sddmm(*arguments), reference.sddmm(*arguments))


@given(case=CASES)
@settings(max_examples=80)
def test_sddmm_on_floats_is_close_to_float64(isa, case):
    arguments = sddmm_arguments(case, None, None)
    (planes, *_), (dy, *_), *rest = arguments
    magnitude = reference.sddmm(ops.Packed(planes.abs()), ops.Packed(dy.abs()), *rest).double()
    difference = ops.sddmm(*arguments).double() - reference.sddmm(*arguments)
    assert (difference.abs() <= 1e-6 * magnitude).all()


def test_a_gradient_without_negative_values(isa):
    """The packed gradient is signed around 128; nothing may turn it into codes around 0."""
    from qsparseprop.nn import QuantizedSparseLinear

    layer = QuantizedSparseLinear.from_dense(torch.nn.Linear(6, 5))
    x = torch.randn(9, 6)
    layer(x).sum().backward()
    expected = x.sum(0).expand(5, 6).reshape(-1)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0.0, atol=9 * x.abs().max().item() / 127)


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


def both_passes(case, **options):
    """A layer's passes, and those of the reference."""
    forward, dy, backward = layer_arguments(case, **options)
    results = []
    for passes in (ops, reference):
        out, packed = passes.layer_forward(*forward)
        results.append((out, packed, passes.layer_backward(dy, forward[1], packed, *backward)))
    (out, packed, gradients), (wanted, wanted_packed, wanted_gradients) = results
    for found, expected in ((packed, wanted_packed), (gradients, wanted_gradients)):
        assert [t is None for t in found] == [t is None for t in expected]
    there = [[t for t in tensors if t is not None] for tensors in (packed, wanted_packed)]
    return (out, *there[0]), (wanted, *there[1]), gradients, wanted_gradients


def check_gradients(actual, wanted, check):
    """Of those that were wanted."""
    for a, w in zip(actual, wanted, strict=True):
        if w is not None:
            check(a, w)


@given(case=CASES, scheme=st.sampled_from(["absmax", "standard", "stochastic"]),
       grad_scheme=st.sampled_from(["absmax", "symmetric", "stochastic"]), layout=st.sampled_from(LAYOUTS),
       dtype=st.sampled_from(DTYPES), grads=st.tuples(*[st.booleans()] * 3), per_channel=st.booleans())  # fmt: skip
@settings(max_examples=150)
def test_layers_on_codes_are_made_of_the_reference(isa, case, scheme, grad_scheme, layout, dtype, grads, per_channel):
    forward, wanted, gradients, wanted_gradients = both_passes(
        case, scheme=scheme, grad_scheme=grad_scheme, layout=layout, dtype=dtype, grads=grads, per_channel=per_channel
    )
    assert_same(forward[1:], wanted[1:])
    if case.bias:
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(forward[0], wanted[0], rtol=tolerance, atol=1e-6)
    else:
        assert_same(forward[0], wanted[0])
    check_gradients(gradients[:2], wanted_gradients[:2], assert_same)
    check_gradients(gradients[2:], wanted_gradients[2:],
                    lambda a, w: torch.testing.assert_close(a, w, rtol=1e-5, atol=1e-3))  # fmt: skip


@given(case=CASES, layout=st.sampled_from(LAYOUTS), grads=st.tuples(*[st.booleans()] * 3))
@settings(max_examples=50)
def test_layers_on_floats_are_made_of_the_reference(isa, case, layout, grads):
    forward, wanted, gradients, wanted_gradients = both_passes(
        case, scheme=None, grad_scheme=None, layout=layout, grads=grads
    )
    assert_same(forward[1:], wanted[1:])

    def close(actual, expected):
        size = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-5 * size)

    check_gradients((forward[0], *gradients), (wanted[0], *wanted_gradients), close)


# ---- threads ----


def _large(kind):
    if kind == "linear":
        shape, outputs, g = (220, 160, 1, 1), 150, linear_geometry(160, 150)
        taps, groups = 1, 1
    else:
        shape, outputs, groups, taps = (9, 16, 19, 17), 48, 2, 9
        g = conv_geometry(16, 48, (19, 17), (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 9, kind == "conv, batch innermost")
    weight = torch.randn(outputs, shape[1] // groups * taps, generator=generator(5))
    weight[3] = 0
    crow, col, flat = dense_pattern(torch.rand(weight.shape, generator=generator(6)) * (weight != 0) > 0.5)
    return SimpleNamespace(shape=shape, out_channels=outputs, seed=7, geometry=lambda: g,
                           plan=lambda: (make_plan(crow, col, g, groups), weight.view(-1)[flat]))


@pytest.mark.parametrize("kind", ["linear", "conv", "conv, batch innermost"])
def test_the_number_of_threads_does_not_change_a_bit(isa, kind):
    case = _large(kind)
    results = []
    x = random_values(case.shape, "normal", 1)
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        all_of = []
        for scheme in ("absmax", "standard", "stochastic", None):
            for layout in ("contiguous", "channels_last", "reversed"):
                all_of += [t for t in operand(laid_out(x, layout), sides(case)[0][0], scheme) if t is not None]
        for scheme in ("absmax", None):
            for backward in (False, True):
                arguments = spmm_arguments(case, scheme, backward)
                all_of += [t for t in arguments[1] if t is not None]
                all_of += [ops.spmm(*arguments), ops.spmm(*arguments, torch.float32, True)]
            all_of.append(ops.sddmm(*sddmm_arguments(case, scheme, scheme and "stochastic")))
        results.append(all_of)
    for other in results[1:]:
        assert_same(other, results[0])


def test_instruction_sets_agree_on_large_tensors():
    """What the small drawn shapes do not reach: many blocks of rows, units and planes."""
    before = _dispatch.active_isa()
    try:
        for kind in ("linear", "conv"):
            case, first = _large(kind), None
            for name in _dispatch.supported_isas():
                _dispatch.set_isa(name)
                results = [ops.spmm(*spmm_arguments(case, "absmax", backward)) for backward in (False, True)]
                results.append(ops.sddmm(*sddmm_arguments(case, "absmax", "stochastic")))
                first = first or results
                assert_same(results, first)
    finally:
        _dispatch.set_isa(before)


# ---- sums that do not fit into 32 bits ----


def _rows_of(counts, columns):
    """A list whose rows read the first `count` planes of a linear layer with `columns` features, and its grid."""
    mask = torch.arange(columns) < torch.tensor(counts)[:, None]
    g = linear_geometry(columns, len(counts))
    return make_plan(*dense_pattern(mask)[:2], g), g


@pytest.mark.parametrize("batch", [1, 70])
def test_spmm_is_exact_beyond_32_bits(isa, batch):
    """255 * 127 * 70,000 = 2.27e9 is more than an int32 holds; also rows at the bound, and short and empty ones."""
    counts = [70_000, 140_000, 5, 0, 65_536, 65_537, 65_540, 66_311, 66_312, 131_072, 131_076]
    plan, g = _rows_of(counts, max(counts))
    rows = plan.forward
    lanes = g.input_grid.lanes(batch)
    planes = {"largest": torch.full((lanes,), 255, dtype=torch.uint8), "zeros": torch.zeros(lanes, dtype=torch.uint8)}
    planes["random"] = torch.randint(256, (lanes,), dtype=torch.uint8)
    sign = torch.randint(2, rows.index.shape) * 2 - 1
    for name, x in planes.items():
        # the lanes that are elements, (feature, image)
        element = x[: -(-batch // 64) * g.input_grid.block].view(-1, g.input_grid.block)[:, : max(counts) * 64]
        element = element.view(-1, max(counts), 64).transpose(0, 1).reshape(max(counts), -1)[:, :batch].double()
        for weights in (torch.full(rows.index.shape, 127), torch.full(rows.index.shape, -127), 127 * sign):
            weights = torch.where(rows.index < 0, 0, weights).to(torch.int8)
            slot_row = torch.repeat_interleave(torch.arange(len(counts)), 4 * rows.group_ptr.diff().long())
            total = torch.zeros(len(counts), dtype=torch.int64).index_add(0, slot_row, weights.long())
            products = torch.zeros(len(counts), batch, dtype=torch.int64)
            for r in range(len(counts)):
                own = weights[4 * rows.group_ptr[r] : 4 * rows.group_ptr[r + 1]][: counts[r]]
                products[r] = (own.double() @ element[: counts[r]]).to(torch.int64)  # exact: below 2**53
            for zero in (0, 128, 255):
                packed = ops.Packed(x, torch.ones(1), torch.tensor([zero], dtype=torch.int32))
                out = ops.spmm(packed, ops.Weights(weights, torch.ones(len(counts)), total), rows, batch)
                expected = (products - zero * total[:, None]).T.to(torch.float32)
                assert torch.equal(out[:, :, 0, 0], expected), (name, zero)


SIGNS = ("both", "positive", "negative", "alternating", "one negative", "small")


def _codes_of(signs, shape):
    """int8 codes in [-127, 127] whose neighbours agree in sign, or do not, and are large or small."""
    if signs == "small":
        return torch.randint(-20, 21, shape, dtype=torch.int8)
    codes = torch.where(torch.rand(shape) < 0.3, 127, torch.randint(1, 128, shape))
    sign = {"both": torch.randint(2, shape) * 2 - 1, "negative": -torch.ones(shape),
            "alternating": 1 - 2 * (torch.arange(codes.numel()) % 2).view(shape),
            "one negative": torch.where(torch.arange(codes.numel()).view(shape) % 37 == 5, -1, 1)}  # fmt: skip
    return (codes * sign.get(signs, 1)).to(torch.int8)


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_signs_of_weights_do_not_matter(isa, signs, threads):
    """Enough lanes that AVX2 reorders the rows by sign; short, long and empty rows, and codes that saturate 16 bits."""
    torch.set_num_threads(threads)
    counts = [3, 0, 1, 4, 17, 64, 1023, 1025, 2050, 5, 100, 7]
    plan, g = _rows_of(counts, max(counts))
    rows, batch = plan.forward, 260
    weights = torch.where(rows.index < 0, 0, _codes_of(signs, rows.index.shape)).to(torch.int8)
    slot_row = torch.repeat_interleave(torch.arange(len(counts)), 4 * rows.group_ptr.diff().long())
    total = torch.zeros(len(counts), dtype=torch.int64).index_add(0, slot_row, weights.long())
    planes = torch.randint(256, (g.input_grid.lanes(batch),), dtype=torch.uint8)
    planes[torch.rand(planes.shape) < 0.5] = 255
    arguments = (ops.Packed(planes, torch.ones(1), torch.tensor([77], dtype=torch.int32)),
                 ops.Weights(weights, torch.ones(len(counts)), total), rows, batch)  # fmt: skip
    assert_same(ops.spmm(*arguments), reference.spmm(*arguments))


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("batch", [64, 200, 460])
def test_the_signs_of_gradients_do_not_matter(isa, signs, batch):
    plan, g = _rows_of([3, 0, 21, 8, 33], 40)
    rows, x_grid, dy_grid = plan.forward, g.input_grid, g.output_grid
    planes = torch.randint(256, (x_grid.lanes(batch),), dtype=torch.uint8)
    planes[torch.rand(planes.shape) < 0.5] = 255
    dy = (_codes_of(signs, (dy_grid.lanes(batch),)).to(torch.int32) + 128).to(torch.uint8)
    if batch % 64:  # images that do not exist have no gradient
        last = dy[(batch // 64) * dy_grid.block :][: 5 * 64].view(5, 64)
        last[:, batch % 64 :] = 128
    one = torch.ones(1)
    arguments = (ops.Packed(planes, one, torch.tensor([77], dtype=torch.int32)), ops.Packed(dy, one), rows, batch, 65)
    assert_same(ops.sddmm(*arguments), reference.sddmm(*arguments))


@pytest.mark.parametrize("layer", ["linear", "conv", "conv, batch innermost"])
def test_sddmm_is_exact_beyond_32_bits(isa, layer):
    """More than 66,311 lanes of the largest codes."""
    if layer == "linear":
        shape, g = (70_001, 3, 1, 1), linear_geometry(3, 2)
    else:
        shape = (2, 3, 280, 251) if layer == "conv" else (300, 3, 17, 15)
        g = conv_geometry(3, 2, shape[2:], (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), shape[0],
                          layer == "conv, batch innermost")
    lanes = shape[0] * shape[2] * shape[3]
    assert lanes > 66_311
    mask = torch.tensor([[True, True, False], [False, True, True]])
    rows = make_plan(*dense_pattern(mask)[:2], g).forward
    # positive inputs have codes 0..255; of the two gradients the first is always the largest, the second the smallest
    x = torch.ones(shape)
    dy = torch.ones(shape[0], 2, *shape[2:])
    dy[:, 1] = -1
    packed = operand(x, g.input_layout, "absmax")
    packed_dy = operand(dy, g.output_layout, "stochastic")
    assert packed.planes.max() == 255
    one = torch.ones(1)
    for zero in (0, 128, 255):
        out = ops.sddmm(ops.Packed(packed.planes, one, torch.tensor([zero], dtype=torch.int32)),
                        ops.Packed(packed_dy.planes, one), rows, shape[0], 4)  # fmt: skip
        exact = 127 * (255 - zero) * lanes
        assert zero or exact > 2**31
        assert torch.equal(out, torch.tensor([exact, exact, -exact, -exact]).to(torch.float32))


# ---- what torch knows of the operators ----


def test_every_operator_has_a_reference():
    """With the same parameters."""
    operators = {name: op for name in ops.__all__ if isinstance(op := getattr(ops, name), ops.Operator)}
    functions = {name: getattr(ops, name) for name in reference.__all__ if hasattr(ops, name)}
    assert set(operators) < set(functions)
    assert set(functions) - set(operators) == {
        "epilogue_grad_pack", "epilogue_pack", "gather_weight", "layer_backward", "layer_forward", "multiply", "pack",
        "packed_backward", "quantize_pack", "quantize_weight", "sddmm", "spmm"}  # fmt: skip
    for name, op in functions.items():
        mine = inspect.signature(op.function if name in operators else op).parameters.values()
        theirs = inspect.signature(getattr(reference, name)).parameters.values()
        assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in theirs], name


SAMPLES = [(op, scheme, layout) for op in ("sparse_layer", "sparse_layer_backward") for scheme in ("absmax", None)
           for layout in ("contiguous", "channels_last")]  # fmt: skip


def sample(op, scheme, variant):
    """Arguments of a small call of what graphs see of a layer."""
    g = conv_geometry(2, 3, (5, 4), (3, 2), (2, 1), (1, 1, 0, 0), (1, 1), 3, False)
    crow, col, _ = dense_pattern(torch.rand(3, 12) < 0.5)
    values = torch.randn(col.numel())
    config = "" if scheme is None else config_text(QuantConfig(input=scheme, grad=scheme))
    x, dy = (laid_out(torch.randn(3, *rest).bfloat16(), variant) for rest in ((2, 5, 4), (3, *g.output_size)))
    rest = (crow, col, g.numbers, 1, config)
    if op == "sparse_layer":
        return x, values, torch.randn(3), *rest, torch.bfloat16
    packed = torch.ops.qsparseprop.sparse_layer(x, values, None, *rest, torch.bfloat16)[1:]
    return dy, values, *packed, *rest, x.shape, [True, True, True], torch.bfloat16


@pytest.mark.parametrize(("op", "scheme", "variant"), SAMPLES)
# torch's own tracing warns of itself
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_opcheck(op, scheme, variant):
    torch.library.opcheck(getattr(torch.ops.qsparseprop, op).default, sample(op, scheme, variant))


@pytest.mark.parametrize(("op", "scheme", "variant"), SAMPLES)
def test_fake_results_look_like_real_ones(op, scheme, variant):
    arguments = sample(op, scheme, variant)
    op = getattr(torch.ops.qsparseprop, op)
    real = op(*arguments)
    fake = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
    for r, f in zip(real, fake, strict=True):
        assert f.is_meta
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


# ---- arguments that make no sense ----


def _list(rows, source, target):
    return ops.GatherList(*rows, ops.PlaneLayout(*source), ops.PlaneLayout(*target))


def _call_quantize_pack(x, grid, views, image, scheme, seed):
    ops.quantize_pack(x, ops.PlaneLayout(grid, views, image), ops.Scheme(scheme), seed)


def _call_pack(x, grid, views, image):
    ops.pack(x, ops.PlaneLayout(grid, views, image))


def _call_quantize_weight(values, group_ptr, offset, index, plane, source, target):
    ops.quantize_weight(values, _list((group_ptr, offset, index, plane), source, target))


def _call_spmm(planes, weights, group_ptr, offset, index, plane, scale, total, x_scale, x_zero_point, bias, grid,
               in_views, in_image, out_grid, views, image, images):  # fmt: skip
    rows = _list((group_ptr, offset, index, plane), (grid, in_views, in_image), (out_grid, views, image))
    ops.spmm(ops.Packed(planes, x_scale, x_zero_point), ops.Weights(weights, scale, total), rows, images, bias)


def _call_sddmm(planes, dy, group_ptr, offset, index, plane, x_scale, x_zero_point, dy_scale, grid, in_views, in_image,
                dy_grid, views, image, images, nonzeros):  # fmt: skip
    rows = _list((group_ptr, offset, index, plane), (grid, in_views, in_image), (dy_grid, views, image))
    ops.sddmm(ops.Packed(planes, x_scale, x_zero_point), ops.Packed(dy, dy_scale), rows, images, nonzeros)


def _plan(geometry, rows, columns, grid, views, dy_grid, dy_views):
    x, y = (grid, views, geometry.input_image), (dy_grid, dy_views, geometry.output_image)
    return Plan(geometry, _list(rows, x, y), _list(columns, y, x), 1, 135)


def _call_layer_forward(x, values, bias, geometry, rows, columns, grid, views, out_grid, out_views, scheme, seed,
                        dtype):  # fmt: skip
    plan = _plan(geometry, rows, columns, grid, views, out_grid, out_views)
    given = ops.Quantisation(None if scheme is None else ops.Scheme(scheme), None, seed)
    ops.layer_forward(x, values, bias, plan, given, dtype)


def _call_layer_backward(dy, values, planes, x_scale, x_zero_point, geometry, rows, columns, grid, views, dy_grid,
                         dy_views, scheme, seed, grads, dtype):  # fmt: skip
    plan = _plan(geometry, rows, columns, grid, views, dy_grid, dy_views)
    given = ops.Quantisation(None if scheme is None else ops.Scheme(scheme), None, seed)
    packed = None if planes is None else ops.Packed(planes, x_scale, x_zero_point)
    ops.layer_backward(dy, values, packed, plan, given, grads, dtype)


CALLS = {name.removeprefix("_call_"): call for name, call in list(globals().items()) if name.startswith("_call_")}


def _parts(rows):
    return {"group_ptr": rows.group_ptr, "offset": rows.offset, "index": rows.index, "plane": rows.plane}


def _valid(op, codes=True):
    """Arguments by name of a small call that works: what plans are made of, and tensors."""
    g = conv_geometry(3, 5, (6, 5), (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 4, False)
    plan = make_plan(*dense_pattern(torch.rand(5, 27, generator=generator(1)) < 0.5)[:2], g)
    rows = plan.forward
    nonzeros = int((rows.index >= 0).sum())
    values = torch.randn(nonzeros)
    x, dy = torch.randn(4, 3, 6, 5), torch.randn(4, 5, *g.output_size)
    source = {"grid": list(g.input_grid.numbers), "in_views": list(g.input_views), "in_image": list(g.input_image)}
    target = (list(g.output_grid.numbers), list(g.output_views), list(g.output_image))
    packing = {"x": x, "grid": source["grid"], "views": source["in_views"], "image": source["in_image"]}
    scheme = "absmax" if codes else None
    planes, x_scale, zero = operand(x, g.input_layout, scheme)
    weights, scale, total = weights_of(values, rows, codes)
    grad, dy_scale, _ = operand(dy, g.output_layout, "stochastic" if codes else None)
    bias = torch.randn(5)
    lists = {"geometry": g, "rows": list(_parts(rows).values()), "columns": list(_parts(plan.backward).values()),
             "grid": source["grid"], "views": source["in_views"]}  # fmt: skip
    return {
        "quantize_pack": {**packing, "scheme": "absmax", "seed": None},
        "pack": packing,
        "quantize_weight": {"values": values, **_parts(rows), "source": list(source.values()), "target": target},
        "spmm": {"planes": planes, "weights": weights, **_parts(rows), "scale": scale, "total": total,
                 "x_scale": x_scale, "x_zero_point": zero, "bias": bias, **source,
                 **dict(zip(("out_grid", "views", "image"), target, strict=True)), "images": 4},
        "sddmm": {"planes": planes, "dy": grad, **_parts(rows), "x_scale": x_scale, "x_zero_point": zero,
                  "dy_scale": dy_scale, **source, **dict(zip(("dy_grid", "views", "image"), target, strict=True)),
                  "images": 4, "nonzeros": nonzeros},
        "layer_forward": {"x": x, "values": values, "bias": bias, **lists, "out_grid": target[0],
                          "out_views": target[1], "scheme": scheme, "seed": None, "dtype": torch.float32},
        "layer_backward": {"dy": dy, "values": values, "planes": planes, "x_scale": x_scale, "x_zero_point": zero,
                           **lists, "dy_grid": target[0], "dy_views": target[1], "scheme": scheme, "seed": None,
                           "grads": [True, True, True], "dtype": torch.float32},
    }[op]  # fmt: skip


def _set(place, value):
    def change(old):
        new = old.clone() if isinstance(old, torch.Tensor) else list(old)
        new[place] = value
        return new

    return change


def _within(place, change):
    """A change of one tensor of a list."""
    return lambda old: [*old[:place], change(old[place]), *old[place + 1 :]]


def _gapped(t):
    return torch.stack([t, t], -1)[..., 0]


def _short(t):
    return t[:-1]


def _grid(**numbers):
    names = ("images", "lane_b", "lane_y", "lane_x", "planes", "pitch", "front", "block")

    def change(old):
        return [numbers.get(name, value) for name, value in zip(names, old, strict=True)]

    return change


GRIDS = {
    "7 numbers": _short,
    "no numbers": lambda g: [],
    "no images": _grid(images=0),
    "negative images": _grid(images=-4),
    "no lanes": _grid(lane_b=0),
    "negative row": _grid(lane_y=-6),
    "lanes of pixels overlap": _grid(lane_x=2),
    "lanes of rows overlap": _grid(lane_y=1),
    "lanes of images overlap": _grid(lane_b=7),
    "no planes": _grid(planes=0),
    "pitch not of whole units": _grid(pitch=130),
    "pitch smaller than front": _grid(front=2**20),
    "planes larger than their block": _grid(planes=1000),
    "blocks overlap": _grid(block=64),
    "beyond 64 bits as a product": _grid(planes=2**34, pitch=2**30, block=0),
    "beyond 64 bits as a product, again": _grid(planes=2**30, pitch=2**34, block=64),
    "enormous": _grid(pitch=2**62),
}  # fmt: skip
VIEWS = {
    "none": lambda v: [],
    "8 numbers": lambda v: v[:8],
    "other channels": _set(1, 2),
    "negative plane": _set(0, -1),
    "plane too large": _set(0, 1000),
    "negative origin": _set(2, -1),
    "origin outside of the plane": _set(2, 2**20),
    "negative rows": _set(3, -1),
    "more rows than the tensor has": _set(3, 40),
    "more columns than the tensor has": _set(4, 40),
    "first row outside": _set(5, 30),
    "negative first row": _set(5, -1),
    "negative first column": _set(6, -1),
    "no row step": _set(7, 0),
    "negative column step": _set(8, -1),
    "enormous row step": _set(7, 2**62),
    "enormous plane": _set(0, 2**62),
    "enormous origin": _set(2, 2**62),
    "enormous first row": _set(5, 2**63 - 1),
}  # fmt: skip
GROUP_PTRS = {
    "int64": lambda t: t.long(),
    "float": lambda t: t.float(),
    "empty": lambda t: t[:0],
    "not from 0": _set(0, 1),
    "negative": _set(0, -1),
    "descending": _set(2, 1000),
    "past the slots": lambda t: t * 2,
    "largest": _set(-1, 2**31 - 1),
    "not contiguous": lambda t: torch.stack([t, t], 1)[:, 0],
}  # fmt: skip
IMAGES = {
    "1 number": _short,
    "3 numbers": lambda s: [*s, 1],
    "fewer rows": _set(0, 1),
    "negative": _set(1, -1),
    "enormous": _set(0, 2**62),
}  # fmt: skip
COUNTS = {"more": lambda n: 4000, "negative": lambda n: -4, "enormous": lambda n: 2**62}
OFFSETS = {"int64": lambda t: t.long(), "short": _short, "not contiguous": _gapped, "-1": _set(0, -1),
           "smallest": _set(2, -(2**31)), "past the end": _set(2, 10**6), "largest": _set(-1, 2**31 - 1)}  # fmt: skip
INDICES = {"int64": lambda t: t.long(), "short": _short, "empty": lambda t: t[:0], "not contiguous": _gapped,
           "too large": _set(0, 10**6), "-2": _set(1, -2), "smallest": _set(3, -(2**31)),
           "largest": _set(3, 2**31 - 1)}  # fmt: skip
PLANES = {"int64": lambda t: t.long(), "short": _short, "-1": _set(0, -1), "too large": _set(0, 10**6)}
CORRUPTIONS = {
    "quantize_pack": {
        "x": {"int": lambda t: t.int(), "double": lambda t: t.double(), "half": lambda t: t.half(),
              "complex": lambda t: t.to(torch.complex64), "3-D": lambda t: t[0], "5-D": lambda t: t[None],
              "fewer channels": lambda t: t[:, :2], "fewer rows": lambda t: t[:, :, :1]},
        "grid": GRIDS, "views": VIEWS, "image": IMAGES,
        "scheme": {"unknown": lambda s: "int4", "without its seed": lambda s: "stochastic"},
    },
    "quantize_weight": {
        "values": {"double": lambda t: t.double(), "bfloat16": lambda t: t.bfloat16(), "short": lambda t: t[:-1],
                   "empty": lambda t: t[:0], "not contiguous": _gapped},
        "index": INDICES, "group_ptr": GROUP_PTRS,
    },
    "spmm": {
        "planes": {"signed": lambda t: t.to(torch.int8), "double": lambda t: t.double(), "short": lambda t: t[:-300],
                   "empty": lambda t: t[:0], "not contiguous": _gapped, "float among codes": lambda t: t.float()},
        "weights": {"unsigned": lambda t: t.to(torch.uint8), "int32": lambda t: t.int(), "short": _short,
                    "not contiguous": _gapped, "float among codes": lambda t: t.float()},
        "group_ptr": {**GROUP_PTRS, "fewer rows": _short},
        # which value a slot holds does not matter here
        "index": {k: v for k, v in INDICES.items() if k not in ("too large", "largest")},
        "offset": OFFSETS, "plane": PLANES,
        "scale": {"missing": lambda t: None, "short": _short, "double": lambda t: t.double()},
        "total": {"missing": lambda t: None, "short": _short, "int32": lambda t: t.int()},
        "x_scale": {"empty": lambda t: t[:0], "double": lambda t: t.double()},
        "x_zero_point": {"empty": lambda t: t[:0], "int64": lambda t: t.long()},
        "bias": {"short": _short, "double": lambda t: t.double(), "not contiguous": _gapped},
        "grid": GRIDS, "in_views": VIEWS, "in_image": IMAGES, "out_grid": GRIDS, "views": VIEWS, "image": IMAGES,
        "images": COUNTS,
    },
    "sddmm": {
        "planes": {"signed": lambda t: t.to(torch.int8), "short": lambda t: t[:-300], "empty": lambda t: t[:0],
                   "not contiguous": _gapped, "float among codes": lambda t: t.float()},
        "dy": {"signed": lambda t: t.to(torch.int8), "short": lambda t: t[:-300], "empty": lambda t: t[:0],
               "not contiguous": _gapped, "float among codes": lambda t: t.float()},
        "group_ptr": {**GROUP_PTRS, "fewer rows": _short},
        "offset": OFFSETS, "index": INDICES, "plane": PLANES,
        "x_scale": {"missing": lambda t: None, "empty": lambda t: t[:0], "two": lambda t: t.repeat(2)},
        "x_zero_point": {"missing": lambda t: None, "empty": lambda t: t[:0], "float": lambda t: t.float()},
        "dy_scale": {"missing": lambda t: None, "empty": lambda t: t[:0], "two": lambda t: t.repeat(2)},
        "grid": GRIDS | {"other lanes": _grid(lane_b=128)}, "in_views": VIEWS, "in_image": IMAGES, "dy_grid": GRIDS,
        "views": {**VIEWS, "two": lambda v: v * 2}, "image": IMAGES,
        "images": COUNTS,
        "nonzeros": {"fewer": lambda n: n - 1, "none": lambda n: 0},
    },
}  # fmt: skip
CORRUPTIONS["pack"] = {k: v for k, v in CORRUPTIONS["quantize_pack"].items() if k != "scheme"}
_LISTS = {f"{name}: {k}": _within(place, v) for place, (name, changes) in enumerate(
    {"group_ptr": CORRUPTIONS["spmm"]["group_ptr"], "offset": OFFSETS, "index": INDICES, "plane": PLANES}.items())
    for k, v in changes.items()}  # fmt: skip
CORRUPTIONS["layer_forward"] = {
    "x": CORRUPTIONS["quantize_pack"]["x"],
    "values": {"short": _short, "empty": lambda t: t[:0], "not contiguous": _gapped},
    "bias": {"short": _short, "empty": lambda t: t[:0]},
    "rows": _LISTS, "grid": GRIDS, "views": VIEWS, "out_grid": GRIDS, "out_views": VIEWS,
    "scheme": {"unknown": lambda s: "int4", "without its seed": lambda s: "stochastic"},
    "dtype": {"double": lambda d: torch.float64, "int8": lambda d: torch.int8},
}  # fmt: skip
CORRUPTIONS["layer_backward"] = {
    "dy": CORRUPTIONS["quantize_pack"]["x"],
    "values": CORRUPTIONS["layer_forward"]["values"],
    # floats ask for the weight gradient in float32
    "planes": {**{k: v for k, v in CORRUPTIONS["spmm"]["planes"].items() if k not in ("short", "float among codes")},
               "short": lambda t: t[:-1000], "missing": lambda t: None},
    "x_scale": CORRUPTIONS["sddmm"]["x_scale"],
    "x_zero_point": CORRUPTIONS["sddmm"]["x_zero_point"],
    "rows": _LISTS, "columns": _LISTS, "grid": GRIDS, "dy_grid": GRIDS, "views": VIEWS, "dy_views": VIEWS,
    "scheme": CORRUPTIONS["layer_forward"]["scheme"],
    "dtype": CORRUPTIONS["layer_forward"]["dtype"],
}  # fmt: skip


@pytest.mark.parametrize("op", CORRUPTIONS)
@pytest.mark.parametrize("codes", [True, False])
def test_what_is_to_be_corrupted_works(op, codes):
    CALLS[op](**_valid(op, codes))


def _is_harmful(change):
    """Whether products of the numbers leave 64 bits: where such a call is not refused, it ends the process."""
    return "enormous" in change or "beyond" in change


def _corruptions(harmful):
    return [(op, argument, change) for op, arguments in CORRUPTIONS.items() for argument, changes in arguments.items()
            for change in changes if _is_harmful(change) == harmful]  # fmt: skip


def corrupted_call(op, argument, change):
    arguments = _valid(op)
    arguments[argument] = CORRUPTIONS[op][argument][change](arguments[argument])
    CALLS[op](**arguments)


@pytest.mark.parametrize(("op", "argument", "change"), _corruptions(harmful=False))
def test_corrupted_arguments_are_refused(op, argument, change):
    with pytest.raises((TypeError, ValueError)) as error:
        corrupted_call(op, argument, change)
    assert str(error.value)


_IN_A_PROCESS = """
import json, os, signal, sys, types
package = types.ModuleType("tests")
package.__path__ = [sys.argv[1]]
sys.modules["tests"] = package
import torch
torch.set_num_threads(1)  # no team of threads, so that a fork is harmless
from tests import test_ops
for case in json.loads(sys.argv[2]):
    if not os.fork():
        signal.alarm(5)  # for loops without end
        try:
            test_ops.corrupted_call(*case)
        except (TypeError, ValueError):
            os._exit(0)
        except BaseException as error:
            print(case, repr(error), flush=True)
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    if status:
        print(*case, "accepted" if status == 1 else f"crashed: {status}", sep=": ", flush=True)
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_enormous_numbers_are_refused():
    cases = _corruptions(harmful=True)
    assert len(cases) > 20
    process = run_python(_IN_A_PROCESS, str(Path(__file__).parent), json.dumps(cases))
    assert (process.stdout, process.returncode) == ("done\n", 0), process.stderr


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guards memory by calls of Linux")
def test_random_corruptions_do_not_touch_memory_that_is_not_theirs(number):
    """In a process of its own, with every tensor at the edge of memory that must not be touched."""
    script = Path(__file__).with_name("_fuzz.py").read_text()
    process = run_python(script, str(number), "400")
    assert process.returncode == 0, f"{process.stdout[-2000:]}\n{process.stderr[-3000:]}"
    assert "done" in process.stdout

