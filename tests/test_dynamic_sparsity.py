"""Patterns that change while a model trains: pruned models, the gradual schedule, regrowth, optimizers' state."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.pruning import BaseSparsifier
from torch.nn.utils import prune

import qsparseprop
from qsparseprop import nn as qnn
from qsparseprop.training.models import resnet20
from qsparseprop.utils.network_utils import sparsity, swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import GradualPruner, cubic_sparsity, layerwise_magnitude_prune

from ._helpers import generator, random_mask, relative_error, set_weight

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
}


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
                          nn.Flatten(), nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 4))  # fmt: skip
    for index in (0, 2, 5):
        weight = model[index].weight
        with torch.no_grad():
            weight.mul_(torch.rand(weight.shape, generator=generator(index)) < 0.5)
    return model


def pair(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """The same network with float32 sparse modules, and dense with masks."""
    dense = small_net(seed)
    sparse = swap_modules_with_sparse(copy.deepcopy(dense), (2, 3, 8, 8), quantize=False, include_dense=False,
                                      min_sparsity=0.3, verbose=False)  # fmt: skip
    for index in (0, 2, 5):
        prune.custom_from_mask(dense[index], "weight", dense[index].weight != 0)
    return sparse, dense


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, after=lambda: None, seed: int = 0) -> None:
    batches = generator(seed)
    for _ in range(steps):
        x, y = torch.randn(8, 3, 8, 8, generator=batches), torch.randint(4, (8,), generator=batches)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()


def assert_same_weights(sparse: nn.Module, dense: nn.Module, tolerance: float = 1e-4) -> None:
    for index in (0, 2, 5):
        assert torch.equal(sparse[index].mask(), dense[index].weight_mask != 0)
        weight = dense[index].weight_orig * dense[index].weight_mask
        assert relative_error(sparse[index].dense_weight(), weight) < tolerance
        assert relative_error(sparse[index].bias, dense[index].bias) < tolerance
    assert relative_error(sparse[7].weight, dense[7].weight) < tolerance


# ---- models that something else has pruned ----


class Smallest(BaseSparsifier):
    """torch's own sparsifier for single weights knows matrices only."""

    def update_mask(self, module, tensor_name, sparsity, **_):
        mask = getattr(module.parametrizations, tensor_name)[0].mask
        weight = getattr(module, tensor_name).abs()
        mask.copy_(weight > weight.quantile(sparsity))


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_models_pruned_by_torch_ao(squash, kind):
    layer = nn.Linear(16, 12) if kind is nn.Linear else nn.Conv2d(4, 12, 2, padding=1)
    x = torch.randn(5, 16) if kind is nn.Linear else torch.randn(5, 4, 3, 3)
    model = nn.Sequential(layer, nn.ReLU())
    sparsifier = Smallest({"sparsity": 0.8})
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    wanted = model(x).detach()
    zeros = (model[0].weight == 0).float().mean().item()
    assert zeros > 0.75
    if squash:
        sparsifier.squash_mask()
    assert sparsity(model) == pytest.approx(zeros)
    direct = getattr(qnn, f"Sparse{kind.__name__}").from_dense(model[0])
    assert torch.allclose(direct(x).relu(), wanted, atol=1e-5)
    timed = swap_modules_with_sparse(model, x, inplace=False, quantize=False, verbose=False, min_sparsity=0.5)
    assert timed.swap_report[0].dense_ms > 0
    swap_modules_with_sparse(model, x, quantize=False, include_dense=False, verbose=False, min_sparsity=0.5)
    assert isinstance(model[0], qnn.SparseLinear if kind is nn.Linear else qnn.SparseConv2d)
    assert model[0].sparsity == pytest.approx(zeros)
    assert model[0].weight.requires_grad
    assert torch.allclose(model(x), wanted, atol=1e-5)


# ---- the schedule ----


