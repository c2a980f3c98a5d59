"""Blocks of convolution, batch normalisation, addition and activation, against torch's modules in float64."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qsparseprop import norm_ops, ops
from qsparseprop._kernels import _dispatch
from qsparseprop.geometry import conv_geometry
from qsparseprop.nn import QuantizedSparseConv2d
from qsparseprop.nn._handover import PackedInput, unpack
from qsparseprop.nn.intrinsic import (
    QuantizedBNReLU2d,
    QuantizedSparseConvBn2d,
    QuantizedSparseConvBnAddReLU2d,
    QuantizedSparseConvBnReLU2d,
)
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils.models import resnet20
from qsparseprop.utils.network_utils import swap_modules_with_dense, swap_modules_with_sparse

from ._helpers import set_weight

SHAPES = st.tuples(st.integers(1, 70), st.sampled_from([1, 3, 15, 16, 17, 33, 64, 70, 128]))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def sparse_conv(inputs, outputs, **settings):
    dense = nn.Conv2d(inputs, outputs, 3, padding=1, **settings)
    with torch.no_grad():
        dense.weight.mul_(torch.rand_like(dense.weight) > 0.8)
    return QuantizedSparseConv2d.from_dense(dense)


def batch_norm(channels, **settings):
    norm = nn.BatchNorm2d(channels, **settings)
    if norm.affine:
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    if norm.running_mean is not None:
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return norm


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- operators ----


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


# ---- blocks ----


def reference(conv, norm, x, residual, low, high):
    """The block's output in float64 behind the same quantised convolution, whose output gets a gradient."""
    z = conv(x.detach()).detach().double().requires_grad_()
    norm = copy.deepcopy(norm).double()
    y = norm(z) + (0 if residual is None else residual)
    return z, norm, y.clamp(low, high)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}])
@pytest.mark.parametrize("kind", [QuantizedSparseConvBn2d, QuantizedSparseConvBnReLU2d, QuantizedSparseConvBnAddReLU2d])
def test_block_is_torchs_modules(kind, settings, training):
    torch.manual_seed(0)
    conv, norm = sparse_conv(12, 20), batch_norm(20, **settings).train(training)
    block = kind.fuse(conv, norm, 6.0)
    x = torch.randn(9, 12, 7, 5, requires_grad=True)
    residual = torch.randn(9, 20, 7, 5, requires_grad=True) if kind is QuantizedSparseConvBnAddReLU2d else None
    summand = None if residual is None else residual.detach().double().requires_grad_()
    z, exact, expected = reference(conv, norm, x, summand, block.low, block.high)
    y = block(x, residual)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for name, value in exact.named_buffers():
        torch.testing.assert_close(dict(norm.named_buffers())[name].double(), value.double(), rtol=1e-5, atol=1e-6)

    dy = torch.randn_like(y)
    torch.manual_seed(1)
    y.backward(dy)
    expected.backward(dy.double())
    if norm.affine:
        assert relative(norm.weight.grad, exact.weight.grad) < 0.02
        assert relative(norm.bias.grad, exact.bias.grad) < 1e-5
    if residual is not None:
        assert torch.equal(residual.grad.double(), summand.grad)
    # the convolution's own gradients from float64's gradient of its output, with the same random numbers
    plain, x_plain = copy.deepcopy(conv), x.detach().clone(memory_format=torch.channels_last).requires_grad_()
    plain.zero_grad()
    torch.manual_seed(1)
    plain(x_plain).backward(z.grad.float())
    assert relative(x.grad, x_plain.grad) < 0.02
    assert relative(block.weight.grad, plain.weight.grad) < 0.02


