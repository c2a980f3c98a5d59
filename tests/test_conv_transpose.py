"""Transposed convolutions against float64, and against the reference bit for bit."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qsparseprop import nn as qnn
from qsparseprop.layout.geometry import conv_geometry
from qsparseprop.quantization import QuantConfig

from ._helpers import (
    LAYOUTS,
    VALUES,
    examples,
    generator,
    laid_out,
    random_values,
    relative_error,
    saved_for_backward,
    set_weight,
)
from ._layers import check_float, check_quantised, check_reference, layer_cases, run

KINDS = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
CLASSES = (qnn.SparseConvTranspose2d, qnn.QuantizedSparseConvTranspose2d)

pytestmark = pytest.mark.usefixtures("one_thread")


@given(case=layer_cases(KINDS), layout=st.sampled_from(LAYOUTS))
@examples(120)
def test_float_layers_are_float64_to_rounding(case, layout):
    check_float(case, laid_out(random_values(case.shape, "normal", case.seed + 2), layout))


@given(case=layer_cases(KINDS), layout=st.sampled_from(LAYOUTS), values=st.sampled_from(VALUES),
       scheme=st.sampled_from(["absmax", "standard"]), grad=st.sampled_from(["stochastic", "absmax"]),
       granularity=st.sampled_from(["tensor", "channel"]))  # fmt: skip
@examples(200)
def test_quantised_layers_are_float64_on_dequantised_operands(case, layout, values, scheme, grad, granularity):
    x = laid_out(random_values(case.shape, values, case.seed + 2), layout)
    if granularity == "channel" and values == "normal" and layout != "expanded":
        x[:, ::2] = x[:, ::2].abs()  # around 0 or 128 by channel
    check_quantised(case, x, QuantConfig(input=scheme, grad=grad, granularity=granularity))


@pytest.mark.parametrize("values", ["normal", "positive"])
def test_the_kernels_are_the_reference(isa, values):
    dense = set_weight(nn.ConvTranspose2d(6, 8, (3, 2), (2, 3), (1, 0), (1, 2), 2, True, (2, 1)), 0.4, 0)
    layer = qnn.QuantizedSparseConvTranspose2d.from_dense(dense, False)
    x = random_values((5, 6, 4, 3), values, 0)
    out = dense(x).shape
    geometry = conv_geometry(8, 6, tuple(out[2:]), (3, 2), (2, 3), (1, 0, 0, -2), (2, 1), 5, False, True)
    check_reference(layer, dense, x, layer._plan(geometry, 2))


def test_the_kernels_are_the_reference_in_larger_layers(isa):
    """Several units of lanes, and rows of many nonzeros, which some kernels bring into another order first."""
    dense = set_weight(nn.ConvTranspose2d(24, 20, 3, 2, 1, 1), 0.5, 0)
    layer = qnn.QuantizedSparseConvTranspose2d.from_dense(dense, False)
    geometry = conv_geometry(20, 24, (28, 26), (3, 3), (2, 2), (1, 0, 1, 0), (1, 1), 4, False, True)
    check_reference(layer, dense, torch.randn(4, 24, 14, 13), layer._plan(geometry, 1))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_nan_is_not_lost(granularity):
    dense = set_weight(nn.ConvTranspose2d(3, 4, 3), 1.0, 0)
    layer = qnn.QuantizedSparseConvTranspose2d.from_dense(dense, qconfig=QuantConfig(granularity=granularity))
    x = torch.randn(2, 3, 5, 5)
    x[1, 2, 3, 3] = torch.nan
    y, _, dw, _ = run(layer, x, torch.randn(2, 4, 7, 7))
    assert not y[1, :, 3:6, 3:6].isfinite().any()
    assert not dw.view(dense.weight.shape)[2].isfinite().any()
    dy = torch.randn(2, 4, 7, 7)
    dy[0, 1, 3, 3] = torch.inf
    _, dx, dw, _ = run(layer, torch.randn(2, 3, 5, 5), dy)
    assert not dx[0, :, 1:4, 1:4].isfinite().any()
    assert not dw.view(dense.weight.shape)[:, 1].isfinite().any()


def test_a_byte_an_element_waits_for_the_backward_pass():
    layer = qnn.QuantizedSparseConvTranspose2d.from_dense(set_weight(nn.ConvTranspose2d(32, 4, 3, 2), 0.5, 0))
    for x in (torch.randn(8, 32, 32, 32), torch.rand(8, 32, 32, 32)):
        saved = saved_for_backward(lambda x=x: layer(x.requires_grad_()), layer)
        assert sum(t.numel() * t.element_size() for t in saved) < 1.3 * x.numel()
        layer.weight.requires_grad_(False)
        saved = saved_for_backward(lambda x=x: layer(x), layer)
        assert sum(t.numel() for t in saved) == 0
        layer.weight.requires_grad_(True)


@pytest.mark.parametrize("cls", CLASSES)
def test_output_size(cls):
    dense = set_weight(nn.ConvTranspose2d(3, 4, 3, stride=3, padding=1), 0.5, 0)
    layer, x = cls.from_dense(dense), torch.randn(2, 3, 4, 5)
    for size in ([10, 13], [12, 15], torch.Size([2, 4, 11, 14])):
        y = layer(x, output_size=size)
        assert y.shape == dense(x, output_size=list(size)).shape
        assert relative_error(y, dense(x, output_size=list(size))) < 0.03
        assert relative_error(layer(x[0], size[-2:]), y[0]) < 1e-6 or cls.quantized
    for bad in ([9, 13], [10, 16], [10], [4, 10, 13]):
        with pytest.raises(ValueError, match="output_size must"):
            layer(x, output_size=bad)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_bias_is_everywhere(cls):
    """Also where no tap reaches: a stride beyond the kernel, output padding, and a weight without nonzeros."""
    for density in (0.0, 1.0):
        dense = set_weight(nn.ConvTranspose2d(3, 4, 1, stride=3, output_padding=2), density, 0)
        x = torch.randn(2, 3, 4, 5)
        y, wanted = cls.from_dense(dense)(x), dense(x)
        beyond = torch.ones(12, 15, dtype=torch.bool)
        beyond[::3, ::3] = density == 0.0
        assert torch.equal(y[:, :, beyond], wanted[:, :, beyond])
        assert torch.equal(y[0, :, 1, 1], dense.bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["Sparse", "QuantizedSparse"])
def test_conversion_state_and_copies(kind, prefix):
    dims = int(kind[-2])
    dense = set_weight(getattr(nn, kind)(4, 6, 3, 2, 1, 1, 2, dilation=2), 0.4, 0).eval()
    dense.bias.requires_grad_(False)
    cls = getattr(qnn, prefix + kind)
    layer = cls.from_dense(dense)
    again = layer.to_dense()
    assert type(again) is type(dense)
    assert not again.training
    assert not again.bias.requires_grad
    assert repr(again) == repr(dense)
    assert torch.equal(again.weight, dense.weight)
    assert torch.equal(again.bias, dense.bias)
    assert torch.equal(layer.mask(), dense.weight != 0)
    assert torch.equal(layer.dense_weight(), dense.weight)
    assert layer.weight_shape == tuple(dense.weight.shape)
    assert "output_padding" in repr(layer)
    x = torch.randn(2, 4, *[5] * dims)
    y = layer(x)
    empty = cls(4, 6, 3, 2, 1, 1, 2, dilation=2)
    empty.load_state_dict(layer.state_dict())
    learnt = cls(4, 6, 3, 2, 1, 1, 2, dilation=2)
    with qnn.accept_dense_state("take_zeros"):
        learnt.load_state_dict(dense.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), empty, learnt):
        assert torch.equal(other(x), y)
    wrong = cls(6, 4, 3, 2, 1, 1, 2, dilation=2)
    with pytest.raises(RuntimeError, match="shape"):
        wrong.load_state_dict(layer.state_dict())
    further = torch.rand(layer.weight_shape) < 0.5
    layer.apply_further_mask(further)
    assert torch.equal(layer.dense_weight(), dense.weight * further)
    layer.regrow(torch.ones(layer.weight_shape), dense.weight)
    dense.weight.data[layer.dense_weight() != dense.weight] = 0
    assert torch.equal(layer.dense_weight(), dense.weight)


@pytest.mark.parametrize("cls", CLASSES)
def test_images_without_a_batch_and_no_images(cls):
    layer = cls.from_dense(set_weight(nn.ConvTranspose2d(4, 5, 3, stride=2), 0.5, 0))
    x = torch.randn(4, 5, 6)
    assert torch.equal(layer(x), layer(x[None])[0])
    none = torch.randn(0, 4, 5, 6, requires_grad=True)
    y = layer(none)
    assert y.shape == (0, 5, 11, 13)
    y.sum().backward()
    assert none.grad.shape == none.shape
    assert not layer.weight.grad.any()
    assert not layer.bias.grad.any()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_and_memory_formats(cls, dtype):
    layer = cls.from_dense(set_weight(nn.ConvTranspose2d(4, 5, 3, stride=2), 0.5, 0))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 4, 9, 8, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
        y = layer(x)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=memory_format)
        y.backward(torch.randn_like(y))
        assert x.grad.dtype == dtype
        assert x.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_refused(cls):
    with pytest.raises(ValueError, match="padding mode"):
        cls(3, 4, 3, padding_mode="reflect")
    with pytest.raises(TypeError, match=f"{cls.__name__}.from_dense expects torch.nn.ConvTranspose2d"):
        cls.from_dense(nn.Conv2d(3, 4, 3))
    layer = cls.from_dense(nn.ConvTranspose2d(3, 4, 3))
    for x in (torch.randn(2, 4, 5, 5), torch.randn(3, 5), torch.randn(2, 3, 5, 5, 5)):
        with pytest.raises(ValueError, match="expects"):
            layer(x)
    with pytest.raises(TypeError, match="floating"):
        layer(torch.ones(2, 3, 5, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="output_padding must be smaller"):
        cls(3, 4, 3, output_padding=1)(torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="would have size"):
        cls(3, 4, 1, padding=2)(torch.randn(1, 3, 4, 5))


@pytest.mark.parametrize("cls", CLASSES)
def test_parts_that_are_not_trained(cls):
    dense = set_weight(nn.ConvTranspose2d(4, 5, 3, stride=2), 0.5, 0)
    x, whole = torch.randn(3, 4, 5, 5, generator=generator(1)), cls.from_dense(dense)
    dy = torch.randn(3, 5, 11, 11)
    wanted = run(whole, x, dy)
    frozen = cls.from_dense(dense)
    frozen.weight.requires_grad_(False)
    given = x.clone().requires_grad_()
    torch.manual_seed(0)
    frozen(given).backward(dy)
    assert torch.equal(given.grad, wanted[1])
    assert frozen.weight.grad is None
    alone = cls.from_dense(dense)
    torch.manual_seed(0)
    alone(x).backward(dy)
    assert torch.equal(alone.weight.grad, wanted[2])
    with torch.no_grad():
        assert torch.equal(alone(x), wanted[0])


def test_weight_gradients_in_floats():
    dense = set_weight(nn.ConvTranspose2d(4, 5, 3, stride=2), 0.5, 0)
    layer = qnn.QuantizedSparseConvTranspose2d.from_dense(dense, qconfig=QuantConfig(grad_weight="float32"))
    x, dy = torch.randn(3, 4, 5, 5), torch.randn(3, 5, 11, 11)
    assert relative_error(run(layer, x, dy)[2], run(dense, x, dy)[2][dense.weight != 0]) < 1e-5


@pytest.mark.parametrize("qconfig", [QuantConfig.ancestor(), QuantConfig(grad="luq"), QuantConfig(check_finite=True)],
                         ids=["ancestor", "luq", "check_finite"])  # fmt: skip
def test_every_scheme_points_downhill(qconfig):
    dense = set_weight(nn.ConvTranspose2d(6, 5, 3, stride=2), 0.5, 0)
    layer = qnn.QuantizedSparseConvTranspose2d.from_dense(dense, qconfig=qconfig)
    x, dy = torch.randn(8, 6, 9, 9).relu(), torch.randn(8, 5, 19, 19)
    actual, wanted = run(layer, x, dy), run(dense, x, dy)
    wanted = (*wanted[:2], wanted[2][dense.weight != 0], wanted[3])
    for a, w in zip(actual, wanted, strict=True):
        assert torch.cosine_similarity(a.flatten(), w.flatten(), 0) > 0.8  # dithering is coarse


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["Sparse", "QuantizedSparse"])
def test_compiled(kind, prefix):
    torch._dynamo.reset()
    dims = int(kind[-2])
    layer = getattr(qnn, prefix + kind).from_dense(set_weight(getattr(nn, kind)(4, 6, 3, 2, 1, 1), 0.4, 0))
    x = torch.randn(2, 4, *[5] * dims).relu()
    dy = torch.randn(2, 6, *[10] * dims)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for eager, other in zip(run(layer, x, dy), run(compiled, x, dy), strict=True):
        assert torch.equal(eager, other)
