"""Activations behind linear layers: the operators against plain torch, blocks against torch's modules."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qsparseprop.nn._handover import PackedTensor, handed_over
from qsparseprop.nn._linear_act import FUNCTIONS, output_range
from qsparseprop.nn.intrinsic import QuantizedSparseLinearAct
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from qsparseprop import activation_ops, ops, reference
from qsparseprop._kernels import _dispatch
from qsparseprop.geometry import linear_geometry
from qsparseprop.nn import QuantizedSparseLinear, _linear_act
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils.fusion import unfuse_modules
from qsparseprop.utils.measurement_utils import saved_for_backward_bytes
from qsparseprop.utils.models import vit_tiny
from qsparseprop.utils.network_utils import (
    swap_modules_for_state,
    swap_modules_with_dense,
    swap_modules_with_sparse,
)

NAMES = ["relu", "relu6", "gelu", "gelu_tanh"]
SHAPES = st.tuples(st.integers(1, 200), st.sampled_from([1, 2, 3, 15, 16, 17, 33, 64, 70, 130]))
PACKED_SHAPES = st.tuples(st.integers(1, 200), st.sampled_from([2, 3, 15, 16, 17, 33, 64, 70, 130]))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SPREADS = st.sampled_from([1e-3, 1.0, 4.0, 1e4, 1e30])


# ---- operators ----


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


# ---- blocks ----


def sparse_linear(inputs, outputs, bias=True, **settings):
    dense = nn.Linear(inputs, outputs, bias)
    with torch.no_grad():
        dense.weight.mul_(torch.rand_like(dense.weight) > 0.7)
    return QuantizedSparseLinear.from_dense(dense, qconfig=QuantConfig(**settings))


def prune(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(torch.rand_like(module.weight) > 0.8)
    return model


def swap(model, shape, fuse=True, **settings):
    return swap_modules_with_sparse(model, shape, inplace=False, fuse=fuse, include_dense=False, min_sparsity=0.5,
                                    verbose=False, qconfig=QuantConfig(**settings))  # fmt: skip


def mlp(*activations, width=40):
    layers = [nn.Linear(24, width)]
    for activation in activations:
        layers += [activation, nn.Linear(width, width)]
    return prune(nn.Sequential(*layers))


def run(model, x, seed=1):
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [y.detach() * 1, x.grad, *grads]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("settings", [{}, {"granularity": "tensor"}, {"grad": "absmax"}, {"grad": "dithered"},
                                      {"grad_weight": "float32"}])  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [None, *NAMES])
def test_a_block_is_the_layer_and_its_activation(name, bias, settings):
    torch.manual_seed(0)
    linear = sparse_linear(24, 40, bias, **{"grad": "absmax", **settings})
    block = QuantizedSparseLinearAct.fuse(copy.deepcopy(linear), name)
    # the gradient of what is before the activation is quantised in both, from nearly the same range
    dithered = settings.get("grad") == "dithered"
    for x in (torch.randn(7, 24), torch.randn(2, 3, 5, 24), torch.randn(24)):
        mine = run(block, x)
        theirs = run(nn.Sequential(linear, nn.Identity() if name is None else Function(name)), x)
        assert mine[0].shape == theirs[0].shape
        assert relative(mine[0], theirs[0]) < 1e-6
        for a, b in zip(mine[1:], theirs[1:], strict=True):
            assert relative(a, b) < (0.3 if dithered else 0.02)
    x = torch.randn(3, 48)[:, ::2]
    assert torch.equal(block(x), block(x.contiguous()))
    assert block(torch.empty(0, 24)).shape == (0, 40)


class Function(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.function = FUNCTIONS[name]

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("settings", [{}, {"granularity": "tensor"}, {"input": "standard"}, {"input": "sawb"},
                                      {"grad_weight": "float32"}])  # fmt: skip
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.GELU(), nn.GELU(approximate="tanh")])
def test_packed_activations_are_the_unpacked_ones(activation, settings):
    torch.manual_seed(0)
    model = swap(mlp(activation, activation), (4, 24), **settings)
    plain = copy.deepcopy(model)
    plain.forward.hand_over = False
    x = torch.randn(70, 24)
    packed = []
    model[2].register_forward_pre_hook(lambda _, args: packed.append(type(args[0]) is PackedTensor))
    mine, theirs = run(model, x), run(plain, x)
    wanted = settings.get("input") != "sawb" and "grad_weight" not in settings
    assert packed == [wanted]
    # GELU's least value is bounded, not found: its scale may differ by a little
    exact = type(activation) is not nn.GELU
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b) if exact else relative(a, b) < 0.02


def test_gradients_have_no_bias():
    """The mean over seeds is float64's gradient with the slopes that were saved."""
    torch.manual_seed(0)
    linear = sparse_linear(24, 40, granularity="tensor")
    with torch.no_grad():
        linear.weight.sign_()  # in 8 bits without an error
    block = QuantizedSparseLinearAct.fuse(linear, "gelu")
    x, dy = torch.randn(70, 24), torch.randn(70, 40)
    z = QuantizedSparseLinear.forward(block, x).detach()
    dz = reference.act_grad(dy, reference.act(z, "gelu", True)[1], "gelu").double()
    seeds, total, square = 1000, 0.0, 0.0
    for seed in range(seeds):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(seed)
        block(leaf).backward(dy)
        total, square = total + leaf.grad.double(), square + leaf.grad.double() ** 2
    mean = total / seeds
    error = ((square / seeds - mean**2).clamp(min=0) / seeds).sqrt()
    difference = mean - dz @ block.dense_weight().detach().double()
    assert error.min() > 0
    assert (difference.abs() < 5 * error).all()
    assert abs(difference.mean()) < 5 * (error.square().sum().sqrt() / error.numel())


