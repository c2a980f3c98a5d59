"""Blocks that form while a model runs: kinds of fault that generated programs (test_programs) have found."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qsparseprop import nn as qnn
from qsparseprop.nn.deferred import DeferredTensor
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils.network_utils import swap_modules_with_sparse


def pruned(*modules: nn.Module) -> nn.Sequential:
    model = nn.Sequential(*modules)
    with torch.no_grad():
        for module in modules:
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                gone = torch.rand(module.weight.shape) < 0.6
                gone.view(len(gone), -1)[:, 0] = False
                module.weight[gone] = 0
            elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def swapped(model: nn.Module, fuse: bool = True, min_sparsity: float = 0.3) -> nn.Module:
    return swap_modules_with_sparse(copy.deepcopy(model), None, verbose=False, include_dense=False, fuse=fuse,
                                    min_sparsity=min_sparsity, qconfig=QuantConfig(grad="absmax"))  # fmt: skip


def gradients(model: nn.Module, x: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    y = model(x, *arguments)
    # of gelu, so that it is deferred as well
    (F.gelu(y) * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return [p.grad for p in model.parameters()]


def gradients_of_squares(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 0.05) -> None:
    size = max(g.norm() for g in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-3 * size


@pytest.mark.parametrize(
    ("first", "second"),
    [(nn.Conv2d(4, 4, 3, padding=1), nn.Linear(5, 6)), (nn.Linear(5, 5), nn.Conv2d(4, 6, 3, padding=1)),
     (nn.Conv1d(4, 4, 3, padding=1), nn.Linear(5, 6)), (nn.Linear(5, 5), nn.Conv1d(4, 6, 3, padding=1))],
)  # fmt: skip
def test_the_last_dimension_is_not_the_channels(first, second):
    """A layer took a chain's pixels for its own rows, whichever dimension the channels were."""
    model = pruned(first, nn.ReLU(), second)
    x = torch.randn((3, 4, 5) if isinstance(first, nn.Conv1d) or isinstance(second, nn.Conv1d) else (3, 4, 4, 5))
    assert_near(gradients(swapped(model), x), gradients(swapped(model, False), x))


class _Sum(nn.Module):
    """Of two tensors whose channels are different dimensions."""

    def __init__(self, features):
        super().__init__()
        self.conv, self.bn = pruned(nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6))
        self.linear = pruned(nn.Linear(features, features))[0]

    def forward(self, x, first):
        a, b = F.relu(self.bn(self.conv(x))), self.linear(x)
        return a + b if first else b + a


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("features", [6, 7])
def test_the_gradient_of_a_sum_of_two_layouts(features, first):
    """Rows of a gradient are not those of the other summand, even where there are as many of the same length."""
    model, x = _Sum(features), torch.randn(5, 6, features)
    assert_near(gradients(swapped(model), x, first), gradients(swapped(model, False), x, first))


