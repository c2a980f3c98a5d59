"""Swapped models as dense ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qsparseprop.nn import QuantizedSparseLinear, SparseConv1d
from qsparseprop.nn._weight import SparseWeight
from qsparseprop.training.models import resnet20
from qsparseprop.utils.network_utils import swap_modules_with_dense, swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune, make_pruning_permanent

from ._helpers import set_weight


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("quantize", [True, False])
def test_a_network_and_back(inplace, quantize):
    original = resnet20(width=8)
    layerwise_magnitude_prune(original, 0.9)
    make_pruning_permanent(original)
    original.layer2[0].conv1.weight.requires_grad_(False)
    original.layer1.eval()
    model = swap_modules_with_sparse(original, (2, 3, 16, 16), inplace=False, quantize=quantize, include_dense=False,
                                     verbose=False)  # fmt: skip
    dense = swap_modules_with_dense(model, inplace=inplace)
    assert (dense is model) == inplace
    assert any(isinstance(m, SparseWeight) for m in model.modules()) != inplace
    for (name, a), (other, b) in zip(dense.named_modules(), original.named_modules(), strict=True):
        assert name == other
        assert type(a) is type(b)
        assert a.training == b.training
    for (name, a), (other, b) in zip(dense.named_parameters(), original.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad
    dense.load_state_dict(original.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(copy.deepcopy(dense)(x), copy.deepcopy(original)(x))
    # what a trace sees are torch's own operators, as an exporter to another format needs
    graph = torch.export.export(dense.eval(), (x,)).graph
    assert not [n for n in graph.nodes if "qsparseprop" in str(n.target)]


def test_shared_modules_stay_shared():
    layer = QuantizedSparseLinear.from_dense(set_weight(nn.Linear(6, 6), 0.3, 0))
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, nn.ReLU())})
    swap_modules_with_dense(model)
    assert type(model["a"]) is nn.Linear
    assert model["a"] is model["b"][0]


def test_a_layer_alone_and_nothing_to_do():
    conv = SparseConv1d.from_dense(set_weight(nn.Conv1d(4, 6, 3, bias=False), 0.5, 0))
    dense = swap_modules_with_dense(conv)
    assert type(dense) is nn.Conv1d
    assert torch.equal(dense.weight, conv.dense_weight())
    model = nn.Sequential(nn.Linear(2, 2))
    before = model[0]
    assert swap_modules_with_dense(model)[0] is before
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        swap_modules_with_dense([conv])