@pytest.mark.parametrize("settings", [{}, {"affine": False}])
@pytest.mark.parametrize("qconfig", [QuantConfig(), QuantConfig(granularity="tensor"), QuantConfig(input="standard")])
@pytest.mark.parametrize("kind", [QuantizedSparseConvBn2d, QuantizedSparseConvBnReLU2d])
@pytest.mark.parametrize("channels", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_is_one_pass(isa, kind, settings, qconfig, channels, dtype, monkeypatch):
    torch.manual_seed(0)
    conv, norm = sparse_conv(12, channels), batch_norm(channels, **settings).eval()
    conv.qconfig = qconfig
    block = kind.fuse(conv, norm, 1.0)
    x = torch.randn(9, 12, 7, 5).to(dtype)
    z = conv(x.float()).detach().double()
    expected = copy.deepcopy(norm).double()(z).clamp(block.low, block.high)
    with monkeypatch.context() as patch, torch.inference_mode():
        for name in ("norm_act", "norm_act_pack", "channel_moments"):
            patch.setattr(norm_ops, name, None)
        y = block(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


def expected_gradients(block, y, dy, x_shape):
    """What the gradients are on average, in float64, from what the block has saved: of the input, and of the values."""
    codes, mask, gamma, rstd, slope, offset, values, planes, x_scale, x_zero = y.grad_fn.saved_tensors
    shape = tuple(y.shape)
    passes = ((mask[:, :, None] >> torch.arange(16)) & 1).reshape(len(codes), -1)[:, : shape[1]]
    g = dy.double().permute(0, 2, 3, 1).reshape(codes.shape) * passes
    normalised = codes * slope + offset
    dz = gamma * rstd * (g - g.mean(0) - normalised * (g * normalised).mean(0))
    dz = as_images(dz, shape)
    plan = block._plan(block._geometry(x_shape[0], x_shape[2:]), 1)
    weights, scale, _ = ops.quantize_weight(values, plan.backward.index, plan.backward.group_ptr)
    row = torch.repeat_interleave(torch.arange(len(scale)), 4 * plan.backward.group_ptr.diff())
    used = plan.backward.index >= 0
    in_codes = torch.zeros(len(values), dtype=torch.float64)
    in_codes[plan.backward.index[used].long()] = (weights * scale.double()[row])[used]
    dense = torch.zeros(block.weight_shape, dtype=torch.float64).masked_scatter_(block.mask(), in_codes)
    x = unpack(PackedInput(planes, x_scale, x_zero, plan.geometry, "absmax", "tensor"), x_shape, torch.float64)
    dx = torch.nn.grad.conv2d_input(x_shape, dense, dz, padding=1)
    dweight = torch.nn.grad.conv2d_weight(x, block.weight_shape, dz, padding=1)
    return dx, dweight[block.mask()]


def test_gradients_have_no_bias():
    torch.manual_seed(0)
    conv, norm = sparse_conv(6, 8), batch_norm(8)
    conv.qconfig = QuantConfig(granularity="tensor")
    block = QuantizedSparseConvBnReLU2d.fuse(conv, norm)
    x, dy = torch.randn(4, 6, 5, 5), torch.randn(4, 8, 5, 5)
    draws = []
    for seed in range(1000):
        torch.manual_seed(seed)
        x_seed = x.clone().requires_grad_()
        y = block(x_seed)
        if seed == 0:
            expected = torch.cat([t.flatten() for t in expected_gradients(block, y, dy, x.shape)])
        block.weight.grad = None
        y.backward(dy)
        draws.append(torch.cat([x_seed.grad.flatten(), block.weight.grad.flatten()]))
    draws = torch.stack(draws).double()
    error = (draws.mean(0) - expected).abs()
    standard = draws.std(0) / math.sqrt(len(draws))
    assert (error <= 5 * standard + 1e-6 * expected.abs()).all()
    total = draws.sum(1)
    assert abs(total.mean() - expected.sum()) < 5 * total.std() / math.sqrt(len(draws))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("high", [math.inf, 6.0])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_a_block_without_a_convolution_is_torchs_modules(settings, residual, high, training):
    torch.manual_seed(0)
    norm = batch_norm(37, **settings)
    exact = copy.deepcopy(norm).double()
    block = QuantizedBNReLU2d.fuse(norm, high)
    assert list(block.state_dict()) == list(exact.state_dict())
    assert isinstance(block, nn.BatchNorm2d)
    inputs = [torch.randn(5, 37, 6, 7, requires_grad=True) for _ in range(1 + residual)]
    twins = [t.detach().double().requires_grad_() for t in inputs]
    block.train(training)
    exact.train(training)
    y = block(*inputs)
    expected = sum([exact(twins[0]), *twins[1:]]).clamp(0, high)
    assert relative(y, expected) < 1e-6
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.double())
    for mine, theirs in zip([*inputs, *block.parameters()], [*twins, *exact.parameters()], strict=True):
        # what batch normalisation read is kept in 8 bits: half a step is 0.014 of a normal distribution's deviation
        assert relative(mine.grad, theirs.grad) < (5e-3 if mine.ndim == 4 else 1.4e-2)
    for mine, theirs in zip(block.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-5, atol=1e-6)
    plain = block.unfuse()
    assert type(plain) is nn.BatchNorm2d
    assert plain.weight is block.weight


def test_a_block_without_a_convolution_leaves_other_inputs_to_torch():
    block = QuantizedBNReLU2d.fuse(nn.BatchNorm2d(4))
    double = QuantizedBNReLU2d.fuse(nn.BatchNorm2d(4, dtype=torch.float64))
    x = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(double(x.double()).float(), block(x))
    with pytest.raises(ValueError, match="expected 4D input"):
        block(x[0])
    with pytest.raises(RuntimeError, match="running_mean"):
        block(x[:, :3])
    for residual in (x[:1], 2.0, torch.randn(4, 1, 1), x.double(), x.to(torch.bfloat16)):  # as torch's modules add them
        y = block.unfuse()(x) + residual
        torch.testing.assert_close(block(x, residual), y.relu())
    with pytest.raises(ValueError, match="the residual must have shape"):
        block(x, x[:2])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(x[:1, :, :1, :1])
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.BatchNorm2d"):
        QuantizedBNReLU2d.fuse(nn.BatchNorm1d(4))


def test_second_derivatives_through_a_block_without_a_convolution_are_refused():
    block = QuantizedBNReLU2d.fuse(nn.BatchNorm2d(4))
    x = torch.randn(3, 4, 2, 2, requires_grad=True)
    (dx,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    assert dx.requires_grad
    with pytest.raises(NotImplementedError, match="once only"):
        dx.square().sum().backward()
    y = block(x)
    first, second = (torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_limits_need_a_bias():
    conv = sparse_conv(6, 8)
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


def test_one_value_per_channel_raises_as_in_torch():
    block = QuantizedSparseConvBn2d.fuse(sparse_conv(2, 3), batch_norm(3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 2, 1, 1))
    block.norm.eval()
    assert block(torch.randn(1, 2, 1, 1)).shape == (1, 3, 1, 1)


def test_bad_blocks_and_inputs_are_refused():
    conv, norm = sparse_conv(2, 3), batch_norm(3)
    with pytest.raises(TypeError, match="expects a QuantizedSparseConv2d"):
        QuantizedSparseConvBn2d.fuse(nn.Conv2d(2, 3, 3), norm)
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.BatchNorm2d"):
        QuantizedSparseConvBn2d.fuse(conv, nn.SyncBatchNorm(3))
    with pytest.raises(ValueError, match="4 features"):
        QuantizedSparseConvBn2d.fuse(conv, nn.BatchNorm2d(4))
    block = QuantizedSparseConvBnAddReLU2d.fuse(conv, norm)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(ValueError, match="residual must have shape"):
        block(torch.randn(2, 2, 4, 4), torch.randn(2, 3, 4, 5))
    with pytest.raises(ValueError, match="expects"):
        block(torch.randn(2, 5, 4, 4))
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


def test_dtypes_follow_autocast():
    block = QuantizedSparseConvBnReLU2d.fuse(sparse_conv(4, 6), batch_norm(6))
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert block(x.detach().double()).dtype == torch.float64
    with torch.no_grad():
        assert block(x).grad_fn is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
def test_derivatives_that_do_not_exist_are_explained():
    block = QuantizedSparseConvBnReLU2d.fuse(sparse_conv(4, 6), batch_norm(6))
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="once only"):
        grad.sum().backward()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        block(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()))


def test_check_finite_names_the_tensor():
    conv = QuantizedSparseConv2d.from_dense(nn.Conv2d(2, 3, 3), qconfig=QuantConfig(check_finite=True))
    block = QuantizedSparseConvBn2d.fuse(conv, batch_norm(3))
    with pytest.raises(ValueError, match="the input has NaN or Inf"):
        block(torch.full((2, 2, 5, 5), math.nan))
    y = block(torch.randn(2, 2, 5, 5))
    with pytest.raises(ValueError, match="gradient of the output has NaN or Inf"):
        y.backward(torch.full_like(y, math.inf))


def test_a_fused_model_compiles():
    model = swapped(pruned(Vgg()), (2, 3, 8, 8), fuse=True).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x), rtol=1e-3, atol=1e-3)


