"""What is saved, and what a layer or a model is after it was loaded."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import prune

from qsparseprop import nn as qnn
from qsparseprop.nn import accept_dense_state
from qsparseprop.nn._weight import SparseWeight
from qsparseprop.training.models import resnet18, resnet20
from qsparseprop.utils.network_utils import swap_modules_for_state, swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune

from ._states import KINDS, assert_same, layer_and_input, skeleton, snapshot, swapped

# ---- round trips ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assign", [False, True])
def test_into_a_module_of_another_nonzero_count(kind, assign):
    layer, _, x = layer_and_input(kind)
    other, _, _ = layer_and_input(kind, 0.6, seed=5)
    other(x).sum().backward()
    assert other.nonzeros != layer.nonzeros
    parameter = other.weight
    other.load_state_dict(snapshot(layer), assign=assign)
    assert (other.weight is parameter) == (not assign)
    assert_same(other.state_dict(), layer.state_dict())
    assert torch.equal(other(x), layer(x))
    other(x).sum().backward()
    assert other.weight.grad.shape == other.weight.shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", [None, "meta"])
def test_into_a_skeleton(kind, device):
    layer, _, x = layer_and_input(kind)
    empty = skeleton(layer, device)
    assert empty.nonzeros == 0
    if device is None:
        assert torch.equal(empty(x), torch.zeros_like(layer(x)))
    else:
        before = empty.weight
        with pytest.raises(RuntimeError, match="weight: the module is on the meta device"):
            empty.load_state_dict(layer.state_dict())
        assert empty.weight is before
    empty.load_state_dict(snapshot(layer), assign=device == "meta")
    assert torch.equal(empty(x), layer(x))


def test_loading_does_not_share_memory():
    layer, _, x = layer_and_input("SparseLinear")
    state = layer.state_dict()
    other = skeleton(layer)
    other.load_state_dict(state)
    wanted = other(x)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.crow_indices, layer.col_indices):
            tensor.zero_()
    assert torch.equal(other(x), wanted)


def test_the_same_pattern_keeps_the_gradient():
    layer, _, x = layer_and_input("SparseLinear")
    layer(x).sum().backward()
    grad = layer.weight.grad
    layer.load_state_dict(snapshot(layer))
    assert layer.weight.grad is grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["torch", "safetensors", "pickle", "deepcopy"])
def test_ways_to_store_a_layer(kind, way, tmp_path):
    layer, _, x = layer_and_input(kind)
    layer(x)
    wanted = layer(x)
    if way == "torch":
        torch.save(layer.state_dict(), tmp_path / "layer.pt")
        other = skeleton(layer)
        other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    elif way == "safetensors":
        safetensors.torch.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
        other = skeleton(layer)
        other.load_state_dict(safetensors.torch.load_file(tmp_path / "layer.safetensors"))
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        other = copy.deepcopy(layer)
    assert torch.equal(other(x), wanted)
    assert_same(other.state_dict(), layer.state_dict())


@pytest.mark.parametrize("way", ["torch", "safetensors", "pickle", "deepcopy"])
def test_ways_to_store_a_model_with_shared_modules(way, tmp_path):
    model, other = swapped(0).eval(), swapped(1).eval()
    assert model[4] is model[6]
    assert other[3].nonzeros != model[3].nonzeros
    x = torch.randn(4, 3, 4, 4)
    if way == "torch":
        torch.save(model.state_dict(), tmp_path / "model.pt")
        other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    elif way == "safetensors":
        safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
        safetensors.torch.load_model(other, str(tmp_path / "model.safetensors"))
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        other = copy.deepcopy(model)
    assert other[4] is other[6]
    assert torch.equal(other(x), model(x))
    # what refuses a bad state survives as well
    bad = snapshot(model)
    bad["6.col_indices"] = bad["6.col_indices"].flip(0)
    before = snapshot(other)
    with pytest.raises(RuntimeError, match=r"6\.col_indices must ascend"):
        other.load_state_dict(bad)
    assert_same(before, other.state_dict())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_fresh_model_takes_the_layers_of_a_state(device):
    model = swapped(0).eval()
    state = snapshot(model)
    with torch.device(device):
        shared = nn.Linear(16, 16)
        fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 16), shared, nn.ReLU(),
                              shared, nn.Linear(16, 3))
    fresh = swap_modules_for_state(fresh, state).eval()
    assert fresh[4] is fresh[6]
    assert type(fresh[7]) is nn.Linear
    fresh.load_state_dict(state, assign=device == "meta")
    x = torch.randn(4, 3, 4, 4)
    assert torch.equal(fresh(x), model(x))
    before = list(fresh)
    with pytest.raises(ValueError, match=r"^5 is a sparse layer in the state, the model has a ReLU there"):
        swap_modules_for_state(fresh, {**state, "5.crow_indices": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"^head.out is a sparse layer in the state, the model does not have it"):
        swap_modules_for_state(fresh, {**state, "head.out.crow_indices": torch.zeros(1)})
    assert list(fresh) == before


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind):
    layer, _, x = layer_and_input(kind)
    other = {"weight": (2 * layer.weight).detach().requires_grad_(), "bias": layer.bias.detach() + 1}
    dense = layer.to_dense()
    with torch.no_grad():
        dense.weight.mul_(2)
        dense.bias.add_(1)
    wanted = type(layer).from_dense(dense)
    torch.manual_seed(3)
    y = torch.func.functional_call(layer, other, (x,))
    y.sum().backward()
    torch.manual_seed(3)
    expected = wanted(x)
    expected.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(other["weight"].grad, wanted.weight.grad)
    assert layer.weight.grad is None


# ---- states of dense layers ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_states_of_dense_layers(kind, masked):
    layer, _, x = layer_and_input(kind)
    _, dense, _ = layer_and_input(kind, 0.6, seed=5)
    if masked:
        prune.l1_unstructured(dense, "weight", 0.5)
    state = {k: v.detach() for k, v in dense.state_dict().items()}
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=r"weight(_orig)?: is the weight of a dense layer; load it within accept"):
        layer.load_state_dict(state)
    assert_same(before, layer.state_dict())

    with accept_dense_state("take_zeros"):
        layer.load_state_dict(state)
    wanted = type(layer).from_dense(dense)
    assert_same(layer.state_dict(), wanted.state_dict())
    assert torch.equal(layer(x), wanted(x))

    layer, _, _ = layer_and_input(kind)
    pattern = layer.mask()
    with accept_dense_state("keep_pattern"):
        layer.load_state_dict(state)
    assert torch.equal(layer.mask(), pattern)
    weight = dense.weight_orig * dense.weight_mask if masked else dense.weight
    assert torch.equal(layer.dense_weight(), weight * pattern)
    assert torch.equal(layer.bias, dense.bias)
    with pytest.raises(RuntimeError, match="accept_dense_state"):  # the choice ends with the block
        layer.load_state_dict(state)


def test_a_dense_checkpoint_of_a_model():
    model, dense = swapped(0).eval(), swapped(1)
    dense = nn.Sequential(*(m.to_dense() if isinstance(m, SparseWeight) else m for m in dense)).eval()
    dense[6] = dense[4]
    with accept_dense_state("take_zeros"):
        model.load_state_dict(dense.state_dict())
    x = torch.randn(4, 3, 4, 4)
    assert torch.equal(model[3].dense_weight(), dense[3].weight)
    assert (model(x) - dense(x)).abs().max() < 0.05 * dense(x).abs().max()


def test_an_unknown_choice():
    with pytest.raises(ValueError, match="choice must be one of 'keep_pattern', 'take_zeros', got 'keep'"), \
            accept_dense_state("keep"):
        pass


def test_a_dense_state_of_another_shape():
    layer, _, _ = layer_and_input("SparseLinear")
    before = snapshot(layer)
    with accept_dense_state("take_zeros"), pytest.raises(RuntimeError, match=r"weight: expected shape \(12, 20\), got"):
        layer.load_state_dict(nn.Linear(21, 12).state_dict())
    assert_same(before, layer.state_dict())


# ---- refusals ----


def test_a_file_of_this_format_is_read():
    """The bytes of format 1, written out: later versions must read them."""
    state = {
        "weight": torch.tensor([0.5, -1.0, 2.0]),
        "crow_indices": torch.tensor([0, 2, 2, 3], dtype=torch.int32),
        "col_indices": torch.tensor([0, 3, 1], dtype=torch.int32),
        "bias": torch.tensor([0.0, 1.0, 2.0]),
        "_extra_state": torch.tensor([1, 3, 4]),
    }
    layer = qnn.SparseLinear(4, 3)
    layer.load_state_dict(state)
    wanted = torch.tensor([[0.5, 0, 0, -1], [0, 0, 0, 0], [0, 2, 0, 0]])
    assert torch.equal(layer.dense_weight(), wanted)
    assert torch.equal(layer(torch.eye(4)), wanted.T + torch.arange(3))


# ---- figures ----


def test_the_state_of_a_sparse_resnet_is_small(tmp_path):
    """At 90 % zeros a quarter of the dense file at most: 8 bytes a nonzero are 80 % of 10 x 4 bytes."""
    torch.manual_seed(0)
    model = resnet18()
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    layerwise_magnitude_prune(model, 0.9)
    swap_modules_with_sparse(model, (2, 3, 32, 32), include_dense=False, verbose=False)
    torch.save(model.state_dict(), tmp_path / "sparse.pt")
    size = {p.stem: p.stat().st_size for p in Path(tmp_path).iterdir()}
    assert size["sparse"] < 0.25 * size["dense"]
    state = torch.load(tmp_path / "sparse.pt", weights_only=True)
    fresh = swap_modules_for_state(resnet18(), state)
    fresh.load_state_dict(state)
    assert_same(fresh.state_dict(), model.state_dict())


def test_state_of_a_model_in_memory():
    model = swap_modules_with_sparse(_pruned_resnet20(), (2, 3, 32, 32), include_dense=False, verbose=False)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = resnet20(width=8)
    state = torch.load(buffer, weights_only=True)
    swap_modules_for_state(fresh, state, quantize=False).load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(fresh.eval()(x), model.eval()(x), atol=0.3)
    assert type(fresh.layer1[0].conv1) is qnn.SparseConv2d


def _pruned_resnet20() -> nn.Module:
    model = resnet20(width=8)
    layerwise_magnitude_prune(model, 0.9)
    return model
