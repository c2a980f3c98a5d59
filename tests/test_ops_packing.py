"""Packing inputs, with and without quantisation, on every instruction set, against the reference."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsparseprop import ops
from qsparseprop.layout.geometry import UNIT, conv_geometry, linear_geometry
from qsparseprop.ops import reference, schemes
from qsparseprop.ops.reference import products

from ._helpers import DTYPES, LAYOUTS, VALUES, conv_cases, examples, generator, laid_out, random_values
from ._ops import CASES, SCHEMES, SEEDS, assert_same, scheme_of, seed_for, sides

pytestmark = pytest.mark.usefixtures("one_thread")

#: Those that map the largest magnitude to the last code, in equal steps; tests/test_quantization.py has the others.
LINEAR_SCHEMES = ("absmax", "symmetric", "standard", "stochastic")


# ---- packing ----


@given(case=CASES, side=st.booleans(), scheme=st.sampled_from(SCHEMES), kind=st.sampled_from(VALUES),
       layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES), seed=SEEDS,
       per_channel=st.booleans())  # fmt: skip
@examples(250)
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
@examples(60)
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
@examples(80)
def test_pack_is_the_reference(isa, case, side, layout, dtype):
    layout, shape = sides(case)[side]
    x = laid_out(random_values(shape, "normal", case.seed).to(dtype), layout)
    assert_same(ops.pack(x, layout).planes, reference.pack(x, layout).planes)


@given(case=CASES, side=st.booleans(), scheme=st.sampled_from(SCHEMES), layout=st.sampled_from(LAYOUTS), seed=SEEDS)
@examples(60)
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


@given(channels=st.sampled_from([16, 30, 64, 80, 130]), size=st.tuples(st.integers(1, 3), *[st.integers(1, 19)] * 2),
       batch=st.integers(1, 18), stride=st.integers(1, 2), padding=st.integers(0, 2), inner=st.booleans(),
       scheme=st.sampled_from(SCHEMES), dtype=st.sampled_from(DTYPES), per_channel=st.booleans(),
       volume=st.booleans(), seed=SEEDS)  # fmt: skip
@examples(120)
def test_bands_of_channels_are_the_reference(isa, channels, size, batch, stride, padding, inner, scheme, dtype,
                                             per_channel, volume, seed):  # fmt: skip
    """Many channels that are neighbours: units that begin and end anywhere in rows, gaps, phases, and slices."""
    size = size if volume else size[1:]
    kernel = tuple(min(3, n + 2 * padding) for n in size)
    g = conv_geometry(channels, 8, size, kernel, (stride,) * len(size), (padding,) * 2 * len(size), (1,) * len(size),
                      batch, inner)  # fmt: skip
    x = torch.randn(g.input_layout.shape(batch), generator=generator(1)).to(dtype)
    if per_channel:
        x[:, ::2] = x[:, ::2].abs()  # around 0 or 128 by channel
    arguments = (laid_out(x, "channels_last"), g.input_layout, scheme_of(scheme, per_channel), seed_for(scheme, seed))
    assert_same(ops.quantize_pack(*arguments), reference.quantize_pack(*arguments))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quiet_features_have_a_sixteenth_of_the_greatest_scale(isa, scheme):
    """Where rounding is random: to nearest, most of such a channel would become zeros."""
    x = torch.rand(40, 7, generator=generator(2)) - 0.5
    x *= torch.tensor([1.0, 0.1, 0.06, 1e-3, 0.0, -1.0, torch.inf])
    x[0, :6] = torch.tensor([8.0, 0.8, 0.48, 8e-3, 0.0, -8.0])
    seed = seed_for(scheme, 4)
    _, scale, _ = ops.quantize_pack(x, linear_geometry(7, 1).input_layout, scheme_of(scheme, True), seed)
    alone = [ops.quantize_pack(x[:, i : i + 1], linear_geometry(1, 1).input_layout, scheme_of(scheme, True), seed)[1]
             for i in range(7)]  # fmt: skip
    expected = torch.cat(alone)
    if scheme in schemes.RANDOM_SCHEMES:
        expected[:6] = expected[:6].clamp(min=expected[:6].max().item() / 16)
        assert (scale[2:5] == scale[:6].max() / 16).all()
    assert torch.equal(scale, expected)
    assert scale[6] == torch.inf


def test_quiet_channels_of_images_keep_their_scale(isa):
    """A filter without weights before a normalisation has the loudest gradient, which is none of the others' affair."""
    x, seed = torch.rand(5, 4, 3, 3, generator=generator(2)) - 0.5, seed_for("stochastic", 4)
    x *= torch.tensor([1.0, 0.01, 1e-3, 1e-4]).view(-1, 1, 1)
    layouts = [conv_geometry(n, n, (3, 3), (1, 1), (1, 1), (0,) * 4, (1, 1), 5, False).input_layout for n in (4, 1)]
    _, scale, _ = ops.quantize_pack(x, layouts[0], scheme_of("stochastic", True), seed)
    alone = [ops.quantize_pack(x[:, i : i + 1], layouts[1], scheme_of("stochastic", True), seed)[1] for i in range(4)]
    assert torch.equal(scale, torch.cat(alone))


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
@examples(20)
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
