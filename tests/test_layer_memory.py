"""What layers keep between the passes."""

import pytest
import torch
from torch import nn

from qsparseprop.nn import QuantizedSparseConv2d, QuantizedSparseLinear
from qsparseprop.quantization import QuantConfig

from ._helpers import dense_example, saved_for_backward, set_weight

pytestmark = pytest.mark.usefixtures("one_thread")


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
