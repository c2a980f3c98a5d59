"""peft's adapters on swapped models, and swapped models with peft's adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qsparseprop import nn as qnn
from qsparseprop.nn._adapters import guard_merging
from qsparseprop.utils.adapters import attach_adapters
from qsparseprop.utils.fusion import chains
from qsparseprop.utils.network_utils import swap_modules_with_dense, swap_modules_with_sparse

from ._blocks import stepwise
from ._helpers import relative_error, set_weight

TARGETS = ("dense", "linear", "conv1d", "conv2d")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(16, 16)
        self.linear = set_weight(nn.Linear(16, 24), 0.15, 0)
        self.conv1d = set_weight(nn.Conv1d(4, 8, 3), 0.15, 1)
        self.conv2d = set_weight(nn.Conv2d(2, 4, 3), 0.15, 2)

    def forward(self, x):
        y = self.linear(self.dense(x).relu()).view(-1, 4, 6)
        return self.conv2d(self.conv1d(y).view(-1, 2, 4, 4))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def swap(model: nn.Module) -> nn.Module:
    swap_modules_with_sparse(model, (2, 16), include_dense=False, quantize=False, verbose=False, min_sparsity=0.5)
    guard_merging(model)
    return model


def parts(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if type(m) in (qnn.SparseLinear, qnn.SparseConv1d, qnn.SparseConv2d)]


# ---- any library ----


class Adapter(nn.Module):
    """As adapters are everywhere: the layer is frozen and something is added."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def adapt(model: nn.Module) -> nn.Module:
    assert type(model.linear) is nn.Linear
    model.linear = Adapter(model.linear)
    return model


def test_stand_ins_are_replaced_where_they_are():
    model, dense = swap(net()), adapt(net())
    before = model.linear
    result = attach_adapters(model, adapt)
    assert result is model
    assert model.linear.base_layer is before
    assert not any(p.requires_grad for p in before.parameters())
    assert model.conv1d.weight.requires_grad
    dense.linear.load_state_dict({**dense.linear.state_dict(), "down.weight": model.linear.down.weight,
                                  "up.weight": model.linear.up.weight})  # fmt: skip
    x = torch.randn(3, 16)
    assert relative_error(model(x), dense(x)) < 1e-5
    model(x).square().sum().backward()
    dense(x).square().sum().backward()
    for name in ("linear.up.weight", "linear.down.weight", "dense.weight", "conv2d.bias"):
        assert relative_error(model.get_parameter(name).grad, dense.get_parameter(name).grad) < 1e-4


def test_an_error_puts_the_layers_back():
    model = swap(net())
    before = dict(model.named_modules())

    def fail(_):
        raise KeyError("no such layer")

    with pytest.raises(KeyError, match="no such layer"):
        attach_adapters(model, fail)
    assert dict(model.named_modules()) == before


def test_copies_of_layers_are_sparse_too():
    def add(model):
        model.extra = copy.deepcopy(model.linear)
        model.linear.requires_grad_(False)

    model = swap(net())
    attach_adapters(model, add)
    assert type(model.extra) is qnn.SparseLinear
    assert model.extra is not model.linear
    assert model.extra.weight.requires_grad
    assert not model.linear.weight.requires_grad


def test_a_changed_weight_stays_dense():
    def take_out(model):
        with torch.no_grad():
            model.linear.weight.add_(1.0)

    model = swap(net())
    with pytest.warns(UserWarning, match="linear stays dense"):
        attach_adapters(model, take_out)
    assert type(model.linear) is nn.Linear
    assert parts(model) == ["conv1d", "conv2d"]


def test_what_cannot_have_adapters():
    layer = qnn.SparseLinear(4, 4)
    with pytest.raises(ValueError, match="sparse layer itself"):
        attach_adapters(layer, lambda m: m)


def test_adapters_on_layers_that_form_blocks():
    model = nn.Sequential(set_weight(nn.Linear(16, 24), 0.1, 0), nn.GELU(), set_weight(nn.Linear(24, 16), 0.1, 1))
    swap_modules_with_sparse(model, (1, 16), include_dense=False, verbose=False, fuse=True)

    def attach(m):
        m[0], m[2] = Adapter(m[0]), Adapter(m[2])
        return m

    model, x = attach_adapters(model, attach), torch.randn(5, 16, requires_grad=True)
    assert [type(m.base_layer) for m in (model[0], model[2])] == [qnn.QuantizedSparseLinear] * 2
    trained, results = [p for p in model.parameters() if p.requires_grad], []
    for call in (lambda: model(x), lambda: stepwise(model)(x)):
        torch.manual_seed(0)
        y = call()
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained])])
    assert chains(model)["0.base_layer"].joined == ("add", "GELU")
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).norm() < 0.05 * theirs.norm()


