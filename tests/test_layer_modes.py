"""Layers of every kind in modes of autograd, in evaluation, in other dtypes and under autocast."""

import copy

import pytest
import torch

from ._helpers import KINDS, example, generator, relative_error, saved_for_backward
from ._passes import assert_equal, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [(x, w, b) for x in (0, 1) for w in (0, 1) for b in (0, 1)])
def test_only_gradients_that_are_needed(kind, wanted):
    layer, _, x = example(kind)
    full = outputs_and_gradients(layer, x)
    layer.zero_grad()
    tensors = [x.detach().requires_grad_(), layer.weight, layer.bias]
    for tensor, needed in zip(tensors, wanted, strict=True):
        tensor.grad = None
        tensor.requires_grad_(bool(needed))
    outputs = []
    saved = saved_for_backward(lambda: outputs.append(layer(tensors[0])), layer)
    (y,) = outputs
    assert torch.equal(y, full[0])
    assert y.requires_grad == any(wanted)
    # the packed input is for the gradient of the weight alone
    assert bool(saved) == bool(wanted[1])
    if any(wanted):
        torch.manual_seed(0)
        y.backward(torch.randn(y.shape, generator=generator(9)))
    for tensor, needed, expected in zip(tensors, wanted, full[1:], strict=True):
        if needed:
            assert torch.equal(tensor.grad, expected)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_autograd(kind, mode):
    layer, _, x = example(kind)
    with_grad = layer(x).detach()
    x.requires_grad_()
    outputs = []
    with mode():
        saved = saved_for_backward(lambda: outputs.append(layer(x)), layer)
        assert torch.equal(outputs[0], with_grad)
    assert not saved
    assert not outputs[0].requires_grad
    assert outputs[0].is_inference() == (mode is torch.inference_mode)
    assert_equal(outputs_and_gradients(layer, x), outputs_and_gradients(copy.deepcopy(layer), x))


@pytest.mark.parametrize("kind", KINDS)
def test_modules_made_in_inference_mode_work(kind):
    layer, dense, x = example(kind)
    wanted = layer(x).detach()
    with torch.inference_mode():
        assert torch.equal(type(layer).from_dense(dense)(x), wanted)
        copied = copy.deepcopy(layer)
        assert torch.equal(copied(x), wanted)
        copied.apply_further_mask(torch.ones(copied.weight_shape))
        assert torch.equal(copied(x), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_eval_changes_nothing(kind):
    layer, _, x = example(kind)
    wanted = outputs_and_gradients(layer, x)
    assert_equal(outputs_and_gradients(layer.eval(), x), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_of_the_input(kind, dtype):
    layer, _, x = example(kind)
    x = x.to(dtype)
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-12}[dtype]
    wanted = outputs_and_gradients(layer, x.float())
    low = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(low)
    assert y.dtype == dtype
    assert relative_error(y, wanted[0]) <= tolerance
    torch.manual_seed(0)
    dy = torch.randn(y.shape, generator=generator(9))
    y.backward(dy.to(dtype))
    assert low.grad.dtype == dtype
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    if dtype == torch.float64:  # otherwise the gradient is another one
        assert_equal([low.grad.float(), layer.weight.grad, layer.bias.grad], wanted[1:])
    exact = copy.deepcopy(layer)
    exact.zero_grad()
    again = x.float().requires_grad_()
    y = exact(again)
    torch.manual_seed(0)
    y.backward(dy.to(dtype).float())
    assert relative_error(low.grad, again.grad) <= tolerance
    assert relative_error(layer.weight.grad, exact.weight.grad) <= 1e-6
    assert relative_error(layer.bias.grad, exact.bias.grad) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes(kind, dtype):
    layer, _, x = example(kind)
    with torch.no_grad():  # values that every dtype has
        for p in layer.parameters():
            p.copy_(p.to(torch.bfloat16))
    wanted = outputs_and_gradients(layer, x.bfloat16().float())
    layer.to(dtype)
    x = x.bfloat16().to(dtype).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    assert y.dtype == dtype
    assert relative_error(y, wanted[0]) <= 2**-8
    y.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == dtype
    assert layer.col_indices.dtype == layer.crow_indices.dtype == torch.int32


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    layer, dense, x = example(kind)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, reference = layer(x), dense(x)
    assert y.dtype == reference.dtype == torch.bfloat16
    assert relative_error(y, reference) < 0.03
    y.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert layer(x).dtype == torch.float32
