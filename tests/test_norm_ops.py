"""Operators of batch normalisation, addition and activation in one pass, against their formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qsparseprop import norm_ops, ops
from qsparseprop._kernels import _dispatch
from qsparseprop.geometry import conv_geometry

from ._blocks import sparse

SHAPES = st.tuples(st.integers(1, 70), st.sampled_from([1, 3, 15, 16, 17, 33, 64, 70, 128]))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@given(shape=SHAPES, dtype=DTYPES, offset=st.sampled_from([0.0, 1.0, -1000.0]))
def test_moments(shape, dtype, offset):
    x = (torch.randn(shape) * 3 + offset).to(dtype)
    out = norm_ops.channel_moments(x)
    exact = x.double()
    torch.testing.assert_close(out[:, 0], exact.mean(0), rtol=1e-6, atol=1e-6)
    squares = ((exact - exact.mean(0)) ** 2).sum(0)
    torch.testing.assert_close(out[:, 1], squares, rtol=1e-4, atol=1e-4 * (1 + abs(offset) * 1e-2))
    assert torch.equal(out[:, 2], exact.amin(0))
    assert torch.equal(out[:, 3], exact.amax(0))


def test_moments_of_many_rows_lose_no_digits():
    x = torch.randn(200_000, 3) + 1e4
    out = norm_ops.channel_moments(x)
    torch.testing.assert_close(out[:, 1] / len(x), x.double().var(0, correction=0), rtol=1e-5, atol=0)


def act_arguments(shape, dtype, residual, activation, generator=None):
    channels = shape[1]
    x = torch.randn(shape, generator=generator).to(dtype)
    add = torch.randn(shape, generator=generator).to(dtype) if residual else None
    scale, shift = (torch.randn(channels, generator=generator) for _ in range(2))
    low, high = {"relu": (0.0, math.inf), "relu6": (0.0, 1.0), "none": (-math.inf, math.inf)}[activation]
    step = (x.float().amax(0) - x.float().amin(0)).clamp(min=1e-6) / 255
    return x, add, scale, shift, low, high, 1 / step, -x.float().amin(0) / step - 128


@given(shape=SHAPES, dtype=DTYPES, residual=st.booleans(), activation=st.sampled_from(["relu", "relu6", "none"]))
def test_forward_is_the_formula(isa, shape, dtype, residual, activation):
    arguments = act_arguments(shape, dtype, residual, activation)
    x, add, scale, shift, low, high, code_scale, code_shift = arguments
    y, codes, mask = norm_ops.norm_act(*arguments)
    before = x.float() * scale + shift + (0 if add is None else add.float())
    assert torch.equal(y, before.clamp(low, high).to(dtype))
    expected = (x.float() * code_scale + code_shift).round().clamp(-128, 127) + 128
    assert torch.equal(codes, expected.to(torch.uint8))
    bits = (mask[:, :, None] >> torch.arange(16)) & 1
    passes = bits.reshape(len(x), -1)[:, : x.shape[1]].bool()
    assert torch.equal(passes, (before > low) & (before < high))


@given(shape=SHAPES, dtype=DTYPES, residual=st.booleans())
def test_gradient_is_the_formula(isa, shape, dtype, residual):
    arguments = act_arguments(shape, dtype, False, "relu")
    _, codes, mask = norm_ops.norm_act(*arguments)
    dy, factor = torch.randn(shape).to(dtype), torch.randn(3, shape[1])
    sums = norm_ops.norm_act_sums(dy, codes, mask)
    dx, dresidual = norm_ops.norm_act_grad(dy, codes, mask, factor, residual)
    x, _, scale, shift, *_ = arguments
    g = dy.float() * (x.float() * scale + shift > 0)
    torch.testing.assert_close(sums[:, 0], g.double().sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums[:, 1], (g.double() * codes.double()).sum(0), rtol=1e-5, atol=2e-2)
    assert torch.equal(sums[:, 2], g.abs().double().amax(0))
    assert torch.equal(dx, (g * factor[0] + (codes.float() * factor[1] + factor[2])).to(dtype))
    assert torch.equal(dresidual, g.to(dtype) if residual else torch.empty(0, dtype=dtype))


def test_all_threads_and_instruction_sets_agree():
    generator = torch.Generator().manual_seed(0)
    arguments = act_arguments((5000, 70), torch.float32, True, "relu", generator)
    dy, factor = torch.randn(5000, 70, generator=generator), torch.randn(3, 70, generator=generator)
    results = []
    before = _dispatch.active_isa()
    try:
        for isa in _dispatch.supported_isas():
            _dispatch.set_isa(isa)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                y, codes, mask = norm_ops.norm_act(*arguments)
                results.append([y, codes, mask, norm_ops.channel_moments(arguments[0]),
                                norm_ops.norm_act_sums(dy, codes, mask),
                                *norm_ops.norm_act_grad(dy, codes, mask, factor, True)])  # fmt: skip
    finally:
        _dispatch.set_isa(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_bad_arguments_are_refused():
    x = torch.randn(4, 5)
    one = torch.ones(5)
    for bad in (x[0], x.t(), x.double(), torch.empty(0, 5)):
        with pytest.raises((TypeError, ValueError), match=r"x must be|no elements"):
            norm_ops.channel_moments(bad)
    with pytest.raises(ValueError, match="scale must have at least 5"):
        norm_ops.norm_act(x, None, one[:4], one, 0.0, 1.0, None, None)
    with pytest.raises(ValueError, match="residual must be"):
        norm_ops.norm_act(x, x[:3], one, one, 0.0, 1.0, None, None)
    _, codes, mask = norm_ops.norm_act(x, None, one, one, 0.0, 1.0, one, one)
    with pytest.raises(ValueError, match="codes must have at least 20"):
        norm_ops.norm_act_sums(x, codes[:2].clone(), mask)
    with pytest.raises(ValueError, match="factor must have at least 15"):
        norm_ops.norm_act_grad(x, codes, mask, one, False)


# ---- batch normalisation and packing in one pass ----

GEOMETRIES = st.sampled_from(["3x3", "3x3 stride 2", "1x1", "images side by side"])


def geometry_of(kind, shape):
    kernel, stride, pad = (1, 1, 0) if kind == "1x1" else (3, 2 if kind == "3x3 stride 2" else 1, 1)
    return conv_geometry(shape[1], 4, shape[2:], (kernel, kernel), (stride, stride), (pad,) * 4, (1, 1), shape[0],
                         kind == "images side by side")  # fmt: skip


def as_images(rows, shape):
    return rows.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)


IMAGES = st.tuples(st.integers(1, 20), st.sampled_from([2, 3, 15, 16, 17, 33, 64, 70, 130]), st.integers(1, 9),
                   st.integers(1, 9))  # fmt: skip


@given(shape=IMAGES, kind=GEOMETRIES, dtype=DTYPES, residual=st.booleans(), per_channel=st.booleans(),
       keep=st.booleans(), save=st.booleans(), scheme=st.sampled_from(["absmax", "standard"]),
       activation=st.sampled_from(["relu", "relu6", "none"]))  # fmt: skip
def test_packing_on_the_way_is_packing_afterwards(isa, shape, kind, dtype, residual, per_channel, keep, save, scheme,
                                                   activation):  # fmt: skip
    geometry = geometry_of(kind, shape)
    arguments = act_arguments((shape[0] * shape[2] * shape[3], shape[1]), dtype, residual, activation)
    if not save:
        arguments = (*arguments[:6], None, None)
    # the kernel quantises what it has before it rounds to dtype
    exact = norm_ops.norm_act(arguments[0].float(), None if arguments[1] is None else arguments[1].float(),
                              *arguments[2:])[0]  # fmt: skip
    ends = torch.stack([exact.amin(0), exact.amax(0)], 1)
    ranges = ends if per_channel else torch.stack([ends[:, 0].amin(), ends[:, 1].amax()])[None]
    grid, views = geometry.input_grid, geometry.input_views
    lanes = grid.lanes(shape[0])
    assert torch.equal(norm_ops.norm_act_range(*arguments[:6]), ends)
    y, codes, mask, planes, scale, zero = norm_ops.norm_act_pack(
        *arguments, shape, ranges, grid.numbers, views, lanes, scheme, per_channel, keep,
    )  # fmt: skip
    wanted = norm_ops.norm_act(*arguments)
    assert torch.equal(codes, wanted[1])
    assert torch.equal(mask, wanted[2])
    assert torch.equal(y, wanted[0] if keep else torch.empty(0, dtype=dtype))
    expected = ops.quantize_pack(as_images(exact, shape), grid.numbers, views, lanes, scheme, None, per_channel)
    for mine, theirs in zip((planes, scale, zero), expected, strict=True):
        assert torch.equal(mine, theirs)


@given(shape=IMAGES, kind=GEOMETRIES, per_channel=st.booleans(), scheme=st.sampled_from(["absmax", "standard"]))
def test_packing_from_codes_is_packing_from_their_numbers(isa, shape, kind, per_channel, scheme):
    geometry = geometry_of(kind, shape)
    codes = torch.randint(0, 256, (shape[0] * shape[2] * shape[3], shape[1]), dtype=torch.uint8)
    scale, shift = torch.randn(shape[1]) / 64, torch.randn(shape[1])
    exact = norm_ops.norm_act(codes.float(), None, scale, shift, 0.0, 6.0, None, None)[0]
    ranges = torch.stack([exact.amin(0), exact.amax(0)], 1)
    if not per_channel:
        ranges = torch.stack([ranges[:, 0].amin(), ranges[:, 1].amax()])[None]
    rest = (scale, shift, 0.0, 6.0, None, None, shape, ranges, geometry.input_grid.numbers, geometry.input_views,
            geometry.input_grid.lanes(shape[0]), scheme, per_channel, False)  # fmt: skip
    expected = norm_ops.norm_act_pack(codes.float(), None, *rest)
    for mine, theirs in zip(norm_ops.norm_act_pack(codes, None, *rest), expected, strict=True):
        assert torch.equal(mine, theirs.to(mine.dtype))


def test_codes_are_refused_where_they_mean_nothing():
    codes, one = torch.zeros(8, 5, dtype=torch.uint8), torch.ones(5)
    geometry = geometry_of("1x1", (2, 5, 2, 2))
    rest = ((2, 5, 2, 2), torch.zeros(5, 2), geometry.input_grid.numbers, geometry.input_views,
            geometry.input_grid.lanes(2), "absmax", True)  # fmt: skip
    with pytest.raises(TypeError, match="neither with a residual nor with codes"):
        norm_ops.norm_act_pack(codes, codes, one, one, 0.0, 6.0, None, None, *rest, False)
    with pytest.raises(TypeError, match="neither with a residual nor with codes"):
        norm_ops.norm_act_pack(codes, None, one, one, 0.0, 6.0, one, one, *rest, False)
    for call in (lambda: norm_ops.norm_act_pack(codes, None, one, one, 0.0, 6.0, None, None, *rest, True),
                 lambda: norm_ops.norm_act(codes, None, one, one, 0.0, 6.0, None, None),
                 lambda: norm_ops.norm_act_range(codes, None, one, one, 0.0, 6.0)):  # fmt: skip
        with pytest.raises(TypeError, match="x must be of dtype"):
            call()
    with pytest.raises(ValueError, match="contiguous"):
        norm_ops.norm_act_pack(codes.t(), None, one, one, 0.0, 6.0, None, None, *rest, False)


@given(shape=IMAGES, kind=GEOMETRIES, dtype=DTYPES, residual=st.booleans(), per_channel=st.booleans(),
       scheme=st.sampled_from(["stochastic", "symmetric", "luq"]))  # fmt: skip
def test_packing_the_gradient_on_the_way(isa, shape, kind, dtype, residual, per_channel, scheme):
    geometry = geometry_of(kind, shape)
    grid, views = geometry.input_grid, geometry.input_views
    size = (shape[0] * shape[2] * shape[3], shape[1])
    _, codes, mask = norm_ops.norm_act(*act_arguments(size, dtype, False, "relu"))
    dy, factor = torch.randn(size).to(dtype), torch.randn(3, shape[1])
    exact, dresidual = norm_ops.norm_act_grad(dy.float(), codes, mask, factor, True)
    most = exact.abs().amax(0) if per_channel else exact.abs().amax()[None]
    lanes, seed = grid.lanes(shape[0]), torch.tensor(5)
    *packed, given_back = norm_ops.norm_act_grad_pack(
        dy, codes, mask, factor, residual, shape, torch.stack([-most, most], 1), grid.numbers, views, lanes, scheme,
        seed, per_channel,
    )  # fmt: skip
    expected = ops.quantize_pack(as_images(exact, shape), grid.numbers, views, lanes, scheme, seed, per_channel)
    for mine, theirs in zip(packed, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(given_back, dresidual.to(dtype) if residual else torch.empty(0, dtype=dtype))


# ---- a product with limits ----


def test_limits_need_a_bias():
    conv = sparse(nn.Conv2d(6, 8, 3, padding=1))
    plan = conv._plan(conv_geometry(6, 8, (5, 5), (3, 3), (1, 1), (1,) * 4, (1, 1), 2, False), 1)
    grid = plan.geometry.input_grid
    x = torch.randn(2, 6, 5, 5)
    packed = ops.quantize_pack(x, grid.numbers, plan.geometry.input_views, grid.lanes(2), "absmax", None)
    rest = (list(plan.forward), grid.numbers, plan.geometry.output_views, (2, 8, 5, 5), torch.float32, None, True)
    for bias, limits in ((None, [0.0, 1.0]), (torch.zeros(8), [1.0])):
        with pytest.raises(ValueError, match="limits must be two numbers, and need a bias"):
            ops.packed_forward(*packed, conv.weight.detach(), bias, *rest, None, limits)
    y = ops.packed_forward(*packed, conv.weight.detach(), torch.zeros(8), *rest, None, [0.0, 0.5])
    assert y.min() == 0
    assert y.max() == 0.5
