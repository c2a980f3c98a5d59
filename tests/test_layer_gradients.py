"""Gradients of layers of every kind: summed up, repeated, without bias, on several threads."""

import copy
import threading

import pytest
import torch
from torch import nn

from qsparseprop import nn as qnn
from qsparseprop.nn import QuantizedSparseLinear
from qsparseprop.quantization import QuantConfig

from ._helpers import KINDS, dense_example, dequantized, dequantized_weight, example, generator, set_weight
from ._passes import assert_equal, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_accumulate(kind):
    layer, _, x = example(kind)
    first, second = outputs_and_gradients(layer, x, 1)[2:], outputs_and_gradients(layer, x + 1, 2)[2:]
    layer.zero_grad()
    for shift, seed in ((0, 1), (1, 2)):
        y = layer(x + shift)
        torch.manual_seed(seed)
        y.backward(torch.randn(y.shape, generator=generator(9)))
    for p, a, b in zip(layer.parameters(), first, second, strict=True):
        assert torch.equal(p.grad, a + b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_used_twice_in_one_graph(kind):
    layer, _, x = example(kind)
    alone = [outputs_and_gradients(layer, t)[2:] for t in (x, 2 * x)]
    layer.zero_grad()
    outs = [layer(t) for t in (x, 2 * x)]
    for y in outs:
        torch.manual_seed(0)
        y.backward(torch.randn(y.shape, generator=generator(9)))
    for p, a, b in zip(layer.parameters(), *alone, strict=True):
        assert torch.equal(p.grad, a + b)


@pytest.mark.parametrize("grad", ["stochastic", "dithered", "luq"])
def test_gradients_of_classes_that_never_come_have_no_bias(grad):
    """Of a few outputs the gradients are large and cancel, of many they are small and of one sign: a classifier's.

    Scales of the latter make the weights too small for their codes; they are what the mean of the gradients is.
    """
    dense = nn.Linear(32, 200, bias=False)
    dense.weight.data.normal_(generator=generator(1))
    layer = QuantizedSparseLinear.from_dense(dense, qconfig=QuantConfig(grad=grad))
    dy = 1e-3 * torch.rand(64, 200, generator=generator(2))
    dy[:32, :8], dy[32:, :8] = 1.0, -1.0
    x = torch.randn(64, 32, generator=generator(3)).requires_grad_()
    torch.manual_seed(0)
    steps = [torch.autograd.grad(layer(x), x, dy)[0].double().mean(0) for _ in range(100)]
    expected = dy.double().mean(0) @ dense.weight.detach().double()
    assert (torch.stack(steps).mean(0) - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_is_an_error(kind):
    layer, _, x = example(kind)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once only"):
        dx.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_step(kind):
    layer, _, x = example(kind)
    assert_equal(outputs_and_gradients(layer, x, 4), outputs_and_gradients(layer, x, 4))
    differs = not torch.equal(outputs_and_gradients(layer, x, 4)[1], outputs_and_gradients(layer, x, 5)[1])
    assert differs == kind.startswith("Quantized")  # random rounding of the gradient


def test_the_random_gradient_is_unbiased():
    """Over seeds, the gradients average to those of an unrounded gradient: within five standard errors."""
    dense, x = dense_example("QuantizedSparseLinear")
    layer = QuantizedSparseLinear.from_dense(dense, qconfig=QuantConfig(granularity="tensor"))
    grads = [outputs_and_gradients(layer, x, seed)[1:3] for seed in range(300)]
    weight = dense.weight.detach()
    backward = dequantized_weight(weight, torch.arange(weight.shape[1]).expand(weight.shape))
    dy = torch.randn(9, 12, generator=generator(9)).double()
    inputs = dequantized(x[:, :, None, None], "absmax")[0][:, :, 0, 0]
    for index, wanted in ((0, dy @ backward), (1, (dy.T @ inputs)[weight != 0])):
        values = torch.stack([g[index] for g in grads]).double()
        error = (values.mean(0) - wanted).abs()
        assert (error <= 5 * values.std(0) / len(grads) ** 0.5 + 1e-4 * wanted.abs().max()).all()
        assert values.std(0).max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_may_change(kind):
    """From 1 to 2 was fatal where the number was kept."""
    if "Linear" in kind:
        dense, x = set_weight(nn.Linear(300, 200), 0.3, 0), torch.randn(150, 300)
    else:
        dense, x = set_weight(nn.Conv2d(16, 24, 3, padding=1), 0.3, 0), torch.randn(4, 16, 20, 20)
    layer = getattr(qnn, kind).from_dense(dense)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(outputs_and_gradients(layer, x)[:3])
    for other in results[1:]:
        assert_equal(other, results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_calls_from_several_python_threads(kind):
    layer, _, x = example(kind)
    inputs = [x[:n] if n else x for n in (0, 1, 2, 3, 4)]
    wanted = [layer(i).detach() for i in inputs]
    layer = copy.deepcopy(layer)  # one without tables
    wrong = []

    def work(n):
        torch.set_num_threads(1)
        for _ in range(20):
            if not torch.equal(layer(inputs[n]), wanted[n]):
                wrong.append(n)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(len(inputs))]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong
