"""Linear layers against float64 on dequantised operands."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qsparseprop import ops
from qsparseprop.nn import QuantizedSparseLinear, SparseLinear
from qsparseprop.quantization import QuantConfig

from ._helpers import (
    FLOAT_SUM,
    LAYOUTS,
    ROUNDING,
    VALUES,
    dense_example,
    dequantized,
    dequantized_weight,
    examples,
    generator,
    gradient_of,
    laid_out,
    random_values,
    relative_error,
    row_groups,
    set_weight,
    value_gradient,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def linear_cases(draw):
    inputs, outputs = draw(st.integers(1, 90)), draw(st.sampled_from([1, 2, 8, 15, 16, 17, 64, 67, 130]))
    case = SimpleNamespace(
        leading=draw(st.sampled_from([(), (1,), (7,), (8,), (63,), (64,), (65,), (130,), (0,), (3, 5), (2, 3, 11)])),
        bias=draw(st.booleans()),
        density=draw(st.sampled_from([0.0, 0.1, 0.4, 1.0])),
        layout=draw(st.sampled_from(LAYOUTS)),
        values=draw(st.sampled_from(VALUES)),
        grad=draw(st.sampled_from([*LAYOUTS, "sum"])),
        seed=draw(st.integers(0, 1000)),
    )
    case.dense = set_weight(nn.Linear(inputs, outputs, case.bias), case.density, case.seed)
    case.x = laid_out(random_values((*case.leading, inputs), case.values, case.seed + 2), case.layout)
    return case


def run(layer, case, seed=None):
    """Output and all gradients: of the input, of the nonzeros, and of the bias."""
    x = case.x.detach().requires_grad_()
    y = layer(x)
    dy = gradient_of(y, case.grad, case.seed + 3)
    if seed is not None:
        torch.manual_seed(seed)
    y.backward(dy)
    return SimpleNamespace(y=y.detach(), dy=dy, dx=x.grad, dw=value_gradient(layer),
                           db=None if layer.bias is None else layer.bias.grad)  # fmt: skip


@given(case=linear_cases(), scheme=st.sampled_from(["absmax", "standard"]),
       grad_scheme=st.sampled_from(["stochastic", "absmax"]),
       granularity=st.sampled_from(["tensor", "channel"]))  # fmt: skip
@examples(300)
def test_quantised_linear_is_float64_on_dequantised_operands(case, scheme, grad_scheme, granularity):
    dense, seed, per_channel = case.dense, 77 + case.seed, granularity == "channel"
    qconfig = QuantConfig(input=scheme, grad=grad_scheme, granularity=granularity)
    layer = QuantizedSparseLinear.from_dense(dense, qconfig=qconfig)
    actual = run(layer, case, seed)
    inputs, outputs = dense.in_features, dense.out_features
    assert actual.y.shape == (*case.leading, outputs)
    assert actual.dx.shape == case.x.shape

    torch.manual_seed(seed)
    drawn = ops.draw_seed() if grad_scheme == "stochastic" else None
    x, x_scale = dequantized(case.x.reshape(-1, inputs, 1, 1), scheme, None, per_channel)
    x = x[:, :, 0, 0]
    dy = actual.dy.reshape(-1, outputs)
    dy_codes, dy_scale = dequantized(dy[:, :, None, None], grad_scheme.replace("absmax", "symmetric"), drawn,
                                     per_channel)
    dy_codes = dy_codes[:, :, 0, 0]
    weight = dense.weight.detach()
    forward = dequantized_weight(weight, row_groups(weight), x_scale)
    backward = dequantized_weight(weight, torch.arange(inputs).expand(weight.shape), dy_scale[:, None])
    y = x @ forward.T + (dense.bias.detach().double() if case.bias else 0.0)
    sizes = [(a.abs() @ b.abs()).sum().item() for a, b in ((x, forward.T), (dy_codes, backward), (dy_codes.T, x))]
    assert relative_error(actual.y, y.view(actual.y.shape), sizes[0]) < ROUNDING
    assert relative_error(actual.dx, (dy_codes @ backward).view(case.x.shape), sizes[1]) < ROUNDING
    assert relative_error(actual.dw, (dy_codes.T @ x)[weight != 0], sizes[2]) < ROUNDING
    if case.bias:
        magnitude = dy.double().abs().sum(0).max() if dy.numel() else 0.0
        assert (actual.db.double() - dy.double().sum(0)).abs().max() <= 5e-6 * magnitude
    else:
        assert layer.bias is None


@given(case=linear_cases())
@examples(100)
def test_float_linear_is_float64_to_rounding(case):
    layer = SparseLinear.from_dense(case.dense)
    actual = run(layer, case)
    double = copy.deepcopy(case.dense).double()
    wanted = run(double, SimpleNamespace(**{**vars(case), "x": case.x.double()}))
    assert relative_error(actual.y, wanted.y) < FLOAT_SUM
    assert relative_error(actual.dx, wanted.dx) < FLOAT_SUM
    assert relative_error(actual.dw, wanted.dw[case.dense.weight != 0]) < FLOAT_SUM
    if case.bias:
        magnitude = wanted.dy.abs().sum() if wanted.dy.numel() else 0.0
        assert (actual.db - wanted.db).abs().max() <= 5e-6 * magnitude


@given(case=linear_cases())
@examples(50)
def test_float_gradients_are_the_derivative(case):
    """The layer is linear in each operand, so a finite difference of any size is its derivative."""
    layer = SparseLinear.from_dense(case.dense)
    actual = run(layer, case)
    with torch.no_grad():
        for operand, grad in ((case.x.clone(), actual.dx), (layer.weight, actual.dw), (layer.bias, actual.db)):
            if operand is None or operand.numel() == 0:
                continue
            step = torch.randn(operand.shape, generator=generator(case.seed)) * operand.abs().max().clamp(min=1e-30)
            if operand.data_ptr() == layer.weight.data_ptr() or operand is layer.bias:
                operand += step
                change = layer(case.x).double() - actual.y.double()
                operand -= step
            else:
                change = layer(operand + step).double() - actual.y.double()
            numeric = (change * actual.dy.double()).sum().item()
            terms = (change.abs() + actual.y.double().abs()) * actual.dy.double().abs()
            assert numeric == pytest.approx((step.double() * grad).sum().item(), abs=1e-5 * terms.sum().item() + 1e-37)


@pytest.mark.parametrize("scheme", ["absmax", "standard"])
@pytest.mark.parametrize("grad_scheme", ["stochastic", "absmax"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("sign", [1, -1])
def test_gradients_of_one_sign(scheme, grad_scheme, granularity, sign):
    """What a sum sends back: nothing negative, or nothing positive, and the same everywhere."""
    dense, x = dense_example("QuantizedSparseLinear")
    qconfig = QuantConfig(input=scheme, grad=grad_scheme, granularity=granularity)
    layer = QuantizedSparseLinear.from_dense(dense, qconfig=qconfig)
    (sign * layer(x).sum()).backward()
    operand = dequantized(x[:, :, None, None], scheme, per_channel=granularity == "channel")[0][:, :, 0, 0]
    wanted = sign * operand.sum(0).expand(dense.weight.shape)[dense.weight != 0]
    assert relative_error(layer.weight.grad, wanted) < ROUNDING


@pytest.mark.parametrize("batch", [1, 65])
def test_rows_longer_than_an_int32_sum(batch):
    """70,000 nonzeros of the largest codes in one row: 2.3e9 does not fit."""
    dense = nn.Linear(70_000, 3)
    with torch.no_grad():
        dense.weight[0] = 0.5
        dense.weight[1] = -0.25
        dense.weight[2, ::1000] = 0.0
    layer = QuantizedSparseLinear.from_dense(dense)
    x = torch.ones(batch, 70_000, requires_grad=True)
    y = layer(x)
    torch.manual_seed(1)
    y.sum().backward()
    weight = dense.weight.detach()
    rows = dequantized_weight(weight, row_groups(weight)).sum(1) + dense.bias.detach().double()
    assert relative_error(y, rows.expand(batch, -1)) < ROUNDING
    # the largest gradient is exact at random rounding as well
    torch.testing.assert_close(layer.weight.grad, torch.full_like(layer.weight, batch), rtol=1e-6, atol=0.0)
    columns = dequantized_weight(weight, torch.arange(70_000).expand(3, -1)).sum(0).expand(batch, -1)
    assert relative_error(x.grad, columns) < ROUNDING


def test_two_million_nonzeros():
    """The ancestor kept a number for each nonzero on the stack."""
    dense = set_weight(nn.Linear(1500, 1500, bias=False), 1.0, 0)
    x = torch.randn(4, 1500)
    for cls, tolerance in ((SparseLinear, FLOAT_SUM), (QuantizedSparseLinear, 0.03)):
        layer = cls.from_dense(dense)
        assert layer.nonzeros == 1500 * 1500
        y = layer(x)
        y.backward(torch.ones_like(y))
        assert relative_error(y, x.double() @ dense.weight.detach().double().T) < tolerance
        assert relative_error(layer.weight.grad, x.double().sum(0).expand(1500, -1).reshape(-1)) < tolerance