def test_the_cubic_schedule():
    """Equation 1 of Zhu and Gupta: the sparsity rises from the initial to the final one, and fastest at first."""
    assert [cubic_sparsity(s, 0.5, 0.9, 10, 20) for s in (0, 10, 15, 20, 99)] == pytest.approx(
        [0.5, 0.5, 0.9 - 0.4 / 8, 0.9, 0.9])  # fmt: skip
    values = [cubic_sparsity(s, 0.0, 0.95, 0, 100) for s in range(101)]
    rises = [b - a for a, b in pairwise(values)]
    assert all(a > b > 0 for a, b in pairwise(rises))
    with pytest.raises(ValueError, match="begin must come before end"):
        cubic_sparsity(3, 0.5, 0.9, 10, 10)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_same_schedule_as_dense_with_masks(name, scope):
    """Values, gradients and all that the optimizer keeps for each weight go together, or these would part ways."""
    models = pair()
    for model in models:
        optimizer = OPTIMIZERS[name](model.parameters())
        pruner = GradualPruner(model, optimizer, 0.9, begin_step=2, end_step=9, interval=3, scope=scope)
        assert 0.4 < pruner.sparsity < 0.6
        train(model, optimizer, 15, pruner.step)
        assert pruner.steps == 15
        assert pruner.sparsity == pytest.approx(0.9, abs=0.01)
    assert_same_weights(*models, tolerance=1e-3 if name == "rmsprop" else 1e-4)


def test_state_keeps_its_place():
    """Each number stays with its weight, and what does not belong to single weights is left alone."""
    layer = qnn.SparseLinear.from_dense(set_weight(nn.Linear(20, 12), 0.5, 0))
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(4, 20)).sum().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    marks = torch.arange(240.0).view(12, 20)
    old = layer.mask()
    for tensor in (layer.weight.data, layer.weight.grad, state["exp_avg"], state["exp_avg_sq"]):
        tensor.copy_(marks[old])
    step = state["step"].clone()
    keep, grow = random_mask((12, 20), 0.6, 1), random_mask((12, 20), 0.4, 2)
    layer.apply_further_mask(keep, optimizer)
    for tensor in (layer.weight.data, layer.weight.grad, state["exp_avg"], state["exp_avg_sq"]):
        assert torch.equal(tensor, marks[old & keep])
    layer.regrow(grow, values=-marks, optimizer=optimizer)
    new = (old & keep) | grow
    assert torch.equal(layer.mask(), new)
    assert torch.equal(layer.weight.data, torch.where(old & keep, marks, -marks)[new])
    for tensor in (layer.weight.grad, state["exp_avg"], state["exp_avg_sq"]):
        assert torch.equal(tensor, torch.where(old & keep, marks, 0)[new])
    assert torch.equal(state["step"], step)
    layer(torch.randn(4, 20)).sum().backward()
    optimizer.step()


def test_a_schedule_can_be_continued():
    whole, halves = pair()[0], pair()[0]
    optimizer = OPTIMIZERS["adam"](whole.parameters())
    train(whole, optimizer, 10, GradualPruner(whole, optimizer, 0.9, end_step=8).step)
    optimizer = OPTIMIZERS["adam"](halves.parameters())
    first = GradualPruner(halves, optimizer, 0.9, end_step=8)
    batches = generator(0)

    def part(pruner, steps):
        for _ in range(steps):
            x, y = torch.randn(8, 3, 8, 8, generator=batches), torch.randint(4, (8,), generator=batches)
            optimizer.zero_grad()
            F.cross_entropy(halves(x), y).backward()
            optimizer.step()
            pruner.step()

    part(first, 4)
    second = GradualPruner(halves, optimizer, 0.9, end_step=8)
    second.load_state_dict(first.state_dict())
    part(second, 6)
    wanted, got = whole.state_dict(), halves.state_dict()
    assert all(torch.equal(wanted[key], got[key]) for key in wanted)
    with pytest.raises(ValueError, match="initial_sparsity must have 1 numbers, got 2"):
        second.load_state_dict({"steps": 1, "initial_sparsity": [0.1, 0.2]})
    known = second.state_dict()
    for key, value in ("initial_sparsity", ["float"]), ("initial_sparsity", [1.5]), ("steps", 0.5), ("steps", "1"):
        with pytest.raises((ValueError, TypeError), match=f"{key} must be"):
            second.load_state_dict({**known, key: value})
    assert second.state_dict() == known