class TwoReaders(nn.Module):
    def __init__(self, also=False):
        super().__init__()
        self.first, self.one, self.two = nn.Linear(24, 40), nn.Linear(40, 8), nn.Linear(40, 8)
        self.also = also

    def forward(self, x):
        h = nn.functional.gelu(self.first(x), approximate="tanh")
        y = self.one(h) + self.two(h)
        return y + h.mean() if self.also else y


@pytest.mark.parametrize("also", [False, True])
def test_two_layers_read_one_packing(also, monkeypatch):
    torch.manual_seed(0)
    model = swap(prune(TwoReaders(also)), (4, 24))
    calls = []
    forward_pass = _linear_act.forward_pass
    monkeypatch.setattr(_linear_act, "forward_pass", lambda *args: calls.append(args) or forward_pass(*args))
    plain = copy.deepcopy(model)
    plain.forward.hand_over = False
    x = torch.randn(9, 24)
    mine = run(model, x)
    assert len(calls) == 1  # of the first layer; the others are given what is packed
    for a, b in zip(mine, run(plain, x), strict=True):
        assert relative(a, b) < 0.02
    h = model.first(x)
    assert (type(h) is PackedTensor) == (not also)
    assert handed_over(h) is not None


def test_anybody_else_sees_an_ordinary_tensor():
    torch.manual_seed(0)
    model = swap(mlp(nn.GELU()), (4, 24))
    x = torch.randn(2, 5, 24)
    model(x)
    h = model[0](x)
    assert type(h) is PackedTensor
    assert h.shape == (2, 5, 40)
    assert h.stride() == (200, 40, 1)
    exact = nn.functional.gelu(QuantizedSparseLinear.forward(model[0], x))
    step = exact.abs().amax() / 127
    assert (h.detach() - exact).abs().max() < step
    torch.testing.assert_close(h[1, 2] + 0, h.detach()[1, 2])
    assert torch.equal(h.reshape(10, 40), h.detach().view(10, 40))
    buffer = io.BytesIO()
    torch.save(h, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, h.detach())
    assert torch.equal(model[2](h), model(x))


