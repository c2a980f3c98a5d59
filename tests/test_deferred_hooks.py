"""Who else sees what a chain starts with: hooks, other classes, derivatives of derivatives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qsparseprop.utils.fusion import fuse_modules
from qsparseprop.utils.network_utils import swap_modules_with_sparse

from ._blocks import prune


class Net(nn.Module):
    """A normalisation before the convolution, beside which its input goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(x, 2)
        return self.conv(self.norm(x)) + x


def noting(seen: list[Any]) -> dict[str, Callable[[nn.Module], Any]]:
    """What users do to a normalisation."""
    return {
        "reads its input": lambda m: m.register_forward_hook(lambda m, i, o: seen.append(F.relu(i[0]).mean().item())),
        "adds its input": lambda m: m.register_forward_hook(lambda m, i, o: o + i[0].relu()),
        "gives its input": lambda m: m.register_forward_hook(lambda m, i, o: i[0]),
        "hook of a gradient": lambda m: m.register_forward_hook(
            lambda m, i, o: (i[0].register_hook(lambda g: seen.append(g.norm().item())), None)[1]),
        "no gradient": lambda m: m.register_forward_pre_hook(
            lambda m, i: (i[0].register_hook(lambda g: g * 0), None)[1]),
        "relu before": lambda m: m.register_forward_pre_hook(lambda m, i: (i[0].relu(),)),
        "relu in place": lambda m: m.register_forward_pre_hook(lambda m, i: (i[0].relu_(),)),
        "in place, no result": lambda m: m.register_forward_pre_hook(lambda m, i: (i[0].clamp_(-1, 1), None)[1]),
        "multiplied": lambda m: m.register_forward_pre_hook(lambda m, i: (i[0].mul_(3),)),
        "another forward": lambda m: setattr(m, "forward", lambda x: x.mul_(2.0)),
        "relu in another forward": lambda m: setattr(m, "forward", lambda x: F.batch_norm(
            F.relu(x), m.running_mean, m.running_var, m.weight, m.bias, True)),
        "another class": lambda m: setattr(m, "__class__", Scaling),
        "the input itself": lambda m: setattr(m, "forward", lambda x: x),
    }  # fmt: skip


class Scaling(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.weight.view(-1, 1, 1) * 2).add_(1.0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("what", noting([]))
def test_a_normalisation_that_others_look_at(what, before, training, channels_last):
    """They see the tensor of the model and its gradient; and may change it."""
    results = []
    for fuse in (False, True):
        torch.manual_seed(0)
        net, seen = prune(Net()), []
        if before:
            noting(seen)[what](net.norm)
        net = swap_modules_with_sparse(net, None, verbose=False, include_dense=False, min_sparsity=0.5, fuse=fuse)
        if not before:
            noting(seen)[what](net.norm)
        net.train(training)
        x = torch.randn(4, 8, 10, 10).contiguous(memory_format=torch.channels_last if channels_last
                                                 else torch.contiguous_format)  # fmt: skip
        x.requires_grad_()
        y = net(x)
        if training:
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append([y.detach(), x.grad, torch.tensor(seen)])
    for mine, theirs in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def second(build: Callable[[], nn.Module], x: Tensor, fuse: bool, how: str) -> None:
    torch.manual_seed(0)
    model = swap_modules_with_sparse(prune(build()), None, verbose=False, include_dense=False, fuse=fuse,
                                     min_sparsity=0.5)  # fmt: skip
    if how == "jvp":
        torch.autograd.functional.jvp(model, x, torch.ones_like(x))
        return
    head = nn.Parameter(torch.ones(()))
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad((model(x) * head).square().mean(), x, create_graph=True)
    penalty = g.square().sum()
    if how == "backward":
        penalty.backward(inputs=[head])
    else:
        torch.autograd.grad(penalty, head, **{how: True})


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(24, 40)), torch.randn(9, 24)),
    "linear, relu, linear": (lambda: nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8)), torch.randn(9, 24)),
    "convolution, normalisation, relu": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), torch.randn(3, 8, 6, 6)),
    "normalisation, convolution": (
        lambda: nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)), torch.randn(3, 8, 6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("how", ["jvp", "backward", "allow_unused", "materialize_grads"])
@pytest.mark.parametrize("network", NETWORKS)
def test_second_derivatives_towards_what_is_behind_are_refused(network, how):
    """As they are without blocks: they would be taken for zero."""
    for fuse in (False, True):
        with pytest.raises(NotImplementedError, match="differentiated once only"):
            second(*NETWORKS[network], fuse, how)


def model_of(*layers: nn.Module) -> nn.Sequential:
    return swap_modules_with_sparse(prune(nn.Sequential(*layers)), None, verbose=False, include_dense=False, fuse=True,
                                    min_sparsity=0.5)  # fmt: skip


@pytest.mark.parametrize("follower", [lambda h, x: h * torch.full((8, 1, 1), 2.0), lambda h, x: h + x[:, :, 1:-1, 1:-1],
                                      lambda h, x: F.batch_norm(h, None, None, training=True)])  # fmt: skip
@pytest.mark.parametrize("sparse_layer", [True, False])
def test_what_no_gradient_comes_to_gets_none(follower, sparse_layer):
    """Not zeros, by which optimizers would step."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    model = model_of(nn.Conv2d(8, 8, 3))
    if not sparse_layer:
        model = fuse_modules(nn.Sequential(nn.Conv2d(8, 8, 3), *model))
    x = torch.randn(3, 8, 8, 8)
    Nothing.apply(follower(model[0](x), x)).sum().backward()
    assert model[0].weight.grad is None


@pytest.mark.parametrize("change", [
    lambda t: F.relu6(t, inplace=True), torch.Tensor.relu_, lambda t: t.mul_(2), lambda t: t.add_(1), torch.sin_,
    lambda t: t.__setitem__(0, 1.0), lambda t: torch.add(t.detach().clone(), 1, out=t),
])  # fmt: skip
def test_results_of_inference_mode_cannot_be_changed_outside(change):
    model = model_of(nn.Linear(24, 24))
    with torch.inference_mode():
        result = model(torch.randn(9, 24))
    with pytest.raises(RuntimeError, match="inference tensor outside InferenceMode"):
        change(result)
    with torch.inference_mode():
        result = model(torch.randn(9, 24))
        result.mul_(2)
    assert result.detach_() is result


def test_a_chain_of_one_image_is_the_same_when_it_is_recomputed():
    """Strides of dimensions of one element change when a tensor is saved and unpacked."""
    model = model_of(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    x = torch.randn(1, 8, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = checkpoint(model[1:], model[0](x), use_reentrant=False)
    y.sum().backward()
    other = copy.deepcopy(model)
    other(x).sum().backward()
    assert x.grad is not None


def test_hooks_on_a_view_that_a_dense_layer_gives_are_torchs():
    """Of images a linear layer's result is a view, and loses its hooks when it is changed through another one."""
    dense = nn.Linear(8, 8)
    events: list[str] = []
    for layer in (dense, fuse_modules(nn.Sequential(copy.deepcopy(dense), *model_of(nn.Linear(8, 8))))[0]):
        y = layer(torch.randn(2, 3, 8, requires_grad=True))
        y.register_hook(lambda g: events.append("hook"))
        y.view(-1)[:2].add_(1)
        y.sum().backward()
        events.append("end")
    assert events in (["end", "end"], ["hook", "end", "hook", "end"])
