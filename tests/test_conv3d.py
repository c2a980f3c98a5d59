"""Convolutions over volumes, whose slices are laid out as one image, against float64 and the reference."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qsparseprop import nn as qnn
from qsparseprop.layout.geometry import conv_geometry
from qsparseprop.quantization import QuantConfig

from ._helpers import LAYOUTS, VALUES, examples, laid_out, random_values, relative_error, set_weight
from ._layers import LayerCase, check_float, check_quantised, check_reference, layer_cases, run

CLASSES = (qnn.SparseConv3d, qnn.QuantizedSparseConv3d)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # by torch, of its own implementation
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


@given(case=layer_cases(("Conv3d", "Conv3d", "Conv2d", "Conv1d")), layout=st.sampled_from(LAYOUTS))
@examples(120)
def test_float_layers_are_float64_to_rounding(case, layout):
    check_float(case, laid_out(random_values(case.shape, "normal", case.seed + 2), layout))


@given(case=layer_cases(("Conv3d", "Conv3d", "Conv2d", "Conv1d")), layout=st.sampled_from(LAYOUTS),
       values=st.sampled_from(VALUES), scheme=st.sampled_from(["absmax", "standard"]),
       grad=st.sampled_from(["stochastic", "absmax"]),
       granularity=st.sampled_from(["tensor", "channel"]))  # fmt: skip
@examples(200)
def test_quantised_layers_are_float64_on_dequantised_operands(case, layout, values, scheme, grad, granularity):
    x = laid_out(random_values(case.shape, values, case.seed + 2), layout)
    if granularity == "channel" and values == "normal" and layout != "expanded":
        x[:, ::2] = x[:, ::2].abs()  # around 0 or 128 by channel
    check_quantised(case, x, QuantConfig(input=scheme, grad=grad, granularity=granularity))


@pytest.mark.parametrize("stride", [1, (2, 1, 3)])
def test_the_kernels_are_the_reference(isa, stride):
    dense = set_weight(nn.Conv3d(6, 8, (3, 2, 3), stride, (1, 0, 2), (1, 2, 1), 2), 0.4, 0)
    layer = qnn.QuantizedSparseConv3d.from_dense(dense, False)
    x = torch.randn(3, 6, 5, 6, 7)
    geometry = conv_geometry(6, 8, (5, 6, 7), (3, 2, 3), dense.stride, (1, 1, 0, 0, 2, 2), (1, 2, 1), 3, False)
    check_reference(layer, dense, x, layer._plan(geometry, 2))


def test_the_kernels_are_the_reference_in_larger_layers(isa):
    """Several units of lanes, and rows of many nonzeros, which some kernels bring into another order first."""
    dense = set_weight(nn.Conv3d(8, 12, 3, padding=1), 0.5, 0)
    layer = qnn.QuantizedSparseConv3d.from_dense(dense, False)
    geometry = conv_geometry(8, 12, (4, 10, 11), (3, 3, 3), (1, 1, 1), (1,) * 6, (1, 1, 1), 2, False)
    check_reference(layer, dense, torch.randn(2, 8, 4, 10, 11), layer._plan(geometry, 1))


@pytest.mark.parametrize("batch_innermost", [False, True])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 3, 1), (3, 1, 2)])
def test_every_tap_finds_its_voxel(stride, batch_innermost):
    """By looking up what lies at every address that a tap reads."""
    size, kernel, dilation, pads, images = (4, 5, 3), (2, 3, 2), (2, 1, 2), (1, 2, 0, 1, 2, 0), 20
    g = conv_geometry(2, 3, size, kernel, stride, pads, dilation, images, batch_innermost)
    x = g.input_grid
    owner = torch.full((x.lanes(images),), -1)
    elements = torch.arange(images * 2 * size[0] * size[1] * size[2]).view(images, 2, -1, size[2])
    b = torch.arange(images)
    block = (b // x.images * x.block + b % x.images * x.lane_b)[:, None, None]
    for i in range(0, len(g.input_views), 9):
        plane, count, origin, rows, cols, y0, x0, ystep, xstep = g.input_views[i : i + 9]
        pixels = block + torch.arange(rows)[:, None] * x.lane_y + torch.arange(cols) * x.lane_x
        for c in range(count):
            lane = (plane + c) * x.pitch + x.front + origin + pixels
            assert (owner[lane] == -1).all(), "two views share a lane"
            owner[lane] = elements[:, c, y0 : y0 + (rows - 1) * ystep + 1 or None : ystep, x0::xstep][:, :rows, :cols]
    out = g.output_size
    for tap, (offset, shift, phase) in enumerate(zip(g.tap_offset, g.tap_shift, g.tap_phase, strict=True)):
        z, y, w = (torch.arange(n) * s + o for n, s, o in zip(out, stride, offset, strict=True))
        exists = [(v >= 0) & (v < n) for v, n in zip((z, y, w), size, strict=True)]
        exists = exists[0][:, None, None] & exists[1][:, None] & exists[2]
        for c in range(2):
            wanted = ((b[:, None, None, None] * 2 + c) * size[0] * size[1] * size[2]
                      + (z[:, None, None] * size[1] + y[:, None]) * size[2] + w)  # fmt: skip
            for k in range(out[0]):
                origin = g.output_views[9 * k + 2]
                lane = ((phase * 2 + c) * x.pitch + x.front + shift + origin + block
                        + torch.arange(out[1])[:, None] * x.lane_y + torch.arange(out[2]) * x.lane_x)  # fmt: skip
                assert torch.equal(owner[lane], torch.where(exists[k], wanted[:, k], -1)), tap


CONVS = {
    "same, even kernel": (nn.Conv3d(3, 4, (4, 2, 3), padding="same"), (2, 3, 4, 5, 6)),
    "valid": (nn.Conv3d(3, 4, 2, padding="valid"), (2, 3, 4, 5, 6)),
    "depthwise": (nn.Conv3d(6, 12, 3, padding=1, groups=6), (2, 6, 3, 4, 5)),
    "pointwise": (nn.Conv3d(20, 70, 1), (2, 20, 2, 3, 4)),
    "stem of a video network": (nn.Conv3d(3, 16, (3, 7, 7), (1, 2, 2), (1, 3, 3)), (1, 3, 6, 20, 22)),
    "tubes": (nn.Conv3d(3, 8, (2, 16, 16), (2, 16, 16)), (1, 3, 6, 32, 48)),
    "one slice": (nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1)), (2, 3, 1, 6, 5)),
    "slices alone": (nn.Conv3d(3, 8, (3, 1, 1), padding=(1, 0, 0)), (2, 3, 9, 6, 5)),
    "stride that skips voxels": (nn.Conv3d(3, 4, 2, stride=5), (2, 3, 7, 9, 8)),
    "no slice of a phase": (nn.Conv3d(2, 3, (3, 1, 1), (3, 1, 1), (2, 0, 0)), (2, 2, 1, 2, 2)),
    "small volumes, large batch": (nn.Conv3d(2, 3, 3, padding=1), (70, 2, 3, 2, 2)),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("check", [check_quantised, check_float])
def test_settings_of_convolutions(name, check):
    conv, shape = CONVS[name]
    names = ("kernel_size", "stride", "padding", "dilation", "groups")
    for hint, channels_last in itertools.product((False, True), (False, True)):
        case = LayerCase("Conv3d", (conv.in_channels, conv.out_channels), {n: getattr(conv, n) for n in names}, shape,
                         hint, 0.3, 1)  # fmt: skip
        x = torch.randn(shape)
        check(case, x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x)


@pytest.mark.parametrize("cls", CLASSES)
def test_threads_change_no_bit(cls):
    dense = set_weight(nn.Conv3d(8, 16, 3, padding=1), 0.2, 0)
    layer = cls.from_dense(dense)
    x, dy = torch.randn(2, 8, 8, 20, 20), torch.randn(2, 16, 8, 20, 20)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(layer, x, dy)[:3])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_and_memory_formats(cls, dtype):
    layer = cls.from_dense(set_weight(nn.Conv3d(4, 5, 3, padding=1), 0.5, 0))
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        x = torch.randn(3, 4, 5, 9, 8, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
        y = layer(x)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=memory_format)
        y.backward(torch.randn_like(y))
        assert x.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("cls", CLASSES)
def test_slices_that_are_far_apart_are_copied(cls):
    """Depth and height have no common stride."""
    layer = cls.from_dense(set_weight(nn.Conv3d(4, 5, 3, padding=1), 0.5, 0))
    whole = torch.randn(2, 4, 5, 14, 8)
    x, dy = whole[:, :, ::2, 3:9, 1:], torch.randn(2, 5, 3, 6, 7)
    for a, b in zip(run(layer, x, dy), run(layer, x.contiguous(), dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", CLASSES)
def test_volumes_without_a_batch_and_no_volumes(cls):
    layer = cls.from_dense(set_weight(nn.Conv3d(4, 5, 3), 0.5, 0))
    x = torch.randn(4, 5, 6, 7)
    assert torch.equal(layer(x), layer(x[None])[0])
    none = torch.randn(0, 4, 5, 6, 7, requires_grad=True)
    y = layer(none)
    assert y.shape == (0, 5, 3, 4, 5)
    y.sum().backward()
    assert none.grad.shape == none.shape
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("cls", CLASSES)
def test_conversion_state_and_copies(cls):
    dense = set_weight(nn.Conv3d(4, 6, 3, 2, 1, 2, 2), 0.4, 0)
    layer, x = cls.from_dense(dense), torch.randn(2, 4, 6, 7, 5)
    again = layer.to_dense()
    assert repr(again) == repr(dense)
    assert torch.equal(again.weight, dense.weight)
    assert torch.equal(again.bias, dense.bias)
    y = layer(x)
    assert relative_error(y, dense(x)) < 0.03
    empty, learnt = cls(4, 6, 3, 2, 1, 2, 2), cls(4, 6, 3, 2, 1, 2, 2)
    empty.load_state_dict(layer.state_dict())
    with qnn.accept_dense_state("take_zeros"):
        learnt.load_state_dict(dense.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), empty, learnt):
        assert torch.equal(other(x), y)


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_refused(cls):
    with pytest.raises(NotImplementedError, match="pads with zeros"):
        cls(3, 4, 3, padding_mode="reflect")
    with pytest.raises(TypeError, match=r"expects torch\.nn\.Conv3d"):
        cls.from_dense(nn.Conv2d(3, 4, 3))
    layer = cls.from_dense(nn.Conv3d(3, 4, 3))
    for x in (torch.randn(2, 4, 5, 5, 5), torch.randn(3, 5, 5), torch.randn(2, 2, 3, 5, 5, 5)):
        with pytest.raises(ValueError, match=r"depth, height, width"):
            layer(x)
    with pytest.raises(ValueError, match=r"5 x 2 x 5.*smaller than the kernel.*3 x 3 x 3"):
        layer(torch.randn(1, 3, 5, 2, 5))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("cls", CLASSES)
def test_compiled(cls):
    torch._dynamo.reset()
    layer = cls.from_dense(set_weight(nn.Conv3d(4, 6, 3, 2, 1, 1), 0.4, 0))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        x = torch.randn(2, 4, 5, 6, 7).contiguous(memory_format=memory_format)
        dy = torch.randn(2, 6, 3, 3, 4).contiguous(memory_format=memory_format)
        for eager, other in zip(run(layer, x, dy), run(compiled, x, dy), strict=True):
            assert torch.equal(eager, other)
