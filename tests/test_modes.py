"""Modes of autograd and dtypes: what torch's own layers do in them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qsparseprop import nn as qnn

from ._helpers import LAYOUTS, generator, laid_out, relative_error, saved_for_backward, set_weight

KINDS = ("QuantizedSparseLinear", "SparseLinear", "QuantizedSparseConv1d", "SparseConv1d", "QuantizedSparseConv2d",
         "SparseConv2d")  # fmt: skip
FLOAT_KINDS = tuple(kind for kind in KINDS if not kind.startswith("Quantized"))


def example(kind: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A sparse layer, the dense one that it was made of, and an input."""
    dense, shape = {
        "Linear": (nn.Linear(20, 12), (9, 20)),
        "Conv1d": (nn.Conv1d(6, 8, 3, 2, 1, groups=2), (5, 6, 11)),
        "Conv2d": (nn.Conv2d(6, 8, (3, 2), (2, 1), (1, 2), groups=2), (5, 6, 9, 7)),
    }[kind.partition("Sparse")[2]]
    set_weight(dense, 0.3, 0)
    return getattr(qnn, kind).from_dense(dense), dense, torch.randn(shape, generator=generator(2))


def gradients(layer: nn.Module, x: torch.Tensor, call=None) -> list[torch.Tensor]:
    """Output, and gradients of input and parameters, with the same random numbers each time."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(4)
    y = (layer if call is None else call)(x)
    y.backward(torch.randn(y.shape, generator=generator(7)).to(y.dtype))
    return [y.detach(), x.grad, *[p.grad for p in layer.parameters()]]


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


# ---- dtypes ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_torch(kind, dtype, autocast):
    """The rules of F.linear and F.conv2d, with a dense layer whose weight has the input's dtype."""
    layer, dense, x = example(kind)
    x = x.to(dtype).requires_grad_()
    dense.to(dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        wanted, y = dense(x), layer(x)
    assert y.dtype == wanted.dtype
    assert relative_error(y, wanted.detach()) < 0.05
    y.float().square().sum().backward()
    assert x.grad.dtype == dtype
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_whole_modules_in_other_dtypes(kind, dtype):
    layer, dense, x = example(kind)
    layer, dense, x = layer.to(dtype), dense.to(dtype), x.to(dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.col_indices.dtype == torch.int32
    for a, b in zip(gradients(layer, x), gradients(dense, x), strict=True):
        assert a.dtype == b.dtype
    assert layer.to_dense().weight.dtype == dtype


# ---- layouts and shapes ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kind, layout):
    layer, _, x = example(kind)
    x = laid_out(x, layout)
    plain = x.clone(memory_format=torch.contiguous_format)
    for a, b in zip(gradients(layer, x), gradients(layer, plain), strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_no_batch_and_an_empty_one(kind):
    layer, dense, x = example(kind)
    if kind.startswith("Quantized"):
        assert relative_error(layer(x[0]), dense(x[0]).detach()) < 0.05
    else:
        for a, b in zip(gradients(layer, x[0]), (gradients(dense, x[0])), strict=True):
            b = b if b.shape == a.shape else b[layer.mask()]
            assert relative_error(a, b) < 1e-5
    y, dx, *others = gradients(layer, x[:0])
    assert y.shape == dense(x[:0]).shape
    assert dx.shape == x[:0].shape
    assert all((g == 0).all() for g in others)


@pytest.mark.parametrize("shape", [(2, 3, 20), (2, 3, 4, 20), (1, 0, 20), (20,)])
def test_linear_over_any_leading_dimensions(shape):
    layer, dense, _ = example("SparseLinear")
    x = torch.randn(shape)
    for a, b in zip(gradients(layer, x), gradients(dense, x), strict=True):
        b = b if b.shape == a.shape else b[layer.mask()]
        assert relative_error(a, b) < 1e-5


# ---- autograd ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["weight", "bias", "both", "input"])
def test_what_needs_no_gradient(kind, frozen):
    layer, _, x = example(kind)
    expected = gradients(layer, x)
    if frozen in ("weight", "both"):
        layer.weight.requires_grad_(False)
    if frozen in ("bias", "both"):
        layer.bias.requires_grad_(False)
    layer.zero_grad()
    x = x.clone().requires_grad_(frozen != "input")
    torch.manual_seed(4)
    saved = saved_for_backward(lambda: layer(x), layer)
    if frozen in ("weight", "both"):
        assert saved == []  # the input only serves the weight's gradient
    torch.manual_seed(4)
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=generator(7)))
    for tensor, wanted in zip((x, layer.weight, layer.bias), expected[1:], strict=True):
        assert torch.equal(tensor.grad, wanted) if tensor.requires_grad else tensor.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation(kind):
    layer, _, x = example(kind)
    once = [t.clone() for t in gradients(layer, x)]
    torch.manual_seed(4)
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=generator(7)))
    for p, g in zip(layer.parameters(), once[2:], strict=True):
        assert torch.equal(p.grad, 2 * g)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(kind, use_reentrant):
    layer, _, x = example(kind)
    expected = gradients(layer, x)
    assert_equal(gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_gradients(kind, mode):
    layer, _, x = example(kind)
    wanted = layer(x).detach()
    with mode():
        assert saved_for_backward(lambda: layer(x), layer) == []
        y = layer(x)
    assert not y.requires_grad
    assert torch.equal(y, wanted)
    # evaluation alone is not that: gradients still flow
    layer.eval()
    assert all(g is not None for g in gradients(layer, x))


@pytest.mark.parametrize("kind", KINDS)
def test_hooks(kind):
    layer, _, x = example(kind)
    seen = []
    layer.register_forward_pre_hook(lambda m, args: seen.append("before"))
    layer.register_forward_hook(lambda m, args, y: seen.append("after"))
    layer.register_full_backward_pre_hook(lambda m, dy: seen.append("before backward"))
    layer.register_full_backward_hook(lambda m, dx, dy: seen.append(("after backward", dx[0].shape, dy[0].shape)))
    layer.weight.register_hook(lambda g: seen.append("weight") or 2 * g)
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    plain = copy.deepcopy(example(kind)[0])
    y, _, dw, _ = gradients(layer, x)
    assert torch.equal(dw, 2 * gradients(plain, x)[2])
    assert set(seen) == {"before", "after", "before backward", ("after backward", x.shape, y.shape), "weight",
                         "accumulated"}  # fmt: skip


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_saved_tensor_hooks_and_graph_retention(kind):
    layer, _, x = example(kind)
    expected = gradients(layer, x)
    with torch.autograd.graph.save_on_cpu():
        assert_equal(gradients(layer, x), expected)
    x = x.clone().requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=generator(7))
    first = torch.autograd.grad(y, [x, *layer.parameters()], dy, retain_graph=True)
    second = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    assert_equal(first, second)
    assert_equal(first, expected[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", ["input", "weight", "bias"])
def test_second_derivatives_are_refused(kind, wanted):
    layer, _, x = example(kind)
    x.requires_grad_()
    target = {"input": x, "weight": layer.weight, "bias": layer.bias}[wanted]
    (g,) = torch.autograd.grad(layer(x).square().sum(), target, create_graph=True)
    assert g.requires_grad
    assert torch.isfinite(g).all()
    with pytest.raises(NotImplementedError, match="can be differentiated once only: for second derivatives use"):
        g.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_of_the_gradient_changes_no_gradient(kind):
    layer, _, x = example(kind)
    expected = gradients(layer, x)
    x = x.clone().requires_grad_()
    torch.manual_seed(4)
    y = layer(x)
    dy = torch.randn(y.shape, generator=generator(7))
    got = torch.autograd.grad(y, [x, *layer.parameters()], dy, create_graph=True)
    assert_equal([g.detach() for g in got], expected[1:])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_is_refused(kind):
    layer, _, x = example(kind)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_functions_are_refused(kind):
    """torch.func differentiates functions, vmap runs them over another dimension; neither may give wrong numbers."""
    layer, _, x = example(kind)
    with pytest.raises(RuntimeError, match=r"transforms of torch\.func"):
        torch.func.grad(lambda x: layer(x).sum())(x)
    with pytest.raises(RuntimeError, match=r"transforms of torch\.func"):
        torch.func.vmap(layer)(x[None])