def test_a_loss_that_is_linear_in_the_output_has_a_second_derivative():
    """The gradient of the input depends on the weight: to lose that without a word would be wrong."""
    layer = qnn.QuantizedSparseLinear.from_dense(pruned(nn.Linear(6, 4))[0])
    x = torch.randn(3, 6, requires_grad=True)
    (g,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    assert g.requires_grad
    with pytest.raises(NotImplementedError, match="once only"):
        g.square().sum().backward()


def test_values_are_of_inference_mode_where_they_were_recorded_in_it():
    model = swapped(pruned(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 4, 5, 5)
    for _ in range(3):  # with and without a guess
        with torch.inference_mode():
            y = model(x)
            z = y[:1]
        assert y.is_inference()
        assert z.is_inference()
        y = model(x)
        with torch.inference_mode():
            assert not F.relu(y).detach().add(0).requires_grad
            y += 1  # of an ordinary tensor
        assert not y.is_inference()
        assert not y.detach().is_inference()


@pytest.mark.parametrize("fuse", [True, False])
def test_nothing_is_recorded_in_inference_mode(fuse):
    """Not even where gradients are switched on inside: torch's own layers record nothing then."""
    model = swapped(pruned(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)), fuse)
    with torch.inference_mode(), torch.enable_grad():
        y = model(torch.randn(2, 4, 5, 5)) + model[2](model[1](torch.randn(2, 4, 5, 5))).sum()
        assert torch.isfinite(y).all()
    assert not y.requires_grad


@pytest.mark.parametrize("following", [(), (nn.BatchNorm2d(4), nn.ReLU())])
def test_what_was_packed_in_inference_mode_is_not_saved(following):
    model = swapped(pruned(nn.Conv2d(4, 4, 3, padding=1), *following))
    layer = swapped(pruned(nn.Conv2d(4, 4, 1)))
    x = torch.randn(2, 4, 5, 5)
    for _ in range(2):
        y = model(x)
        with torch.inference_mode():
            layer(y)
        layer(y).sum().backward()
        with torch.inference_mode():
            y = model(x)
        layer(y).sum().backward()


@pytest.mark.parametrize("start", ["grad", "backward"])
def test_backward_passes_run_parts_of_the_model_as_forward_passes_do(start):
    """Recomputation by checkpointing, where the pass was started with a weight or a deferred tensor."""
    model = swapped(pruned(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    x = torch.randn(2, 4, 5, 5)
    y = checkpoint(model, x, use_reentrant=False)
    if start == "grad":
        found = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    else:
        assert type(y) is DeferredTensor
        y.backward(2 * y.detach())
        found = [p.grad for p in model.parameters()]
    assert_near(list(found), gradients_of_squares(model, x))


@pytest.mark.parametrize("fuse", [True, False])
def test_no_gradient_is_none(fuse):
    """Not zeros: with these, optimizers decay weights."""
    layer = swapped(pruned(nn.Linear(4, 4)), fuse)[0]
    scale = torch.ones(4, requires_grad=True)
    y = checkpoint(lambda h: h.detach() * scale, layer(torch.ones(2, 4)), use_reentrant=True)
    y.sum().backward()
    assert layer.weight.grad is None


def test_reentrant_checkpointing_of_a_block():
    model = swapped(pruned(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    checkpoint(model, x, use_reentrant=True).square().sum().backward()
    assert_near([p.grad for p in model.parameters()], gradients_of_squares(model, x.detach()))


def test_what_recomputation_saves_does_not_depend_on_who_has_looked():
    """Checkpointing counts and compares what is saved in both runs."""
    model = pruned(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 4, 5, 5)
    results = []
    for fuse in (True, False):
        m = swapped(model, fuse)
        for call in range(4):
            m.zero_grad()
            h = m[0](x)
            y = checkpoint(m[1:], h, use_reentrant=False)
            assert torch.isfinite(h + 1).all()  # looks at what went in
            if call % 2:
                m[3](m[2](m[1](m[0](x)))).sum()  # another use: other guesses
            y.square().sum().backward()
        results.append([p.grad for p in m.parameters()])
    assert_near(*results)


def test_recomputation_that_is_given_an_ordinary_tensor():
    """Checkpointing saves its arguments, and hooks around it give others back."""
    model = swapped(pruned(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    for _ in range(2):
        with save_on_cpu():
            h = model[:2](x)
            y = checkpoint(model, h, use_reentrant=False)
        y.square().sum().backward()


def test_what_a_hook_sees_saved_does_not_depend_on_guesses():
    model = swapped(pruned(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    x, seen = torch.randn(2, 4, 5, 5), []

    def saved():
        shapes = []
        with saved_tensors_hooks(lambda t: shapes.append((t.shape, t.dtype)) or t, lambda t: t):
            model(x)
        return shapes

    for _ in range(3):
        seen.append(saved())
        torch.isfinite(model[:3](x)).all()  # only the values are wanted: nothing will be deferred
        torch.isfinite(model[0](x)).all()
    assert seen[0] == seen[1] == seen[2]


def test_data_is_changed_in_place():
    """Which assigns the same memory; another one is refused."""
    layer = swapped(pruned(nn.Conv2d(4, 4, 1)))[0]
    y = layer(torch.randn(2, 4, 5, 5))
    before = y.detach().clone()
    y.data += 1
    assert torch.equal(y, before + 1)
    with pytest.raises(RuntimeError, match="clone"):
        y.data = y.data * 2
    assert torch.equal(y, before + 1)


@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_look_like_their_first_operand(channels_last):
    """Whichever of the two is deferred."""
    conv = pruned(nn.Conv2d(4, 4, 3, padding=1))
    layer = swapped(conv)[0]
    formats = [torch.contiguous_format, torch.channels_last]
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=formats[channels_last])
    other = torch.randn(2, 4, 5, 5).contiguous(memory_format=formats[not channels_last])
    dense = conv[0](x)
    for add in (lambda a, b: a + b, torch.add):
        assert add(layer(x), other).stride() == add(dense, other).stride()
        assert add(other, layer(x)).stride() == add(other, dense).stride()


def test_normalisation_of_a_permuted_tensor_gives_torchs_strides():
    bn = pruned(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model = swapped(bn)
    for x in (
        torch.randn(5, 6, 5, 4).permute(0, 3, 2, 1),
        torch.randn(5, 3, 4, 6).transpose(1, 2),
        torch.randn(2, 4, 1, 1),
    ):
        assert model[0](x).stride() == bn[0](x).stride()


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Linear(6, 4), torch.randn(2, 3, 6)), (nn.Linear(6, 4), torch.randn(2, 3, 5, 6)),
     (nn.Conv1d(4, 4, 3), torch.randn(2, 4, 6)), (nn.Conv3d(4, 4, 1), torch.randn(2, 4, 3, 3, 3)),
     (nn.Conv1d(6, 4, 3), torch.randn(2, 7, 6).transpose(1, 2))],
)  # fmt: skip
def test_results_are_no_views(layer, x, quantize):
    """Of views in-place operations move the hooks, and detach_ is refused."""
    with torch.no_grad():
        layer.weight[torch.rand(layer.weight.shape) < 0.5] = 0
    kind = getattr(qnn, f"{'Quantized' * quantize}Sparse{type(layer).__name__}")
    y = kind.from_dense(layer)(x)
    assert y.stride() == layer(x).stride()
    assert not y._is_view()
    seen = []
    y.register_hook(seen.append)
    y.add_(y, alpha=0.5)
    y.sum().backward()
    assert torch.equal(seen[0], torch.full(y.shape, 1.5))
    y.detach_()


def test_the_weights_gradient_behind_gelu():
    """What is packed again from codes for the backward pass goes through the activation, too."""
    model = pruned(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU(), nn.Conv2d(6, 6, 3, padding=1))
    x = torch.randn(3, 6, 5, 5)
    m = swapped(model)
    assert type(m[:3](x)) is DeferredTensor
    assert_near(gradients(m, x), gradients(swapped(model, False), x))
