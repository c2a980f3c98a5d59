"""What layers keep between the passes."""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from qsparseprop.layout.modes import DENSE, Modes
from qsparseprop.nn import QuantizedSparseConv2d, QuantizedSparseLinear
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils.measurement_utils import current_rss_mb, measure_peak_rss, release_free_memory

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


def _train(layer, features):
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    x = torch.randn(16, features, requires_grad=True)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        layer(x).square().mean().backward()
        optimizer.step()


def _layer(size, density):
    """A dense layer without a zero, or a sparse one all of whose products go by dense rows."""
    layer = nn.Linear(size, size, bias=False)
    nn.init.ones_(layer.weight)
    if density is None:
        return layer
    layer = QuantizedSparseLinear.from_dense(layer if density == 1 else set_weight(layer, density, 0))
    layer.product_modes = Modes(DENSE, DENSE, DENSE)
    return layer


def _added_mb(size, density):
    """What a layer adds to this process by training steps: resident afterwards, and at most meanwhile."""
    torch.set_num_threads(1)
    _train(_layer(128, density), 128)  # what the first use loads
    release_free_memory()
    before = current_rss_mb()
    layer = _layer(size, density)
    peak = measure_peak_rss(lambda: _train(layer, size))
    release_free_memory()
    return current_rss_mb() - before, peak.peak_mb - before, peak.of_call


@pytest.mark.skipif("QSPARSEPROP_SANITIZED" in os.environ, reason="a sanitizer's own memory grows with that of layers")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the memory of the process from /proc")
def test_weights_by_dense_rows_take_no_more_than_dense_ones(monkeypatch):
    """Values and gradients, 34 MB of a weight without zeros; the codes, 4 MB, are gone when the gradient comes."""
    densities, spawn = (None, 1, 0.95), multiprocessing.get_context("spawn")
    # where the other processes find this file; behind what is installed, which is what is tested
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).resolve().parents[1])])
    measured = []
    for density in densities:  # each in a process without a past
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            measured.append(pool.submit(_added_mb, 2048, density).result())
    if not all(of_call for _, _, of_call in measured):
        pytest.skip("the system does not let a process measure its peak")
    (resident, peak, _), *ours = measured
    assert 33 < resident < 40
    for density, (mb, most, _) in zip(densities[1:], ours, strict=True):
        assert mb < density * 33.6 + 2.5
        assert mb < resident + 1.5
        assert most < peak + 1.5


def test_nothing_of_the_float_input_is_kept():
    dense, x = dense_example("QuantizedSparseConv2d")
    layer = QuantizedSparseConv2d.from_dense(dense, qconfig=QuantConfig(granularity="tensor"))
    saved = saved_for_backward(lambda: layer(x.requires_grad_()), layer)
    assert {t.dtype for t in saved} == {torch.uint8, torch.float32, torch.int32}
    assert [t.numel() for t in saved if t.dtype == torch.float32] == [1]