def test_a_quantised_network_is_pruned_on():
    model = resnet20(width=8)
    layerwise_magnitude_prune(model, 0.8)
    swap_modules_with_sparse(model, (2, 3, 16, 16), include_dense=False, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    pruner = GradualPruner(model, optimizer, 0.95, end_step=4, skip=["layer1.0.conv1"])
    untouched = model.layer1[0].conv1.nonzeros
    x, y = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
    due = []
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        due.append(pruner.step())
    assert due == [True] * 5 + [False]
    assert pruner.sparsity == pytest.approx(0.95, abs=1e-3)
    assert model.layer1[0].conv1.nonzeros == untouched


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"final_sparsity": 1.0}, r"final_sparsity must be in \[0, 1\), got 1.0"),
        ({"initial_sparsity": -0.1}, r"initial_sparsity must be in \[0, 1\), got -0.1"),
        ({"begin_step": 5}, "come before end_step"),
        ({"interval": 0}, "interval must be positive"),
        ({"scope": "model"}, "scope must be 'global' or 'layer', got 'model'"),
        ({"skip": ["7"]}, "skip names nothing that could be pruned on: '7'"),
        ({"skip": ["0", "2", "5"]}, "neither sparse modules nor masks"),
    ],
)
def test_impossible_schedules(arguments, words):
    model = pair()[0]
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(ValueError, match=words):
        GradualPruner(model, optimizer, **{"final_sparsity": 0.9, "end_step": 5, **arguments})


def test_optimizers_that_cannot_follow():
    model = pair()[0]
    before = model[5].mask()
    with pytest.raises(ValueError, match="the optimizer does not train the weight"):
        GradualPruner(model, torch.optim.SGD(model[7].parameters(), 0.1), 0.9, end_step=5)
    with pytest.raises(NotImplementedError, match="LBFGS keeps its state for all parameters together"):
        model[5].apply_further_mask(torch.zeros_like(before), torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match=r"values must have shape \(20, 72\), got \(3,\)"):
        model[5].regrow(before, torch.zeros(3))
    with pytest.raises(ValueError, match=r"mask must have shape \(20, 72\), got \(3,\)"):
        model[5].regrow(torch.zeros(3))
    assert torch.equal(model[5].mask(), before)


# ---- regrowth ----


@pytest.mark.parametrize("kind", ["SparseLinear", "QuantizedSparseLinear", "SparseConv1d", "QuantizedSparseConv2d"])
def test_regrown_weights_compute_and_train(kind):
    dense, shape = {"Linear": (nn.Linear(20, 12), (5, 20)), "Conv1d": (nn.Conv1d(4, 6, 3), (5, 4, 9)),
                    "Conv2d": (nn.Conv2d(4, 6, 3), (5, 4, 6, 6))}[kind.partition("Sparse")[2]]  # fmt: skip
    set_weight(dense, 0.4, 0)
    cls = getattr(qnn, kind)
    layer, x = cls.from_dense(dense), torch.randn(shape)
    layer(x).sum().backward()
    parameter, wanted = layer.weight, layer(x)
    grow = random_mask(layer.weight_shape, 0.5, 3)
    older = layer(x)
    layer.regrow(grow)
    assert layer.weight is parameter
    assert torch.equal(layer.mask(), (dense.weight != 0) | grow)
    assert relative_error(layer(x), wanted) < 1e-6  # the new ones are zero
    layer.weight.grad = None
    layer(x).square().sum().backward()
    assert (layer.dense_weight().detach()[grow & (dense.weight == 0)] == 0).all()
    gradient = torch.zeros(layer.weight_shape)
    gradient[layer.mask()] = layer.weight.grad
    assert (gradient[grow] != 0).float().mean() > 0.7
    assert older.shape == wanted.shape
    everything = torch.ones(layer.weight_shape)
    layer.regrow(everything, values=torch.ones(layer.weight_shape))
    assert layer.sparsity == 0.0
    empty = cls.like(dense)
    empty.regrow(dense.weight != 0, values=dense.weight)
    with torch.no_grad():
        empty.bias.copy_(dense.bias)
    assert relative_error(empty(x), wanted) < 1e-6


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not beside the tests")
def test_the_example_of_rigl(tmp_path):
    code = (EXAMPLES / "rigl.py").read_text()
    assert len(code.splitlines()) < 80
    (tmp_path / "rigl.py").write_text(code.replace("STEPS, INTERVAL, FRACTION = 440", "STEPS, INTERVAL, FRACTION = 66"))
    package = os.pathsep.join([str(Path(qsparseprop.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "rigl.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": package},
                          capture_output=True, text=True, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    *_, result = done.stdout.splitlines()
    assert result.startswith("66 steps, ")
    assert float(result.split("top-1 ")[1].split(" %")[0]) > 50
