"""Activations that travel packed from layer to layer, and what waits of them for the backward pass."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn

from qsparseprop import ops
from qsparseprop.layout.geometry import conv_geometry
from qsparseprop.nn.deferred import product
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils.fusion import fuse_modules, unfuse_modules
from qsparseprop.utils.measurement_utils import saved_for_backward_bytes

from ._blocks import (
    assert_close,
    assert_same,
    conv_net,
    is_deferred,
    mlp,
    relative,
    run,
    settle,
    sparse,
    stepwise,
    swapped,
)


@pytest.fixture
def packings(monkeypatch) -> list[Tensor]:
    """Inputs that layers have packed by themselves, since nobody had done it on the way."""
    seen: list[Tensor] = []
    forward_pass = product.forward_pass
    monkeypatch.setattr(product, "forward_pass", lambda x, *args: seen.append(x) or forward_pass(x, *args))
    return seen


def test_what_a_layer_reads_is_packed_on_the_way(packings):
    model = swapped(conv_net(), (5, 12, 9, 7))
    packings.clear()
    x = torch.randn(5, 12, 9, 7)
    model(x)
    assert [p.shape for p in packings] == [x.shape]


@pytest.mark.parametrize(("settings", "packs"), [
    ({}, True), ({"granularity": "tensor"}, True), ({"input": "standard"}, True), ({"input": "sawb"}, False),
    ({"grad_weight": "float32"}, False), ({"check_finite": True}, False),
])  # fmt: skip
def test_schemes_that_follow_from_the_range_are_packed_on_the_way(settings, packs, packings):
    model = swapped(mlp(nn.ReLU()), (4, 24), **settings)
    packings.clear()
    model(torch.randn(70, 24))
    assert len(packings) == (1 if packs else 3)


class Downsampling(nn.Module):
    """A residual block of stride 2 with a 1x1 convolution beside its 3x3 one, behind a convolution that stays dense."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv1, self.norm1 = nn.Conv2d(12, 20, 3, 2, padding=1, bias=False), nn.BatchNorm2d(20)
        self.conv2, self.norm2 = nn.Conv2d(20, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20)
        self.side, self.side_norm = nn.Conv2d(12, 20, 1, 2, bias=False), nn.BatchNorm2d(20)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.side_norm(self.side(x))
        return torch.relu(y)


def test_one_packing_serves_kernels_of_different_sizes(packings):
    model = swapped(Downsampling(), (5, 3, 9, 8), grad="absmax")
    other = copy.deepcopy(model)
    x = torch.randn(5, 3, 9, 8)
    packings.clear()
    mine = run(model, x)
    assert not packings  # all three read what was packed on the way, behind the dense convolution as well
    assert_same(mine, run(other, x, stepwise(other)))


class Branches(nn.Module):
    """Two layers that read the same tensor, and perhaps somebody else."""

    def __init__(self, stride=1, also=False):
        super().__init__()
        self.stem, self.norm, self.also = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), also
        self.main, self.side = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(12, 8, 1, stride, bias=False)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        y = self.main(x).mean((2, 3)) + self.side(x).mean((2, 3))
        return y + x.mean() if self.also else y


@pytest.mark.parametrize("side_first", [False, True])
@pytest.mark.parametrize("also", [False, True])
@pytest.mark.parametrize("change", [{"input": "standard"}, {"granularity": "tensor"}, {"grad_weight": "float32"}, {}])
def test_readers_that_cannot_share_see_the_values(change, also, side_first):
    model = swapped(Branches(1 if change else 2, also), (4, 3, 8, 8), grad="absmax")
    model.side.qconfig = QuantConfig(**{"grad": "absmax", **change})
    if side_first:
        model.main, model.side = model.side, model.main
    other = copy.deepcopy(model)
    x = torch.randn(4, 3, 8, 8)
    for _ in range(3):  # what is kept of the values follows from the last call
        mine, others = run(model, x), run(other, x, stepwise(other))
        torch.testing.assert_close(mine.pop("output"), others["output"], rtol=1e-6, atol=1e-6)
        for name, value in mine.items():
            torch.testing.assert_close(value, others[name], rtol=1e-4, atol=1e-4)


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
def test_two_layers_read_one_packing(also, packings):
    model = swapped(TwoReaders(also), (4, 24), grad="absmax")
    other = copy.deepcopy(model)
    x = torch.randn(9, 24)
    packings.clear()
    mine = run(model, x)
    assert len(packings) == 1  # by the first layer; the others are given what is packed
    assert_close(mine, run(other, x, stepwise(other)), 0.02)


def test_a_tensor_that_its_layer_packs_is_packed_for_others(packings):
    """Where nothing follows a layer, its result is packed by the one that reads it, and by no other."""
    first, one, two = (fuse_modules(nn.Sequential(sparse(nn.Linear(24, 24))))[0] for _ in range(3))
    h = first(torch.randn(9, 24))
    one(h), two(h)
    assert len(packings) == 2


