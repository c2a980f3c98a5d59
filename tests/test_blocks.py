"""Blocks: what layers and what follows them compute together, against torch's modules in float64 and step by step."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from qsparseprop import ops
from qsparseprop._kernels import _dispatch
from qsparseprop.nn import QuantizedSparseConv2d, QuantizedSparseLinear
from qsparseprop.nn.deferred import DeferredTensor
from qsparseprop.ops import reference
from qsparseprop.quantization import QuantConfig
from qsparseprop.training.models import resnet20, vit_tiny
from qsparseprop.utils import network_utils
from qsparseprop.utils.fusion import chains, fuse_modules, unfuse_modules
from qsparseprop.utils.network_utils import swap_modules_with_sparse

from ._blocks import (
    assert_close,
    assert_same,
    conv_net,
    is_deferred,
    mlp,
    prune,
    relative,
    run,
    settle,
    sparse,
    stepwise,
    swapped,
)

ACTIVATIONS = {
    "none": nn.Identity, "relu": nn.ReLU, "relu in place": lambda: nn.ReLU(inplace=True), "relu6": nn.ReLU6,
    "hardtanh": lambda: nn.Hardtanh(-0.3, 0.8), "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "leaky": nn.LeakyReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish,
}  # fmt: skip


class Chain(nn.Module):
    """A layer and what follows it, or only the latter."""

    def __init__(self, layer: nn.Module, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.activation = layer, norm, activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.after(self.layer(x), residual)

    def after(self, x: Tensor, residual: Tensor | None) -> Tensor:
        x = self.norm(x)
        return self.activation(x if residual is None else x + residual)


def check(layer: nn.Module, norm: nn.Module, activation: nn.Module, x: Tensor, residual: bool = False) -> None:
    """A block's values and gradients are those of float64 behind the same layer, whose result is not quantised."""
    chain = fuse_modules(Chain(layer, norm, activation))
    plain, exact = unfuse_modules(copy.deepcopy(layer)), copy.deepcopy(chain).double()
    x = x.clone().requires_grad_()
    z = plain(x.detach()).detach().double().requires_grad_()
    summand = torch.randn(z.shape, requires_grad=True) if residual else None
    twin = None if summand is None else summand.detach().double().requires_grad_()
    expected = exact.after(z * 1, twin)
    h = chain.layer(x)
    assert is_deferred(h)
    y = chain.after(h, summand)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for name, value in exact.norm.named_buffers():
        torch.testing.assert_close(dict(norm.named_buffers())[name].double(), value.double(), rtol=1e-5, atol=1e-6)

    dy = torch.randn(y.shape)
    torch.manual_seed(1)
    y.backward(dy)
    expected.backward(dy.double())
    for mine, theirs in zip(norm.parameters(), exact.norm.parameters(), strict=True):
        assert relative(mine.grad, theirs.grad) < 0.02
    if residual:
        assert type(summand.grad) is Tensor
        # those of smooth activations are of slopes in 8 bits
        exact_slopes = isinstance(activation, (nn.ReLU, nn.Hardtanh, nn.LeakyReLU, nn.Identity))
        torch.testing.assert_close(summand.grad.double(), twin.grad, rtol=1e-5, atol=1e-6 if exact_slopes else 0.02)
    # the layer's own gradients, from float64's gradient of its result, with the same random numbers
    x_plain = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(1)
    plain(x_plain).backward(z.grad.float())
    assert relative(x.grad, x_plain.grad) < 0.02
    for (name, mine), theirs in zip(layer.named_parameters(), plain.parameters(), strict=True):
        if name == "bias" and not isinstance(norm, nn.Identity) and (norm.training or norm.running_mean is None):
            assert mine.grad.abs().max() < 1e-3 * z.grad.abs().sum(0).max()  # normalisation takes a bias away
        else:
            assert relative(mine.grad, theirs.grad) < 0.02


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}])
@pytest.mark.parametrize(("activation", "residual"), [("none", False), ("relu", False), ("relu6", True)])
def test_normalised_convolutions_are_torchs_modules(activation, residual, settings, training):
    norm = settle(nn.BatchNorm2d(20, **settings)).train(training)
    check(sparse(nn.Conv2d(12, 20, 3, padding=1), grad="absmax"), norm, ACTIVATIONS[activation](),
          torch.randn(9, 12, 7, 5), residual)  # fmt: skip


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["Linear", "Linear, 3-D", "Conv2d", "Conv2d, BatchNorm", "Conv1d, BatchNorm"])
def test_activations_are_torchs_modules(kind, activation, residual):
    norm: nn.Module = nn.Identity()
    if kind.startswith("Linear"):
        layer, x = nn.Linear(24, 40), torch.randn(7, 24) if kind == "Linear" else torch.randn(2, 3, 5, 24)[0]
    elif kind.startswith("Conv2d"):
        layer, x = nn.Conv2d(12, 20, 3, 2, groups=2, bias=False), torch.randn(5, 12, 7, 5)
    else:
        layer, x = nn.Conv1d(12, 20, 3), torch.randn(5, 12, 9)
    if "Norm" in kind:
        norm = settle(getattr(nn, f"BatchNorm{type(layer).__name__[-2:]}")(20))
    check(sparse(layer, grad="absmax"), norm, ACTIVATIONS[activation](), x, residual)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", ["convolution", "nothing"])
