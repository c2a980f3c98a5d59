"""Layers under a default device that is not theirs: plans, scratch memory and results are on the CPU all the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qsparseprop.layout.modes import DENSE, LIST, Modes
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.nn import QuantizedSparseConvTranspose2d, QuantizedSparseLinear
from qsparseprop.quantization import QuantConfig, quantize
from qsparseprop.utils.fusion import unfuse_modules
from qsparseprop.utils.network_utils import swap_modules_with_sparse

from ._helpers import example, generator, set_weight

pytestmark = pytest.mark.usefixtures("one_thread")


def passes(layer, x, seed=0):
    """The result and the gradients of a training step, and the result of evaluation."""
    torch.default_generator.manual_seed(seed)
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    with torch.no_grad():
        again = layer(x)
    return y.detach(), again, x.grad, *(p.grad.clone() for p in layer.parameters())


def assert_as_on_the_cpu(layer, x):
    expected = passes(copy.deepcopy(layer), x)
    with torch.device("meta"):
        for actual, wanted in zip(passes(layer, x), expected, strict=True):
            assert actual.is_cpu
            with torch.device("cpu"):
                assert torch.equal(actual, wanted)


@pytest.mark.parametrize("mode", [LIST, DENSE])
@pytest.mark.parametrize("kind", ["SparseLinear", "QuantizedSparseLinear", "SparseConv2d", "QuantizedSparseConv2d"])
def test_layers(kind, mode):
    layer, _, x = example(kind)
    layer.product_modes = Modes(mode, mode, mode)
    assert_as_on_the_cpu(layer, x)


def test_transposed_layers():
    dense = set_weight(nn.ConvTranspose2d(4, 6, 3, stride=2), 0.4, 0)
    assert_as_on_the_cpu(QuantizedSparseConvTranspose2d.from_dense(dense), torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("qconfig", [QuantConfig(granularity="tensor", grad="absmax"), QuantConfig.ancestor(),
                                     QuantConfig(grad_weight="float32")])  # fmt: skip
def test_ways_of_quantising(qconfig):
    layer = QuantizedSparseLinear.from_dense(set_weight(nn.Linear(40, 24), 0.4, 0), qconfig=qconfig)
    assert_as_on_the_cpu(layer, torch.randn(9, 40, generator=generator(1)))


def test_wide_patterns():
    """Whose columns want 32 bits."""
    layer = QuantizedSparseLinear.from_dense(set_weight(nn.Linear(70_000, 3), 0.001, 0))
    assert_as_on_the_cpu(layer, torch.randn(2, 70_000, generator=generator(1)))


def test_networks(sparse_is_faster):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    for i in (0, 3):
        set_weight(model[i], 0.2, i)
    x = torch.randn(2, 3, 9, 9, generator=generator(1))
    swap_modules_with_sparse(model, x, fuse=True, min_sparsity=0.5)
    unfused = unfuse_modules(copy.deepcopy(model))
    assert_as_on_the_cpu(unfused, x)


def test_patterns_and_codes():
    x = torch.randn(6, 5, generator=generator(1))
    patterns, codes = dense_pattern(x > 0), quantize(x, dim=0)
    with torch.device("meta"):
        others = dense_pattern(x > 0), quantize(x, dim=0)
    assert all(torch.equal(a, b) for a, b in zip(patterns, others[0], strict=True))
    assert torch.equal(codes.codes, others[1].codes)
    assert torch.equal(codes.scale, others[1].scale)
