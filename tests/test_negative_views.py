"""Views with the negative or the conjugate bit give what a dense layer gives with the same values, or are refused."""

import pytest
import torch
from torch import nn

from qsparseprop import nn as qnn
from qsparseprop.layout.geometry import linear_numbers
from qsparseprop.quantization import QuantConfig, dequantize, quantize
from qsparseprop.utils.fusion import fuse_modules
from qsparseprop.utils.saved_tensors import compress_saved_tensors

from ._helpers import KINDS, example
from ._hostile import BLOCKS, CALLS, NO_MEMORY, PLACES, block, negative, operands, pruned

# ---- the negative and the conjugate bit ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["x", "weight", "bias", "dy", "conj"])
def test_negative_views_give_the_same(kind, place):
    """Were off by a factor of 2, with gradients of the wrong sign."""
    layer, _, x = example(kind)
    dy = torch.randn_like(layer(x))
    runs = []
    for hostile in (False, True):
        given = x
        if hostile and place == "conj":  # what .conj().imag of an FFT is
            given = torch.complex(torch.zeros(x.shape), -x).conj().imag
        elif hostile and place == "x":
            given = negative(x)
        for name in ("weight", "bias"):
            if hostile and place == name:
                setattr(layer, name, nn.Parameter(negative(getattr(layer, name))))
        given = given.detach().requires_grad_()
        torch.manual_seed(7)
        y = layer(given)
        runs.append([y, *torch.autograd.grad(y, [given, layer.weight, layer.bias],
                                             negative(dy) if hostile and place == "dy" else dy)])  # fmt: skip
    for wanted, found in zip(*runs, strict=True):
        assert torch.equal(wanted, found)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("place", ["x", "dy"])
@pytest.mark.parametrize("training", [True, False])
def test_negative_views_in_blocks(name, place, training):
    runs = []
    for hostile in (False, True):
        module, x = block(name)
        module.train(training)
        x = (negative(x) if hostile and place == "x" else x).detach().requires_grad_()
        torch.manual_seed(7)
        y = module(x)
        dy = torch.ones_like(y).cumsum(0)
        gradients = torch.autograd.grad(y, [x, *module.parameters()], negative(dy) if hostile and place == "dy" else dy)
        runs.append([y, *gradients])
    for wanted, found in zip(*runs, strict=True):
        if name.startswith("norm") and place == "x":  # left to torch, which keeps no 8 bits of it
            torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())
        else:
            assert torch.equal(wanted, found)


@pytest.mark.parametrize("place", ["residual", "dy"])
@pytest.mark.parametrize("kind", ["negative", "zero", "subclass"])
def test_what_meets_a_deferred_tensor(kind, place):
    """Was read as the memory that lies behind it: gradients of GELU were of the wrong sign."""
    torch.manual_seed(0)
    linear = qnn.QuantizedSparseLinear.from_dense(pruned(nn.Linear(12, 9)), qconfig=QuantConfig(grad="absmax"))
    module, x, other = fuse_modules(nn.Sequential(linear)), torch.randn(7, 12), torch.randn(7, 9)
    other = torch.zeros(7, 9) if kind == "zero" else other
    change = {"negative": negative, "zero": lambda t: torch._efficientzerotensor(t.shape),
              "subclass": lambda t: t.as_subclass(type("Own", (torch.Tensor,), {}))}[kind]  # fmt: skip
    runs = []
    for given in (other, change(other)):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        if place == "residual":
            y = y + given
        y = nn.functional.gelu(y)
        y.backward(given if place == "dy" else torch.ones(y.shape))
        runs.append((y, leaf.grad))
    for wanted, found in zip(*runs, strict=True):
        torch.testing.assert_close(found.as_subclass(torch.Tensor), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("scheme", ["absmax", "standard", "sawb", "stochastic"])
def test_negative_views_are_quantised_as_what_they_are(scheme):
    x = torch.randn(5, 7)
    torch.manual_seed(1)
    wanted = dequantize(quantize(x, scheme))
    torch.manual_seed(1)
    assert torch.equal(dequantize(quantize(negative(x), scheme)), wanted)


@pytest.mark.parametrize("inplace", [False, True])
def test_negative_views_in_operators_that_keep_a_bit(inplace):
    x = torch.randn(4, 5, 6)
    runs = []
    for hostile in (False, True):
        leaf = (-x if hostile else x).requires_grad_()
        with compress_saved_tensors(min_size=0):
            middle = torch._neg_view(leaf * 1) if hostile else leaf * 1
            y = nn.functional.relu(middle, inplace=inplace)
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
        runs.append([y, -gradient if hostile else gradient])
    for wanted, found in zip(*runs, strict=True):
        assert torch.allclose(wanted, found, atol=0.05)


def test_a_negative_view_is_not_compressed_as_what_it_is_the_negative_of():
    """Both lie in the same memory, of which only one set of codes is kept."""
    x = torch.linspace(-3, 3, 8192).requires_grad_()
    with compress_saved_tensors():
        middle = x * 1
        y = middle.exp() * torch._neg_view(middle)  # each saves one of them
    y.sum().backward()
    wanted = -(x.detach().exp() * (1 + x.detach()))
    assert torch.allclose(x.grad, wanted, atol=0.3)


def test_tensors_that_only_say_that_they_are_zero():
    layer = qnn.QuantizedSparseLinear.from_dense(pruned(nn.Linear(8, 5)))
    zeros = torch._efficientzerotensor((3, 8))
    assert torch.equal(layer(zeros), layer(torch.zeros(3, 8)))
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).backward(torch._efficientzerotensor((3, 5)))
    assert torch.equal(x.grad, torch.zeros(3, 8))


def test_negative_views_in_the_operator_of_graphs():
    layer = qnn.QuantizedSparseLinear.from_dense(pruned(nn.Linear(8, 5)))
    x = torch.randn(3, 8)
    trace = layer._trace  # what torch.compile calls
    numbers = linear_numbers(8, 5)
    wanted = trace(x[..., None, None], numbers, 1)
    assert torch.equal(trace(negative(x)[..., None, None], numbers, 1), wanted)
    layer.crow_indices, layer.col_indices = negative(layer.crow_indices), negative(layer.col_indices)
    assert torch.equal(trace(x[..., None, None], numbers, 1), wanted)
    given = x[..., None, None].clone()
    given.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=NO_MEMORY):
        trace(given, numbers, 1)


# ---- at random ----


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, place in PLACES if place != "out"])
def test_functions_of_plans_see_what_negative_views_show(name, place):
    plan, tensors = operands()
    wanted = CALLS[name][0](plan.forward, {**tensors, place: -tensors[place]}).clone()
    found = CALLS[name][0](plan.forward, {**tensors, place: torch._neg_view(tensors[place])})
    assert torch.equal(found, wanted)


def test_results_are_not_written_to_negative_views():
    plan, tensors = operands()
    tensors["out"] = torch._neg_view(tensors["out"])
    with pytest.raises(ValueError, match="out must be memory"):
        CALLS["multiply"][0](plan.forward, tensors)