class Mlp(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 8)
        if way == "alias":
            self.first_again = self.first

    def forward(self, x):
        h = self.first(x)
        if self.way == "relu method":
            h = h.relu()
        elif self.way == "in place":
            h = nn.functional.relu(h, inplace=True)
        elif self.way == "relu6":
            h = nn.functional.relu6(h)
        elif self.way == "gelu":
            h = nn.functional.gelu(h)
        elif self.way == "tanh":
            h = nn.functional.gelu(h, approximate="tanh")
        elif self.way == "silu":
            h = nn.functional.silu(h)
        elif self.way == "two readers":
            h = h.relu() + h
        elif self.way == "changed":
            y = h * 1
            y.mul_(0)
            h = torch.relu(h) + y
        elif self.way == "input changed":
            x.mul_(0)
            h = torch.relu(h)
        elif self.way == "mode":
            h = nn.functional.dropout(h.relu(), 0.5, self.training)
        elif self.way == "alias":
            h = h.relu()
        elif self.way == "twice":
            h = self.second(self.second(h.relu()).repeat(1, 5).relu()).repeat(1, 5)
        elif self.way == "control flow" and x.sum() > 100:
            h = -h
        return self.second(h)


@pytest.mark.parametrize(("way", "activation"), [
    ("relu method", "relu"), ("in place", "relu"), ("relu6", "relu6"), ("gelu", "gelu"), ("tanh", "gelu_tanh"),
    ("silu", None), ("two readers", None), ("changed", None), ("input changed", None), ("twice", "relu"),
    ("control flow", None), ("mode", None), ("alias", None),
])  # fmt: skip
def test_models_are_fused_where_possible_and_right_everywhere(way, activation):
    torch.manual_seed(0)
    model = prune(Mlp(way))
    plain, blocks = swap(model, (6, 24), fuse=False), swap(model, (6, 24))
    assert getattr(blocks.first, "activation", None) == activation
    reasons = {d.name: d.reason for d in blocks.swap_report}
    if activation is not None:
        assert reasons["first"] == f"fused with {'GELU' if 'gelu' in activation else 'ReLU'}"
        assert reasons["second"] == ("not fused: is called more than once" if way == "twice" else "fused with first")
    else:
        assert all(r.startswith("not fused") for r in reasons.values()), reasons
        wanted = {
            "mode": "looks at the mode", "alias": "several places", "input changed": "in place meanwhile",
            "control flow": "cannot trace", "changed": "used elsewhere", "silu": "no ReLU or GELU",
            "two readers": "used elsewhere",
        }  # fmt: skip
        assert wanted.get(way, "not fused") in reasons["first"]
        assert type(blocks.first) is type(blocks.second) is QuantizedSparseLinear
    assert list(plain.state_dict()) == list(blocks.state_dict())
    x = torch.randn(6, 24)
    for training in (False, True):
        for network in (model, plain, blocks):
            network.train(training)
        results = []
        for network in (plain, blocks):
            torch.manual_seed(3)
            results.append(network(x.clone()))
        torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
        results[1].sum().backward()
    if way == "mode":
        return  # draws random numbers
    blocks.load_state_dict(plain.state_dict())
    dense = swap_modules_with_dense(blocks, inplace=False)
    assert type(dense.first) is nn.Linear
    torch.testing.assert_close(dense(x.clone()), model(x.clone()))
    again = swap_modules_for_state(Mlp(way), plain.state_dict(), fuse=True)
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again(x.clone()), blocks(x.clone()))


