"""Frozen normalisations, a factor and a shift for each channel, in chains; and what chains tell of themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qsparseprop.nn.deferred import DeferredTensor, one_by_one
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils.fusion import Chain, chains
from qsparseprop.utils.network_utils import swap_modules_with_sparse

from ._helpers import relative_error


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d computes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.rand(channels) + 0.5)
        self.register_buffer("shift", torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.reshape(1, -1, 1, 1) + self.shift.reshape(1, -1, 1, 1)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, norm: type[nn.Module], behind: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = norm(8), norm(8)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(x + y if self.behind else y + x)


def swapped(model: nn.Module, fuse: bool = True) -> nn.Module:
    return swap_modules_with_sparse(model, None, inplace=False, verbose=False, include_dense=False, min_sparsity=0.0,
                                    qconfig=QuantConfig(grad="absmax"), fuse=fuse)  # fmt: skip


def sparse(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(torch.rand_like(p) < 0.5)
    return model


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach().clone(), x.grad, *(p.grad for p in model.parameters())]


def test_frozen_normalisations_join_chains():
    dense = sparse(nn.Sequential(Block(Frozen), Block(Frozen), nn.Conv2d(8, 3, 1)))
    model, unfused = swapped(dense), swapped(dense, fuse=False)
    x = torch.randn(2, 8, 6, 6)
    for _ in range(2):
        result = step(model, x)
        with one_by_one():
            for actual, expected in zip(result, step(copy.deepcopy(model), x), strict=True):
                assert torch.equal(actual, expected)
        for actual, expected in zip(result, step(unfused, x), strict=True):
            assert relative_error(actual, expected) < 1e-3  # the same codes
    assert chains(model) == {
        "0.conv1": Chain(False, ("scale", "shift", "ReLU")),
        "0.conv2": Chain(True, ("scale", "shift", "add", "ReLU")),
        "1.conv1": Chain(True, ("scale", "shift", "ReLU")),
        "1.conv2": Chain(True, ("scale", "shift", "add", "ReLU")),
        "2": Chain(True, ()),
    }


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1)])
@pytest.mark.parametrize("operation", ["a * b", "b * a", "torch.mul(a, b)", "a + b", "b + a", "torch.add(a, b)"])
def test_a_map_of_channels_is_what_torch_gives(shape, operation):
    layer = swapped(sparse(nn.Sequential(nn.Conv2d(4, 8, 3))))
    x, b = torch.randn(2, 4, 5, 5), torch.randn(shape)

    def run(wanted: bool) -> tuple[Tensor, Tensor]:
        a = layer(x)
        if not wanted:
            a = a.clone()
        y = eval(operation, {"a": a, "b": b, "torch": torch})
        assert (type(y) is DeferredTensor) == wanted
        return y.detach().clone(), torch.autograd.grad((y * y).sum(), layer[0].weight)[0]

    for actual, expected in zip(run(True), run(False), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("size", [(5, 4), (1, 5), (1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_keep_the_memory_format(size, memory_format):
    dense = nn.Conv2d(4, 8, 3, padding=1)
    layer = swapped(sparse(nn.Sequential(dense)))
    x = torch.randn(2, 4, *size).contiguous(memory_format=memory_format)
    factor = torch.randn(1, 8, 1, 1)
    with torch.no_grad():
        for y, z in ((layer(x) * factor, dense(x) * factor), (factor + layer(x), factor + dense(x)),
                     (copy.deepcopy(layer)(x).clone(), dense(x).clone())):  # fmt: skip
            assert y.stride() == z.stride()


def test_the_factor_is_read_when_torch_would():
    layer = swapped(sparse(nn.Sequential(nn.Conv2d(4, 8, 3))))
    x, factor = torch.randn(2, 4, 5, 5), torch.randn(8, 1, 1)
    with torch.no_grad():
        expected = copy.deepcopy(layer)(x).clone() * factor
        y = layer(x) * factor
        assert type(y) is DeferredTensor
        factor.zero_()
        assert torch.equal(y, expected)


def test_a_factor_that_is_trained_gets_its_gradient():
    layer = swapped(sparse(nn.Sequential(nn.Conv2d(4, 8, 3))))
    x = torch.randn(2, 4, 5, 5)
    factor = torch.randn(8, 1, 1, requires_grad=True)
    shift = torch.randn(8, 1, 1, requires_grad=True)
    (layer(x) * factor + shift).sum().backward()
    z = layer(x).detach().clone()
    assert torch.allclose(factor.grad, z.sum((0, 2, 3))[:, None, None], rtol=1e-5)
    assert torch.equal(shift.grad, torch.full((8, 1, 1), 18.0))
    assert chains(layer) == {"0": Chain(False, ())}


def test_linear_layers_take_factors_for_their_features_only():
    layer = swapped(sparse(nn.Sequential(nn.Linear(4, 6))))
    x = torch.randn(6, 6, 4)
    with torch.no_grad():
        z = copy.deepcopy(layer)(x).clone()
        for other, taken in ((torch.randn(6), True), (torch.randn(1, 1, 6), True), (torch.randn(6, 1), False)):
            y = copy.deepcopy(layer)(x) * other
            assert (type(y) is DeferredTensor) == taken
            assert torch.equal(y, z * other)


def test_an_addition_is_done_in_the_pass_of_the_summand_that_has_one():
    model = swapped(sparse(nn.Sequential(Block(nn.BatchNorm2d, True), Block(nn.BatchNorm2d, True))))
    model(torch.randn(2, 8, 6, 6)).sum().backward()
    assert {name: chain.joined for name, chain in chains(model).items() if "conv2" in name} == {
        "0.conv2": ("BatchNorm", "add", "ReLU"), "1.conv2": ("BatchNorm", "add", "ReLU")}  # fmt: skip
    assert bool(Chain(True, ()))
    assert bool(Chain(False, ("ReLU",)))
    assert not Chain(False, ())
