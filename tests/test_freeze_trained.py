"""Models that were trained sparse: the frozen model is that of the dense one they stand for, bit for bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qsparseprop import GradualPruner, swap_modules_with_sparse
from qsparseprop.inference import freeze
from qsparseprop.utils.network_utils import swap_modules_with_dense

from ._frozen import data
from ._helpers import sampled


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(16), nn.SiLU(), nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))  # fmt: skip


def trained(model, pruner=None, steps=6):
    """After a few steps of training; the optimizer is made by who asks for a pruner of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    gradual = None if pruner is None else pruner(model, optimizer)
    torch.manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data(32, 3, 10, 10, seed=step)), torch.arange(32) % 5)
        loss.backward()
        optimizer.step()
        if gradual is not None:
            gradual.step()
    return model


def check(model, least):
    """Freeze it and the dense model that it stands for."""
    calibration, x = [data(64, 3, 10, 10, seed=s) for s in (11, 12)], data(64, 3, 10, 10, seed=13)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    frozen = freeze(model, calibration)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    dense = swap_modules_with_dense(copy.deepcopy(model)).eval()
    again = freeze(dense, calibration)
    assert torch.equal(frozen(x), again(x))
    assert [layer.zeros for layer in frozen.report] == [layer.zeros for layer in again.report]
    assert all(layer.quantised and layer.zeros >= least for layer in frozen.report)
    with torch.no_grad():
        exact = dense.double()(x.double())
    assert (frozen(x).double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(("zeros", "settings"), sampled(
    ((zeros, settings) for zeros in (0.0, 0.5, 0.9) for settings in ({}, {"fuse": True}, {"quantize": False})), every=2,
), ids=str)  # fmt: skip
def test_trained_sparse(zeros, settings):
    model = network()
    for layer in (model[0], model[3], model[9], model[11]):
        layer.weight.data *= torch.rand_like(layer.weight) >= zeros
    swapped = swap_modules_with_sparse(model, None, verbose=False, include_dense=False, min_sparsity=0.0, **settings)
    assert all("Sparse" in type(swapped[i]).__name__ for i in (0, 3, 9, 11))
    check(trained(swapped), 0.8 * zeros)


def test_pruned_while_it_was_trained():
    swapped = swap_modules_with_sparse(network(), None, verbose=False, include_dense=False, min_sparsity=0.0)
    model = trained(swapped, lambda m, o: GradualPruner(m, o, 0.85, end_step=8, interval=2), steps=10)
    assert sum(layer.zeros for layer in freeze(model, [data(16, 3, 10, 10)]).report) > 4 * 0.75
    check(model, 0.0)
