"""What layers of every kind give, and its gradients, bit for bit."""

import torch

from ._helpers import generator


def outputs_and_gradients(layer, x, seed=0):
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    torch.manual_seed(seed)
    y.backward(torch.randn(y.shape, generator=generator(9)))
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


def assert_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
