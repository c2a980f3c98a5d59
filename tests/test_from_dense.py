"""Sparse layers are made of dense ones, and dense ones of them, with all that these are."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from qsparseprop import nn as qnn

from ._helpers import KINDS, dense_example, example
from ._passes import assert_equal

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [(True, True), (False, True), (True, False)])
def test_to_dense_and_back(kind, trained):
    dense, x = dense_example(kind)
    dense.weight.requires_grad_(trained[0])
    dense.bias.requires_grad_(trained[1])
    dense.eval()
    layer = getattr(qnn, kind).from_dense(dense)
    again = layer.to_dense()
    assert type(again) is type(dense)
    assert vars(again).keys() == vars(dense).keys()
    assert repr(again) == repr(dense)
    for module in (layer, again):
        assert module.training is False
        assert (module.weight.requires_grad, module.bias.requires_grad) == trained
    assert torch.equal(again.weight, dense.weight)
    assert torch.equal(again.bias, dense.bias)
    assert torch.equal(layer.mask(), dense.weight != 0)
    assert torch.equal(layer.dense_weight(), dense.weight)
    assert layer.weight_shape == dense.weight.shape
    assert layer.nonzeros == int((dense.weight != 0).sum())
    assert layer.sparsity == pytest.approx((dense.weight == 0).float().mean().item())
    assert layer.bias.data_ptr() != dense.bias.data_ptr()
    assert torch.equal(type(layer).from_dense(again)(x), layer(x))
    for name in ("in_features", "out_features", "in_channels", "kernel_size", "stride", "padding", "dilation", "groups",
                 "padding_mode"):  # fmt: skip
        assert getattr(layer, name, None) == getattr(dense, name, None)


def test_dense_weight_is_differentiable():
    layer, _, _ = example("SparseConv2d")
    factor = torch.randn(layer.weight_shape)
    (layer.dense_weight() * factor).sum().backward()
    assert torch.equal(layer.weight.grad, factor[layer.mask()])


def _prune(dense):
    prune.random_unstructured(dense, "weight", 0.5)
    return dense


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_with_a_mask_attached(kind):
    """`weight_orig` and the mask count; `weight` is what it was in the last forward pass."""
    dense, x = dense_example(kind, density=1.0)
    _prune(dense)
    with torch.no_grad():
        dense.weight_orig.mul_(2)
        position = tuple(dense.weight_mask.nonzero()[0])
        dense.weight_orig[position] = 0.0  # kept by the mask, zero for now
    cls = getattr(qnn, kind)
    layer = cls.from_dense(dense)
    assert torch.equal(layer.mask(), dense.weight_mask.bool())
    dense(x)  # makes `weight` new
    assert torch.equal(layer.to_dense().weight, dense.weight)
    layer(x).sum().backward()
    assert layer.weight.grad[layer.weight == 0].abs().sum() > 0, "a kept weight that is zero learns"
    assert prune.is_pruned(dense)

    prune.remove(dense, "weight")
    layer = cls.from_dense(dense)
    assert torch.equal(layer.mask(), dense.weight != 0)
    assert torch.equal(layer.to_dense().weight, dense.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_with_a_pruned_bias(kind):
    dense, x = dense_example(kind)
    prune.random_unstructured(dense, "bias", 0.5)
    with torch.no_grad():
        dense.bias_orig.add_(1)
    layer = getattr(qnn, kind).from_dense(dense)
    dense(x)
    assert torch.equal(layer.bias, dense.bias)
    assert isinstance(layer.bias, nn.Parameter)
    assert layer.bias.is_leaf


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_changes_nothing(kind):
    dense, _ = dense_example(kind)
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    state = torch.get_rng_state()
    cls = getattr(qnn, kind)
    layer = cls.from_dense(dense)
    with torch.no_grad():
        layer.weight.fill_(5)
        layer.bias.fill_(5)
    assert_equal(dense.state_dict().values(), before.values())
    assert torch.equal(torch.get_rng_state(), state)