# ---- the packed form ends where somebody may change the values ----


def test_a_change_in_place_ends_the_packed_form():
    model = swapped(conv_net(), (5, 12, 9, 7), grad="absmax").eval()
    other = copy.deepcopy(model)
    # in this order results that are read and packed are deferred again and again
    x = torch.randn(5, 12, 9, 7).to(memory_format=torch.channels_last)

    def use(network, h, way):
        network[3](h)  # packs
        if way == "detached":
            h.detach().mul_(0.5)
        elif way == "view":
            h[:, 3:].zero_()
        elif way == "index":
            h[:, :4] = 0
        elif way == "numpy":
            h.numpy()[:] = 1
        elif way == "in place":
            h.mul_(0.5)
        elif way == "data":
            h.data.add_(1)
        return network[3](h)

    for way in ("in place", "detached", "view", "index", "numpy", "data"):
        with torch.no_grad():
            h = model[:3](x)
            assert is_deferred(h), way
            mine, others = use(model, h, way), stepwise(lambda x, way=way: use(other, other[:3](x), way))(x)
            torch.testing.assert_close(mine, others, rtol=0, atol=0)


def test_values_read_after_packing_are_the_values():
    model = swapped(conv_net(), (5, 12, 9, 7))
    x = torch.randn(5, 12, 9, 7)
    wanted = stepwise(copy.deepcopy(model)[:3])(x)
    h = model[:3](x)
    model[3](h)
    assert torch.equal(h, wanted)


def test_inputs_that_change_after_they_were_read():
    """A normalisation of a tensor that belongs to somebody else has read it when it returns."""
    reader, norm = sparse(nn.Conv2d(12, 8, 1)), settle(nn.BatchNorm2d(12))
    fuse_modules(nn.Sequential(norm, reader))
    x = torch.randn(5, 12, 9, 7).to(memory_format=torch.channels_last)
    expected = copy.deepcopy(norm).double()(x.double()).relu()
    y = torch.relu(norm(x))
    x.zero_()
    assert is_deferred(y)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_parameters_that_change_before_the_values_are_computed():
    """What a block computes with is what there was when it was called; in the backward pass torch complains."""
    model = swapped(conv_net(), (5, 12, 9, 7))
    other = copy.deepcopy(model)
    x = torch.randn(5, 12, 9, 7)
    h, expected = model[:2](x), stepwise(other[:2])(x)
    with torch.no_grad():
        model[1].weight.mul_(2)
        model[1].running_mean.zero_()
    assert torch.equal(torch.relu(h), torch.relu(expected))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_summands_that_change_after_they_were_added():
    model = swapped(conv_net(), (5, 12, 9, 7))
    other = copy.deepcopy(model)
    x, skip = torch.randn(5, 12, 9, 7), torch.randn(5, 12, 9, 7)
    y = model[1](model[0](x)) + skip
    expected = stepwise(lambda x: other[1](other[0](x)) + skip)(x)
    skip.zero_()
    assert torch.equal(torch.relu(y), torch.relu(expected))


# ---- what waits for the backward pass ----


