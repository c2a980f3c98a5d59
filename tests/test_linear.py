"""Linear layers against float64 on dequantised operands; and what all four kinds of modules have in common."""

import copy
import io
import pickle
import threading
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from qsparseprop import config, ops
from qsparseprop import nn as qnn
from qsparseprop.nn import QuantizedSparseConv2d, QuantizedSparseLinear, SparseLinear
from qsparseprop.quantization import QuantConfig

from ._helpers import (
    FLOAT_SUM,
    KINDS,
    LAYOUTS,
    ROUNDING,
    VALUES,
    dense_example,
    dequantized,
    dequantized_weight,
    example,
    generator,
    gradient_of,
    laid_out,
    random_values,
    relative_error,
    row_groups,
    run_python,
    saved_for_backward,
    set_weight,
    value_gradient,
)

QUANTIZED = [kind for kind in KINDS if kind.startswith("Quantized")]


@pytest.fixture(autouse=True)
def _one_thread(_seeded):
    """Small tensors only: on a busy machine a team of threads costs more than the work. Some tests set their own."""
    torch.set_num_threads(1)


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
@settings(max_examples=300)
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
@settings(max_examples=100)
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
@settings(max_examples=50)
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


# ---- what all modules do ----


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


def _sgd(layer):
    torch.optim.SGD(layer.parameters(), 0.5, foreach=False).step()


def _sgd_foreach(layer):
    torch.optim.SGD(layer.parameters(), 0.5, foreach=True).step()


def _sgd_fused(layer):
    torch.optim.SGD(layer.parameters(), 0.5, fused=True).step()


def _adam_fused(layer):
    torch.optim.Adam(layer.parameters(), 0.5, fused=True).step()


def _data(layer):
    layer.weight.data.mul_(torch.linspace(-1, 1, layer.weight.numel()))


def _new_data(layer):
    layer.weight.data = layer.weight.data.flip(0)


def _detached(layer):
    layer.weight.detach().neg_()


def _no_grad(layer):
    with torch.no_grad():
        layer.weight.add_(torch.linspace(-1, 1, layer.weight.numel()))


def _inference_mode(layer):
    with torch.inference_mode():
        layer.weight.mul_(torch.linspace(-1, 1, layer.weight.numel()))


def _numpy(layer):
    layer.weight.detach().numpy()[::2] *= -3


def _new_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach().flip(0))


def _loaded(layer):
    layer.load_state_dict({**layer.state_dict(), "weight": layer.weight.detach().flip(0)})


def _vector(layer):
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(layer.parameters()).flip(0), layer.parameters())


CHANGES = [_sgd, _sgd_foreach, _sgd_fused, _adam_fused, _data, _new_data, _detached, _no_grad, _inference_mode, _numpy,
           _new_parameter, _loaded, _vector]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_a_changed_weight_takes_effect_by_itself(kind, change):
    """Also where the version of the parameter does not tell."""
    layer, _, x = example(kind)
    before = outputs_and_gradients(layer, x)
    change(layer)
    after = outputs_and_gradients(layer, x)
    fresh = type(layer).from_dense(layer.to_dense())
    assert_equal(after, outputs_and_gradients(fresh, x))
    assert not torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("kind", KINDS)
def test_changing_the_weight_before_backward_is_an_error(kind):
    layer, _, x = example(kind)
    y = layer(x.requires_grad_())
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [(True, True), (False, True), (True, False)])
def test_to_dense_and_back(kind, trained):
    dense, x = dense_example(kind)
    dense.weight.requires_grad_(trained[0])
    dense.bias.requires_grad_(trained[1])
    dense.eval()
    layer = getattr(qnn, kind).from_dense(dense)
    again = layer.to_dense()
    assert type(again) is type(dense)
    assert vars(again).keys() == vars(dense).keys()
    assert repr(again) == repr(dense)
    for module in (layer, again):
        assert module.training is False
        assert (module.weight.requires_grad, module.bias.requires_grad) == trained
    assert torch.equal(again.weight, dense.weight)
    assert torch.equal(again.bias, dense.bias)
    assert torch.equal(layer.mask(), dense.weight != 0)
    assert torch.equal(layer.dense_weight(), dense.weight)
    assert layer.weight_shape == dense.weight.shape
    assert layer.nonzeros == int((dense.weight != 0).sum())
    assert layer.sparsity == pytest.approx((dense.weight == 0).float().mean().item())
    assert layer.bias.data_ptr() != dense.bias.data_ptr()
    assert torch.equal(type(layer).from_dense(again)(x), layer(x))
    for name in ("in_features", "out_features", "in_channels", "kernel_size", "stride", "padding", "dilation", "groups",
                 "padding_mode"):  # fmt: skip
        assert getattr(layer, name, None) == getattr(dense, name, None)