def test_a_transformer_is_fused():
    torch.manual_seed(0)
    model = prune(vit_tiny(width=16))
    plain, blocks = swap(model, (2, 3, 32, 32), fuse=False), swap(model, (2, 3, 32, 32))
    kinds = [m.activation for m in blocks.modules() if isinstance(m, QuantizedSparseLinearAct)]
    assert kinds == ["gelu", None] * 6
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(blocks(x), plain(x), rtol=5e-2, atol=5e-2)
    mine, theirs = run(blocks, x), run(plain, x)
    assert relative(mine[1], theirs[1]) < 0.2  # rounded at random
    assert "fused with GELU" in str(blocks.swap_report)


class Two(nn.Module):
    """Two layers, with buffers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 8)
        self.register_buffer("mean", torch.randn(24))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


class Masked(Two):
    def forward(self, x, mask=None):
        h = self.first(x).relu()
        return self.second(h if mask is None else h * mask)


class Keywords(Two):
    def forward(self, x, **masks):
        h, mask = self.first(x).relu(), masks.get("mask")
        return self.second(h if mask is None else h * mask)


@pytest.mark.parametrize("kind", [Masked, Keywords])
def test_optional_arguments_keep_a_model_from_being_traced(kind):
    torch.manual_seed(0)
    model = swap(prune(kind()), (4, 24))
    assert "optional argument, mask" in model.swap_report[0].reason
    x = torch.randn(4, 24)
    assert not torch.equal(model(x), model(x, mask=torch.zeros(4, 1)))


class Constants(Two):
    """Tensors made in the forward pass, or of buffers."""

    def forward(self, x):
        x = (x - self.mean.view(1, 24)) * torch.tensor(2.0) + torch.tensor([1.0])
        return self.second(nn.functional.avg_pool2d(self.first(x).relu()[:, None, None], 1, 1, 0, True)[:, 0, 0])


class Counting(Two):
    def forward(self, x):
        if self.training:
            self.steps.add_(1)
        self.last = x
        return self.second(self.first(x).relu())


class Noisy(Two):
    def forward(self, x):
        return self.second(self.first(x * torch.rand(24)).relu())


def test_tracing_leaves_no_traces():
    torch.manual_seed(0)
    for kind, reason in ((Constants, "fused with ReLU"), (Counting, "looks at the mode"), (Noisy, "from call to call")):
        model = prune(kind())
        model.second.eval()
        plain, blocks = swap(model, (4, 24), fuse=False), swap(model, (4, 24))
        assert reason in blocks.swap_report[0].reason
        assert blocks.training
        assert not blocks.second.training
        assert blocks.steps == 0
        assert not hasattr(blocks, "last")
        new = set(vars(blocks)) - set(vars(plain))
        assert all(name == "forward" or name.startswith("_tensor_constant") for name in new)
        assert bool(new) == (kind is Constants)
        if kind is Noisy:
            continue
        blocks.mean.add_(1)  # buffers are read when the graph runs
        plain.mean.add_(1)
        x = torch.randn(4, 24)
        torch.testing.assert_close(blocks(x), plain(x), rtol=2e-2, atol=2e-2)
        assert blocks.steps == plain.steps


def test_layers_of_a_shared_part_are_fused():
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))
    model = swap(Whole(prune(part)), (4, 24))
    assert type(model.part[0]) is type(model.again[0]) is QuantizedSparseLinearAct
    assert model.part[0] is model.again[0]


class Whole(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = self.again = part

    def forward(self, x):
        return self.part(x)


def test_parts_that_were_fused_by_themselves_stay_as_they_are():
    torch.manual_seed(0)
    inner = swap(mlp(nn.GELU()), (4, 24))  # its last layer has no activation
    x = torch.randn(4, 24)
    wanted = inner(x)
    outer = prune(nn.Sequential(inner, nn.GELU(), nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 8)))
    for _ in range(2):
        swap_modules_with_sparse(outer, (4, 24), fuse=True, include_dense=False, min_sparsity=0.5, verbose=False)
        assert type(outer[2]) is QuantizedSparseLinearAct
        outer(x)
        assert torch.equal(inner(x), wanted)
    unfuse_modules(outer)
    torch.testing.assert_close(inner(x), wanted, rtol=2e-2, atol=2e-2)


def test_parts_of_a_block_that_are_replaced_are_missed():
    torch.manual_seed(0)
    x = torch.randn(4, 24)
    for run_before in (False, True):
        model = swap(mlp(nn.GELU()), (4, 24))
        if run_before:
            model(x)
        model[0] = nn.Linear(24, 40)
        with pytest.raises(RuntimeError, match="0 was part of a block, with what follows it, and has been replaced"):
            model(x)


def test_a_model_whose_forward_was_replaced_is_left_alone():
    torch.manual_seed(0)
    model = mlp(nn.ReLU())
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)
    assert swap_modules_with_sparse(model, (4, 24), fuse=True, include_dense=False, min_sparsity=0.5, verbose=False)
    assert "its forward pass was replaced" in model.swap_report[0].reason


def test_a_model_is_fused_again_after_further_changes():
    torch.manual_seed(0)
    model = swap(mlp(nn.GELU()), (4, 24))
    x = torch.randn(4, 24)
    y = model(x)
    again = swap(model, (4, 24))
    assert [type(m) for m in again] == [type(m) for m in model]
    assert torch.equal(again(x), y)
    outer = nn.Sequential(model, nn.Linear(40, 8))
    dense = swap_modules_with_dense(outer, inplace=False)
    assert [type(m) for m in dense[0]] == [nn.Linear, nn.GELU, nn.Linear]
    torch.testing.assert_close(dense(x), outer(x), rtol=0.05, atol=0.05)
    assert type(model[0]) is QuantizedSparseLinearAct  # another model's part


class Scaled(Two):
    def forward(self, x):
        h = self.first(x).relu()
        h.mul_(0.5)
        return self.second(h)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_is_changed_in_place_is_not_read_packed(context):
    torch.manual_seed(0)
    model = prune(Scaled())
    plain, blocks = swap(model, (4, 24), fuse=False), swap(model, (4, 24))
    assert blocks.first.activation == "relu"
    x = torch.randn(4, 24)
    with context():
        torch.testing.assert_close(blocks(x), plain(x), rtol=2e-2, atol=2e-2)
        h = swap(prune(mlp(nn.ReLU())), (4, 24))
        h(x)
        packed = h[0](x)
        assert type(packed) is PackedTensor
        packed.mul_(0.5)
        torch.testing.assert_close(h[2](packed), QuantizedSparseLinear.forward(h[2], packed + 0), rtol=2e-2, atol=2e-2)
        packed = h[0](x)
        packed[:, :20] = 0
        torch.testing.assert_close(h[2](packed), QuantizedSparseLinear.forward(h[2], packed + 0), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("trained", ["weight", "bias", "input", "none"])
@pytest.mark.parametrize("settings", [{}, {"grad": "dithered"}])
def test_only_what_is_wanted_gets_a_gradient(trained, settings):
    torch.manual_seed(0)
    block = QuantizedSparseLinearAct.fuse(sparse_linear(24, 40, **settings), "gelu").requires_grad_(False)
    every = copy.deepcopy(block).requires_grad_()
    x = torch.randn(9, 24)
    wanted = run(every, x)
    leaf = x.clone().requires_grad_(trained == "input")
    if trained in ("weight", "bias"):
        getattr(block, trained).requires_grad_()
    torch.manual_seed(1)
    y = block(leaf)
    assert torch.equal(y, wanted[0])
    assert y.requires_grad == (trained != "none")
    if trained == "none":
        return
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    grads = {"input": leaf.grad, "weight": block.weight.grad, "bias": block.bias.grad}
    expected = dict(zip(("input", *(n for n, _ in every.named_parameters())), wanted[1:], strict=True))
    for name, grad in grads.items():
        assert torch.equal(grad, expected[name]) if name == trained else grad is None


def test_another_default_dtype_changes_nothing():
    torch.manual_seed(0)
    model = swap(mlp(nn.GELU()), (4, 24))
    x = torch.randn(4, 24)
    before = run(model, x)
    torch.set_default_dtype(torch.float64)
    try:
        after = run(model, x)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)


def test_hooks_keep_layers_alone():
    torch.manual_seed(0)
    model = mlp(nn.ReLU())
    model[1].register_forward_hook(lambda *_: None)
    assert {d.reason for d in swap(model, (4, 24)).swap_report} == {"not fused: no ReLU or GELU behind it"}


def test_checkpointing_and_no_grad_give_the_same():
    torch.manual_seed(0)
    model = swap(mlp(nn.GELU()), (4, 24), grad="absmax")
    x = torch.randn(9, 24)
    plain = run(model, x)
    again = run(lambda_module(model, lambda x: checkpoint(model, x, use_reentrant=False)), x)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(model(x), plain[0])


def lambda_module(model, function):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return function(x)

    return Wrapped()


def test_dtypes_follow_autocast():
    block = QuantizedSparseLinearAct.fuse(sparse_linear(24, 40), "gelu")
    x = torch.randn(5, 24)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        leaf = x.to(dtype).requires_grad_()
        y = block(leaf)
        assert y.dtype == dtype
        y.sum().backward()
        assert leaf.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(x).dtype == torch.bfloat16
        assert block(x.double()).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
def test_derivatives_that_do_not_exist_are_explained():
    block = QuantizedSparseLinearAct.fuse(sparse_linear(24, 40), "gelu")
    x = torch.randn(5, 24, requires_grad=True)
    (grad,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="once only"):
        grad.sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        block(forward_ad.make_dual(x.detach(), torch.ones(5, 24)))


def test_bad_blocks_and_inputs_are_refused():
    linear = sparse_linear(24, 40, check_finite=True)
    with pytest.raises(TypeError, match="expects a QuantizedSparseLinear, got Linear"):
        QuantizedSparseLinearAct.fuse(nn.Linear(3, 3), "relu")
    with pytest.raises(ValueError, match="the activation must be one of None, 'relu'"):
        QuantizedSparseLinearAct.fuse(linear, "tanh")
    block = QuantizedSparseLinearAct.fuse(linear, "relu")
    with pytest.raises(ValueError, match="expects the last dimension to be in_features=24"):
        block(torch.randn(3, 25))
    with pytest.raises(TypeError, match="expects a tensor, got list"):
        block([1.0])
    with pytest.raises(ValueError, match="the input has NaN or Inf"):
        block(torch.full((2, 24), math.nan))
    y = block(torch.randn(2, 24))
    with pytest.raises(ValueError, match="gradient of the output has NaN or Inf"):
        y.backward(torch.full_like(y, math.inf))
    assert repr(block).endswith("activation=relu)")
    assert type(block.unfuse()) is QuantizedSparseLinear
    assert "activation" not in block.unfuse().__dict__


@pytest.mark.parametrize(("name", "limit"), [("relu", 1.2), ("gelu", 2.1)])
def test_what_is_saved(name, limit):
    """A byte for the packed result, and a bit, or a byte, for the activation."""
    torch.manual_seed(0)
    first, second = (QuantizedSparseLinearAct.fuse(sparse_linear(*sizes), act)
                     for sizes, act in (((64, 256), name), ((256, 64), None)))  # fmt: skip
    first._readers, first._read_elsewhere = (second,), False
    x = torch.randn(1024, 64)
    bytes_saved = saved_for_backward_bytes(lambda: second(first(x)), nn.ModuleList([first, second]))
    assert 0.9 * limit < (bytes_saved - x.numel()) / (1024 * 256) < limit


def test_a_fused_model_compiles():
    torch.manual_seed(0)
    model = swap(mlp(nn.GELU()), (4, 24)).eval()
    x = torch.randn(4, 24)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x), rtol=2e-2, atol=2e-2)
