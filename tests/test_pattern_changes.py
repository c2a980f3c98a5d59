"""Patterns that change between forward and backward, layers that lose all weights, optimizers that cannot follow."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qsparseprop import nn as qnn
from qsparseprop.utils.network_utils import swap_modules_with_sparse

from ._helpers import KINDS, example, set_weight

# ---- changes of the pattern between forward and backward ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["mask", "regrow", "load"])
def test_backward_after_a_change_of_the_pattern(kind, change):
    """Kernels read past their lists, or a gradient of the old size came to the new weight."""
    layer, _, x = example(kind)
    mask = torch.rand(layer.weight_shape) < 0.5
    smaller = copy.deepcopy(layer)
    smaller.apply_further_mask(mask)

    def alter() -> None:
        if change == "mask":
            layer.apply_further_mask(mask)
        elif change == "regrow":
            layer.regrow(mask)
        else:
            layer.load_state_dict(smaller.state_dict())

    graphs = [layer(x).sum(), layer(x).sum() + layer.weight.sum(), layer.weight.sum(), layer.weight.square().sum()]
    only_bias = copy.deepcopy(layer)
    only_bias.weight.requires_grad_(False)
    alone = only_bias(x).sum()
    alter()
    only_bias.apply_further_mask(mask)
    for graph in graphs:
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|pattern of a sparse weight has"):
            graph.backward()
        assert layer.weight.grad is None
    alone.backward()  # for which no weight is needed
    assert only_bias.bias.grad is not None
    layer(x).square().sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_input_after_a_change_of_the_pattern(kind):
    layer, _, x = example(kind)
    layer.weight.requires_grad_(False)
    x.requires_grad_()
    y = layer(x)
    layer.apply_further_mask(torch.rand(layer.weight_shape) < 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_backward_after_what_changes_nothing(kind):
    layer, _, x = example(kind)
    y = layer(x).sum()
    layer.apply_further_mask(torch.ones(layer.weight_shape))
    layer.regrow(layer.mask())
    y.backward()
    assert layer.weight.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_layer_after_a_change_of_the_pattern(kind):
    layer, _, x = example(kind)
    y = torch.compile(layer, backend="aot_eager")(x).sum()
    layer.apply_further_mask(torch.rand(layer.weight_shape) < 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_graph_of_a_block_after_a_change_of_the_pattern():
    model = nn.Sequential(set_weight(nn.Conv2d(3, 8, 3), 0.2, 0), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                          set_weight(nn.Linear(8 * 36, 4), 0.2, 1))  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    swap_modules_with_sparse(model, x, include_dense=False, verbose=False, min_sparsity=0.5, fuse=True)
    y = model(x).sum()
    for module in (model[0], model[4]):
        module.apply_further_mask(torch.rand(module.weight_shape) < 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    model(x).sum().backward()


# ---- layers without weights ----

EMPTY = {
    "pruned": lambda: set_weight(nn.Linear(5, 3), 0.0, 0),
    "no outputs": lambda: nn.Linear(5, 0),
    "no inputs": lambda: nn.Linear(0, 3),
}
OPTIMIZERS = ("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop",
              "Rprop", "SGD")  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", EMPTY)
def test_layers_without_weights(name, quantized):
    dense = EMPTY[name]()
    layer = (qnn.QuantizedSparseLinear if quantized else qnn.SparseLinear).from_dense(dense)
    x = torch.randn(2, dense.in_features, requires_grad=True)
    assert torch.equal(layer(x), dense(x))
    assert torch.equal(layer.to_dense()(x), dense(x))
    for optimizer in OPTIMIZERS:
        for options in ({}, {"foreach": True}):
            trained = copy.deepcopy(layer)
            step = getattr(torch.optim, optimizer)(trained.parameters(), **options)
            for _ in range(2):
                trained(x).sum().backward()
                (trained(x).sum() + trained.dense_weight().sum()).backward()
                step.step()
            assert trained.weight.grad is None
            assert trained.bias.numel() == 0 or not torch.equal(trained.bias, layer.bias)
    assert x.grad.shape == x.shape
    trained.regrow(torch.ones(trained.weight_shape))
    trained(x).sum().backward()
    assert dense.weight.numel() == 0 or trained.weight.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_loses_all_of_its_weights(kind):
    layer, dense, x = example(kind)
    optimizer = torch.optim.Adafactor(layer.parameters())
    layer(x).sum().backward()
    optimizer.step()
    layer.apply_further_mask(torch.zeros(layer.weight_shape), optimizer)
    for _ in range(2):
        optimizer.step()
        layer(x).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.to_dense().weight, torch.zeros_like(dense.weight))


def test_a_compiled_layer_without_weights():
    layer = qnn.SparseLinear.from_dense(set_weight(nn.Linear(5, 3), 0.0, 0))
    torch.compile(layer, backend="aot_eager")(torch.randn(2, 5)).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((3,), 2.0))


# ---- optimizers that cannot follow ----


class Lookahead(torch.optim.Optimizer):
    """Keeps slow copies of the parameters, as some wrappers do."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()


def test_wrappers_with_a_state_of_their_own():
    layer, _, _ = example("SparseLinear")
    before = layer.nonzeros
    with pytest.raises(NotImplementedError, match="Lookahead keeps a state beside"):
        layer.apply_further_mask(torch.zeros(layer.weight_shape), Lookahead(torch.optim.SGD(layer.parameters(), 0.1)))
    assert layer.nonzeros == before


def test_what_is_no_optimizer():
    layer, _, _ = example("SparseLinear")
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got dict"):
        layer.apply_further_mask(torch.ones(layer.weight_shape), {})


def test_state_that_belongs_to_no_single_weight():
    """A preconditioner of another size, or the moments of a pattern that changed without the optimizer."""
    layer, _, x = example("SparseLinear")
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(x).sum().backward()
    optimizer.step()
    layer.apply_further_mask(torch.rand(layer.weight_shape) < 0.5)
    before = layer.nonzeros
    with pytest.raises(NotImplementedError, match="AdamW keeps exp_avg of shape"):
        layer.apply_further_mask(torch.rand(layer.weight_shape) < 0.5, optimizer)
    assert layer.nonzeros == before
