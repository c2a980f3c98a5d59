"""Convolutions against float64 on dequantised operands, for every setting that they accept."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qsparseprop import ops
from qsparseprop.nn import QuantizedSparseConv2d, SparseConv2d
from qsparseprop.quantization import QuantConfig

from ._helpers import (
    FLOAT_SUM,
    LAYOUTS,
    ROUNDING,
    VALUES,
    conv_cases,
    dequantized,
    dequantized_weight,
    examples,
    gradient_of,
    laid_out,
    plane_groups,
    random_values,
    relative_error,
    row_groups,
    set_weight,
    value_gradient,
)

GRADIENTS = [*LAYOUTS, "sum"]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # by torch, of its own implementation
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


def run(layer, x, grad_layout, seed):
    """Output and all gradients: of the input, of the weight, and of the bias."""
    x = x.detach().requires_grad_()
    y = layer(x)
    dy = gradient_of(y, grad_layout, seed)
    torch.manual_seed(seed)
    y.backward(dy)
    return SimpleNamespace(y=y.detach(), dy=dy, dx=x.grad, dw=value_gradient(layer),
                           db=None if layer.bias is None else layer.bias.grad)  # fmt: skip


def check_quantised(conv, x, grad_layout="contiguous", seed=0, hint=None, qconfig=None):
    """Output and gradients against float64 convolutions of what the codes stand for."""
    qconfig = qconfig or QuantConfig()
    layer = QuantizedSparseConv2d.from_dense(conv, hint, qconfig=qconfig)
    actual = run(layer, x, grad_layout, seed)
    torch.manual_seed(seed)
    drawn = ops.draw_seed() if qconfig.grad == "stochastic" else None
    per_channel = qconfig.granularity == "channel"
    xq, x_scale = dequantized(x, qconfig.input, None, per_channel)
    dy, dy_scale = dequantized(actual.dy, qconfig.grad.replace("absmax", "symmetric"), drawn, per_channel)
    # a scale for each input channel of the weight, whatever its group, and for each row
    x_factor = x_scale.view(conv.groups if per_channel else 1, 1, -1, 1, 1)
    x_factor = x_factor.expand(conv.groups, conv.out_channels // conv.groups, -1, 1, 1).flatten(0, 1)

    weight = conv.weight.detach()
    double = copy.deepcopy(conv).double()

    def passes(weight_codes):
        double.weight = nn.Parameter(weight_codes)
        operand = xq.clone().requires_grad_()
        y = double(operand)
        return y.detach(), *torch.autograd.grad(y, (operand, double.weight), dy)

    y, _, dw = passes(dequantized_weight(weight, row_groups(weight), x_factor))
    _, dx, _ = passes(dequantized_weight(weight, plane_groups(conv), dy_scale.view(-1, 1, 1, 1)))
    assert actual.dx.shape == x.shape
    sizes = [t.abs().sum().item() for t in (xq, weight.double(), dy)]
    assert relative_error(actual.y, y, sizes[0] * sizes[1]) < ROUNDING
    assert relative_error(actual.dx, dx, sizes[1] * sizes[2]) < ROUNDING
    assert relative_error(actual.dw, dw[weight != 0], sizes[0] * sizes[2]) < ROUNDING
    if conv.bias is not None:
        magnitude = actual.dy.double().abs().sum((0, 2, 3)).max()
        assert (actual.db.double() - actual.dy.double().sum((0, 2, 3))).abs().max() <= 5e-6 * magnitude
    return actual


def check_float(conv, x, grad_layout="contiguous", seed=0, hint=None):
    actual = run(SparseConv2d.from_dense(conv, hint), x, grad_layout, seed)
    wanted = run(copy.deepcopy(conv).double(), x.double(), grad_layout, seed)
    assert relative_error(actual.y, wanted.y) < FLOAT_SUM
    assert relative_error(actual.dx, wanted.dx) < FLOAT_SUM
    assert relative_error(actual.dw, wanted.dw[conv.weight != 0]) < FLOAT_SUM
    if conv.bias is not None:
        magnitude = wanted.dy.abs().sum((0, 2, 3)).max()
        assert (actual.db - wanted.db).abs().max() <= 5e-6 * magnitude


@given(case=conv_cases(), layout=st.sampled_from(LAYOUTS), values=st.sampled_from(VALUES),
       grad_layout=st.sampled_from(GRADIENTS), scheme=st.sampled_from(["absmax", "standard"]),
       grad_scheme=st.sampled_from(["stochastic", "absmax"]),
       granularity=st.sampled_from(["tensor", "channel"]))  # fmt: skip
@examples(350)
def test_quantised_conv_is_float64_on_dequantised_operands(
    case, layout, values, grad_layout, scheme, grad_scheme, granularity
):
    x = laid_out(random_values(case.shape, values, case.seed + 2), layout)
    if granularity == "channel" and values == "normal" and layout != "expanded":
        x[:, ::2] = x[:, ::2].abs()  # around 0 or 128 by channel
    qconfig = QuantConfig(input=scheme, grad=grad_scheme, granularity=granularity)
    check_quantised(case.conv(), x, grad_layout, case.seed, case.batch_innermost, qconfig)


@given(case=conv_cases(), layout=st.sampled_from(LAYOUTS), values=st.sampled_from(VALUES),
       grad_layout=st.sampled_from(GRADIENTS))  # fmt: skip
@examples(150)
def test_float_conv_is_float64_to_rounding(case, layout, values, grad_layout):
    x = laid_out(random_values(case.shape, values, case.seed + 2), layout)
    check_float(case.conv(), x, grad_layout, case.seed, case.batch_innermost)


@pytest.mark.parametrize("check", [check_quantised, check_float])
@pytest.mark.parametrize("hint", [None, False, True])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize(
    ("batch", "size", "padding"),
    [
        (64, (7, 7), 1), (16, (7, 7), 1), (1, (31, 31), 1), (64, (3, 3), 2), (64, (6, 2), 2), (2, (15, 15), 1),
        (1, (63, 30), 1),
    ],
)  # fmt: skip
def test_images_that_fill_their_planes_exactly(check, hint, channels, batch, size, padding):
    """Where no lane is left between the last image and the end of a plane, block or buffer."""
    conv = set_weight(nn.Conv2d(channels, 2, 2 * padding + 1 if padding < 2 else 3, padding=padding), 1.0, 0)
    check(conv, torch.randn(batch, channels, *size), hint=hint)


CONVS = {
    "depthwise": (nn.Conv2d(12, 12, 3, padding=1, groups=12), (3, 12, 9, 8)),
    "depthwise, multiplied": (nn.Conv2d(6, 18, (5, 3), 2, 1, groups=6), (3, 6, 9, 8)),
    "pointwise": (nn.Conv2d(33, 70, 1), (3, 33, 5, 4)),
    "pointwise, stride 2": (nn.Conv2d(8, 20, 1, stride=2), (3, 8, 7, 6)),
    "stem of an ImageNet network": (nn.Conv2d(3, 16, 7, stride=2, padding=3), (2, 3, 33, 32)),
    "asymmetric stride": (nn.Conv2d(4, 5, 3, stride=(1, 3), padding=(2, 0)), (2, 4, 6, 11)),
    "kernel as large as the image": (nn.Conv2d(4, 70, (6, 5)), (9, 4, 6, 5)),
    "kernel larger than the image": (nn.Conv2d(4, 5, 7, padding=3), (2, 4, 3, 2)),
    "padding larger than the kernel": (nn.Conv2d(2, 3, 2, padding=(5, 3)), (2, 2, 3, 4)),
    "dilation beyond the image": (nn.Conv2d(3, 4, 3, padding=9, dilation=9), (2, 3, 4, 5)),
    "same, even kernel": (nn.Conv2d(3, 4, (4, 2), padding="same"), (2, 3, 5, 6)),
    "same, dilated": (nn.Conv2d(3, 4, (2, 5), padding="same", dilation=(3, 2)), (2, 3, 7, 6)),
    "valid": (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 7, 6)),
    "one row": (nn.Conv2d(3, 4, (1, 9), padding=(0, 4)), (2, 3, 1, 200)),
    "one column": (nn.Conv2d(3, 4, (9, 1), stride=(4, 1)), (2, 3, 200, 1)),
    "stride that skips pixels": (nn.Conv2d(3, 4, 2, stride=5), (2, 3, 14, 17)),
    "many channels": (nn.Conv2d(150, 130, 3, padding=1), (2, 150, 3, 3)),
    "large batch": (nn.Conv2d(2, 3, 3, padding=1), (150, 2, 4, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("check", [check_quantised, check_float])
def test_settings_of_convolutions(name, channels_last, check):
    conv, shape = CONVS[name]
    conv = set_weight(copy.deepcopy(conv), 0.3, 1)
    x = torch.randn(shape)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for hint in (None, False, True):
        check(conv, x, "channels_last" if channels_last else "contiguous", hint=hint)


@given(case=conv_cases(), layout=st.sampled_from(LAYOUTS))
@examples(50)
def test_the_hint_changes_no_bit_of_integers(case, layout):
    x = laid_out(random_values(case.shape, "normal", case.seed), layout)
    results = [run(QuantizedSparseConv2d.from_dense(case.conv(), hint), x, "contiguous", 3)
               for hint in (None, False, True)]
    for other in results[1:]:
        for name in ("y", "dx", "dw"):
            assert torch.equal(getattr(other, name), getattr(results[0], name)), name


def test_the_hint_means_what_it_does_in_sparseprop():
    """ON is the width of the output: True puts pixels of a row side by side, False images of the batch."""
    for hint in (False, True):
        layer = QuantizedSparseConv2d.from_dense(set_weight(nn.Conv2d(4, 5, 3), 0.5, 0), hint)
        layer(torch.randn(32, 4, 9, 9))
        *_, batch_innermost = layer.last_plan().geometry.numbers
        assert batch_innermost == (not hint)


@pytest.mark.parametrize("cls", [SparseConv2d, QuantizedSparseConv2d])
@pytest.mark.parametrize("bias", [False, True])
def test_images_without_a_batch(cls, bias):
    conv = set_weight(nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=bias), 0.5, 0)
    layer = cls.from_dense(conv)
    x = torch.randn(4, 9, 8)
    results = []
    for shaped in (x, x[None]):
        shaped = shaped.clone().requires_grad_()
        layer.zero_grad()
        y = layer(shaped)
        torch.manual_seed(0)
        y.square().sum().backward()
        results.append([y.detach(), shaped.grad, layer.weight.grad.clone()])
    (y, dx, dw), (batch_y, batch_dx, batch_dw) = results
    assert y.shape == (5, 5, 4)
    assert dx.shape == x.shape
    assert torch.equal(y, batch_y[0])
    assert torch.equal(dx, batch_dx[0])
    assert torch.equal(dw, batch_dw)


@pytest.mark.parametrize("cls", [SparseConv2d, QuantizedSparseConv2d])
def test_no_images(cls):
    layer = cls.from_dense(set_weight(nn.Conv2d(4, 5, 3), 0.5, 0))
    x = torch.randn(0, 4, 9, 8, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 5, 7, 6)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not layer.weight.grad.any()
    assert not layer.bias.grad.any()


@pytest.mark.parametrize("cls", [SparseConv2d, QuantizedSparseConv2d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_formats_are_kept(cls, dtype):
    layer = cls.from_dense(set_weight(nn.Conv2d(4, 5, 3, padding=1), 0.5, 0))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 4, 9, 8, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
        y = layer(x)
        assert y.is_contiguous(memory_format=memory_format)
        y.backward(torch.randn_like(y))
        assert x.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("cls", [SparseConv2d, QuantizedSparseConv2d])
def test_one_layer_serves_many_sizes(cls):
    """More sizes than tables are kept, in any order, and odd last batches."""
    conv = set_weight(nn.Conv2d(3, 4, 3, stride=2, padding=1), 0.5, 0)
    layer = cls.from_dense(conv)
    inputs = [torch.randn(batch, 3, size, size + 3) for size in range(3, 9) for batch in (1, 33)]
    wanted = [cls.from_dense(conv)(x) for x in inputs]
    for _ in range(2):
        for x, y in zip(inputs, wanted, strict=True):
            assert torch.equal(layer(x), y)
    assert len(layer._plans) <= 8


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_weights_and_all_weights(density):
    conv = set_weight(nn.Conv2d(4, 6, 3, padding=1), density, 0)
    x = torch.randn(5, 4, 6, 7)
    check_float(conv, x)
    actual = check_quantised(conv, x)
    if density == 0.0:
        assert torch.equal(actual.y, conv.bias.detach()[:, None, None].expand_as(actual.y))
        assert not actual.dx.any()
        assert actual.dw.numel() == 0


def test_sums_over_more_lanes_than_an_int32_holds():
    """66,312 lanes of the largest codes."""
    conv = nn.Conv2d(1, 1, 1, bias=False)
    layer = QuantizedSparseConv2d.from_dense(conv)
    x = torch.ones(3, 1, 190, 190, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad.item() == pytest.approx(3 * 190 * 190, rel=1e-6)


def test_training_like_float32():
    """Gradients point downhill: a sparse student learns from a sparse teacher, as fast as without quantisation."""
    teacher = set_weight(nn.Conv2d(3, 8, 3, padding=1), 0.4, 0)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.weight.mul_(torch.rand_like(student.weight) + 0.5)
    x = torch.randn(16, 3, 8, 8)
    target = teacher(x).detach()

    def train(layer):
        optimizer = torch.optim.Adam(layer.parameters(), 0.05)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    quantised, wanted = (train(cls.from_dense(student)) for cls in (QuantizedSparseConv2d, SparseConv2d))
    assert wanted[-1] < 0.3 * wanted[0]
    for q, w in zip(quantised, wanted, strict=True):
        assert q == pytest.approx(w, rel=0.1)
