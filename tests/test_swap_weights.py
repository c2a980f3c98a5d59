"""Weights that the model computes with or that start at zero, and what a layer has beside its weight."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from qsparseprop.nn import QuantizedSparseLinear, SparseLinear

from ._swap_examples import decisions, sparse_linear, swap

pytestmark = pytest.mark.usefixtures("sparse_is_faster")


# ---- weights that the model computes with ----


class ReadsWeight(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = sparse_linear(), sparse_linear(seed=1), how

    def forward(self, x):
        if self.how == "product":  # Swin, Mamba
            return self.b(nn.functional.linear(x, self.a.weight, self.a.bias))
        if self.how == "cosine":
            return self.b(nn.functional.linear(x, nn.functional.normalize(self.a.weight)))
        if self.how == "penalty":
            return self.b(self.a(x)) + self.a.weight.sum()
        if self.how == "data":
            return self.b(x @ self.a.weight.data)
        return self.b(self.a(x.to(self.a.weight.dtype).to(self.a.weight.device)))  # T5


@pytest.mark.parametrize("pruned", [None, "mask", "removed"])
@pytest.mark.parametrize("how", ["product", "cosine", "penalty", "data"])
def test_layers_whose_weight_is_read_stay_dense(how, pruned):
    model = ReadsWeight(how)
    if pruned:
        prune.l1_unstructured(model.a, "weight", 0.9)
    if pruned == "removed":
        prune.remove(model.a, "weight")
    x = torch.randn(4, 64)
    wanted = model(x)
    swap(model, x)
    assert type(model.a) is nn.Linear
    assert "weight is read" in decisions(model)["a"].reason
    assert type(model.b) is SparseLinear
    torch.testing.assert_close(model(x), wanted)


def test_looking_at_a_weight_is_not_reading_it():
    assert type(swap(ReadsWeight("dtype"), (4, 64)).a) is SparseLinear


def test_a_model_that_runs_with_dense_layers_only_is_left_as_it_was():
    class Checks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = sparse_linear()

        def forward(self, x):
            assert type(self.a) is nn.Linear, "only Linear here"
            return self.a(x)

    model = Checks()
    layer = model.a
    with pytest.raises(RuntimeError, match=r"(?s)only Linear here.*skip_modules"):
        swap(model, (4, 64))
    assert model.a is layer
    assert not hasattr(model, "swap_report")


# ---- layers that start at zero ----


@pytest.mark.parametrize("timed", [True, False])
def test_layers_that_start_at_zero_stay_dense(timed):
    class Branch(nn.Module):
        """A branch that starts at zero, as in LoRA, ControlNet and ReZero."""

        def __init__(self):
            super().__init__()
            self.a, self.zero, self.conv = sparse_linear(), nn.Linear(64, 64, bias=False), nn.Conv1d(1, 1, 3, padding=1)
            nn.init.zeros_(self.zero.weight)
            nn.init.zeros_(self.conv.weight)

        def forward(self, x):
            return x + self.conv(self.zero(self.a(x))[:, None])[:, 0]

    model = swap(Branch(), (4, 64), include_dense=timed)
    assert type(model.a) is SparseLinear
    assert type(model.zero) is nn.Linear
    assert type(model.conv) is nn.Conv1d
    assert "not pruned" in decisions(model)["zero"].reason
    assert "not pruned" in decisions(model)["conv"].reason


@pytest.mark.parametrize("prototype", [True, False])
def test_a_layer_that_was_pruned_empty_is_replaced(prototype):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prune.custom_from_mask(model[0], "weight", torch.zeros(8, 8))
    swap(model, (4, 8), include_dense=False, prototype=prototype, quantize=True)
    assert type(model[0]) is not nn.Linear
    assert prototype or type(model[0]) is QuantizedSparseLinear


def test_a_copy_of_the_model_is_recorded_with_its_masks():
    """Parametrizations and hooks of pruning are made permanent in the copy only."""
    model = nn.Sequential(sparse_linear(), nn.ReLU(), parametrizations.weight_norm(nn.Linear(64, 8)))
    prune.l1_unstructured(model[0], "weight", 0.9)
    before = copy.deepcopy(model.state_dict())
    swap(model, (4, 64), skip_modules=["0"])
    assert prune.is_pruned(model[0])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# ---- what a layer has beside its weight ----


def calls_another(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


BESIDE = {
    "forward": (calls_another, "forward was replaced"),
    "bound forward": (
        lambda m: setattr(m, "forward", types.MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), m)),
        "forward was replaced",
    ),
    "parameter": (lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(64))), "holds scale"),
    "module": (lambda m: m.add_module("adapter", nn.Linear(64, 64)), "holds adapter"),
    "hook of its state": (lambda m: m.register_state_dict_pre_hook(lambda *_: None), "has hooks"),
    "hook of loading": (lambda m: m.register_load_state_dict_post_hook(lambda *_: None), "has hooks"),
}


@pytest.mark.parametrize(("change", "words"), BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("example", [torch.ones(4, 64), None])
def test_layers_that_are_more_than_their_type_stay_dense(change, words, example):
    model = nn.Sequential(sparse_linear(), sparse_linear(seed=1))
    change(model[0])
    x = torch.randn(4, 64)
    wanted = model(x)
    swap(model, example, include_dense=example is not None)
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is SparseLinear
    assert words in decisions(model)["0"].reason
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pruned", [False, True])
def test_what_is_noted_at_parameters_is_taken_over(pruned):
    model = nn.Sequential(sparse_linear())
    if pruned:
        prune.l1_unstructured(model[0], "weight", 0.9)
    weight = model[0].weight_orig if pruned else model[0].weight
    weight._no_weight_decay = model[0].bias.lr_scale = 0.5
    swap(model, (4, 64))
    assert model[0].weight._no_weight_decay == model[0].bias.lr_scale == 0.5


def test_weights_of_single_bytes_stay_dense():
    layer = sparse_linear().to(torch.float8_e4m3fn)
    model = swap(nn.Sequential(layer), None, include_dense=False, min_sparsity=0.0)
    assert "float8" in decisions(model)["0"].reason
    with pytest.raises(TypeError, match="float8"):
        SparseLinear.from_dense(layer)


def test_a_layer_of_the_same_name_is_told_apart():
    kind = type("Linear", (nn.Module,), {"__module__": "elsewhere"})
    layer = kind()
    layer.weight = nn.Parameter(torch.zeros(64, 64))
    model = swap(nn.Sequential(layer), None, include_dense=False)
    assert decisions(model)["0"].reason == "nothing sparse replaces elsewhere.Linear"
