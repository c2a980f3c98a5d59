"""Numbers that are none: what they reach is not finite, and `check_finite` names where they came from."""

import copy

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qsparseprop import nn as qnn
from qsparseprop.quantization import QuantConfig

from ._helpers import KINDS, example, examples, generator, laid_out

pytestmark = pytest.mark.usefixtures("one_thread")

QUANTIZED = [kind for kind in KINDS if kind.startswith("Quantized")]


BAD = [float("nan"), float("inf"), -float("inf")]


def _touched(dense, bad_x=None, bad_dy=None, bad_weight=None, shape=None):
    """Where a bad value has a say: of the output, of dx and of dw; by a product of indicators."""
    double = copy.deepcopy(dense).double()
    double.bias = None
    pattern = (dense.weight != 0).double()
    x = (torch.zeros(shape) if bad_x is None else bad_x).double().requires_grad_()

    def run(weight, x):
        double.weight = nn.Parameter(weight)
        return double(x)

    ones = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    y = run(pattern, x) if bad_x is not None else run(bad_weight.double(), ones) if bad_weight is not None else None
    touched_y = None if y is None else y.detach() > 0
    touched_dx = touched_dw = None
    if bad_dy is not None:
        run(pattern, ones).backward(bad_dy.double())
        touched_dx = ones.grad > 0
        y = run(pattern, torch.ones(shape, dtype=torch.float64))
        y.backward(bad_dy.double())
        touched_dw = double.weight.grad[dense.weight != 0] > 0
    elif bad_x is not None:
        y = run(pattern, x.detach())
        y.backward(torch.ones_like(y))
        touched_dw = double.weight.grad[dense.weight != 0] > 0
    elif bad_weight is not None:
        y = run(bad_weight.double(), ones)
        ones.grad = None
        y.backward(torch.ones_like(y))
        touched_dx = ones.grad > 0
    return touched_y, touched_dx, touched_dw


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["input", "weight", "gradient"])
@given(seed=st.integers(0, 10**6), layout=st.sampled_from(["contiguous", "channels_last", "sliced"]))
@examples(8)
def test_what_a_bad_number_touches_is_not_finite(kind, bad, where, seed, layout):
    layer, dense, x = example(kind)
    dy = torch.randn(dense(x).shape, generator=generator(seed))
    bad_x = bad_dy = bad_weight = None
    if where == "input":
        x.view(-1)[seed % x.numel()] = bad
        bad_x = ~x.isfinite()
    elif where == "weight":
        with torch.no_grad():
            layer.weight[seed % layer.nonzeros] = bad
        bad_weight = ~layer.dense_weight().isfinite()
    else:
        dy.view(-1)[seed % dy.numel()] = bad
        bad_dy = ~dy.isfinite()
    x_in = laid_out(x, layout).detach().requires_grad_()
    y = layer(x_in)
    y.backward(laid_out(dy, layout))
    touched = _touched(dense, bad_x, bad_dy, bad_weight, x.shape)
    hypothesis.assume(any(t is not None and t.any() for t in touched))  # not in an empty row or column
    for value, mask in zip((y, x_in.grad, layer.weight.grad), touched, strict=True):
        if mask is not None:
            assert not value[mask].isfinite().any()
    if where == "gradient":
        assert y.isfinite().all()
    if where == "weight":
        assert layer.weight.grad.isfinite().all()
        if "Linear" in kind:  # a scale for each row
            assert y[~touched[0]].isfinite().all()


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("bad", BAD)
def test_check_finite_names_the_tensor(kind, bad):
    _, dense, x = example(kind)
    cls = getattr(qnn, kind)
    layer = cls.from_dense(dense, qconfig=QuantConfig(check_finite=True))
    y = layer(x.requires_grad_())
    y.sum().backward()
    wrong = x.detach().clone()
    wrong[0, 0] = bad
    with pytest.raises(ValueError, match=r"input.*NaN or Inf"):
        layer(wrong)
    dy = torch.ones_like(y)
    dy[-1, -1] = bad
    with pytest.raises(ValueError, match=r"gradient.*NaN or Inf"):
        layer(x).backward(dy)
    with torch.no_grad():
        layer.weight[3] = bad
    with pytest.raises(ValueError, match=r"weight.*NaN or Inf"):
        layer(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-40, 1e-37, 1e30, 3e37])
def test_tiny_and_huge_inputs(kind, scale):
    layer, dense, x = example(kind)
    with torch.no_grad():
        dense.bias.zero_()
        layer.bias.zero_()
    x = x / x.abs().max() * scale
    wanted = dense.double()(x.double())
    if scale >= 1e30:  # an overflow is right where float32 overflows
        assert torch.isfinite(wanted).all()
    y = layer(x)
    kept = wanted.abs() < 3e38
    assert y[kept].isfinite().all()
    # half a step of the input for each of up to 20 products with weights of up to 40
    smallest = 40 * 20 * 1.2e-38 / 2 if kind.startswith("Quantized") else 1e-43
    assert (y.double() - wanted)[kept].abs().max() <= 0.03 * wanted.abs().max() + smallest
    if scale == 0:
        assert not y.any()
