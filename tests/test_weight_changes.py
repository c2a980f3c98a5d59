"""Weights and patterns that change, or are copied: what layers of every kind make of it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from ._helpers import KINDS, example
from ._passes import assert_equal, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("one_thread")


def _sgd(layer):
    torch.optim.SGD(layer.parameters(), 0.5, foreach=False).step()


def _sgd_foreach(layer):
    torch.optim.SGD(layer.parameters(), 0.5, foreach=True).step()


def _sgd_fused(layer):
    torch.optim.SGD(layer.parameters(), 0.5, fused=True).step()


def _adam_fused(layer):
    torch.optim.Adam(layer.parameters(), 0.5, fused=True).step()


def _data(layer):
    layer.weight.data.mul_(torch.linspace(-1, 1, layer.weight.numel()))


def _new_data(layer):
    layer.weight.data = layer.weight.data.flip(0)


def _detached(layer):
    layer.weight.detach().neg_()


def _no_grad(layer):
    with torch.no_grad():
        layer.weight.add_(torch.linspace(-1, 1, layer.weight.numel()))


def _inference_mode(layer):
    with torch.inference_mode():
        layer.weight.mul_(torch.linspace(-1, 1, layer.weight.numel()))


def _numpy(layer):
    layer.weight.detach().numpy()[::2] *= -3


def _new_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach().flip(0))


def _loaded(layer):
    layer.load_state_dict({**layer.state_dict(), "weight": layer.weight.detach().flip(0)})


def _vector(layer):
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(layer.parameters()).flip(0), layer.parameters())


CHANGES = [_sgd, _sgd_foreach, _sgd_fused, _adam_fused, _data, _new_data, _detached, _no_grad, _inference_mode, _numpy,
           _new_parameter, _loaded, _vector]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_a_changed_weight_takes_effect_by_itself(kind, change):
    """Also where the version of the parameter does not tell."""
    layer, _, x = example(kind)
    before = outputs_and_gradients(layer, x)
    change(layer)
    after = outputs_and_gradients(layer, x)
    fresh = type(layer).from_dense(layer.to_dense())
    assert_equal(after, outputs_and_gradients(fresh, x))
    assert not torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("kind", KINDS)
def test_changing_the_weight_before_backward_is_an_error(kind):
    layer, _, x = example(kind)
    y = layer(x.requires_grad_())
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", [False, True])
def test_copies_are_the_same_and_independent(kind, used):
    layer, _, x = example(kind)
    if used:
        layer(x).sum().backward()
        layer.zero_grad()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    wanted = outputs_and_gradients(layer, x)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert type(other) is type(layer)
        assert other.qconfig == layer.qconfig
        assert_equal(outputs_and_gradients(other, x), wanted)
        with torch.no_grad():
            other.weight.zero_()
            other.col_indices.zero_()
    assert_equal(outputs_and_gradients(layer, x), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_carries_the_pattern(kind, assign):
    """Into a layer with as many nonzeros at other places, which has computed before."""
    layer, dense, x = example(kind)
    wanted = outputs_and_gradients(layer, x)
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other.weight.copy_(other.weight.flip(0, 1))
    other = type(layer).from_dense(other)
    assert not torch.equal(other.col_indices, layer.col_indices)
    outputs_and_gradients(other, x)
    assert set(layer.state_dict()) == {"weight", "bias", "crow_indices", "col_indices", "_extra_state"}
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer), assign=assign)
    assert_equal(outputs_and_gradients(other, x), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_that_are_assigned_one_after_the_other(kind):
    """New tensors may lie where freed ones lay; the pattern must not be taken for the old one."""
    layer, dense, x = example(kind)
    patterns = []
    for dims in ((), (0,), (1,), (0, 1)):
        other = copy.deepcopy(dense)
        with torch.no_grad():
            other.weight.copy_(other.weight.flip(dims))
        patterns.append(type(layer).from_dense(other))
    wanted = [p(x).detach() for p in patterns]
    for _ in range(20):
        for pattern, expected in zip(patterns, wanted, strict=True):
            # as many times as an allocator may need to come back to an address
            for state in (patterns[0], pattern):
                layer.load_state_dict({k: v.clone() for k, v in state.state_dict().items()}, assign=True)
            assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_apply_further_mask(kind):
    layer, dense, x = example(kind)
    layer(x).sum().backward()
    parameter, grad = layer.weight, layer.weight.grad
    mask = torch.rand(layer.weight_shape) < 0.6
    kept = mask[layer.mask()]
    assert 0 < kept.sum() < kept.numel()
    layer.apply_further_mask(mask)
    assert layer.weight is parameter
    assert torch.equal(layer.weight.grad, grad[kept])
    with torch.no_grad():
        dense.weight.mul_(mask)
    fresh = type(layer).from_dense(dense)
    assert torch.equal(layer.col_indices, fresh.col_indices)
    assert torch.equal(layer.crow_indices, fresh.crow_indices)
    assert layer.crow_indices.dtype == layer.col_indices.dtype == torch.int32
    assert_equal(outputs_and_gradients(layer, x), outputs_and_gradients(fresh, x))
    # positions that do not exist are not brought back, and a float mask will do
    layer.apply_further_mask(torch.ones(layer.weight_shape))
    assert_equal(outputs_and_gradients(layer, x), outputs_and_gradients(fresh, x))
    layer.apply_further_mask(torch.zeros(layer.weight_shape))
    assert layer.nonzeros == 0
    assert layer.sparsity == 1.0
    y = layer(x)
    assert torch.equal(y, fresh.bias.detach().view(-1, *[1] * (y.ndim - 2)).expand_as(y))


@pytest.mark.parametrize("kind", KINDS)
def test_apply_further_mask_while_an_older_graph_exists(kind):
    layer, _, x = example(kind)
    older = layer(x)
    layer.apply_further_mask(torch.rand(layer.weight_shape) < 0.6)
    layer(x).sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape
    assert older.shape
