"""Operators of activations, against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from qsparseprop import activation_ops, ops, reference
from qsparseprop._kernels import _dispatch
from qsparseprop.geometry import linear_geometry
from qsparseprop.nn.deferred import passes

NAMES = ["relu", "relu6", "gelu", "gelu_tanh"]
FUNCTIONS = {
    "relu": torch.relu,
    "relu6": functional.relu6,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
SHAPES = st.tuples(st.integers(1, 200), st.sampled_from([1, 2, 3, 15, 16, 17, 33, 64, 70, 130]))
PACKED_SHAPES = st.tuples(st.integers(1, 200), st.sampled_from([2, 3, 15, 16, 17, 33, 64, 70, 130]))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SPREADS = st.sampled_from([1e-3, 1.0, 4.0, 1e4, 1e30])


def output_range(x, name):
    """Bounds of what an activation gives for each channel, as blocks have them."""
    limits = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
    activation = passes.Activation("clamp", limits[name]) if name in limits else passes.Activation(name)
    return passes.output_range(x, None, None, activation, None)


@given(shape=SHAPES, dtype=DTYPES, spread=SPREADS, name=st.sampled_from(NAMES), save=st.booleans())
def test_values_and_codes_are_those_of_plain_torch(isa, shape, dtype, spread, name, save):
    x = (torch.randn(shape) * spread).to(dtype)
    y, saved = activation_ops.act(x, name, save)
    wanted, wanted_saved = reference.act(x, name, save)
    assert torch.equal(y, wanted)
    assert torch.equal(saved, wanted_saved)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_slopes_are_right(name):
    x = torch.cat([torch.linspace(-20, 20, 400_001), torch.logspace(-30, 37, 100), -torch.logspace(-30, 37, 100)])
    y, saved = activation_ops.act(x[None], name, True)
    exact = x.double().requires_grad_()
    wanted = FUNCTIONS[name](exact)
    (slope,) = torch.autograd.grad(wanted.sum(), exact)
    assert ((y[0] - wanted).abs() <= 5e-7 * x.abs().clamp(min=1)).all()
    mine = activation_ops.act_grad(torch.ones_like(x)[None], saved, name)[0]
    # half a step of 1/200, and the rounding of float32
    assert (mine - slope).abs().max() < (0.0025 + 1e-6 if name.startswith("gelu") else 1e-12)
    if name.startswith("gelu"):  # what is cut off or passes has no error
        assert (mine[x < -6] == 0).all()
        assert ((mine[x > 6] - 1).abs() < 1e-7).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_as_in_torch(isa, name):
    x = torch.tensor([[math.nan, math.inf, 1.0, -1.0]])
    y, _ = activation_ops.act(x, name, True)
    # float64: torch's float32 GELU is another library's on some processors, which makes NaN of infinity
    torch.testing.assert_close(y, FUNCTIONS[name](x.double()).float(), equal_nan=True)
    ranges = output_range(torch.cat([x, -x]), name)
    assert ranges[0].isnan().all()
    assert ranges[1].isfinite().all() == (name == "relu6")  # which limits what is not finite
    assert ranges[2:].isfinite().all()


@given(shape=SHAPES, dtype=DTYPES, spread=SPREADS, name=st.sampled_from(NAMES))
def test_gradient_is_that_of_plain_torch(isa, shape, dtype, spread, name):
    _, saved = activation_ops.act(torch.randn(shape) * 3, name, True)
    dy = (torch.randn(shape) * spread).to(dtype)
    assert torch.equal(activation_ops.act_grad(dy, saved, name), reference.act_grad(dy, saved, name))
    exact = reference.act_grad(dy.float(), saved, name)
    total, greatest = activation_ops.act_sums(dy, saved, name).unbind(1)
    torch.testing.assert_close(total, exact.double().sum(0), rtol=1e-5, atol=1e-4 * spread)
    assert torch.equal(greatest, exact.abs().double().amax(0))


@given(shape=SHAPES, spread=SPREADS, name=st.sampled_from(NAMES))
def test_range_holds_the_result(shape, spread, name):
    x = torch.randn(shape) * spread
    least, most = output_range(x, name).unbind(1)
    y, _ = activation_ops.act(x, name, False)
    rounding = 1e-6 * x.abs().amax(0).clamp(min=1)
    assert (y.amin(0) >= least - rounding).all()
    torch.testing.assert_close(y.amax(0), most, rtol=1e-5, atol=1e-6)
    # where GELU's least value lies within a channel's range it is taken for the channel's
    inside = (x.amin(0) < -0.75) & (x.amax(0) > -0.76) & torch.tensor(name.startswith("gelu"))
    torch.testing.assert_close(least[~inside], y.amin(0)[~inside], rtol=1e-5, atol=1e-6)
    assert (least[inside] > -0.1701).all()


@given(shape=PACKED_SHAPES, dtype=DTYPES, name=st.sampled_from(NAMES), per_channel=st.booleans(), keep=st.booleans(),
       save=st.booleans(), scheme=st.sampled_from(["absmax", "symmetric", "standard"]))  # fmt: skip
def test_packing_on_the_way_is_packing_afterwards(isa, shape, dtype, name, per_channel, keep, save, scheme):
    geometry = linear_geometry(shape[1], 5)
    x = (torch.randn(shape) * 3).to(dtype)
    exact, saved = activation_ops.act(x.float(), name, save)  # packed is what there is before it is rounded to dtype
    ends = torch.stack([exact.amin(0), exact.amax(0)], 1)
    ranges = ends if per_channel else torch.stack([ends[:, 0].amin(), ends[:, 1].amax()])[None]
    grid, views = geometry.input_grid, geometry.input_views
    lanes = grid.lanes(shape[0])
    y, own_saved, *packed = activation_ops.act_pack(x, name, save, (*shape, 1, 1), ranges, grid.numbers, views, lanes,
                                                    scheme, per_channel, keep)  # fmt: skip
    assert torch.equal(own_saved, saved)
    assert torch.equal(y, exact.to(dtype) if keep else torch.empty(0, dtype=dtype))
    expected = ops.quantize_pack(exact[..., None, None], grid.numbers, views, lanes, scheme, None, per_channel)
    for mine, theirs in zip(packed, expected, strict=True):
        assert torch.equal(mine, theirs)


@given(shape=PACKED_SHAPES, dtype=DTYPES, name=st.sampled_from(NAMES), per_channel=st.booleans(),
       scheme=st.sampled_from(["stochastic", "symmetric", "luq"]))  # fmt: skip
def test_packing_the_gradient_on_the_way(isa, shape, dtype, name, per_channel, scheme):
    geometry = linear_geometry(5, shape[1])
    _, saved = activation_ops.act(torch.randn(shape) * 2, name, True)
    dy = torch.randn(shape).to(dtype)
    exact = activation_ops.act_grad(dy.float(), saved, name)
    most = exact.abs().amax(0) if per_channel else exact.abs().amax()[None]
    grid, views, seed = geometry.output_grid, geometry.output_views, torch.tensor(3)
    lanes = grid.lanes(shape[0])
    packed = activation_ops.act_grad_pack(dy, saved, name, (*shape, 1, 1), torch.stack([-most, most], 1), grid.numbers,
                                          views, lanes, scheme, seed, per_channel)  # fmt: skip
    expected = ops.quantize_pack(exact[..., None, None], grid.numbers, views, lanes, scheme, seed, per_channel)
    for mine, theirs in zip(packed, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_all_threads_and_instruction_sets_agree():
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(5000, 70, generator=generator) * 3, torch.randn(5000, 70, generator=generator)
    results = []
    before, threads_before = _dispatch.active_isa(), torch.get_num_threads()
    try:
        for isa in _dispatch.supported_isas():
            _dispatch.set_isa(isa)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                result = []
                for name in NAMES:
                    y, saved = activation_ops.act(x, name, True)
                    result += [y, saved, activation_ops.act_sums(dy, saved, name),
                               activation_ops.act_grad(dy, saved, name)]  # fmt: skip
                results.append(result)
    finally:
        _dispatch.set_isa(before)
        torch.set_num_threads(threads_before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_bad_arguments_are_refused():
    x = torch.randn(4, 5)
    for bad in (x[0], x.t(), x.double()):
        with pytest.raises((TypeError, ValueError), match="x must be"):
            activation_ops.act(bad, "relu", True)
    with pytest.raises(ValueError, match="the activation must be one of relu, relu6, gelu, gelu_tanh, got 'swish'"):
        activation_ops.act(x, "swish", True)
    _, saved = activation_ops.act(x, "gelu", True)
    for call in (activation_ops.act_sums, activation_ops.act_grad):
        with pytest.raises(ValueError, match="saved must have at least 20"):
            call(x, saved[:3].clone(), "gelu")
        with pytest.raises(TypeError, match="saved must be"):
            call(x, saved, "relu")
    grid, views = linear_geometry(5, 5).input_grid, linear_geometry(5, 5).input_views
    ranges = torch.zeros(5, 2)
    rest = (grid.numbers, views, grid.lanes(4))
    with pytest.raises(ValueError, match="the scheme 'sawb' cannot be combined"):
        activation_ops.act_pack(x, "relu", True, (4, 5, 1, 1), ranges, *rest, "sawb", True, False)
    with pytest.raises(ValueError, match="the images must have"):
        activation_ops.act_pack(x, "relu", True, (3, 5, 1, 1), ranges, *rest, "absmax", True, False)
    with pytest.raises(ValueError, match="the scheme 'standard' cannot be combined"):
        activation_ops.act_grad_pack(x, saved, "gelu", (4, 5, 1, 1), ranges, *rest, "standard", None, True)
    with pytest.raises(ValueError, match="needs a seed"):
        activation_ops.act_grad_pack(x, saved, "gelu", (4, 5, 1, 1), ranges, *rest, "stochastic", None, True)