@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_normalisation_behind_other_layers_is_torchs(settings, layer, training, channels_last):
    """That of a convolution which stays dense, or of any tensor, keeps 8 bits of what it reads."""
    first = nn.Identity() if layer == "nothing" else nn.Conv2d(12, 37, 3, padding=1)
    chain = Chain(first, settle(nn.BatchNorm2d(37, **settings)), nn.ReLU6()).train(training)
    reader = sparse(nn.Conv2d(37, 4, 1))
    exact = copy.deepcopy(chain).double()
    fuse_modules(nn.Sequential(chain, reader))
    x = torch.randn(5, 12 if layer == "convolution" else 37, 6, 7)
    x = (x.to(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    twin = x.detach().double().requires_grad_()
    y, expected = chain(x), exact(twin)
    # a tensor of the model's own is taken up where its memory is already as blocks read it
    assert is_deferred(y) == (layer == "convolution" or channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert relative(y, expected) < 1e-6
    dy = torch.randn_like(expected)
    y.backward(dy.float())
    expected.backward(dy)
    for mine, theirs in zip([x, *chain.parameters()], [twin, *exact.parameters()], strict=True):
        # half a step of what it read is 0.014 of a normal distribution's deviation
        if mine is not first.bias if layer == "convolution" else True:
            assert relative(mine.grad, theirs.grad) < 1.4e-2
    for mine, theirs in zip(chain.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-5, atol=1e-6)


# ---- the same bits as step by step ----

QCONFIGS = [{}, {"granularity": "tensor"}, {"input": "standard"}, {"input": "sawb"}, {"grad": "absmax"},
            {"grad": "luq"}, {"grad": "dithered"}, {"grad_weight": "float32"}]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", QCONFIGS)
def test_convolutions_give_the_same_bits_as_step_by_step(settings, training):
    model = swapped(conv_net(), (5, 12, 9, 7), **settings).train(training)
    other = copy.deepcopy(model)
    x = torch.randn(5, 12, 9, 7)
    for _ in range(2):  # the second time with guesses from the first one
        assert_same(run(model, x), run(other, x, stepwise(other)))


@pytest.mark.parametrize("settings", QCONFIGS)
@pytest.mark.parametrize("activation", ["relu", "relu6", "gelu", "gelu_tanh"])
def test_linear_layers_give_the_same_bits_as_step_by_step(activation, settings):
    model = swapped(mlp(ACTIVATIONS[activation]()), (4, 24), **settings)
    other = copy.deepcopy(model)
    x = torch.randn(70, 24)
    mine, others = run(model, x), run(other, x, stepwise(other))
    if activation.startswith("gelu"):  # its least value is bounded, not found: scales may differ by a little
        assert_close(mine, others, 0.3 if settings.get("grad") in ("luq", "dithered") else 0.03)
    else:
        assert_same(mine, others)


@pytest.mark.parametrize("make", [resnet20, lambda: vit_tiny(width=16)], ids=["ResNet", "transformer"])
def test_networks_give_the_same_numbers_as_step_by_step(make):
    model = swapped(make(), (4, 3, 32, 32), grad="absmax")
    other = copy.deepcopy(model)
    x = torch.randn(4, 3, 32, 32)
    mine, others = run(model, x), run(other, x, stepwise(other))
    if make is resnet20:
        assert_same(mine, others)
        found = chains(model)
        assert all(found[name].joined[0] == "BatchNorm" for name in found if "conv" in name)
        assert found["layer1.0.conv1"] == (True, ("BatchNorm", "ReLU"))
        assert found["layer1.0.conv2"] == (True, ("BatchNorm", "add", "ReLU"))
    else:
        assert_close(mine, others, 0.1)
        assert ("GELU",) in [chain.joined for chain in chains(model).values()]


def test_all_threads_and_instruction_sets_agree():
    x, dense = torch.randn(9, 12, 9, 7), prune(conv_net())
    results, before = [], _dispatch.active_isa()
    try:
        for isa in _dispatch.supported_isas():
            _dispatch.set_isa(isa)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(run(swapped(copy.deepcopy(dense), x.shape, pruned=True), x))
    finally:
        _dispatch.set_isa(before)
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(mode, training, channels_last):
    model = swapped(conv_net(), (5, 12, 9, 7)).train(training)
    other = unfuse_modules(copy.deepcopy(model))
    x = torch.randn(5, 12, 9, 7)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    with mode():
        y, expected = model(x), other(x)
        assert is_deferred(y)
        assert (y.grad_fn, y.requires_grad, y.is_inference()) == (None, False, expected.is_inference())
        assert (y.stride(), y.dtype) == (expected.stride(), expected.dtype)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    for name, value in other.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), value, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("dtype", "autocast"), [
    (torch.float32, False), (torch.bfloat16, False), (torch.float16, False), (torch.float64, False),
    (torch.float32, True), (torch.bfloat16, True),
])  # fmt: skip
def test_dtypes_are_those_of_the_layers(dtype, autocast):
    """bfloat16 stays bfloat16 on the way, other dtypes are converted layer by layer."""
    model = swapped(conv_net(), (5, 12, 9, 7), grad="absmax")
    other = unfuse_modules(copy.deepcopy(model))
    if not autocast:
        model.to(dtype)
        other.to(dtype)
    results = []
    for network in (model, other):
        x = torch.linspace(-2, 2, 5 * 12 * 9 * 7).view(5, 12, 9, 7).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            h, y = network[0](x), network(x)
        y.square().sum().backward()
        results.append((h, y, x.grad, *(p.grad for p in network.parameters())))
    assert (type(results[0][0]) is DeferredTensor) == (dtype in (torch.float32, torch.bfloat16))
    coarse = autocast or dtype in (torch.bfloat16, torch.float16)
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert relative(mine.double(), theirs.double()) < (0.15 if coarse else 0.06)


def test_gradients_have_no_bias():
    """The mean over seeds is float64's gradient with the slopes that were saved."""
    linear = sparse(nn.Linear(24, 40), granularity="tensor")
    with torch.no_grad():
        linear.weight.sign_()  # in 8 bits without an error
    x, dy = torch.randn(70, 24), torch.randn(70, 40)
    z = linear(x).detach()
    slopes = ops.saved_like(z, "gelu")
    reference.epilogue(z, None, None, None, "gelu", [], None, None, None, slopes)
    dz = reference.epilogue_grad(dy, None, slopes, "gelu", [], None, False)[0].double()
    fuse_modules(nn.Sequential(linear))
    draws = []
    for seed in range(500):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(seed)
        nn.functional.gelu(linear(leaf)).backward(dy)
        draws.append(leaf.grad.double())
    draws = torch.stack(draws)
    error = draws.std(0) / math.sqrt(len(draws))
    difference = draws.mean(0) - dz @ linear.dense_weight().detach().double()
    assert error.min() > 0
    assert (difference.abs() < 5 * error).all()
    assert abs(difference.mean()) < 5 * (error.square().sum().sqrt() / error.numel())


@pytest.mark.parametrize("trained", ["layer.weight", "layer.bias", "norm.weight", "norm.bias", "input", "none"])
@pytest.mark.parametrize("settings", [{"grad": "absmax"}, {"grad": "dithered"}])
def test_only_what_is_wanted_gets_a_gradient(trained, settings):
    chain = fuse_modules(Chain(sparse(nn.Conv2d(12, 20, 3), **settings), settle(nn.BatchNorm2d(20)), nn.ReLU()))
    every = copy.deepcopy(chain)
    chain.requires_grad_(False)
    x = torch.randn(5, 12, 7, 5)
    wanted = run(every, x)
    leaf = x.clone().requires_grad_(trained == "input")
    if "." in trained:
        chain.get_parameter(trained).requires_grad_()
    torch.manual_seed(1)
    y = chain(leaf)
    assert torch.equal(y, wanted["output"])
    assert y.requires_grad == (trained != "none")
    if trained == "none":
        return
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    for name, tensor in [("input", leaf), *chain.named_parameters()]:
        if name == trained:
            assert torch.equal(tensor.grad, wanted[name if name == "input" else f"{name}.grad"])
        else:
            assert tensor.grad is None


def test_what_torch_refuses_is_refused_as_there():
    model = swapped(conv_net(), (5, 12, 9, 7))
    before = {name: value.clone() for name, value in model.named_buffers()}
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model[:3](torch.randn(1, 12, 1, 1))
    with pytest.raises(ValueError, match=r"expects \(images, 12, height, width\)"):
        model(torch.randn(2, 5, 4, 4))
    with pytest.raises(RuntimeError, match="must match the size"):
        model[0](torch.randn(2, 12, 4, 4)) + torch.randn(2, 12, 4, 5)
    with pytest.raises(RuntimeError, match="running_mean should contain 12 elements not 13"):
        nn.BatchNorm2d(13)(model[0](torch.randn(2, 12, 4, 4)))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        nn.BatchNorm1d(12)(model[0](torch.randn(2, 12, 4, 4)))
    for name, value in model.named_buffers():
        if "num_batches" not in name:  # which torch counts first
            assert torch.equal(value, before[name]), name
    model.eval()
    assert model[:3](torch.randn(1, 12, 1, 1)).shape == (1, 12, 1, 1)


def test_check_finite_names_the_tensor():
    layer = QuantizedSparseConv2d.from_dense(nn.Conv2d(2, 3, 3), qconfig=QuantConfig(check_finite=True))
    model = fuse_modules(nn.Sequential(layer, nn.BatchNorm2d(3), nn.ReLU()))
    with pytest.raises(ValueError, match="the input has NaN or Inf"):
        model(torch.full((2, 2, 5, 5), math.nan))
    y = model(torch.randn(2, 2, 5, 5))
    with pytest.raises(ValueError, match="gradient of the output has NaN or Inf"):
        y.backward(torch.full(y.shape, math.inf))


def test_numbers_that_are_not_finite_reach_the_output():
    model = swapped(conv_net(), (5, 12, 9, 7))
    x = torch.randn(5, 12, 9, 7)
    x[0, 0, 0, 0] = math.nan
    assert not torch.isfinite(model(x)).any()


def test_another_default_dtype_changes_nothing():
    for model, x in ((swapped(mlp(nn.GELU()), (4, 24)), torch.randn(4, 24)),
                     (swapped(conv_net(), (5, 12, 9, 7)), torch.randn(5, 12, 9, 7))):  # fmt: skip
        other = copy.deepcopy(model)
        before = run(model, x)
        torch.set_default_dtype(torch.float64)
        try:
            after = run(other, x)
        finally:
            torch.set_default_dtype(torch.float32)
        for name, value in before.items():
            torch.testing.assert_close(value, after[name].to(value.dtype), rtol=1e-4, atol=1e-4)


def test_inputs_of_any_layout_and_size():
    layer = fuse_modules(nn.Sequential(sparse(nn.Linear(24, 40)), nn.GELU()))
    x = torch.randn(3, 48)[:, ::2]
    assert torch.equal(layer(x), layer(x.contiguous()))
    assert layer(torch.empty(0, 24)).shape == (0, 40)
    assert layer(torch.randn(24)).shape == (40,)
    assert isinstance(layer[0], QuantizedSparseLinear)
    conv = fuse_modules(nn.Sequential(sparse(nn.Conv2d(12, 20, 3)), settle(nn.BatchNorm2d(20)).eval(), nn.ReLU()))
    images = torch.randn(4, 12, 7, 18)[..., ::2]
    assert torch.equal(conv(images), conv(images.contiguous()))
    with torch.no_grad():
        assert conv[0](images[0]).shape == (20, 5, 7)


def test_seeds_are_drawn_as_without_blocks():
    """One a layer, so that a run can be repeated with any other saving of memory."""
    model = swapped(conv_net(), (5, 12, 9, 7))
    other = unfuse_modules(copy.deepcopy(model))
    after = []
    for network in (model, other):
        torch.manual_seed(5)
        network(torch.randn(5, 12, 9, 7)).sum().backward()
        after.append(ops.draw_seed())
    assert torch.equal(*after)


def test_the_report_tells_what_is_computed_together(monkeypatch):
    monkeypatch.setattr(network_utils.Stopwatch, "pays", lambda *_: True)
    model = prune(conv_net())
    swap_modules_with_sparse(model, (5, 12, 9, 7), min_sparsity=0.5, fuse=True, verbose=False)
    reasons = {decision.name: decision.reason for decision in model.swap_report.swapped}
    assert reasons["3"].startswith("together with BatchNorm, ReLU")
    assert "together with BatchNorm, ReLU" in str(model.swap_report)
    assert not chains(model)["3"]  # nothing is left of the run on the example
    with pytest.raises(ValueError, match="fuse=True only goes with quantize=True"):
        swap_modules_with_sparse(conv_net(), (5, 12, 9, 7), fuse=True, quantize=False, verbose=False)
