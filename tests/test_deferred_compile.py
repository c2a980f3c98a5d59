"""torch.compile, torch.export and torch.jit around models whose layers defer, and for parts of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qsparseprop.nn.deferred import DeferredTensor
from qsparseprop.utils.fusion import unfuse_modules

from ._blocks import assert_close, assert_same, conv_net, is_deferred, mlp, relative, run, stepwise, swapped

# torch.compile looks at the gradient of everything that it is given
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

SHAPE = (5, 12, 9, 7)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> nn.Sequential:
    return swapped(conv_net(), SHAPE, grad="absmax")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(SHAPE)


def compiled(function):
    return torch.compile(function, backend="aot_eager")


@pytest.mark.parametrize("make", [conv_net, lambda: mlp(nn.GELU())], ids=["convolutions", "linear layers"])
def test_a_compiled_model_is_the_one_without_blocks(make):
    shape = SHAPE if make is conv_net else (5, 24)
    model = swapped(make(), shape, grad="absmax")
    plain, x = unfuse_modules(copy.deepcopy(model)), torch.randn(shape)
    assert_close(run(model, x, compiled(model)), run(plain, x), 1e-4)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_compiled_parts(model, x, k):
    """Statistics are counted once, and gradients go through, whatever is given to the part."""
    other = copy.deepcopy(model)
    model[k] = compiled(model[k])
    for _ in range(2):
        mine = run(model, x)
        assert_close({name.replace("_orig_mod.", ""): value for name, value in mine.items()}, run(other, x), 0.06)
    assert model[1].num_batches_tracked == 2


@pytest.mark.parametrize("view", [lambda y: y, lambda y: y.flatten(1), lambda y: y[1:], lambda y: y.view(5, -1)])
def test_compiled_functions_of_a_deferred_tensor(model, x, view):
    """And of views of it, whose base is one."""
    other = copy.deepcopy(model)

    def loss(y):
        return (torch.sigmoid(y) * 2).sum()

    h = model[:3](x)
    assert is_deferred(h)
    mine, theirs = compiled(loss)(view(h)), loss(view(stepwise(other[:3])(x)))
    torch.testing.assert_close(mine, theirs)
    mine.backward()
    theirs.backward()
    for a, b in zip(model[:3].parameters(), other[:3].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_a_compiled_training_step(model, x):
    other = copy.deepcopy(model)

    def step(network, x):
        loss = network(x).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        mine, theirs = compiled(step)(model, x), step(other, x)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert relative(a.grad, b.grad) < 0.06


def test_graph_breaks_within_blocks(x):
    class Breaking(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_net()

        def forward(self, x):
            h = self.net[:2](x)
            torch._dynamo.graph_break()
            h = self.net[2](h)
            torch._dynamo.graph_break()
            return self.net[3:](h)

    model = swapped(Breaking(), SHAPE, grad="absmax")
    other = copy.deepcopy(model)
    assert_close(run(model, x, compiled(model)), run(other, x), 0.06)


def test_code_that_is_not_compiled_within_what_is(model, x):
    """Blocks form where a compiled function leaves the model to Python."""
    other = copy.deepcopy(model)
    seen = []

    @torch.compiler.disable
    def plain(x):
        h = model[:3](x)
        seen.append(type(h))
        return model[3:](h)

    y = compiled(lambda x: torch.sigmoid(plain(x * 1)))(x)
    assert seen == [DeferredTensor]
    torch.testing.assert_close(y, torch.sigmoid(stepwise(other)(x)))


def test_exported_models_are_those_without_blocks(model, x):
    model.eval()
    model(x)
    plain = unfuse_modules(copy.deepcopy(model))
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), plain(x), rtol=1e-4, atol=1e-4)
    assert is_deferred(model[:2](x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused(model, x):
    for attempt in (lambda: torch.jit.trace(model, x), lambda: torch.jit.script(model)):
        with pytest.raises(RuntimeError, match="swap_modules_with_dense"):
            attempt()
    other = copy.deepcopy(model)
    assert_same(run(model, x), run(other, x, stepwise(other)))