def test_dense_weight_is_differentiable():
    layer, _, _ = example("SparseConv2d")
    factor = torch.randn(layer.weight_shape)
    (layer.dense_weight() * factor).sum().backward()
    assert torch.equal(layer.weight.grad, factor[layer.mask()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", [False, True])
def test_copies_are_the_same_and_independent(kind, used):
    layer, _, x = example(kind)
    if used:
        layer(x).sum().backward()
        layer.zero_grad()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    wanted = outputs_and_gradients(layer, x)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert type(other) is type(layer)
        assert other.qconfig == layer.qconfig
        assert_equal(outputs_and_gradients(other, x), wanted)
        with torch.no_grad():
            other.weight.zero_()
            other.col_indices.zero_()
    assert_equal(outputs_and_gradients(layer, x), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_carries_the_pattern(kind, assign):
    """Into a layer with as many nonzeros at other places, which has computed before."""
    layer, dense, x = example(kind)
    wanted = outputs_and_gradients(layer, x)
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other.weight.copy_(other.weight.flip(0, 1))
    other = type(layer).from_dense(other)
    assert not torch.equal(other.col_indices, layer.col_indices)
    outputs_and_gradients(other, x)
    assert set(layer.state_dict()) == {"weight", "bias", "crow_indices", "col_indices", "_extra_state"}
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer), assign=assign)
    assert_equal(outputs_and_gradients(other, x), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_that_are_assigned_one_after_the_other(kind):
    """New tensors may lie where freed ones lay; the pattern must not be taken for the old one."""
    layer, dense, x = example(kind)
    patterns = []
    for dims in ((), (0,), (1,), (0, 1)):
        other = copy.deepcopy(dense)
        with torch.no_grad():
            other.weight.copy_(other.weight.flip(dims))
        patterns.append(type(layer).from_dense(other))
    wanted = [p(x).detach() for p in patterns]
    for _ in range(20):
        for pattern, expected in zip(patterns, wanted, strict=True):
            # as many times as an allocator may need to come back to an address
            for state in (patterns[0], pattern):
                layer.load_state_dict({k: v.clone() for k, v in state.state_dict().items()}, assign=True)
            assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_apply_further_mask(kind):
    layer, dense, x = example(kind)
    layer(x).sum().backward()
    parameter, grad = layer.weight, layer.weight.grad
    mask = torch.rand(layer.weight_shape) < 0.6
    kept = mask[layer.mask()]
    assert 0 < kept.sum() < kept.numel()
    layer.apply_further_mask(mask)
    assert layer.weight is parameter
    assert torch.equal(layer.weight.grad, grad[kept])
    with torch.no_grad():
        dense.weight.mul_(mask)
    fresh = type(layer).from_dense(dense)
    assert torch.equal(layer.col_indices, fresh.col_indices)
    assert torch.equal(layer.crow_indices, fresh.crow_indices)
    assert layer.crow_indices.dtype == layer.col_indices.dtype == torch.int32
    assert_equal(outputs_and_gradients(layer, x), outputs_and_gradients(fresh, x))
    # positions that do not exist are not brought back, and a float mask will do
    layer.apply_further_mask(torch.ones(layer.weight_shape))
    assert_equal(outputs_and_gradients(layer, x), outputs_and_gradients(fresh, x))
    layer.apply_further_mask(torch.zeros(layer.weight_shape))
    assert layer.nonzeros == 0
    assert layer.sparsity == 1.0
    y = layer(x)
    assert torch.equal(y, fresh.bias.detach().view(-1, *[1] * (y.ndim - 2)).expand_as(y))


@pytest.mark.parametrize("kind", KINDS)
def test_apply_further_mask_while_an_older_graph_exists(kind):
    layer, _, x = example(kind)
    older = layer(x)
    layer.apply_further_mask(torch.rand(layer.weight_shape) < 0.6)
    layer(x).sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape
    assert older.shape


def _prune(dense):
    prune.random_unstructured(dense, "weight", 0.5)
    return dense


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_with_a_mask_attached(kind):
    """`weight_orig` and the mask count; `weight` is what it was in the last forward pass."""
    dense, x = dense_example(kind, density=1.0)
    _prune(dense)
    with torch.no_grad():
        dense.weight_orig.mul_(2)
        position = tuple(dense.weight_mask.nonzero()[0])
        dense.weight_orig[position] = 0.0  # kept by the mask, zero for now
    cls = getattr(qnn, kind)
    layer = cls.from_dense(dense)
    assert torch.equal(layer.mask(), dense.weight_mask.bool())
    dense(x)  # makes `weight` new
    assert torch.equal(layer.to_dense().weight, dense.weight)
    layer(x).sum().backward()
    assert layer.weight.grad[layer.weight == 0].abs().sum() > 0, "a kept weight that is zero learns"
    assert prune.is_pruned(dense)

    prune.remove(dense, "weight")
    layer = cls.from_dense(dense)
    assert torch.equal(layer.mask(), dense.weight != 0)
    assert torch.equal(layer.to_dense().weight, dense.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_with_a_pruned_bias(kind):
    dense, x = dense_example(kind)
    prune.random_unstructured(dense, "bias", 0.5)
    with torch.no_grad():
        dense.bias_orig.add_(1)
    layer = getattr(qnn, kind).from_dense(dense)
    dense(x)
    assert torch.equal(layer.bias, dense.bias)
    assert isinstance(layer.bias, nn.Parameter)
    assert layer.bias.is_leaf


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_changes_nothing(kind):
    dense, _ = dense_example(kind)
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    state = torch.get_rng_state()
    cls = getattr(qnn, kind)
    layer = cls.from_dense(dense)
    with torch.no_grad():
        layer.weight.fill_(5)
        layer.bias.fill_(5)
    assert_equal(dense.state_dict().values(), before.values())
    assert torch.equal(torch.get_rng_state(), state)


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


# ---- numbers that are none ----

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
@settings(max_examples=8)
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


# ---- memory and the process ----


@pytest.mark.parametrize("inputs", [64, 100, 1024])
@pytest.mark.parametrize("batch", [256, 1000])
def test_a_quantised_linear_keeps_a_byte_an_activation(inputs, batch):
    layer = QuantizedSparseLinear.from_dense(set_weight(nn.Linear(inputs, 32), 0.1, 0))
    x = torch.randn(batch, inputs, requires_grad=True)
    saved = saved_for_backward(lambda: layer(x), layer)
    size = sum(t.untyped_storage().nbytes() for t in saved)
    whole_blocks = -(-batch // 64) * 64
    # a block of 64 images may have one plane more than there are features; every feature has a scale and a zero point;
    # and half a kilobyte of other things
    assert inputs * batch <= size <= (inputs + 1) * whole_blocks + 8 * inputs + 512


@pytest.mark.parametrize("shape", [(8, 16, 32, 32), (64, 32, 14, 14), (64, 64, 8, 8), (2, 64, 56, 56)])
def test_a_quantised_conv_keeps_little_more_than_a_byte_an_activation(shape):
    layer = QuantizedSparseConv2d.from_dense(set_weight(nn.Conv2d(shape[1], 16, 3, padding=1), 0.1, 0))
    x = torch.randn(shape, requires_grad=True)
    saved = saved_for_backward(lambda: layer(x), layer)
    size = sum(t.untyped_storage().nbytes() for t in saved)
    pad = (shape[2] + 1) * (shape[3] + 1) / (shape[2] * shape[3])  # rows and images share their padding
    assert x.numel() <= size <= 1.35 * pad * x.numel()


def test_nothing_of_the_float_input_is_kept():
    dense, x = dense_example("QuantizedSparseConv2d")
    layer = QuantizedSparseConv2d.from_dense(dense, qconfig=QuantConfig(granularity="tensor"))
    saved = saved_for_backward(lambda: layer(x.requires_grad_()), layer)
    assert {t.dtype for t in saved} == {torch.uint8, torch.float32, torch.int32}
    assert [t.numel() for t in saved if t.dtype == torch.float32] == [1]


def test_importing_leaves_the_process_as_it_was():
    """Denormals survive, in every thread, and there is one OpenMP runtime."""
    process = run_python("""
import qsparseprop
import torch
from qsparseprop import config
from qsparseprop.nn import QuantizedSparseLinear
import qsparseprop.utils.network_utils
layer = QuantizedSparseLinear.from_dense(torch.nn.Linear(300, 300))
layer(torch.randn(200, 300)).sum().backward()
tiny = torch.full((1 << 20,), 1e-40)
assert (tiny * 0.5 != 0).all() and (tiny + tiny > tiny).all(), "denormals are flushed to zero"
import numpy
assert (numpy.full(10, 1e-40, numpy.float32) * numpy.float32(0.5) != 0).all()
print(torch.get_num_threads(), len(config.openmp_runtimes()))
""")
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[0] == run_python("import torch; print(torch.get_num_threads())").stdout.strip()


def test_one_openmp_runtime():
    runtimes = config.openmp_runtimes()
    if not runtimes:
        pytest.skip("this operating system does not tell what is mapped")
    if not config.get_config()["openmp"]:
        pytest.skip("a build without OpenMP")
    layer, _, x = example("QuantizedSparseLinear")
    layer(x)
    process = run_python("""
import qsparseprop.nn
import torch
qsparseprop.nn.QuantizedSparseLinear.from_dense(torch.nn.Linear(300, 300))(torch.randn(200, 300)).sum().backward()
from qsparseprop import config
print(*config.openmp_runtimes(), sep="\\n")
""")
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.split("\n")) == 2, process.stdout
