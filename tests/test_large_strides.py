"""Convolutions whose stride makes many phases, as the patch embedding of every vision transformer."""

import pytest
import torch
from torch import nn

from qsparseprop import ops
from qsparseprop.layout.geometry import conv_geometry
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import make_plan
from qsparseprop.nn import QuantizedSparseConv1d, QuantizedSparseConv2d, SparseConv1d, SparseConv2d
from qsparseprop.ops import reference

from ._helpers import FLOAT_SUM, generator, random_mask, relative_error, set_weight
from .test_conv2d import check_float, check_quantised

CONVS = {
    "patches of 8": (nn.Conv2d(3, 20, 8, 8), (2, 3, 24, 32)),
    "patches of 9": (nn.Conv2d(3, 20, 9, 9), (2, 3, 27, 30)),
    "patches of 14": (nn.Conv2d(3, 20, 14, 14), (2, 3, 28, 42)),
    "patches of 16": (nn.Conv2d(3, 20, 16, 16), (2, 3, 32, 48)),
    "patches of 32": (nn.Conv2d(3, 5, 32, 32), (1, 3, 64, 64)),
    "patches that are not square": (nn.Conv2d(3, 20, (16, 9), (16, 9)), (2, 3, 32, 27)),
    "patches that overlap": (nn.Conv2d(2, 7, 12, 9, padding=4), (2, 2, 31, 36)),
    "patches with gaps": (nn.Conv2d(3, 20, 3, 16), (2, 3, 40, 35)),
    "groups": (nn.Conv2d(4, 6, 9, 10, groups=2), (3, 4, 30, 20)),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("check", [check_quantised, check_float])
def test_any_number_of_phases(name, check):
    torch.set_num_threads(1)
    conv, shape = CONVS[name]
    x = torch.randn(shape)
    for hint in (False, True):
        check(set_weight(conv, 0.1, 3), x, hint=hint)
    check(conv, x.contiguous(memory_format=torch.channels_last), "channels_last")


@pytest.mark.parametrize("cls", [SparseConv2d, QuantizedSparseConv2d])
def test_threads_change_no_bit(cls):
    conv = set_weight(nn.Conv2d(3, 48, 16, 16), 0.1, 0)
    x = torch.randn(4, 3, 112, 112)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        layer = cls.from_dense(conv)
        images = x.clone().requires_grad_()
        y = layer(images)
        torch.manual_seed(0)
        y.square().sum().backward()
        results.append([y.detach(), images.grad, layer.weight.grad])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_the_kernels_are_the_reference(isa):
    torch.set_num_threads(1)
    g = conv_geometry(3, 20, (36, 18), (9, 9), (9, 9), (0, 0, 0, 0), (1, 1), 3, False)
    mask = random_mask((20, 243), 0.1, 0)
    plan = make_plan(*dense_pattern(mask)[:2], g)
    values = torch.randn(int(mask.sum()))
    x, dy = torch.randn(3, 3, 36, 18), torch.randn(3, 20, 4, 2)
    packed = []
    scheme = ops.Scheme("symmetric", (), True)
    for t, layout in ((x, g.input_layout), (dy, g.output_layout)):
        packed.append(ops.quantize_pack(t, layout, scheme))
        for a, b in zip(packed[-1], reference.quantize_pack(t, layout, scheme), strict=True):
            assert torch.equal(a, b)
    weights = ops.quantize_weight(values, plan.backward, *packed[1][1:])
    arguments = (ops.Packed(packed[1].planes), weights, plan.backward, 3)
    assert torch.equal(ops.spmm(*arguments), reference.spmm(*arguments))
    arguments = (*packed, plan.forward, 3, values.numel())
    assert torch.equal(ops.sddmm(*arguments), reference.sddmm(*arguments))


def test_views_of_a_layout_are_those_that_it_was_given():
    """Whatever was given to the ones before, whose memory they may have."""
    g = conv_geometry(2, 3, (6, 6), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, False)
    x = torch.randn(1, 2, 6, 6)
    for i in range(1500):
        views = [*g.input_views]
        views[3:7] = 1 + i % 4, 1 + i // 4 % 4, i % 3, i // 3 % 3
        layout = ops.PlaneLayout(g.input_grid.numbers, tuple(views), (6, 6))
        planes = ops.pack(x, layout).planes
        if i % 50 == 0 or i > 1450:
            assert torch.equal(planes, reference.pack(x, layout).planes)


@pytest.mark.parametrize(("cls", "dense"), [(SparseConv1d, nn.Conv1d), (QuantizedSparseConv1d, nn.Conv1d)])
def test_one_dimension(cls, dense):
    conv = set_weight(dense(2, 5, 100, 80, padding=7), 0.2, 0)
    x = torch.randn(3, 2, 500, generator=generator(1))
    assert relative_error(cls.from_dense(conv)(x), conv(x)) < (FLOAT_SUM if cls is SparseConv1d else 0.05)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("cls", [SparseConv2d, QuantizedSparseConv2d])
def test_compiled(cls):
    torch._dynamo.reset()
    layer = cls.from_dense(set_weight(nn.Conv2d(3, 20, 16, 16), 0.1, 0))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 48, 32)
    results = []
    for call in (layer, compiled):
        images = x.clone().requires_grad_()
        layer.zero_grad()
        y = call(images)
        torch.manual_seed(0)
        y.square().sum().backward()
        results.append([y.detach(), images.grad, layer.weight.grad.clone()])
    for eager, other in zip(*results, strict=True):
        assert torch.equal(eager, other)