# ---- peft ----


def lora(model: nn.Module, **options) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": TARGETS, "r": 4, "init_lora_weights": False,
                                                         **options}))  # fmt: skip


@pytest.fixture(params=["adapters first", "swapped first"])
def pair(request):
    """A dense model and a sparse one with the same adapters."""
    pytest.importorskip("peft")
    dense = lora(net())
    sparse = swap(lora(net())) if request.param == "adapters first" else attach_adapters(swap(net()), lora)
    state = {k: v for k, v in dense.state_dict().items() if "lora_" in k}
    sparse.load_state_dict(state, strict=False)
    assert parts(sparse) == [f"base_model.model.{n}.base_layer" for n in TARGETS[1:]]
    return dense, sparse


def test_lora_trains(pair):
    x = torch.randn(3, 16)
    for _ in range(3):
        for model in pair:
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
            model.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        dense, sparse = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in pair)
        assert dense.keys() == sparse.keys()
        for name, wanted in dense.items():
            assert "lora_" in name
            assert relative_error(sparse[name].grad, wanted.grad) < 1e-4
            assert relative_error(sparse[name], wanted) < 1e-4


def test_merging_lora(pair):
    dense, sparse = pair
    x = torch.randn(3, 16)
    for model in (sparse, copy.deepcopy(sparse)):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        for merge in ("merge_and_unload", "merge_adapter"):
            with pytest.raises(NotImplementedError, match=r"adapters of model.linear, .*swap_modules_with_dense"):
                getattr(model, merge)()
            after = model.state_dict()
            assert list(before) == list(after)
            assert all(torch.equal(before[k], v) for k, v in after.items())
    merged = swap_modules_with_dense(copy.deepcopy(sparse)).merge_and_unload()
    assert relative_error(merged(x), dense(x)) < 1e-5
    unloaded = sparse.unload()
    assert type(unloaded.linear) is qnn.SparseLinear
    assert relative_error(unloaded(x), net()(x)) < 1e-5


def test_merging_where_only_dense_layers_have_adapters():
    pytest.importorskip("peft")
    model = swap(lora(net(), target_modules=["dense"]))
    x = torch.randn(3, 16)
    wanted = model(x)
    merged = model.merge_and_unload()
    assert relative_error(merged(x), wanted) < 1e-5
    assert type(merged.linear) is qnn.SparseLinear


def test_a_second_adapter(pair):
    peft = pytest.importorskip("peft")
    dense, sparse = pair
    x = torch.randn(3, 16)
    config = peft.LoraConfig(target_modules=TARGETS, r=2)
    attach_adapters(sparse, lambda m: m.add_adapter("second", config))
    sparse.set_adapter("second")
    assert relative_error(sparse(x), net()(x)) < 1e-5
    sparse.set_adapter("default")
    assert relative_error(sparse(x), dense(x)) < 1e-5


def test_other_adapters():
    peft = pytest.importorskip("peft")
    x = torch.randn(3, 16)
    for config in (peft.IA3Config(target_modules=["linear"], feedforward_modules=[]),
                   peft.VeraConfig(target_modules=["linear"], r=4)):  # fmt: skip
        model = attach_adapters(swap(net()), lambda m, c=config: peft.get_peft_model(m, c))
        assert relative_error(model(x), net()(x)) < 1e-5
        model(x).sum().backward()
    with pytest.warns(UserWarning, match="stays dense"):
        model = attach_adapters(swap(net()), lambda m: lora(m, target_modules=["linear"], init_lora_weights="pissa"))
    assert relative_error(model(x), net()(x)) < 1e-5
    model = attach_adapters(swap(net()), lambda m: lora(m, target_modules=["dense"], modules_to_save=["linear"]))
    saved = model.base_model.model.linear.modules_to_save["default"]
    assert type(saved) is qnn.SparseLinear
    assert saved.weight.requires_grad
    with pytest.raises(ValueError, match="not supported"):
        lora(swap(net()))  # peft's own sentence: it knows torch's layers
