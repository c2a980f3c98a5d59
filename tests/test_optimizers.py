"""After some steps, sparse layers have the weights that dense training with masks gives."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from qsparseprop.nn import SparseLinear
from qsparseprop.utils.network_utils import swap_modules_with_sparse

from ._helpers import generator, relative_error, set_weight

STEPS = 12

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 1e-2, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.02, "weight_decay": 1e-2}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.002, "momentum": 0.5, "weight_decay": 1e-2}),
}
WAYS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}

SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 4, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS),
}


def pair() -> tuple[nn.Module, nn.Module]:
    """The same network with float32 sparse modules, and dense with masks."""
    torch.manual_seed(0)
    # no bias in front of BatchNorm: its gradient is rounding only, which Adam would make steps of
    dense = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 20), nn.ReLU(),
                          nn.Linear(20, 4))  # fmt: skip
    for index in (0, 3, 6):
        prune.l1_unstructured(dense[index], "weight", 0.7)
    sparse = swap_modules_with_sparse(dense, (2, 3, 8, 8), inplace=False, quantize=False, include_dense=False,
                                      min_sparsity=0.5, verbose=False)  # fmt: skip
    return sparse, dense


def train(model: nn.Module, optimizer, scheduler=None, clip: float | None = None) -> None:
    batches = generator(0)
    for _ in range(STEPS):
        x, y = torch.randn(8, 3, 8, 8, generator=batches), torch.randint(4, (8,), generator=batches)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            assert norm > clip  # or it would do nothing
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same_weights(sparse: nn.Module, dense: nn.Module, tolerance: float = 2e-5) -> None:
    for a, b in zip(sparse, dense, strict=True):
        if hasattr(b, "weight_mask"):
            assert relative_error(a.dense_weight(), b.weight_orig * b.weight_mask) < tolerance
            assert (a.dense_weight()[b.weight_mask == 0] == 0).all()
        elif hasattr(b, "weight"):
            assert relative_error(a.weight, b.weight) < tolerance
        if getattr(b, "bias", None) is not None:
            assert relative_error(a.bias, b.bias) < 10 * tolerance


@pytest.mark.parametrize(("name", "way"), [
    (name, way) for name, way in itertools.product(OPTIMIZERS, WAYS) if not (name == "RMSprop" and way == "fused")
])  # fmt: skip
def test_like_dense_training_with_masks(name, way):
    make, arguments = OPTIMIZERS[name]
    models = pair()
    start = copy.deepcopy(models[0])
    for model in models:
        train(model, make(model.parameters(), **arguments, **WAYS[way]))
    assert relative_error(models[0][0].weight, start[0].weight.detach()) > 1e-3  # it did train
    assert_same_weights(*models, tolerance=2e-4 if name == "RMSprop" else 2e-5)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_schedules_and_clipping(scheduler, clip):
    """prune's masks keep the gradients of what is masked at zero, so that norms agree as well."""
    models = pair()
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        train(model, optimizer, SCHEDULERS[scheduler](optimizer), clip)
    assert_same_weights(*models)


def test_parameter_groups_and_the_optimizers_state():
    models = pair()
    for model in models:
        weights = [p for p in model.parameters() if p.numel() > 60]
        others = [p for p in model.parameters() if p.numel() <= 60]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "lr": 0.001}]
        first = torch.optim.AdamW(groups, 0.01)
        train(model, first)
        second = torch.optim.AdamW(groups, 0.01)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        train(model, second)
    assert_same_weights(*models, tolerance=1e-4)


@pytest.mark.parametrize("change", ["state", "regrow", "optimizer's state"])
@pytest.mark.parametrize("name", ["SGD momentum", "Adam", "AdamW", "Adagrad"])
def test_fused_steps_by_a_state_of_another_size_are_refused(name, change):
    """They would write beside the state in memory, of which torch checks nothing."""
    kind, options = OPTIMIZERS[name]

    def make(density):
        torch.manual_seed(0)
        layer = SparseLinear.from_dense(set_weight(nn.Linear(64, 64), density, 0))
        return layer, kind(layer.parameters(), **options, fused=True)

    layer, optimizer = make(0.1)
    other, fresh = make(0.2)
    x = torch.randn(4, 64)
    layer(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    if change == "state":
        layer.load_state_dict(other.state_dict())
    elif change == "regrow":
        layer.regrow(other.mask())
    else:
        fresh.load_state_dict(optimizer.state_dict())
        layer, optimizer = other, fresh
    layer(x).sum().backward()
    weight = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="Make a new one"):
        optimizer.step()
    assert torch.equal(layer.weight.detach(), weight)
