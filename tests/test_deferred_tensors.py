"""What people do with a tensor that a layer gives while blocks form: as with an ordinary one."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ._blocks import conv_net, is_deferred, stepwise, swapped

SHAPE = (5, 12, 9, 7)


@pytest.fixture
def model() -> nn.Sequential:
    return swapped(conv_net(), SHAPE, grad="absmax")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(SHAPE)


@pytest.fixture
def pair(model, x) -> tuple[Tensor, Tensor]:
    """What the first three modules give, deferred and step by step, with their histories."""
    other = copy.deepcopy(model)
    deferred, plain = model[:3](x), stepwise(other[:3])(x)
    assert is_deferred(deferred)
    return deferred, plain * 1


OPERATIONS = {
    "index": lambda y: y[0],
    "sum": lambda y: y.sum(),
    "view": lambda y: y.permute(0, 2, 3, 1).reshape(-1),
    "cat": lambda y: torch.cat([y, y], 1),
    "sigmoid": torch.sigmoid,
    "detach": lambda y: y.detach(),
    "double": lambda y: y.double(),
    "clone": lambda y: y.clone(),
    "unsqueeze": lambda y: y.unsqueeze(0) * 2,
    "convolution": lambda y: nn.functional.conv2d(y, torch.ones(3, 12, 1, 1)),
    "pool": lambda y: nn.functional.max_pool2d(y, 2),
    "where": lambda y: torch.where(y > 0.1, y, 0.0),
    "out": lambda y: torch.mul(y.detach(), 2, out=torch.empty_like(y.detach())),
    "add alpha": lambda y: torch.add(y, y, alpha=2),
    "add number": lambda y: 1 + y,
    "add row": lambda y: y + torch.arange(float(y.shape[-1])),
    "itself": lambda y: y + y,
    "foreach": lambda y: torch._foreach_add([y, y], 1)[1],
    "einsum": lambda y: torch.einsum("nchw,nchw->nc", y, y),
    "in place": lambda y: y.mul_(2),
    "item": lambda y: y[1].clone().index_fill_(0, torch.tensor([1]), 3.0),
    "unbind": lambda y: y.unbind(1)[3],
    "as strided": lambda y: y.as_strided((4, 3), (3, 1)),
    "dtype view": lambda y: y.detach().view(torch.int32),
    "like": lambda y: torch.ones_like(y) * y.new_full((), 2.0),
    "chunks": lambda y: sum(y.chunk(4, 1)),
    "attention": lambda y: nn.functional.scaled_dot_product_attention(y, y, y),
    "norm": lambda y: nn.functional.group_norm(y, 3),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_operation_sees_an_ordinary_tensor(pair, name):
    results = [OPERATIONS[name](y) for y in pair]
    mine, theirs = results
    assert type(mine) is Tensor or (name == "in place" and mine is pair[0])
    assert torch.equal(mine, theirs)
    assert (mine.stride(), mine.dtype, mine.requires_grad) == (theirs.stride(), theirs.dtype, theirs.requires_grad)
    if mine.requires_grad:
        mine.sum().backward()


@pytest.mark.parametrize("name", ["shape", "dtype", "device", "layout", "requires_grad", "is_leaf", "ndim", "is_sparse",
                                  "is_quantized", "is_meta", "itemsize", "nbytes", "output_nr"])  # fmt: skip
def test_attributes(pair, name):
    assert getattr(pair[0], name) == getattr(pair[1], name)
    assert is_deferred(pair[0])  # to look at them computes nothing


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_memory(pair, tmp_path):
    y, plain = pair
    plain = plain.detach()
    with torch.no_grad():
        values = y.detach()
    assert isinstance(y, Tensor)
    assert y.tolist() == plain.tolist()
    assert np.array_equal(y.numpy(force=True), plain.numpy())
    assert np.array_equal(np.asarray(values), plain.numpy())
    assert str(y).startswith("tensor(")
    assert "grad_fn" in repr(y)
    assert f"{y.sum():.3f}" == f"{plain.sum():.3f}"
    assert torch.equal(torch.from_dlpack(values), plain)
    assert y.data_ptr() == values.data_ptr()
    assert y.untyped_storage().nbytes() == plain.untyped_storage().nbytes()
    assert y.storage().size() == plain.numel()
    assert torch.equal(y.data, plain)
    y.data.zero_()
    assert y.abs().sum() == 0
    with pytest.raises(RuntimeError, match="Can't call numpy"):
        y.numpy()
    with pytest.raises(RuntimeError, match="cannot be exchanged"):
        y.data = plain
    torch.save(y, tmp_path / "y.pt")
    again = torch.load(tmp_path / "y.pt", weights_only=True)
    assert type(again) is Tensor
    assert again.requires_grad


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda y: pickle.loads(pickle.dumps(y)), torch.clone])
def test_copies_are_ordinary_and_share_nothing(model, x, how):
    with torch.no_grad():
        y = model[:3](x)
        again = how(y)
        assert type(again) is Tensor
        assert torch.equal(again, y)
        assert (again.data_ptr() == y.data_ptr()) == (how is copy.copy)
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model[:3](x))


def test_shared_memory(model, x):
    with torch.no_grad():
        y = model[:3](x)
        wanted = y.clone()
        y.share_memory_()
        assert y.is_shared()
        assert torch.equal(y, wanted)


def test_views_and_the_tensor_are_one(pair):
    y, plain = pair
    for tensor in (y, plain):
        tensor[:, :3].mul_(2)
        tensor.view(5, -1)[0].zero_()
    assert torch.equal(y, plain)
    gradients = []
    for tensor in (y, plain):
        (tensor * torch.linspace(0, 1, tensor.numel()).view(tensor.shape)).sum().backward()
        gradients.append(tensor.grad_fn)
    assert y._version > 0


def test_in_place_operations_need_what_torch_needs(model, x):
    h = model[0](x)
    g = torch.relu_(h)
    assert g is h
    with torch.inference_mode():
        y = model[0](x)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        torch.relu_(y)
    norm = nn.BatchNorm2d(12).requires_grad_(False)
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        nn.functional.relu_(leaf)
    assert norm(leaf).requires_grad


def test_gradients_of_leaves_are_ordinary_tensors(model, x):
    skip = nn.Parameter(torch.randn(SHAPE))
    h = model[1](model[0](x))
    h.retain_grad()
    seen = []
    h.register_hook(lambda g: seen.append(g * 1))
    y = torch.relu(h + skip)
    model[3](y).square().sum().backward()
    assert type(skip.grad) is type(h.grad) is type(seen[0]) is Tensor
    assert torch.equal(skip.grad, h.grad)
    assert torch.equal(skip.grad, seen[0])
    assert skip.grad.abs().sum() > 0
    skip.grad.zero_()
    assert h.grad.abs().sum() > 0


@pytest.mark.parametrize("k", range(1, 9))
def test_gradients_of_what_is_on_the_way(model, x, k):
    """By torch.autograd.grad, by retain_graph, and replaced by hooks: those that step by step has."""
    other = copy.deepcopy(model)
    results = []
    for network, call in ((model, lambda f, x: f(x)), (other, lambda f, x: stepwise(f)(x))):
        h = call(network[:k], x)
        y = call(network[k:], h).square().sum()
        found = [torch.autograd.grad(y, h, retain_graph=True)[0] * 1]
        h.register_hook(lambda g: 2 * g)
        y.backward(retain_graph=True)
        y.backward()
        results.append(found + [p.grad for p in network.parameters()])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


def test_second_derivatives_are_refused(model, x):
    (grad,) = torch.autograd.grad(model(x).square().sum(), model[0].weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="once only"):
        grad.sum().backward()


def test_own_functions_of_autograd_keep_the_history(model, x):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    other = copy.deepcopy(model)
    for network in (model, other):
        h = network[:3](x) if network is model else stepwise(network[:3])(x)
        Double.apply(h).sum().backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