# ---- models ----


def pruned(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.in_channels > 3:
                module.weight.mul_(torch.rand_like(module.weight) > 0.9)
    return model


def swapped(model, shape, **settings):
    return swap_modules_with_sparse(model, shape, inplace=False, verbose=False, include_dense=False, min_sparsity=0.5,
                                    **settings)  # fmt: skip


class Vgg(nn.Module):
    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (16, 32, "pool", 48, 48):
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(channels, 10)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class Body(Vgg):
    def forward(self, x):
        return self.features(x)


class Mobile(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.expand, self.norm1 = nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.depthwise, self.norm2 = nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), nn.BatchNorm2d(64)
        self.project, self.norm3 = nn.Conv2d(64, 16, 1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.stem(x)
        y = nn.functional.relu6(self.norm1(self.expand(x)))
        y = nn.functional.relu6(self.norm2(self.depthwise(y)))
        return (x + self.norm3(self.project(y))).mean((2, 3))


class Branching(Vgg):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


@pytest.mark.parametrize(("make", "fused", "of", "alone"), [
    (resnet20, 18, 18, 1), (Vgg, 3, 3, 1), (Mobile, 3, 3, 0), (Branching, 0, 3, 0),
])  # fmt: skip
def test_models_are_fused_where_possible_and_right_everywhere(make, fused, of, alone):
    torch.manual_seed(0)
    model = pruned(make())
    shape = (4, 3, 12, 12)
    plain, blocks = swapped(model, shape), swapped(model, shape, fuse=True)
    reasons = [d.reason for d in blocks.swap_report.swapped]
    assert len(reasons) == of
    assert sum(r.startswith("fused with") for r in reasons) == fused, reasons
    assert all("cannot trace" in r for r in reasons if not r.startswith("fused"))
    # those behind dense convolutions
    norms = [d for d in blocks.swap_report if d.kind == "BatchNorm2d"]
    assert len(norms) == sum(type(m) is QuantizedBNReLU2d for m in blocks.modules()) == alone
    assert all(d.reason == "fused with ReLU" and not d.swapped for d in norms)
    assert list(plain.state_dict()) == list(blocks.state_dict())
    x = torch.randn(shape)
    for mode in (True, False):
        plain.train(mode)
        blocks.train(mode)
        torch.testing.assert_close(blocks(x), plain(x), rtol=2e-2, atol=2e-2)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(blocks.state_dict()[name], value, rtol=2e-2, atol=2e-2)
    blocks.load_state_dict(plain.state_dict())
    plain.load_state_dict(blocks.state_dict())
    again = copy.deepcopy(blocks)
    assert torch.equal(again(x), blocks(x))
    optimizer = torch.optim.SGD(again.parameters(), 0.1)
    again(x).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    optimizer.step()
    assert not torch.equal(again(x), blocks(x))  # a copy shares nothing
    dense = swap_modules_with_dense(blocks, inplace=False).eval()
    assert not any(isinstance(m, (QuantizedSparseConv2d, QuantizedBNReLU2d)) for m in dense.modules())
    assert type(dense) is type(model)
    torch.testing.assert_close(dense(x), plain.eval()(x), rtol=0.1, atol=0.1)


class Stem(nn.Module):
    """What follows a dense convolution, in many ways, and a sparse one behind it."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.shift = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.conv, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        h = self.stem(x)
        if self.way == "broadcast":
            h = torch.relu(self.norm(h) + self.shift)
        elif self.way == "number":
            h = torch.relu(self.norm(h) + x.size(0))
        elif self.way == "keyword":
            h = torch.relu(self.norm(input=h))
        elif self.way == "input changed":
            y = self.norm(h)
            h.mul_(0)
            h = torch.relu(y) + h
        elif self.way == "summand changed":
            skip = h * 1
            skip += self.norm(h)
            h = torch.relu(skip) + skip
        elif self.way == "two readers":
            y = self.norm(h)
            h = torch.relu(y) + y
        return torch.relu(self.last(self.conv(h)))


@pytest.mark.parametrize(("way", "fused"), [
    ("broadcast", True), ("number", True), ("keyword", False), ("input changed", False), ("summand changed", False),
    ("two readers", False),
])  # fmt: skip
def test_graphs_are_changed_only_where_that_changes_nothing(way, fused):
    torch.manual_seed(0)
    model = pruned(Stem(way)).eval()
    blocks = swapped(model, (2, 3, 8, 8), fuse=True)
    plain = swapped(model, (2, 3, 8, 8))
    assert (type(blocks.norm) is QuantizedBNReLU2d) == fused
    assert blocks.swap_report.swapped[0].reason.startswith("fused")
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(blocks(x), plain(x), rtol=2e-2, atol=2e-2)


def test_fused_models_within_others_and_layers_that_were_sparse_before():
    torch.manual_seed(0)
    inner = swapped(pruned(Body()), (2, 3, 8, 8), fuse=True)
    model = nn.Sequential(inner, nn.Conv2d(48, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    model[1].weight.data[:, 8:] = 0
    swap_modules_with_sparse(model, (2, 3, 8, 8), fuse=True, verbose=False, include_dense=False, min_sparsity=0.5)
    assert {d.name: d.reason for d in model.swap_report}["1"] == "fused with 2, ReLU"
    assert not any(d.kind == "BatchNorm2d" for d in model.swap_report)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 8, 4, 4)
    text = str(swapped(pruned(Vgg()), (2, 3, 8, 8), fuse=True).swap_report)
    assert "dense: fused" not in text


def test_hooks_and_shared_modules_are_left_alone():
    torch.manual_seed(0)
    model = pruned(Vgg())
    model.features[4].register_forward_hook(lambda *_: None)  # a BatchNorm2d
    reasons = {d.name: d.reason for d in swapped(model, (2, 3, 8, 8), fuse=True).swap_report.swapped}
    assert "hooks" in reasons["features.3"]
    assert reasons["features.7"].startswith("fused")
    with pytest.raises(ValueError, match="fuse=True only goes with quantize=True"):
        swapped(model, (2, 3, 8, 8), fuse=True, quantize=False)


def test_saved_tensors_are_two_bytes_an_activation():
    torch.manual_seed(0)
    block = QuantizedSparseConvBnReLU2d.fuse(sparse_conv(32, 32), batch_norm(32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = block(torch.randn(64, 32, 16, 16, requires_grad=True))
    activations = sum(t.nbytes for t in saved if t.dtype in (torch.uint8, torch.int16))
    assert activations < 2.6 * y.numel()  # input with its padding, output, mask


@pytest.mark.parametrize("handed_over", [False, True])
@pytest.mark.parametrize("kind", [nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.Hardsigmoid, nn.Mish])
def test_what_follows_a_block_may_work_in_place(kind, handed_over):
    """As behind the parts of the block, with the gradients that it has out of place."""
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), kind(inplace=inplace), nn.Conv2d(32, 8, 3))
        net = net if handed_over else net[:3]
        for layer in net:
            if isinstance(layer, nn.Conv2d):
                set_weight(layer, 0.1, 0)
        x = torch.randn(2, 3, 9, 9)
        swap_modules_with_sparse(net, x, include_dense=False, verbose=False, fuse=True)
        torch.manual_seed(1)
        y = net(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in net.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
