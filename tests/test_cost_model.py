"""Closed forms against counting one by one."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qsparseprop import nn as qnn
from qsparseprop.nn import QuantizedSparseConv2d, QuantizedSparseLinear, SparseConv2d, SparseLinear
from qsparseprop.training.models import resnet20
from qsparseprop.utils.measurement_utils import layer_cost, model_costs, saved_for_backward_bytes

# torch mentions that it copies the input of padding="same"
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

CONVS = [
    {"in_channels": 3, "out_channels": 4, "kernel_size": 3},
    {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 2), "padding": (1, 2), "stride": (2, 1)},
    {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2, "bias": False},
    {"in_channels": 2, "out_channels": 3, "kernel_size": 4, "padding": "same"},
    {"in_channels": 2, "out_channels": 3, "kernel_size": 5, "padding": 4, "stride": 3},
]


def pruned(module):
    with torch.no_grad():
        module.weight *= torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    return module


def count_products(conv, shape, count_padding):
    """All (image, output pixel, nonzero weight), one by one."""
    out = conv(torch.zeros(shape))
    kernel, padding = conv.kernel_size, conv.padding
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, conv.dilation, strict=True))
    total = 0
    for *_, ky, kx in conv.weight.nonzero().tolist():
        for y, x in itertools.product(range(out.shape[2]), range(out.shape[3])):
            row = y * conv.stride[0] - padding[0] + ky * conv.dilation[0]
            column = x * conv.stride[1] - padding[1] + kx * conv.dilation[1]
            total += shape[0] * (count_padding or (0 <= row < shape[2] and 0 <= column < shape[3]))
    return total


@pytest.mark.parametrize("count_padding", [True, False])
@pytest.mark.parametrize("settings", CONVS, ids=str)
def test_sparse_convolutions(settings, count_padding):
    conv = pruned(nn.Conv2d(**settings))
    shape = (2, conv.in_channels, 7, 6)
    products = count_products(conv, shape, count_padding)
    outputs = conv(torch.zeros(shape)).numel() if conv.bias is not None else 0
    for kind in (SparseConv2d, QuantizedSparseConv2d):
        cost = layer_cost(kind.from_dense(conv), shape, count_padding=count_padding)
        assert cost.forward.operations == 2 * products + outputs
        assert cost.backward.operations == 4 * products + outputs
        assert cost.nonzeros == int(torch.count_nonzero(conv.weight))
    first = layer_cost(SparseConv2d.from_dense(conv), shape, count_padding=count_padding, input_grad=False)
    assert first.backward.operations == 2 * products + outputs


@pytest.mark.parametrize("settings", CONVS, ids=str)
def test_dense_convolutions_as_torch_counts_them(settings):
    conv = nn.Conv2d(**{**settings, "bias": False})
    x = torch.zeros(2, conv.in_channels, 7, 6, requires_grad=True)
    cost = layer_cost(conv, x.shape)
    with FlopCounterMode(display=False) as forward:
        y = conv(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert cost.forward.operations == forward.get_total_flops()
    if conv.groups == 1:  # torch's formula of the backward pass forgets the groups
        assert cost.backward.operations == backward.get_total_flops()
    else:
        assert cost.backward.operations == 2 * cost.forward.operations


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 5, 4, padding=1, stride=2), nn.Conv3d(2, 3, 2, padding=1)], ids=str)
def test_other_dimensions(layer):
    x = torch.zeros(2, layer.in_channels, *[6] * (layer.weight.ndim - 2))
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    assert layer_cost(layer, x.shape).forward.operations == forward.get_total_flops() + y.numel()


@pytest.mark.parametrize("layer", [
    nn.ConvTranspose1d(3, 5, 4, stride=2), nn.ConvTranspose2d(4, 6, (3, 2), (3, 1), 1, (2, 0), 2, dilation=(2, 1)),
    nn.ConvTranspose3d(2, 3, 2, padding=1),
], ids=str)  # fmt: skip
def test_transposed_convolutions(layer):
    x = torch.zeros(2, layer.in_channels, *[6] * (layer.weight.ndim - 2))
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    cost = layer_cost(layer, x.shape)
    assert cost.forward.operations == x.numel() * layer.weight[0].numel() * 2 + y.numel()
    if layer.groups == 1:
        assert cost.forward.operations == forward.get_total_flops() + y.numel()
    assert cost.saved_bytes == 4 * x.numel()
    kind = getattr(qnn, f"Sparse{type(layer).__name__}")
    sparse = layer_cost(kind.from_dense(layer), x.shape)
    assert sparse.forward.operations == cost.forward.operations
    valid = layer_cost(kind.from_dense(layer), x.shape, count_padding=False)
    assert valid.forward.operations == 2 * _valid_products(layer, x) + y.numel()


def _valid_products(layer, x):
    """Products whose result lies in the output: what a weight of ones adds up."""
    ones = type(layer)(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                       layer.output_padding, layer.groups, False, layer.dilation)  # fmt: skip
    nn.init.ones_(ones.weight)
    return int(ones(torch.ones_like(x)).sum())


def test_transposed_linear_layers():
    layer = qnn.SparseTransposedLinear(10, 20)
    layer.regrow(torch.rand(20, 10) < 0.4)
    plain = SparseLinear.from_dense(nn.Linear(20, 10))
    plain.apply_further_mask(layer.mask().t())
    ours, wanted = (layer_cost(m, (4, 3, 20)) for m in (layer, plain))
    assert (ours.forward, ours.backward, ours.saved_bytes) == (wanted.forward, wanted.backward, wanted.saved_bytes)
    with pytest.raises(ValueError, match="20 features"):
        layer_cost(layer, (4, 10))


def test_bytes_of_linear_layers():
    dense = pruned(nn.Linear(20, 10))
    nonzeros = int(torch.count_nonzero(dense.weight))
    shape = (4, 3, 20)
    cost = layer_cost(dense, shape)
    assert cost.forward.operations == 2 * 12 * 200 + 12 * 10
    assert cost.forward.bytes == 4 * (12 * 20 + 200 + 10 + 12 * 10)
    assert cost.backward.bytes == 4 * (12 * 10 + 12 * 20 + 200 + 10 + 200 + 12 * 20)
    assert cost.forward.intensity == cost.forward.operations / cost.forward.bytes
    assert cost.total.bytes == cost.forward.bytes + cost.backward.bytes
    half = layer_cost(dense, shape, dtype=torch.bfloat16)
    assert half.forward.bytes * 2 == cost.forward.bytes
    quantised = layer_cost(QuantizedSparseLinear.from_dense(dense), shape)
    pointers = 4 * 11
    assert quantised.forward.bytes == 4 * 240 + 240 + 9 * nonzeros + pointers + 40 + 4 * 120
    assert quantised.backward.bytes == 4 * 120 + 240 + 4 * nonzeros + 40 + 9 * nonzeros + pointers + 4 * 240
    assert quantised.saved_bytes == 240
    assert layer_cost(SparseLinear.from_dense(dense), shape).saved_bytes == 4 * 240


def test_saved_bytes_are_what_a_dense_layer_saves():
    layer = nn.Linear(20, 10)
    x = torch.randn(12, 20)
    assert layer_cost(layer, x.shape).saved_bytes == saved_for_backward_bytes(lambda: layer(x), layer)


def test_a_whole_model():
    model = resnet20(width=4).train()
    with torch.no_grad():
        model.bn1.running_mean.fill_(3.0)
    model.bn1.eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, 8, 8))
    mean = model.layer1[0].bn1.running_mean.clone()
    costs = model_costs(model, (2, 3, 8, 8))
    assert sum(cost.forward.operations for cost in costs) == counter.get_total_flops() + 2 * 10  # the classifier's bias
    assert [costs[0].name, costs[-1].name] == ["conv1", "linear"]
    assert costs[0].backward.operations == costs[0].forward.operations
    assert costs[1].backward.operations == 2 * costs[1].forward.operations
    assert model.training
    assert not model.bn1.training
    assert torch.equal(model.layer1[0].bn1.running_mean, mean)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_nonsense_is_refused():
    with pytest.raises(TypeError, match="ReLU"):
        layer_cost(nn.ReLU(), (1, 2))
    with pytest.raises(ValueError, match="expects"):
        layer_cost(nn.ConvTranspose2d(2, 4, 2), (1, 4, 4, 4))
    with pytest.raises(ValueError, match="20 features"):
        layer_cost(nn.Linear(20, 10), (4, 19))
    with pytest.raises(ValueError, match="expects"):
        layer_cost(nn.Conv2d(3, 4, 3), (4, 4, 8, 8))
    for wrong in ({"stride": 0}, {"dilation": 0}, {"stride": (1, 2, 3)}):
        with pytest.raises(ValueError, match="must be 2 positive sizes"):
            layer_cost(nn.Conv2d(3, 4, 3, **wrong), (4, 3, 8, 8))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        layer_cost(nn.Conv2d(3, 4, 3), (4, 3, 2, 8))