def saved_by(y: Tensor) -> list[Tensor]:
    """What the nodes of a graph have saved, each storage once, leaves excepted."""
    found, nodes, seen, leaves = {}, [y.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            leaves.add(node.variable.data_ptr())
        for tensor in getattr(node, "saved_tensors", ()):
            if tensor is not None and tensor.numel():
                found[tensor.untyped_storage().data_ptr()] = tensor
    return [tensor for key, tensor in found.items() if key not in leaves]


def floats_of(size: int) -> list[Tensor]:
    """Floating-point tensors of a size that Python knows of."""
    gc.collect()
    return [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.is_floating_point() and t.numel() == size]


@pytest.mark.parametrize("residual", [False, True])
def test_a_convolution_waits_as_codes_and_bits(residual):
    """Of convolution, normalisation and ReLU between others: a byte and a bit an element, no float."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(16, 16, 1, bias=False) for _ in range(4))
            self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(4))

        def forward(self, x):
            for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
                y = norm(layer(x))
                x = torch.relu(y + x if residual and i % 2 else y)
            return x

    model = swapped(Net(), (2, 16, 4, 4))
    x = torch.randn(61, 16, 17, 13)
    before = len(floats_of(x.numel()))
    for _ in range(2):
        y = model(x)
        y.sum()
        kept = [t for t in saved_by(y) if t.numel() >= x.numel() // 16]
        assert not any(t.is_floating_point() for t in kept)
        # a residual stream is packed anew, as its codes are not those of a normalisation
        assert sum(t.nbytes for t in kept) < (1.1 + 4 * 1.125 + (1.1 if residual else 0)) * x.numel() + 100_000
        del kept
        assert len(floats_of(x.numel())) - before <= 2  # the output, and its deferred form
        y.sum().backward()


def test_what_is_counted_by_hooks_is_the_same():
    model = swapped(nn.Sequential(*conv_net(16)), (2, 16, 8, 8))
    x = torch.randn(61, 16, 17, 13)
    mine = sum(t.nbytes for t in saved_by(model(x)) if t.numel() > 64)
    assert abs(saved_for_backward_bytes(lambda: model(x), model) - mine) < 0.05 * mine


@pytest.mark.parametrize(("activation", "limit"), [(nn.ReLU(), 1.2), (nn.GELU(), 2.1)])
def test_a_linear_layer_waits_as_packed_result_and_slope(activation, limit):
    model = swapped(nn.Sequential(nn.Linear(64, 256), activation, nn.Linear(256, 64)), (4, 64))
    y = model(torch.randn(1024, 64))
    kept = sum(t.nbytes for t in saved_by(y) if t.dtype in (torch.uint8, torch.int16, torch.int8))
    assert 0.9 * limit < (kept - 1024 * 64) / (1024 * 256) < limit


def test_inputs_made_again_of_codes_are_off_by_half_a_step():
    """In the weight gradient alone; what is packed anew has the scales of the first time."""
    model = swapped(conv_net(), (5, 12, 9, 7), grad="absmax")
    x = torch.randn(5, 12, 9, 7)
    plain = unfuse_modules(copy.deepcopy(model))  # which keeps the packed input itself
    mine, theirs = run(model, x), run(plain, x)
    for name in ("3.weight.grad", "6.weight.grad"):
        assert 0 < relative(mine[name], theirs[name]) < 0.06


def test_frozen_weights_keep_no_input():
    model = swapped(conv_net(), (5, 12, 9, 7))
    for module in model:
        if hasattr(module, "crow_indices"):
            module.weight.requires_grad_(False)
    x = torch.randn(5, 12, 9, 7, requires_grad=True)
    y = model(x)
    kept = saved_by(y)
    assert all(t.numel() <= 5 * 12 * 9 * 7 for t in kept)
    assert sum(t.dtype == torch.uint8 for t in kept) == 3  # of each convolution's output
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_what_a_user_keeps_holds_no_packed_form():
    """An input that stays is not kept twice."""
    model = swapped(conv_net(), (5, 12, 9, 7))
    x = torch.randn(5, 12, 9, 7)
    model(x)
    assert not vars(x)


def test_a_chain_that_nobody_takes_is_freed():
    model = swapped(conv_net(), (5, 12, 9, 7))
    x = torch.randn(7, 12, 9, 7)
    before = len(floats_of(x.numel()))
    model[:3](x)
    h = model[:3](x)
    torch.relu(h)
    del h
    assert len(floats_of(x.numel())) == before


def test_a_chain_that_nobody_takes_has_its_side_effects():
    model = swapped(conv_net(), (5, 12, 9, 7))
    other = copy.deepcopy(model)
    x = torch.randn(5, 12, 9, 7)
    model[:2](x)
    stepwise(other[:2])(x)
    assert torch.equal(model[1].running_mean, other[1].running_mean)
    assert model[1].num_batches_tracked == 1


def test_limits_need_a_bias():
    conv = sparse(nn.Conv2d(6, 8, 3, padding=1))
    plan = conv._plan(conv_geometry(6, 8, (5, 5), (3, 3), (1, 1), (1,) * 4, (1, 1), 2, False), 1)
    packed = ops.quantize_pack(torch.randn(2, 6, 5, 5), plan.geometry.input_layout, ops.Scheme("absmax"))
    first = (packed, conv.weight.detach(), plan.forward, torch.empty(2, 8, 5, 5))
    for bias, limits in ((None, [0.0, 1.0]), (torch.zeros(8), [1.0])):
        with pytest.raises(ValueError, match="limits must be two numbers, and need a bias"):
            ops.multiply(*first, bias, limits=limits)
    y = ops.multiply(*first, torch.zeros(8), limits=[0.0, 0.5])
    assert y.min() == 0
    assert y.max() == 0.5


# ---- operators ----


def test_a_profiler_sees_what_blocks_compute():
    """And the dispatcher, which operators are called through then, changes no bit."""
    model, x = swapped(conv_net(), (4, 12, 9, 7)), torch.randn(4, 12, 9, 7)
    other = copy.deepcopy(model)
    wanted = run(other, x)
    with torch.profiler.profile() as profiler:
        found = run(model, x)
    assert_same(found, wanted)
    seen = {event.key.partition("::")[2] for event in profiler.events() if event.key.startswith("qsparseprop::")}
    assert {"norm_statistics", "epilogue_pack", "epilogue", "epilogue_sums", "epilogue_grad_pack"} <= seen
