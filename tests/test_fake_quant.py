"""Layers that simulate a scheme on float weights are the real ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qsparseprop import nn as qnn
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils.network_utils import swap_modules_with_sparse

from ._helpers import DTYPES, dense_example, generator, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = {
    "default": QuantConfig(),
    "channel": QuantConfig(granularity="channel"),
    "standard, channel": QuantConfig(input="standard", granularity="channel"),
    "ancestor": QuantConfig.ancestor(),
    "sawb, channel": QuantConfig(input="sawb", grad="dithered", dither_step=0.7, granularity="channel"),
    "luq": QuantConfig(grad="luq", luq_levels=6),
    "luq, channel": QuantConfig(grad="luq", granularity="channel"),
    "absmax": QuantConfig(grad="absmax"),
    "float weight gradient": QuantConfig(grad_weight="float32"),
}


def passes(layer, x, seed):
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=generator(seed)).to(y.dtype))
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_simulated_layers_are_the_real_ones(isa, config, kind, dtype):
    dense, x = dense_example(f"QuantizedSparse{kind}")
    for inputs in (x, x.abs()):
        inputs = inputs.to(dtype)
        real = getattr(qnn, f"QuantizedSparse{kind}").from_dense(dense, qconfig=CONFIGS[config])
        fake = getattr(qnn, f"FakeQuant{kind}").from_dense(dense, qconfig=CONFIGS[config])
        actual, expected = passes(fake, inputs, 3), passes(real, inputs, 3)
        assert (actual[2][~fake.mask] == 0).all()
        actual = (*actual[:2], actual[2][fake.mask], actual[3])
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == e.dtype
            assert relative_error(a, e) < (5e-6 if e.dtype == torch.float32 else 2**-7)


def test_a_model_of_simulated_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10), nn.Linear(10, 4))
    for module in (model[0], model[3]):
        module.weight.data *= torch.rand(module.weight.shape) < 0.1
    swap_modules_with_sparse(model, (2, 3, 8, 8), verbose=False, prototype=True, qconfig=CONFIGS["channel"])
    kinds = [type(m).__name__ for m in model]
    assert kinds == ["FakeQuantConv2d", "ReLU", "Flatten", "FakeQuantLinear", "Linear"]
    assert model[0].qconfig == CONFIGS["channel"]
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    state = model.state_dict()
    assert state["0.mask"].dtype == torch.bool
    model.load_state_dict(state)
