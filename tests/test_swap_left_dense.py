"""Layers that stay dense, with the reason, and modules that several places share."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from qsparseprop.nn import QuantizedSparseLinear, SparseLinear
from qsparseprop.utils.network_utils import swap_modules_with_sparse

from ._helpers import relative_error, set_weight
from ._swapping import SHAPE, decisions, swap

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what is left alone ----


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("how", ["name", "object", "both"])
def test_skipped_layers(net, how, inplace):
    skip = {"name": ["last"], "object": [net.last], "both": ["last", net.head]}[how]
    skipped = {"last", "head"} if how == "both" else {"last"}
    model = swap(net, skip_modules=skip, inplace=inplace)
    for name, d in decisions(model).items():
        assert d.swapped == (name not in {*skipped, "stem"})
        assert (d.reason == "in skip_modules") == (name in skipped)
    assert type(model.last) is nn.Conv2d
    assert (model.last is net.last) == inplace


@pytest.mark.parametrize("inplace", [True, False])
def test_skipping_a_container_skips_what_it_holds(net, inplace):
    for skip in ("block", net.block):
        model = swap(copy.deepcopy(net) if skip == "block" else net, skip_modules=[skip], inplace=inplace)
        assert decisions(model)["block.2"].reason == "in skip_modules"
        assert decisions(model)["last"].swapped


class Subclass(nn.Linear):
    """A behaviour of its own."""

    def forward(self, x):
        return super().forward(x).square()


def _reflecting(model):
    model[0] = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")


def _subclass(model):
    model[0] = Subclass(4, 4)


def _hook(model):
    model[0].register_forward_hook(lambda *_: None)


def _pre_hook(model):
    model[0].register_forward_pre_hook(lambda *_: None)


def _backward_hook(model):
    model[0].register_full_backward_hook(lambda *_: None)


def _parametrized(model):
    parametrize.register_parametrization(model[0], "weight", nn.Identity())


def _weight_norm(model):
    nn.utils.parametrizations.weight_norm(model[0])


def _nan(model):
    model[0].weight.data[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_reflecting, "padding_mode='reflect'"), (_subclass, "Subclass is a subclass"), (_hook, "has hooks"),
        (_pre_hook, "has hooks"), (_backward_hook, "has hooks"), (_parametrized, "parametriz|subclass"),
        (_weight_norm, "parametriz|subclass"), (_nan, "NaN or Inf"),
    ],
)  # fmt: skip
def test_unsupported_layers_stay_dense_with_the_reason(change, reason):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        set_weight(layer, 0.3, 0)
    change(model)
    first = model[0]
    with torch.no_grad():
        for p in first.parameters():
            p.mul_(0 if "NaN" not in reason else 1)
    swap(model, (2, 4, 4, 4), min_sparsity=0.5)
    assert model[0] is first
    d = decisions(model)["0"]
    assert not d.swapped
    assert any(part in d.reason for part in reason.split("|")), d.reason
    assert type(model[1]) is QuantizedSparseLinear


def test_a_layer_alone_stays():
    model = set_weight(nn.Linear(40, 40), 0.1, 0)
    assert swap(model, (2, 4)) is model
    (d,) = model.swap_report
    assert not d.swapped
    assert "from_dense" in d.reason


def test_a_layer_that_the_input_does_not_reach(net):
    net.unused = set_weight(nn.Linear(3, 40), 0.1, 0)
    timed = swap_modules_with_sparse(copy.deepcopy(net), SHAPE, verbose=False)
    assert type(timed.unused) is nn.Linear
    assert "not reached" in decisions(timed)["unused"].reason
    assert type(swap(net).unused) is QuantizedSparseLinear
    assert decisions(net)["unused"].input_shape is None


def test_a_layer_without_its_weight_yet():
    model = nn.Sequential(set_weight(nn.Linear(40, 40), 0.1, 0), nn.LazyLinear(3))
    swap(model, (2, 40))
    assert type(model[0]) is QuantizedSparseLinear
    assert "subclass" in decisions(model)["1"].reason


def test_weights_that_another_module_shares_stay_shared():
    """Two modules with one Parameter: replacing one of them would part them without a word."""
    embedding, head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
    with torch.no_grad():
        embedding.weight[torch.rand(30, 8) < 0.9] = 0
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    swap(model, torch.randint(30, (2, 3)))
    assert model[1].weight is model[0].weight
    assert decisions(model)["1"].reason


# ---- shared modules ----


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = set_weight(nn.Linear(6, 6), 0.1, 0)
        self.second = self.first
        self.inner = nn.ModuleList([nn.Sequential(self.first, nn.ReLU())])
        self.inner.append(self.inner[0])
        self.also = nn.Linear(6, 6)

    def forward(self, x):
        for layer in (self.first, self.second, *self.inner, self.also):
            x = layer(x)
        return x


@pytest.mark.parametrize("inplace", [True, False])
def test_shared_modules_stay_shared(inplace):
    model = Shared()
    wanted = model(torch.ones(2, 6))
    swapped = swap(model, (2, 6), quantize=False, inplace=inplace)
    assert type(swapped.first) is SparseLinear
    assert swapped.second is swapped.first is swapped.inner[0][0]
    assert swapped.inner[1] is swapped.inner[0]
    assert len(swapped.swap_report) == 2
    assert sum(p.numel() for p in swapped.parameters()) == swapped.first.nonzeros + 6 + 36 + 6
    assert relative_error(swapped(torch.ones(2, 6)), wanted) < 1e-5
    if not inplace:
        assert type(model.first) is nn.Linear
